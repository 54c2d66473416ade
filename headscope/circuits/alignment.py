"""How much of the embedding and of the unembedding lies where a head reads and writes."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.circuits.dictionary import Dictionary, Gram
from headscope.circuits.factors import HeadFactors
from headscope.circuits.orthogonal import column_space


def read_alignment(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Share of the embedding's variance in the subspace that a head reads.

    ``tr(Q.T @ C @ Q) / tr(C)`` with Q an orthonormal basis of the left factor's columns and C the
    covariance of the token embeddings. Range [0, 1]; by chance d_head / d_model. Known weakness:
    all directions of the subspace count alike, also those that the head hardly uses.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> share = hs.circuits.read_alignment(hs.circuits.ov(model), words)
        >>> bool(((share >= 0) & (share <= 1)).all())
        True
    """
    shares = [
        _share(left, words, "input", layer, few=factors.few)
        for layer, left in zip(factors.layers, factors.left, strict=True)
    ]
    return factors.per_head(torch.stack(shares))


def write_alignment(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Share of the unembedding's variance in the subspace that a head writes.

    As :func:`read_alignment`, for the right factor's rows and the directions of all logits. Low
    where a head writes for later layers rather than for the output.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> share = hs.circuits.write_alignment(hs.circuits.ov(model), words)
        >>> share.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    shares = [_share(right.mT, words, "output", 0, few=factors.few) for right in factors.right]
    return factors.per_head(torch.stack(shares))


def _share(
    side: Float[Tensor, "some_head d_model d_head"],
    words: Dictionary,
    kind: Gram,
    layer: int,
    *,
    few: bool,
) -> Float[Tensor, " some_head"]:
    basis, _ = column_space(side)
    inside = (basis * words.gram_times(kind, layer, basis, few=few)).sum((-2, -1))
    return inside / words.gram_trace(kind, layer)
