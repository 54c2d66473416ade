"""Retrieval scores (Wu et al. 2024): decoded as published, and teacher-forced.

Scores over a grid of needles are stored on disk, one atomic file per finished cell of length and
depth.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from headscope.base.arguments import checked
from headscope.base.files import read_part, readable, whole_file, writable_folder
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Listed, Shown, number
from headscope.base.statistics import Design, rank_correlation, top_k_overlap
from headscope.errors import HeadscopeError, InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes import Needle, needle
from headscope.probes.probe import Probe
from headscope.retrieval.follow import (
    RECALL,
    FollowOptions,
    Form,
    Run,
    Runs,
    follow_both,
    follow_forced,
)
from headscope.scoring import score
from headscope.table import HeadScores, RecallGrid
from headscope.table.kinds import copying_summary

if TYPE_CHECKING:
    import pyarrow


_SOURCE = "Wu et al. 2024 (arXiv 2404.15574), {}"
# Mean score from which the source calls a head a retrieval head.
THRESHOLD = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class Retrieval(Shown):
    """Retrieval scores of a probe: means over answered runs, NaN without any.

    In the teacher-forced form all runs count.

    Attributes:
        by_set: as counted in the paper: distinct needle tokens copied over distinct needle tokens,
            at most 1.
        by_step: as counted in the published code: every step that copies, over the needle's length;
            above 1 if the model repeats the needle.
        activation: share of the runs in which the head copies at least one token.
        runs: responses and their recall.
    """

    by_set: HeadScores
    by_step: HeadScores
    activation: HeadScores
    runs: Runs

    def glance(self) -> Glance:
        """The heads that copy most, and how many runs were answered."""
        return Glance(
            "retrieval",
            [str(self)],
            ("head", "by set", "by step", "active"),
            [
                (str(head), *(number(float(one.mean[head])) for one in
                              (self.by_set, self.by_step, self.activation)))
                for head, _ in self.by_set.top(6)
            ],
            notes=self.hint().splitlines(),
            hint="found.heads(), found.runs.samples(), hs.plots.heatmap(found.by_set)",
        )  # fmt: skip

    def heads(self, threshold: float = THRESHOLD) -> tuple[HeadIndex, ...]:
        """Heads whose mean (``by_set``) is above the threshold, highest first."""
        ranked = self.by_set.top(self.by_set.mean.size)
        return tuple(head for head, value in ranked if value > threshold)

    def recall_grid(self) -> RecallGrid:
        """Share of answered runs by length and depth."""
        return RecallGrid(*self.runs.grid(), self.runs.threshold, self.by_set.provenance)

    def __str__(self) -> str:
        """Summary in one sentence."""
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
        """Count the heads above the threshold, and those significantly above chance."""
        return copying_summary(self.by_set)

    def hint(self) -> str:
        """Suggest what to try if nothing was answered, with some replies; otherwise empty."""
        if self.runs.counted.any():
            return ""
        return "\n".join(
            [
                "Replies:",
                *(f"  {one}" for one in self.runs.samples()),
                _advice(self.runs, self.by_set.provenance.probe.get("needles")),
            ]
        )


@checked
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
    """Retrieval scores as published: decode greedily, and count what each head copies.

    A head copies at a step if the key it attends to most is among the needle's answer tokens and
    holds the token that is generated. Runs with recall up to the threshold are left out.

    Args:
        model: the model.
        probe: needle probe.
        null: also run the probe's control, teacher-forced; all of its runs count.
        new_tokens: maximum number of steps; see :func:`follow`.
        threshold: recall above which a run counts; as published, 0.5.
        batch_size: examples per batch.
        progress: show a progress bar.

    Raises:
        HeadscopeError: if no run counts.

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
    """Suggestions for when no run was answered."""
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
    """Scores from existing runs, e.g. collected cell by cell; all missing if no run counts.

    Args:
        model: model that made the runs.
        probe: probe of all runs, in their order.
        runs: from :func:`follow`.
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
    "retrieval_set": ("Share of the needle's distinct tokens that the head copies.", "score"),
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


@checked
@own_types()
def forced(
    model: HeadModel,
    probe: Probe,
    *,
    runs: Runs | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Retrieval scores from one teacher-forced pass: the scorer ``retrieval``.

    Rows are computed only at the positions that predict the answer. Both forms agree for answers
    that the model would generate itself.

    Args:
        model: the model.
        probe: needle probe.
        runs: from :func:`follow`: use only examples that count there; default: all.
        batch_size: examples per pass.
        progress: show a progress bar.

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


@checked
def by_kv_head(scores: HeadScores, how: Literal["mean", "max"] = "mean") -> HeadScores:
    """Aggregate a score per key/value head: mean or maximum over its query heads.

    Aggregated example by example, so that errors and nulls stay valid. Decisions about cached keys
    and values (DuoAttention, HeadKV) are per key/value head.

    Args:
        scores: with values per example.
        how: ``mean``, or ``max`` if a single query head is enough to need the cache.

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


@checked
def activity(scores: HeadScores, at_least: int | float = 0.0) -> dict[HeadIndex, Activity]:
    """Classify heads as active in every context, in some, or in none (Wu et al. 2024, section 3).

    Args:
        scores: with values per example, e.g. ``Retrieval.activation`` or ``Retrieval.by_set``.
        at_least: a head is active in an example whose value is above this.

    Returns:
        Every head with a value; the source calls those that are active sometimes dynamically
        activated.

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


@dataclass(frozen=True, repr=False)
class Agreement(Listed):
    """Agreement of two scores of the same heads.

    Attributes:
        rank_correlation: Spearman's, over all heads, in [-1, 1]; NaN if one score is constant.
        overlap: Jaccard index of the two sets of ``k`` highest heads, in [0, 1].
        k: number of heads in each set.
        largest_difference: largest difference of a head's two means.
    """

    rank_correlation: float
    overlap: float
    k: int
    largest_difference: float

    def __str__(self) -> str:
        """Summary in one line."""
        return (
            f"rank correlation {self.rank_correlation:.3f}, overlap of the {self.k} highest heads "
            f"{self.overlap:.2f}, largest difference {self.largest_difference:.3f}"
        )


@checked
def agreement(a: HeadScores, b: HeadScores, k: int = 10) -> Agreement:
    """Compare two scores head by head.

    Heads that neither form saw copying are tied; among ties the lowest heads are taken in both.

    Args:
        a: first score.
        b: second score, of the same heads.
        k: number of top heads whose overlap is computed.

    Returns:
        Rank correlation, overlap of the top k heads, and the largest difference.

    Raises:
        InputError: if the scores belong to different heads.

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


_FORMAT = 4


class Scanned(NamedTuple):
    """Result of :func:`scan_grid`: scores of all cells together, and their probe."""

    retrieval: Retrieval
    probe: Probe


@checked
def scan_grid(
    model: HeadModel,
    lengths: Sequence[int] | int | None = None,
    depths: Sequence[int | float] | int = 10,
    needles: str | Path | Sequence[Needle] | None = None,
    *,
    form: Form = "decoded",
    folder: str | Path | None = None,
    new_tokens: int | None = None,
    threshold: int | float = RECALL,
    batch_size: int | None = None,
    progress: bool | None = None,
    **probe: Any,
) -> Scanned:
    """Retrieval scores over a grid of lengths and depths, cell by cell; resumable.

    The same as :func:`headscope.retrieval.decoded` of the whole probe; if no run counts, the recall
    is the result and every score is missing. Teacher-forced, every text is read once with its
    answer appended, all count, and the recall is of the model's prediction at each token of the
    answer, given the correct ones before. With a folder every finished cell is stored there under a
    digest of its content (model, tokens, settings): after a crash the same call resumes.

    Args:
        model: from :func:`headscope.load`.
        lengths: as in :func:`headscope.probes.needle`.
        depths: shares, or how many.
        needles: a set, a file, or needles.
        form: ``decoded`` as published, or ``forced``, which also scores texts that the model does
            not answer.
        folder: folder for finished cells; default: none.
        new_tokens: maximum steps of a run; see :func:`headscope.retrieval.follow`.
        threshold: recall above which a run counts.
        batch_size: examples per batch.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.
        probe: other arguments of :func:`headscope.probes.needle`.

    Raises:
        InputError: if an argument is invalid, or the folder cannot be written.

    Example:
        >>> import headscope as hs
        >>> model = hs.load("tiny-llama")
        >>> found, probe = scan_grid(model, lengths=[64, 96], depths=[0, 1], per_cell=1)
        >>> found.recall_grid().share.shape
        (2, 2)
    """
    options = RunOptions(batch_size, progress=progress)
    if form not in ("decoded", "forced"):
        raise InputError(f"form={form!r} is unknown: 'decoded' or 'forced'.")
    if form == "forced" and new_tokens is not None:
        raise InputError("new_tokens is for form='decoded'; 'forced' generates nothing.")
    whole = needle(model, lengths, depths, needles, **probe)
    store = None if folder is None else writable_folder(Path(folder))
    cells = list(_cells(whole))
    longest = max(cells, key=lambda cell: int(whole.real[cell].sum(1).max()))
    known = "" if store is None else model.digest()
    if (
        form == "decoded" and new_tokens is None and whole.settings.get("cloze")
    ):  # as `follow` does for the whole probe
        new_tokens = int(whole.mark("answer").sum(1).max())
    order = sorted(range(len(cells)), key=lambda i: cells[i] != longest)
    done: dict[int, tuple[list[Run], list[Run]]] = {}
    tokens = [int(whole.real[cell].sum()) for cell in cells]
    with options.track(sum(tokens), f"{model.name} looks for needles") as advance:
        for i in order:  # the longest first, so that what does not fit fails at once
            part = whole.examples(cells[i])
            file = (
                None if store is None else store / f"{_name(part, known, form, new_tokens)}.parquet"
            )
            done[i] = _cell(model, part, file, form, new_tokens, options)
            advance(tokens[i])
    limit = float(threshold)
    sizes, places = (whole.facts[name].double().numpy() for name in ("length", "depth"))
    runs, control = (
        Runs(
            tuple(run for i in range(len(cells)) for run in done[i][side]),
            sizes,
            places,
            limit,
            form,
            bool(whole.settings.get("chat")),
        )
        for side in (0, 1)
    )
    return Scanned(summarised(model, whole, runs, control), whole)


def _cells(probe: Probe) -> Iterator[slice]:
    """Examples of each length and depth, which are adjacent."""
    places = list(zip(probe.facts["length"].tolist(), probe.facts["depth"].tolist(), strict=True))
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[start]:
            yield slice(start, end)
            start = end


def _cell(
    model: HeadModel,
    part: Probe,
    file: Path | None,
    form: Form,
    new_tokens: int | None,
    options: RunOptions,
) -> tuple[list[Run], list[Run]]:
    """Runs of one cell and of its control, loaded from disk if finished."""
    if file is not None and file.exists():
        return _read(file)
    size = options.batch_size
    if form == "decoded":
        runs, control = follow_both(
            model, part, new_tokens=new_tokens, batch_size=size, progress=False
        )
    else:
        runs = follow_forced(model, replace(part, control=None), batch_size=size, progress=False)
        control = None
        if part.control is not None:
            control = follow_forced(model, part.control, batch_size=size, progress=False)
    made = (list(runs.runs), [] if control is None else list(control.runs))
    if file is not None:
        from pyarrow import parquet

        with whole_file(file) as target:
            parquet.write_table(_rows(made), target, compression="zstd")
    return made


def _name(part: Probe, model: str, form: Form, new_tokens: int | None) -> str:
    """Digest of everything that the runs of a cell depend on."""
    digest = hashlib.sha256()
    facts = {"format": _FORMAT, "model": model, "form": form, "new_tokens": new_tokens}
    facts |= {name: part.settings.get(name) for name in ("cloze", "chat")}
    facts |= {"answer": part.settings.get("needles")}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for one in (part, part.control):
        if one is None:
            continue
        for row in range(len(one)):  # padding depends on the other cells of the grid
            real = one.real[row]
            pieces = [one.tokens[row], *(one.marks[name][row] for name in sorted(one.marks))]
            for values in pieces:
                digest.update(values[real].numpy().tobytes())
    return digest.hexdigest()[:24]


def _rows(made: tuple[list[Run], list[Run]]) -> "pyarrow.Table":
    import pyarrow

    rows = [
        {
            "control": bool(number),
            "tokens": list(run.tokens),
            "response": run.response,
            "recall": run.recall,
            "answer": run.answer,
            "needle": list(run.needle),
            "copied": np.packbits(run.copied).tobytes(),
            "copied_shape": list(run.copied.shape),
            "reachable": np.packbits(run.reachable).tobytes(),
            "reachable_shape": list(run.reachable.shape),
        }
        for number, runs in enumerate(made)
        for run in runs
    ]
    return pyarrow.Table.from_pylist(rows)


def _read(file: Path) -> tuple[list[Run], list[Run]]:
    made: tuple[list[Run], list[Run]] = ([], [])
    with readable(file):
        for row in read_part(file).to_pylist():
            made[bool(row["control"])].append(_run(row))
    return made


def _run(row: dict[str, Any]) -> Run:
    def bits(name: str) -> np.ndarray:
        shape = [int(size) for size in row[f"{name}_shape"]]
        packed = np.frombuffer(row[name], dtype=np.uint8)
        spare = 8 * packed.size - math.prod(shape)
        if not shape or min(shape) < 0 or not 0 <= spare < 8:
            raise ValueError(f"{packed.size} bytes for {name} of shape {shape}")
        return np.unpackbits(packed, count=math.prod(shape)).astype(bool).reshape(shape)

    return Run(
        tokens=tuple(row["tokens"]),
        response=row["response"],
        recall=row["recall"],
        needle=tuple(row["needle"]),
        copied=bits("copied"),
        reachable=bits("reachable"),
        answer=row["answer"],
    )
