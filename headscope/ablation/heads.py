"""Effects of single heads on a metric: measured, estimated, or screened and then measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.ablation.engine import ForwardSource, RecordedBatch, partner_rows, quick
from headscope.ablation.run import (
    InterventionLike,
    KeptEffects,
    Measurement,
    Metricish,
    Placer,
    Positions,
    by_head,
    deciding,
    facts_of,
    intervention_of,
    present,
    seed_of,
    without_rounding,
)
from headscope.base.arguments import checked
from headscope.base.checkpoints import CheckpointPath
from headscope.base.options import RunOptions
from headscope.base.statistics import Design, rank_correlation
from headscope.edits import AnyEdit, Heads, HeadSite, Span, Variant, during
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.interventions import Intervention
from headscope.metrics import AnyMetric, Metric
from headscope.models.protocol import HeadModel, stack_of
from headscope.models.running import own_types
from headscope.models.taps import writes_of
from headscope.probes.probe import Probe
from headscope.table import HeadScores, Provenance


@dataclass(frozen=True, eq=False)
class Gates:
    """One gate per example and head, interpolating from the head's output to the edit's."""

    edit: AnyEdit
    amounts: dict[int, Float[Tensor, "batch head"]]
    site: HeadSite = field(init=False)
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Act where the edit acts."""
        object.__setattr__(self, "site", self.edit.site)
        object.__setattr__(self, "layers", frozenset(self.amounts))

    def during(self, span: Span) -> "Gates":
        """The gated edit for a pass over some positions."""
        there = during((self.edit,), span)
        return Gates(there[0], self.amounts) if there else Gates(self.edit, {})

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Interpolate between a value and its edited form."""
        amount = self.amounts[layer].to(value)
        gate = amount[:, None, :, None] if self.site == "z" else amount[:, :, None, None]
        return value + gate * (self.edit(layer, value) - value)


def attribution(
    measurement: Measurement, placer: Placer, heads: Sequence[HeadIndex], steps: int
) -> Float[np.ndarray, "head example"]:
    """Estimated effect of every head on every example.

    Args:
        measurement: model, probe and metric.
        placer: what heads are ablated to.
        heads: heads whose gates open.
        steps: 1 for the gradient at the clean run; more for integrated gradients, whose
            completeness is recorded in the placer's checks.
    """
    check_slope(measurement.model, measurement.metric, placer.method, steps)
    points = [0.0] if steps == 1 else [(step + 0.5) / steps for step in range(steps)]
    parts = []
    total = float(len(measurement.probe) * steps)
    with measurement.options.track(total, "attribution") as advance:
        for chosen, batch in measurement.batches():
            place = placer.place(chosen, batch)
            placer.prove(batch, place, heads)
            edit = place(heads)
            estimate = torch.zeros(len(heads), len(batch.probe), dtype=torch.float64)
            for point in points:
                estimate += _derivatives(measurement.model, batch, edit, heads, point) / steps
                advance(float(len(batch.probe)))
            parts.append(estimate)
    found = torch.cat(parts, 1).numpy()
    if steps > 1:
        placer.checks["completeness"] = _completeness(measurement, placer, heads, found)
    return found


def check_slope(model: HeadModel, metric: AnyMetric, baseline: object, steps: int) -> None:
    """Refuse a first-order estimate at a point where the metric has no slope.

    Raises:
        InputError: for a metric that compares with the clean run, whose gradient at the clean run
            is 0 whatever the heads do; and for integration down to 0 in a model with a norm after
            attention, which undoes any scaling.
    """
    if steps == 1 and "clean" in metric.needs:
        raise InputError(
            f"{metric.name} is smallest at the clean run, so its gradient there is 0 and a "
            "first-order estimate of it is rounding: give steps=16 (integrated gradients), "
            "another metric, or ablate the heads."
        )
    name = getattr(baseline, "name", baseline)
    if steps > 1 and name == "zero" and "linear_write" in model.limits:
        raise InputError(
            f"integrated gradients to zero do not converge here: {model.limits['linear_write']} "
            "Such a norm undoes the scaling on the way to 0: give another baseline, such as "
            "'mean', or ablate the heads."
        )


def _completeness(
    measurement: Measurement,
    placer: Placer,
    heads: Sequence[HeadIndex],
    estimates: Float[np.ndarray, "head example"],
) -> dict[str, float]:
    """Completeness of integrated gradients: the joint effect that they should sum to, and the gap.

    ``sum``: mean over examples of the sum over heads; ``effect``: mean effect of ablating these
    heads together; ``gap``: sum minus effect, in the metric's unit; 0 up to the error of the
    midpoint rule.
    """
    edited, clean = measurement.measure(
        lambda chosen, batch: [(placer.place(chosen, batch)(heads),)], 1, "completeness"
    )
    effect = edited[0] - clean
    total = np.where(np.isnan(effect), np.nan, np.nansum(estimates, axis=0))
    means = [float(np.nanmean(one)) for one in (total, effect, total - effect)]
    return dict(zip(("sum", "effect", "gap"), means, strict=True))


def _derivatives(
    model: HeadModel, batch: RecordedBatch, edit: AnyEdit, heads: Sequence[HeadIndex], point: float
) -> Float[Tensor, "head batch"]:
    """Derivative of the metric with respect to every gate, with all gates at ``point``."""
    shape = (len(batch.probe), model.shape.n_heads)
    layers = sorted({head.layer for head in heads})
    with torch.enable_grad():
        gates = {
            layer: torch.full(
                shape, point, dtype=torch.float32, device=model.device, requires_grad=True
            )
            for layer in layers
        }
        total = total_metric(model, batch, (Gates(edit, gates),))
        found = torch.autograd.grad(total, [gates[layer] for layer in layers])
    by_layer = dict(zip(layers, found, strict=True))
    rows = torch.stack([by_layer[head.layer][:, head.head] for head in heads]).cpu().double()
    unread = ~batch.readings[0].read.any(1).cpu()
    return rows.masked_fill(unread, float("nan"))


def whole_batches(measurement: Measurement) -> Iterator[tuple[slice, RecordedBatch]]:
    """Batches of a probe, ready for whole passes, each with the indices of its examples.

    Batches in which the metric reads nothing are left out.
    """
    reads = measurement.metric.reads(measurement.probe)
    for start in range(0, len(measurement.probe), measurement.size):
        chosen = slice(start, min(start + measurement.size, len(measurement.probe)))
        part, read = measurement.probe.examples(chosen), reads[chosen]
        if bool(read.any()):
            source = ForwardSource(
                measurement.model, part.tokens, part.real, read, inputs=part.inputs
            )
            partner = partner_rows(measurement.model, part, [measurement.metric])
            batch = RecordedBatch(
                part, measurement.metric, source, read, measurement.limit, (), partner
            )
            yield chosen, batch


def total_metric(
    model: HeadModel, batch: RecordedBatch, edits: Sequence[AnyEdit]
) -> Float[Tensor, ""]:
    """Sum of the metric over the examples of a batch, ready for a backward pass.

    Raises:
        InputError: if the metric has no gradient.
    """
    reading = batch.readings[0]
    read, metric = reading.read, reading.metric
    at = read.any(0).nonzero().squeeze(1)
    with quick(model):
        logits = model.run(batch.probe, writes=writes_of(edits), logits_at=at, grad=True)
    assert logits is not None  # noqa: S101  # they were asked for
    if isinstance(metric, Metric):
        rows = logits[read[:, at].to(logits.device)].float()
        weights = (1.0 / read.sum(1))[read.nonzero()[:, 0]]
        values = metric.value(reading.facts(rows))
        total = (values * weights.to(values)).sum()
    else:
        total = metric(logits.float(), batch.probe).sum()
    if not total.requires_grad:
        raise InputError(
            f"{metric.name} has no gradient, so nothing can be estimated of it: take another "
            "metric, such as loss or logit_difference."
        )
    return total


Keeper = Callable[[Sequence[HeadIndex]], KeptEffects]


def ablated(
    measurement: Measurement, placer: Placer, heads: Sequence[HeadIndex], keep: Keeper | None = None
) -> Float[np.ndarray, "head example"]:
    """Effect of ablating each head alone; ``keep`` says where finished heads are stored."""
    kept = None if keep is None else keep(heads)

    def variants(chosen: slice, batch: RecordedBatch) -> list[Variant]:
        place = placer.place(chosen, batch)
        placer.prove(batch, place, heads)
        return [(place([head]),) for head in heads]

    edited, clean = measurement.measure(variants, len(heads), f"ablating {len(heads)} heads", kept)
    effects = without_rounding(edited - clean, clean)
    silent = [
        str(head) for head, row in zip(heads, effects, strict=True) if not np.nan_to_num(row).any()
    ]
    placer.checks["heads_without_effect"] = silent
    return effects


def screened(
    measurement: Measurement,
    placer: Placer,
    heads: Sequence[HeadIndex],
    steps: int,
    top: int,
    sample: int,
    keep: Keeper | None = None,
) -> Float[np.ndarray, "head example"]:
    """Effects of the heads with the largest estimates and of a random sample; NaN for the rest.

    The rank correlation of estimate and effect, over the heads that have both, measures what the
    shortcut costs.
    """
    estimate = attribution(measurement, placer, heads, steps)
    size = np.abs(np.nanmean(estimate, axis=1))
    order = np.argsort(-size, kind="stable")
    rest = np.random.default_rng(measurement.options.seed).permutation(order[top:])[:sample]
    measured = np.sort(np.concatenate([order[:top], rest]))
    effects = np.full_like(estimate, np.nan)
    effects[measured] = ablated(measurement, placer, [heads[i] for i in measured], keep)
    means = (np.nanmean(values[measured], axis=1) for values in (estimate, effects))
    placer.checks["rank_correlation"] = rank_correlation(*means)
    placer.checks["heads_sampled"] = [str(heads[i]) for i in np.sort(rest)]
    return effects


def as_scores(
    measurement: Measurement,
    effects: Float[np.ndarray, "layer head example"],
    method: str,
    provenance: Provenance,
) -> HeadScores:
    """Wrap effects as a score, tested against no effect."""
    name = measurement.metric.name
    return HeadScores.from_effects(
        f"{method}_ablation",
        effects,
        kv_heads=measurement.model.shape.n_kv_heads,
        design=Design(clusters=measurement.probe.cluster_labels),
        unit=measurement.metric.unit,
        description=f"{name} with the head ablated ({method}) minus that without.",
        source="Michel et al. 2019, arXiv 1905.10650 (ablation); Nanda 2023 (attribution)",
        provenance=provenance,
    ).of_stack(measurement.model.shape.stack)


# Options of the estimates, and the function that takes each.
_OF_ESTIMATES = {"baseline": "estimate_heads", "steps": "estimate_heads"} | {
    "top": "screen_heads",
    "sample": "screen_heads",
}


@checked
@own_types()
def ablate_heads(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    method: InterventionLike = "mean",
    heads: Heads | None = None,
    *,
    stack: str | None = None,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    checkpoint: CheckpointPath = None,
    progress: bool | None = None,
    **unknown: Any,
) -> HeadScores:
    """Ablate every head on its own and measure the effect on a metric.

    The effect is ``metric(ablated) - metric(clean)``, per example. Its p-value tests against no
    effect, two-sided; ``.interval()`` gives its interval. Results equal those of one whole pass per
    head at a fraction of the cost, since only what an edit can reach is recomputed.

    Methods:
        ``mean``: the head's mean output over the reference. ``mean_pos``: at each position.
        ``zero``: 0 (what a value bias adds goes too). ``resample``: the output on another example
        (seeded). ``patch``: the output on the paired, corrupt example. ``uniform``: the query
        is 0, so that attention is flat over the visible keys, but for a position bias (ALiBi) and
        the share of a learned sink. ``attend_to_first``: all attention on the first token.
        Or a value of :mod:`headscope.interventions`, e.g. ``hs.interventions.Scale(0.5)``; or a
        function from heads to an edit: ``lambda heads: hs.edits.scale(heads, 0.5)``.

    Args:
        model: from :func:`headscope.load`.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: intervention, as above.
        heads: heads to use. Default: all. In a model with several attention stacks all must be of
            one stack, e.g. ``["X0H1"]``.
        stack: attention stack of such a model, e.g. ``"cross"``.
        positions: where to ablate: a mark of the probe, or ``[batch pos]``; default: everywhere.
        reference: for a named method, the probe that means and other examples come from; default:
            the probe itself.
        seed: seed of a named method's random draws.
        batch_size: examples per recorded pass; affects only time and memory.
        memory: limit for a stack of variants, e.g. ``"2GB"``.
        checkpoint: file that stores every finished head, from which the same call (or one for other
            heads) resumes after an interruption; default: none.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.
        unknown: not used; options of the estimates are refused with the function that takes them.

    Raises:
        InputError: if an argument does not fit the probe, the model or the method, or if the
            checkpoint belongs to another model, probe, metric or method.
        HeadscopeError: if a check of the edits fails.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads="L0H1").n[0, :2].tolist()
        [0, 2]
    """
    _refuse_unknown("ablate_heads", unknown)
    options = RunOptions(batch_size, memory, seed, progress)
    intervention_of(method, reference)  # refuse before any pass
    model = stack_of(model, heads, stack)
    chosen = present(model, heads)
    placer = Placer.of(model, probe, metric, method, positions, reference, options)
    keep = _keeper(placer, checkpoint)
    effects = ablated(placer.measurement, placer, chosen, keep)
    return _scores(placer, chosen, effects, placer.facts)


@checked
@own_types()
def estimate_heads(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    *,
    baseline: InterventionLike = "mean",
    steps: int = 1,
    heads: Heads | None = None,
    stack: str | None = None,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Estimate the effect of ablating every head from gradients, all heads at once.

    Every head gets a gate that interpolates from its output to the baseline's. With one step the
    estimate is the derivative with respect to the gate at the clean run, ``sum (baseline - z) . d
    metric / d z``: one forward and one backward pass for all heads. With more steps it is the mean
    derivative along the path from the clean run to all heads ablated together (integrated
    gradients); the estimates of all heads then sum to that joint effect, up to the error of the
    midpoint rule.

    Args:
        model: from :func:`headscope.load`.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``; must be
            differentiable.
        baseline: the ablation to estimate: an intervention, or its name in :func:`ablate_heads`.
        steps: 1, or the number of points along the path.
        heads: heads to estimate; default: all.
        stack: as in :func:`ablate_heads`.
        positions: as in :func:`ablate_heads`.
        reference: as in :func:`ablate_heads`.
        seed: as in :func:`ablate_heads`.
        batch_size: as in :func:`ablate_heads`.
        memory: as in :func:`ablate_heads`.
        progress: as in :func:`ablate_heads`.

    Raises:
        InputError: if an argument does not fit, or the metric has no gradient.

    Source:
        Nanda 2023, attribution patching; Sundararajan et al. 2017, arXiv 1703.01365.

    Example:
        >>> estimate = hs.estimate_heads(model, probe, hs.metrics.loss, baseline="zero")
        >>> estimate.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    options = RunOptions(batch_size, memory, seed, progress)
    _check_steps(steps)
    given = _baseline(baseline, reference, seed)
    model = stack_of(model, heads, stack)
    chosen = present(model, heads)
    placer = Placer.of(model, probe, metric, baseline, positions, reference, options)
    effects = attribution(placer.measurement, placer, chosen, steps)
    facts = {**facts_of("attribution", reference, positions), "steps": steps}
    return _scores(placer, chosen, effects, {**facts, "baseline": given.name})


@checked
@own_types()
def screen_heads(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    *,
    top: int = 10,
    sample: int = 10,
    baseline: InterventionLike = "mean",
    steps: int = 1,
    heads: Heads | None = None,
    stack: str | None = None,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    checkpoint: CheckpointPath = None,
    progress: bool | None = None,
) -> HeadScores:
    """Estimate the effect of every head, then ablate the most promising ones.

    Measures the ``top`` heads by the size of their estimates and a random ``sample`` of the others;
    the rest are missing. The rank correlation of estimate and effect over the measured heads, in
    ``provenance.checks``, says how far the estimate can be trusted.

    Args:
        model: from :func:`headscope.load`.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``; must be
            differentiable.
        top: number of heads with the largest estimates to measure.
        sample: number of heads to draw from the others.
        baseline: the ablation: an intervention, or its name in :func:`ablate_heads`.
        steps: steps of the estimate, see :func:`estimate_heads`.
        heads: candidates; default: all.
        stack: as in :func:`ablate_heads`.
        positions: as in :func:`ablate_heads`.
        reference: as in :func:`ablate_heads`.
        seed: seed of the sample, and of the ablation's random draws.
        batch_size: as in :func:`ablate_heads`.
        memory: as in :func:`ablate_heads`.
        checkpoint: as in :func:`ablate_heads`, and the same file: heads that it measured are not
            measured again. Estimates take one pass for all heads and are not stored.
        progress: as in :func:`ablate_heads`.

    Raises:
        InputError: if an argument does not fit, the metric has no gradient, or the checkpoint
            belongs to another measurement.

    Example:
        >>> effects = hs.screen_heads(model, probe, hs.metrics.loss, top=2, sample=1)
        >>> int((effects.n > 0).sum())
        3
    """
    options = RunOptions(batch_size, memory, seed, progress)
    _check_steps(steps)
    if not _is_count(top, 1) or not _is_count(sample, 0):
        raise InputError(f"screening needs top >= 1 and sample >= 0; got {top!r} and {sample!r}.")
    given = _baseline(baseline, reference, seed)
    model = stack_of(model, heads, stack)
    chosen = present(model, heads)
    placer = Placer.of(model, probe, metric, baseline, positions, reference, options)
    keep = _keeper(placer, checkpoint)
    effects = screened(placer.measurement, placer, chosen, steps, top, sample, keep)
    facts = {**facts_of("screened", reference, positions), "baseline": given.name, "steps": steps}
    return _scores(placer, chosen, effects, facts)


def _baseline(baseline: InterventionLike, reference: Probe | None, seed: int) -> Intervention:
    """Intervention whose effect is estimated; a user's edit function has no gate."""
    given = intervention_of(baseline, reference, seed, "baseline")
    if given is None:
        raise InputError(
            "baseline takes an intervention or its name: an edit function has no value at the end "
            "of a gate. Use hs.ablate_heads."
        )
    return given


def _scores(
    placer: Placer,
    heads: tuple[HeadIndex, ...],
    effects: Float[np.ndarray, "head example"],
    facts: Mapping[str, Any],
) -> HeadScores:
    measurement = placer.measurement
    seed = seed_of(placer.method, measurement.options.seed)
    provenance = measurement.provenance(seed, checks=placer.checks, **facts)
    placed = by_head(measurement.model, heads, effects)
    return as_scores(measurement, placed, str(facts["method"]), provenance)


def _keeper(placer: Placer, checkpoint: CheckpointPath) -> Keeper | None:
    """Checkpoint for finished heads, or None."""
    if checkpoint is None:
        return None
    measurement, file = placer.measurement, Path(checkpoint)
    facts = deciding(
        measurement.provenance(measurement.options.seed),
        measurement.probe,
        placer.reference,
        measurement.metric,
        placer.method,
        placer.positions,
    )
    examples = len(measurement.probe)
    KeptEffects(file, facts, (), examples)  # refuse another measurement's file before any pass
    return lambda heads: KeptEffects(file, facts, heads, examples)


def _refuse_unknown(function: str, unknown: Mapping[str, Any]) -> None:
    for name in unknown:
        if name in _OF_ESTIMATES:
            raise InputError(
                f"{function} takes no {name}: it measures, and that is an option of estimates; "
                f"call hs.{_OF_ESTIMATES[name]}."
            )
        raise InputError(f"{function} takes no argument {name!r}.")


def _check_steps(steps: int) -> None:
    if not _is_count(steps, 1):
        raise InputError(f"an estimate takes steps=1 or more; got {steps!r}.")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
