"""Gates on heads, learned on a frozen model: which heads help, which hurt, which do neither.

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
_FAR = 4.0  # up to which logits are pressed; a gate of 0.98
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
    """Learn how far every head can be closed, and how far it can be opened.

    Every head has a gate ``g`` in (0, 1) that mixes what it writes with what it writes once it is
    taken out. The gates alone learn: first to make the metric good, then twice more from there,
    pressed open and pressed shut by ``strength`` times the mean of their logits (cut at 4). With
    ``plus`` and ``minus`` for the two outcomes:

    - *facilitating*: ``minus``, which stays open against the pressure;
    - *interfering*: ``1 - plus``, which stays shut;
    - *irrelevant*: ``plus * (1 - minus)``, which goes where it is pressed.

    It sees what heads do together, which taking them out singly does not: of two heads that do
    the same, one may close.

    Args:
        model: as in :func:`attribute`.
        probe: texts with answers.
        metric: with a direction, such as :data:`headscope.metrics.loss`.
        strength: of the pressure, in the metric's unit per unit of logit.
        steps: of Adam in each of the three fits, over all examples.
        ablation: what a closed head writes: ``zero`` as in the paper, ``patch`` or ``mean``.
        better: which direction of the metric is better, where it does not say.
        batch_size: examples per pass.
        folder: where the three fits are kept every few steps: the same call resumes
            from there to the same numbers.
        progress: show a bar.

    Returns:
        Three scores per head, from 0 to 1.

    Raises:
        InputError: if metric and probe do not fit, a number is out of range, or the folder holds
            another run.
        HeadscopeError: if the metric is no longer finite.

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
        "facilitating": (minus, "Stays open when all gates are pressed shut."),
        "interfering": (1 - plus, "Stays shut when all gates are pressed open."),
        "irrelevant": (plus * (1 - minus), "Goes where its gate is pressed."),
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
    """Learn which k heads the model does best with, all others taken out.

    Every head has a weight; in every step the k largest are open and the others shut, and the
    gradient passes to all weights as if gates were their sigmoids (straight through).

    Args:
        model: as in :func:`attribute`.
        probe: texts with answers.
        metric: with a direction.
        k: heads that stay.
        steps: of Adam, over all examples.
        ablation: what a head that is taken out writes, as in :func:`attribute`.
        better: which direction of the metric is better, where it does not say.
        batch_size: examples per pass.
        progress: show a bar.

    Returns:
        The sigmoid of every weight, 0 to 1; ``.top(k)`` are the heads that stay.

    Raises:
        InputError: if there are not as many heads, or metric and probe do not fit.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> scores = hs.edges.best_heads(model, names, hs.metrics.logit_difference, 3, steps=2)
        >>> len(scores.top(3))
        3
    """
    shape = model.shape
    if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= len(shape.heads):
        raise InputError(f"k={k!r}: there are 1 to {len(shape.heads)} heads to keep.")
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
        description=f"Weight of the head when {k} heads may stay, learned straight through.",
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
    """What is measured, and the sign that makes it a cost."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: gates learn in 1 step or more.")
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
    """Weights of gates after some steps of Adam."""
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
    """The metric with what heads write mixed with what they write once taken out."""
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
    """Replaces a share of what every head adds to the stream by what it adds once taken out."""

    def close(value: Tensor) -> Tensor:
        moved = off - heads_write(model, layer, z[layer])
        added = torch.einsum("h,bhpm->bpm", shut.to(moved), moved)
        return value + added.to(value)

    return close
