"""A metric against the number of heads that went, for several orders and random ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope import metrics
from headscope.ablation.groups import along
from headscope.ablation.run import Maker, Measurement, Metricish, Placer, facts_of, present
from headscope.base.options import RunOptions
from headscope.edits import Heads
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.pruning.orders import random_order
from headscope.pruning.structure import Size, measure_size, prune
from headscope.table import EffectGrid, OrderCurve

if TYPE_CHECKING:
    import pandas

_POINTS = 21
_SIZES = ("parameters", "flops", "seconds")


@dataclass(frozen=True, eq=False, repr=False)
class PruningCurve(OrderCurve):
    """A metric against heads removed. Draw it with ``hs.plots.curves(curve.effects, ...)``.

    Attributes:
        effects: edited run less clean run, axes ``arm`` and ``removed``; NaN where an order ends.
        orders: heads of every arm, the first to go first.
        controls: names of the arms in random order.
        sizes: cost of the model at every point that was measured, by arm and number of heads.
    """

    sizes: Mapping[tuple[str, int], Size] = field(default_factory=dict)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per arm and number of heads.

        Columns: those of :class:`headscope.table.OrderCurve`, then parameters, flops, seconds (NaN
        where not measured).
        """
        frame = super().to_pandas()
        found = [self.sizes.get(at) for at in zip(frame.arm, frame.removed, strict=True)]
        for name in _SIZES:
            frame[name] = [np.nan if one is None else getattr(one, name) for one in found]
        return frame

    def _facts(self) -> dict[str, Any]:
        sizes = [
            [*at, *(getattr(size, name) for name in _SIZES), list(size.shared)]
            for at, size in self.sizes.items()
        ]
        return super()._facts() | {"sizes": sizes}

    @classmethod
    def _read(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {
            (str(arm), int(count)): Size(
                int(parameters),
                int(flops),
                float(seconds),
                tuple(str(one) for one in (shared[0] if shared else ())),
            )
            for arm, count, parameters, flops, seconds, *shared in facts["sizes"]
        }
        return super()._read(facts) | {"sizes": sizes}


def pruning_curve(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    orders: Mapping[str, Heads] | None = None,
    *,
    counts: Sequence[int] | None = None,
    random: int = 5,
    method: Maker = "zero",
    sizes: bool = False,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> PruningCurve:
    """Measure a metric while heads go, in every order given and in random ones.

    Heads are ablated, which is what structural pruning does to the metric; sets that several arms
    share are measured once.

    Args:
        model: from :func:`headscope.load`.
        probe: what the metric is measured on: not the one that the orders were found on.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        orders: heads by name of the arm, the first to go first.
        counts: at which numbers of heads; default: all, or 21 at even distances.
        random: how many random orders to add as controls, seeded from ``seed`` on.
        method: of :func:`headscope.ablate_heads`; ``zero`` is what pruning does.
        sizes: also prune for real at every point of the arms that are not controls, and measure
            parameters, operations and time of each model.
        reference: where replacement values come from.
        seed: of the random orders, and of what the method draws.
        batch_size: examples per recorded pass.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument does not fit.
        UnsupportedModelError: if sizes are wanted of a family that cannot be pruned.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> order = hs.pruning.one_shot(hs.pruning.gradient_importance(model, probe))
        >>> curve = hs.pruning.pruning_curve(
        ...     model, probe, orders={"importance": order}, counts=[0, 4], random=2
        ... )
        >>> curve.mean.shape
        (3, 2)
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    measurement = Measurement.of(model, probe, metric, options)
    placer = Placer(measurement, method, reference=reference)
    if sizes:
        prune(model, model.shape.heads[0])  # what cannot be done is said before anything is run
    arms = {name: present(model, heads) for name, heads in (orders or {}).items()}
    controls = {f"random {seed + i}": random_order(model, seed + i) for i in range(random)}
    if (not arms and not controls) or arms.keys() & controls.keys():
        raise InputError("give at least one order or random one, under a name of its own.")
    everything = {**arms, **controls}
    points = _points(counts, max(len(order) for order in everything.values()))
    effects, clean = along(measurement, placer, everything, points)
    wanted = {
        (arm, count): tuple(sorted(order[:count]))
        for arm, order in (arms.items() if sizes else ())
        for count in points
        if count <= len(order)
    }
    measured = _sizes(model, probe, wanted, options)
    facts = facts_of(method, reference, None)
    found = EffectGrid(
        name="pruning",
        axes=("arm", "removed"),
        labels=(tuple(everything), tuple(map(str, points))),
        per_example=effects,
        unedited=clean,
        unit=measurement.metric.unit,
        description=f"{measurement.metric.name} without the heads less that of the whole model.",
        provenance=measurement.provenance(seed, checks=placer.checks, **facts),
        clusters=probe.cluster_labels,
    )
    return PruningCurve(found, everything, tuple(controls), measured)


def _points(counts: Sequence[int] | None, most: int) -> list[int]:
    if counts is None:
        return sorted({round(i) for i in np.linspace(0, most, min(_POINTS, most + 1))})
    points = sorted(set(counts))
    if not points or points[0] < 0 or points[-1] > most:
        raise InputError(f"counts={list(counts)}: 0 to {most} heads can go.")
    return points


def _sizes(
    model: HeadModel,
    probe: Probe,
    wanted: Mapping[tuple[str, int], tuple[HeadIndex, ...]],
    options: RunOptions,
) -> dict[tuple[str, int], Size]:
    """Prune for real and measure, one model at a time."""
    real = None if bool(probe.real.all()) else probe.real
    by_set: dict[tuple[HeadIndex, ...], Size] = {}
    with options.track(float(len(wanted)), "measuring pruned models") as advance:
        for heads in wanted.values():
            if heads not in by_set:
                by_set[heads] = measure_size(prune(model, heads), probe.tokens, real)
            advance(1.0)
    return {at: by_set[heads] for at, heads in wanted.items()}
