"""Head importance, pruning orders, and the metric along an order."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope import metrics
from headscope.ablation import ablate_heads
from headscope.ablation.engine import RecordedBatch
from headscope.ablation.groups import along, joint
from headscope.ablation.heads import check_slope, total_metric, whole_batches
from headscope.ablation.run import (
    InterventionLike,
    Measurement,
    Metricish,
    Placer,
    Positions,
    by_head,
    facts_of,
    present,
)
from headscope.base.arguments import checked
from headscope.base.files import check_same, whole_file, writable_folder
from headscope.base.options import RunOptions, track
from headscope.base.specs import Direction, effect_spec
from headscope.base.statistics import Design
from headscope.edits import AnyEdit, Heads, HeadSite, zero
from headscope.errors import HeadscopeError, InputError
from headscope.heads import HeadIndex, HeadOrder
from headscope.metrics import as_metric, cost_sign
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.probes.probe import Probe, probe_digest
from headscope.pruning.structure import Size, measure_size, prune
from headscope.scorers import row_scorer
from headscope.scoring import score
from headscope.table import EffectGrid, HeadScores, OrderCurve, Provenance
from headscope.views import AttentionRows

if TYPE_CHECKING:
    import pandas


_TINY = 1e-20


@dataclass(frozen=True, eq=False)
class _Gates:
    """Multiplies every head's output by its own gate at each position."""

    amounts: dict[int, Float[Tensor, "batch pos head"]]
    site: HeadSite = "z"
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", frozenset(self.amounts))

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        return value * self.amounts[layer].to(value)[..., None]


@checked
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
    """Importance by gradients: first-order size of the effect of scaling a head on a metric.

    ``E_x |sum_t z_t . dL/dz_t|`` with z the head's output before the output projection, L the
    metric of example x, and t its positions: the absolute derivative of the metric with respect to
    a gate on the head, averaged over examples. Takes one forward and one backward pass. From 0 up,
    in the metric's unit; with ``normalise`` divided by the L2 norm over the heads of its layer (as
    published), so from 0 to 1 and unitless. Standard errors and intervals are over examples and
    treat that norm as fixed.

    Source: Michel et al. 2019 (arXiv 1905.10650), section 4.1. Their code takes the absolute value
    token by token (``over="token"``, a mean over positions); taking it over a whole batch, as some
    do, would make scores depend on the batch size.

    Args:
        model: from :func:`headscope.load`.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        removed: heads treated as pruned: their output is 0, and they get no score.
        over: whether the absolute value is taken per ``example`` or ``token``.
        normalise: divide by the layer's norm.
        batch_size: examples per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A score per head, with values per example.

    Raises:
        InputError: if ``over`` is unknown, all heads are removed, or probe and metric do not fit.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> bool((hs.pruning.gradient_importance(model, probe).mean >= 0).all())
        True
    """
    if over not in ("example", "token"):
        raise InputError(f"over={over!r}: give 'example' or 'token'.")
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
    """Importance on every example of a batch; NaN if the metric reads nothing."""
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
    """Divide by the L2 norm over each layer's heads of the means over examples."""
    missing = np.isnan(values)
    counts = np.maximum((~missing).sum(-1), 1)
    means = np.where(missing, 0.0, values).sum(-1) / counts
    norms = np.sqrt(np.square(means).sum(1)) + _TINY
    return np.asarray(values / norms[:, None, None])


@checked
def ablation_importance(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    method: InterventionLike = "zero",
    *,
    better: Direction | None = None,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Importance by ablation: the effect of ablating each head, with the sign of damage.

    Negative if the model does better without the head. In the metric's unit. Source: Michel et al.
    2019, section 3.2 (one head at a time).

    Args:
        model: from :func:`headscope.load`.
        probe: examples to run.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: as in :func:`headscope.ablate_heads`; ``zero`` is equivalent to pruning.
        better: ``higher`` or ``lower``; needed for a metric without a direction.
        positions: as in :func:`headscope.ablate_heads`.
        reference: as in :func:`headscope.ablate_heads`.
        seed: as in :func:`headscope.ablate_heads`.
        batch_size: as in :func:`headscope.ablate_heads`.
        progress: as in :func:`headscope.ablate_heads`.

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


@checked
@own_types()
def weight_norm(model: HeadModel) -> HeadScores:
    """Importance by magnitude: Frobenius norm of ``W_V W_O``.

    The magnitude baseline of pruning (Han et al. 2015, arXiv 1506.02626, for heads). From 0 up;
    under grouped-query attention with the key/value head that the head reads. No norm or residual
    multiplier is folded in. Computed from the Gram matrices of the two factors.

    Args:
        model: model to analyse.

    Returns:
        A score per head, of at least 0.

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


@checked
@own_types()
def output_norm(model: HeadModel, probe: Probe, *, batch_size: int | None = None) -> HeadScores:
    """Importance by activation: mean norm of the head's output, ``E |z W_O|``, over a probe.

    The same as the scorer ``head_output_norm`` of :func:`headscope.score`.

    Args:
        model: model to run.
        probe: examples to run.
        batch_size: examples per pass; affects only time and memory.

    Returns:
        A score per head, of at least 0, with values per example.

    Example:
        >>> bool((hs.pruning.output_norm(model, probe).mean > 0).all())
        True
    """
    return score(model, probe, "head_output_norm", batch_size=batch_size)["head_output_norm"]


@checked
@own_types()
def confidence(model: HeadModel, probe: Probe, *, batch_size: int | None = None) -> HeadScores:
    """Importance by confidence: mean over queries of a head's largest attention weight.

    Sinks are left out. From 0 to 1. Source: Voita et al. 2019 (arXiv 1905.09418), section 4: the
    average of a head's maximum attention weight, the end-of-sentence symbol excluded. Excluded as
    keys are end-of-sequence tokens, and the first real token, on which decoder-only models park
    attention as the paper's encoders do on the end of the sentence. Weights are not renormalised.
    The first query is not counted.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run: text.
        batch_size: examples per pass; affects only time and memory.

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


class KeptOrder:
    """Checkpoint of the heads removed so far, and of what determines the order.

    Args:
        file: JSON, rewritten atomically after every head.
        facts: JSON values that determine the order: a file with other facts is refused.
    """

    def __init__(self, file: Path, facts: Mapping[str, Any]) -> None:
        """Store the arguments; nothing is written yet."""
        writable_folder(file.parent)
        self._file, self._facts = file, json.loads(json.dumps(facts))

    def read(self) -> tuple[HeadIndex, ...]:
        """Heads of an earlier run; none if there is no file.

        Raises:
            InputError: if the file belongs to another order, or is not one.
        """
        if not self._file.exists():
            return ()
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            facts, heads = dict(found["facts"]), tuple(map(HeadIndex.parse, found["heads"]))
        except (OSError, KeyError, TypeError, ValueError, HeadscopeError) as error:
            raise InputError(
                f"{self._file} is not a kept order: give another name, or delete it."
            ) from error
        check_same(self._file, facts, self._facts, "order")
        return heads

    def write(self, heads: tuple[HeadIndex, ...]) -> None:
        """Write the heads so far."""
        text = json.dumps({"facts": self._facts, "heads": [str(head) for head in heads]})
        with whole_file(self._file) as file:
            file.write(text.encode() + b"\n")


@runtime_checkable
class Importance(Protocol):
    """Scores the remaining heads, e.g. :func:`gradient_importance`."""

    def __call__(
        self, model: HeadModel, probe: Probe, metric: Metricish, *, removed: Heads
    ) -> HeadScores:
        """Score all heads except the removed ones."""


@checked
def one_shot(scores: HeadScores, *, keep: int = 0) -> HeadOrder:
    """Order heads with a value by a score, the smallest mean first; ties by lowest head.

    Args:
        scores: any column of a table, e.g. from :func:`gradient_importance`.
        keep: number of best heads of each layer to exclude from the order (Michel et al. 2019).

    Example:
        >>> order = hs.pruning.one_shot(table["induction"], keep=1)
        >>> len(order) == len(model.shape.heads) - model.shape.n_layers
        True
    """
    order = [head for head, _ in scores.bottom(scores.mean.size)]
    return _kept(order, keep)


@checked
def random_order(model: HeadModel, seed: int) -> HeadOrder:
    """Random order of all heads: the control for every other order.

    Args:
        model: model whose heads are ordered.
        seed: seed for the order.

    Returns:
        All heads in random order.

    Example:
        >>> sorted(hs.pruning.random_order(model, seed=0)) == list(model.shape.heads)
        True
    """
    heads = model.shape.heads
    return tuple(heads[i] for i in np.random.default_rng(seed).permutation(len(heads)))


@checked
def iterative(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    *,
    step: float = 0.1,
    count: int | None = None,
    keep: int = 0,
    importance: Importance = gradient_importance,
    progress: bool | None = None,
) -> HeadOrder:
    """Order heads iteratively: remove the least important ones, then score the rest again.

    Args:
        model: from :func:`headscope.load`.
        probe: what importance is measured on.
        metric: metric that defines importance.
        step: share of all heads to remove between two scorings (Michel et al. 2019 use .05 or .1);
            at least one head.
        count: total number of heads to remove; default: all except those that are kept.
        keep: number of best heads of each layer by the first scoring that are never removed.
        importance: scores the remaining heads.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Heads in the order in which they are removed.

    Raises:
        InputError: if ``step`` is not a share, or too few heads have an importance.

    Example:
        >>> len(hs.pruning.iterative(model, probe, step=0.25, count=4))
        4
    """
    if not 0 < step <= 1:
        raise InputError(f"step={step}: give a share of all heads, above 0 and at most 1.")
    size = max(1, round(step * len(model.shape.heads)))
    gone: HeadOrder = ()
    may_go: HeadOrder | None = None
    wanted = 1
    with track(float(len(model.shape.heads)), "pruning in steps", show=progress) as advance:
        while len(gone) < wanted:
            order = one_shot(importance(model, probe, metric, removed=gone))
            if may_go is None:
                may_go = _kept(list(order), keep)
                wanted = _wanted(count, len(may_go))
            nearest = [head for head in order if head in may_go]
            if not nearest:
                raise InputError(
                    f"after {len(gone)} heads the importance has no value for any other that may "
                    f"go: ask for count={len(gone)}, or for another importance."
                )
            gone = (*gone, *nearest[: min(size, wanted - len(gone))])
            advance(float(size))
    return gone


@checked
def greedy(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    method: InterventionLike = "zero",
    *,
    count: int | None = None,
    keep: int = 0,
    better: Direction | None = None,
    reference: Probe | None = None,
    batch_size: int | None = None,
    checkpoint: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> HeadOrder:
    """Order heads greedily: at every step remove the head that hurts the metric least, by ablation.

    All candidates of a step are measured together with the heads already removed, by suffix replay.
    That takes ``n + (n-1) + ...`` ablations for all n heads.

    Args:
        model: from :func:`headscope.load`.
        probe: what the metric is measured on.
        metric: metric to preserve.
        method: as in :func:`headscope.ablate_heads`; ``zero`` is equivalent to pruning.
        count: number of heads to remove; default: all that may be.
        keep: minimum number of heads that stay in each layer.
        better: ``higher`` or ``lower``; needed for a metric without a direction.
        reference: where replacement values come from.
        batch_size: examples per recorded pass.
        checkpoint: JSON file that stores the order head by head, from which the same call (or one
            for more heads) resumes after an interruption; default: none.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument does not fit, or the checkpoint belongs to another order.

    Example:
        >>> len(hs.pruning.greedy(model, probe, count=2))
        2
    """
    options = RunOptions(batch_size, progress=progress)
    measurement = Measurement.of(model, probe, metric, options.quiet)
    placer = Placer(measurement, method, reference=reference)
    sign = cost_sign(measurement.metric, better)
    left = Counter(head.layer for head in model.shape.heads)
    heads = model.shape.heads
    wanted = _wanted(count, sum(max(0, number - keep) for number in left.values()))
    kept = None
    if checkpoint is not None:
        facts = measurement.provenance(
            **facts_of(method, reference, None), keep=keep, better=better
        )
        kept = KeptOrder(Path(checkpoint), _deciding(facts, probe, reference))
    gone: HeadOrder = () if kept is None else kept.read()[:wanted]
    left.subtract(head.layer for head in gone)
    total = float(sum(len(heads) - i for i in range(len(gone), wanted)))
    with options.track(total, "greedy pruning") as advance:
        while len(gone) < wanted:
            candidates = [h for h in heads if h not in gone and left[h.layer] > keep]
            effects, _ = joint(measurement, placer, [(*gone, head) for head in candidates])
            cost = sign * np.nanmean(effects, axis=1)
            best = candidates[int(np.argmin(cost))]
            gone = (*gone, best)
            left[best.layer] -= 1
            if kept is not None:
                kept.write(gone)
            advance(float(len(candidates)))
    return gone


def _deciding(facts: Provenance, probe: Probe, reference: Probe | None) -> dict[str, Any]:
    """Facts that determine an order: weights, data, metric and method."""
    data = probe_digest(probe, reference)
    return {"weights": facts.weight_digest, "dtype": facts.dtype, "data": data, **facts.probe}


def _kept(order: list[HeadIndex], keep: int) -> HeadOrder:
    """The order without the last ``keep`` heads of each layer."""
    if keep < 0:
        raise InputError(f"keep={keep}: give 0 or more.")
    seen: Counter[int] = Counter()
    stays = set()
    for head in reversed(order):
        if seen[head.layer] < keep:
            stays.add(head)
        seen[head.layer] += 1
    return tuple(head for head in order if head not in stays)


def _wanted(count: int | None, most: int) -> int:
    if count is not None and not 1 <= count <= most:
        raise InputError(f"count={count}: 1 to {most} heads can go.")
    return most if count is None else count


_POINTS = 21
_SIZES = ("parameters", "flops", "seconds")


@dataclass(frozen=True, eq=False, repr=False)
class PruningCurve(OrderCurve):
    """A metric against the number of removed heads.

    Attributes:
        effects: edited minus clean run; axes ``arm`` and ``removed``; NaN beyond the end of an
            order.
        orders: heads of every arm, in the order of removal.
        controls: names of the arms in random order.
        sizes: cost of the model at every measured point, by arm and number of heads.
    """

    sizes: Mapping[tuple[str, int], Size] = field(default_factory=dict)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per arm and number of heads.

        Columns: those of :class:`headscope.table.OrderCurve`, then parameters, flops, seconds (NaN
        if not measured).
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


@checked
def pruning_curve(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    orders: Mapping[str, Heads] | None = None,
    *,
    counts: Sequence[int] | None = None,
    random: int = 5,
    method: InterventionLike = "zero",
    sizes: bool = False,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> PruningCurve:
    """Measure a metric as heads are removed, along given orders and random ones.

    Heads are ablated, which has the same effect on the metric as pruning; sets that several arms
    share are measured once.

    Args:
        model: from :func:`headscope.load`.
        probe: what the metric is measured on: not the one that the orders were found on.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        orders: orders of heads by name of the arm, first to last.
        counts: numbers of heads to measure at; default: all, or 21 evenly spaced.
        random: number of random orders as controls, seeded from ``seed`` on.
        method: as in :func:`headscope.ablate_heads`; ``zero`` is equivalent to pruning.
        sizes: also prune at every point of the arms that are not controls, and measure parameters,
            FLOPs and time of each model.
        reference: where replacement values come from.
        seed: seed of the random orders, and of the method's draws.
        batch_size: examples per recorded pass.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument does not fit.
        UnsupportedModelError: if sizes are requested and the family cannot be pruned.

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
        prune(model, model.shape.heads[0])  # refuse before anything is run
    arms = {name: present(model, heads) for name, heads in (orders or {}).items()}
    controls = {f"random {seed + i}": random_order(model, seed + i) for i in range(random)}
    if (not arms and not controls) or arms.keys() & controls.keys():
        raise InputError("give at least one order, or random=1 or more, each with its own name.")
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
        spec=effect_spec(
            "pruning", measurement.metric, "without the heads minus that of the whole model."
        ),
        axes=("arm", "removed"),
        labels=(tuple(everything), tuple(map(str, points))),
        per_example=effects,
        unedited=clean,
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
    """Prune and measure, one model at a time."""
    real = None if bool(probe.real.all()) else probe.real
    by_set: dict[tuple[HeadIndex, ...], Size] = {}
    with options.track(float(len(wanted)), "measuring pruned models") as advance:
        for heads in wanted.values():
            if heads not in by_set:
                by_set[heads] = measure_size(prune(model, heads), probe.tokens, real)
            advance(1.0)
    return {at: by_set[heads] for at, heads in wanted.items()}
