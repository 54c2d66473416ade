"""Effects of head vectors: indirect effects, learned strengths, contrasts, side effects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope import capture
from headscope.ablation.engine import MetricReading
from headscope.ablation.run import Measurement, Positions, by_head, present
from headscope.base.arguments import checked
from headscope.base.checkpoints import AdamRun, Checkpoint
from headscope.base.files import Saved
from headscope.base.options import RunOptions, track
from headscope.base.result import Glance, Shown, Tabular, number
from headscope.base.statistics import Design, mean_and_sem
from headscope.edits import AnyEdit, HeadEdit, Heads, Span, Variant
from headscope.errors import InputError, nearest, positive, whole
from headscope.metrics import Metric, answer_log_prob, answer_probability
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types, weight_digest
from headscope.models.taps import Tap, Write, writes_of
from headscope.origin import origin
from headscope.probes.probe import Probe, probe_digest
from headscope.probes.prompts import TEMPLATE, Example, in_context
from headscope.steering.vectors import (
    HeadVectors,
    Strength,
    function_vector,
    injection,
    outputs_at,
)
from headscope.table import HeadScores, Provenance

Task = Probe | Sequence[Example]
SOURCE = "Todd et al. 2023 (arXiv 2310.15213), average indirect effect"


@checked
@own_types()
def indirect_effect(
    model: HeadModel,
    tasks: Mapping[str, Task],
    *,
    heads: Heads | None = None,
    template: str = TEMPLATE,
    shots: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Average indirect effect of every head: effect of its task mean on prompts without the task.

    On prompts whose demonstrations have their labels shuffled, a head's output at ``end`` becomes
    its mean over prompts with the right labels; the effect is the probability of the answer then
    minus that before. Means are of the other half of a task's prompts, so that no prompt is told
    its own answer. The control does the same with means of shuffled prompts: what any mean does.
    Its p-values are over prompts: they are of these tasks.

    Args:
        model: the model.
        tasks: by name: a probe of :func:`headscope.probes.in_context`, or pairs (text, label).
        heads: which; default: all.
        template: of prompts that are made of pairs.
        shots: demonstrations of such prompts; default: 10, or all but the query.
        seed: of the same.
        batch_size: as :func:`headscope.ablate_heads` takes it.
        memory: likewise.
        progress: likewise.

    Returns:
        The score ``indirect_effect``, in probability, with its control per prompt.

    Raises:
        InputError: if there is no task, a probe has no shuffled pair or fewer than four prompts.

    Source: Todd et al. 2023 (arXiv 2310.15213).

    Example:
        >>> pairs = [("cat", " Mary"), ("dog", " John"), ("park", " Mary"), ("store", " John")]
        >>> found = hs.steering.indirect_effect(
        ...     model, {"names": pairs}, template="the {text} and{label} ."
        ... )
        >>> found.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    if not tasks:
        raise InputError("there are no tasks: give one at least, {name: pairs or probe}.")
    chosen = present(model, heads)
    probes = {
        name: _task_probe(model, name, task, template, shots, seed) for name, task in tasks.items()
    }
    own, null = [], []
    for name, probe in probes.items():
        assert probe.corrupt is not None  # noqa: S101  # see _task_probe
        order = torch.arange(len(probe))
        parts = []
        for half in (order % 2 == 0, order % 2 == 1):
            given = [
                outputs_at(model, one.examples(order[half]), "end", batch_size).mean(0)
                for one in (probe, probe.corrupt)
            ]
            shuffled = probe.corrupt.examples(order[~half])
            parts.append(
                _effects(model, shuffled, chosen, given, name, batch_size, memory, progress)
            )
        both = np.concatenate(parts, 2)
        own.append(both[0])
        null.append(both[1])
    values, control = (by_head(model, chosen, np.concatenate(one, 1)) for one in (own, null))
    return HeadScores.from_examples(
        "indirect_effect",
        values,
        kv_heads=model.shape.n_kv_heads,
        control_per_example=control,
        design=Design(paired=True),
        alternative="greater",
        unit="probability",
        bounds=(-1.0, 1.0),
        description="its mean over prompts of a task makes the answer likelier without the task",
        source=SOURCE,
        provenance=origin(
            model, next(iter(probes.values())), control="means of shuffled prompts",
            tasks=", ".join(probes),
        ),
    )  # fmt: skip


def _task_probe(
    model: HeadModel, name: str, task: Task, template: str, shots: int | None, seed: int
) -> Probe:
    if isinstance(task, Probe):
        probe = task
    else:
        count = min(10, len(task) - 1) if shots is None else shots
        probe = in_context(model, task, template=template, shots=count, seed=seed)
    if probe.corrupt is None:
        raise InputError(
            f"the task {name!r} has no prompts with shuffled labels (probe.corrupt): make them "
            "with hs.probes.in_context."
        )
    if len(probe) < 4:
        raise InputError(f"the task {name!r} has {len(probe)} prompts: give four or more.")
    capture.check_fits(model, probe, answers=True)
    return probe


def _effects(
    model: HeadModel,
    probe: Probe,
    heads: Sequence[Any],
    means: Sequence[Float[Tensor, "layer head d_head"]],
    name: str,
    batch_size: int | None,
    memory: str | int | None,
    progress: bool | None,
) -> Float[np.ndarray, "2 chosen example"]:
    """Change of the answer's probability when each head's mean is patched in at the end."""
    study = Measurement.of(
        model, probe, answer_probability.at("end"),
        RunOptions(batch_size, memory, progress=progress),
    )  # fmt: skip
    where = probe.mark("end")

    def variants(examples: slice, _batch: object) -> list[Variant]:
        return [
            (HeadEdit.at("mean", [head], donors={head.layer: one[head.layer].nan_to_num()},
                         positions=where[examples]),)
            for one in means
            for head in heads
        ]  # fmt: skip

    edited, clean = study.measure(variants, 2 * len(heads), f"indirect effects on {name}")
    effects: np.ndarray = (edited - clean).reshape(2, len(heads), len(probe))
    return effects


@dataclass(frozen=True, eq=False, repr=False)
class Strengths(Saved, Shown, Tabular):
    """Learned strengths of injection for a task.

    Attributes:
        values: from 0 (the head is left alone) to 1 (it gives its vector); NaN: no such head.
        losses: training loss before each step.
        checks: validation loss every few steps, with the step; the best one's values are kept.
        before, after: validation loss without injection, and with the values.
        provenance: where it came from.
    """

    values: Float[np.ndarray, "layer head"]
    losses: tuple[float, ...]
    checks: tuple[tuple[int, float], ...]
    before: float
    after: float
    provenance: Provenance = field(default_factory=Provenance)

    def scores(self) -> HeadScores:
        """The strengths as a score of heads."""
        return HeadScores.from_summary(
            "injection_strength", self.values, kv_heads=1, unit="share", bounds=(0.0, 1.0),
            description="the task needs the head's vector in place of its output",
            source="soft injection (arXiv 2507.20906)", provenance=self.provenance,
        )  # fmt: skip

    def glance(self) -> Glance:
        """The strongest heads."""
        return Glance(
            "learned injection strengths",
            [f"loss {number(self.before)} -> {number(self.after)}", self.provenance.model],
            ("head", "strength"),
            [(str(head), number(value)) for head, value in self.scores().top(6)],
            hint="hs.steering.inject(model, vectors, strength=found.values)",
        )

    def to_pandas(self) -> Any:
        """One row per head."""
        return self.scores().to_pandas()


@checked
@own_types()
def learn_strengths(
    model: HeadModel,
    vectors: HeadVectors,
    probe: Probe,
    *,
    test: Probe | None = None,
    steps: int = 100,
    rate: float = 0.2,
    every: int = 10,
    folder: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> Strengths:
    """Learn how strongly to inject each head's vector for a task, with the model frozen.

    ``z`` at ``end`` becomes ``(1 - a) z + a v`` with ``a = sigmoid(theta)`` and theta 0 at the
    start; Adam on the cross-entropy of the answer, all prompts in each step. Every few steps the
    loss on the test prompts is taken, and the strengths of the lowest are kept (never the start's
    by itself, which changes all heads by half).

    Args:
        model: the model.
        vectors: of this model.
        probe: prompts with a target at ``end``, such as queries without demonstrations.
        test: others, by which strengths are chosen; default: every fourth prompt, held out.
        steps: of Adam.
        rate: learning rate.
        every: steps between two checks.
        folder: where the run is kept at every check, from which the same call resumes to the
            same numbers.
        progress: show a bar.

    Raises:
        InputError: if the vectors are of another model, a number is out of range, there are fewer
            than four prompts to hold some out, or the folder holds another run.
        HeadscopeError: if the loss is no longer finite.

    Source: soft injection of task embeddings, arXiv 2507.20906.

    Example:
        >>> pairs = [("cat", " Mary"), ("dog", " John"), ("park", " Mary"), ("store", " John")]
        >>> prompts = hs.probes.in_context(model, pairs, template="the {text} and{label} .")
        >>> vectors = hs.steering.head_means(model, prompts)
        >>> found = hs.steering.learn_strengths(model, vectors, prompts, steps=5, every=5)
        >>> found.values.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    whole(steps, "steps", 1)
    whole(every, "every", 1)
    positive(rate, "rate")
    vectors.check(model)
    if test is None:
        if len(probe) < 4:
            raise InputError(f"{len(probe)} prompts cannot be held out from: give 4, or test=.")
        held = torch.arange(len(probe)) % 4 == 3
        order = torch.arange(len(probe))
        probe, test = probe.examples(order[~held]), probe.examples(order[held])
    for one in (probe, test):
        capture.check_fits(model, one, answers=True)
        answer_log_prob.at("end").reads(one)
    values = vectors.values.nan_to_num().to(model.device)
    theta = torch.zeros(values.shape[:2], device=model.device, requires_grad=True)
    kept = Checkpoint(None, {})
    if folder is not None:
        facts = {
            "method": "strengths", "weights": model.digest(), "probe": probe_digest(probe, test),
            "vectors": weight_digest({"vectors": vectors.values}), "steps": steps, "rate": rate,
            "every": every,
        }  # fmt: skip
        kept = Checkpoint(folder, facts)
    checks = {"at": torch.empty(0, 2, dtype=torch.float64), "best": theta.detach().clone()}
    run = AdamRun(kept, {"theta": theta}, rate, steps, every, other=checks)
    with torch.no_grad():
        before = float(_loss(model, test, values, None))
    with track(steps, "learning strengths", show=progress) as advance:
        advance(run.done)
        for _ in run:
            with torch.enable_grad():
                total = _loss(model, probe, values, theta.sigmoid())
                (theta.grad,) = torch.autograd.grad(total, [theta])
            run.take(total)
            if run.due:
                _check(checks, run.done, _loss(model, test, values, theta.sigmoid()), theta)
            advance()
    found = torch.full(values.shape[:2], torch.nan)
    there = tuple(np.transpose(model.shape.heads))
    found[there] = checks["best"].cpu().sigmoid()[there]
    return Strengths(
        found.double().numpy(), tuple(run.losses.tolist()),
        tuple((int(step), loss) for step, loss in checks["at"].tolist()), before,
        float(checks["at"][:, 1].min()),
        origin(model, probe, vectors=vectors.name, steps=steps, rate=rate),
    )  # fmt: skip


def _check(checks: dict[str, Tensor], step: int, loss: Tensor, theta: Tensor) -> None:
    """Record a held-out loss, and the strengths if it is the lowest so far."""
    now = float(loss.detach())
    if not len(checks["at"]) or now < float(checks["at"][:, 1].min()):
        checks["best"] = theta.detach().clone()
    row = torch.tensor([[step, now]], dtype=torch.float64)
    checks["at"] = torch.cat([checks["at"], row])


def _loss(
    model: HeadModel,
    probe: Probe,
    values: Float[Tensor, "layer head d_head"],
    amounts: Float[Tensor, "layer head"] | None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the answers with vectors injected at the end."""
    end = probe.host.mark("end")

    def write(layer: int, share: Tensor) -> Write:
        def soften(z: Tensor, _span: Span) -> Tensor:
            there = end.to(z.device)[:, :, None, None].to(z)
            part = there * share[layer].to(z)[None, None, :, None]
            return z + part * (values[layer].to(z) - z)

        return soften

    layers = model.shape.attention_layers
    writes = {} if amounts is None else {Tap("z", n): write(n, amounts) for n in layers}
    grad = amounts is not None and amounts.requires_grad
    targets = probe.host.targets.where(end, -1)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        return capture.loss_sum(model, probe, targets, writes=writes) / (targets >= 0).sum()


METHODS = ("mean", "pca", "probe")


@checked
@own_types()
@torch.no_grad()
def contrast(
    model: HeadModel,
    positives: Probe,
    negatives: Probe,
    *,
    method: str = "mean",
    at: Positions = None,
    batch_size: int | None = None,
) -> HeadVectors:
    """Steering vectors of heads from two sets of texts, and how well each separates them.

    ``mean``: mean output on the positives less that on the negatives; with a broad sample of text
    as negatives that is mean-centring. ``pca``: first principal component of the centred
    differences of pairs (example i of both), length 1, its sign such that most pairs of positive
    and negative lie in its direction (ties: as the mean difference). ``probe``: linear
    discriminant, ``(S + 0.1 trace(S) / d_head)^-1 (mean difference)`` with the covariance S within
    the classes, length 1.

    ``auc``: the share of pairs of a positive and a negative that the vector orders rightly, where
    it is fitted to the even examples and tried on the odd ones; p-value by Mann and Whitney's test.

    Args:
        model: the model.
        positives: texts that have what the vector should stand for.
        negatives: texts that lack it; as many, for ``pca``.
        method: see above.
        at: as :func:`head_means` takes it.
        batch_size: examples per pass.

    Raises:
        InputError: if a probe does not fit, or has too few examples.

    Source: Jorgensen et al. 2023 (arXiv 2312.03813), mean-centring; Zou et al. 2023
    (arXiv 2310.01405), representation reading; Li et al. 2023 (arXiv 2306.03341), heads.

    Example:
        >>> other = hs.probes.repeated_tokens(model, length=10, batch=4, seed=5)
        >>> texts = hs.probes.repeated_tokens(model, length=8, batch=4, seed=6)
        >>> vectors = hs.steering.contrast(model, texts, other)
        >>> vectors.auc.bounds
        (0.0, 1.0)
    """
    if method not in METHODS:
        raise InputError(nearest(str(method), METHODS, kind="method"))
    if min(len(positives), len(negatives)) < 2:
        raise InputError(
            f"{len(positives)} positives and {len(negatives)} negatives: each class needs two "
            "examples at least."
        )
    if method == "pca" and len(positives) != len(negatives):
        raise InputError(
            f"pca takes pairs, and there are {len(positives)} positives and {len(negatives)} "
            "negatives."
        )
    for one in (positives, negatives):
        capture.check_fits(model, one)
    high, low = (outputs_at(model, one, at, batch_size) for one in (positives, negatives))
    values = direction(high, low, method)
    about = origin(model, positives, method=method, negatives=negatives.name)
    return HeadVectors(f"contrast ({method})", values, about, _held_out(high, low, method, about))


@checked
def direction(
    high: Float[Tensor, "example *head d_head"],
    low: Float[Tensor, "other *head d_head"],
    method: str,
) -> Float[Tensor, "*head d_head"]:
    """Vector from one set of points to another; see :func:`contrast`.

    Args:
        high: of the positives.
        low: of the negatives.
        method: ``mean``, ``pca`` or ``probe``.

    Example:
        >>> high, low = torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.zeros(2, 2)
        >>> hs.steering.direction(high, low, "mean").tolist()
        [3.0, 0.0]
    """
    gap = high.mean(0) - low.mean(0)
    if method == "mean":
        return gap
    if method == "pca":
        pairs = (high - low).movedim(0, -2)
        centred = (pairs - pairs.mean(-2, keepdim=True)).nan_to_num()
        first = torch.linalg.svd(centred, full_matrices=False).Vh[..., 0, :]
        votes = torch.einsum("...nd,...d->...n", pairs.nan_to_num(), first).sign().sum(-1)
        ahead = torch.linalg.vecdot(gap.nan_to_num(), first)
        sign = torch.where(votes != 0, votes, ahead).sign()
        signed = first * torch.where(sign == 0, 1.0, sign)[..., None]
        return torch.where(gap.isnan(), torch.nan, signed)
    spread = torch.zeros(*gap.shape, gap.shape[-1])
    count = len(high) + len(low) - 2
    for side in (high, low):
        apart = (side - side.mean(0)).nan_to_num()
        spread = spread + torch.einsum("n...d,n...e->...de", apart, apart) / max(count, 1)
    size = gap.shape[-1]
    trace = spread.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    ridge = 0.1 * trace / size + 1e-12
    found = torch.linalg.solve(spread + ridge * torch.eye(size), gap.nan_to_num()[..., None])
    found = found[..., 0]
    length = found.norm(dim=-1, keepdim=True)
    return torch.where(gap.isnan(), torch.nan, found / length.where(length > 0, 1.0))


def _held_out(
    high: Float[Tensor, "example layer head d_head"],
    low: Float[Tensor, "other layer head d_head"],
    method: str,
    about: Provenance,
) -> HeadScores:
    from scipy import stats

    vector = direction(high[::2], low[::2], method)
    sides = [torch.einsum("nlhd,lhd->lhn", side[1::2], vector).numpy() for side in (high, low)]
    test = stats.mannwhitneyu(*sides, alternative="greater", axis=-1)
    pairs = sides[0].shape[-1] * sides[1].shape[-1]
    there = ~np.isnan(sides[0]).any(-1)
    return HeadScores.from_summary(
        "contrast_auc",
        np.where(there, test.statistic / pairs, np.nan),
        kv_heads=1,
        n=np.where(there, sum(side.shape[-1] for side in sides), 0),
        known={
            "null": np.where(there, 0.5, np.nan), "p_value": np.where(there, test.pvalue, np.nan)
        },
        unit="share",
        bounds=(0.0, 1.0),
        description="the head's vector tells held-out examples of the two classes apart",
        source="Li et al. 2023 (arXiv 2306.03341), probes of head outputs",
        provenance=about,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class SteeringTable(Saved, Shown, Tabular):
    """Effect of steering on a task and on other text.

    Attributes:
        arms: names: ``none``, ``heads``, ``random heads``, ``residual``, ``random residual``, and
            ``prompt`` where one was given.
        metric: name and unit of the task's metric.
        task: the metric on every prompt.
        side: KL(plain || steered) of the next token after other texts, in nats; NaN for
            ``prompt``, which leaves other texts as they are.
        provenance: where it came from.
    """

    arms: tuple[str, ...]
    metric: tuple[str, str]
    task: Float[np.ndarray, "arm example"]
    side: Float[np.ndarray, "arm text"]
    provenance: Provenance = field(default_factory=Provenance)

    def glance(self) -> Glance:
        """Means of every arm."""
        task, side = mean_and_sem(self.task), mean_and_sem(self.side)
        rows = [
            (arm, f"{number(float(task.mean[n]))} ({number(float(task.sem[n]))})",
             f"{number(float(side.mean[n]))} ({number(float(side.sem[n]))})")
            for n, arm in enumerate(self.arms)
        ]  # fmt: skip
        return Glance(
            "steering",
            [f"{self.task.shape[1]} prompts, {self.side.shape[1]} other texts", "mean (error)"],
            ("arm", f"{self.metric[0]}, {self.metric[1]}", "KL on other text, nats"),
            rows,
            whole=True,
        )

    def to_pandas(self) -> Any:
        """One row per arm."""
        import pandas

        task, side = mean_and_sem(self.task), mean_and_sem(self.side)
        return pandas.DataFrame(
            {
                "arm": self.arms, self.metric[0]: task.mean, "sem": task.sem,
                "side_kl": side.mean, "side_sem": side.sem,
            }
        )  # fmt: skip


# From a batch, where to steer it and where logits are wanted to those, ``[row d_vocab]``.
SteeredPass = Callable[[Probe, Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Tensor]


@checked
@own_types()
@torch.no_grad()
def compare(
    model: HeadModel,
    probe: Probe,
    vectors: HeadVectors,
    heads: Heads,
    strength: Strength = 1.0,
    *,
    mode: str = "replace",
    layer: int | None = None,
    metric: Metric = answer_log_prob,
    prompt: Probe | None = None,
    other: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> SteeringTable:
    """Compare head-level steering with its baselines, including side effects.

    Arms: ``none``; ``heads``, the vectors injected; ``random heads``, random directions of the
    same lengths in the same heads; ``residual``, what the heads' vectors write together added to
    the residual stream after one layer; ``random residual``, a random direction of that length. All
    act at the last token: ``end`` of the prompts, and the last token of other texts. ``prompt``
    steers by words instead: the same questions asked with demonstrations or an instruction.

    Args:
        model: the model.
        probe: prompts with targets at ``end``.
        vectors: of this model.
        heads: in which they are injected.
        strength: as :func:`inject` takes it; of the residual arms too where it is one number.
        mode: as :func:`inject` takes it.
        layer: after which the residual arms add; default: a third of the way up.
        metric: that reads ``end``.
        prompt: the same examples, in the same order and with the same targets, as a prompt that
            asks for the task, such as :func:`headscope.probes.in_context` with demonstrations;
            default: no such arm.
        other: unrelated texts; default: the bundled passages.
        seed: of the random directions.
        batch_size: examples per pass.

    Raises:
        InputError: if an argument does not fit.
        UnsupportedModelError: if a norm follows attention.

    Source: AxBench (arXiv 2501.17148), on baselines of steering.

    Example:
        >>> pairs = [("cat", " Mary"), ("dog", " John"), ("park", " Mary"), ("store", " John")]
        >>> prompts = hs.probes.in_context(model, pairs, template="the {text} and{label} .")
        >>> vectors = hs.steering.head_means(model, prompts)
        >>> hs.steering.compare(model, prompts, vectors, ["L1H0"]).arms[:2]
        ('none', 'heads')
    """
    from headscope import probes

    texts = probes.text(model, length=32) if other is None else other
    reading = metric.at("end")
    for one in (probe, *([] if prompt is None else [prompt])):
        capture.check_fits(model, one, answers=True)
        reading.reads(one)
    capture.check_fits(model, texts)
    if prompt is not None:
        _need_same_answers(probe, prompt)
    place = model.shape.n_layers // 3 if layer is None else layer
    Tap("resid_post", place).check(model.name, model.shape)
    whole = function_vector(model, vectors, heads).values.to(model.device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(whole), generator=generator).to(whole)
    size = float(strength) if isinstance(strength, int | float) else 1.0
    drawn = drawn / drawn.norm() * whole.norm()

    def with_edits(given: HeadVectors) -> SteeredPass:
        def run(batch: Probe, where: Tensor, read: Tensor) -> Tensor:
            edits: list[AnyEdit] = injection(
                model, given, heads, strength, mode=mode, positions=where
            )
            return capture.logits_where(model, batch, read, writes=writes_of(edits))

        return run

    def adding(vector: Tensor) -> SteeredPass:
        def run(batch: Probe, where: Tensor, read: Tensor) -> Tensor:
            def write(value: Tensor, _span: Span) -> Tensor:
                there = where.to(value.device)[..., None].to(value)
                return value + there * (size * vector).to(value)

            return capture.logits_where(
                model, batch, read, writes={Tap("resid_post", place): write}
            )

        return run

    def plain(batch: Probe, _where: Tensor, read: Tensor) -> Tensor:
        return capture.logits_where(model, batch, read)

    arms: dict[str, SteeredPass] = {
        "none": plain,
        "heads": with_edits(vectors.check(model)),
        "random heads": with_edits(vectors.random(seed)),
        "residual": adding(whole),
        "random residual": adding(drawn),
    }
    task = [_metric_of(model, probe, reading, run, batch_size) for run in arms.values()]
    side = [_moved(model, texts, plain, run, batch_size) for run in arms.values()]
    names = tuple(arms)
    if prompt is not None:
        names = (*names, "prompt")
        task.append(_metric_of(model, prompt, reading, plain, batch_size))
        side.append(np.full(len(texts), np.nan))
    return SteeringTable(
        names, (metric.name, metric.unit), np.stack(task), np.stack(side),
        origin(model, probe, vectors=vectors.name, layer=place, other=texts.name, seed=seed),
    )  # fmt: skip


def _need_same_answers(probe: Probe, prompt: Probe) -> None:
    """Refuse a prompt whose answers differ from the probe's.

    Raises:
        InputError: if examples or targets at ``end`` differ.
    """
    asked, other = (one.targets[one.mark("end")].tolist() for one in (probe, prompt))
    if len(probe) != len(prompt) or asked != other:
        raise InputError(
            f"the prompt ({len(prompt)} examples) and the probe ({len(probe)}) have other answers "
            "at 'end': ask the same questions in the same order."
        )


def _metric_of(
    model: HeadModel, probe: Probe, metric: Metric, run: SteeredPass, batch_size: int | None
) -> Float[np.ndarray, " example"]:
    def one(batch: Probe, _: int) -> Tensor:
        read = metric.reads(batch)
        rows = run(batch, batch.mark("end"), read)
        reading = MetricReading(batch, metric, read, read)
        return reading.by_example([reading.numbers(rows, torch.arange(len(rows)))], 1)[0]

    parts = [part for _, part in capture.passes(model, probe, one, batch_size=batch_size)]
    return torch.cat(parts).numpy()


def _moved(
    model: HeadModel, texts: Probe, plain: SteeredPass, run: SteeredPass, batch_size: int | None
) -> Float[np.ndarray, " text"]:
    """KL(plain || steered) of the next token after the last one."""

    def one(batch: Probe, _: int) -> Tensor:
        last = torch.nn.functional.one_hot(batch.last, batch.length).bool()
        before, after = (part(batch, last, last).log_softmax(-1) for part in (plain, run))
        return (before.exp() * (before - after)).sum(-1).clamp_min(0).cpu().double()

    return torch.cat(
        [part for _, part in capture.passes(model, texts, one, batch_size=batch_size)]
    ).numpy()
