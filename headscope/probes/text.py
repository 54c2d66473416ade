"""Text probes: a bundled sample, a file, or strings; for encoders with masked tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import paragraphs, read_text
from headscope.errors import InputError, UnsupportedModelError
from headscope.probes.encoding import (
    HasVocabulary,
    check_length,
    delimiters,
    encode,
    frame,
    need_tokenizer,
    next_tokens,
    pad_right,
    reads_onwards,
    separators,
)
from headscope.probes.probe import Probe


@checked
def text(
    model: HasVocabulary,
    texts_or_path: str | Path | Sequence[str] | None = None,
    length: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    *,
    bos: bool | None = None,
) -> Probe:
    """Make a probe of natural text, padded on the right; targets are the next tokens.

    Punctuation has the mark ``delimiter``. For an encoder, texts are wrapped in the tokens that its
    tokenizer puts around them, marked ``separator``, and have no targets:
    :func:`headscope.probes.masked` hides tokens of it.

    The control shuffles the tokens of each example (the BOS stays) and keeps ``structure`` and the
    marks: same length, same words, same frequencies, no order. What a head still does at the old
    positions is not due to the text's structure. It is paired.

    Pieces cut from one text form a cluster: errors and tests count texts.

    Args:
        model: its tokenizer encodes the text.
        texts_or_path: None for twelve bundled passages; strings, one example each; or a UTF-8 file
            (a ``Path``, or a string that names one), whose paragraphs, separated by blank lines,
            are the examples.
        length: cut every text into pieces of this many tokens, BOS included; a shorter rest is
            dropped unless it is the whole text. None keeps texts whole; the bundled passages are
            then cut to the model's context.
        batch: keep only this many examples, drawn with ``seed``. None keeps all.
        seed: seed of that draw and of the control.
        bos: whether to prepend a BOS (for an encoder, ``[CLS]`` and ``[SEP]`` around); None follows
            the model's tokenizer.

    Raises:
        InputError: if there is no text, too little of it, or too much for the context.

    Example:
        >>> probe = hs.probes.text(model, ["The cat sat on the mat.", "The dog ran."])
        >>> probe.real.all(1).tolist()  # the second is padded
        [True, False]
    """
    tokenizer = need_tokenizer(model, "a text probe")
    prefix, suffix = frame(model, bos)
    texts, source = _read(texts_or_path)
    encoded = [encode(tokenizer, one, prefix, suffix).ids for one in texts]
    if length is not None:
        cut = [_pieces(ids, prefix, suffix, length) for ids in encoded]
        rows = [piece for pieces in cut for piece in pieces]
        source_of = [number for number, pieces in enumerate(cut) for _ in pieces]
    elif texts_or_path is None and model.shape.n_ctx is not None:
        rows = [_cut(ids, suffix, model.shape.n_ctx) for ids in encoded]
        source_of = list(range(len(rows)))
    else:
        rows = encoded
        source_of = list(range(len(rows)))
    for number, row in enumerate(rows, 1):
        if len(row) - len(suffix) < 2:
            raise InputError(f"text {number} of {source} has fewer than two tokens: leave it out.")
        check_length(
            model,
            len(row),
            what=f"text {number} of {source}",
            fix="cut it with length=..., or split it",
        )
    generator = torch.Generator().manual_seed(seed)
    if batch is not None:
        if not 1 <= batch <= len(rows):
            raise InputError(
                f"{source} gives {len(rows)} examples, fewer than batch={batch}: give more text, "
                "or a smaller batch or length."
            )
        chosen = torch.randperm(len(rows), generator=generator)[:batch].sort().values
        rows = [rows[i] for i in chosen.tolist()]
        source_of = [source_of[i] for i in chosen.tolist()]
    tokens, real = pad_right(rows)
    shuffled = [_shuffled(row, len(prefix), len(suffix), generator) for row in rows]
    onwards = reads_onwards(model)
    marks = {"delimiter": delimiters(tokenizer, tokens, real)}
    if not onwards:
        marks |= separators(tokenizer, tokens, real)
    probe = Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=next_tokens(tokens, real) if onwards else torch.full_like(tokens, -1),
        next_token=onwards,
        marks=marks,
        name="text",
        seed=seed,
        settings={"source": source, "length": length, "bos": bool(prefix)},
        clusters=_clusters(source_of),
    )
    other = pad_right(shuffled)[0]
    control = replace(
        probe,
        tokens=other,
        targets=next_tokens(other, real) if onwards else probe.targets,
        name="text_control",
        control=None,
        paired=True,
    )
    return replace(probe, control=control)


def _read(texts_or_path: str | Path | Sequence[str] | None) -> tuple[list[str], str]:
    """The texts, and a name for their source."""
    if texts_or_path is None:
        bundled = files("headscope.probes").joinpath("data", "passages.txt")
        return paragraphs(bundled.read_text("utf-8")), "the bundled passages"
    if isinstance(texts_or_path, str) and not _names_a_file(texts_or_path):
        texts_or_path = [texts_or_path]
    if not isinstance(texts_or_path, str | Path | Iterable):
        raise InputError(f"{texts_or_path!r} is neither texts nor a path of a file of texts.")
    if not isinstance(texts_or_path, (str, Path)):
        texts, source = list(texts_or_path), "the texts given"
    else:
        texts = paragraphs(read_text(texts_or_path))
        source = Path(texts_or_path).name
    if (wrong := next((one for one in texts if not isinstance(one, str)), None)) is not None:
        raise InputError(f"{source}: {wrong!r} is not a text.")
    if not texts or not any(one.strip() for one in texts):
        raise InputError(f"{source}: no text in it: give at least one sentence.")
    return texts, source


def _names_a_file(one: str) -> bool:
    """Whether a string is a path: an existing file, or a single word with a file extension."""
    if "\n" in one or len(one) > 1000:
        return False
    looks_like_one = " " not in one and Path(one).suffix in (".txt", ".md")
    return looks_like_one or Path(one).is_file()


def _cut(ids: list[int], suffix: list[int], room: int) -> list[int]:
    """Truncate a text to the available room, with the suffix after it."""
    return ids if len(ids) <= room else [*ids[: room - len(suffix)], *suffix]


def _pieces(ids: list[int], prefix: list[int], suffix: list[int], length: int) -> list[list[int]]:
    """Cut ``ids`` into pieces of ``length`` tokens, each with prefix and suffix."""
    size = length - len(prefix) - len(suffix)
    if size < 1 or length < 2:
        least = max(2, len(prefix) + len(suffix) + 1)
        raise InputError(f"length={length}: give {least} or more, to leave room for text.")
    body = ids[len(prefix) : len(ids) - len(suffix)]
    whole = [body[i : i + size] for i in range(0, len(body) - size + 1, size)] or [body]
    return [[*prefix, *piece, *suffix] for piece in whole]


def _clusters(source_of: list[int]) -> Int[Tensor, " batch"] | None:
    """Text that each example was cut from; None if each comes from its own."""
    return torch.tensor(source_of) if len(set(source_of)) < len(source_of) else None


def _shuffled(row: list[int], before: int, after: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(row) - before - after, generator=generator) + before
    return [*row[:before], *(row[i] for i in order.tolist()), *row[len(row) - after :]]


_SHARE = 0.15


@checked
def masked(
    model: HasVocabulary,
    source: str | Path | Sequence[str] | Probe | None = None,
    count: int | None = None,
    *,
    at: str | None = None,
    mask_token: int | None = None,
    length: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Probe:
    """Make a masked-language-modelling probe: some tokens hidden, and the targets what they were.

    Position i predicts the token of position i: nothing is shifted. Hidden positions have the mark
    ``masked`` and are the only ones with a target, so that every metric reads those alone;
    ``structure`` keeps the original tokens. Every hidden token becomes the mask token (Devlin et
    al. 2019, arXiv 1810.04805, also leave some as they are, or put random tokens, in training).

    Args:
        model: an encoder with a masked-language-model head.
        source: texts or a file, as :func:`headscope.probes.text` takes them, or a probe.
        count: number of hidden tokens per example; default: 15% of the candidates, at least one.
        at: mark of the candidates for hiding; default: all but special tokens.
        mask_token: id of the mask token; default: the tokenizer's.
        length: tokens of a piece of text, see :func:`headscope.probes.text`.
        batch: number of examples drawn from the texts.
        seed: seed of the draw of positions, and of examples if ``batch`` is given.

    Raises:
        InputError: if an example has fewer candidates than ``count``, or there is no mask token.
        UnsupportedModelError: if the model predicts next tokens.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
        >>> small |= {"num_attention_heads": 2, "intermediate_size": 16}
        >>> encoder = hs.load(BertForMaskedLM(BertConfig(**small)).eval())
        >>> probe = hs.probes.masked(encoder, hs.probes.random_tokens(encoder, 12), 2, mask_token=3)
        >>> (probe.targets >= 0).sum(1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]
    """
    if reads_onwards(model):
        raise UnsupportedModelError(
            f"{model.name} reads from left to right and was not trained to fill in hidden tokens: "
            "use hs.probes.text, whose targets are the next tokens."
        )
    if count is not None and count < 1:
        raise InputError(f"count={count}: give 1 or more.")
    token = _mask_token(model, mask_token)
    if isinstance(source, Probe):
        if length is not None or batch is not None:
            raise InputError("length= and batch= apply to texts: leave them out for a probe.")
        whole = source
    else:
        whole = text(model, source, length, batch, seed)
    hidden = _drawn(_may_be_hidden(model, whole, at, token), count, seed)
    return replace(
        whole,
        tokens=whole.tokens.masked_fill(hidden, token),
        targets=whole.tokens.where(hidden, -1),
        next_token=False,
        foils=None,
        marks={**whole.marks, "masked": hidden},
        name="masked",
        seed=seed,
        settings={**whole.settings, "count": count, "at": at, "mask_token": token},
        control=None,
        corrupt=None,
    )


def _mask_token(model: HasVocabulary, given: int | None) -> int:
    """Id of the mask token.

    Raises:
        InputError: if there is none, or it is outside the model's vocabulary.
    """
    token = getattr(model.tokenizer, "mask_token_id", None) if given is None else given
    if token is None:
        raise InputError(
            f"the tokenizer of {model.name} has no mask token: give its id, mask_token=."
            if model.tokenizer is not None
            else f"{model.name} has no tokenizer: give the id of its mask token, mask_token=."
        )
    if not 0 <= token < model.shape.d_vocab:
        raise InputError(
            f"mask_token={token}: {model.name} knows tokens 0 to {model.shape.d_vocab - 1}."
        )
    return int(token)


def _may_be_hidden(
    model: HasVocabulary, probe: Probe, at: str | None, token: int
) -> Bool[Tensor, "batch pos"]:
    """Candidates for hiding: real positions without special tokens, or those with a mark."""
    if at is not None:
        return probe.mark(at) & probe.real
    special = [token, *([] if model.tokenizer is None else model.tokenizer.all_special_ids)]
    return probe.real & ~torch.isin(probe.tokens, torch.tensor(special))


def _drawn(
    candidates: Bool[Tensor, "batch pos"], count: int | None, seed: int
) -> Bool[Tensor, "batch pos"]:
    """Draw some of the candidates of every example."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros_like(candidates)
    for number, row in enumerate(candidates, 1):
        places: Int[Tensor, " place"] = row.nonzero().squeeze(1)
        wanted = max(1, round(_SHARE * len(places))) if count is None else count
        if len(places) < wanted:
            raise InputError(
                f"example {number} has {len(places)} tokens that may be hidden, and {wanted} were "
                "asked for: give longer texts, or a smaller count."
            )
        order = torch.randperm(len(places), generator=generator)[:wanted]
        hidden[number - 1, places[order]] = True
    return hidden
