"""All weight scores of a model as one table."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import Advance, RunOptions
from headscope.base.statistics import Bounds
from headscope.circuits import measures
from headscope.circuits.measures import (
    copying_eigenvalues,
    copying_ranks,
    matching_eigenvalues,
    matching_ranks,
    read_alignment,
    share_within,
    symmetric_share,
    write_alignment,
)
from headscope.circuits.ov_qk import HeadFactors, ov, over_all_layers, qk
from headscope.circuits.vocabulary import Dictionary, Embedding
from headscope.errors import InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.probes.encoding import ordinary_tokens
from headscope.scorer import Scorer, weight_scorer
from headscope.table import HeadScores, HeadTable

_MP = "Marchenko and Pastur 1967"
_UNIT: Bounds = (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Weights:
    """Input of weight scorers: the circuits of all heads, or of one, and the vocabulary.

    Attributes:
        model: the model.
        tokens: source tokens for shares over the vocabulary.
        most: largest rank that shares look at.
        seed: seed of random spectra.
        head: the only head whose circuits are read; None: all heads.
        words: vectors of tokens at the model's input, by kind of embedding.
    """

    model: HeadModel
    tokens: Int[Tensor, " token"]
    most: int
    seed: int
    head: HeadIndex | None = None
    words: Mapping[Embedding, Dictionary] = field(default_factory=dict)

    @classmethod
    def of(cls, model: HeadModel, *, tokens: int = 256, most: int = 5, seed: int = 0) -> "Weights":
        """Weights of all heads, with ``tokens`` source tokens drawn by ``seed``.

        Example:
            >>> weights = hs.circuits.Weights.of(model, tokens=16)
            >>> weights.ov.norm().shape == (model.shape.n_layers, model.shape.n_heads)
            True
        """
        words = {kind: Dictionary(model, kind) for kind in _SUFFIX}
        return cls(model, _sample(model, tokens, seed), most, seed, words=words)

    def only(self, head: HeadIndex) -> "Weights":
        """Restrict to one head."""
        return replace(self, head=head)

    @cached_property
    def ov(self) -> HeadFactors:
        """OV circuits.

        Raises:
            UnsupportedModelError: if the family does not allow it; likewise of :attr:`qk`.
        """
        return self._chosen(ov(self.model, layers=self._layers))

    @cached_property
    def qk(self) -> HeadFactors:
        """QK circuits at distance 0."""
        return self._chosen(qk(self.model, offset=0, layers=self._layers))

    def sized(self, name: str) -> HeadFactors:
        """Like :meth:`circuit`, refusing circuits whose product has no meaningful size.

        Raises:
            UnsupportedModelError: for QK if queries or keys are normalised.
        """
        factors = self.circuit(name)
        if name == "qk":
            between = [self.model.parts.query_key(layer) for layer in factors.layers]
            if any(one.query_norm or one.key_norm for one in between):
                raise UnsupportedModelError(
                    f"{self.model.name} normalises its queries or keys, so the size of a QK "
                    "product is meaningless: use scale-free scores, such as qk_stable_rank."
                )
        return factors

    def circuit(self, name: str) -> HeadFactors:
        """``ov`` or ``qk``."""
        return self.ov if name == "ov" else self.qk

    @cached_property
    def _ranks(self) -> dict[tuple[str, Embedding], Int[Tensor, "layer head token"]]:
        return {}

    def ranks(self, circuit: str, kind: Embedding) -> Int[Tensor, "layer head token"]:
        """Rank of each source token in the circuit's output for it, up to ``most``."""
        if (circuit, kind) not in self._ranks:
            read = copying_ranks if circuit == "ov" else matching_ranks
            factors, words = self.circuit(circuit), self.words[kind]
            self._ranks[circuit, kind] = read(factors, words, self.tokens, max(1, self.most))
        return self._ranks[circuit, kind]

    @cached_property
    def _values(self) -> dict[str, Float[Tensor, "layer head rank"]]:
        return {}

    def singular_values(self, circuit: str) -> Float[Tensor, "layer head rank"]:
        """Singular values of a circuit, largest first."""
        if circuit not in self._values:
            self._values[circuit] = self.circuit(circuit).singular_values()
        return self._values[circuit]

    @property
    def _layers(self) -> list[int] | None:
        return None if self.head is None else [self.head.layer]

    def _chosen(self, factors: HeadFactors) -> HeadFactors:
        return factors if self.head is None else factors.only(self.head)


@checked
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
    """Score every head by its weights alone; runs nothing but tiny passes that measure norms.

    Spectra of OV and QK (``ov_*``, ``qk_*``: norm, spectral_norm, effective_rank, stable_rank,
    participation_ratio, top_share, symmetric_share, outliers above random products and, for either
    factor alone, above the Marchenko-Pastur edge), copying and
    matching scores with the raw embedding and (``*_mlp``) with the first MLP's part added, and
    alignment with embedding and unembedding. QK at distance 0 under rotary positions.

    Each is also a scorer of the catalogue: ``hs.score(model, scorers=["ov_norm", "induction"])``.

    A circuit that the family does not allow is left out of the table, as are ``qk_norm`` and
    ``qk_spectral_norm`` if queries and keys are normalised (qwen3, gemma3). Under a norm after
    attention, OV circuits contain its gain but not its scale, so ``ov_norm`` and
    ``ov_spectral_norm`` compare only within a layer; the provenance says so.

    Args:
        model: any model.
        tokens: number of source tokens for shares over the vocabulary, drawn with ``seed``; other
            scores use the whole vocabulary.
        k: largest rank of the top-k copying share.
        seed: seed of that draw and of the random spectra.
        heads: only these; the others get no value. None: all.
        embeddings: token vectors for copying and matching scores, ``raw`` or ``mlp``; ``mlp``
            passes the whole vocabulary through the first MLP.
        progress: show a progress bar; None: in a terminal or notebook.

    Raises:
        InputError: if the model has no such head, or an embedding is unknown.
        UnsupportedModelError: if neither circuit can be read.

    Example:
        >>> table = hs.circuits.score(model, tokens=32)
        >>> "copying_eigenvalues" in table
        True
        >>> hs.circuits.score(model, tokens=32, heads=["L1H2"])["ov_norm"].top(2)[0][0]
        L1H2
    """
    options = RunOptions(seed=seed, progress=progress)
    for kind in embeddings:
        if kind not in _SUFFIX:
            raise InputError(nearest(str(kind), _SUFFIX, kind="embedding"))
    chosen = None if heads is None else [model.shape.check(HeadIndex.parse(one)) for one in heads]
    weights = Weights.of(model, tokens=tokens, most=k, seed=seed)
    scorers = weight_scorers(k, tuple(dict.fromkeys(embeddings)))
    found = _computed(weights, scorers, chosen, options, leave_out=True)
    return HeadTable(found.values())


def score_weights(
    model: HeadModel, scorers: Sequence[Scorer], *, seed: int = 0
) -> dict[str, HeadScores]:
    """Score all heads with given weight scorers and the settings of :func:`score`.

    Args:
        model: any model.
        scorers: weight scorers.
        seed: seed of the source tokens and of the random spectra.

    Raises:
        UnsupportedModelError: if the family does not allow one of them.
    """
    weights = Weights.of(model, seed=seed)
    return _computed(weights, scorers, None, RunOptions(progress=False), leave_out=False)


def _computed(
    weights: Weights,
    scorers: Sequence[Scorer],
    heads: Sequence[HeadIndex] | None,
    options: RunOptions,
    *,
    leave_out: bool,
) -> dict[str, HeadScores]:
    """Compute every score for all heads at once, or for some heads one after the other."""
    model = weights.model
    facts = of_weights(
        model, circuit="weights", tokens=len(weights.tokens), k=weights.most, fold_norm=True
    )
    views = [weights] if heads is None else [weights.only(head) for head in heads]
    found: dict[str, HeadScores] = {}
    reasons = []
    with options.track(len(scorers) * len(views), "scoring weights") as advance:
        for scorer in scorers:
            try:
                values = _values(scorer, views, advance)
            except UnsupportedModelError as error:
                if not leave_out:
                    raise
                reasons.append(str(error))
                continue
            spec = scorer.spec
            if scorer.bounds_of is not None:
                spec = replace(spec, bounds=scorer.bounds_of(views[0]))
            found[scorer.name] = HeadScores.from_summary(
                spec, values, kv_heads=model.shape.n_kv_heads, provenance=facts
            )
    if not found:
        raise UnsupportedModelError(" ".join(dict.fromkeys(reasons)))
    return found


def _values(
    scorer: Scorer, views: Sequence[Weights], advance: Advance
) -> Float[np.ndarray, "layer head"]:
    """Values of one scorer; NaN for heads that were not requested."""
    model = views[0].model
    whole = np.full((model.shape.n_layers, model.shape.n_heads), np.nan)
    for view in views:
        values = scorer(view)
        if view.head is None:
            whole = over_all_layers(model, values, model.shape.attention_layers)
        else:
            whole[view.head] = float(values)
        advance()
    return whole


_SUFFIX: dict[Embedding, str] = {"raw": "", "mlp": "_mlp"}


def _rank_bound(weights: Weights, circuit: str) -> Bounds:
    return (0.0, float(weights.circuit(circuit).left.shape[-1]))


def _spectrum(circuit: str) -> tuple[Scorer, ...]:
    """Scorers of the spectrum of the ``ov`` or ``qk`` circuit."""

    def made(
        measure: str,
        function: Callable[[Weights], Tensor],
        unit: str,
        bounds: Bounds | None,
        description: str,
        source: str,
    ) -> Scorer:
        return weight_scorer(
            name=f"{circuit}_{measure}",
            unit=unit,
            bounds=bounds or (0.0, None),
            bounds_of=None if bounds else lambda weights: _rank_bound(weights, circuit),
            description=description,
            source=source,
            needs=(f"{circuit}_size" if unit == "" else f"{circuit}_circuit",),
        )(function)

    def of_values(measure: Callable[[Tensor], Tensor]) -> Callable[[Weights], Tensor]:
        return lambda weights: measure(weights.singular_values(circuit))

    def outliers(weights: Weights) -> Tensor:
        S = weights.singular_values(circuit)
        return measures.outliers(S, random_edge(weights.circuit(circuit), weights.seed)).to(S)

    def of_factor(side: str) -> Callable[[Weights], Tensor]:
        def function(weights: Weights) -> Tensor:
            factors = weights.circuit(circuit)
            return factors.per_head(_factor_outliers(getattr(factors, side)))

        return function

    def largest(weights: Weights) -> Tensor:
        weights.sized(circuit)
        return weights.singular_values(circuit)[..., 0]

    size: Bounds = (0.0, None)
    share = "(1 + tr(W W) / |W|^2) / 2"
    roy, rudelson = "Roy and Vetterli 2007", "Rudelson and Vershynin 2007"
    spread, energy = "(sum S^2)^2 / sum S^4", "share of energy"
    symmetry = "Share of energy in the symmetric part."
    product = "product of Gaussian factors, mean + 3 sd of the largest"
    random = "Directions above those of random factors with the same shape and variance."
    alone = "Directions of the {} factor above the edge of a random matrix."
    effective, stable, many, top = (
        of_values(measure)
        for measure in (
            measures.effective_rank,
            measures.stable_rank,
            measures.participation_ratio,
            measures.top_share,
        )
    )
    return tuple(
        made(*one)
        for one in (
            (
                "norm",
                lambda w: w.sized(circuit).norm(),
                "",
                size,
                "Size of the matrix.",
                "Frobenius norm",
            ),
            ("spectral_norm", largest, "", size, "Size of the top direction.", "spectral norm"),
            (
                "effective_rank",
                effective,
                "directions",
                None,
                "Number of directions, by entropy.",
                roy,
            ),
            (
                "stable_rank",
                stable,
                "directions",
                None,
                "Number of directions, by energy relative to the top direction.",
                rudelson,
            ),
            (
                "participation_ratio",
                many,
                "directions",
                None,
                "Number of directions, by spread of energy.",
                spread,
            ),
            (
                "top_share",
                top,
                energy,
                _UNIT,
                "Share of energy in the top direction.",
                "S[0]^2 / sum S^2",
            ),
            (
                "symmetric_share",
                lambda w: symmetric_share(w.circuit(circuit)),
                energy,
                _UNIT,
                symmetry,
                share,
            ),
            ("outliers", outliers, "directions", None, random, product),
            ("left_outliers", of_factor("left"), "directions", None, alone.format("left"), _MP),
            ("right_outliers", of_factor("right"), "directions", None, alone.format("right"), _MP),
        )
    )


def _of_words(circuit: str, kind: Embedding, k: int) -> tuple[Scorer, ...]:
    """Scorers of a circuit's map of the vocabulary, by kind of embedding."""
    name = "copying" if circuit == "ov" else "matching"
    eigenvalues = copying_eigenvalues if circuit == "ov" else matching_eigenvalues
    raised = "Share of attended tokens among the {} with the largest logit increase."
    best = "Share of tokens whose own key is among the {} best for their query."
    shares, source = (
        (raised, "Wang et al. 2022, without positions")
        if circuit == "ov"
        else (best, "copying share, for QK")
    )

    def share(rank: int) -> Scorer:
        return weight_scorer(
            name=f"{name}_top{rank}{_SUFFIX[kind]}",
            unit="share of tokens",
            bounds=_UNIT,
            description=shares.format(rank),
            source=source,
            needs=(f"{circuit}_circuit", "embedding", "unembedding"),
        )(lambda weights: share_within(weights.ranks(circuit, kind), rank))

    own = weight_scorer(
        name=f"{name}_eigenvalues{_SUFFIX[kind]}",
        unit="ratio",
        bounds=(-1.0, 1.0),
        description=(
            "How much attended tokens raise (1) or lower (-1) their own logit."
            if circuit == "ov"
            else "How much queries match (1) or avoid (-1) keys of their own token."
        ),
        source="Elhage et al. 2021",
        needs=(f"{circuit}_circuit", "embedding", "unembedding"),
    )(lambda weights: eigenvalues(weights.circuit(circuit), weights.words[kind]))
    return (own, *(share(rank) for rank in dict.fromkeys((1, k))))


def _aligned(
    name: str, description: str, function: Callable[[Weights], Tensor], words: str = "embedding"
) -> Scorer:
    return weight_scorer(
        name=name,
        unit="share of variance",
        bounds=_UNIT,
        description=description,
        source="subspace projection",
        needs=(f"{name[:2]}_circuit", words),
    )(function)


_READ = "Share of embedding variance in the subspace that {} read."
_OV_ALIGNMENT = (
    _aligned(
        "ov_read_alignment",
        _READ.format("values"),
        lambda weights: read_alignment(weights.ov, weights.words["raw"]),
    ),
    _aligned(
        "ov_write_alignment",
        "Share of unembedding variance in the subspace that the head writes.",
        lambda weights: write_alignment(weights.ov, weights.words["raw"]),
        "unembedding",
    ),
)
_QK_ALIGNMENT = (
    _aligned(
        "qk_query_alignment",
        _READ.format("queries"),
        lambda weights: read_alignment(weights.qk, weights.words["raw"]),
    ),
    _aligned(
        "qk_key_alignment",
        _READ.format("keys"),
        lambda weights: read_alignment(weights.qk.transposed(), weights.words["raw"]),
    ),
)


@checked
def weight_scorers(
    k: int = 5, embeddings: Sequence[Embedding] = ("raw", "mlp")
) -> tuple[Scorer, ...]:
    """All weight scorers, in table order; see :func:`score`.

    Args:
        k: largest rank that counts in scores over tokens.
        embeddings: token embeddings to use: ``"raw"``, or ``"mlp"`` for those after the first MLP.

    Returns:
        Scorers for :func:`headscope.circuits.score`.

    Example:
        >>> [one.name for one in hs.circuits.weight_scorers()][:2]
        ['ov_norm', 'ov_spectral_norm']
    """
    return (
        *_spectrum("ov"),
        *(one for kind in embeddings for one in _of_words("ov", kind, k)),
        *_OV_ALIGNMENT,
        *_spectrum("qk"),
        *(one for kind in embeddings for one in _of_words("qk", kind, k)),
        *_QK_ALIGNMENT,
    )


def _factor_outliers(
    factor: Float[Tensor, "layer some_head rows columns"],
) -> Float[Tensor, "layer some_head"]:
    """Number of singular values of one factor above its Marchenko-Pastur edge."""
    rows, columns = factor.shape[-2:]
    S = torch.linalg.svdvals(factor)
    deviation = torch.linalg.matrix_norm(factor) / math.sqrt(rows * columns)
    return measures.outliers(S, deviation * measures.marchenko_pastur_edge(rows, columns)).to(S)


@checked
@own_types()
def random_edge(factors: HeadFactors, seed: int = 0) -> Float[Tensor, "layer head"]:
    """Largest singular value expected of random factors with each head's shape and variance.

    Mean plus three standard deviations over draws of Gaussian factors; the variance of either
    factor is that of its own entries. Not the Marchenko-Pastur edge, which holds for one factor
    and not for a product.

    Args:
        factors: OV or QK circuits of all heads.
        seed: seed for the random factors.

    Returns:
        Singular values ``[layer head]``.

    Example:
        >>> edge = hs.circuits.random_edge(hs.circuits.ov(model))
        >>> bool((edge > 0).all())
        True
    """
    width, rank = factors.left.shape[-2:]
    mean, deviation = measures.product_edge(width, rank, width, seed=seed)
    return entry_sizes(factors) * (mean + 3 * deviation)


def entry_sizes(factors: HeadFactors) -> Float[Tensor, "layer head"]:
    """Product of the standard deviations of the left and right factor's entries."""
    width, rank = factors.left.shape[-2:]
    left, right = (
        factors.per_head(torch.linalg.matrix_norm(side)) / math.sqrt(width * rank)
        for side in (factors.left, factors.right)
    )
    return left * right


def _sample(model: HeadModel, count: int, seed: int) -> Int[Tensor, " token"]:
    """Sample of ordinary tokens, sorted."""
    ids = ordinary_tokens(model)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:count]
    return ids[order.sort().values].to(model.device)
