"""Sequence-to-sequence probes: sources for the encoder, targets for the decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import read_text
from headscope.errors import InputError
from headscope.probes.encoding import pad_right
from headscope.probes.probe import Probe

Sentences = str | Path | Sequence[str] | Sequence[Sequence[int]] | Tensor
_FEATURES = "input_features"
# Default maximum length of a generated target.
_GENERATED = 64


@checked
def translation(
    model: Any,
    sources: Sentences,
    targets: Sentences | None = None,
    *,
    marks: Mapping[str, Any] | None = None,
    length: int = _GENERATED,
) -> Probe:
    """Make a probe of sources with their targets; the decoder is teacher-forced.

    The probe's tokens are the decoder's inputs: the target after the start token that the model's
    config names, shifted as the model itself does. The target at position i is target token i
    (``probe.targets``), including the end of the text. ``probe.source`` is the encoder's input,
    whose last real position has the mark ``end``.

    Args:
        model: an encoder-decoder, from :func:`headscope.load`.
        sources: texts (or a file with one text per line), rows of token ids, or, for a speech
            model, features ``[batch mel frame]``.
        targets: texts or a file, or rows of token ids to predict (without the start token, with the
            end); None: the model's greedy output.
        marks: named positions of the target, ``[batch pos]``, and under ``"source"`` those of the
            source by name.
        length: maximum number of generated tokens.

    Raises:
        InputError: if the model is not an encoder-decoder, or the numbers of sources and targets
            differ.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        >>> small.decoder_start_token_id = 0
        >>> t5 = hs.load(T5ForConditionalGeneration(small).eval())
        >>> probe = hs.probes.translation(t5, [[5, 6, 7, 1], [8, 9, 1]], [[6, 5, 1], [9, 8, 1]])
        >>> probe.tokens.tolist(), probe.targets.tolist()
        ([[0, 6, 5], [0, 9, 8]], [[6, 5, 1], [9, 8, 1]])
        >>> probe.source.real.sum(1).tolist()
        [4, 3]
    """
    need_sides(model)
    read, real = _source(model, sources)
    if targets is None:
        decoder, labels, shown = _generated(model, read, real, length)
        origin = f"generated greedily, {length} tokens at most"
    else:
        rows = _rows(model, targets, target=True)
        if len(rows) != len(read):
            raise InputError(
                f"there are {len(read)} sources and {len(rows)} targets: give one target for each "
                "source, or leave targets out to have them generated."
            )
        labels, shown = pad_right(rows)
        decoder, origin = model.decoder_inputs(labels, shown), "given"
    beside = {_FEATURES: read} if real is None else {"input_ids": read}
    if real is not None:
        beside |= {"attention_mask": real.long()}
    return of_sides(
        decoder,
        shown,
        beside,
        frames=model.frames,
        targets=labels.where(shown, -1),
        marks=marks,
        name="translation",
        settings={"targets": origin},
    )


@checked
def copied_tokens(model: Any, length: int = 20, batch: int = 8, seed: int = 0) -> Probe:
    """Make random sources whose targets are the same tokens; random features for a speech model.

    A fallback when no texts are available; models were not trained on such inputs.

    Args:
        model: an encoder-decoder.
        length: tokens of a source and of a target.
        batch: number of examples.
        seed: seed of the draw.

    Raises:
        InputError: if the model is not an encoder-decoder, or the length does not fit.

    Example:
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> small = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        >>> small.decoder_start_token_id = 0
        >>> t5 = hs.load(T5ForConditionalGeneration(small).eval())
        >>> probe = hs.probes.copied_tokens(t5, length=6, batch=2)
        >>> bool((probe.targets == probe.source.tokens).all())
        True
    """
    need_sides(model)
    if length < 1 or batch < 1:
        raise InputError(f"length={length}, batch={batch}: give 1 or more for both.")
    shapes = [model.stack(name).shape for name in ("encoder", "decoder")]
    limits = [shape.n_ctx for shape in shapes if shape.n_ctx is not None]
    if length > min(limits, default=length):
        raise InputError(f"{model.name} reads {min(limits)} tokens at most; got length={length}.")
    generator = torch.Generator().manual_seed(seed)
    special = [] if model.tokenizer is None else list(model.tokenizer.all_special_ids)
    known = torch.arange(min(5, shapes[1].n_logits - 1), shapes[1].n_logits)
    known = known[~torch.isin(known, torch.tensor(special, dtype=torch.long))]
    ids = known[torch.randint(len(known), (batch, length), generator=generator)]
    source: Any = ids
    if model.frames is not None:
        config = model.module.config
        size = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        source = torch.randn(size, generator=generator)
    probe = translation(model, source, ids)
    settings: dict[str, Any] = {"length": length, "targets": "the source"}
    return replace(probe, name="copied_tokens", seed=seed, settings=settings)


def of_sides(
    decoder: Int[Tensor, "batch pos"],
    shown: Bool[Tensor, "batch pos"],
    beside: Mapping[str, Tensor],
    *,
    frames: int | None = None,
    targets: Int[Tensor, "batch pos"] | None = None,
    marks: Mapping[str, Any] | None = None,
    name: str = "tokens",
    settings: Mapping[str, Any] | None = None,
) -> Probe:
    """Make a probe from a decoder's and an encoder's inputs.

    Args:
        decoder: token ids.
        shown: False at padding.
        beside: encoder inputs, ``input_ids`` and ``attention_mask``, or features.
        frames: number of encoder positions, if it reads features; default: half of the frames
            given.
        targets: token that each position should predict, -1 for none; None: the next one.
        marks: marks of the decoder's positions; under ``"source"`` those of the encoder's.
        name: kind of probe.
        settings: how it was made.
    """
    own, of_source = _split(marks or {})
    if _FEATURES in beside:
        features = beside[_FEATURES]
        size = (len(features), frames or features.shape[-1] // 2)
        read = torch.zeros(size, dtype=torch.long)
        real = torch.ones(size, dtype=torch.bool)
    else:
        read, real = beside["input_ids"], beside["attention_mask"].bool()
    if targets is None:
        targets = torch.full_like(decoder, -1)
        follows = shown[:, 1:] & shown[:, :-1]
        targets[:, :-1] = decoder[:, 1:].where(follows, -1)
    source = Probe(
        tokens=read,
        real=real,
        structure=torch.full_like(read, -1) if _FEATURES in beside else read.where(real, -1),
        targets=torch.full_like(read, -1),
        name=f"{name}, source",
    )
    ends = torch.zeros_like(real)
    ends[torch.arange(len(ends)), source.last] = True
    return Probe(
        tokens=decoder,
        real=shown,
        structure=decoder.where(shown, -1),
        targets=targets,
        marks=own,
        name=name,
        settings=settings or {},
        inputs=beside,
        source=replace(source, marks={"end": ends, **of_source}),
    )


def _split(marks: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split marks into those of the target and those of the source."""
    given = marks.get("source", {})
    if not isinstance(given, Mapping):
        raise InputError("marks of the source stand by their names in a mapping under 'source'.")
    own = {name: torch.as_tensor(one).bool() for name, one in marks.items() if name != "source"}
    return own, {name: torch.as_tensor(one).bool() for name, one in given.items()}


def need_sides(model: Any) -> None:
    """Refuse a model that is not an encoder-decoder.

    Raises:
        InputError: with the model's name.
    """
    if "cross" not in getattr(model, "stacks", {}) or not hasattr(model, "decoder_inputs"):
        raise InputError(f"{model.name} is not an encoder-decoder: use hs.probes.text.")


def _source(model: Any, sources: Sentences) -> tuple[Tensor, Tensor | None]:
    """Encoder input and its mask; no mask for features."""
    if isinstance(sources, Tensor) and sources.is_floating_point():
        return sources, None
    if model.frames is not None:
        raise InputError(
            f"{model.name} is a speech model: give features [batch mel frame], as its feature "
            "extractor makes them."
        )
    return pad_right(_rows(model, sources, target=False))


def _rows(model: Any, given: Sentences, *, target: bool) -> list[list[int]]:
    """Token ids of every example, with the special tokens of the model's tokenizer."""
    side = "target" if target else "source"
    if isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, str | Path):
        lines = read_text(Path(given)).splitlines()
        given = [line.strip() for line in lines]
        if blank := [number for number, line in enumerate(given, 1) if not line]:
            raise InputError(f"line {blank[0]} of the {side} file is empty: give a text on each.")
    rows = list(given)
    if not rows:
        raise InputError(f"there is no {side}: give one or more.")
    if not all(isinstance(row, str) for row in rows):
        try:
            ids = [[int(one) for one in row] for row in rows if not isinstance(row, str)]
        except (TypeError, ValueError) as error:
            raise InputError(f"each {side} is a text or a row of token ids.") from error
        if len(ids) != len(rows) or not all(ids):
            raise InputError(f"each {side} is a text or a row of token ids, and none is empty.")
        return ids
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: give each {side} as token ids.")
    named: dict[str, Any] = {"text_target": rows} if target else {"text": rows}
    return [list(ids) for ids in model.tokenizer(**named)["input_ids"]]


def _generated(
    model: Any, source: Tensor, real: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder inputs, targets and mask of greedy generation, up to the end of each text."""
    if length < 1:
        raise InputError(f"length={length}: give 1 or more.")
    made = model.translate(source, real, length)
    decoder, labels = made[:, :-1], made[:, 1:]
    config = model.module.generation_config
    ends = config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(labels, torch.tensor(known, dtype=torch.long))
    before = ended.long().cumsum(1) - ended.long() == 0
    return decoder, labels, before
