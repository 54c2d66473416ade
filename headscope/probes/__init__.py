"""Probes: batches of token sequences, or of images, with known structure."""

from headscope.probes.encoding import from_batch, from_tokens, paired
from headscope.probes.images import images, random_images
from headscope.probes.in_context import in_context
from headscope.probes.jsonl import from_jsonl
from headscope.probes.needle import needle
from headscope.probes.needle_sets import Needle
from headscope.probes.pairs import pairs
from headscope.probes.probe import Probe
from headscope.probes.recall import recall, tree_recall
from headscope.probes.repeated import random_tokens, repeated_tokens
from headscope.probes.text import masked, text
from headscope.probes.translation import copied_tokens, translation
from headscope.probes.vocabulary import HasVocabulary, uses_bos

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
