"""All weight scores of a model in one table."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.circuits import spectrum
from headscope.circuits.alignment import read_alignment, write_alignment
from headscope.circuits.copying import (
    copying_eigenvalues,
    copying_share,
    matching_eigenvalues,
    matching_share,
)
from headscope.circuits.dictionary import Dictionary, Embedding
from headscope.circuits.factors import HeadFactors
from headscope.circuits.ov import ov
from headscope.circuits.qk import qk
from headscope.circuits.reading import over_all_layers
from headscope.circuits.symmetry import symmetric_share
from headscope.errors import UnsupportedModelError
from headscope.models.protocol import HeadModel
from headscope.origin import of_weights
from headscope.probes.vocabulary import ordinary_tokens
from headscope.table import HeadScores, HeadTable
from headscope.table.scores import Bounds

# name, values, unit, bounds, what a high value means, source
Line = tuple[str, Float[Tensor, "layer head"], str, Bounds, str, str]
_UNIT: Bounds = (0.0, 1.0)
_MP = "Marchenko and Pastur 1967"


def score(model: HeadModel, *, tokens: int = 256, k: int = 5, seed: int = 0) -> HeadTable:
    """Score every head by its weights alone; nothing is run but tiny passes that measure norms.

    Spectra of OV and QK (``ov_*``, ``qk_*``: norm, spectral_norm, effective_rank, stable_rank,
    participation_ratio, top_share, symmetric_share, outliers above random products and, for either
    factor alone, above the Marchenko-Pastur edge), copying and
    matching scores with the raw embedding and (``*_mlp``) with the first MLP's part added, and
    alignment with embedding and unembedding. QK at distance 0 under rotary positions.

    A circuit that the family does not allow (norms after attention: OV; norms on queries and
    keys: QK) is left out of the table.

    Args:
        model: any model.
        tokens: how many source tokens the shares over the vocabulary are taken on, drawn with
            ``seed``; the others look at all of it.
        k: largest rank of the top-k copying share.
        seed: of that draw and of the random spectra.

    Raises:
        UnsupportedModelError: if neither circuit can be read.

    Example:
        >>> table = hs.circuits.score(model, tokens=32)
        >>> "copying_eigenvalues" in table
        True
    """
    sample = _sample(model, tokens, seed)
    lines, reasons, layers = [], [], model.shape.attention_layers
    for circuit in (_ov_lines, _qk_lines):
        try:
            lines += list(circuit(model, sample, k, seed))
        except UnsupportedModelError as error:
            reasons.append(str(error))
    if not lines:
        raise UnsupportedModelError(" ".join(reasons))
    facts = of_weights(model, circuit="weights", tokens=len(sample), k=k, fold_norm=True)
    return HeadTable(
        HeadScores.from_summary(
            name,
            over_all_layers(model, values, layers),
            kv_heads=model.shape.n_kv_heads,
            unit=unit,
            bounds=bounds,
            description=description,
            source=source,
            provenance=facts,
        )
        for name, values, unit, bounds, description, source in lines
    )


def _ov_lines(model: HeadModel, sample: Tensor, k: int, seed: int) -> Iterator[Line]:
    factors = ov(model)
    yield from _spectrum_lines("ov", factors, seed)
    for kind, suffix in _kinds(model):
        words = Dictionary(model, kind)
        yield (
            f"copying_eigenvalues{suffix}",
            copying_eigenvalues(factors, words),
            "ratio",
            (-1.0, 1.0),
            "attended tokens raise their own logit (-1: lower it)",
            "Elhage et al. 2021",
        )
        for rank in (1, k):
            yield (
                f"copying_top{rank}{suffix}",
                copying_share(factors, words, sample, rank),
                "share of tokens",
                _UNIT,
                f"attended tokens are among the {rank} that are raised most",
                "Wang et al. 2022, without positions",
            )
    words = Dictionary(model)
    yield (
        "ov_read_alignment",
        read_alignment(factors, words),
        "share of variance",
        _UNIT,
        "values are read from where token embeddings vary",
        "subspace projection",
    )
    yield (
        "ov_write_alignment",
        write_alignment(factors, words),
        "share of variance",
        _UNIT,
        "the head writes where logits are read",
        "subspace projection",
    )


def _qk_lines(model: HeadModel, sample: Tensor, k: int, seed: int) -> Iterator[Line]:
    factors = qk(model, offset=0)
    yield from _spectrum_lines("qk", factors, seed)
    for kind, suffix in _kinds(model):
        words = Dictionary(model, kind)
        yield (
            f"matching_eigenvalues{suffix}",
            matching_eigenvalues(factors, words),
            "ratio",
            (-1.0, 1.0),
            "queries look for keys of their own token (-1: avoid them)",
            "Elhage et al. 2021",
        )
        for rank in (1, k):
            yield (
                f"matching_top{rank}{suffix}",
                matching_share(factors, words, sample, rank),
                "share of tokens",
                _UNIT,
                f"a token's own key is among its {rank} best",
                "copying share, for QK",
            )
    words = Dictionary(model)
    for side, one in (("query", factors), ("key", factors.transposed())):
        yield (
            f"qk_{side}_alignment",
            read_alignment(one, words),
            "share of variance",
            _UNIT,
            f"{side} vectors are read from where token embeddings vary",
            "subspace projection",
        )


def _spectrum_lines(name: str, factors: HeadFactors, seed: int) -> Iterator[Line]:
    S, count = factors.singular_values(), (0.0, float(factors.left.shape[-1]))
    roy, rudelson = "Roy and Vetterli 2007", "Rudelson and Vershynin 2007"
    spread, energy = "(sum S^2)^2 / sum S^4", "share of energy"
    size: Bounds = (0.0, None)
    rank, stable, many = (
        measure(S)
        for measure in (
            spectrum.effective_rank,
            spectrum.stable_rank,
            spectrum.participation_ratio,
        )
    )
    top, symmetric = spectrum.top_share(S), symmetric_share(factors)
    symmetry = "symmetric matrix (0: antisymmetric)"
    for measure, values, unit, bounds, description, source in (
        ("norm", factors.norm(), "", size, "large matrix", "Frobenius norm"),
        ("spectral_norm", S[..., 0], "", size, "large top direction", "spectral norm"),
        ("effective_rank", rank, "directions", count, "many directions alike", roy),
        ("stable_rank", stable, "directions", count, "energy not in one direction", rudelson),
        ("participation_ratio", many, "directions", count, "energy spread out", spread),
        ("top_share", top, energy, _UNIT, "one direction carries it", "S[0]^2 / sum S^2"),
        ("symmetric_share", symmetric, energy, _UNIT, symmetry, "(1 + tr(W W) / |W|^2) / 2"),
    ):
        yield f"{name}_{measure}", values, unit, bounds, description, source
    yield from _outlier_lines(name, factors, S, seed)


def _outlier_lines(name: str, factors: HeadFactors, S: Tensor, seed: int) -> Iterator[Line]:
    count: Bounds = (0.0, float(factors.left.shape[-1]))
    above = spectrum.outliers(S, random_edge(factors, seed)).to(S)
    product = "product of Gaussian factors, mean + 3 sd of the largest"
    described = "directions above those of random factors of its shape and variance"
    yield f"{name}_outliers", above, "directions", count, described, product
    for side, factor in (("left", factors.left), ("right", factors.right)):
        above = factors.per_head(_factor_outliers(factor))
        described = f"directions of the {side} factor alone above the edge of a random one"
        yield f"{name}_{side}_outliers", above, "directions", count, described, _MP


def _factor_outliers(
    factor: Float[Tensor, "layer some_head rows columns"],
) -> Float[Tensor, "layer some_head"]:
    """Singular values of one factor above the Marchenko-Pastur edge of its shape and variance."""
    rows, columns = factor.shape[-2:]
    S = torch.linalg.svdvals(factor)
    deviation = torch.linalg.matrix_norm(factor) / math.sqrt(rows * columns)
    return spectrum.outliers(S, deviation * spectrum.marchenko_pastur_edge(rows, columns)).to(S)


def random_edge(factors: HeadFactors, seed: int = 0) -> Float[Tensor, "layer head"]:
    """Largest singular value that random factors of each head's shape and variance would give.

    Mean plus three standard deviations over draws of Gaussian factors; the variance of either
    factor is that of its own entries. Not the Marchenko-Pastur edge, which holds for one factor
    and not for a product.

    Example:
        >>> edge = hs.circuits.random_edge(hs.circuits.ov(model))
        >>> bool((edge > 0).all())
        True
    """
    width, rank = factors.left.shape[-2:]
    mean, deviation = spectrum.product_edge(width, rank, width, seed=seed)
    return entry_sizes(factors) * (mean + 3 * deviation)


def entry_sizes(factors: HeadFactors) -> Float[Tensor, "layer head"]:
    """Standard deviation of the left factor's entries times that of the right one's."""
    width, rank = factors.left.shape[-2:]
    left, right = (
        factors.per_head(torch.linalg.matrix_norm(side)) / math.sqrt(width * rank)
        for side in (factors.left, factors.right)
    )
    return left * right


def _kinds(model: HeadModel) -> tuple[tuple[Embedding, str], ...]:
    return (("raw", ""), ("mlp", "_mlp"))


def _sample(model: HeadModel, count: int, seed: int) -> Int[Tensor, " token"]:
    """Some ordinary tokens, sorted."""
    ids = ordinary_tokens(model)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]
    return ids[order.sort().values].to(model.device)
