"""Probe configs: the YAML form used by ``headscope scan --probe`` and by sweeps."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from headscope.base.configs import Strict
from headscope.errors import InputError
from headscope.probes.encoding import HasVocabulary
from headscope.probes.needle import needle
from headscope.probes.pairs import pairs
from headscope.probes.probe import Probe
from headscope.probes.prompts import from_jsonl
from headscope.probes.random_tokens import random_tokens, repeated_tokens
from headscope.probes.text import masked, text


class ProbeConfig(Strict):
    """Configuration of a probe; keys that its kind does not take are errors.

    Attributes:
        kind: ``repeated_tokens``, ``random_tokens``, ``text``, ``masked``, ``ioi``, ``pairs``,
            ``needle`` or ``jsonl``.
        length: tokens of one copy, of the random text, or of a piece of text.
        batch: number of examples.
        seed: random seed.
        copies: number of copies in ``repeated_tokens``.
        bos: whether to prepend a BOS; default: as the model's tokenizer does.
        file: input file of ``text``, ``masked`` and ``jsonl``.
        texts: texts of ``text`` and ``masked``, instead of a file.
        count: tokens that ``masked`` hides in each example.
        task: task of ``pairs``, see :func:`headscope.probes.pairs`.
        lengths, depths, needles, haystack, per_cell, distractors, control, chat: options of
            ``needle``, see :func:`headscope.probes.needle`.
    """

    kind: Literal[
        "repeated_tokens", "random_tokens", "text", "masked", "ioi", "pairs", "needle", "jsonl"
    ]
    length: int | None = Field(default=None, ge=1, le=10_000_000)
    batch: int | None = Field(default=None, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    copies: int | None = Field(default=None, ge=2, le=1000)
    bos: bool | None = None
    file: Path | None = None
    texts: tuple[str, ...] | None = None
    count: int | None = Field(default=None, ge=1, le=1_000_000)
    task: str | None = None
    lengths: int | tuple[int, ...] | None = None
    depths: int | tuple[float, ...] | None = None
    needles: str | None = None
    haystack: Path | None = None
    per_cell: int | None = Field(default=None, ge=1, le=1_000_000)
    distractors: int | None = Field(default=None, ge=0, le=1000)
    control: Literal["removed", "other_question", "distractor"] | None = None
    chat: bool | None = None


_NEEDLE = ("lengths", "depths", "needles", "haystack", "per_cell", "distractors", "control", "chat")
# Keys that each kind takes besides its own name and the seed.
_TAKES = {
    "repeated_tokens": ("length", "batch", "copies", "bos"),
    "random_tokens": ("length", "batch", "bos"),
    "text": ("length", "batch", "bos", "file", "texts"),
    "masked": ("length", "batch", "file", "texts", "count"),
    "ioi": ("batch",),
    "pairs": ("task", "batch", "bos"),
    "needle": (*_NEEDLE, "bos"),
    "jsonl": ("file", "bos"),
}


def build_probe(config: ProbeConfig, model: HasVocabulary) -> Probe:
    """Build the probe for one model.

    Raises:
        InputError: if a key does not belong to this kind, or the probe does not fit the model.
    """
    given = {
        key: value for key, value in config if value is not None and key not in ("kind", "seed")
    }
    takes = _TAKES[config.kind]
    for key in given:
        if key not in takes:
            raise InputError(
                f"a probe of kind {config.kind!r} has no {key!r}; it takes: "
                f"{', '.join(('seed', *takes))}."
            )
    if config.kind == "jsonl":
        if config.file is None:
            raise InputError("a probe of kind 'jsonl' needs a file.")
        return from_jsonl(model, config.file, bos=config.bos)
    if config.kind == "ioi":
        return pairs(model, "ioi", seed=config.seed, **given)
    if config.kind == "pairs":
        return pairs(model, seed=config.seed, **given)
    if config.kind == "needle":
        return needle(model, seed=config.seed, **given)
    if config.kind in ("text", "masked"):
        if config.file is not None and config.texts is not None:
            raise InputError(f"a probe of kind {config.kind!r} takes a file or texts, not both.")
        source = given.pop("file", None) or given.pop("texts", None)
        texts = list(source) if isinstance(source, tuple) else source
        read = text if config.kind == "text" else masked
        return read(model, texts, seed=config.seed, **given)
    make = repeated_tokens if config.kind == "repeated_tokens" else random_tokens
    return make(model, seed=config.seed, **given)
