"""The retrieval score of Wu et al. 2024, decoded as published and teacher-forced.

Also by key/value head, by how often heads act, and how well two such scores agree.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from headscope.base.statistics import Design, rank_correlation, top_k_overlap
from headscope.errors import HeadscopeError, InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.retrieval.follow import RECALL, FollowOptions, follow_both
from headscope.retrieval.runs import Run, Runs
from headscope.scoring import score
from headscope.table import HeadScores, RecallGrid
from headscope.table.notable import copying

_SOURCE = "Wu et al. 2024 (arXiv 2404.15574), {}"
# Mean score from which the source calls a head a retrieval head.
THRESHOLD = 0.1


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Retrieval scores of a probe, means over the runs that count; NaN where none does.

    Teacher-forced, all runs count.

    Attributes:
        by_set: the paper's counting: different needle tokens copied over different needle
            tokens, at most 1.
        by_step: the published code's counting: every step that copies, over the needle's
            length; above 1 where the model says the needle twice.
        activation: share of the runs in which the head copies at least one token.
        runs: what was said, and how well.
    """

    by_set: HeadScores
    by_step: HeadScores
    activation: HeadScores
    runs: Runs

    def heads(self, threshold: float = THRESHOLD) -> tuple[HeadIndex, ...]:
        """Heads whose mean (``by_set``) is above the threshold, highest first."""
        ranked = self.by_set.top(self.by_set.mean.size)
        return tuple(head for head, value in ranked if value > threshold)

    def recall_grid(self) -> RecallGrid:
        """How often the model answered, by length and depth."""
        return RecallGrid(*self.runs.grid(), self.runs.threshold, self.by_set.provenance)

    def __str__(self) -> str:
        """One sentence."""
        runs = self.runs
        if not runs.scored.any():
            return (
                f"No run was answered well enough to score: 0 of {len(runs.runs)} with recall "
                f"above {runs.threshold:g} (highest: {runs.recall.max():.2f})."
            )
        best = ", ".join(f"{head} {value:.2f}" for head, value in self.by_set.top(5))
        enough = f"{int(runs.counted.sum())} of {len(runs.runs)} runs with recall above "
        where = f"{enough}{runs.threshold:g}"
        if runs.form == "forced":
            where = f"{len(runs.runs)} texts with the answer appended ({where})"
        return f"{self.found()}, in {where}; highest: {best}."

    def found(self) -> str:
        """How many heads copy more than the threshold, and how many of them beyond chance."""
        return copying(self.by_set)

    def hint(self) -> str:
        """What to try where nothing was answered, after some of the replies; else nothing."""
        if self.runs.counted.any():
            return ""
        return "\n".join(
            [
                "Replies:",
                *(f"  {one}" for one in self.runs.samples()),
                _advice(self.runs, self.by_set.provenance.probe.get("needles")),
            ]
        )


@own_types()
def decoded(
    model: HeadModel,
    probe: Probe,
    *,
    null: bool = True,
    new_tokens: int | None = None,
    threshold: int | float = RECALL,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Retrieval:
    """Retrieval scores as published: greedy decoding, and who copies what is said.

    A head copies at a step when the key it attends to most lies among the needle's answer tokens
    and holds the very token that is generated. Runs with recall up to the threshold are left out.

    Args:
        model: the model.
        probe: of kind ``needle``.
        null: read the probe's control too, with its answer appended; all of its runs count.
        new_tokens: steps at most; see :func:`follow`.
        threshold: recall above which a run counts; as published, 0.5.
        batch_size: examples at a time.
        progress: show a bar.

    Raises:
        HeadscopeError: if the model answers no example well enough to count.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> found = decoded(model, probe, null=False)
        >>> found.by_set.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    options: FollowOptions = {
        "new_tokens": new_tokens,
        "threshold": threshold,
        "batch_size": batch_size,
        "progress": progress,
    }
    runs, control = follow_both(model, probe if null else replace(probe, control=None), **options)
    check_answered(model, runs, probe.settings.get("needles"))
    return summarised(model, probe, runs, control)


def check_answered(model: HeadModel, runs: Runs, needles: object = None) -> None:
    """Raise HeadscopeError if no run counts."""
    if not runs.counted.any():
        raise HeadscopeError(
            f"{model.name} answered none of the {len(runs.runs)} examples with recall above "
            f"{runs.threshold:g} (highest: {runs.recall.max():.2f}), so there is nothing to score. "
            f"It said {', '.join(runs.samples())}. {_advice(runs, needles)}"
        )


def _advice(runs: Runs, needles: object) -> str:
    """What to try where no run was answered."""
    tried = [] if needles == "numbers" else ["number needles (needles='numbers')"]
    if runs.chat:
        tried.append("plain text without the chat template (chat=False, --no-chat)")
    elif runs.chat is not None:
        tried.append("a chat model with its chat template")
    tried += ["shorter texts (lengths=)", "fewer distractors (distractors=)"]
    return (
        f"Try {', '.join(tried)}, or the teacher-forced form (--form forced), which also scores "
        "texts that the model does not answer."
    )


def summarised(
    model: HeadModel, probe: Probe, runs: Runs, control: Runs | None = None
) -> Retrieval:
    """Scores of runs that were made before, e.g. cell by cell; all missing where no run counts.

    Args:
        model: that made them.
        probe: of all runs, in their order.
        runs: of :func:`follow`.
        control: runs of the probe's control.
    """

    def scored(
        name: str, value: Callable[[Run], Float[np.ndarray, "layer head"]], most: float | None
    ) -> HeadScores:
        return _scores(model, probe, runs, control, name, value, most)

    return Retrieval(
        by_set=scored("retrieval_set", lambda run: run.by_set, 1.0),
        by_step=scored("retrieval_steps", lambda run: run.by_step, None),
        activation=scored("retrieval_activation", lambda run: run.active, 1.0),
        runs=runs,
    )


_MEANING = {
    "retrieval_set": ("Share of the needle's different tokens that the head copies.", "score"),
    "retrieval_steps": ("Steps at which the head copies, over the needle's length.", "code"),
    "retrieval_activation": ("Share of runs in which the head copies a token.", "activation"),
}


def _scores(
    model: HeadModel,
    probe: Probe,
    runs: Runs,
    control: Runs | None,
    name: str,
    value: Callable[[Run], Float[np.ndarray, "layer head"]],
    most: float | None,
) -> HeadScores:
    there = np.zeros((model.shape.n_layers, model.shape.n_heads), dtype=bool)
    there[tuple(np.transpose(model.shape.heads))] = True

    paired = probe.control is not None and probe.control.paired

    def values(of: Runs) -> Float[np.ndarray, "layer head example"]:
        return np.where(there[..., None], np.stack([value(run) for run in of.runs], -1), np.nan)

    per_example = values(runs)
    missing = np.isnan(per_example[..., runs.scored]).sum(-1) * there
    per_example[..., ~runs.scored] = np.nan
    chance = None if control is None else values(control)
    if chance is not None and paired:
        chance[..., ~runs.scored] = np.nan
    description, what = _MEANING[name]
    return HeadScores.from_examples(
        name,
        per_example,
        kv_heads=model.shape.n_kv_heads,
        control_per_example=chance,
        design=Design(
            paired=paired,
            clusters=probe.cluster_labels,
            control_clusters=None if probe.control is None else probe.control.cluster_labels,
        ),
        missing=missing,
        unit="share",
        bounds=(0.0, most),
        description=description,
        source=_SOURCE.format(what),
        threshold=None if name == "retrieval_activation" else THRESHOLD,
        provenance=origin(
            model,
            probe,
            control=str(probe.settings.get("control")) if probe.control is not None else None,
            form=runs.form,
            runs_counted=int(runs.scored.sum()),
            runs_answered=int(runs.counted.sum()),
            recall_threshold=runs.threshold,
        ),
    )


@own_types()
def forced(
    model: HeadModel,
    probe: Probe,
    *,
    runs: Runs | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Retrieval scores of one forward pass with the answer appended: the scorer ``retrieval``.

    Rows are computed at the positions that predict the answer alone. Each is counted as in the
    published code; where the model would say just the answer, both forms agree.

    Args:
        model: the model.
        probe: of kind ``needle``.
        runs: of :func:`follow`: only examples that count there; default: all.
        batch_size: examples at a time.
        progress: show a bar.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> scores = forced(model, probe)
        >>> scores.name, scores.mean.shape == (model.shape.n_layers, model.shape.n_heads)
        ('retrieval', True)
    """
    scores = score(model, probe, "retrieval", batch_size=batch_size, progress=progress)["retrieval"]
    if runs is None:
        return scores
    kept = np.where(runs.counted, scores.per_example, np.nan)
    return HeadScores.from_examples(
        scores.spec,
        kept,
        kv_heads=scores.kv_heads,
        control_per_example=scores.control_per_example,
        design=scores.design,
        missing=np.asarray(scores.missing),
        provenance=replace(
            scores.provenance,
            probe={**scores.provenance.probe, "runs_counted": int(runs.counted.sum())},
        ),
    )


Activity = Literal["always", "sometimes", "never"]


def by_kv_head(scores: HeadScores, how: Literal["mean", "max"] = "mean") -> HeadScores:
    """The same score per key/value head: mean or largest over the query heads that share it.

    Taken example by example, so that errors and nulls stay honest; what decides about keeping
    keys and values (DuoAttention, HeadKV) is per key/value head.

    Args:
        scores: with values per example.
        how: ``mean``, or ``max`` where one query head is enough to need it.

    Returns:
        A score whose head axis counts key/value heads, named ``<name>_kv``.

    Raises:
        InputError: if the values per example were not kept.

    Example:
        >>> model = hs.load("tiny-llama")
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> scores = hs.score(model, probe, "induction")["induction"]
        >>> by_kv_head(scores).mean.shape == (model.shape.n_layers, model.shape.n_kv_heads)
        True
    """
    if how not in ("mean", "max"):
        raise InputError(f"how={how!r} is unknown: 'mean' or 'max'.")

    def grouped(values: np.ndarray) -> np.ndarray:
        layers, heads, examples = values.shape
        apart = values.reshape(layers, scores.kv_heads, heads // scores.kv_heads, examples)
        if how == "max":
            known = np.where(np.isnan(apart), -np.inf, apart).max(2)
            return np.where(np.isinf(known), np.nan, known)
        count = (~np.isnan(apart)).sum(2)
        total = np.nansum(apart, 2)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    control = scores.control_per_example
    layers, heads = scores.mean.shape
    missing = scores.missing.reshape(layers, scores.kv_heads, heads // scores.kv_heads)
    return HeadScores.from_examples(
        f"{scores.name}_kv",
        grouped(scores.per_example),
        kv_heads=scores.kv_heads,
        control_per_example=None if control is None else grouped(control),
        design=scores.design,
        alternative=scores.alternative,
        missing=missing.max(2),
        unit=scores.unit,
        bounds=scores.bounds,
        description=f"{scores.description.rstrip('.')}, {how} over a key/value head's queries.",
        source=scores.source,
        threshold=scores.threshold,
        provenance=scores.provenance,
    )


def activity(scores: HeadScores, at_least: int | float = 0.0) -> dict[HeadIndex, Activity]:
    """Which heads act in every context, in some, in none (Wu et al. 2024, section 3).

    Args:
        scores: with values per example, e.g. ``Retrieval.activation`` or ``Retrieval.by_set``.
        at_least: a head acts in an example whose value is above this.

    Returns:
        Every head with a value; the source calls those that act sometimes dynamically activated.

    Example:
        >>> found = activity(table["induction"], at_least=1.0)
        >>> len(found), set(found.values())
        (12, {'never'})
    """
    known = ~np.isnan(scores.per_example)
    acts = np.where(known, scores.per_example, -np.inf) > at_least
    found: dict[HeadIndex, Activity] = {}
    for layer, head in zip(*np.nonzero(known.any(-1)), strict=True):
        times, of = int(acts[layer, head].sum()), int(known[layer, head].sum())
        word: Activity = "never" if times == 0 else "always" if times == of else "sometimes"
        found[HeadIndex(int(layer), int(head))] = word
    return found


@dataclass(frozen=True)
class Agreement:
    """Two scores of the same heads.

    Attributes:
        rank_correlation: Spearman's, over all heads, in [-1, 1]; NaN if one score is constant.
        overlap: Jaccard index of the two sets of ``k`` highest heads, in [0, 1].
        k: how many heads.
        largest_difference: between two means of the same head.
    """

    rank_correlation: float
    overlap: float
    k: int
    largest_difference: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"rank correlation {self.rank_correlation:.3f}, overlap of the {self.k} highest heads "
            f"{self.overlap:.2f}, largest difference {self.largest_difference:.3f}"
        )


def agreement(a: HeadScores, b: HeadScores, k: int = 10) -> Agreement:
    """Compare two scores head by head.

    Heads tie where neither form saw them copy; of equals the lowest are taken, in both.

    Raises:
        InputError: if they are not of the same heads.

    Example:
        >>> scores = table["induction"]
        >>> found = agreement(scores, scores, k=3)
        >>> found.overlap, found.largest_difference
        (1.0, 0.0)
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"{a.name} has heads {a.mean.shape}, {b.name} {b.mean.shape}.")
    return Agreement(
        rank_correlation(np.asarray(a.mean), np.asarray(b.mean)),
        top_k_overlap(np.asarray(a.mean), np.asarray(b.mean), k),
        k,
        float(np.nanmax(np.abs(a.mean - b.mean))),
    )
