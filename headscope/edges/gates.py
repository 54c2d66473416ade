"""Learned gates on the heads of a frozen model: which heads help, hurt or do not matter.

Causal head gating after Nam et al. 2025, and the best k heads by straight-through gates.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.checkpoints import AdamRun, Checkpoint
from headscope.base.options import Advance, RunOptions
from headscope.base.specs import Direction
from headscope.edges.written import EdgeBatch, EdgeMeasurement, heads_write, run_apart
from headscope.errors import InputError
from headscope.metrics import AnyMetric, cost_sign
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.origin import origin
from headscope.probes.probe import Probe, probe_digest
from headscope.table import HeadScores, HeadTable

_RATE = 0.2
_START = 2.0  # a gate of 0.88
_FAR = 4.0  # logits are pushed up to here, a gate of 0.98
_SOURCE = "Nam et al. 2025, arXiv 2505.13737"


@checked
@own_types()
def causal_gates(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    *,
    strength: float = 0.02,
    steps: int = 60,
    ablation: str = "zero",
    better: Direction | None = None,
    batch_size: int | None = None,
    folder: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> HeadTable:
    """Learn a gate per head that separates helpful, harmful and irrelevant heads.

    Every head has a gate ``g`` in (0, 1) that mixes its write with its ablated write. Only the
    gates are trained: first to improve the metric, then twice more from that point, pushed open or
    pushed shut by ``strength`` times the mean of their logits (capped at 4). With ``plus`` and
    ``minus`` for the two outcomes:

    - *facilitating*: ``minus``, the gate stays open although pushed shut;
    - *interfering*: ``1 - plus``, the gate stays shut although pushed open;
    - *irrelevant*: ``plus * (1 - minus)``, the gate goes where it is pushed.

    Unlike ablating heads one at a time, this accounts for joint effects: of two redundant heads,
    one may close.

    Args:
        model: see :func:`attribute`.
        probe: texts with answers.
        metric: metric with a direction, e.g. :data:`headscope.metrics.loss`.
        strength: weight of the push, in the metric's unit per unit of logit.
        steps: Adam steps in each of the three fits, each over all examples.
        ablation: what a closed head writes: ``zero`` as in the paper, ``patch`` or ``mean``.
        better: which direction of the metric is better, if the metric does not declare it.
        batch_size: examples per pass.
        folder: checkpoint folder for the three fits; the same call resumes from it and gives the
            same numbers.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A table with three scores per head, each from 0 to 1.

    Raises:
        InputError: if metric and probe do not fit, a number is out of range, or the folder holds
            another run.
        HeadscopeError: if the metric becomes NaN or infinite.

    Source:
        Nam et al. 2025, "Causal head gating", arXiv 2505.13737.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> gates = hs.edges.causal_gates(model, names, hs.metrics.loss, steps=2)
        >>> sorted(gates)
        ['facilitating', 'interfering', 'irrelevant']
    """
    if not strength > 0:
        raise InputError(f"strength={strength!r}: give a number above 0.")
    options = RunOptions(batch_size, progress=progress)
    study, sign = _gated_study(model, probe, metric, ablation, steps, better, options)
    shape = model.shape
    start = torch.full((shape.n_layers, shape.n_heads), _START)
    batches = list(study.batches())
    facts = {} if folder is None else {
        "method": "causal gates", "weights": model.digest(), "probe": probe_digest(probe),
        "metric": study.metric.name, "sign": sign, "ablation": study.ablation,
        "strength": strength, "steps": steps, "batches": len(batches),
    }  # fmt: skip

    def checkpoint(name: str) -> Checkpoint:
        return Checkpoint(None if folder is None else Path(folder) / name, {**facts, "fit": name})

    kept = {name: checkpoint(name) for name in ("free", "open", "shut")}
    with options.track(3.0 * steps, "gates") as advance:

        def fit(name: str, begin: Tensor, pressure: float) -> Tensor:
            return _fitted(
                batches, begin, sign, pressure, steps, torch.sigmoid, advance, kept[name]
            )

        free = fit("free", start, 0.0)
        plus = torch.sigmoid(fit("open", free, strength))
        minus = torch.sigmoid(fit("shut", free, -strength))
    return _table(study, plus.double().numpy(), minus.double().numpy())


def _table(
    study: EdgeMeasurement,
    plus: Float[np.ndarray, "layer head"],
    minus: Float[np.ndarray, "layer head"],
) -> HeadTable:
    about = origin(
        study.model, study.probe, attention="whole passes", metric=study.metric.name,
        method="causal head gating", ablation=study.ablation,
    )  # fmt: skip
    said = {
        "facilitating": (minus, "Its gate stays open when all gates are pushed shut."),
        "interfering": (1 - plus, "Its gate stays shut when all gates are pushed open."),
        "irrelevant": (plus * (1 - minus), "Its gate goes where it is pushed."),
    }
    kv_heads = study.model.shape.n_kv_heads
    return HeadTable(
        [
            HeadScores.from_summary(
                name, values, kv_heads=kv_heads, unit="share", bounds=(0.0, 1.0),
                description=words, source=_SOURCE, provenance=about,
            )
            for name, (values, words) in said.items()
        ]
    )  # fmt: skip


@checked
@own_types()
def best_heads(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    k: int,
    *,
    steps: int = 60,
    ablation: str | None = None,
    better: Direction | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Learn which k heads give the best metric when all others are ablated.

    Every head has a weight. In each step the k heads with the largest weights are open and the
    others shut; gradients flow to all weights as if gates were their sigmoids (straight-through
    estimator).

    Args:
        model: see :func:`attribute`.
        probe: texts with answers.
        metric: metric with a direction.
        k: number of heads to keep.
        steps: Adam steps, each over all examples.
        ablation: what an ablated head writes; see :func:`attribute`.
        better: which direction of the metric is better, if the metric does not declare it.
        batch_size: examples per pass.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        The sigmoid of every weight, from 0 to 1; ``.top(k)`` gives the chosen heads.

    Raises:
        InputError: if the model has fewer than k heads, or metric and probe do not fit.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> scores = hs.edges.best_heads(model, names, hs.metrics.logit_difference, 3, steps=2)
        >>> len(scores.top(3))
        3
    """
    shape = model.shape
    if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= len(shape.heads):
        raise InputError(f"k={k!r}: give 1 to {len(shape.heads)} heads to keep.")
    options = RunOptions(batch_size, progress=progress)
    study, sign = _gated_study(model, probe, metric, ablation, steps, better, options)
    batches = list(study.batches())

    def gate(weights: Tensor) -> Tensor:
        open_ = torch.zeros(weights.numel())
        open_[weights.detach().flatten().argsort(descending=True, stable=True)[:k]] = 1.0
        soft = torch.sigmoid(weights)
        return open_.view_as(weights) + soft - soft.detach()

    with options.track(float(steps), "best heads") as advance:
        start = torch.zeros(shape.n_layers, shape.n_heads)
        weights = _fitted(batches, start, sign, 0.0, steps, gate, advance, Checkpoint(None, {}))
    return HeadScores.from_summary(
        "best_heads", torch.sigmoid(weights).double().numpy(), kv_heads=shape.n_kv_heads,
        unit="share", bounds=(0.0, 1.0),
        description=f"Learned weight of the head when {k} heads are kept (straight-through gates).",
        provenance=origin(
            model, probe, attention="whole passes", metric=study.metric.name,
            method="top-k gates", ablation=study.ablation, k=k, steps=steps,
        ),
    )  # fmt: skip


def _gated_study(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    ablation: str | None,
    steps: int,
    better: Direction | None,
    options: RunOptions,
) -> tuple[EdgeMeasurement, int]:
    """The measurement, and the sign that turns its metric into a cost."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: give 1 or more.")
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    return study, cost_sign(study.metric, better)


def _fitted(
    batches: Sequence[EdgeBatch],
    start: Float[Tensor, "layer head"],
    sign: int,
    pressure: float,
    steps: int,
    gate: Callable[[Tensor], Tensor],
    advance: Advance,
    kept: Checkpoint,
) -> Float[Tensor, "layer head"]:
    """Gate weights after some steps of Adam."""
    weights = start.clone().requires_grad_()
    run = AdamRun(kept, {"weights": weights}, _RATE, steps)
    examples = sum(int(batch.measured.counted.sum()) for batch in batches)
    advance(float(run.done))
    for _ in run:
        total = torch.zeros(())
        for batch in batches:
            with torch.enable_grad():
                cost = sign * _gated_value(batch, gate(weights)).sum() / examples
            (slope,) = torch.autograd.grad(cost, weights)
            total += cost.detach()
            weights.grad = slope if weights.grad is None else weights.grad + slope
        with torch.enable_grad():
            pull = -pressure * weights.clamp(-_FAR, _FAR).sum()
        (slope,) = torch.autograd.grad(pull, weights)
        assert weights.grad is not None  # noqa: S101  # there is a batch
        weights.grad += slope
        run.take(total)
        advance(1.0)
    return weights.detach()


def _gated_value(batch: EdgeBatch, gates: Float[Tensor, "layer head"]) -> Float[Tensor, " batch"]:
    """Metric with each head's write mixed with its ablated write."""
    study = batch.study
    corrupt = batch.change + batch.clean.sources
    z: dict[int, Tensor] = {}
    changes: dict[Tap, Callable[[Tensor], Tensor]] = {}
    for layer in range(study.wiring.n_layers):
        changes[Tap("z", layer)] = _keeper(z, layer)
        off = corrupt[:, study.wiring.heads_of(layer)]
        changes[Tap("attn_out", layer)] = _closer(study.model, layer, 1 - gates[layer], off, z)
    run = run_apart(
        study.model, batch.texts, logits_at=batch.measured.at, grad=True, changes=changes
    )
    assert run.logits is not None  # noqa: S101  # they were asked for
    return batch.measured(run.logits)[0][batch.measured.counted.to(run.logits.device)]


def _keeper(z: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    def keep(value: Tensor) -> Tensor:
        z[layer] = value
        return value

    return keep


def _closer(
    model: HeadModel,
    layer: int,
    shut: Float[Tensor, " head"],
    off: Float[Tensor, "batch head pos d_model"],
    z: dict[int, Tensor],
) -> Callable[[Tensor], Tensor]:
    """Edit that replaces a share of every head's write by its ablated write."""

    def close(value: Tensor) -> Tensor:
        moved = off - heads_write(model, layer, z[layer])
        added = torch.einsum("h,bhpm->bpm", shut.to(moved), moved)
        return value + added.to(value)

    return close
