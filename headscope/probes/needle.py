"""A needle in a haystack: a sentence hidden in long text, a question, and its answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.errors import InputError
from headscope.probes.encoding import at_positions, pad_right
from headscope.probes.needle_layout import Example, Plan, Writer
from headscope.probes.needle_sets import DRAWN, Haystack, Needle, fixed_needles, read_haystack
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import HasVocabulary, bos_prefix, check_length, need_onwards


class Drawn(NamedTuple):
    """What one example hides and asks; its control hides, or asks about, ``other`` instead."""

    needle: Needle
    distractors: tuple[Needle, ...]
    other: Needle | None


@dataclass(frozen=True)
class Drawer:
    """Draws needles of one set.

    Attributes:
        source: as ``probes.needle`` takes it.
        distractors: how many are wanted; of a fixed list, as many as there are.
        control: what another needle, which is not in the text, is for: to be put in the
            needle's place (``removed``), or to be asked about; None: for nothing.
        seed: of random content.
    """

    source: str | Path | Sequence[Needle]
    distractors: int
    control: Literal["removed", "other_question"] | None
    seed: int
    fixed: tuple[Needle, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        """Read the list, if it is one."""
        object.__setattr__(self, "fixed", fixed_needles(self.source))
        if self.fixed is not None and self.control == "other_question" and len(self.fixed) < 2:
            raise InputError("control='other_question' needs two needles at least; there is one.")

    @property
    def name(self) -> str:
        """What provenance calls the set."""
        return Path(self.source).name if isinstance(self.source, str | Path) else "given"

    @property
    def per_cell(self) -> int:
        """Examples of a cell unless the caller says otherwise."""
        return 2 if self.fixed is None else len(self.fixed)

    def __call__(self, cell: tuple[int, float], number: int) -> Drawn:
        """What example ``number`` of a cell (length, depth) hides."""
        if self.fixed is None:
            rng = Random(f"needle {self.seed} {cell} {number}")  # noqa: S311 - words, not secrets
            drawn = DRAWN[str(self.source)](rng)
            count = 1 + self.distractors + (self.control is not None)
            needles = tuple(islice(drawn, count))
            if len(needles) < count:
                raise InputError(f"the set {self.name!r} has no {self.distractors} distractors.")
        else:
            start = number % len(self.fixed)
            needles = self.fixed[start:] + self.fixed[:start]
        asks = self.control == "other_question"
        distractors = needles[1 : len(needles) - asks][: self.distractors]
        return Drawn(needles[0], distractors, self._other(needles, 1 + len(distractors)))

    def _other(self, needles: tuple[Needle, ...], start: int) -> Needle | None:
        """A needle that is not in the text; to stand in the first one's place, of as many parts."""
        if self.control is None:
            return None
        if self.control == "other_question":
            return needles[-1]
        alike = (one for one in needles[start:] if len(one.texts) == len(needles[0].texts))
        return next(alike, None)

    def clusters(self, numbers: Sequence[int]) -> Int[Tensor, " batch"] | None:
        """Which needle each example has, where some share one; drawn needles are all different."""
        if self.fixed is None:
            return None
        which = [number % len(self.fixed) for number in numbers]
        return torch.tensor(which) if len(set(which)) < len(which) else None


Control = Literal["removed", "other_question", "distractor"]
# Sets whose answers share tokens with other needles: their control keeps the text.
_MATCHED = ("numbers", "several")
_MARKS = ("needle", "needle_answer", "distractor", "question", "answer", "answering", "end")
_HIDDEN = ("needle", "needle_answer")
_LONGEST = 1024


def needle(
    model: HasVocabulary,
    lengths: Sequence[int] | int | None = None,
    depths: Sequence[int | float] | int = 5,
    needles: str | Path | Sequence[Needle] | None = None,
    *,
    per_cell: int | None = None,
    distractors: int = 3,
    haystack: str | Path | None = None,
    control: Control | None = None,
    chat: bool | None = None,
    bos: bool | None = None,
    seed: int = 0,
) -> Probe:
    """Sentences hidden at several depths of texts of several lengths, and questions about them.

    After Kamradt's needle test as Wu et al. 2024 (arXiv 2404.15574) use it: of each haystack as
    many whole sentences as fit; the needle stands at a share ``depth`` of their tokens, moved
    left to the end of a sentence; the answer is only in the needle. Each example is the prompt
    **with its answer appended**, for teacher-forced scores; the prompt alone ends at ``end``.

    Marks: ``needle`` (all hidden sentences that the answer needs), ``needle_answer`` (the tokens
    in it that say the answer; what the published code calls the needle), ``distractor``,
    ``question``, ``end`` (last token of the prompt), ``answer`` (appended), ``answering`` (the
    positions that predict those answer tokens which can be copied; teacher-forced scores are
    means over these). A chat model replies in whole sentences, so with a chat template the words
    that such a reply begins with stand between ``end`` and ``answer`` ("The magic number of
    Fenmora is"). Targets are the answer's tokens. Facts: ``length`` and ``depth`` as asked
    for, ``place`` (share of the prompt before the needle), ``number`` (which needle of the cell).

    The control is what ``control`` says; it is paired, and in it a head that does not look for
    what the question asks for scores what it scores in the probe. ``"removed"`` puts another needle
    of the set in the needle's place, asks the same question, which the text no longer answers,
    and appends the other needle's answer. (Of a set without another needle, sentences of the
    haystack stand there, and the tokens at the answer's place are appended.) ``"other_question"``
    keeps the text, asks about a needle that is not in it, and appends the same answer; behind its
    first token a head that continues what it finds scores there too, which the score
    ``retrieval_first_token`` leaves out.
    ``"distractor"`` is the same text and question with the marks ``needle`` and ``needle_answer``
    on a distractor; those of ``numbers`` have the answer's digits in another order, so that a
    head which looks for equal digits, wherever they stand, scores the same there. A head that
    looks at a fixed place does not: the distractor stands elsewhere.

    Examples of a fixed set that share a needle are a cluster: errors and tests count needles.

    Args:
        model: whose tokenizer reads the texts.
        lengths: tokens of an example, answer included, at most; default: a quarter, half and all
            of what the model reads, up to 1024.
        depths: shares from 0 (start) to 1 (end), or how many of them, evenly spaced.
        needles: ``numbers`` (random numbers of made-up names; the default with a chat template),
            ``facts`` (random key-value facts in the words of the bundled models, as a sentence to
            complete, for a chat model as a question; the default without a template), ``several``
            (three numbers of one name), ``hops`` (a chain of two), ``prose`` (fixed sentences);
            a JSONL file with ``{"needle": text or list, "question": ..., "answer": ...}``; or
            a list of :class:`Needle`. Random content cannot be answered from memory.
        per_cell: examples per length and depth; default: 2 with random content, else all needles.
        distractors: other needles of the same set in the text (with a fixed set at most the
            rest of it).
        haystack: a UTF-8 file or folder, read in order; default: bundled sentences, drawn anew
            for every example.
        control: see above; default: ``"other_question"`` for ``numbers`` and ``several``, whose
            digits a control must keep, else ``"removed"``.
        chat: lay the tokenizer's chat template around the prompt; default: if it has one.
        bos: whether a BOS stands in front; default: as the tokenizer does. Not with ``chat``.
        seed: the same seed gives the same bytes.

    Raises:
        InputError: if an argument makes no sense, or a text does not fit the model.

    Example:
        >>> import headscope as hs
        >>> probe = needle(hs.load(), lengths=96, depths=[0.5], per_cell=1)
        >>> int(probe.mark("needle_answer").sum())
        1
    """
    cells = _cells(model, lengths, depths)
    if control not in (None, "removed", "other_question", "distractor"):
        raise InputError(
            f"control={control!r} is unknown: 'removed', 'other_question' or 'distractor'."
        )
    if distractors < 0 or (per_cell is not None and per_cell < 1):
        raise InputError("distractors must be 0 or more, per_cell 1 or more.")
    if control == "distractor" and distractors == 0:
        raise InputError("control='distractor' needs a distractor: give distractors=1 or more.")
    writer = writer_for(model, chat, bos)
    tokenizer, chat = writer.tokenizer, writer.chat
    need_onwards(model, "a needle probe")
    hay = read_haystack(haystack)
    if needles is None:
        needles = "numbers" if chat else "facts"
    if control is None:
        control = "other_question" if needles in _MATCHED else "removed"
    draw = Drawer(needles, distractors, None if control == "distractor" else control, seed)
    made = [
        _example(writer, hay, draw, cell, number, control)
        for cell in cells
        for number in range(per_cell or draw.per_cell)
    ]
    settings: dict[str, str | int | float | bool | None] = {
        "needles": draw.name,
        "haystack": hay.name,
        "lengths": ",".join(str(n) for n in dict.fromkeys(length for length, _ in cells)),
        "depths": ",".join(f"{d:g}" for d in dict.fromkeys(depth for _, depth in cells)),
        "distractors": distractors,
        "control": control,
        "chat": chat,
        "bos": bool(writer.prefix),
        "spans": "offsets" if getattr(tokenizer, "is_fast", False) else "concatenated",
        "cloze": any(one.cloze for one in made) and not chat,
    }
    probe = replace(_probe([one.asked for one in made], made), seed=seed, settings=settings)
    check_length(model, probe.length, what="a needle prompt", fix="ask for shorter lengths")
    other = _probe([one.control for one in made], made)
    clusters = draw.clusters([one.number for one in made])
    other = replace(
        other, name="needle_control", seed=seed, settings=settings, clusters=clusters, paired=True
    )
    return replace(probe, control=other, clusters=clusters)


def writer_for(model: HasVocabulary, chat: bool | None, bos: bool | None) -> Writer:
    """Write prompts for a model, in its chat template if it has one or that is asked for.

    Raises:
        InputError: if there is no tokenizer or no template, or a BOS is asked for beside it.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"a needle probe needs a tokenizer and {model.name} has none.")
    templated = bool(getattr(tokenizer, "chat_template", None))
    chat = templated if chat is None else chat
    if chat and not templated:
        raise InputError(
            f"the tokenizer of {model.name} has no chat template: leave chat=True out."
        )
    if chat and bos is not None:
        raise InputError("with chat=True the chat template decides about a BOS: leave bos out.")
    return Writer(tokenizer, () if chat else tuple(bos_prefix(model, bos)), chat)


class _Made(NamedTuple):
    """One example, its control, and the cell that it belongs to."""

    asked: Example
    control: Example
    length: int
    depth: float
    number: int
    cloze: bool


def _cells(
    model: HasVocabulary, lengths: Sequence[int] | int | None, depths: Sequence[int | float] | int
) -> list[tuple[int, float]]:
    """Every length with every depth."""
    if lengths is None:
        most = min(model.shape.n_ctx or _LONGEST, _LONGEST)
        wanted = [most // 4, most // 2, most]
    else:
        wanted = [lengths] if isinstance(lengths, int) else [int(n) for n in lengths]
    if isinstance(depths, int):
        shares = [i / max(depths - 1, 1) for i in range(depths)]
    else:
        shares = [float(depth) for depth in depths]
    if not wanted or not shares or min(wanted) < 1:
        raise InputError("give at least one length of 1 or more, and at least one depth.")
    if not all(0 <= depth <= 1 for depth in shares):
        raise InputError(f"depths are shares from 0 to 1; got {shares}.")
    check_length(model, max(wanted), what="a needle prompt", fix="ask for shorter lengths")
    return [(length, depth) for length in wanted for depth in shares]


def _example(
    writer: Writer,
    hay: Haystack,
    draw: Drawer,
    cell: tuple[int, float],
    number: int,
    control: Control,
) -> _Made:
    """One example and its control."""
    length, depth = cell
    drawn = draw(cell, number)
    rng = Random(f"haystack {draw.seed} {cell} {number}")  # noqa: S311 - sentences, not secrets
    hidden = len(drawn.needle.texts) - 1 + sum(len(one.texts) for one in drawn.distractors)
    plan = Plan(drawn.needle, drawn.distractors, depth, tuple(rng.random() for _ in range(hidden)))
    forms = [(plan, drawn.needle)]
    if drawn.other is not None and control == "removed":
        hidden_instead = _asking(drawn.other, drawn.needle)
        forms.append((replace(plan, needle=hidden_instead), hidden_instead))
    elif drawn.other is not None:
        forms.append((plan, _asking(drawn.needle, drawn.other)))
    sentences = hay.endless(rng)
    chosen = writer.fit(sentences, forms, length)
    example, *others = (writer.write(chosen, *form) for form in forms)
    if others:
        (other,) = others
    elif control == "distractor":
        other = _of_rival(example)
    else:
        other = _without_needle(writer, example, sentences)
    return _Made(example, other, length, depth, number, drawn.needle.cloze)


def _asking(needle: Needle, question: Needle) -> Needle:
    """A needle under the question of another."""
    return replace(
        needle,
        question=question.question,
        cloze=question.cloze,
        asks=question.asks,
        lead=question.lead,
    )


def _of_rival(example: Example) -> Example:
    """The same text, with the needle's marks on the distractor that is its rival."""
    if "rival_answer" not in example.marks:
        raise InputError(
            "control='distractor' needs a second needle, whose answer is said in its text: give "
            "more needles, or another control."
        )
    moved = {name: example.marks[f"rival{name.removeprefix('needle')}"] for name in _HIDDEN}
    return Example(example.ids, example.marks | moved)


def _without_needle(writer: Writer, example: Example, sentences: Iterator[str]) -> Example:
    """The same with the tokens of further sentences where the needle stood, and in its answer."""
    ids, places = list(example.ids), example.marks["needle"]
    filler: list[int] = []
    while len(filler) < len(places):
        filler += writer.tokenizer(next(sentences), add_special_tokens=False)["input_ids"]
    for place, token in zip(places, filler, strict=False):
        ids[place] = token
    said = example.marks["needle_answer"]
    for number, query in enumerate(example.marks["answering"] if said else []):
        ids[query + 1] = ids[said[number % len(said)]]
    return Example(ids, example.marks)


def _probe(examples: list[Example], made: list[_Made]) -> Probe:
    tokens, real = pad_right([one.ids for one in examples])
    targets = torch.full_like(tokens, -1)
    for row, ids, example in zip(targets, tokens, examples, strict=True):
        at = torch.tensor(example.marks["answer"])
        row[at - 1] = ids[at]
    places = [min(one.marks["needle"]) / max(one.marks["end"]) for one in examples]
    facts = {
        "length": [float(one.length) for one in made],
        "depth": [one.depth for one in made],
        "place": places,
        "number": [float(one.number) for one in made],
    }
    return Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=targets,
        marks={
            name: at_positions(tokens.shape[1], [one.marks.get(name, []) for one in examples])
            for name in _MARKS
        },
        facts={name: torch.tensor(values) for name, values in facts.items()},
        name="needle",
    )
