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
    """Average indirect effect of every head: effect of its task mean on shuffled-label prompts.

    On prompts whose demonstrations have shuffled labels, a head's output at ``end`` is replaced by
    its mean over prompts with the correct labels; the effect is the resulting change in the
    answer's probability. Means come from the other half of a task's prompts, so a prompt never
    contributes to its own mean. The control injects means over shuffled-label prompts, to measure
    the effect of any mean. P-values are over prompts, so they generalise to prompts of these tasks
    only.

    Args:
        model: model to run.
        tasks: by name, a probe from :func:`headscope.probes.in_context` or (text, label) pairs.
        heads: heads to measure. Default: all.
        template: template for prompts built from pairs.
        shots: demonstrations per such prompt. Default: 10, or all pairs but the query.
        seed: seed for drawing those prompts.
        batch_size: see :func:`headscope.ablate_heads`.
        memory: see :func:`headscope.ablate_heads`.
        progress: see :func:`headscope.ablate_heads`.

    Returns:
        The score ``indirect_effect`` in units of probability, with its control per prompt.

    Raises:
        InputError: if there is no task, or a probe has no shuffled-label pair or fewer than four
            prompts.

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
        raise InputError("there are no tasks: give at least one, {name: pairs or probe}.")
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
        description="injecting its task mean makes the answer more likely",
        source=SOURCE,
        provenance=origin(
            model, next(iter(probes.values())), control="means over shuffled-label prompts",
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
    """Change in the answer's probability when each head's mean is patched in at ``end``."""
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
        values: strengths ``[layer, head]``, from 0 (output unchanged) to 1 (output replaced by the
            vector); NaN for heads that do not exist.
        losses: training loss before each step.
        checks: validation loss every few steps, with the step; the values are those of the best.
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
        """The strengths as a head score."""
        return HeadScores.from_summary(
            "injection_strength", self.values, kv_heads=1, unit="share", bounds=(0.0, 1.0),
            description="the task benefits from replacing the head's output by its vector",
            source="soft injection (arXiv 2507.20906)", provenance=self.provenance,
        )  # fmt: skip

    def glance(self) -> Glance:
        """Show the heads with the largest strengths."""
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

    ``z`` at ``end`` becomes ``(1 - a) z + a v`` with ``a = sigmoid(theta)``, and theta starts at 0.
    Adam minimises the cross-entropy of the answer, with all prompts in each step. The loss on the
    test prompts is measured every few steps, and the strengths with the lowest loss are returned
    (the initial ones, 0.5 for every head, are not a candidate).

    Args:
        model: model to run.
        vectors: vectors of this model.
        probe: prompts with a target at ``end``, e.g. queries without demonstrations.
        test: prompts for choosing the strengths. Default: every fourth prompt, held out.
        steps: number of Adam steps.
        rate: learning rate.
        every: steps between two checks.
        folder: checkpoint folder, written at every check; the same call resumes from it and gives
            the same numbers.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the vectors belong to another model, a number is out of range, there are
            fewer than four prompts to hold some out, or the folder holds another run.
        HeadscopeError: if the loss becomes NaN or infinite.

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
            raise InputError(
                f"{len(probe)} prompts are too few to hold some out: give at least 4, or test=."
            )
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
    """Cross-entropy of the answers with vectors injected at ``end``."""
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

    ``mean``: mean output on the positives minus that on the negatives; with a broad sample of text
    as negatives, this is mean-centring. ``pca``: first principal component of the centred
    differences of pairs (example i of both), with norm 1 and the sign for which most
    positive-minus-negative differences point its way (on ties, that of the mean difference).
    ``probe``: linear discriminant ``(S + 0.1 trace(S) / d_head)^-1 (mean difference)`` with the
    within-class covariance S, with norm 1.

    ``auc``: share of (positive, negative) pairs that the vector orders correctly, when fitted to
    the even examples and tested on the odd ones; the p-value is from the Mann-Whitney test.

    Args:
        model: model to run.
        positives: texts with the property that the vector should represent.
        negatives: texts without it; as many as the positives for ``pca``.
        method: ``mean``, ``pca`` or ``probe``, as above.
        at: see :func:`head_means`.
        batch_size: examples per pass.

    Raises:
        InputError: if a probe does not fit the model, or has too few examples.

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
            f"{len(positives)} positives and {len(negatives)} negatives: each class needs at least "
            "two examples."
        )
    if method == "pca" and len(positives) != len(negatives):
        raise InputError(
            f"pca needs pairs, and there are {len(positives)} positives and {len(negatives)} "
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
        high: points of the positive class.
        low: points of the negative class.
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
        description="the head's vector separates held-out examples of the two classes",
        source="Li et al. 2023 (arXiv 2306.03341), probes of head outputs",
        provenance=about,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class SteeringTable(Saved, Shown, Tabular):
    """Effect of steering on a task and on other text.

    Attributes:
        arms: names: ``none``, ``heads``, ``random heads``, ``residual``, ``random residual``, and
            ``prompt`` if one was given.
        metric: name and unit of the task's metric.
        task: metric on every prompt, ``[arm, prompt]``.
        side: KL(plain || steered) of the next token after other texts, in nats; NaN for ``prompt``,
            which does not change other texts.
        provenance: where it came from.
    """

    arms: tuple[str, ...]
    metric: tuple[str, str]
    task: Float[np.ndarray, "arm example"]
    side: Float[np.ndarray, "arm text"]
    provenance: Provenance = field(default_factory=Provenance)

    def glance(self) -> Glance:
        """Show the means of every arm."""
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


# Maps a batch, the positions to steer and the positions to read to logits ``[row d_vocab]``.
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

    Arms: ``none``; ``heads``, the injected vectors; ``random heads``, random directions with the
    same norms in the same heads; ``residual``, the joint write of the heads' vectors, added to the
    residual stream after one layer; ``random residual``, a random direction with that norm. All act
    at the last token: ``end`` of the prompts, and the last token of other texts. ``prompt`` steers
    by prompting instead: the same questions with demonstrations or an instruction.

    Args:
        model: model to run.
        probe: prompts with targets at ``end``.
        vectors: vectors of this model.
        heads: heads to inject into.
        strength: see :func:`inject`; also scales the residual arms if it is one number.
        mode: see :func:`inject`.
        layer: layer after which the residual arms add their vector. Default: a third of the depth.
        metric: metric that reads logits at ``end``.
        prompt: the same examples in the same order and with the same targets, as prompts that ask
            for the task, e.g. with demonstrations from :func:`headscope.probes.in_context`.
            Default: no such arm.
        other: unrelated texts. Default: the bundled passages.
        seed: seed for the random directions.
        batch_size: examples per pass.

    Raises:
        InputError: if the probe, the vectors or another argument does not fit the model.
        UnsupportedModelError: if a norm follows attention.

    Source: AxBench (arXiv 2501.17148), on steering baselines.

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
    """Raise InputError if the prompt's answers differ from the probe's.

    Raises:
        InputError: if examples or targets at ``end`` differ.
    """
    asked, other = (one.targets[one.mark("end")].tolist() for one in (probe, prompt))
    if len(probe) != len(prompt) or asked != other:
        raise InputError(
            f"the prompt ({len(prompt)} examples) and the probe ({len(probe)}) have different "
            "answers at 'end': ask the same questions in the same order."
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
    """KL(plain || steered) of the next token after each text."""

    def one(batch: Probe, _: int) -> Tensor:
        last = torch.nn.functional.one_hot(batch.last, batch.length).bool()
        before, after = (part(batch, last, last).log_softmax(-1) for part in (plain, run))
        return (before.exp() * (before - after)).sum(-1).clamp_min(0).cpu().double()

    return torch.cat(
        [part for _, part in capture.passes(model, texts, one, batch_size=batch_size)]
    ).numpy()
