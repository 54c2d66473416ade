"""Training with interventions on heads: masking, injected patterns, mixtures, noisy gates.

:func:`head_mask` trains a copy with some heads masked, :func:`inject_patterns` with some heads
attending along given relations. On a frozen model, :func:`mixture` learns how responsible each head
is, and :func:`variational_gates` how much noise it tolerates. :func:`gini` and :func:`lorenz`
measure how unequal heads are. Runs with a folder can be resumed, with bit-identical results.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture, metrics
from headscope.ablation.run import Metricish, present
from headscope.base.arguments import checked
from headscope.base.checkpoints import AdamRun, Checkpoint, CheckpointPath
from headscope.base.options import RunOptions, track
from headscope.base.result import Glance, Shown, number
from headscope.base.specs import Direction, Provenance
from headscope.edits import Heads, HeadSite, Span, zero
from headscope.errors import (
    InputError,
    UnsupportedModelError,
    nearest,
    positive,
    whole,
)
from headscope.heads import HeadIndex, ModelShape
from headscope.metrics import AnyMetric, as_metric, cost_sign
from headscope.models.hf.model import HFModel
from headscope.models.loading import load
from headscope.models.protocol import Edit, HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView, Write, writes_of
from headscope.origin import origin
from headscope.probes.probe import Probe, pairs_of_examples, probe_digest
from headscope.pruning.gates import GatedHeads, frozen
from headscope.pruning.orders import gradient_importance
from headscope.scorers.relation import PairsLike, PairsOf, as_triples, check_triples
from headscope.table import HeadScores, HeadTable

_HEAD_MASK = "Sun et al. 2020 (arXiv 2009.09672), HeadMask"
_INJECTED = "Xiao et al. 2021 (arXiv 2112.05364), injected attention patterns"
_MIXTURE = "Peng et al. 2020 (arXiv 2005.06537), a mixture of h - 1 heads is better than h heads"
_VARIATIONAL = "VTrans (arXiv 2406.05276), variational information bottleneck on heads"


@checked
def gini(values: "HeadScores | Float[np.ndarray, ' *any']") -> float:
    """Gini coefficient of non-negative numbers: 0 if all are equal.

    ``sum over i of (2 i - n - 1) x_i / (n sum x)`` with the n values in ascending order: 0 if all
    are equal, ``1 - 1/n`` if one value holds the total. NaN if all are 0.

    Args:
        values: a score, whose means are used, or numbers; NaN is left out.

    Raises:
        InputError: if a value is negative, or there are no values.

    Source: Gini 1912; used for importance of heads by Sun et al. 2020 (arXiv 2009.09672).

    Example:
        >>> round(hs.training.gini(np.array([0.0, 0.0, 1.0])), 3)
        0.667
    """
    ordered = _ordered(values)
    n, total = len(ordered), float(ordered.sum())
    if total == 0:
        return float("nan")
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * total))


@checked
def lorenz(values: "HeadScores | Float[np.ndarray, ' *any']") -> Float[np.ndarray, " point"]:
    """Lorenz curve: share of the total held by the smallest values.

    Entry k is the share of the total held by the k smallest of n values, from 0 to 1 for k from 0
    to n; a straight line if all are equal. The Gini coefficient is twice the area between that line
    and the curve.

    Args:
        values: see :func:`gini`.

    Raises:
        InputError: if a value is negative, or there are no values.

    Example:
        >>> hs.training.lorenz(np.array([3.0, 1.0])).tolist()
        [0.0, 0.25, 1.0]
    """
    ordered = _ordered(values)
    total = float(ordered.sum())
    shares = np.cumsum(ordered) / total if total else np.full(len(ordered), np.nan)
    return np.concatenate([[0.0], shares])


def _ordered(values: "HeadScores | Float[np.ndarray, ' *any']") -> Float[np.ndarray, " value"]:
    numbers = values.mean if isinstance(values, HeadScores) else np.asarray(values, dtype=float)
    flat = np.sort(numbers[~np.isnan(numbers)].ravel())
    if not len(flat) or flat[0] < 0:
        what = "no values" if not len(flat) else f"{flat[0]:g} among the values"
        raise InputError(f"{what}: give numbers of at least 0, such as importances.")
    return flat


@dataclass(frozen=True, eq=False, repr=False)
class Trained(Shown):
    """A trained copy of a model, with a comparison to the original.

    Attributes:
        model: trained copy; the original model is unchanged.
        losses: cost of every step, with the masks or patterns applied in it.
        metrics: metric of the full model ``before`` and ``after`` training, and for injected
            patterns also ``injected`` and ``after, injected``.
        metric: name and unit of the metric.
        before: gradient importance of heads before training.
        after: gradient importance of heads in the copy.
        provenance: where the result came from.
    """

    model: HeadModel
    losses: tuple[float, ...]
    metrics: Mapping[str, float]
    metric: tuple[str, str]
    before: HeadScores
    after: HeadScores
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def inequality(self) -> tuple[float, float]:
        """Gini coefficient of the heads' importance before and after training."""
        return gini(self.before), gini(self.after)

    def glance(self) -> Glance:
        """Show the metric and the inequality of heads, before and after."""
        rows = [(name, number(value)) for name, value in self.metrics.items()]
        for when, value in zip(("before", "after"), self.inequality, strict=True):
            rows.append((f"Gini of importance, {when}", number(value)))
        return Glance(
            "trained copy",
            [f"{len(self.losses)} steps", self.provenance.model],
            ("", ", ".join(self.metric)),
            rows,
            hint="found.model, found.before, found.after, hs.training.lorenz(found.after)",
            whole=True,
        )

    def to_pandas(self) -> Any:
        """One row per head: importance before and after."""
        import pandas

        heads = np.argwhere(~np.isnan(self.before.mean))
        return pandas.DataFrame(
            {
                "layer": heads[:, 0],
                "head": heads[:, 1],
                "before": self.before.mean[tuple(heads.T)],
                "after": self.after.mean[tuple(heads.T)],
            }
        )


@dataclass(eq=False)
class _Task(ABC):
    """A training task: parameters by name, and the cost of some examples.

    Attributes:
        model: model to run; a copy if its weights are trained.
        metric: metric to optimise.
        sign: 1 where lower is better.
    """

    model: HeadModel
    metric: AnyMetric
    sign: int

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters."""

    @abstractmethod
    def cost(self, batch: Probe, number: Int[Tensor, " example"], draws: torch.Generator) -> Tensor:
        """Cost of a batch with these example numbers; randomness only from ``draws``."""

    def value(self, batch: Probe, writes: Mapping[Tap, Write]) -> Float[Tensor, ""]:
        """Mean metric of a batch as a cost, with gradients."""
        logits = self.model.run(batch, writes=writes, grad=True)
        assert logits is not None  # noqa: S101  # nothing stops the pass
        return self.sign * self.metric(logits, batch).mean()


@dataclass(frozen=True)
class _Schedule:
    """Training schedule: steps, rate, batches and checkpoints."""

    steps: int
    rate: float
    batch_size: int
    seed: int
    every: int
    progress: bool | None

    @classmethod
    def of(
        cls, probe: Probe, steps: int, rate: float, batch_size: int | None, seed: int, every: int,
        progress: bool | None,
    ) -> "_Schedule":  # fmt: skip
        """Validate the numbers."""
        RunOptions(batch_size, seed=seed, progress=progress)
        size = min(len(probe), 8 if batch_size is None else batch_size)
        return cls(
            whole(steps, "steps", 1), positive(rate, "rate"), size, seed, whole(every, "every", 1),
            progress,
        )  # fmt: skip


def _train(
    task: _Task, probe: Probe, plan: _Schedule, kept: Checkpoint, said: str
) -> tuple[float, ...]:
    """Train with Adam from the last checkpoint on, writing checkpoints.

    Raises:
        HeadscopeError: if the cost becomes NaN or infinite; the last checkpoint is kept.
    """
    leaves = task.parameters
    draws = torch.Generator().manual_seed(plan.seed)
    other = {"order": torch.arange(len(probe))}
    run = AdamRun(kept, leaves, plan.rate, plan.steps, plan.every, draws, other)
    per_epoch = -(-len(probe) // plan.batch_size)
    with track(plan.steps, said, show=plan.progress) as advance:
        advance(run.done)
        for step in run:
            if step % per_epoch == 0:
                other["order"] = torch.randperm(len(probe), generator=draws)
            at = step % per_epoch * plan.batch_size
            some = other["order"][at : at + plan.batch_size]
            batch = probe.examples(some).to(task.model.device)
            with torch.enable_grad():
                cost = task.cost(batch, some, draws)
                slopes = torch.autograd.grad(cost, list(leaves.values()), allow_unused=True)
            for one, slope in zip(leaves.values(), slopes, strict=True):
                one.grad = slope
            run.take(cost)
            advance(1)
    return tuple(run.losses.tolist())


@checked
def masked_heads(
    heads: Sequence[HeadIndex],
    count: int,
    draws: torch.Generator,
    slopes: Float[Tensor, "layer head"] | None = None,
) -> tuple[HeadIndex, ...]:
    """Heads to mask in a batch: random without replacement, or those with the largest gradients.

    Args:
        heads: heads to choose from.
        count: number of heads to mask.
        draws: generator for the random choice.
        slopes: derivative of the batch's loss with respect to a gate on each head; None: choose at
            random. On ties, the first head is taken.

    Example:
        >>> heads = model.shape.heads
        >>> drawn = hs.training.masked_heads(heads, 2, torch.Generator().manual_seed(0))
        >>> len(set(drawn))
        2
    """
    if slopes is None:
        order = torch.randperm(len(heads), generator=draws)
    else:
        sizes = slopes.abs().cpu()[tuple(np.transpose(heads))]
        order = sizes.argsort(descending=True, stable=True)
    return tuple(heads[at] for at in sorted(order[:count].tolist()))


@dataclass(eq=False)
class _Masking(_Task):
    """Task that trains weights while some heads are masked."""

    count: int
    by: str
    heads: tuple[HeadIndex, ...]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return _weights(self.model)

    def cost(self, batch: Probe, number: Tensor, draws: torch.Generator) -> Tensor:
        if not self.count:
            return self.value(batch, {})
        slopes = self._slopes(batch) if self.by == "importance" else None
        return self.value(
            batch, writes_of([zero(masked_heads(self.heads, self.count, draws, slopes))])
        )

    def _slopes(self, batch: Probe) -> Float[Tensor, "layer head"]:
        shape = self.model.shape
        gates = torch.ones(shape.n_layers, shape.n_heads, device=batch.tokens.device)
        gates.requires_grad_()
        cost = self.value(batch, writes_of([GatedHeads(gates, frozenset(shape.attention_layers))]))
        (slope,) = torch.autograd.grad(cost, [gates])
        return slope


@checked
@own_types()
def head_mask(
    model: HeadModel,
    probe: Probe,
    count: int,
    *,
    by: str = "random",
    heads: Heads | None = None,
    metric: Metricish = metrics.loss,
    test: Probe | None = None,
    better: Direction | None = None,
    steps: int = 100,
    rate: float = 1e-4,
    batch_size: int | None = None,
    seed: int = 0,
    folder: CheckpointPath = None,
    every: int = 20,
    progress: bool | None = None,
) -> Trained:
    """Train a copy of a model with heads masked in every batch, so that heads share the work.

    Masked heads output 0 and pass no gradient. After training all heads are active, without
    rescaling. ``random`` draws the masked heads for every batch; ``importance`` masks those with
    the largest ``|d loss / d gate|`` on the batch, which costs one more forward and backward pass.
    Adam trains all weights, without dropout.

    Args:
        model: model with a single text stack, from :func:`headscope.load`; it is not changed.
        probe: training examples with targets, e.g. from :func:`headscope.probes.text`.
        count: number of heads masked per batch; 0 is plain fine-tuning.
        by: ``random`` or ``importance``.
        heads: heads that may be masked. Default: all.
        metric: metric to optimise.
        test: examples for measuring metric and importance. Default: the training probe.
        better: which direction of the metric is better, if the metric does not declare it.
        steps: number of Adam steps, one batch each.
        rate: learning rate of Adam.
        batch_size: examples per step. Default: 8.
        seed: seed for the order of examples and the masks.
        folder: checkpoint folder; the same call resumes from it.
        every: steps between two checkpoints.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument does not fit the model or is out of range, or the folder holds
            another run.
        UnsupportedModelError: if the model is not a transformers model with a single stack.
        HeadscopeError: if the cost becomes NaN or infinite.

    Source: Sun et al. 2020 (arXiv 2009.09672), HeadMask, from the paper.

    Example:
        >>> found = hs.training.head_mask(model, probe, 2, steps=2)
        >>> sorted(found.metrics)
        ['after', 'before']
    """
    if by not in ("random", "importance"):
        raise InputError(nearest(str(by), ("random", "importance"), kind="way of masking"))
    chosen = present(model, heads)
    if whole(count, "count", 0) >= len(chosen):
        raise InputError(f"count={count}: {len(chosen)} heads can be masked, and one must be left.")
    plan = _Schedule.of(probe, steps, rate, batch_size, seed, every, progress)
    measured, sign = _measured(model, metric, better, probe, test)
    kept = _checkpoint(
        folder, "head mask", model, probe, plan,
        metric=measured.name, count=count, by=by, heads=list(map(str, chosen)),
    )  # fmt: skip
    copied = _copy(model)
    task = _Masking(copied, measured, sign, count, by, chosen)
    losses = _train(task, probe, plan, kept, "training with masked heads")
    return _trained(
        model, copied, losses, measured, probe if test is None else test,
        {}, batch_size, origin(model, probe, method=_HEAD_MASK, count=count, by=by, steps=steps),
    )  # fmt: skip


RelationUse = Literal["mask", "synthesize"]
Relations = Mapping[Any, "PairsOf | PairsLike"]


@dataclass(frozen=True, eq=False)
class Injected:
    """Edit of patterns: some heads attend along a relation, keeping or flattening their weights.

    ``mask``: scores of keys outside the relation become -inf, so attention is renormalised over the
    relation's keys; ``synthesize``: attention is uniform over them. A query without such a key
    keeps its attention.

    Attributes:
        keys: keys of every query, by head, ``[batch query key]``.
        mode: ``mask`` or ``synthesize``.
    """

    keys: Mapping[HeadIndex, Bool[Tensor, "batch query key"]]
    mode: str = "mask"
    site: HeadSite = field(default="pattern", init=False)

    @property
    def layers(self) -> frozenset[int]:
        """Layers that the edit applies to."""
        return frozenset(head.layer for head in self.keys)

    def __call__(
        self, layer: int, value: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return rows with those of the edited heads replaced; the input is not modified."""
        rows = list(value.unbind(1))
        for head, keys in self.keys.items():
            if head.layer == layer:
                seen = keys[:, : value.shape[2], : value.shape[3]].to(value.device)
                rows[head.head] = injected_rows(rows[head.head], seen, self.mode)
        return torch.stack(rows, 1)


@checked
def injected_rows(
    pattern: Float[Tensor, "batch query key"], keys: Bool[Tensor, "batch query key"], mode: str
) -> Float[Tensor, "batch query key"]:
    """Replace attention rows with a relation's; see :class:`Injected`.

    Args:
        pattern: attention rows, 0 for keys that are not visible.
        keys: keys of the relation; invisible ones are ignored.
        mode: ``mask`` or ``synthesize``.

    Example:
        >>> rows = torch.tensor([[[0.2, 0.3, 0.5]]])
        >>> keys = torch.tensor([[[True, True, False]]])
        >>> hs.training.injected_rows(rows, keys, "mask")
        tensor([[[0.4000, 0.6000, 0.0000]]])
    """
    inside = keys & (pattern > 0)
    even = inside.to(pattern)
    part = pattern * even if mode == "mask" else even
    total = part.sum(-1, keepdim=True)
    found: Tensor = torch.where(total > 0, part / total.where(total > 0, 1.0), pattern)
    return found


class _Given:
    """Relations of heads on a full probe, from which batches take their examples."""

    def __init__(self, model: HeadModel, probe: Probe, relations: Relations, mode: str) -> None:
        self._mode, self._size = mode, probe.length
        self._triples: dict[HeadIndex, Tensor] = {}
        for head, pairs in relations.items():
            (where,) = present(model, head)
            given = pairs(probe.host) if callable(pairs) else pairs
            name, size = f"the relation of {where}", (len(probe), probe.length)
            triples = as_triples(name, given, size)
            check_triples(name, triples, size)
            if not len(triples):
                raise InputError(f"{name} has no pair in any example: leave the head out.")
            self._triples[where] = triples.cpu()

    def edit(self, number: Int[Tensor, " example"]) -> Injected:
        """Edit for the examples with these numbers."""
        keys = {}
        for head, triples in self._triples.items():
            mask = torch.zeros(len(number), self._size, self._size, dtype=torch.bool)
            mask[tuple(pairs_of_examples(triples, number).T)] = True
            keys[head] = mask
        return Injected(keys, self._mode)

    def digest(self) -> list[list[Any]]:
        """Digest of the relations."""
        return [[str(head), len(one), int((one * torch.tensor([1, 31, 1009])).sum())]
                for head, one in self._triples.items()]  # fmt: skip


@dataclass(eq=False)
class _Injecting(_Task):
    """Task that trains weights while some heads attend along a relation."""

    given: _Given

    @property
    def parameters(self) -> dict[str, Tensor]:
        return _weights(self.model)

    def cost(self, batch: Probe, number: Tensor, draws: torch.Generator) -> Tensor:
        return self.value(batch, writes_of([self.given.edit(number)]))


@checked
@own_types()
def inject_patterns(
    model: HeadModel,
    probe: Probe,
    relations: Relations,
    *,
    mode: str = "mask",
    metric: Metricish = metrics.loss,
    better: Direction | None = None,
    steps: int = 100,
    rate: float = 1e-4,
    batch_size: int | None = None,
    seed: int = 0,
    folder: CheckpointPath = None,
    every: int = 20,
    progress: bool | None = None,
) -> Trained:
    """Train a copy of a model in which some heads attend along given relations.

    Relations are those of :func:`headscope.scorers.relation`, e.g. equal tokens, the previous token
    or the same sentence. ``metrics`` holds the metric of the trained copy with and without the
    patterns (``after, injected`` and ``after``), and that of the model before training.

    Args:
        model: model with a single text stack; it is not changed.
        probe: training examples with targets.
        relations: (query, key) pairs for each head: a function of the probe, or pairs for the full
            probe in any form that :func:`headscope.scorers.relation` takes.
        mode: ``mask``: renormalise attention over the relation's keys; ``synthesize``: make it
            uniform over them.
        metric: metric to optimise, also measured on the same probe.
        better: which direction of the metric is better, if the metric does not declare it.
        steps: number of Adam steps, one batch each.
        rate: learning rate of Adam.
        batch_size: examples per step. Default: 8.
        seed: seed for the order of examples.
        folder: checkpoint folder; the same call resumes from it.
        every: steps between two checkpoints.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument does not fit the model or is out of range, a relation is empty,
            or the folder holds another run.
        UnsupportedModelError: if the model is not a transformers model with a single stack.

    Source: Xiao et al. 2021 (arXiv 2112.05364), injected patterns.

    Example:
        >>> def before(probe):
        ...     at = torch.arange(probe.length)
        ...     return (at[:, None] - at == 1).expand(len(probe), -1, -1)
        >>> found = hs.training.inject_patterns(model, probe, {"L0H1": before}, steps=2)
        >>> sorted(found.metrics)
        ['after', 'after, injected', 'before', 'injected']
    """
    if mode not in get_args(RelationUse):
        raise InputError(nearest(str(mode), get_args(RelationUse), kind="mode"))
    if not relations:
        raise InputError("relations= names no head: give at least one relation.")
    plan = _Schedule.of(probe, steps, rate, batch_size, seed, every, progress)
    measured, sign = _measured(model, metric, better, probe, None)
    given = _Given(model, probe, relations, mode)
    kept = _checkpoint(
        folder, "injected patterns", model, probe, plan,
        metric=measured.name, mode=mode, relations=given.digest(),
    )  # fmt: skip
    copied = _copy(model)
    with_rule = {"injected": _mean_of(model, measured, probe, given, plan.batch_size)}
    task = _Injecting(copied, measured, sign, given)
    losses = _train(task, probe, plan, kept, "training with injected patterns")
    with_rule["after, injected"] = _mean_of(copied, measured, probe, given, plan.batch_size)
    return _trained(
        model, copied, losses, measured, probe,
        with_rule, batch_size, origin(model, probe, method=_INJECTED, mode=mode, steps=steps),
    )  # fmt: skip


@dataclass(eq=False)
class _Mixing(_Task):
    """Task that trains gates over experts, each of which omits one head."""

    gates: "_Gates"

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.gates.parameters

    def cost(self, batch: Probe, number: Tensor, draws: torch.Generator) -> Tensor:
        return self.gates.value(self, batch)[0]


class _Gates:
    """Gating networks, one per layer: running mean of the stream, tanh, softmax over heads."""

    def __init__(self, shape: ModelShape, hidden: int, seed: int, device: torch.device) -> None:
        draws = torch.Generator().manual_seed(seed)
        layers, heads = len(shape.attention_layers), shape.n_heads
        first = torch.randn(layers, shape.d_model, hidden, generator=draws) / shape.d_model**0.5
        # Zeros give a uniform gate, which leaves the model unchanged.
        made = {"first": first, "bias": torch.zeros(layers, hidden),
                "second": torch.zeros(layers, hidden, heads)}  # fmt: skip
        self.parameters = {name: one.to(device).requires_grad_() for name, one in made.items()}
        self._place = {layer: at for at, layer in enumerate(shape.attention_layers)}
        self._there = torch.zeros(layers, heads, dtype=torch.bool, device=device)
        for layer, head in shape.heads:
            self._there[self._place[layer], head] = True
        self._counts = self._there.sum(1).tolist()

    def shares(
        self,
        layer: int,
        stream: Float[Tensor, "batch pos d_model"],
        real: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch pos head"]:
        """Responsibility of each head: ``n / (n - 1) (1 - gate)`` for n heads in a layer."""
        at, weight = self._place[layer], real.to(stream)[..., None]
        mean = (stream * weight).cumsum(1) / weight.cumsum(1).clamp_min(1)
        size = mean.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        there, values = self._there[at], self.parameters
        inner = torch.tanh(mean / size @ values["first"][at] + values["bias"][at])
        gate = (inner @ values["second"][at]).masked_fill(~there, -torch.inf).softmax(-1)
        n = self._counts[at]
        shared: Tensor = n / (n - 1) * (1 - gate)
        return shared

    def value(self, task: _Task, batch: Probe) -> tuple[Tensor, dict[int, Tensor]]:
        """Cost with the gates applied, and the gates' outputs in every layer."""
        seen: dict[int, Tensor] = {}

        def read(view: TapView) -> None:
            seen[view.layer] = self.shares(view.layer, view.value.float(), batch.real)

        def write(layer: int) -> Write:
            def weigh(z: Tensor, _span: Span) -> Tensor:
                return z * seen[layer].to(z)[..., None]

            return weigh

        logits = task.model.run(
            batch,
            reads={Tap("resid_pre", layer): read for layer in self._place},
            writes={Tap("z", layer): write(layer) for layer in self._place},
            grad=True,
        )
        assert logits is not None  # noqa: S101  # nothing stops the pass
        return task.sign * task.metric(logits, batch).mean(), seen


@checked
@own_types()
def mixture(
    model: HeadModel,
    probe: Probe,
    *,
    hidden: int = 16,
    metric: Metricish = metrics.loss,
    better: Direction | None = None,
    steps: int = 100,
    rate: float = 1e-2,
    batch_size: int | None = None,
    seed: int = 0,
    folder: CheckpointPath = None,
    every: int = 20,
    progress: bool | None = None,
) -> HeadScores:
    """Learn a mixture of experts that each omit one head, to measure each head's responsibility.

    Expert i of a layer is attention with all n heads except i, multiplied by ``n / (n - 1)``. A
    gate mixes the experts based on the layer's input, so head h is scaled by its responsibility,
    ``n / (n - 1) (1 - gate_h)``: 1 under a uniform gate, which is the original model, and 0 if the
    gate always omits the head. The gate is a network with one hidden layer on the mean of the
    residual stream up to each position (later positions would leak a decoder's future). Only the
    gates are trained.

    Args:
        model: model with at least two heads in every layer; it is not changed.
        probe: training examples with targets.
        hidden: width of the gate's hidden layer.
        metric: metric to optimise.
        better: which direction of the metric is better, if the metric does not declare it.
        steps: number of Adam steps, one batch each.
        rate: learning rate of Adam.
        batch_size: examples per step. Default: 8.
        seed: seed for the order of examples and the initial gate weights.
        folder: checkpoint folder; the same call resumes from it.
        every: steps between two checkpoints.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        The score ``responsibility``, averaged over the positions of each example, from 0 to ``n /
        (n - 1)``; its mean within a layer is 1.

    Raises:
        InputError: if an argument does not fit the model or is out of range, or the folder holds
            another run.
        UnsupportedModelError: if a layer has a single head.

    Source: Peng et al. 2020 (arXiv 2005.06537), with the experts fixed.

    Example:
        >>> found = hs.training.mixture(model, probe, steps=2)
        >>> bool(np.allclose(found.mean.mean(1), 1, atol=1e-4))
        True
    """
    shape = model.shape
    by_layer = [
        sum(head.layer == layer for head in shape.heads) for layer in shape.attention_layers
    ]
    if min(by_layer) < 2:
        raise UnsupportedModelError(
            f"{model.name} has a layer with a single head: a mixture needs at least two heads per "
            "layer."
        )
    whole(hidden, "hidden", 1)
    plan = _Schedule.of(probe, steps, rate, batch_size, seed, every, progress)
    measured, sign = _measured(model, metric, better, probe, None)
    kept = _checkpoint(folder, "mixture", model, probe, plan, metric=measured.name, hidden=hidden)
    gates = _Gates(shape, hidden, seed, model.device)
    task = _Mixing(model, measured, sign, gates)
    found = np.full((shape.n_layers, shape.n_heads, len(probe)), np.nan)
    with frozen(model):
        _train(task, probe, plan, kept, "learning a mixture of heads")
        with torch.no_grad():
            for chosen, shares in capture.passes(
                model, probe, lambda batch, _: _mean_shares(task, gates, batch),
                batch_size=plan.batch_size,
            ):  # fmt: skip
                found[list(shape.attention_layers), :, chosen] = shares.cpu().double().numpy()
    for layer, head in shape.removed:
        found[layer, head] = np.nan
    return HeadScores.from_examples(
        "responsibility", found, kv_heads=shape.n_kv_heads, unit="share", bounds=(0.0, 2.0),
        description="a mixture of experts that each omit one head relies on the head",
        source=_MIXTURE, provenance=origin(model, probe, steps=steps, rate=rate, hidden=hidden),
    )  # fmt: skip


def _mean_shares(task: _Task, gates: _Gates, batch: Probe) -> Float[Tensor, "layer head batch"]:
    _, seen = gates.value(task, batch)
    real = batch.real.to(task.model.device)[..., None]
    parts = [(one * real).sum(1) / real.sum(1) for one in seen.values()]
    return torch.stack(parts).mT


@dataclass(eq=False)
class _Noisy(_Task):
    """Task that trains the mean and spread of a noisy gate on every head."""

    penalty: float
    there: Bool[Tensor, "layer head"]
    values: dict[str, Tensor]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.values

    def cost(self, batch: Probe, number: Tensor, draws: torch.Generator) -> Tensor:
        mean, log_spread = self.values["mean"], self.values["log_spread"]
        noise = torch.randn(mean.shape, generator=draws).to(mean)
        layers = frozenset(self.model.shape.attention_layers)
        gates = GatedHeads(mean + log_spread.exp() * noise, layers)
        told = divergence(mean, log_spread)[self.there].sum()
        return self.value(batch, writes_of([gates])) + self.penalty * told


@checked
def divergence(
    mean: Float[Tensor, "*any"], log_spread: Float[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """Nats that a noisy gate transmits: ``ln(1 + mean^2 / spread^2) / 2``; 0 for a mean of 0.

    Args:
        mean: mean of the gate.
        log_spread: logarithm of the gate's standard deviation.

    Example:
        >>> round(float(hs.training.divergence(torch.tensor(1.0), torch.tensor(0.0))), 4)
        0.3466
    """
    return torch.log1p(mean.square() * (-2 * log_spread).exp()) / 2


@checked
@own_types()
def variational_gates(
    model: HeadModel,
    probe: Probe,
    *,
    penalty: float = 0.01,
    start: float = 0.3,
    metric: Metricish = metrics.loss,
    better: Direction | None = None,
    steps: int = 150,
    rate: float = 0.05,
    batch_size: int | None = None,
    seed: int = 0,
    folder: CheckpointPath = None,
    every: int = 20,
    progress: bool | None = None,
) -> HeadTable:
    """Learn noisy gates with a price on transmitted information (information bottleneck).

    A head's output is multiplied by ``mean + spread e``, with e standard normal and drawn anew for
    every head and step. Training minimises ``metric + penalty * sum over heads of ln(1 + mean^2 /
    spread^2) / 2`` over the gates only. A head that is needed keeps a mean far above its spread; a
    head that is not is drowned in noise. Compare :func:`headscope.pruning.learn_gates`, whose gates
    are 0 or 1, and :func:`headscope.edges.causal_gates`, which separates heads that help from heads
    that hurt.

    Args:
        model: model to analyse; it is not changed.
        probe: training examples with targets.
        penalty: price per transmitted nat, in the metric's unit.
        start: initial spread of every gate; the initial mean is 1.
        metric: metric to preserve.
        better: which direction of the metric is better, if the metric does not declare it.
        steps: number of Adam steps, one batch each.
        rate: learning rate of Adam.
        batch_size: examples per step. Default: 8.
        seed: seed for the order of examples and the noise.
        folder: checkpoint folder; the same call resumes from it.
        every: steps between two checkpoints.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        A table with ``gate``, the mean; ``gate_nats``, the transmitted nats; and
        ``signal_to_noise``, ``mean^2 / spread^2``, the order for pruning (smallest first).

    Raises:
        InputError: if an argument does not fit the model or is out of range, or the folder holds
            another run.

    Source: VTrans (arXiv 2406.05276), applied to heads only.

    Example:
        >>> list(hs.training.variational_gates(model, probe, steps=2))
        ['gate', 'gate_nats', 'signal_to_noise']
    """
    positive(penalty, "penalty")
    plan = _Schedule.of(probe, steps, rate, batch_size, seed, every, progress)
    measured, sign = _measured(model, metric, better, probe, None)
    kept = _checkpoint(
        folder, "variational gates", model, probe, plan,
        metric=measured.name, penalty=penalty, start=positive(start, "start"),
    )  # fmt: skip
    shape = model.shape
    there = torch.zeros(shape.n_layers, shape.n_heads, dtype=torch.bool)
    there[tuple(np.transpose(shape.heads))] = True
    begin = {"mean": torch.ones(there.shape), "log_spread": torch.full(there.shape, start).log()}
    values = {name: one.to(model.device).requires_grad_() for name, one in begin.items()}
    task = _Noisy(model, measured, sign, penalty, there.to(model.device), values)
    with frozen(model):
        _train(task, probe, plan, kept, "learning noisy gates")
    mean, log_spread = (one.detach().cpu().double() for one in values.values())
    about = origin(model, probe, penalty=penalty, steps=steps, rate=rate, start=start)
    said = {
        "gate": (mean, "gate", (None, None), "mean of a noisy gate on the head"),
        "gate_nats": (divergence(mean, log_spread), "nats", (0.0, None),
                      "the head's noisy gate transmits more"),
        "signal_to_noise": ((mean / log_spread.exp()) ** 2, "ratio", (0.0, None),
                            "the mean of the head's noisy gate is larger relative to its noise"),
    }  # fmt: skip
    return HeadTable(
        [
            HeadScores.from_summary(
                name, one.masked_fill(~there, torch.nan).numpy(), kv_heads=shape.n_kv_heads,
                unit=unit, bounds=bounds, description=words, source=_VARIATIONAL, provenance=about,
            )
            for name, (one, unit, bounds, words) in said.items()
        ]
    )  # fmt: skip


def _weights(model: HeadModel) -> dict[str, Tensor]:
    """Parameters of a copy, with shared ones listed once."""
    return dict(cast("HFModel", model).module.named_parameters())


def _copy(model: HeadModel) -> HeadModel:
    """Copy a model for training its weights.

    Raises:
        UnsupportedModelError: if it is not a transformers model with a single stack and
            floating-point weights.
    """
    if not isinstance(model, HFModel):
        raise UnsupportedModelError(
            f"{model.name} is not a transformers model with a single stack, so headscope cannot "
            "train its weights: train gates instead (hs.pruning.learn_gates)."
        )
    module = copy.deepcopy(model.module)
    for name, one in module.named_parameters():
        if not one.is_floating_point():
            raise UnsupportedModelError(
                f"{model.name} has quantised weights ({name}): load it in a floating-point dtype "
                "to train it."
            )
        one.requires_grad_(True)
    made: HeadModel = load(module, tokenizer=model.tokenizer, check=False)
    return made


def _measured(
    model: HeadModel, metric: Metricish, better: Direction | None, *probes: Probe | None
) -> tuple[AnyMetric, int]:
    """Metric and its sign as a cost, after checking that the probes support it.

    Raises:
        InputError: if a probe does not support the metric, or its direction is unknown.
    """
    found = as_metric(metric)
    for one in probes:
        if one is not None:
            capture.check_fits(model, one, answers=True)
            found.reads(one)
    return found, cost_sign(found, better)


def _checkpoint(
    folder: CheckpointPath,
    method: str,
    model: HeadModel,
    probe: Probe,
    plan: _Schedule,
    **other: Any,
) -> Checkpoint:
    """Checkpoint of a run, identified by its settings; the number of steps may grow."""
    if folder is None:
        return Checkpoint(None, {})
    facts = {
        "method": method, "weights": model.digest(), "probe": probe_digest(probe),
        "rate": plan.rate, "batch_size": plan.batch_size, "seed": plan.seed, **other,
    }  # fmt: skip
    return Checkpoint(folder, facts)


def _trained(
    model: HeadModel, copied: HeadModel, losses: tuple[float, ...], metric: AnyMetric,
    probe: Probe, other: Mapping[str, float], batch_size: int | None, about: Provenance,
) -> Trained:  # fmt: skip
    """Result of a run; the trained copy is wrapped again, since cached measurements are stale."""
    module = cast("HFModel", copied).module
    done: HeadModel = load(module, tokenizer=model.tokenizer, check=False)
    options: dict[str, Any] = {"normalise": False, "batch_size": batch_size, "progress": False}
    before, after = (gradient_importance(one, probe, metric, **options) for one in (model, done))
    size = 8 if batch_size is None else batch_size
    means = [_mean_of(one, metric, probe, None, size) for one in (model, done)]
    return Trained(
        done, losses, {"before": means[0], **other, "after": means[1]},
        (metric.name, metric.unit), before, after, about,
    )  # fmt: skip


def _mean_of(
    model: HeadModel, metric: AnyMetric, probe: Probe, given: _Given | None, size: int
) -> float:
    """Mean metric over all examples, with or without injected patterns."""
    order = torch.arange(len(probe))
    total = torch.zeros((), device=model.device)
    with torch.no_grad():
        for some in order.split(size):
            batch = probe.examples(some).to(model.device)
            edits: list[Edit] = [] if given is None else [given.edit(some)]
            total += metric(model.forward(batch.tokens, real=batch.real, edits=edits), batch).sum()
    return float(total / len(probe))
