"""Needle-in-a-haystack probes: a sentence hidden in long text, a question, and its answer.

Each prompt consists of haystack, hidden sentences, question and answer, with marks for the tokens
of each.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import accumulate, cycle, islice
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import read_lines, read_text
from headscope.errors import InputError, nearest, whole
from headscope.probes.encoding import (
    HasVocabulary,
    Tokenizer,
    at_positions,
    bos_prefix,
    check_length,
    encode,
    need_onwards,
    pad_right,
)
from headscope.probes.probe import Probe

NeedleSource = Iterator["Needle"]


@dataclass(frozen=True)
class Needle:
    """Hidden sentences, and a question that only they answer.

    Attributes:
        texts: one sentence; several for a chain, of which the last holds the answer, or for several
            values of one key.
        question: the question; with ``cloze`` a sentence that the answer completes.
        answer: expected answer.
        parts: pieces of the answer that occur literally in a text, and so can be copied.
        cloze: whether the answer continues the question.
        asks: for a cloze needle, the same as a question, for chat models.
        lead: how a chat model's reply begins before the answer, since chat models restate the
            question; default: the needle's last sentence up to the answer.
    """

    texts: tuple[str, ...]
    question: str
    answer: str
    parts: tuple[str, ...]
    cloze: bool = False
    asks: str = ""
    lead: str = ""

    def __post_init__(self) -> None:
        """Check that the answer occurs in the needle."""
        if not self.question.strip() or not self.answer.strip() or not self.texts:
            raise InputError("a needle needs a non-empty text, question and answer.")
        for part in self.parts:
            if not any(part in text for text in self.texts):
                raise InputError(
                    f"the answer {part!r} is not said in the needle {self.texts[-1]!r}: write it "
                    "as it stands there."
                )


@cache
def _words() -> dict[str, Any]:
    text = files("headscope.probes").joinpath("data", "needles.json").read_text("utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


def facts(rng: Random) -> NeedleSource:
    """``The code of the red door is seven.``: keys that the bundled models never saw in training.

    All needles of an example share one relation, with different keys and, as far as possible,
    different values.
    """
    words = _words()["facts"]
    keys = [
        f"{colour} {thing}"
        for i, colour in enumerate(words["colours"])
        for j, thing in enumerate(words["objects"])
        if (2 * i + j) % 5 == 0  # held out from the training of the bundled models
    ]
    relation = rng.choice(words["relations"])
    values = rng.sample(words["values"], len(words["values"]))
    for key, value in zip(rng.sample(keys, len(keys)), cycle(values), strict=False):
        question = f"The {relation} of the {key} is"
        yield Needle(
            (f"{question} {value}.",),
            question,
            value,
            (value,),
            cloze=True,
            asks=f"What is the {relation} of the {key}?",
            lead=question,
        )


def numbers(rng: Random) -> NeedleSource:
    """``The magic number of Fenmora is 48213.``: made-up names, random five-digit numbers.

    The second number is a permutation of the first one's digits: a head that looks for equal
    digits, and not for the name, finds as many in either.
    """
    first = str(_number(rng))
    for place, name in enumerate(_names(rng)):
        number = (first, _reordered(first, rng))[place] if place < 2 else str(_number(rng))
        yield Needle(
            (f"The magic number of {name} is {number}.",),
            f"What is the magic number of {name}?",
            number,
            (number,),
            lead=f"The magic number of {name} is",
        )


def several(rng: Random) -> NeedleSource:
    """Three magic numbers of one made-up name, in three places, all to be listed.

    Those of the second name are permutations of the first name's digits.
    """
    first = tuple(str(_number(rng)) for _ in range(3))
    for place, name in enumerate(_names(rng)):
        said = first if place == 0 else tuple(str(_number(rng)) for _ in range(3))
        if place == 1:
            said = tuple(_reordered(number, rng) for number in first)
        yield Needle(
            tuple(f"One of the magic numbers of {name} is {number}." for number in said),
            f"What are the three magic numbers of {name}?",
            f"{said[0]}, {said[1]} and {said[2]}",
            said,
            lead=f"The three magic numbers of {name} are",
        )


def _number(rng: Random) -> int:
    """Five digits, at least three of them different, so that permutations exist."""
    while len(set(str(number := rng.randint(10_000, 99_999)))) < 3:
        pass
    return number


def _reordered(number: str, rng: Random) -> str:
    """Permute the digits without a leading zero."""
    while (other := "".join(rng.sample(number, len(number)))) == number or other[0] == "0":
        pass
    return other


def hops(rng: Random) -> NeedleSource:
    """Two sentences in two places, both of which the answer requires."""
    names = _names(rng)
    for person, town, land in zip(names, names, names, strict=False):
        yield Needle(
            (f"{person} lives in the town of {town}.", f"The town of {town} lies in {land}."),
            f"In which land does {person} live?",
            land,
            (land,),
            lead=f"{person} lives in",
        )


DRAWN: Mapping[str, Callable[[Random], NeedleSource]] = {
    "facts": facts,
    "numbers": numbers,
    "several": several,
    "hops": hops,
}
NAMES = (*DRAWN, "prose")


def fixed_needles(source: str | Path | Sequence[Needle]) -> tuple[Needle, ...] | None:
    """Needles of a fixed list, in order; None if their content is drawn at random.

    Args:
        source: a name in :data:`NAMES`, a JSONL file, or needles.

    Raises:
        InputError: if the name is unknown, or with one sentence per bad line.
    """
    if source == "prose":
        return tuple(_from_mapping(one) for one in _words()["prose"])
    if isinstance(source, str | Path):
        if str(source) in DRAWN:
            return None
        if isinstance(source, str) and not source.endswith(".jsonl") and not Path(source).is_file():
            raise InputError(nearest(source, NAMES, kind="set of needles"))
        return _read_jsonl(Path(source))
    if not source:
        raise InputError("no needles given: name a set, a JSONL file, or give at least one.")
    return tuple(source)


def _read_jsonl(path: Path) -> tuple[Needle, ...]:
    """Read JSON Lines: ``{"needle": text or list, "question": ..., "answer": ...}``."""
    lines = read_lines(path)
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_from_mapping(json.loads(line)))
        except (ValueError, RecursionError) as error:
            wrong.append(f"{path}, line {number}: {error}")
    if wrong:
        raise InputError("\n".join(wrong[:10]))
    if not found:
        raise InputError(f"{path} holds no needle: write one JSON object a line.")
    return tuple(found)


def _from_mapping(fields: Any) -> Needle:
    """Parse one object; ``real_needle`` is an alias of ``answer`` in published files."""
    known = {"needle", "question", "answer", "real_needle"}
    if not isinstance(fields, dict):
        raise InputError('an object {"needle": ..., "question": ..., "answer": ...} is needed.')
    fields = {name: value for name, value in fields.items() if value is not None}
    if unknown := sorted(set(fields) - known):
        raise InputError(nearest(unknown[0], known, kind="field"))
    hidden, question = fields.get("needle"), fields.get("question")
    answer = fields.get("answer", fields.get("real_needle"))
    texts = [hidden] if isinstance(hidden, str) else hidden
    if (
        not isinstance(texts, list)
        or not all(isinstance(one, str) and one.strip() for one in texts)
        or not isinstance(question, str)
        or not isinstance(answer, str)
    ):
        raise InputError("'needle', 'question' and 'answer' must be texts.")
    return Needle(tuple(one.strip() for one in texts), question, answer, (answer.strip(),))


def _names(rng: Random) -> Iterator[str]:
    """Draw made-up names, all different."""
    syllables = _words()["syllables"]
    names = [start + end for start in syllables["starts"] for end in syllables["ends"]]
    yield from rng.sample(names, len(names))


# A sentence with the white space before it. It ends at a full stop, question or exclamation mark
# (with closing quotes), at a blank line, or at the end of the text.
_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?][\"'\u201d\u2019)\]]*(?=\s|$)|(?=\n\s*\n)|$)", re.DOTALL)


@dataclass(frozen=True)
class Haystack:
    """Sentences of filler text, each with the white space before it.

    Attributes:
        name: name for messages and provenance.
        sentences: in their order.
        ordered: whether the order is that of a text; otherwise it is drawn anew for every example.
    """

    name: str
    sentences: tuple[str, ...]
    ordered: bool

    def endless(self, rng: Random) -> Iterator[str]:
        """Repeat the sentences endlessly, in a new order each time if unordered."""
        while True:
            if self.ordered:
                yield from self.sentences
            else:
                yield from rng.sample(self.sentences, len(self.sentences))


def read_haystack(source: str | Path | None) -> Haystack:
    """Read the bundled sentences, a UTF-8 file, or a folder's ``.txt`` and ``.md`` files.

    Raises:
        InputError: if there is no text to read.
    """
    if source is None:
        bundled = files("headscope.probes").joinpath("data", "haystack.txt").read_text("utf-8")
        lines = tuple(f" {line}" for line in bundled.splitlines() if line)
        return Haystack("bundled", lines, ordered=False)
    place = Path(source)
    if place.is_dir():
        paths = sorted(p for p in place.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        if not paths:
            raise InputError(f"the haystack {source} is a folder without .txt or .md files.")
    else:
        paths = [place]
    text = "\n\n".join(read_text(path).replace("\r\n", "\n").strip() for path in paths)
    sentences = split_sentences(text)
    if not sentences:
        raise InputError(f"the haystack {source} holds no sentence.")
    return Haystack(place.name, sentences, ordered=True)


def split_sentences(text: str) -> tuple[str, ...]:
    """Split a text into sentences, each with the white space before it."""
    found = [match.group() for match in _SENTENCE.finditer(text.rstrip())]
    if found and not found[0][0].isspace():
        found[0] = " " + found[0]  # as if the text started again
    return tuple(found)


class Piece(NamedTuple):
    """Part of a text, and the marks that its tokens get."""

    text: str
    marks: tuple[str, ...] = ()


class Assembled(NamedTuple):
    """Token ids, and the positions of each mark in ascending order."""

    ids: list[int]
    marks: dict[str, list[int]]


def assemble(tokenizer: Tokenizer, pieces: Sequence[Piece], prefix: Sequence[int]) -> Assembled:
    """Tokenize the joined pieces and find the tokens of every mark.

    With a fast tokenizer the text is tokenized once, and a token gets a mark if it overlaps an
    unbroken run of pieces with that mark, apart from white space at the run's edges. Without
    character offsets each run of equally marked pieces is tokenized separately and the ids are
    concatenated.

    Args:
        tokenizer: the tokenizer.
        pieces: the text is their concatenation.
        prefix: ids to prepend.
    """
    if getattr(tokenizer, "is_fast", False):
        return _by_offsets(tokenizer, pieces, prefix)
    ids, marks = list(prefix), dict[str, list[int]]()
    for run in _runs(pieces):
        new = tokenizer(run.text, add_special_tokens=False)["input_ids"]
        for mark in run.marks:
            marks.setdefault(mark, []).extend(range(len(ids), len(ids) + len(new)))
        ids += new
    return Assembled(ids, marks)


def _by_offsets(tokenizer: Tokenizer, pieces: Sequence[Piece], prefix: Sequence[int]) -> Assembled:
    encoded = encode(tokenizer, "".join(piece.text for piece in pieces), prefix)
    marks: dict[str, list[int]] = {}
    for mark in dict.fromkeys(name for piece in pieces for name in piece.marks):
        found: set[int] = set()
        start = 0
        for run in _runs([Piece(one.text, (mark,) * (mark in one.marks)) for one in pieces]):
            end = start + len(run.text)
            if run.marks:
                found.update(encoded.covering(start, end))
            start = end
        marks[mark] = sorted(found)
    return Assembled(encoded.ids, marks)


def _runs(pieces: Sequence[Piece]) -> list[Piece]:
    """Merge adjacent pieces with equal marks."""
    runs: list[Piece] = []
    for piece in pieces:
        if runs and runs[-1].marks == piece.marks:
            runs[-1] = Piece(runs[-1].text + piece.text, piece.marks)
        elif piece.text:
            runs.append(piece)
    return runs


# Placeholder for the content while the chat template is applied.
_CONTENT = "\ue000"


@dataclass(frozen=True)
class Placement:
    """What one example hides, and where.

    Attributes:
        needle: the needle; its last text is placed at ``depth``.
        distractors: other needles, at their own places.
        depth: share of the haystack before the needle, 0 to 1.
        places: for every other hidden text, a number in [0, 1) that determines its place.
    """

    needle: Needle
    distractors: tuple[Needle, ...]
    depth: float
    places: tuple[float, ...]


@dataclass(frozen=True)
class NeedleExample:
    """Tokens of a prompt with its answer, and the positions of every mark."""

    ids: list[int]
    marks: dict[str, list[int]]


class Asked(NamedTuple):
    """A question without context: its tokens up to the answer, and the answer's first token."""

    ids: list[int]
    answer: int


class _Written(NamedTuple):
    """A prompt, the same with its answer, and where the answer begins."""

    prompt: Assembled
    whole: Assembled
    answer: int


@dataclass(frozen=True)
class Writer:
    """Writes prompts for one tokenizer.

    Attributes:
        tokenizer: with character offsets, or without (see :func:`assemble`).
        prefix: ids to prepend; none if a chat template adds its own.
        chat: whether to apply the tokenizer's chat template.
    """

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    chat: bool
    _sizes: dict[str, int] = field(default_factory=dict)

    def fit(
        self, sentences: Iterator[str], forms: Sequence[tuple[Placement, Needle]], length: int
    ) -> tuple[str, ...]:
        """Take as many whole sentences as keep every prompt, answer included, within ``length``.

        Args:
            sentences: endless iterator.
            forms: what may be hidden among them, with the needle that is then asked about.
            length: tokens.

        Raises:
            InputError: if the needle, its question and its answer alone are too long.
        """
        bare = max(len(self.write((), *form).ids) for form in forms)
        if bare > length:
            raise InputError(
                f"length={length} does not hold the needle, its distractors, question and answer, "
                f"which are {bare} tokens: ask for longer texts or fewer distractors."
            )
        chosen: list[str] = []
        room = length - bare
        for sentence in sentences:
            room -= max(1, self.size(sentence))
            if room < 0:
                break
            chosen.append(sentence)
        while chosen and max(len(self.write(chosen, *form).ids) for form in forms) > length:
            chosen.pop()  # merges of tokens at sentence boundaries are only counted here
        return tuple(chosen)

    def size(self, sentence: str) -> int:
        """Number of tokens of one sentence on its own."""
        if sentence not in self._sizes:
            ids = self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
            self._sizes[sentence] = len(ids)
        return self._sizes[sentence]

    def write(self, sentences: Sequence[str], plan: Placement, asked: Needle) -> NeedleExample:
        """Write the prompt that asks about ``asked``, with its answer."""
        context = self._context(sentences, plan)
        alone, whole, begin = self._written([*context, *_question(asked, self.chat)], asked)
        whole.marks["answer"] = list(range(begin, len(whole.ids)))
        whole.marks["answering"] = [position - 1 for position in whole.marks["copied"]]
        whole.marks["end"] = [len(alone.ids) - 1]
        return NeedleExample(whole.ids, whole.marks)

    def ask(self, asked: Needle) -> Asked:
        """Write the question without any context, in the same form."""
        _, whole, begin = self._written(_question(asked, self.chat, closed=True), asked)
        begin = self._after_white(whole.ids, begin)
        return Asked(whole.ids[:begin], whole.ids[begin])

    def _written(self, content: list[Piece], asked: Needle) -> _Written:
        """Build a prompt and its answer; in a chat after the opening words of the reply."""
        before, after = self._around()
        content[0] = Piece(content[0].text.lstrip(), content[0].marks)
        prompt = [before, *content, after]
        begun = bool(after.text) and after.text[-1].isspace()
        space = "" if begun else " "
        opening = _opening(asked) if self.chat else ""
        lead = [Piece(space + opening)] if opening else []
        said = _answer(asked, " " if lead else space)
        alone = assemble(self.tokenizer, prompt, self.prefix)
        led = self._continued(alone, prompt, lead)
        whole = self._continued(led, [*prompt, *lead], said)
        begin = len(led.ids)
        return _Written(alone, whole, self._after_white(whole.ids, begin) if lead else begin)

    def _after_white(self, ids: list[int], begin: int) -> int:
        """First position from ``begin`` on whose token is not only white space."""
        texts = self.tokenizer.batch_decode([[one] for one in ids[begin:]])
        return begin + next((i for i, text in enumerate(texts) if text.strip()), 0)

    def _continued(
        self, before: Assembled, pieces: Sequence[Piece], more: Sequence[Piece]
    ) -> Assembled:
        """Tokens of both parts, keeping those of ``before`` whatever the tokenizer would merge."""
        if not more:
            return before
        whole = assemble(self.tokenizer, [*pieces, *more], self.prefix)
        if whole.ids[: len(before.ids)] == before.ids:
            return whole
        return _joined(before, assemble(self.tokenizer, more, ()))

    def _around(self) -> tuple[Piece, Piece]:
        """Text that the chat template puts before and after the content; empty without one."""
        if not self.chat:
            return Piece(""), Piece("")
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTENT}], tokenize=False, add_generation_prompt=True
        )
        parts = str(rendered).split(_CONTENT)
        if len(parts) != 2:
            raise InputError(
                "the chat template does not contain the message exactly once: pass chat=False."
            )
        return Piece(parts[0]), Piece(parts[1])

    def _context(self, sentences: Sequence[str], plan: Placement) -> list[Piece]:
        """The haystack with everything hidden in it."""
        sizes = [0, *accumulate(self.size(sentence) for sentence in sentences)]
        # As published: the place in tokens, moved left to the end of the previous sentence.
        asked_for = bisect_right(sizes, plan.depth * sizes[-1]) - 1
        hidden: dict[int, list[Piece]] = {}
        own = [_hide(text, plan.needle.parts, "needle") for text in plan.needle.texts]
        others = [
            _hide(text, one.parts, "distractor", "rival" if number == 0 else "")
            for number, one in enumerate(plan.distractors)
            for text in one.texts
        ]
        last = own.pop()
        for pieces, place in zip([*own, *others], plan.places, strict=True):
            hidden.setdefault(int(place * len(sizes)), []).extend(pieces)
        here = hidden.setdefault(asked_for, [])
        hidden[asked_for] = [*last, *here] if asked_for == 0 else [*here, *last]
        found = []
        for boundary in range(len(sizes)):
            found += hidden.get(boundary, [])
            if boundary < len(sentences):
                found.append(Piece(sentences[boundary]))
        return found


def _hide(text: str, parts: tuple[str, ...], mark: str, rival: str = "") -> list[Piece]:
    """Pieces of one hidden sentence, with the answer in it marked ``needle_answer``.

    A distractor's answer gets no mark, except for the needle's rival: its marks are ``rival`` and
    ``rival_answer``.
    """
    text = f" {text}"
    marks = (mark, rival) if rival else (mark,)
    answer = f"{rival}_answer" if rival else "needle_answer" if mark == "needle" else ""
    for part in parts if answer else ():
        start, end = _last(part, text)
        if start >= 0:
            inside = Piece(text[start:end], (*marks, answer))
            return [Piece(text[:start], marks), inside, Piece(text[end:], marks)]
    return [Piece(text, marks)]


def _last(part: str, text: str) -> tuple[int, int]:
    """Span of a part's last occurrence in a text, as whole words if possible."""
    words = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)]
    start = words[-1] if words else text.rfind(part)
    spaced = start > 0 and text[start - 1] == " "
    return start - spaced, start + len(part)


def _opening(needle: Needle) -> str:
    """Opening of a reply before the answer: as given, or as in the needle."""
    if needle.lead or needle.cloze:
        return needle.lead or needle.question
    first = needle.parts[0] if needle.parts else ""
    if not first or not needle.answer.startswith(first):
        return ""
    for text in reversed(needle.texts):
        start, _ = _last(first, text)
        if start > 0:
            return re.split(r"(?<=[.!?])\s+", text[:start])[-1].strip()
    return ""


def _question(needle: Needle, chat: bool, *, closed: bool = False) -> list[Piece]:
    """The question; with ``closed`` it does not refer to a text, since there is none."""
    asked = needle.question
    if chat and needle.cloze and needle.asks:
        asked = needle.asks
    elif needle.cloze:
        ask = "Complete the sentence" if closed else "Complete with one word of the text"
        lead = Piece(f"\n\n{ask}: " if chat else " ")
        return [lead, Piece(needle.question, ("question",))]
    ask = "\n\nAnswer with words of the text above. " if chat and not closed else "\n\n"
    return [
        Piece(f"{ask}Question:"),
        Piece(f" {asked}", ("question",)),
        Piece("" if chat else "\nAnswer:"),
    ]


def _answer(needle: Needle, space: str) -> list[Piece]:
    """The answer, with mark ``copied`` on what can be copied from the needle."""
    pieces, rest = [], space + needle.answer
    for part in needle.parts:
        start = rest.find(part)
        if start < 0:
            continue
        lead = start - 1 if start and rest[start - 1] == " " else start
        pieces += [Piece(rest[:lead]), Piece(rest[lead : start + len(part)], ("copied",))]
        rest = rest[start + len(part) :]
    return [piece for piece in (*pieces, Piece(rest)) if piece.text]


def _joined(prompt: Assembled, answer: Assembled) -> Assembled:
    shift = len(prompt.ids)
    moved = {mark: [p + shift for p in found] for mark, found in answer.marks.items()}
    return Assembled([*prompt.ids, *answer.ids], prompt.marks | moved)


class NeedleDraw(NamedTuple):
    """What one example hides and asks; its control uses ``other`` instead."""

    needle: Needle
    distractors: tuple[Needle, ...]
    other: Needle | None


@dataclass(frozen=True)
class Drawer:
    """Draws the needles of one set.

    Attributes:
        source: see :func:`headscope.probes.needle`.
        distractors: requested number; of a fixed list, as many as there are.
        control: use of another needle, which is not in the text: to replace the needle
            (``removed``), or to be asked about; None: not needed.
        seed: seed of random content.
    """

    source: str | Path | Sequence[Needle]
    distractors: int
    control: Literal["removed", "other_question"] | None
    seed: int
    fixed: tuple[Needle, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        """Read the list, if the set is one."""
        object.__setattr__(self, "fixed", fixed_needles(self.source))
        if self.fixed is not None and self.control == "other_question" and len(self.fixed) < 2:
            raise InputError("control='other_question' needs at least two needles; there is one.")

    @property
    def name(self) -> str:
        """Name of the set, for provenance."""
        return Path(self.source).name if isinstance(self.source, str | Path) else "given"

    @property
    def per_cell(self) -> int:
        """Default number of examples per cell."""
        return 2 if self.fixed is None else len(self.fixed)

    def __call__(self, cell: tuple[int, float], number: int) -> NeedleDraw:
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
        return NeedleDraw(needles[0], distractors, self._other(needles, 1 + len(distractors)))

    def _other(self, needles: tuple[Needle, ...], start: int) -> Needle | None:
        """A needle that is not in the text, with as many parts, to replace the first."""
        if self.control is None:
            return None
        if self.control == "other_question":
            return needles[-1]
        alike = (one for one in needles[start:] if len(one.texts) == len(needles[0].texts))
        return next(alike, None)

    def clusters(self, numbers: Sequence[int]) -> Int[Tensor, " batch"] | None:
        """Needle of each example, if some share one; None if all are different."""
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


@checked
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
    """Make needle-in-a-haystack examples over text lengths and needle depths.

    Follows Kamradt's needle test as used by Wu et al. 2024 (arXiv 2404.15574): the haystack is cut
    to as many whole sentences as fit; the needle is inserted at a share ``depth`` of its tokens,
    moved left to the end of a sentence; only the needle contains the answer. Each example is the
    prompt **with its answer appended**, for teacher-forced scores; the prompt alone ends at
    ``end``.

    Marks: ``needle`` (all hidden sentences that the answer needs), ``needle_answer`` (the tokens in
    it that say the answer; what the published code calls the needle), ``distractor``, ``question``,
    ``end`` (last token of the prompt), ``answer`` (appended), ``answering`` (the positions that
    predict those answer tokens which can be copied; teacher-forced scores are means over these). A
    chat model replies in whole sentences, so with a chat template the opening words of such a reply
    stand between ``end`` and ``answer`` ("The magic number of Fenmora is"). Targets are the
    answer's tokens. Facts: ``length`` and ``depth`` as requested, ``place`` (share of the prompt
    before the needle), ``number`` (index of the needle in the cell).

    The control is set by ``control``; it is paired, and a head that ignores what the question asks
    for scores the same in it as in the probe. ``"removed"`` replaces the needle with another of the
    set, asks the same question, which the text no longer answers, and appends the other needle's
    answer. (If the set has no other needle, sentences of the haystack take its place, and the
    tokens at the answer's place are appended.) ``"other_question"`` keeps the text, asks about a
    needle that is not in it, and appends the same answer; after its first token a head that
    continues what it finds scores there too, which the score ``retrieval_first_token`` excludes.
    ``"distractor"`` is the same text and question with the marks ``needle`` and ``needle_answer``
    on a distractor; those of ``numbers`` are permutations of the answer's digits, so that a head
    which looks for equal digits anywhere scores the same there. A head that attends to a fixed
    place does not: the distractor is elsewhere.

    Examples of a fixed set that share a needle form a cluster: errors and tests count needles.

    Args:
        model: its tokenizer encodes the texts.
        lengths: maximum tokens of an example, answer included; default: a quarter, half and all of
            the model's context, up to 1024.
        depths: shares from 0 (start) to 1 (end), or how many of them, evenly spaced.
        needles: ``numbers`` (random numbers of made-up names; the default with a chat template),
            ``facts`` (random key-value facts in the words of the bundled models, as a sentence to
            complete, for a chat model as a question; the default without a template), ``several``
            (three numbers of one name), ``hops`` (a chain of two), ``prose`` (fixed sentences); a
            JSONL file with ``{"needle": text or list, "question": ..., "answer": ...}``; or a list
            of :class:`Needle`. Random content cannot be answered from memory.
        per_cell: examples per length and depth; default: 2 with random content, otherwise all
            needles.
        distractors: number of other needles of the same set in the text (with a fixed set at most
            the rest of it).
        haystack: a UTF-8 file or folder, read in order; default: bundled sentences, in a new order
            for every example.
        control: kind of control, as above; default: ``"other_question"`` for ``numbers`` and
            ``several``, whose digits a control must keep, otherwise ``"removed"``.
        chat: apply the tokenizer's chat template; default: if it has one.
        bos: whether to prepend a BOS; default: as the tokenizer does. Not with ``chat``.
        seed: the same seed gives the same bytes.

    Raises:
        InputError: if an argument is invalid, or a text does not fit the model's context.

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
    """Make a prompt writer for a model, with its chat template if it has one.

    Raises:
        InputError: if the model has no tokenizer or no template, or a BOS is requested with one.
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

    asked: NeedleExample
    control: NeedleExample
    length: int
    depth: float
    number: int
    cloze: bool


def _cells(
    model: HasVocabulary, lengths: Sequence[int] | int | None, depths: Sequence[int | float] | int
) -> list[tuple[int, float]]:
    """All combinations of length and depth."""
    if lengths is None:
        most = min(model.shape.n_ctx or _LONGEST, _LONGEST)
        wanted = [most // 4, most // 2, most]
    else:
        several = lengths if isinstance(lengths, Sequence) else [lengths]
        wanted = [whole(length, "lengths", 1) for length in several]
    if isinstance(depths, int):
        shares = [i / max(depths - 1, 1) for i in range(depths)]
    else:
        shares = [float(depth) for depth in depths]
    if not wanted or not shares or min(wanted) < 1:
        raise InputError("give at least one length of 1 or more, and at least one depth.")
    if not all(0 <= depth <= 1 for depth in shares):
        raise InputError(f"depths={shares}: give shares from 0 to 1.")
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
    """Write one example and its control."""
    length, depth = cell
    drawn = draw(cell, number)
    rng = Random(f"haystack {draw.seed} {cell} {number}")  # noqa: S311 - sentences, not secrets
    hidden = len(drawn.needle.texts) - 1 + sum(len(one.texts) for one in drawn.distractors)
    plan = Placement(
        drawn.needle, drawn.distractors, depth, tuple(rng.random() for _ in range(hidden))
    )
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
    """A needle with the question of another."""
    return replace(
        needle,
        question=question.question,
        cloze=question.cloze,
        asks=question.asks,
        lead=question.lead,
    )


def _of_rival(example: NeedleExample) -> NeedleExample:
    """The same text, with the needle's marks moved to its rival distractor."""
    if "rival_answer" not in example.marks:
        raise InputError(
            "control='distractor' needs a second needle whose answer occurs in its text: give "
            "more needles, or another control."
        )
    moved = {name: example.marks[f"rival{name.removeprefix('needle')}"] for name in _HIDDEN}
    return NeedleExample(example.ids, example.marks | moved)


def _without_needle(
    writer: Writer, example: NeedleExample, sentences: Iterator[str]
) -> NeedleExample:
    """The same example with further haystack sentences in place of the needle and its answer."""
    ids, places = list(example.ids), example.marks["needle"]
    filler: list[int] = []
    while len(filler) < len(places):
        filler += writer.tokenizer(next(sentences), add_special_tokens=False)["input_ids"]
    for place, token in zip(places, filler, strict=False):
        ids[place] = token
    said = example.marks["needle_answer"]
    for number, query in enumerate(example.marks["answering"] if said else []):
        ids[query + 1] = ids[said[number % len(said)]]
    return NeedleExample(ids, example.marks)


def _probe(examples: list[NeedleExample], made: list[_Made]) -> Probe:
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
