"""Joint ablation of several heads: named groups, cumulative orders, and pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypedDict, Unpack

import numpy as np
from jaxtyping import Float

from headscope.ablation.engine import RecordedBatch
from headscope.ablation.run import (
    InterventionLike,
    Measurement,
    Metricish,
    Placer,
    Positions,
    intervention_of,
    present,
    seed_of,
    without_rounding,
)
from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.specs import ScoreSpec, effect_spec
from headscope.edits import Heads, Variant
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe
from headscope.table import EffectGrid, PairScores, Provenance

Sets = Sequence[tuple[HeadIndex, ...]]


class SetOptions(TypedDict, total=False):
    """Options shared by all joint ablations, as in :func:`headscope.ablate_heads`."""

    positions: Positions
    reference: Probe | None
    seed: int
    batch_size: int | None
    memory: str | int | None
    progress: bool | None


@checked
@own_types()
def ablate_groups(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    groups: Mapping[str, Heads],
    method: InterventionLike = "mean",
    **options: Unpack[SetOptions],
) -> EffectGrid:
    """Ablate named sets of heads, each jointly; an empty set has effect 0.

    ``groups`` maps names to heads; the other arguments are those of :func:`headscope.ablate_heads`.

    Args:
        model: model to run.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        groups: heads by group name, e.g. ``{"early": ["L0H0", "L0H1"]}``.
        method: intervention; see :func:`headscope.ablate_heads`.
        options: further options of :func:`headscope.ablate_heads`: ``positions``, ``reference``,
            ``seed``, ``batch_size``, ``memory`` and ``progress``.

    Returns:
        Metric with the group ablated minus that without, per group and example, in the metric's
        unit.

    Raises:
        InputError: if the groups have no names, or there is none.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> groups = {"none": [], "layer 0": ["L0H0", "L0H1"]}
        >>> hs.ablate_groups(model, probe, hs.metrics.loss, groups).mean[0]
        np.float64(0.0)
    """
    if not isinstance(groups, Mapping):
        raise InputError(
            "groups= needs a mapping from names to heads, such as {'early': ['L0H0', "
            f"'L0H1']}}, not as {type(groups).__name__}."
        )
    if not groups:
        raise InputError("groups= is empty: name at least one set of heads.")
    sets = [() if not heads else present(model, heads) for heads in groups.values()]
    found = _measured(model, probe, metric, sets, method, **options)
    return EffectGrid(
        spec=effect_spec(
            f"{found.method}_ablation",
            found.measurement.metric,
            "with the group ablated minus that without.",
        ),
        axes=("group",),
        labels=(tuple(groups),),
        per_example=found.effects,
        unedited=found.clean,
        provenance=found.provenance,
        clusters=probe.cluster_labels,
    )


@checked
@own_types()
def ablate_cumulatively(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    order: Heads,
    method: InterventionLike = "mean",
    **options: Unpack[SetOptions],
) -> EffectGrid:
    """Ablate growing prefixes of an order of heads: none, the first, the first two, ...

    ``order`` gives the heads, first to last; the other arguments are those of
    :func:`headscope.ablate_heads`.

    Args:
        model: model to run.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        order: heads, first to last.
        method: intervention; see :func:`headscope.ablate_heads`.
        options: further options; see :func:`ablate_groups`.

    Returns:
        Effect of ablating the first 0, 1, 2, ... heads, per example, in the metric's unit.

    Raises:
        InputError: if a head does not exist, or an argument does not fit the model.

    Example:
        >>> curve = hs.ablate_cumulatively(model, probe, hs.metrics.loss, ["L0H0", "L1H2"])
        >>> curve.labels
        (('0', '1', '2'),)
    """
    heads = present(model, order)
    growing: dict[str, Heads] = {str(n): heads[:n] for n in range(len(heads) + 1)}
    return ablate_groups(model, probe, metric, growing, method, **options)


@checked
@own_types()
def interactions(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    heads: Heads,
    method: InterventionLike = "mean",
    **options: Unpack[SetOptions],
) -> PairScores:
    """Interaction of every pair of chosen heads: joint effect minus the sum of single effects.

    ``effect(a, b) - effect(a) - effect(b)``, a mean over examples, symmetric; 0 if the heads act
    independently. Backup heads show with the sign of the effects of the pair. Pairs that were not
    requested, and the diagonal, are NaN. Arguments are those of :func:`headscope.ablate_heads`.

    Args:
        model: model to run.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        heads: heads to pair, at least two.
        method: intervention; see :func:`headscope.ablate_heads`.
        options: further options; see :func:`ablate_groups`.

    Returns:
        Interaction ``[layer head layer head]`` of every pair, in the metric's unit.

    Raises:
        InputError: if there are fewer than two heads, or an argument does not fit the model.

    Example:
        >>> pairs = hs.interactions(model, probe, hs.metrics.loss, ["L0H0", "L1H2"])
        >>> bool(pairs.values[0, 0, 1, 2] == pairs.values[1, 2, 0, 0])
        True
    """
    chosen = present(model, heads)
    if len(chosen) < 2:
        raise InputError("interactions need at least two heads.")
    both = list(combinations(chosen, 2))
    sets = [*((head,) for head in chosen), *both]
    found = _measured(model, probe, metric, sets, method, **options)
    mean = np.nanmean(found.effects, axis=1)
    alone = dict(zip(chosen, mean, strict=False))
    shape = (model.shape.n_layers, model.shape.n_heads)
    values = np.full((*shape, *shape), np.nan)
    for (a, b), together in zip(both, mean[len(chosen) :], strict=True):
        values[(*a, *b)] = values[(*b, *a)] = together - alone[a] - alone[b]
    spec = ScoreSpec(
        f"{found.method}_interaction",
        unit=found.measurement.metric.unit,
        description="Effect of ablating both heads minus the sum of their single effects.",
    )
    return PairScores(spec, values, upward=False, provenance=found.provenance)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Effects of sets of heads, with their provenance."""

    measurement: Measurement
    method: str
    effects: Float[np.ndarray, "set example"]
    clean: Float[np.ndarray, " example"]
    provenance: Provenance


def _measured(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    sets: Sets,
    method: InterventionLike,
    *,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> _Measured:
    """Ablate sets of heads, each jointly."""
    options = RunOptions(batch_size, memory, seed, progress)
    intervention_of(method, reference)  # refuse before any pass
    placer = Placer.of(model, probe, metric, method, positions, reference, options)
    effects, clean = joint(placer.measurement, placer, sets)
    about = {"checks": placer.checks, **placer.facts}
    provenance = placer.measurement.provenance(seed_of(method, seed), **about)
    return _Measured(placer.measurement, str(about["method"]), effects, clean, provenance)


def joint(
    measurement: Measurement, placer: Placer, sets: Sets
) -> tuple[Float[np.ndarray, "set example"], Float[np.ndarray, " example"]]:
    """Effects of sets of heads, each ablated jointly, and the metric on the clean run."""
    named = list(dict.fromkeys(head for heads in sets for head in heads))

    def variants(chosen: slice, batch: RecordedBatch) -> list[Variant]:
        place = placer.place(chosen, batch)
        if named:
            placer.prove(batch, place, named)
        return [(place(heads),) if heads else () for heads in sets]

    edited, clean = measurement.measure(variants, len(sets), f"ablating {len(sets)} sets of heads")
    effects = without_rounding(edited - clean, clean)
    return effects, clean


def along(
    measurement: Measurement,
    placer: Placer,
    orders: Mapping[str, Sequence[HeadIndex]],
    counts: Sequence[int],
) -> tuple[Float[np.ndarray, "order count example"], Float[np.ndarray, " example"]]:
    """Effects of the prefixes of each order, and the metric on the clean run.

    A set that several orders share is run once; NaN where an order has fewer heads.
    """
    sets = {
        (row, column): tuple(sorted(order[:count]))
        for row, order in enumerate(orders.values())
        for column, count in enumerate(counts)
        if count <= len(order)
    }
    distinct = {heads: place for place, heads in enumerate(dict.fromkeys(sets.values()))}
    found, clean = joint(measurement, placer, list(distinct))
    effects = np.full((len(orders), len(counts), len(clean)), np.nan)
    for cell, heads in sets.items():
        effects[cell] = found[distinct[heads]]
    return effects, clean
