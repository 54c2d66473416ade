"""Attention with exact zeros: entmax and top-k rows made of softmax rows.

A softmax row tells its scores up to a constant, so both follow from the row alone. Where a learned
sink takes part of a row, it is one more key that takes part in the sparse row too.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.edits.head_edit import HeadEdit, Heads, Scope, head_list
from headscope.errors import InputError
from headscope.heads import HeadIndex

# Shares of a row below this are rounding, not a sink.
_SINK = 1e-4
_TINY = 1e-38
_STEPS = 30  # of bisection: a threshold to 1e-9
_SOFTEST = 1.01  # below this, fp32 has no digits left for the power 1 / (alpha - 1)

Positions = Any


def entmax(
    heads: Heads,
    alpha: float | Float[Tensor, "layer head"] = 1.5,
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """Attention becomes alpha-entmax of the scores: keys that are far behind get exactly 0.

    ``p_j = max((alpha - 1) s_j - tau, 0) ^ (1 / (alpha - 1))``, with the ``tau`` that makes them
    sum to 1. 1 is the softmax, 2 the sparsemax; with 1.5 keys whose score is 2 or more below the
    best have 0.

    Args:
        heads: which.
        alpha: 1, or 1.01 and more; a number for all, or one for every head, which may ask for a
            gradient.
        positions: of the queries; None: all.
        scope: ``prefill``, ``decode`` or ``all``.

    Raises:
        InputError: for another alpha.

    Source:
        Peters et al. 2019 (arXiv 1905.05702); Correia et al. 2019, "Adaptively Sparse
        Transformers" (arXiv 1909.00015), for an alpha per head and its gradient.

    Example:
        >>> edit = hs.edits.entmax("L0H0", 2.0)
        >>> edit(0, torch.tensor([[[[0.9, 0.1]]]])).tolist()
        [[[[1.0, 0.0]]]]
    """
    chosen = head_list(heads)
    values = _alphas(chosen, alpha)
    low = values.detach().min()
    if not bool(torch.isfinite(values.detach()).all()) or (low < _SOFTEST and low != 1):
        raise InputError(f"alpha={float(low):g}: entmax takes 1 (softmax), or 1.01 and more.")
    if bool((values.detach() == 1).any()) and not bool((values.detach() == 1).all()):
        raise InputError("alpha: heads with softmax (1) need no edit; name the others alone.")
    donors = {}
    for layer in {head.layer for head in chosen}:
        size = 1 + max(head.head for head in chosen if head.layer == layer)
        mine = [at for at, head in enumerate(chosen) if head.layer == layer]
        index = torch.tensor([chosen[at].head for at in mine], device=values.device)
        row = values.new_full((size,), 1.5).index_copy(0, index, values[mine])
        donors[layer] = row[:, None, None]
    return HeadEdit.at(
        "entmax", chosen, site="pattern", donors=donors, change=entmax_rows,
        positions=positions, scope=scope,
    )  # fmt: skip


def top_k(heads: Heads, k: int, *, positions: Positions = None, scope: Scope = "all") -> HeadEdit:
    """Attention goes to each query's k highest-scoring keys alone; the softmax is over these.

    Of equal scores the earlier key is taken.

    Args:
        heads: which.
        k: 1 or more; queries that see fewer keys keep all.
        positions: of the queries; None: all.
        scope: ``prefill``, ``decode`` or ``all``.

    Raises:
        InputError: if k is not a whole number from 1 on.

    Source:
        Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention"
        (arXiv 2106.06899).

    Example:
        >>> edit = hs.edits.top_k("L0H0", 2)
        >>> edit(0, torch.tensor([[[[0.5, 0.25, 0.25]]]])).tolist()
        [[[[0.666..., 0.333..., 0.0]]]]
    """
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r}: the number of keys that a query keeps is 1 or more.")
    return HeadEdit.at(
        "top_k", heads, site="pattern", change=lambda rows, _: top_rows(rows, k),
        positions=positions, scope=scope,
    )  # fmt: skip


def entmax_rows(
    pattern: Float[Tensor, "*any key"], alpha: Tensor | None
) -> Float[Tensor, "*any key"]:
    """Rows of alpha-entmax made of softmax rows; a key with probability 0 keeps 0.

    Args:
        pattern: softmax rows, less what a sink takes.
        alpha: broadcasts to the rows, ``[... 1]``; all 1: the rows as they are.
    """
    if alpha is None or bool((alpha.detach() == 1).all()):
        return pattern
    sink = _sink_of(pattern)
    whole = torch.cat([pattern, sink], -1)
    scores = whole.clamp_min(_TINY).log().masked_fill(whole <= 0, -math.inf)
    made: Tensor = _Entmax.apply(scores, alpha)  # type: ignore[no-untyped-call]  # torch has no types here
    return made[..., :-1]


def top_rows(pattern: Float[Tensor, "*any key"], k: int) -> Float[Tensor, "*any key"]:
    """Softmax rows over the k most probable keys, made of rows over all."""
    if k >= pattern.shape[-1]:
        return pattern
    order = pattern.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros_like(pattern).scatter(-1, order, pattern.gather(-1, order))
    return kept / (kept.sum(-1, keepdim=True) + _sink_of(pattern)).clamp_min(_TINY)


def _sink_of(pattern: Float[Tensor, "*any key"]) -> Float[Tensor, "*any 1"]:
    """Share of a row that a learned sink takes; 0 where there is none."""
    missing = 1 - pattern.sum(-1, keepdim=True)
    return missing.masked_fill(missing < _SINK, 0.0)


def _alphas(heads: tuple[HeadIndex, ...], alpha: float | Tensor) -> Float[Tensor, " one"]:
    if not isinstance(alpha, Tensor):
        return torch.full((len(heads),), float(alpha))
    if alpha.ndim != 2:
        raise InputError(f"alpha has shape {list(alpha.shape)}: give a number, or [layer head].")
    for head in heads:
        if head.layer >= alpha.shape[0] or head.head >= alpha.shape[1]:
            raise InputError(f"alpha of shape {list(alpha.shape)} has no value for {head}.")
    layers, numbers = zip(*heads, strict=True)
    return alpha[list(layers), list(numbers)]


class _Entmax(torch.autograd.Function):
    """Entmax by bisection, with the gradients of scores and alpha in closed form."""

    @staticmethod
    def forward(
        ctx: Any, scores: Float[Tensor, "*any key"], alpha: Tensor
    ) -> Float[Tensor, "*any key"]:
        less = alpha - 1
        z = (scores - scores.amax(-1, keepdim=True)) * less
        low = -torch.ones_like(z[..., :1])
        high = -(float(scores.shape[-1]) ** -less) * torch.ones_like(low)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            over = (z - middle).clamp_min(0).pow(1 / less).sum(-1, keepdim=True) >= 1
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        p = (z - low).clamp_min(0).pow(1 / less)
        p = p / p.sum(-1, keepdim=True)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,) = grads
        p, alpha = ctx.saved_tensors
        less = alpha - 1
        inside = p > 0
        g = torch.where(inside, p.clamp_min(_TINY).pow(1 - less), 0.0)
        share = g / g.sum(-1, keepdim=True)
        of_scores = g * (grad - (grad * share).sum(-1, keepdim=True))
        if not ctx.needs_input_grad[1]:
            return of_scores, None
        h = torch.special.entr(p)
        slope = (p - share) / less.square() + (h - share * h.sum(-1, keepdim=True)) / less
        return of_scores, (grad * slope).sum_to_size(alpha.shape)
