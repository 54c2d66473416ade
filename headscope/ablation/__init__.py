"""Causal effects of heads: ablation, estimates, groups, pairs, activation and path patching."""

from headscope.ablation.groups import ablate_cumulatively as ablate_cumulatively
from headscope.ablation.groups import ablate_groups as ablate_groups
from headscope.ablation.groups import interactions as interactions
from headscope.ablation.heads import ablate_heads as ablate_heads
from headscope.ablation.heads import estimate_heads as estimate_heads
from headscope.ablation.heads import screen_heads as screen_heads
from headscope.ablation.patching import back_patch as back_patch
from headscope.ablation.patching import patch_activations as patch_activations
from headscope.ablation.patching import patch_stream as patch_stream
from headscope.ablation.patching import path_patch as path_patch
from headscope.ablation.patching import restore as restore
from headscope.interventions import head_means as head_means
from headscope.interventions import head_values as head_values
