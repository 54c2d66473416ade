"""How good a circuit is beside its faithfulness: complete, minimal, and stable over prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom
from torch import Tensor

from headscope.base.glance import Glance, Shown, number
from headscope.base.options import RunOptions
from headscope.base.saved import Saved
from headscope.base.specs import Provenance
from headscope.edges.discovery import Circuit, mean_value
from headscope.edges.graph import EdgeGraph
from headscope.edges.wiring import Wiring
from headscope.edges.written import Study
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe

STABLE = 0.8
_LEAST_PROMPTS = 100


@dataclass(frozen=True, eq=False, repr=False)
class Completeness(Saved, Shown):
    """What is left when heads of a circuit are taken from it, and from the whole model.

    A complete circuit holds all that does the work: take the same heads from both, and both fall
    alike. A gap says that something outside the circuit stands in for what was taken.

    Attributes:
        subsets: heads taken, draw by draw; the first draws are single heads.
        circuit: mean metric of the circuit without them.
        model: mean metric of the whole model without them.
        unit: of the metric.
        provenance: of the circuit.
    """

    subsets: tuple[tuple[HeadIndex, ...], ...]
    circuit: Float[np.ndarray, " draw"]
    model: Float[np.ndarray, " draw"]
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def gap(self) -> Float[np.ndarray, " draw"]:
        """Magnitude of the difference, ``|m(C - K) - m(M - K)|``, in the metric's unit."""
        return np.asarray(np.abs(self.circuit - self.model))

    def glance(self) -> Glance:
        """The largest gaps."""
        worst = np.argsort(-self.gap)[:6]
        return Glance(
            "completeness of a circuit",
            [
                f"{len(self.subsets)} sets of heads",
                f"mean gap {number(float(self.gap.mean()))} {self.unit}",
                self.provenance.model,
            ],
            ("heads taken", "circuit", "whole model", "gap"),
            [
                (
                    " ".join(map(str, self.subsets[at])),
                    number(float(self.circuit[at])),
                    number(float(self.model[at])),
                    number(float(self.gap[at])),
                )
                for at in worst
            ],
            hint="result.gap, result.subsets",
        )


@dataclass(frozen=True)
class Stability:
    """How much the strongest edges change when prompts are drawn again.

    Attributes:
        jaccard: mean overlap of the strongest edges with those of bootstrap draws, in [0, 1].
        low, high: the middle 95% of the draws.
        chance: overlap of two random sets of as many edges.
        count: edges compared.
        prompts: examples (or clusters of them) that were drawn from.
    """

    jaccard: float
    low: float
    high: float
    chance: float
    count: int
    prompts: int

    @property
    def verdict(self) -> str:
        """``stable`` from a mean overlap of 0.8; ``unstable`` below; what is missing else."""
        if self.prompts < _LEAST_PROMPTS:
            return f"not known: {self.prompts} prompts, and it takes {_LEAST_PROMPTS}"
        return "stable" if self.jaccard >= STABLE else "unstable"

    def __str__(self) -> str:
        """Overlap, its range, chance and the verdict on one line."""
        return (
            f"Jaccard of the {self.count} strongest edges over resampled prompts {self.jaccard:.2f}"
            f" ({self.low:.2f} to {self.high:.2f}; by chance {self.chance:.2f}): {self.verdict}"
        )


def stability(graph: EdgeGraph, count: int, *, draws: int = 200, seed: int = 0) -> Stability:
    """Draw the prompts again, with replacement, and compare the strongest edges.

    Costs no pass: the scores of every example are in the graph. Examples of a cluster are drawn
    together.

    Args:
        graph: of :func:`attribute`.
        count: how many of the strongest edges make the circuit.
        draws: bootstrap draws.
        seed: of the draws.

    Raises:
        InputError: if there are not as many edges, or a single example.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=8)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> found = hs.edges.stability(graph, 10, draws=20)
        >>> 0.0 <= found.jaccard <= 1.0
        True
    """
    total, examples = graph.per_example.shape
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < total:
        raise InputError(f"count={count!r}: compare 1 to {total - 1:,} edges.")
    labels = np.arange(examples) if graph.clusters is None else np.array(graph.clusters)
    groups = [np.nonzero(labels == one)[0] for one in dict.fromkeys(labels.tolist())]
    if len(groups) < 2:
        raise InputError("the graph has a single example (or cluster): nothing can be drawn again.")
    drawn = np.random.default_rng(seed)
    first = graph.chosen(count)
    values = graph.per_example.astype(np.float64)
    overlaps = []
    for _ in range(draws):
        some = np.concatenate([groups[i] for i in drawn.integers(0, len(groups), len(groups))])
        overlaps.append(_jaccard(first, _strongest(values[:, some], count)))
    low, high = np.quantile(overlaps, [0.025, 0.975])
    return Stability(
        float(np.mean(overlaps)), float(low), float(high), chance(count, total), count, len(groups)
    )


def chance(count: int, total: int) -> float:
    """Mean Jaccard overlap of two random sets of ``count`` out of ``total``.

    The overlap is hypergeometric with mean ``count^2 / total``; the expectation is summed exactly.

    Example:
        >>> round(chance(1, 4), 4)
        0.25
    """
    both = np.arange(count + 1)
    weights = hypergeom.pmf(both, total, count, count)
    return float((weights * both / (2 * count - both)).sum())


@own_types()
def completeness(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    circuit: Circuit,
    *,
    draws: int = 20,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Completeness:
    """Take heads from a circuit and from the whole model, and compare what is left.

    Every head of the circuit alone is taken, and then random sets of them, each head with
    probability one half. Taking a head takes all edges that leave it.

    Args:
        model: the one that the circuit is of.
        probe: texts with answers.
        metric: as the circuit's.
        circuit: of :func:`acdc` or :func:`run_circuit`.
        draws: random sets.
        seed: of the draws.
        batch_size: examples per pass; changes no number.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the circuit is of another model or has no heads.

    Source:
        Wang et al. 2022, arXiv 2211.00593, section 4 (completeness).

    Example:
        >>> made = hs.compiled.from_library("previous")
        >>> found = hs.edges.acdc(made.model, made.probe(4), hs.metrics.loss, 0.01, ablation="zero")
        >>> gaps = hs.edges.completeness(made.model, made.probe(4), hs.metrics.loss, found, draws=2)
        >>> float(gaps.gap.max()) < 0.01
        True
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    study = _study(model, probe, metric, circuit, options)
    if not circuit.heads:
        raise InputError("this circuit has no heads: nothing can be taken from it.")
    drawn = np.random.default_rng(seed)
    halves = drawn.random((draws, len(circuit.heads))) < 0.5
    subsets: list[tuple[HeadIndex, ...]] = [(head,) for head in circuit.heads]
    subsets += [tuple(h for h, on in zip(circuit.heads, row, strict=True) if on) for row in halves]
    batches = list(study.batches())
    left: list[list[float]] = [[], []]
    every = np.ones_like(circuit.kept)
    with options.track(2.0 * len(subsets), "completeness") as advance:
        for heads in subsets:
            out = leaving(study.wiring, heads)
            for side, kept in zip(left, (circuit.kept, every), strict=True):
                side.append(mean_value(batches, study, kept & ~out))
                advance(1.0)
    return Completeness(
        tuple(subsets), np.array(left[0]), np.array(left[1]), circuit.unit, circuit.provenance
    )


@own_types()
def minimality(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    circuit: Circuit,
    *,
    draws: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[HeadIndex, float]:
    """Return how much each head of a circuit can matter, with any other heads taken too.

    ``max over K of |m(C - K - head) - m(C - K)|`` over the empty set and random sets K of other
    heads of the circuit. A head with a value near 0 need not be there.

    Args:
        model: the one that the circuit is of.
        probe: texts with answers.
        metric: as the circuit's.
        circuit: of :func:`acdc` or :func:`run_circuit`.
        draws: random sets beside the empty one.
        seed: of the draws.
        batch_size: examples per pass; changes no number.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the circuit is of another model.

    Source:
        Wang et al. 2022, arXiv 2211.00593, section 4 (minimality).

    Example:
        >>> made = hs.compiled.from_library("previous")
        >>> found = hs.edges.acdc(made.model, made.probe(4), hs.metrics.loss, 0.01, ablation="zero")
        >>> list(hs.edges.minimality(made.model, made.probe(4), hs.metrics.loss, found, draws=1))
        [L0H0]
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    study = _study(model, probe, metric, circuit, options)
    drawn = np.random.default_rng(seed)
    batches = list(study.batches())
    found: dict[HeadIndex, float] = {}
    with options.track(float(len(circuit.heads) * (draws + 1)), "minimality") as advance:
        for head in circuit.heads:
            others = [one for one in circuit.heads if one != head]
            sets = [[], *([h for h in others if drawn.random() < 0.5] for _ in range(draws))]
            most = 0.0
            for taken in sets:
                kept = circuit.kept & ~leaving(study.wiring, taken)
                without = kept & ~leaving(study.wiring, [head])
                change = mean_value(batches, study, without) - mean_value(batches, study, kept)
                most = max(most, abs(change))
                advance(1.0)
            found[head] = most
    return found


def leaving(wiring: Wiring, heads: Sequence[HeadIndex]) -> Bool[np.ndarray, " edge"]:
    """Edges that leave some heads, as a mask."""
    numbers: Int[np.ndarray, " source"] = np.array(
        [wiring.sources.index(str(head)) for head in heads], int
    )
    return np.isin(wiring.ends[1], numbers)


def _study(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    circuit: Circuit,
    options: RunOptions,
) -> Study:
    digest = circuit.provenance.weight_digest
    if digest and digest != model.digest():
        raise InputError(
            f"this circuit is of another model ({circuit.provenance.model}) than {model.name}."
        )
    return Study.of(model, probe, metric, circuit.ablation, options)


def _strongest(values: Float[np.ndarray, "edge example"], count: int) -> Bool[np.ndarray, " edge"]:
    known = ~np.isnan(values)
    mean = np.where(known, values, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-np.abs(mean), kind="stable")[:count]] = True
    return chosen


def _jaccard(a: Bool[np.ndarray, " edge"], b: Bool[np.ndarray, " edge"]) -> float:
    return float((a & b).sum() / (a | b).sum())
