"""Per-head parameters learned on a frozen model: hard-concrete L0 gates, and entmax alphas.

Gates show which heads a model can do without.

After Voita et al. 2019. Every head's output is multiplied by a gate: a random number that is
exactly 0 or 1 with some probability and differentiable in its parameter ``log_alpha`` (Louizos et
al. 2018, arXiv 1712.01312, section 2.2): with u uniform on (0, 1),

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta),  gate = clip(1.2 s - 0.1, 0, 1).

Training lowers ``cost + penalty * sum over heads of P(gate > 0)``; only the gates learn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope import metrics
from headscope.ablation.heads import total_metric, whole_batches
from headscope.ablation.run import Measurement, Metricish
from headscope.base.arguments import checked
from headscope.base.checkpoints import AdamRun, Checkpoint, CheckpointPath
from headscope.base.options import RunOptions
from headscope.base.result import Listed
from headscope.base.specs import Direction
from headscope.edits import HeadSite, entmax
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import cost_sign
from headscope.models.bridge.model import BridgeModel
from headscope.models.hf.model import HFModel
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes.probe import Probe, probe_digest
from headscope.table import HeadScores

# Temperature and stretched interval of Voita et al.; Louizos et al. use 2/3.
BETA, LOW, HIGH = 0.33, -0.1, 1.1
_EDGE = 1e-6
# Range of learned alphas: nearly softmax to sparsemax.
_SOFTEST, _HARDEST = 1.01, 2.0


def sample_gates(
    log_alpha: Float[Tensor, "layer head"], uniform: Float[Tensor, "layer head"]
) -> Float[Tensor, "layer head"]:
    """Sample gates from uniform random numbers, as in training."""
    noise = uniform.clamp(_EDGE, 1 - _EDGE)
    s = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def settled_gates(log_alpha: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
    """Gates without noise, as in evaluation: ``clip(1.2 sigmoid(log_alpha) - 0.1, 0, 1)``."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def chance_open(log_alpha: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
    """``P(gate > 0) = sigmoid(log_alpha - beta log(0.1 / 1.1))``."""
    return torch.sigmoid(log_alpha - BETA * float(np.log(-LOW / HIGH)))


@dataclass(frozen=True, eq=False, repr=False)
class LearnedGates(Listed):
    """Trained gates, and the heads that they keep and remove.

    Attributes:
        scores: noise-free gate of every head, from 0 (removed) to 1; in the mean.
        log_alpha: parameter of every gate; orders heads with equal gates.
        kept, removed: heads whose noise-free gate is above 0, and the others, smallest first.
        costs: cost at every step, with sampled gates: the metric, negated if higher is better.
        open_heads: expected number of open gates before every step.
    """

    scores: HeadScores
    log_alpha: Float[np.ndarray, "layer head"]
    kept: tuple[HeadIndex, ...]
    removed: tuple[HeadIndex, ...]
    costs: Float[np.ndarray, " step"]
    open_heads: Float[np.ndarray, " step"]

    @property
    def order(self) -> tuple[HeadIndex, ...]:
        """All heads, the most closed gate first, as an order of pruning."""
        return _by_alpha(self.log_alpha, (*self.kept, *self.removed))

    def __str__(self) -> str:
        """Numbers of heads kept and removed."""
        return f"{len(self.kept)} heads kept, {len(self.removed)} removed"


@dataclass(frozen=True, eq=False)
class GatedHeads:
    """Edit that multiplies head outputs by one gate per head."""

    gates: Float[Tensor, "layer head"]
    layers: frozenset[int]
    site: HeadSite = field(default="z", init=False)

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the head outputs of a layer times its gates."""
        return value * self.gates[layer].to(value)[:, None]


@checked
@own_types()
def learn_gates(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    *,
    penalty: float = 0.1,
    steps: int = 150,
    rate: float = 0.1,
    start: float = 2.0,
    better: Direction | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    folder: CheckpointPath = None,
    every: int = 20,
    progress: bool | None = None,
) -> LearnedGates:
    """Train one gate per head on a frozen model, so that dispensable heads close.

    Adam trains only the gates; the model's weights are frozen. Gates are sampled once per step.
    Source: Voita et al. 2019 (arXiv 1905.09418), section 6 (``L0`` penalty and constants, beta
    .33), with the gates of Louizos et al. 2018 (beta 2/3). A model trained along with its gates
    would lose more heads.

    Args:
        model: from :func:`headscope.load`.
        probe: what to train on; evaluate on another one.
        metric: metric to preserve; must be differentiable.
        penalty: cost of one open head, in the metric's unit; a larger penalty closes more.
        steps: training steps, one batch of the probe each.
        rate: learning rate of Adam.
        start: initial ``log_alpha``; 2: open with probability .94.
        better: ``higher`` or ``lower``; needed for a metric without a direction.
        seed: seed of the noise and of the order of batches.
        batch_size: examples per step; default: all that fit in one pass.
        folder: folder that stores the run every few steps: the same call resumes from there with
            identical results.
        every: steps between writes.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument is invalid, or the folder holds another run.
        HeadscopeError: if the cost becomes infinite or NaN.

    Example:
        >>> gates = hs.pruning.learn_gates(model, probe, steps=2)
        >>> len(gates.kept) + len(gates.removed) == len(model.shape.heads)
        True
    """
    if penalty < 0 or steps < 1 or rate <= 0:
        raise InputError(
            f"gates need penalty >= 0, steps >= 1 and rate > 0; got {penalty}, {steps}, {rate}."
        )
    options = RunOptions(batch_size, seed=seed, progress=progress)
    measurement = Measurement.of(model, probe, metric, options.quiet)
    sign = cost_sign(measurement.metric, better)
    generator = torch.Generator().manual_seed(seed)
    there = torch.zeros(model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    there[tuple(zip(*model.shape.heads, strict=True))] = True
    log_alpha = torch.full(there.shape, start, dtype=torch.float32, requires_grad=True)
    layers = frozenset(model.shape.attention_layers)
    batches = [batch for _, batch in whole_batches(measurement)]
    kept = _checkpoint(
        folder, "gates", measurement, len(batches), seed,
        penalty=penalty, rate=rate, start=start, sign=sign,
    )  # fmt: skip
    other = {"turns": torch.arange(len(batches)), "open": torch.full((steps,), torch.nan)}
    run = AdamRun(kept, {"log_alpha": log_alpha}, rate, steps, every, generator, other)
    other["open"] = torch.nn.functional.pad(other["open"], (0, steps - len(other["open"])))
    with frozen(model), options.track(float(steps), "learning gates") as advance:
        advance(float(run.done))
        for step in run:
            if step % len(batches) == 0:
                other["turns"] = torch.randperm(len(batches), generator=generator)
            batch = batches[int(other["turns"][step % len(batches)])]
            noise = torch.rand(there.shape, generator=generator, dtype=torch.float32)
            with torch.enable_grad():
                gates = GatedHeads(sample_gates(log_alpha, noise).to(model.device), layers)
                cost = sign * total_metric(model, batch, (gates,)) / len(batch.probe)
                stay = chance_open(log_alpha)[there].sum()
                (cost + penalty * stay.to(cost)).backward()
            other["open"][step] = stay.detach()
            run.take(cost)
            advance(1.0)
    final = log_alpha.detach()
    values = np.where(there.numpy(), settled_gates(final).double().numpy(), np.nan)
    alpha = np.where(there.numpy(), final.double().numpy(), np.nan)
    heads = _by_alpha(alpha, model.shape.heads)
    scores = HeadScores.from_summary(
        "gate",
        values,
        kv_heads=model.shape.n_kv_heads,
        unit="gate",
        bounds=(0.0, 1.0),
        description="Learned gate on the head: 0 is closed, 1 open.",
        source="Voita et al. 2019, arXiv 1905.09418; Louizos et al. 2018, arXiv 1712.01312",
        provenance=measurement.provenance(
            seed, penalty=penalty, steps=steps, rate=rate, start=start
        ),
    )
    return LearnedGates(
        scores=scores,
        log_alpha=alpha,
        kept=tuple(head for head in heads if values[head] > 0),
        removed=tuple(head for head in heads if values[head] == 0),
        costs=run.losses.double().cpu().numpy(),
        open_heads=other["open"].double().numpy(),
    )


@checked
@own_types()
def learn_alphas(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    *,
    steps: int = 100,
    rate: float = 0.1,
    start: float = 1.25,
    better: Direction | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    folder: CheckpointPath = None,
    every: int = 20,
    progress: bool | None = None,
) -> HeadScores:
    """Train every head's entmax alpha on a frozen model: how sparse its attention should be.

    Attention of all heads is alpha-entmax of their scores (:func:`headscope.edits.entmax`), with
    ``alpha = 1.01 + 0.99 sigmoid(a)`` between softmax (1.01) and sparsemax (2); Adam trains only
    ``a``. A falling alpha means that the head needs its small weights, a rising one that they are
    noise, and one that stays at ``start`` that it does not matter. Source: Correia et al. 2019,
    "Adaptively Sparse Transformers" (arXiv 1909.00015), who train alphas along with the model.

    Args:
        model: from :func:`headscope.load`.
        probe: what to train on.
        metric: metric to optimise; must be differentiable.
        steps: training steps, one batch of the probe each.
        rate: learning rate of Adam.
        start: initial alpha of every head, between 1.01 and 2.
        better: ``higher`` or ``lower``; needed for a metric without a direction.
        seed: seed of the order of batches.
        batch_size: examples per step; default: all that fit in one pass.
        folder: folder that stores the run every few steps: the same call resumes from there with
            identical results.
        every: steps between writes.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        The score ``alpha``.

    Raises:
        InputError: if an argument is invalid, or the folder holds another run.
        HeadscopeError: if the cost becomes infinite or NaN.

    Example:
        >>> alphas = hs.pruning.learn_alphas(model, probe, steps=2)
        >>> bool(((alphas.mean > 1.01) & (alphas.mean < 2)).all())
        True
    """
    if steps < 1 or rate <= 0 or not _SOFTEST < start < _HARDEST:
        raise InputError(
            f"alphas need steps >= 1, rate > 0 and a start between {_SOFTEST} and {_HARDEST:g}; "
            f"got {steps}, {rate}, {start}."
        )
    options = RunOptions(batch_size, seed=seed, progress=progress)
    measurement = Measurement.of(model, probe, metric, options.quiet)
    sign = cost_sign(measurement.metric, better)
    generator = torch.Generator().manual_seed(seed)
    shape, width = model.shape, _HARDEST - _SOFTEST
    share = (start - _SOFTEST) / width
    first = float(np.log(share / (1 - share)))
    free = torch.full((shape.n_layers, shape.n_heads), first, requires_grad=True)
    batches = [batch for _, batch in whole_batches(measurement)]
    kept = _checkpoint(
        folder, "alphas", measurement, len(batches), seed, rate=rate, start=start, sign=sign
    )
    other = {"turns": torch.arange(len(batches))}
    run = AdamRun(kept, {"free": free}, rate, steps, every, generator, other)
    with frozen(model), options.track(float(steps), "learning alphas") as advance:
        advance(float(run.done))
        for step in run:
            if step % len(batches) == 0:
                other["turns"] = torch.randperm(len(batches), generator=generator)
            batch = batches[int(other["turns"][step % len(batches)])]
            with torch.enable_grad():
                alpha = _SOFTEST + width * torch.sigmoid(free)
                edit = entmax(shape.heads, alpha.to(model.device))
                cost = sign * total_metric(model, batch, (edit,)) / len(batch.probe)
                cost.backward()
            run.take(cost)
            advance(1.0)
    alpha = (_SOFTEST + width * torch.sigmoid(free.detach())).double()
    values = np.full(alpha.shape, np.nan)
    for head in shape.heads:
        values[head] = float(alpha[head])
    return HeadScores.from_summary(
        "alpha",
        values,
        kv_heads=shape.n_kv_heads,
        unit="alpha",
        bounds=(_SOFTEST, _HARDEST),
        description="Learned alpha of the head's entmax: 1 is the softmax, 2 the sparsemax.",
        source="Correia et al. 2019, arXiv 1909.00015",
        provenance=measurement.provenance(seed, steps=steps, rate=rate, start=start),
    )


def _checkpoint(
    folder: CheckpointPath,
    method: str,
    measurement: Measurement,
    batches: int,
    seed: int,
    **other: Any,
) -> Checkpoint:
    """Checkpoint of a run with the facts that determine it; the number of steps may grow."""
    if folder is None:
        return Checkpoint(None, {})
    facts = {
        "method": method, "weights": measurement.model.digest(),
        "probe": probe_digest(measurement.probe), "metric": measurement.metric.name,
        "batches": batches, "seed": seed, **other,
    }  # fmt: skip
    return Checkpoint(folder, facts)


@contextmanager
def frozen(model: HeadModel) -> Iterator[None]:
    """Context manager in which no weight of the model requires a gradient."""
    asking: list[torch.nn.Parameter] = []
    if isinstance(model, HFModel | BridgeModel):
        asking = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _by_alpha(
    alpha: Float[np.ndarray, "layer head"], heads: tuple[HeadIndex, ...]
) -> tuple[HeadIndex, ...]:
    return tuple(sorted(heads, key=lambda head: (float(alpha[head]), head)))
