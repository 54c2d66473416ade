"""Measures of a head's weights: spectra, symmetry, alignment, copying and matching scores."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import Advance
from headscope.circuits.ov_qk import HeadFactors, column_space
from headscope.circuits.vocabulary import Dictionary, Gram
from headscope.models.running import own_types


@checked
@own_types()
def symmetric_share(factors: HeadFactors) -> Float[Tensor, "layer head"]:
    """Share of the squared norm in the symmetric part of every head's matrix.

    ``|(W + W.T) / 2|^2 / |W|^2 = (1 + tr(W W) / |W|^2) / 2``, from d_head x d_head matrices. Range
    [0, 1]: 1 symmetric (a QK circuit that matches like with like, or unlike with unlike), 0
    antisymmetric, 1/2 on average by chance. NaN for a zero matrix. Known weakness: it ignores the
    sign; see :func:`eigenvalue_ratio`.

    Args:
        factors: OV or QK circuits of all heads.

    Returns:
        Share ``[layer head]``, from 0 to 1.

    Example:
        >>> share = hs.circuits.symmetric_share(hs.circuits.ov(model))
        >>> bool(((share >= 0) & (share <= 1)).all())
        True
    """
    core = factors.core()
    trace = (core * core.mT).sum((-2, -1))
    return (1 + trace / factors.norm().square()) / 2


@checked
@own_types()
def eigenvalue_ratio(
    core: Float[Tensor, "layer head d_head d_head"],
) -> Float[Tensor, "layer head"]:
    """``sum(Re(lambda)) / sum(|lambda|)`` of the eigenvalues of a small matrix, in [-1, 1].

    1 if all eigenvalues are positive (outputs resemble inputs), -1 if all are negative; NaN for a
    zero matrix.

    Args:
        core: matrices with the eigenvalues of interest, ``[layer head d_head d_head]``.

    Returns:
        Ratio ``[layer head]``, from -1 to 1.

    Example:
        >>> float(hs.circuits.eigenvalue_ratio(torch.eye(3)[None, None]))
        1.0
    """
    values = torch.linalg.eigvals(core.cpu().double())
    ratio: Tensor = values.real.sum(-1) / values.abs().sum(-1)
    return ratio


@checked
@own_types()
def read_alignment(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Share of the embedding's variance in the subspace that a head reads.

    ``tr(Q.T @ C @ Q) / tr(C)`` with Q an orthonormal basis of the left factor's columns and C the
    covariance of the token embeddings. Range [0, 1]; by chance d_head / d_model. Known weakness:
    all directions of the subspace count equally, even those that the head hardly uses.

    Args:
        factors: OV or QK circuits of all heads.
        words: token embeddings and unembeddings of the model.

    Returns:
        Share ``[layer head]``, from 0 to 1.

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


@checked
@own_types()
def write_alignment(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Share of the unembedding's variance in the subspace that a head writes.

    Like :func:`read_alignment`, for the right factor's rows and the directions of all logits. Low
    if a head writes for later layers rather than for the output.

    Args:
        factors: OV circuits of all heads.
        words: token embeddings and unembeddings of the model.

    Returns:
        Share ``[layer head]``, from 0 to 1.

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


# Tokens of the first block of the vocabulary, which decides most pairs; each later one is twice
# as long, up to 16 MB of scores or of vectors in fp32.
_FIRST_BLOCK = 512
_BLOCK_ENTRIES = 1 << 22

EmbeddingLookup = Callable[[Int[Tensor, " token"]], Float[Tensor, "token d_model"]]


class Ranks(NamedTuple):
    """Number of tokens that outrank the target, 0 being first; on ties the lowest id.

    Attributes:
        promoted: counted from the largest score down.
        suppressed: counted from the smallest score up.
    """

    promoted: Int[Tensor, "layer head pair"]
    suppressed: Int[Tensor, "layer head pair"]


@checked
@own_types()
def target_ranks(
    factors: HeadFactors,
    source: Callable[[int], Float[Tensor, "pair d_model"]],
    outputs: EmbeddingLookup,
    targets: Int[Tensor, " pair"],
    d_vocab: int,
    *,
    limit: int | None = None,
    advance: Advance | None = None,
    suppressed: bool = True,
) -> Ranks:
    """Rank of each pair's target in ``source @ left @ right @ outputs.T``, for every head.

    No vocabulary x vocabulary matrix is built: each block of the vocabulary is compared with the
    target's own score and dropped. With a limit, a pair takes part in further blocks only as long
    as one of its two ranks may still be below the limit: most pairs of most heads are decided by
    the first few hundred tokens.

    Args:
        factors: circuits of the heads; biases are ignored.
        source: vectors of the pairs' sources, by layer number.
        outputs: vectors of tokens on the output side.
        targets: target token for each source.
        d_vocab: number of tokens.
        limit: ranks from here on are reported as ``limit``; those below are exact. None: all ranks
            are exact, for which every pair is compared with the whole vocabulary.
        advance: callback with the share of the vocabulary that is done.
        suppressed: whether ranks from the smallest score up are needed. False: a pair is decided by
            the other rank alone, and ``suppressed`` is only a partial count.

    Example:
        >>> words, ids = hs.circuits.Dictionary(model), torch.arange(50, 54)
        >>> ranks = hs.circuits.target_ranks(
        ...     hs.circuits.ov(model), lambda layer: words.inputs(ids, layer), words.outputs, ids,
        ...     model.shape.d_vocab,
        ... )
        >>> ranks.promoted.shape == (model.shape.n_layers, model.shape.n_heads, 4)
        True
    """
    targets = targets.to(factors.left.device)
    race = _Race.start(factors, source, outputs(targets), targets)
    done = 0
    for block in _blocks(d_vocab, max(len(targets), factors.left.shape[-2]), targets.device):
        waiting = race.waiting(limit, suppressed)
        if waiting is None:
            break
        race.compare(block, outputs(block), waiting)
        if advance is not None:
            advance(len(block) / d_vocab)
            done += len(block)
    if advance is not None:
        advance(1 - done / d_vocab)
    found = Ranks(race.above, race.below)
    return found if limit is None else Ranks(*(side.clamp_max(limit) for side in found))


@dataclass(frozen=True, eq=False)
class _Race:
    """Pairs of all heads, with the number of tokens found above and below each target so far."""

    inner: Float[Tensor, "layer head pair d_head"]
    right: Float[Tensor, "layer some_head d_head d_model"]
    own: Float[Tensor, "layer head pair"]
    targets: Int[Tensor, " pair"]
    above: Int[Tensor, "layer head pair"]
    below: Int[Tensor, "layer head pair"]

    @classmethod
    def start(
        cls,
        factors: HeadFactors,
        source: Callable[[int], Float[Tensor, "pair d_model"]],
        wanted: Float[Tensor, "pair d_model"],
        targets: Int[Tensor, " pair"],
    ) -> "_Race":
        layers = zip(factors.layers, factors.left, strict=True)
        inner = factors.per_head(
            torch.stack(
                [
                    einsum(source(layer), left, "pair d_model, head d_model e -> head pair e")
                    for layer, left in layers
                ]
            )
        )
        reached = factors.per_head(
            einsum(factors.right, wanted, "layer head e d_model, pair d_model -> layer head pair e")
        )
        none = torch.zeros(inner.shape[:-1], dtype=torch.long, device=inner.device)
        own = (inner * reached).sum(-1)
        return cls(inner, factors.right, own, targets, none, none.clone())

    def waiting(self, limit: int | None, suppressed: bool) -> "list[list[Tensor]] | None":
        """Undecided pairs of every layer and head; None if all are decided."""
        if limit is None:
            every = torch.arange(len(self.targets), device=self.targets.device)
            return [[every] * self.inner.shape[1]] * self.inner.shape[0]
        undecided = self.above < limit
        if suppressed:
            undecided |= self.below < limit
        counts = undecided.sum(-1).tolist()  # the only device sync in a block
        if not any(map(any, counts)):
            return None
        order = undecided.byte().argsort(dim=-1, descending=True, stable=True)
        return [
            [places[:count] for places, count in zip(*layer, strict=True)]
            for layer in zip(order, counts, strict=True)
        ]

    def compare(
        self,
        block: Int[Tensor, " token"],
        vectors: Float[Tensor, "token d_model"],
        waiting: list[list[Tensor]],
    ) -> None:
        """Count the block's tokens above and below each waiting pair's target."""
        shared = self.inner.shape[1] // self.right.shape[1]
        for layer, heads in enumerate(waiting):
            for first in range(0, len(heads), shared):
                group = range(first, first + shared)
                count = sum(len(heads[head]) for head in group)
                if count == 0:
                    continue
                right = self.right[layer, first // shared]
                rank, width = right.shape
                # A few pairs multiply on their own side; many pairs share the product on the other
                # side.
                far = vectors.T if count * (width - rank) < rank * width else right @ vectors.T
                for head in group:
                    near = self.inner[layer, head][heads[head]]
                    near = near if len(far) == rank else near @ right
                    self._count((layer, head), heads[head], block, near @ far)

    def _count(
        self,
        at: tuple[int, int],
        pairs: Int[Tensor, " waiting"],
        block: Int[Tensor, " token"],
        scores: Float[Tensor, "waiting token"],
    ) -> None:
        own, targets = self.own[at][pairs, None], self.targets[pairs, None]
        # Rounding must not rank a target above or below itself.
        place = targets - block[0]
        inside = (place >= 0) & (place < len(block))
        place = place.clamp(0, len(block) - 1)
        scores.scatter_(1, place, torch.where(inside, own, scores.gather(1, place)))
        equal = ((scores == own) & (block < targets)).sum(-1)
        self.above[at].index_add_(0, pairs, (scores > own).sum(-1) + equal)
        self.below[at].index_add_(0, pairs, (scores < own).sum(-1) + equal)


def _blocks(d_vocab: int, width: int, device: torch.device) -> Iterator[Int[Tensor, " token"]]:
    """Ranges of token ids, the first ones short; ``width`` is that of a row of scores."""
    most, size, start = max(1, _BLOCK_ENTRIES // width), _FIRST_BLOCK, 0
    while start < d_vocab:
        end = min(start + min(size, most), d_vocab)
        yield torch.arange(start, end, device=device)
        start, size = end, 2 * size


@checked
@own_types()
def copying_eigenvalues(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Eigenvalue copying score of OV circuits: ``sum(Re(lambda)) / sum(|lambda|)``.

    lambda: eigenvalues of the token-to-logit matrix ``E @ W_V @ W_O @ W_U.T``, those of the
    d_head x d_head matrix ``W_O @ (W_U.T @ E) @ W_V``. Range [-1, 1]: 1 copies, -1 suppresses
    what it attends to. NaN where the head reads or writes no tokens, so that all that is left of
    the matrix is rounding.

    Source: Elhage et al. 2021; folded and centred as in Olsson et al. 2022. Known weakness: not
    discriminative alone (a quarter of GPT-2 small's heads exceed 0.95).

    Args:
        factors: OV circuits of all heads.
        words: token embeddings and unembeddings of the model.

    Returns:
        Score ``[layer head]``, from -1 to 1.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> scores = hs.circuits.copying_eigenvalues(hs.circuits.ov(model), words)
        >>> bool(((scores >= -1) & (scores <= 1)).all())
        True
    """
    return _token_ratio(factors, words, "output_input")


@checked
@own_types()
def matching_eigenvalues(factors: HeadFactors, words: Dictionary) -> Float[Tensor, "layer head"]:
    """Eigenvalue matching score of QK circuits: the same ratio for ``E @ W_QK @ E.T``.

    Range [-1, 1]: 1 where queries look for keys of their own token, -1 where they avoid them.
    The mean over the vocabulary is removed from E, since what all tokens share matches in every
    head. Holds at the distance that the factors were made for. NaN where the head reads no tokens,
    so that all that is left of the matrix is rounding.

    Args:
        factors: QK circuits of all heads.
        words: token embeddings of the model.

    Returns:
        Score ``[layer head]``, from -1 to 1.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> scores = hs.circuits.matching_eigenvalues(hs.circuits.qk(model), words)
        >>> bool(((scores >= -1) & (scores <= 1)).all())
        True
    """
    return _token_ratio(factors, words, "input")


@checked
@own_types()
def copying_share(
    factors: HeadFactors, words: Dictionary, tokens: Int[Tensor, " token"], k: int = 1
) -> Float[Tensor, "layer head"]:
    """Share of tokens that the OV circuit maps to themselves, among the k largest logits.

    Range [0, 1]; chance is k / vocabulary. All logits count; sources are ``tokens`` only. Source:
    the top-1 version is common in tutorials (ARENA); k as in Wang et al. 2022.

    Args:
        factors: OV circuits of all heads.
        words: token embeddings and unembeddings of the model.
        tokens: ids of the source tokens.
        k: largest rank that counts.

    Returns:
        Share ``[layer head]``, from 0 to 1.

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
    """Rank of each token among the OV circuit's outputs for it, from 0, capped at ``limit``.

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
        suppressed=False,
    ).promoted


@checked
@own_types()
def matching_share(
    factors: HeadFactors, words: Dictionary, tokens: Int[Tensor, " token"], k: int = 1
) -> Float[Tensor, "layer head"]:
    """Share of tokens whose own key is among the k best-scoring keys for their query.

    Range [0, 1]; chance is k / vocabulary. Valid at the distance that the factors were made for,
    and without biases; every key has its own embedding's norm.

    Args:
        factors: QK circuits of all heads.
        words: token embeddings of the model.
        tokens: ids of the query tokens.
        k: largest rank that counts.

    Returns:
        Share ``[layer head]``, from 0 to 1.

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
    """Rank of each token's own key among all keys, from 0, capped at ``limit``."""
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
            suppressed=False,
        )
        found.append(ranks.promoted)
    return torch.cat(found)


def share_within(ranks: Int[Tensor, "layer head token"], k: int) -> Float[Tensor, "layer head"]:
    """Share of ranks among the first k."""
    return (ranks < k).cpu().double().mean(-1)


def alike(factors: HeadFactors, words: Dictionary) -> Iterator[tuple[slice, int]]:
    """Group layers that see the same token vectors, each group with one of its layer numbers."""
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


def _token_ratio(
    factors: HeadFactors, words: Dictionary, kind: Gram
) -> Float[Tensor, "layer head"]:
    """:func:`eigenvalue_ratio` of token-to-token matrices; NaN where rounding is all there is."""
    cores = token_cores(factors, words, kind)
    both: tuple[Gram, Gram] = ("input", "input") if kind == "input" else ("output", "input")
    sizes = [
        torch.stack([words.gram_trace(one, layer) for one in both]).prod().sqrt()
        for layer in factors.layers
    ]
    left, right = (torch.linalg.matrix_norm(side) for side in (factors.left, factors.right))
    largest = factors.per_head(left) * factors.per_head(right) * torch.stack(sizes)[:, None]
    nothing = torch.linalg.matrix_norm(cores) <= torch.finfo(torch.float32).eps * largest
    ratio = eigenvalue_ratio(cores)
    return ratio.masked_fill(nothing.to(ratio.device), float("nan"))


def _one(factors: HeadFactors, place: int) -> HeadFactors:
    return factors.at(slice(place, place + 1))


@checked
def effective_rank(S: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """Exponential of the entropy of the singular values' shares: ``exp(H(S / sum(S)))``.

    Range: 1 (one direction) to d_head (all equal); 0 for a zero matrix. Source: Roy and Vetterli
    2007, "The effective rank".

    Args:
        S: singular values ``[*head rank]``.

    Returns:
        Number of directions ``[*head]``.

    Example:
        >>> round(float(hs.circuits.effective_rank(torch.tensor([1.0, 1.0, 0.0]))), 4)
        2.0
    """
    share = S / S.sum(-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(S.sum(-1) > 0, rank, torch.zeros_like(rank))


@checked
def stable_rank(S: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """Squared Frobenius norm over squared spectral norm: ``sum(S^2) / S[0]^2``.

    Range: 1 to d_head; 0 for a zero matrix. Insensitive to small directions. Source: Rudelson and
    Vershynin 2007.

    Args:
        S: singular values ``[*head rank]``, largest first.

    Returns:
        Number of directions ``[*head]``.

    Example:
        >>> float(hs.circuits.stable_rank(torch.tensor([2.0, 2.0, 0.0])))
        2.0
    """
    energy = S.square()
    return energy.sum(-1) / energy[..., 0].clamp_min(torch.finfo(S.dtype).tiny)


@checked
def participation_ratio(S: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """Number of directions that share the energy: ``(sum S^2)^2 / sum S^4``.

    Range: 1 to d_head; 0 for a zero matrix.

    Args:
        S: singular values ``[*head rank]``, largest first.

    Returns:
        Number of directions ``[*head]``.

    Example:
        >>> float(hs.circuits.participation_ratio(torch.tensor([3.0, 3.0, 0.0])))
        2.0
    """
    scaled = S / S[..., :1].clamp_min(torch.finfo(S.dtype).tiny)  # fourth powers underflow early
    energy = scaled.square()
    return energy.sum(-1).square() / energy.square().sum(-1).clamp_min(torch.finfo(S.dtype).tiny)


@checked
def top_share(S: Float[Tensor, "*head rank"], k: int = 1) -> Float[Tensor, "*head"]:
    """Share of the energy in the k largest directions: ``sum(S[:k]^2) / sum(S^2)``, in [0, 1].

    Args:
        S: singular values ``[*head rank]``, largest first.
        k: number of largest directions.

    Returns:
        Share ``[*head]``, from 0 to 1.

    Example:
        >>> float(hs.circuits.top_share(torch.tensor([1.0, 1.0, 1.0, 1.0])))
        0.25
    """
    energy = S.square()
    total = energy.sum(-1).clamp_min(torch.finfo(S.dtype).tiny)
    return energy[..., :k].sum(-1) / total


@checked
def marchenko_pastur_edge(rows: int, columns: int, variance: float = 1.0) -> float:
    """Largest singular value of a large matrix of independent entries of this variance.

    ``sqrt(variance) * (sqrt(rows) + sqrt(columns))``. For one factor, such as ``W_Q``; for a
    product of two such matrices see :func:`product_edge`. Source: Marchenko and Pastur 1967.

    Args:
        rows: number of rows of the matrix.
        columns: number of columns.
        variance: variance of its entries.

    Returns:
        A singular value.

    Example:
        >>> hs.circuits.marchenko_pastur_edge(400, 100)  # sqrt(400) + sqrt(100)
        30.0
    """
    return math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns))


@checked
def product_edge(
    rows: int, inner: int, columns: int, draws: int = 64, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the largest singular value of ``A @ B``, by sampling.

    Like :func:`product_spectra`, for the largest only.

    Args:
        rows: first dimension of the first factor, ``[rows inner]``.
        inner: dimension that the factors share.
        columns: second dimension of the second factor, ``[inner columns]``.
        draws: number of random products.
        seed: seed for the draws.

    Returns:
        Mean and standard deviation over the draws.

    Example:
        >>> mean, spread = hs.circuits.product_edge(64, 8, 64, draws=4)
        >>> mean > spread
        True
    """
    largest = product_spectra(rows, inner, columns, draws, seed)[:, 0]
    return float(largest.mean()), float(largest.std())


@checked
def product_spectra(
    rows: int, inner: int, columns: int, draws: int = 64, seed: int = 0
) -> Float[Tensor, "draw inner"]:
    """Singular values of products ``A @ B`` of random factors, largest first.

    A is ``[rows inner]`` and B is ``[inner columns]``, entries independent, mean 0, variance 1.
    Only the small triangular factors are drawn (Bartlett's decomposition), so that the cost does
    not grow with the outer sizes.

    Args:
        rows: first dimension of the first factor, ``[rows inner]``.
        inner: dimension that the factors share.
        columns: second dimension of the second factor, ``[inner columns]``.
        draws: number of random products.
        seed: seed for the draws.

    Returns:
        Singular values ``[draw inner]``.

    Example:
        >>> tuple(hs.circuits.product_spectra(64, 8, 64, draws=4).shape)
        (4, 8)
    """
    generator = torch.Generator().manual_seed(seed)
    left = _triangle(rows, inner, draws, generator)
    right = _triangle(columns, inner, draws, generator)
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


@checked
def outliers(
    S: Float[Tensor, "*head rank"], edge: Float[Tensor, "*head"] | float
) -> Int[Tensor, "*head"]:
    """Number of singular values above the edge of the random spectrum.

    Args:
        S: singular values ``[*head rank]``.
        edge: edge of the random spectrum, one number or ``[*head]``.

    Returns:
        Counts ``[*head]``.

    Example:
        >>> int(hs.circuits.outliers(torch.tensor([5.0, 3.0, 1.0]), 2.0))
        2
    """
    return (torch.as_tensor(edge, dtype=S.dtype, device=S.device).unsqueeze(-1) < S).sum(-1)


def _triangle(size: int, inner: int, draws: int, generator: torch.Generator) -> Tensor:
    """R of the QR decomposition of Gaussian ``[size inner]`` matrices."""
    upper = torch.randn(draws, inner, inner, generator=generator, dtype=torch.float64).triu(1)
    freedom = size - torch.arange(inner, dtype=torch.float64)
    # chi with n degrees of freedom: the root of a sum of n squares, drawn as a gamma variable
    shape = (freedom / 2).expand(draws, inner)
    diagonal = (2 * torch._standard_gamma(shape, generator=generator)).sqrt()
    return upper + torch.diag_embed(diagonal)
