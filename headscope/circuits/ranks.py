"""Where a wanted token stands among all tokens that a head's circuit points at."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.circuits.factors import HeadFactors

# Entries of one block of scores of all heads of a layer: 64 MB in fp32.
_BLOCK_ENTRIES = 1 << 24

Lookup = Callable[[Int[Tensor, " token"]], Float[Tensor, "token d_model"]]


class Ranks(NamedTuple):
    """How many tokens come before the wanted one, 0 being first; ties go to the lowest id.

    Attributes:
        promoted: counted from the largest score down.
        suppressed: counted from the smallest score up.
    """

    promoted: Int[Tensor, "layer head pair"]
    suppressed: Int[Tensor, "layer head pair"]


def target_ranks(
    factors: HeadFactors,
    source: Callable[[int], Float[Tensor, "pair d_model"]],
    outputs: Lookup,
    targets: Int[Tensor, " pair"],
    d_vocab: int,
) -> Ranks:
    """Rank of each pair's target in ``source @ left @ right @ outputs.T``, for every head.

    Nothing of size vocabulary x vocabulary is built: each block of the vocabulary is compared
    with the target's own score and forgotten.

    Args:
        factors: circuits of the heads, biases not used.
        source: vectors of the pairs' sources, given a layer number.
        outputs: vectors of tokens at the far end.
        targets: token wanted for each source.
        d_vocab: number of tokens.

    Example:
        >>> words, ids = hs.circuits.Dictionary(model), torch.arange(50, 54)
        >>> ranks = hs.circuits.target_ranks(
        ...     hs.circuits.ov(model), lambda layer: words.inputs(ids, layer), words.outputs, ids,
        ...     model.shape.d_vocab,
        ... )
        >>> ranks.promoted.shape == (model.shape.n_layers, model.shape.n_heads, 4)
        True
    """
    found = []
    for place, layer in enumerate(factors.layers):
        inner = torch.einsum("nd,hde->hne", source(layer), factors.left[place])
        inner = factors.per_head(inner[None])[0]
        right = factors.per_head(factors.right[place][None])[0]
        found.append(_one_layer(inner, right, outputs, targets, d_vocab))
    promoted, suppressed = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Ranks(promoted, suppressed)


def _one_layer(
    inner: Float[Tensor, "head pair d_head"],
    right: Float[Tensor, "head d_head d_model"],
    outputs: Lookup,
    targets: Int[Tensor, " pair"],
    d_vocab: int,
) -> tuple[Tensor, Tensor]:
    n_heads, pairs, _ = inner.shape
    wanted = torch.einsum("hed,nd->hne", right, outputs(targets))
    own = (inner * wanted).sum(-1, keepdim=True)
    above = torch.zeros(n_heads, pairs, dtype=torch.long, device=inner.device)
    below = torch.zeros_like(above)
    for ids in _blocks(d_vocab, n_heads * max(pairs, inner.shape[2]), inner.device):
        scores = inner @ (right @ outputs(ids).T)
        before = ids < targets[:, None]
        equal = (scores == own) & before
        other = ids != targets[:, None]  # rounding must not set a token above itself
        above += (((scores > own) & other) | equal).sum(-1)
        below += (((scores < own) & other) | equal).sum(-1)
    return above, below


def _blocks(d_vocab: int, width: int, device: torch.device) -> Iterator[Int[Tensor, " token"]]:
    size = max(1, _BLOCK_ENTRIES // width)
    return iter(torch.arange(d_vocab, device=device).split(size))
