"""One needle prompt: haystack, hidden sentences, question and answer, with the tokens of each."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from headscope.errors import InputError
from headscope.probes.encoding import encode
from headscope.probes.needle_sets import Needle
from headscope.probes.vocabulary import Tokenizer


class Piece(NamedTuple):
    """A part of a text and the names of the sets that its tokens belong to."""

    text: str
    marks: tuple[str, ...] = ()


class Assembled(NamedTuple):
    """Token ids, and the positions of each mark in rising order."""

    ids: list[int]
    marks: dict[str, list[int]]


def assemble(tokenizer: Tokenizer, pieces: Sequence[Piece], prefix: Sequence[int]) -> Assembled:
    """Tokenize the joined pieces and find the tokens of every mark.

    With a fast tokenizer the text is tokenized once, and a token has a mark if it holds a character
    of an unbroken run of pieces that have it, white space at the run's edges aside. Without
    character offsets each run of equally marked pieces is tokenized by itself and the ids are
    joined.

    Args:
        tokenizer: reads the text.
        pieces: the text is what they are joined.
        prefix: ids in front.
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
    """Neighbours of equal marks as one piece."""
    runs: list[Piece] = []
    for piece in pieces:
        if runs and runs[-1].marks == piece.marks:
            runs[-1] = Piece(runs[-1].text + piece.text, piece.marks)
        elif piece.text:
            runs.append(piece)
    return runs


# Stands for the content while the chat template is laid around it.
_CONTENT = "\ue000"


@dataclass(frozen=True)
class Plan:
    """What one example hides, and where.

    Attributes:
        needle: the needle; its last text stands at ``depth``.
        distractors: other needles, at places of their own.
        depth: share of the haystack that stands before the needle, 0 to 1.
        places: for every other hidden text, a number in [0, 1) that becomes its place.
    """

    needle: Needle
    distractors: tuple[Needle, ...]
    depth: float
    places: tuple[float, ...]


@dataclass(frozen=True)
class Example:
    """Tokens of a prompt with its answer appended, and the positions of every mark."""

    ids: list[int]
    marks: dict[str, list[int]]


class Asked(NamedTuple):
    """A question by itself: its tokens up to where the answer begins, and the answer's first."""

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
        prefix: ids in front; none where a chat template brings its own.
        chat: whether the tokenizer's chat template is laid around the prompt.
    """

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    chat: bool
    _sizes: dict[str, int] = field(default_factory=dict)

    def fit(
        self, sentences: Iterator[str], forms: Sequence[tuple[Plan, Needle]], length: int
    ) -> tuple[str, ...]:
        """As many whole sentences as keep every prompt, answer included, within ``length``.

        Args:
            sentences: endless.
            forms: what may be hidden among them, with what is then asked about.
            length: tokens.

        Raises:
            InputError: if not even the needle, its question and its answer fit.
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
            chosen.pop()  # tokens at the seams are counted with their neighbours only here
        return tuple(chosen)

    def size(self, sentence: str) -> int:
        """Tokens of one sentence by itself."""
        if sentence not in self._sizes:
            ids = self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
            self._sizes[sentence] = len(ids)
        return self._sizes[sentence]

    def write(self, sentences: Sequence[str], plan: Plan, asked: Needle) -> Example:
        """The prompt that asks about ``asked``, with its answer."""
        context = self._context(sentences, plan)
        alone, whole, begin = self._written([*context, *_question(asked, self.chat)], asked)
        whole.marks["answer"] = list(range(begin, len(whole.ids)))
        whole.marks["answering"] = [position - 1 for position in whole.marks["copied"]]
        whole.marks["end"] = [len(alone.ids) - 1]
        return Example(whole.ids, whole.marks)

    def ask(self, asked: Needle) -> Asked:
        """The question without any text, asked in the same way."""
        _, whole, begin = self._written(_question(asked, self.chat, closed=True), asked)
        begin = self._after_white(whole.ids, begin)
        return Asked(whole.ids[:begin], whole.ids[begin])

    def _written(self, content: list[Piece], asked: Needle) -> _Written:
        """A prompt and its answer; in a chat after the words that the reply begins with."""
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
        """The first position from ``begin`` on whose token is more than white space."""
        texts = self.tokenizer.batch_decode([[one] for one in ids[begin:]])
        return begin + next((i for i, text in enumerate(texts) if text.strip()), 0)

    def _continued(
        self, before: Assembled, pieces: Sequence[Piece], more: Sequence[Piece]
    ) -> Assembled:
        """Tokens of both; those of ``before`` stay as they are, whatever the tokenizer would do."""
        if not more:
            return before
        whole = assemble(self.tokenizer, [*pieces, *more], self.prefix)
        if whole.ids[: len(before.ids)] == before.ids:
            return whole
        return _joined(before, assemble(self.tokenizer, more, ()))

    def _around(self) -> tuple[Piece, Piece]:
        """What the chat template puts before and after the content; nothing without one."""
        if not self.chat:
            return Piece(""), Piece("")
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTENT}], tokenize=False, add_generation_prompt=True
        )
        parts = str(rendered).split(_CONTENT)
        if len(parts) != 2:
            raise InputError("the chat template does not say the message once: pass chat=False.")
        return Piece(parts[0]), Piece(parts[1])

    def _context(self, sentences: Sequence[str], plan: Plan) -> list[Piece]:
        """The haystack with everything hidden in it."""
        sizes = [0, *accumulate(self.size(sentence) for sentence in sentences)]
        # As published: the place in tokens, moved left to where the last sentence ended.
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
    """One hidden sentence; the piece of the answer in it is marked ``needle_answer`` too.

    A distractor has no mark for its answer, but for the one that is the needle's rival: its marks
    are ``rival`` and ``rival_answer``.
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
    """Where a part last stands in a text, as whole words if it does, with the space before it."""
    words = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)]
    start = words[-1] if words else text.rfind(part)
    spaced = start > 0 and text[start - 1] == " "
    return start - spaced, start + len(part)


def _opening(needle: Needle) -> str:
    """How a reply begins that says the answer: as given, or as the needle says it."""
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
    """What asks for the answer; ``closed``: without words about a text, since there is none."""
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
    """The answer, and in it what can be copied from the needle (mark ``copied``)."""
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
