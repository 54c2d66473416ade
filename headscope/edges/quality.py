"""How good a circuit is beside its faithfulness: complete and minimal."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.base.options import RunOptions
from headscope.edges.checks import mean_value
from headscope.edges.written import EdgeMeasurement
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe
from headscope.table.edges import Circuit, Completeness, Wiring


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
) -> EdgeMeasurement:
    digest = circuit.provenance.weight_digest
    if digest and digest != model.digest():
        raise InputError(
            f"this circuit is of another model ({circuit.provenance.model}) than {model.name}."
        )
    return EdgeMeasurement.of(model, probe, metric, circuit.ablation, options)
