"""Causal effects of heads: ablation, groups, pairs, patching and paths, by suffix replay."""

from headscope.ablation.donors import head_means as head_means
from headscope.ablation.donors import head_values as head_values
from headscope.ablation.heads import ablate_heads as ablate_heads
