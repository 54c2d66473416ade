"""Importance of heads: to a metric, by gradients (Michel et al. 2019) or by ablation, or to none.

Those that look at no metric take the size of the weights, of the outputs, or confidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope import metrics
from headscope.ablation import ablate_heads
from headscope.ablation.engine import RecordedBatch
from headscope.ablation.heads import check_slope, total_metric, whole_batches
from headscope.ablation.run import Maker, Measurement, Metricish, Positions, by_head, present
from headscope.base.options import RunOptions
from headscope.base.specs import Direction
from headscope.base.statistics import Design
from headscope.edits import AnyEdit, Heads, HeadSite, zero
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import as_metric, cost_sign
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.probes.probe import Probe
from headscope.scorers import row_scorer
from headscope.scoring import score
from headscope.table import HeadScores
from headscope.views import AttentionRows

_TINY = 1e-20


@dataclass(frozen=True, eq=False)
class _Gates:
    """Multiplies every head's output by a gate of its own at each position."""

    amounts: dict[int, Float[Tensor, "batch pos head"]]
    site: HeadSite = "z"
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
    options = RunOptions(batch_size, progress=progress)
    measurement = Measurement.of(model, probe, metric, options)
    gone = present(model, removed) if removed else ()
    if not gone:
        check_slope(model, measurement.metric, None, 1)
    heads = tuple(head for head in model.shape.heads if head not in gone)
    if not heads:
        raise InputError("all heads are removed: there is none to score.")
    edits: tuple[AnyEdit, ...] = (zero(gone),) if gone else ()
    found = np.full((len(heads), len(probe)), np.nan)
    with options.track(float(len(probe)), "importance") as advance:
        for chosen, batch in whole_batches(measurement):
            found[:, chosen] = _by_example(model, batch, edits, heads, over).numpy()
            advance(float(len(batch.probe)))
    values, name = by_head(model, heads, found), measurement.metric.name
    if normalise:
        values = _normalised(values)
    return HeadScores.from_examples(
        "gradient_importance",
        values,
        kv_heads=model.shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        unit="share of the layer" if normalise else measurement.metric.unit,
        bounds=(0.0, None),
        description=f"Size of the first-order effect of scaling the head on {name}.",
        source="Michel et al. 2019, arXiv 1905.10650, section 4.1",
        provenance=measurement.provenance(
            over=over, normalise=normalise, removed=[str(head) for head in gone]
        ),
    ).of_stack(model.shape.stack)


def _by_example(
    model: HeadModel,
    batch: RecordedBatch,
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
        better: ``higher`` or ``lower``; needed for a metric without a direction.
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
    ).of_stack(effects.stack)


@own_types()
def weight_norm(model: HeadModel) -> HeadScores:
    """Frobenius norm of ``W_V W_O``: how long a head's write is for inputs in all directions.

    The plain magnitude baseline of pruning (Han et al. 2015, arXiv 1506.02626, for heads). From 0
    up; under grouped-query attention with the key/value head that the head reads. No norm or
    residual multiplier is folded in. Computed from the Gram matrices of the two factors.

    Raises:
        UnsupportedModelError: if the weights cannot be split by heads.

    Example:
        >>> bool((hs.pruning.weight_norm(model).mean > 0).all())
        True
    """
    shape = model.shape
    values = np.full((shape.n_layers, shape.n_heads), np.nan)
    for layer in shape.attention_layers:
        weights = model.weights(layer)
        reads, writes = weights.W_V.float(), weights.W_O.float()
        reads = (reads.mT @ reads).cpu().double().repeat_interleave(shape.group_size, dim=0)
        squared = (reads * (writes @ writes.mT).cpu().double()).sum((1, 2))
        values[layer] = squared.clamp_min(0).sqrt().numpy()
    return HeadScores.from_summary(
        "weight_norm",
        values,
        kv_heads=shape.n_kv_heads,
        bounds=(0.0, None),
        description="Frobenius norm of W_V W_O.",
        source="magnitude pruning, Han et al. 2015, arXiv 1506.02626",
        provenance=of_weights(model),
    )


@own_types()
def output_norm(model: HeadModel, probe: Probe, *, batch_size: int | None = None) -> HeadScores:
    """Mean length of what a head writes, ``E |z W_O|``, over a probe: the activation baseline.

    The scorer ``head_output_norm`` of :func:`headscope.score`, by itself.

    Example:
        >>> bool((hs.pruning.output_norm(model, probe).mean > 0).all())
        True
    """
    return score(model, probe, "head_output_norm", batch_size=batch_size)["head_output_norm"]


@own_types()
def confidence(model: HeadModel, probe: Probe, *, batch_size: int | None = None) -> HeadScores:
    """Mean over queries of a head's largest attention weight, sinks left out.

    From 0 to 1. Source: Voita et al. 2019 (arXiv 1905.09418), section 4: the average of a
    head's maximum attention weight, the end-of-sentence symbol excluded. Excluded as keys are
    end-of-sequence tokens, and the first real token, on which decoder-only models park attention
    as the paper's encoders do on the end of the sentence. Weights are not renormalised. The first
    query is in no mean.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run: text.
        batch_size: examples per pass; changes nothing but time and memory.

    Example:
        >>> bool((hs.pruning.confidence(model, probe).mean <= 1).all())
        True
    """
    end = getattr(model.tokenizer, "eos_token_id", None)

    @row_scorer(
        unit="attention",
        bounds=(0.0, 1.0),
        probe="text",
        source="Voita et al. 2019, arXiv 1905.09418, section 4",
    )
    def confidence(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        """Largest attention weight of a query, first and end-of-sequence tokens left out."""
        keys = torch.arange(rows.pattern.shape[-1], device=rows.pattern.device)
        sink = keys == probe.first[:, None]
        if end is not None:
            sink = sink | (probe.tokens[:, : len(keys)] == end)
        return rows.pattern.masked_fill(sink[:, None, None], 0.0).amax(-1)

    return score(model, probe, confidence, batch_size=batch_size)["confidence"]
