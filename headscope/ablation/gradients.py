"""First-order estimates of all heads' effects: one forward and one backward pass.

Every head gets a gate: with gate g it gives ``z + g (baseline - z)``, clean at 0 and ablated at 1.
The estimate of its effect is the derivative of the metric by its gate at 0, which equals
``sum (baseline - z) . d metric / d z`` over the edited positions. With several steps it is the
mean derivative along the straight way on which all gates open together; the estimates of all heads
then sum to the effect of ablating all of them, up to the error of the midpoint rule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.ablation.engine import RecordedBatch, partner_rows
from headscope.ablation.run import Measurement, Placer
from headscope.ablation.sources import ForwardSource, quick
from headscope.edits import AnyEdit, HeadSite, Span, during
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric, Metric
from headscope.models.protocol import HeadModel
from headscope.models.taps import writes_of


@dataclass(frozen=True, eq=False)
class Gates:
    """The way from what heads give to what an edit makes of it, one gate per example and head."""

    edit: AnyEdit
    amounts: dict[int, Float[Tensor, "batch head"]]
    site: HeadSite = field(init=False)
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Act where the edit acts."""
        object.__setattr__(self, "site", self.edit.site)
        object.__setattr__(self, "layers", frozenset(self.amounts))

    def during(self, span: Span) -> "Gates":
        """The way to what the edit is in a pass over some positions."""
        there = during((self.edit,), span)
        return Gates(there[0], self.amounts) if there else Gates(self.edit, {})

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Go part of the way."""
        amount = self.amounts[layer].to(value)
        gate = amount[:, None, :, None] if self.site == "z" else amount[:, :, None, None]
        return value + gate * (self.edit(layer, value) - value)


def attribution(
    measurement: Measurement, placer: Placer, heads: Sequence[HeadIndex], steps: int
) -> Float[np.ndarray, "head example"]:
    """Estimated effect of every head on every example.

    Args:
        measurement: what is measured.
        placer: what heads are ablated to.
        heads: whose gates open.
        steps: 1 for the gradient at the clean run; more for integrated gradients, whose
            completeness is put into the placer's checks.
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
    """Refuse first-order estimates of what has no slope where they take it.

    Raises:
        InputError: for a metric that compares with the clean run, at the clean run, where its
            gradient is 0 whatever the heads do; and for the straight way to 0 in a model with a
            norm after attention, which undoes any scaling until nothing is left to scale.
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
    """What integrated gradients should sum to, and by how much they miss it.

    ``sum``: mean over examples of the sum over heads; ``effect``: mean effect of ablating these
    heads together; ``gap``: sum less effect, in the metric's unit; 0 up to the midpoint rule.
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
    """Derivative of the metric by every gate, all of them open by ``point``."""
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
    """Batches of a probe with the examples they hold, in order, ready for whole passes.

    Batches of which the metric reads nothing are left out.
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
