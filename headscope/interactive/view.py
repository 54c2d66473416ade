"""Attention of many heads on one text, and the viewer that shows it."""

from collections.abc import Iterable

import numpy as np
import torch

from headscope.capture import collect
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.origin import origin
from headscope.probes import Probe, from_tokens, repeated_tokens
from headscope.probes.encoding import encode
from headscope.probes.vocabulary import frame, need_tokenizer
from headscope.report import AttentionView
from headscope.table import AttentionExample

EXAMPLE = "When Mary and John went to the store, John gave a drink to Mary. " * 2
_MOST_TOKENS = 1024
_LARGEST_PATTERNS = 1 << 30


def attention_example(
    model: HeadModel,
    text: str | None = None,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    length: int | None = None,
) -> AttentionExample:
    """Attention of chosen heads on one text, in steps of 1/255.

    Args:
        model: from :func:`headscope.load`.
        text: what the model reads; default: two sentences said twice, or random tokens said twice
            where the model has no tokenizer.
        heads: which; default: all.
        length: tokens that are kept of the text, from its start; default: the context, at most
            1024.

    Raises:
        InputError: if the text is empty, the model has no such head, or the patterns would take
            over 1 GB.
    """
    chosen = [
        model.shape.check(HeadIndex.parse(head))
        for head in (model.shape.heads if heads is None else heads)
    ]
    if not chosen:
        raise InputError("give at least one head.")
    if length is not None and length < 1:
        raise InputError(f"length={length}: at least one token.")
    probe, words = _probe(model, text, length or _MOST_TOKENS)
    if len(chosen) * probe.length**2 > _LARGEST_PATTERNS:
        raise InputError(
            f"{len(chosen)} heads on {probe.length} tokens are more than 1 GB of attention: name "
            "fewer heads, or give a shorter length."
        )
    patterns: dict[HeadIndex, np.ndarray] = {}
    for layer in sorted({head.layer for head in chosen}):
        mine = sorted({head.head for head in chosen if head.layer == layer})
        found = collect(model, probe, layers=[layer], heads=mine)[layer]
        for place, head in enumerate(mine):
            patterns[HeadIndex(layer, head)] = found.pattern[0, place].float().numpy()
    return AttentionExample.of(
        chosen,
        probe.batch.labels(model.tokenizer),
        np.stack([patterns[head] for head in chosen]),
        words,
        origin(model),
    )


def _probe(model: HeadModel, text: str | None, length: int) -> tuple[Probe, str]:
    """The text as tokens, or random tokens said twice."""
    room = min(length, model.shape.n_ctx or length)
    if text is None and model.tokenizer is None:
        half = max(1, min(16, (room - 1) // 2))
        return repeated_tokens(model, length=half, batch=1), "Random tokens said twice."
    said = EXAMPLE.strip() if text is None else text
    if not said.strip():
        raise InputError("the text is empty: give a sentence.")
    tokenizer = need_tokenizer(model, "a text")
    before, after = frame(model, None)
    ids = encode(tokenizer, said, before, after).ids
    words = "A sentence said twice." if text is None else "Your text."
    cut = "" if len(ids) <= room else f" The first {room} of {len(ids)} tokens."
    return from_tokens(torch.tensor([ids[:room]])), words + cut


_LARGEST_PAGE = 30_000_000


def attention_view(
    model: HeadModel,
    text: str | None = None,
    heads: "Iterable[str | tuple[int, int]] | None" = None,
    *,
    length: int | None = None,
) -> AttentionView:
    """Show where heads look: tokens in a line, a thumbnail per head, whole in one frame.

    In a notebook the last value of a cell shows itself; ``.save("view.html")`` writes a file that
    opens offline. Probabilities are kept in steps of 1/255.

    Args:
        model: from :func:`headscope.load`.
        text: what the model reads; default: two sentences said twice, or random tokens said twice
            where the model has no tokenizer.
        heads: which, in this order; default: all.
        length: tokens that are kept of the text, from its start; default: the context, at most
            1024.

    Raises:
        InputError: if the text is empty, the model has no such head, or there is more to show
            than a notebook bears.

    Example:
        >>> hs.attention_view(model, "the cat sat on the cat", heads=["L2H1", "L1H2"])
        AttentionView(L2H1, L1H2 on ... tokens)
    """
    found = attention_example(model, text, heads, length=length)
    if found.pattern.size > 2 * _LARGEST_PAGE:
        raise InputError(
            f"{len(found.heads)} heads on {len(found.tokens)} tokens would be "
            f"{found.pattern.size / 2e6:.0f} MB in the notebook: name fewer heads, or give a "
            "shorter length."
        )
    return AttentionView(found)
