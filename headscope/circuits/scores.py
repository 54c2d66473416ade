"""All weight scores of a model in one table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.statistics import Bounds
from headscope.circuits import spectrum
from headscope.circuits.copying import (
    copying_eigenvalues,
    copying_ranks,
    matching_eigenvalues,
    matching_ranks,
    share_within,
)
from headscope.circuits.factors import HeadFactors
from headscope.circuits.measures import read_alignment, symmetric_share, write_alignment
from headscope.circuits.ov_qk import ov, over_all_layers, qk
from headscope.circuits.vocabulary import Dictionary, Embedding
from headscope.errors import InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.probes.vocabulary import ordinary_tokens
from headscope.progress import Advance, track
from headscope.table import HeadScores, HeadTable

_MP = "Marchenko and Pastur 1967"
_UNIT: Bounds = (0.0, 1.0)


class Line(NamedTuple):
    """One score of the table; its values are of the factors that it was read from."""

    name: str
    values: Float[Tensor, "layer head"] | Int[Tensor, "layer head"]
    unit: str
    bounds: Bounds
    description: str
    source: str


@own_types()
def score(
    model: HeadModel,
    *,
    tokens: int = 256,
    k: int = 5,
    seed: int = 0,
    heads: "Sequence[str | tuple[int, int]] | None" = None,
    embeddings: Sequence[Embedding] = ("raw", "mlp"),
    progress: bool | None = None,
) -> HeadTable:
    """Score every head by its weights alone; nothing is run but tiny passes that measure norms.

    Spectra of OV and QK (``ov_*``, ``qk_*``: norm, spectral_norm, effective_rank, stable_rank,
    participation_ratio, top_share, symmetric_share, outliers above random products and, for either
    factor alone, above the Marchenko-Pastur edge), copying and
    matching scores with the raw embedding and (``*_mlp``) with the first MLP's part added, and
    alignment with embedding and unembedding. QK at distance 0 under rotary positions.

    A circuit that the family does not allow is left out of the table, and so are ``qk_norm`` and
    ``qk_spectral_norm`` where queries and keys are normed (qwen3, gemma3). Under a norm after
    attention, OV circuits contain its gain but not its scale, so that ``ov_norm`` and
    ``ov_spectral_norm`` compare within a layer only; the provenance says so.

    Args:
        model: any model.
        tokens: how many source tokens the shares over the vocabulary are taken on, drawn with
            ``seed``; the others look at all of it.
        k: largest rank of the top-k copying share.
        seed: of that draw and of the random spectra.
        heads: only these; the others have no value. None: all.
        embeddings: what tokens look like in copying and matching scores, ``raw`` or ``mlp``;
            ``mlp`` takes the whole vocabulary through the first MLP.
        progress: show a bar; None: on a terminal or in a notebook.

    Raises:
        InputError: if the model has no such head, or an embedding is neither of the two.
        UnsupportedModelError: if neither circuit can be read.

    Example:
        >>> table = hs.circuits.score(model, tokens=32)
        >>> "copying_eigenvalues" in table
        True
        >>> hs.circuits.score(model, tokens=32, heads=["L1H2"])["ov_norm"].top(2)[0][0]
        L1H2
    """
    for kind in embeddings:
        if kind not in _SUFFIX:
            raise InputError(nearest(str(kind), _SUFFIX, kind="embedding"))
    chosen = None if heads is None else [model.shape.check(HeadIndex.parse(one)) for one in heads]
    reading = _Reading(
        model,
        _sample(model, tokens, seed),
        k,
        seed,
        tuple((Dictionary(model, kind), _SUFFIX[kind]) for kind in dict.fromkeys(embeddings)),
        Dictionary(model),
    )
    lines = reading.every_head(progress) if chosen is None else reading.some_heads(chosen)
    facts = of_weights(model, circuit="weights", tokens=len(reading.sample), k=k, fold_norm=True)
    return HeadTable(
        HeadScores.from_summary(
            line.name,
            values,
            kv_heads=model.shape.n_kv_heads,
            unit=line.unit,
            bounds=line.bounds,
            description=line.description,
            source=line.source,
            provenance=facts,
        )
        for line, values in lines
    )


_SUFFIX = {"raw": "", "mlp": "_mlp"}


Values = tuple[Line, Float[np.ndarray, "layer head"]]


def _uncounted(steps: float = 1) -> None:
    """Count nothing."""


@dataclass(frozen=True, eq=False)
class _Reading:
    """What all scores of one table share: the vocabulary, the sampled tokens, the settings."""

    model: HeadModel
    sample: Int[Tensor, " token"]
    k: int
    seed: int
    words: tuple[tuple[Dictionary, str], ...]
    raw: Dictionary

    def every_head(self, progress: bool | None) -> list[Values]:
        """Scores of all heads at once."""
        steps = 2 * (2 + 2 * len(self.words))
        with track(steps, "scoring weights", show=progress) as advance:
            lines = self._lines(advance)
        layers = self.model.shape.attention_layers
        return [(line, over_all_layers(self.model, line.values, layers)) for line in lines]

    def some_heads(self, heads: Sequence[HeadIndex]) -> list[Values]:
        """Scores of these heads, one after the other; NaN for all others."""
        found: dict[str, Values] = {}
        size = (self.model.shape.n_layers, self.model.shape.n_heads)
        for head in heads:
            for line in self._lines(_uncounted, head):
                _, values = found.setdefault(line.name, (line, np.full(size, np.nan)))
                values[head] = float(line.values)
        return list(found.values())

    def _lines(self, advance: Advance, head: HeadIndex | None = None) -> list[Line]:
        lines, reasons = [], []
        layers = None if head is None else [head.layer]
        for circuit, read in ((self._ov_lines, ov), (self._qk_lines, partial(qk, offset=0))):
            try:
                factors = read(self.model, layers=layers)
            except UnsupportedModelError as error:
                reasons.append(str(error))
                continue
            lines += list(circuit(factors if head is None else factors.only(head), advance))
        if not lines:
            raise UnsupportedModelError(" ".join(reasons))
        return lines

    def _ov_lines(self, factors: HeadFactors, advance: Advance) -> Iterator[Line]:
        yield from _spectrum_lines("ov", factors, self.seed)
        advance()
        for words, suffix in self.words:
            yield Line(
                f"copying_eigenvalues{suffix}",
                copying_eigenvalues(factors, words),
                "ratio",
                (-1.0, 1.0),
                "attended tokens raise their own logit (-1: lower it)",
                "Elhage et al. 2021",
            )
            advance()
            ranks = copying_ranks(factors, words, self.sample, max(1, self.k), advance)
            for rank in (1, self.k):
                yield Line(
                    f"copying_top{rank}{suffix}",
                    share_within(ranks, rank),
                    "share of tokens",
                    _UNIT,
                    f"attended tokens are among the {rank} that are raised most",
                    "Wang et al. 2022, without positions",
                )
        yield Line(
            "ov_read_alignment",
            read_alignment(factors, self.raw),
            "share of variance",
            _UNIT,
            "values are read from where token embeddings vary",
            "subspace projection",
        )
        yield Line(
            "ov_write_alignment",
            write_alignment(factors, self.raw),
            "share of variance",
            _UNIT,
            "the head writes where logits are read",
            "subspace projection",
        )
        advance()

    def _qk_lines(self, factors: HeadFactors, advance: Advance) -> Iterator[Line]:
        sized = not self._norms_queries(factors.layers)
        for line in _spectrum_lines("qk", factors, self.seed):
            if sized or line.name not in _SIZES:
                yield line
        advance()
        for words, suffix in self.words:
            yield Line(
                f"matching_eigenvalues{suffix}",
                matching_eigenvalues(factors, words),
                "ratio",
                (-1.0, 1.0),
                "queries look for keys of their own token (-1: avoid them)",
                "Elhage et al. 2021",
            )
            advance()
            ranks = matching_ranks(factors, words, self.sample, max(1, self.k), advance)
            for rank in (1, self.k):
                yield Line(
                    f"matching_top{rank}{suffix}",
                    share_within(ranks, rank),
                    "share of tokens",
                    _UNIT,
                    f"a token's own key is among its {rank} best",
                    "copying share, for QK",
                )
        for side, one in (("query", factors), ("key", factors.transposed())):
            yield Line(
                f"qk_{side}_alignment",
                read_alignment(one, self.raw),
                "share of variance",
                _UNIT,
                f"{side} vectors are read from where token embeddings vary",
                "subspace projection",
            )
        advance()

    def _norms_queries(self, layers: Sequence[int]) -> bool:
        """Whether some layer norms its queries or keys, so that the size of QK means nothing."""
        between = [self.model.parts.query_key(layer) for layer in layers]
        return any(one.query_norm or one.key_norm for one in between)


# Scores that are sizes of a product, which a norm on queries and keys takes away.
_SIZES = {"qk_norm", "qk_spectral_norm"}


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
        yield Line(f"{name}_{measure}", values, unit, bounds, description, source)
    yield from _outlier_lines(name, factors, S, seed)


def _outlier_lines(name: str, factors: HeadFactors, S: Tensor, seed: int) -> Iterator[Line]:
    count: Bounds = (0.0, float(factors.left.shape[-1]))
    above = spectrum.outliers(S, random_edge(factors, seed)).to(S)
    product = "product of Gaussian factors, mean + 3 sd of the largest"
    described = "directions above those of random factors of its shape and variance"
    yield Line(f"{name}_outliers", above, "directions", count, described, product)
    for side, factor in (("left", factors.left), ("right", factors.right)):
        above = factors.per_head(_factor_outliers(factor))
        described = f"directions of the {side} factor alone above the edge of a random one"
        yield Line(f"{name}_{side}_outliers", above, "directions", count, described, _MP)


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


def _sample(model: HeadModel, count: int, seed: int) -> Int[Tensor, " token"]:
    """Some ordinary tokens, sorted."""
    ids = ordinary_tokens(model)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]
    return ids[order.sort().values].to(model.device)
