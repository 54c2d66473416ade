"""Probes: batches of token sequences, or of images, with known structure."""

from headscope.probes.encoding import HasVocabulary, from_batch, from_tokens, paired, uses_bos
from headscope.probes.images import images, random_images
from headscope.probes.needle import Needle, needle
from headscope.probes.pairs import pairs
from headscope.probes.probe import Probe
from headscope.probes.prompts import from_jsonl, in_context
from headscope.probes.random_tokens import random_tokens, recall, repeated_tokens, tree_recall
from headscope.probes.text import masked, text
from headscope.probes.translation import copied_tokens, translation

__all__ = [
    "HasVocabulary",
    "Needle",
    "Probe",
    "copied_tokens",
    "from_batch",
    "from_jsonl",
    "from_tokens",
    "images",
    "in_context",
    "masked",
    "needle",
    "paired",
    "pairs",
    "random_images",
    "random_tokens",
    "recall",
    "repeated_tokens",
    "text",
    "translation",
    "tree_recall",
    "uses_bos",
]
