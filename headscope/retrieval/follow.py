"""Each head's most attended token while a needle is answered, decoded greedily or forced."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions, chunk_bytes, free_cached_memory, is_out_of_memory
from headscope.base.result import Glance, Shown, number
from headscope.capture import check_fits, chunks
from headscope.errors import HeadscopeError, InputError
from headscope.heads import ModelShape
from headscope.models.decoding import decoding, end_tokens, need_continuing
from headscope.models.protocol import Edit, HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Reads, TapView, Texts, at_layers
from headscope.probes.probe import Probe

# Form of a run: decoded greedily, or teacher-forced with the answer appended.
Form = Literal["decoded", "forced"]


@dataclass(frozen=True, eq=False)
class Run:
    """One decoded or teacher-forced example, with each head's copied tokens.

    Attributes:
        tokens: generated tokens; teacher-forced, the answer.
        response: the same as text; ids separated by spaces without a tokenizer.
        recall: share of the answer's words (see :func:`word_recall`) in the response.
        answer: expected answer, as text.
        needle: ids of the needle's answer tokens.
        copied: per step, whether the head's most attended token is among the needle's answer tokens
            and equals that step's token.
        reachable: per step, whether the layer's window includes any of those.
    """

    tokens: tuple[int, ...]
    response: str
    recall: float
    needle: tuple[int, ...]
    copied: Bool[np.ndarray, "step layer head"]
    reachable: Bool[np.ndarray, "step layer"]
    answer: str = ""

    @cached_property
    def by_step(self) -> Float[np.ndarray, "layer head"]:
        """Copied steps over the needle's length; above 1 if the needle is repeated."""
        return self._unless_hidden(self.copied.sum(0) / max(len(self.needle), 1))

    @cached_property
    def by_set(self) -> Float[np.ndarray, "layer head"]:
        """Distinct copied tokens over distinct tokens of the needle; at most 1."""
        different = sorted(set(self.needle))
        steps = {
            token: [i for i, said in enumerate(self.tokens) if said == token] for token in different
        }
        found = [self.copied[at].any(0) for at in steps.values()]
        return self._unless_hidden(np.sum(found, axis=0) / max(len(different), 1))

    @cached_property
    def active(self) -> Float[np.ndarray, "layer head"]:
        """1 if the head copied at least one token."""
        return self._unless_hidden(self.copied.any(0).astype(float))

    def _unless_hidden(
        self, values: Float[np.ndarray, "layer head"]
    ) -> Float[np.ndarray, "layer head"]:
        """NaN in layers whose window hid the needle at every step."""
        seen = np.any(self.reachable, axis=0, keepdims=True).T
        return np.where(seen, values, np.nan)


@dataclass(frozen=True, eq=False, repr=False)
class Runs(Shown):
    """All runs of a probe, in its order.

    Attributes:
        runs: one per example.
        length, depth: length and depth of each example, as requested; NaN if the probe has none.
        threshold: recall above which a run counts.
        form: decoded or forced.
        chat: whether a chat template was used; None: unknown.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> runs = hs.retrieval.follow(model, probe)
        >>> lengths, depths, right, count = runs.grid()
        >>> right.shape, count.tolist()
        ((1, 1), [[1]])
    """

    runs: tuple[Run, ...]
    length: Float[np.ndarray, " example"]
    depth: Float[np.ndarray, " example"]
    threshold: float
    form: Form = "decoded"
    chat: bool | None = None

    @cached_property
    def recall(self) -> Float[np.ndarray, " example"]:
        """Recall of each run."""
        return np.array([run.recall for run in self.runs])

    @cached_property
    def counted(self) -> Bool[np.ndarray, " example"]:
        """Mask of the runs that count as answered."""
        return self.recall > self.threshold

    @cached_property
    def scored(self) -> Bool[np.ndarray, " example"]:
        """Mask of the runs that scores average over: the answered ones; teacher-forced, all."""
        return self.counted if self.form == "decoded" else np.ones_like(self.counted)

    @property
    def accuracy(self) -> float:
        """Share of answered runs."""
        return float(self.counted.mean())

    def glance(self) -> Glance:
        """Responses to the first examples, and what was asked for."""
        return Glance(
            f"runs of {len(self.runs)} examples",
            [f"{self.accuracy:.0%} answered (recall above {self.threshold:g})", self.form],
            ("response", "asked for", "recall"),
            [(one.response, one.answer.strip(), number(one.recall)) for one in self.runs],
            hint="runs.samples(), runs.grid()",
        )

    def samples(self, count: int = 3) -> list[str]:
        """Responses and expected answers of the first runs; long replies are truncated."""
        return [
            f"{_short(run.response)} (asked for: {run.answer.strip()})" for run in self.runs[:count]
        ]

    def grid(
        self,
    ) -> tuple[
        Float[np.ndarray, " length"],
        Float[np.ndarray, " depth"],
        Float[np.ndarray, "length depth"],
        Int[np.ndarray, "length depth"],
    ]:
        """Lengths, depths, share of answered runs per cell (NaN: none), and their number."""
        lengths, row = np.unique(self.length, return_inverse=True)
        depths, column = np.unique(self.depth, return_inverse=True)
        right, count = np.zeros((2, len(lengths), len(depths)))
        np.add.at(right, (row, column), self.counted)
        np.add.at(count, (row, column), 1)
        with np.errstate(invalid="ignore"):
            return lengths, depths, right / count, count.astype(int)


def _short(text: str, most: int = 80) -> str:
    shown = " ".join(text.split())
    return repr(shown if len(shown) <= most else shown[: most - 3] + "...")


# The separator between groups of three digits of a number.
_GROUPED = re.compile(r"(?<=\d)[,'\u202f\u2009](?=\d{3}(?!\d))")


@checked
def word_recall(reference: str, response: str) -> float:
    """ROUGE-1 recall (Lin 2004): share of the reference's words in the response.

    ``sum over words of min(count in reference, count in response) / words of the reference``, in
    [0, 1]; words are runs of letters and digits in lower case. The published retrieval code also
    stems words; here they must match. Digits in groups of three (``48,213``) are one number. 0 for
    an empty reference.

    Args:
        reference: text whose words are looked for.
        response: text that they are looked for in.

    Returns:
        Recall, from 0 to 1.

    Example:
        >>> word_recall("eat a sandwich", "You should eat the sandwich.")
        0.6666666666666666
        >>> word_recall("48213", "It is **48,213**.")
        1.0
    """
    words = (
        re.findall(r"[^\W_]+", _GROUPED.sub("", text.lower())) for text in (reference, response)
    )
    return recall(*words)


def recall(reference: Iterable[Hashable], response: Iterable[Hashable]) -> float:
    """Recall of any items, counted with multiplicity."""
    wanted, said = Counter(reference), Counter(response)
    total = sum(wanted.values())
    return sum((wanted & said).values()) / total if total else 0.0


_TOKENS_PER_PASS = 8192


def each_run(
    model: HeadModel,
    probe: Probe,
    run: Callable[[list[int]], list[Run]],
    *,
    form: Form,
    threshold: int | float,
    options: RunOptions,
) -> Runs:
    """Run examples in batches of equally long prompts, halving a batch when memory runs out.

    Args:
        model: model to run.
        probe: with the mark ``end``.
        run: function from examples to their runs.
        form: decoded or forced.
        threshold: recall above which a run counts.
        options: batch size and progress; by default about 8192 tokens at a time.

    Raises:
        HeadscopeError: if one example does not fit in memory.
    """
    done: dict[int, Run] = {}
    with options.track(len(probe), f"{model.name} answers") as advance:
        for rows in _batches(probe, options):
            waiting = [rows]
            while waiting:
                part = waiting.pop()
                full = False
                try:
                    done |= zip(part, run(part), strict=True)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    full = True
                if full:
                    free_cached_memory()
                    waiting += _halves(part)
                else:
                    advance(len(part))
    unknown = torch.full((len(probe),), torch.nan)
    facts = [probe.facts.get(name, unknown).double().numpy() for name in ("length", "depth")]
    runs = tuple(done[row] for row in range(len(probe)))
    chat = probe.settings.get("chat")
    return Runs(
        runs, facts[0], facts[1], float(threshold), form, None if chat is None else bool(chat)
    )


def need_marks(probe: Probe, *names: str) -> None:
    """Check that every example has tokens with these marks.

    Raises:
        InputError: if an example lacks one.
    """
    for name in names:
        without = (~probe.mark(name).any(1)).nonzero().flatten().tolist()
        if without:
            raise InputError(
                f"example {without[0]} has no token marked {name!r}: make the probe by "
                "probes.needle, or mark them as it does."
            )


def _batches(probe: Probe, options: RunOptions) -> Iterator[list[int]]:
    """Group examples with equally long prompts, so that no padding is needed."""
    lengths = probe.mark("end").int().argmax(1) - probe.first + 1
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        size = options.per_pass(length, _TOKENS_PER_PASS)
        yield from (part.tolist() for part in rows.split(size))


def _halves(rows: list[int]) -> list[list[int]]:
    if len(rows) == 1:
        raise HeadscopeError(
            "one example does not fit in memory: use shorter texts or a device with more memory."
        )
    return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]


# As published: maximum steps of a run, and recall above which it counts.
_STEPS = 50
RECALL = 0.5


class FollowOptions(TypedDict):
    """Options of :func:`follow`."""

    new_tokens: int | None
    threshold: int | float
    batch_size: int | None
    progress: bool | None


@checked
@own_types()
def follow(
    model: HeadModel,
    probe: Probe,
    *,
    new_tokens: int | None = None,
    threshold: int | float = RECALL,
    edits: Sequence[Edit] = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Runs:
    """Decode an answer to every needle, and record which heads attend to what is copied.

    Greedy decoding with a key/value cache; the prompt uses fused attention, and each step computes
    only the newest query's rows, starting with the prompt's last one, which predicts the first
    token. A run stops at an end-of-sequence token of the tokenizer or of the model's generation
    config (where chat models keep the end of a turn), or, without a chat template, at a line break
    after some text: a chat model's reply may have several lines, all of which are searched for the
    answer.

    Args:
        model: the model.
        probe: with the marks ``end`` and ``needle_answer``; tokens after ``end`` are ignored.
        new_tokens: maximum number of steps; default: 50 as published; for needles whose answer
            completes a sentence, which has no natural end, the length of the longest answer (not
            with a chat template, where the model replies in its own words).
        threshold: recall above which a run counts; as published, 0.5.
        edits: head edits, the same for all examples; those with ``scope="decode"`` act after the
            prompt.
        batch_size: examples per batch, of equal length; default: about 8192 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the probe lacks these marks or does not fit the model.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> run = follow(model, probe, new_tokens=2).runs[0]
        >>> run.copied.shape == (len(run.tokens), model.shape.n_layers, model.shape.n_heads)
        True
    """
    return follow_both(
        model,
        replace(probe, control=None),
        new_tokens=new_tokens,
        threshold=threshold,
        edits=edits,
        batch_size=batch_size,
        progress=progress,
    )[0]


@own_types()
def follow_both(
    model: HeadModel,
    probe: Probe,
    *,
    new_tokens: int | None = None,
    threshold: int | float = RECALL,
    edits: Sequence[Edit] = (),
    batch_size: int | None = None,
    progress: bool | None = None,
) -> tuple[Runs, Runs | None]:
    """Runs of a probe and of its control.

    If the control has the same texts with other marks (``control="distractor"``), the same runs
    serve both. In other controls the question does not lead to the answer, so the model would not
    generate it: they are teacher-forced, since otherwise no head could copy by chance. Arguments
    and errors are those of :func:`follow`.
    """
    options = RunOptions(batch_size, progress=progress)
    control = probe.control
    beside = control if control is not None and _same_prompts(probe, control) else None
    need_continuing(model)
    check_fits(model, probe)
    if new_tokens is not None and new_tokens < 1:
        raise InputError(f"new_tokens={new_tokens}: give 1 or more.")
    need_marks(probe, "end", "needle_answer")
    end = probe.mark("end")
    steps = new_tokens or _steps(probe)
    longest = int((end.int().argmax(1) - probe.first).max()) + 1
    if model.shape.n_ctx is not None and longest + steps - 1 > model.shape.n_ctx:
        raise InputError(
            f"{longest} tokens and {steps} steps are more than the {model.shape.n_ctx} that "
            f"{model.name} takes: shorten the probe, or give a smaller new_tokens."
        )
    others: dict[int, Run] = {}

    def run(rows: list[int]) -> list[Run]:
        found = _decode(model, [probe] if beside is None else [probe, beside], rows, steps, edits)
        if beside is not None:
            others.update(zip(rows, found[1], strict=True))
        return found[0]

    runs = each_run(
        model,
        probe,
        run,
        form="decoded",
        threshold=threshold,
        options=options,
    )
    if control is None:
        return runs, None
    if beside is not None:
        return runs, replace(runs, runs=tuple(others[row] for row in range(len(probe))))
    return runs, follow_forced(
        model, control, threshold=threshold, batch_size=batch_size, progress=progress
    )


def _same_prompts(probe: Probe, control: Probe) -> bool:
    """Whether two probes have the same prompts."""
    ends = probe.marks.get("end"), control.marks.get("end")
    return (
        ends[0] is not None
        and ends[1] is not None
        and torch.equal(probe.tokens, control.tokens)
        and torch.equal(probe.real, control.real)
        and torch.equal(ends[0], ends[1])
    )


def _steps(probe: Probe) -> int:
    if probe.settings.get("cloze") and "answer" in probe.marks:
        return int(probe.mark("answer").sum(1).max())
    return _STEPS


@dataclass
class _LookedNewest:
    """Reader of the key that each head's newest query attends to most."""

    position: int
    needles: Bool[Tensor, "probe batch pos"]
    windows: tuple[int | None, ...]
    best: dict[int, Int[Tensor, "batch head"]] = field(default_factory=dict)
    reachable: dict[int, Bool[Tensor, "probe batch"]] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every attention layer."""
        return at_layers(shape, self._on_layer)

    def _on_layer(self, view: TapView) -> None:
        """Store one argmax per head; on ties the first."""
        rows = view.rows(torch.tensor([self.position]))
        self.best[view.layer] = rows.pattern[:, :, 0].argmax(-1)
        if self.windows[view.layer] is not None:
            marked = self.needles[..., : rows.visible.shape[-1]].to(rows.visible.device)
            shown = rows.visible[:, 0, : marked.shape[-1]] & marked
            self.reachable[view.layer] = shown.any(-1)


class _Step(NamedTuple):
    """Tokens generated at one step, and each head's most attended key."""

    said: Int[Tensor, " batch"]
    looked: _LookedNewest


def _decode(
    model: HeadModel, probes: Sequence[Probe], rows: list[int], steps: int, edits: Sequence[Edit]
) -> list[list[Run]]:
    """Decode examples with equally long prompts; runs by probe, for probes with the same texts."""
    probe = probes[0]
    ends = probe.mark("end").int().argmax(1) + 1
    spans = [(row, slice(int(probe.first[row]), int(ends[row]))) for row in rows]
    tokens = torch.stack([probe.tokens[row, span] for row, span in spans])
    needles = torch.stack(
        [
            torch.stack([one.mark("needle_answer")[row, span] for row, span in spans])
            for one in probes
        ]
    )
    text, given = decoding(model), tokens
    taken: list[_Step] = []
    stops = _Stops(model, at_breaks=not probe.settings.get("chat"))
    open_runs = set(range(len(rows)))
    for _ in range(steps):
        looked = _LookedNewest(text.length + given.shape[1] - 1, needles, model.shape.windows)
        logits = text.step(given, reads=looked.reads(model.shape), edits=edits)
        said = logits.argmax(-1).cpu()
        taken.append(_Step(said, looked))
        open_runs -= {i for i in open_runs if stops(int(said[i]), len(taken) - 1)}
        if not open_runs:
            break
        given = said[:, None]
    return [_runs(model, tokens, needles, i, taken, stops) for i in range(len(probes))]


class _Stops:
    """Stopping criterion: end of sequence, or a line break after some text."""

    def __init__(self, model: HeadModel, *, at_breaks: bool = True) -> None:
        self._at_breaks = at_breaks
        self._tokenizer = model.tokenizer
        self._known: dict[int, bool] = {}
        self._ends = end_tokens(model)

    def __call__(self, token: int, step: int) -> bool:
        if token in self._ends:
            return True
        return self._at_breaks and step > 0 and self._breaks(token)

    def _breaks(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = self._tokenizer is not None and "\n" in self._tokenizer.decode(
                [token]
            )
        return self._known[token]


def _runs(
    model: HeadModel,
    prompts: Int[Tensor, "batch pos"],
    needles: Bool[Tensor, "probe batch pos"],
    which: int,
    steps: list[_Step],
    stops: _Stops,
) -> list[Run]:
    """Build each example's run from its steps, judged by one probe's needles."""
    needle = needles[which]
    said = torch.stack([step.said for step in steps])
    copied = np.zeros((len(steps), len(prompts), model.shape.n_layers, model.shape.n_heads), bool)
    reachable = np.ones((len(steps), len(prompts), model.shape.n_layers), bool)
    wanted = prompts.masked_fill(~needle, -1)  # the needle's answer tokens at their positions
    for at, step in enumerate(steps):
        for layer, best in step.looked.best.items():
            keys = best.cpu()
            inside = keys < wanted.shape[1]
            token = wanted.gather(1, keys.clamp_max(wanted.shape[1] - 1)).where(inside, -1)
            copied[at, :, layer] = (token == step.said[:, None]).numpy()
            if layer in step.looked.reachable:
                reachable[at, :, layer] = step.looked.reachable[layer][which].cpu().numpy()
    runs = []
    for row in range(len(prompts)):
        tokens = said[:, row].tolist()
        ends = (at for at, token in enumerate(tokens) if stops(token, at))
        length = next(ends, len(tokens))
        key = prompts[row, needle[row]].tolist()
        reply = reply_to(model, tokens[:length], unbroken(prompts[row], needle[row]))
        runs.append(
            Run(
                tokens=tuple(tokens[:length]),
                response=reply.said,
                recall=reply.recall,
                needle=tuple(key),
                copied=copied[:length, row],
                reachable=reachable[: max(length, 1), row],
                answer=reply.wanted,
            )
        )
    return runs


def unbroken(tokens: Int[Tensor, " pos"], mark: Bool[Tensor, " pos"]) -> list[list[int]]:
    """Tokens of each unbroken run of a mark."""
    at = mark.nonzero().flatten()
    parts = at.tensor_split((at.diff() > 1).nonzero().flatten() + 1)
    return [tokens[part].tolist() for part in parts]


class Reply(NamedTuple):
    """Response and expected answer as text, with the recall."""

    said: str
    wanted: str
    recall: float


def reply_to(model: HeadModel, said: list[int], wanted: list[list[int]]) -> Reply:
    """The response as text, with its recall of the answer."""
    if model.tokenizer is None:
        asked = [token for part in wanted for token in part]
        return Reply(" ".join(map(str, said)), " ".join(map(str, asked)), recall(asked, said))
    response = model.tokenizer.decode(said)
    reference = " ".join(model.tokenizer.decode(part) for part in wanted)
    return Reply(response, reference, word_recall(reference, response))


@own_types()
def follow_forced(
    model: HeadModel,
    probe: Probe,
    *,
    threshold: int | float = RECALL,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Runs:
    """Read every example with its answer, and record which heads would copy each token.

    One fused forward pass per text, with rows only for the queries that predict the answer: the
    teacher-forced form of :func:`headscope.retrieval.follow`, with equal runs if greedy decoding
    gives exactly the answer. A run's ``tokens`` are the answer's; its ``response`` is the model's
    prediction at each of them, given the correct ones before.

    Args:
        model: the model.
        probe: needle probe: with the marks ``end``, ``answering`` and ``needle_answer``.
        threshold: recall above which a run counts as answered; all are scored.
        batch_size: examples per pass, of equal prompts; default: about 8192 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the probe lacks these marks or does not fit the model.
    """
    options = RunOptions(batch_size, progress=progress)
    check_fits(model, probe)
    need_marks(probe, "end", "answering", "needle_answer")
    return each_run(
        model,
        probe,
        lambda rows: _read(model, probe, rows),
        form="forced",
        threshold=threshold,
        options=options,
    )


@dataclass
class _LookedForced:
    """Reader of the key that each head attends to most from some positions."""

    positions: Int[Tensor, " query"]
    needle: Bool[Tensor, "batch pos"]
    windows: tuple[int | None, ...]
    budget: int
    best: dict[int, Int[Tensor, "batch head query"]] = field(default_factory=dict)
    reachable: dict[int, Bool[Tensor, "batch query"]] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every attention layer."""
        return at_layers(shape, self._on_layer)

    def _on_layer(self, view: TapView) -> None:
        """Store one argmax per head and query; on ties the first."""
        batch, length = self.needle.shape
        row = 4 * batch * view.z.shape[2] * length
        best, shown = [], []
        for positions in chunks(self.positions, row, self.budget):
            rows = view.rows(positions)
            best.append(rows.pattern.argmax(-1).cpu())
            if self.windows[view.layer] is not None:
                visible = rows.visible.cpu()
                marked = self.needle[:, None, : visible.shape[-1]]
                shown.append((visible & marked).any(-1))
        self.best[view.layer] = torch.cat(best, 2)
        if shown:
            self.reachable[view.layer] = torch.cat(shown, 1)


def _read(model: HeadModel, probe: Probe, rows: list[int]) -> list[Run]:
    """Read some examples in one pass and build their runs."""
    used = probe.real[rows].any(0).nonzero().flatten()
    columns = slice(int(used[0]), int(used[-1]) + 1)
    tokens, real, targets, answering, needle = (
        values[rows, columns]
        for values in (
            probe.tokens,
            probe.real,
            probe.targets,
            probe.mark("answering"),
            probe.mark("needle_answer"),
        )
    )
    positions = answering.any(0).nonzero().flatten()
    looked = _LookedForced(positions, needle, model.shape.windows, chunk_bytes(model.device, None))
    with torch.no_grad():
        logits = model.run(
            Texts(tokens, real), reads=looked.reads(model.shape), logits_at=positions
        )
    assert logits is not None  # noqa: S101  # they were asked for
    predicted = logits.argmax(-1).cpu()
    runs = []
    for i in range(len(rows)):
        asked = answering[i, positions]
        wanted = targets[i, positions[asked]]
        shape = (len(wanted), model.shape.n_layers)
        copied, reachable = np.zeros((*shape, model.shape.n_heads), bool), np.ones(shape, bool)
        inside = tokens[i].masked_fill(~needle[i], -1)  # the needle's tokens at their positions
        for layer, best in looked.best.items():
            copied[:, layer] = (inside[best[i][:, asked]] == wanted).T.numpy()
            if layer in looked.reachable:
                reachable[:, layer] = looked.reachable[layer][i, asked].numpy()
        said = predicted[i, asked].tolist()
        reply = reply_to(model, said, unbroken(tokens[i], needle[i]))
        key = tuple(tokens[i, needle[i]].tolist())
        runs.append(
            Run(
                tuple(wanted.tolist()),
                reply.said,
                reply.recall,
                key,
                copied,
                reachable,
                reply.wanted,
            )
        )
    return runs
