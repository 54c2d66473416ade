"""Probes: batches of token sequences with known structure."""

from headscope.probes.jsonl import from_jsonl
from headscope.probes.pairs import pairs
from headscope.probes.probe import Probe
from headscope.probes.repeated import random_tokens, repeated_tokens
from headscope.probes.text import text
from headscope.probes.tokens import from_tokens
from headscope.probes.vocabulary import HasVocabulary, uses_bos

__all__ = [
    "HasVocabulary",
    "Probe",
    "from_jsonl",
    "from_tokens",
    "pairs",
    "random_tokens",
    "repeated_tokens",
    "text",
    "uses_bos",
]
