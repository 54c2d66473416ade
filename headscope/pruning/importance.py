"""Importance of heads to a metric: by gradients (Michel et al. 2019) and by ablation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope import metrics
from headscope.ablation import ablate_heads
from headscope.ablation.engine import Batch
from headscope.ablation.gradients import check_slope, total_metric, whole_batches
from headscope.ablation.run import Maker, Metricish, Positions, Study, by_head, present
from headscope.base.specs import Direction
from headscope.base.statistics import Design
from headscope.edits import AnyEdit, Heads, Site, zero
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import as_metric, cost_sign
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe
from headscope.progress import track
from headscope.table import HeadScores

_TINY = 1e-20


@dataclass(frozen=True, eq=False)
class _Gates:
    """Multiplies every head's output by a gate of its own at each position."""

    amounts: dict[int, Float[Tensor, "batch pos head"]]
    site: Site = "z"
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", frozenset(self.amounts))

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        return value * self.amounts[layer].to(value)[..., None]


@own_types()
def gradient_importance(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    *,
    removed: Heads = (),
    over: str = "example",
    normalise: bool = True,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """How much a metric would change if a head were scaled, first order, whatever the sign.

    ``E_x |sum_t z_t . dL/dz_t|`` with z the head's output before the output projection, L the
    metric of example x, and t its positions: the derivative of the metric by a gate on the head,
    in absolute value, averaged over examples. One forward and one backward pass. From 0 up, in
    the metric's unit; with ``normalise`` divided by the L2 norm over the heads of its layer (as
    published), so from 0 to 1 and without unit. Standard errors and intervals are over examples
    and take that norm as given.

    Source: Michel et al. 2019 (arXiv 1905.10650), section 4.1. Their code takes the
    absolute value token by token (``over="token"``, a mean over positions); taking it over a whole
    batch, as some do, would make scores depend on the batch size.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        removed: heads taken as pruned already: their output is 0, and they get no score.
        over: what the absolute value is taken of.
        normalise: divide by the layer's norm.
        batch_size: examples per pass; changes nothing but time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> bool((hs.pruning.gradient_importance(model, probe).mean >= 0).all())
        True
    """
    if over not in ("example", "token"):
        raise InputError(f"the absolute value is taken over 'example' or 'token', not {over!r}.")
    study = Study.of(model, probe, metric, batch_size=batch_size, progress=progress)
    gone = present(model, removed) if removed else ()
    if not gone:
        check_slope(model, study.metric, None, 1)
    heads = tuple(head for head in model.shape.heads if head not in gone)
    if not heads:
        raise InputError("all heads are removed: there is none to score.")
    edits: tuple[AnyEdit, ...] = (zero(gone),) if gone else ()
    found = np.full((len(heads), len(probe)), np.nan)
    with track(float(len(probe)), "importance", show=progress) as advance:
        for chosen, batch in whole_batches(study):
            found[:, chosen] = _by_example(model, batch, edits, heads, over).numpy()
            advance(float(len(batch.probe)))
    values = by_head(model, heads, found)
    if normalise:
        values = _normalised(values)
    return HeadScores.from_examples(
        "gradient_importance",
        values,
        kv_heads=model.shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        unit="share of the layer" if normalise else study.metric.unit,
        bounds=(0.0, None),
        description=f"Size of the first-order effect of scaling the head on {study.metric.name}.",
        source="Michel et al. 2019, arXiv 1905.10650, section 4.1",
        provenance=study.provenance(
            over=over, normalise=normalise, removed=[str(head) for head in gone]
        ),
    )


def _by_example(
    model: HeadModel,
    batch: Batch,
    edits: tuple[AnyEdit, ...],
    heads: Sequence[HeadIndex],
    over: str,
) -> Float[Tensor, "head batch"]:
    """Importance on every example of a batch; NaN where the metric reads nothing."""
    layers = sorted({head.layer for head in heads})
    shape = (*batch.probe.tokens.shape, model.shape.n_heads)
    with torch.enable_grad():
        gates = {
            n: torch.ones(shape, dtype=torch.float32, device=model.device, requires_grad=True)
            for n in layers
        }
        total = total_metric(model, batch, (*edits, _Gates(gates)))
        found = torch.autograd.grad(total, [gates[n] for n in layers])
    by_layer = dict(zip(layers, (gradient.cpu().double() for gradient in found), strict=True))
    rows = torch.stack([by_layer[head.layer][:, :, head.head] for head in heads])
    real = batch.probe.real.sum(1).clamp_min(1)
    values = rows.sum(2).abs() if over == "example" else rows.abs().sum(2) / real
    return values.masked_fill(~batch.read.any(1).cpu(), float("nan"))


def _normalised(
    values: Float[np.ndarray, "layer head example"],
) -> Float[np.ndarray, "layer head example"]:
    """Divided by the L2 norm over each layer's heads of the means over examples."""
    missing = np.isnan(values)
    counts = np.maximum((~missing).sum(-1), 1)
    means = np.where(missing, 0.0, values).sum(-1) / counts
    norms = np.sqrt(np.square(means).sum(1)) + _TINY
    return np.asarray(values / norms[:, None, None])


def ablation_importance(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    method: Maker = "zero",
    *,
    better: Direction | None = None,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """How much worse a metric gets without a head: the ablation's effect with the sign of damage.

    Negative where the model does better without the head. In the metric's unit. Source: Michel et
    al. 2019, section 3.2 (one head at a time).

    Args:
        model: from :func:`headscope.load`.
        probe: what to run.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: of :func:`headscope.ablate_heads`; ``zero`` is what pruning does.
        better: for a metric of your own: is it better ``higher`` or ``lower``?
        positions: as :func:`headscope.ablate_heads` takes them.
        reference: likewise.
        seed: likewise.
        batch_size: likewise.
        progress: likewise.

    Example:
        >>> hs.pruning.ablation_importance(model, probe).name
        'ablation_importance'
    """
    sign = cost_sign(as_metric(metric), better)
    effects = ablate_heads(
        model,
        probe,
        metric,
        method,
        positions=positions,
        reference=reference,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    values = sign * effects.per_example
    return HeadScores.from_effects(
        "ablation_importance",
        values,
        kv_heads=effects.kv_heads,
        design=effects.design,
        unit=effects.unit,
        description=f"How much worse {as_metric(metric).name} is without the head.",
        source="Michel et al. 2019, arXiv 1905.10650, section 3.2",
        provenance=effects.provenance,
    )
