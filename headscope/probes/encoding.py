"""From texts or token ids to padded batches; positions are found by character offset."""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.base.batches import TEXT, TOKENS, Batch
from headscope.errors import HeadscopeWarning, InputError
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import Tokenizer

_KEPT = "a text begins with the model's BOS already: it is kept, and no second is put in front."


@dataclass(frozen=True)
class Encoded:
    """Token ids of one text and, for each, the characters that it stands for.

    A token that was put in front of the text has the span (0, 0).
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    def covering(self, start: int, end: int) -> list[int]:
        """Positions of the tokens that hold any character of ``text[start:end]``.

        White space at the edges of the range is ignored, since many tokenizers keep the space
        in front of a word in the word's token.
        """
        part = self.text[start:end]
        start, end = end - len(part.lstrip()), start + len(part.rstrip())
        return [i for i, (a, b) in enumerate(self.spans) if a < end and b > start]

    def word(self, start: int, end: int) -> int | None:
        """Position of the one token that is exactly ``text[start:end]``; None if there is none."""
        found = self.covering(start, end)
        if len(found) != 1:
            return None
        a, b = self.spans[found[0]]
        return found[0] if self.text[a:b].strip() == self.text[start:end].strip() else None


def encode(
    tokenizer: Tokenizer, text: str, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> Encoded:
    """Tokenize one text, with ``prefix`` in front in place of the tokenizer's own specials.

    A text that begins with the prefix already, such as a copied prompt, keeps it once.

    Args:
        tokenizer: of the model.
        text: any.
        prefix: ids put in front.
        suffix: ids put behind.
    """
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [(int(a), int(b)) for a, b in out["offset_mapping"]]
    ids = list(out["input_ids"])
    if prefix and ids[: len(prefix)] == list(prefix):
        warnings.warn(_KEPT, HeadscopeWarning, stacklevel=2)
        prefix = ()
    around = [(0, 0)] * len(prefix), [(0, 0)] * len(suffix)
    return Encoded(text, [*prefix, *ids, *suffix], [*around[0], *spans, *around[1]])


def pad_right(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Stack token lists of different lengths; what stands at padding is never looked at."""
    length = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    sizes = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(length)[None] < sizes[:, None]


def next_tokens(
    tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"]:
    """Token after each position; -1 at the last one and at padding."""
    targets = torch.full_like(tokens, -1)
    targets[:, :-1] = tokens[:, 1:].where(real[:, 1:] & real[:, :-1], -1)
    return targets


def is_delimiter(text: str) -> bool:
    """Whether a token's text is a line break, or nothing but punctuation and spaces."""
    shown = text.strip()
    if not shown:
        return "\n" in text
    return all(unicodedata.category(c).startswith("P") or c.isspace() for c in shown)


def delimiters(
    tokenizer: Tokenizer, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """Punctuation, line breaks and special separators, by decoded text.

    The first token of each example is never among them: what it gets is the sink's, which
    ``first_token`` measures.
    """
    ids = sorted(set(tokens[real].tolist()))
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    chosen = [i for i, text in zip(ids, texts, strict=True) if i in special or is_delimiter(text)]
    mark = torch.isin(tokens, torch.tensor(chosen, dtype=tokens.dtype)) & real
    return mark & (real.cumsum(1) > 1)


def separators(
    tokenizer: Tokenizer, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Mark ``separator`` of an encoder's text, ``[SEP]`` or ``</s>``; none where it has no such."""
    token = getattr(tokenizer, "sep_token_id", None)
    return {} if token is None else {"separator": (tokens == int(token)) & real}


def at_positions(
    length: int, positions: Sequence[int | Sequence[int]]
) -> Bool[Tensor, "batch pos"]:
    """One mark: for each example, True at its positions."""
    mark = torch.zeros(len(positions), length, dtype=torch.bool)
    for row, places in zip(mark, positions, strict=True):
        row[places] = True
    return mark


def from_tokens(
    tokens: Int[Tensor, "batch pos"] | Sequence[Sequence[int]],
    real: Bool[Tensor, "batch pos"] | None = None,
    marks: Mapping[str, Bool[Tensor, "batch pos"]] | None = None,
    targets: Int[Tensor, "batch pos"] | None = None,
    clusters: Sequence[int] | Int[Tensor, " batch"] | None = None,
) -> Probe:
    """Use your own ids as a probe; equal tokens count as repetitions.

    Args:
        tokens: token ids, as the model reads them (BOS included, if you want one).
        real: False at padding, on either side; None means no padding.
        marks: named sets of positions.
        targets: token to predict at each position, -1 for none; None means the next token, which
            an encoder cannot be asked for.
        clusters: a label per example; those with one label (a needle, a document, a template)
            count as one observation in errors, intervals and tests.

    Raises:
        InputError: if the shapes do not fit each other.

    Example:
        >>> probe = from_tokens([[5, 7, 9, 5, 7, 9]])
        >>> probe.targets.tolist()
        [[7, 9, 5, 7, 9, -1]]
    """
    try:
        given = torch.as_tensor(tokens)
        whole_numbers = not (given.is_floating_point() or given.is_complex())
        if given.numel() and (given.dtype == torch.bool or not whole_numbers):
            raise TypeError
        ids = given.long()
    except (TypeError, ValueError) as error:
        raise InputError(
            "the token rows are not all whole numbers, or differ in length: "
            "pad them to one length and say with real= which are tokens."
        ) from error
    shown = torch.ones_like(ids, dtype=torch.bool) if real is None else torch.as_tensor(real).bool()
    named = {str(name): torch.as_tensor(mark).bool() for name, mark in (marks or {}).items()}
    probe = Probe(tokens=ids, real=shown, structure=ids, targets=ids, marks=named)
    return replace(
        probe,
        structure=ids.where(shown, -1),
        targets=next_tokens(ids, shown) if targets is None else targets,
        next_token=targets is None,
        clusters=None if clusters is None else torch.as_tensor(clusters).long(),
    )


def from_batch(
    inputs: Mapping[str, Any],
    marks: Mapping[str, Bool[Tensor, "batch pos"]] | None = None,
    targets: Int[Tensor, "batch pos"] | None = None,
) -> Probe:
    """Use the inputs of a model as a probe, named as a tokenizer names them.

    Args:
        inputs: ``input_ids [batch pos]``, and ``attention_mask`` where there is padding; of an
            encoder-decoder also ``decoder_input_ids`` and ``decoder_attention_mask``, whose
            positions are then the probe's, and ``input_features`` where it hears sound.
        marks: named sets of positions; those of an encoder-decoder's source under ``"source"``.
        targets: token to predict at each position, -1 for none; None means the next token, which
            an encoder cannot be asked for.

    Raises:
        InputError: if there are no token ids, shapes differ, or an input (a second segment, an
            image) would change what the model computes in a way that headscope does not hand on.

    Example:
        >>> read = {"input_ids": [[5, 7, 9], [5, 7, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
        >>> hs.probes.from_batch(read).real.sum(1).tolist()
        [3, 2]
    """
    if "decoder_input_ids" in inputs:
        return _from_sides(inputs, marks, targets)
    batch = Batch.of(inputs, targets)
    return from_tokens(batch.inputs[TOKENS], batch.masks[TEXT], marks, batch.targets)


_SIDES = {"input_ids", "input_features", "attention_mask", "decoder_input_ids"}


def _from_sides(inputs: Mapping[str, Any], marks: Any, targets: Any) -> Probe:
    """The probe of an encoder-decoder's inputs."""
    from headscope.probes.translation import of_sides

    if unknown := sorted(set(inputs) - _SIDES - {"decoder_attention_mask"}):
        hint = ": give targets=, -1 where there is none" if unknown[0] == "labels" else ""
        raise InputError(f"headscope cannot hand an encoder-decoder {unknown[0]!r}{hint}.")
    names = {TOKENS: "decoder_input_ids", "attention_mask": "decoder_attention_mask"}
    given = {name: inputs[own] for name, own in names.items() if inputs.get(own) is not None}
    decoder = Batch.of(given, targets)
    if (features := inputs.get("input_features")) is not None:
        beside = {"input_features": torch.as_tensor(features)}
        if beside["input_features"].ndim != 3:
            raise InputError(
                f"'input_features' has shape {tuple(beside['input_features'].shape)}, not "
                "[batch mel frame]."
            )
    elif inputs.get(TOKENS) is None:
        raise InputError(
            "'decoder_input_ids' come without a source: give input_ids or input_features too."
        )
    else:
        source = Batch.of({n: inputs[n] for n in (TOKENS, "attention_mask") if n in inputs})
        beside = {TOKENS: source.inputs[TOKENS], "attention_mask": source.masks[TEXT].long()}
    return of_sides(
        decoder.inputs[TOKENS], decoder.masks[TEXT], beside, targets=decoder.targets, marks=marks
    )
