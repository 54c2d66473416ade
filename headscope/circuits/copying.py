"""Copying by OV circuits and matching by QK circuits, read from weights over the vocabulary."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.progress import Advance
from headscope.circuits.factors import HeadFactors
from headscope.circuits.measures import eigenvalue_ratio, target_ranks
from headscope.circuits.vocabulary import Dictionary, Gram
from headscope.models.running import own_types


@own_types()
def copying_eigenvalues(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Eigenvalue copying score of OV circuits: ``sum(Re(lambda)) / sum(|lambda|)``.

    lambda: eigenvalues of the token-to-logit matrix ``E @ W_V @ W_O @ W_U.T``, those of the
    d_head x d_head matrix ``W_O @ (W_U.T @ E) @ W_V``. Range [-1, 1]: 1 copies, -1 suppresses
    what it attends to.

    Source: Elhage et al. 2021; folded and centred as in Olsson et al. 2022. Known weakness: not
    discriminative alone (a quarter of GPT-2 small's heads exceed 0.95).

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> scores = hs.circuits.copying_eigenvalues(hs.circuits.ov(model), words)
        >>> bool(((scores >= -1) & (scores <= 1)).all())
        True
    """
    return eigenvalue_ratio(token_cores(factors, words, "output_input"))


@own_types()
def matching_eigenvalues(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Eigenvalue matching score of QK circuits: the same ratio for ``E @ W_QK @ E.T``.

    Range [-1, 1]: 1 where queries look for keys of their own token, -1 where they avoid them.
    The mean over the vocabulary is removed from E, since what all tokens share matches in every
    head. Holds at the distance that the factors were made for.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> scores = hs.circuits.matching_eigenvalues(hs.circuits.qk(model), words)
        >>> bool(((scores >= -1) & (scores <= 1)).all())
        True
    """
    return eigenvalue_ratio(token_cores(factors, words, "input"))


@own_types()
def copying_share(
    factors: HeadFactors, words: Dictionary, tokens: Int[Tensor, " token"], k: int = 1
) -> Float[Tensor, "layer head"]:
    """Share of tokens that the OV circuit maps to themselves: among the k largest logits.

    Range [0, 1]; chance is k / vocabulary. All logits count, sources are ``tokens`` alone.
    Source: the top-1 version is common in tutorials (ARENA); k as in Wang et al. 2022.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> scores = hs.circuits.copying_share(hs.circuits.ov(model), words, torch.arange(50, 60))
        >>> bool(((scores >= 0) & (scores <= 1)).all())
        True
    """
    return share_within(copying_ranks(factors, words, tokens, k), k)


def copying_ranks(
    factors: HeadFactors,
    words: Dictionary,
    tokens: Int[Tensor, " token"],
    limit: int,
    advance: Advance | None = None,
) -> Int[Tensor, "layer head token"]:
    """Places of tokens among what the OV circuit makes of them, from 0; ``limit``: there or later.

    One pass over the vocabulary serves every k up to the limit.
    """
    return target_ranks(
        factors,
        lambda layer: words.inputs(tokens, layer),
        words.outputs,
        tokens,
        words.size,
        limit=limit,
        advance=advance,
    ).promoted


@own_types()
def matching_share(
    factors: HeadFactors, words: Dictionary, tokens: Int[Tensor, " token"], k: int = 1
) -> Float[Tensor, "layer head"]:
    """Share of tokens whose query scores the key of the same token among the k highest.

    Range [0, 1]; chance is k / vocabulary. Holds at the distance that the factors were made for,
    and without biases; every key counts at its own embedding's length.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> scores = hs.circuits.matching_share(hs.circuits.qk(model), words, torch.arange(50, 60))
        >>> bool(((scores >= 0) & (scores <= 1)).all())
        True
    """
    return share_within(matching_ranks(factors, words, tokens, k), k)


def matching_ranks(
    factors: HeadFactors,
    words: Dictionary,
    tokens: Int[Tensor, " token"],
    limit: int,
    advance: Advance | None = None,
) -> Int[Tensor, "layer head token"]:
    """Places of tokens' own keys among all keys, from 0; ``limit``: there or later."""
    found = []
    for places, layer in alike(factors, words):
        ranks = target_ranks(
            factors.at(places),
            lambda number: words.inputs(tokens, number),
            partial(words.inputs, layer=layer),
            tokens,
            words.size,
            limit=limit,
            advance=advance if places.stop == len(factors.layers) else None,
        )
        found.append(ranks.promoted)
    return torch.cat(found)


def share_within(ranks: Int[Tensor, "layer head token"], k: int) -> Float[Tensor, "layer head"]:
    """Share of ranks among the first k."""
    return (ranks < k).cpu().double().mean(-1)


def alike(factors: HeadFactors, words: Dictionary) -> Iterator[tuple[slice, int]]:
    """Runs of layers that see the same token vectors, each with one of its layer numbers."""
    start = 0
    for _, run in groupby(factors.layers, key=words.kind):
        layers = list(run)
        yield slice(start, start + len(layers)), layers[0]
        start += len(layers)


def token_cores(
    factors: HeadFactors, words: Dictionary, kind: Gram
) -> Float[Tensor, "layer head d_head d_head"]:
    """``right @ gram @ left``: small matrices with the eigenvalues of token-to-token matrices."""
    cores = []
    for place, layer in enumerate(factors.layers):
        one = _one(factors, place)
        left = words.gram_times(kind, layer, one.left, few=factors.few)
        cores.append(replace(one, left=left).core())
    return torch.cat(cores)


def _one(factors: HeadFactors, place: int) -> HeadFactors:
    return factors.at(slice(place, place + 1))
