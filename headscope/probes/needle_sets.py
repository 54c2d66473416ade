"""What a needle prompt is made of: haystacks, and the facts, numbers and chains hidden in them."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from headscope.base.files import read_lines, read_text
from headscope.errors import InputError, nearest

NeedleSource = Iterator["Needle"]


@dataclass(frozen=True)
class Needle:
    """Hidden sentences, a question that only they answer, and the answer.

    Attributes:
        texts: one sentence; several for a chain, of which the last holds the answer, or for
            several values of one key.
        question: what is asked; with ``cloze`` a sentence that the answer completes.
        answer: what is to be said.
        parts: pieces of the answer, each said literally in a text; what heads can copy.
        cloze: whether the answer continues the question.
        asks: for a cloze needle, the same as a question, which a chat model is asked instead.
        lead: how the reply of a chat model begins before the answer, since a chat model restates
            what it was asked; default: the needle's last sentence up to the answer.
    """

    texts: tuple[str, ...]
    question: str
    answer: str
    parts: tuple[str, ...]
    cloze: bool = False
    asks: str = ""
    lead: str = ""

    def __post_init__(self) -> None:
        """Check that the answer can be found."""
        if not self.question.strip() or not self.answer.strip() or not self.texts:
            raise InputError("a needle needs a text, a question and an answer.")
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

    One relation for all needles of an example, different keys and, as long as there are any,
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

    The second number has the digits of the first in another order: a head that looks for equal
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
    """Three magic numbers of one made-up name, in three places, all asked for.

    Those of the second name have the digits of the first name's, in other orders.
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
    """Five digits, at least three of them different, so that there are other orders."""
    while len(set(str(number := rng.randint(10_000, 99_999)))) < 3:
        pass
    return number


def _reordered(number: str, rng: Random) -> str:
    """The same digits in another order, none of them a leading zero."""
    while (other := "".join(rng.sample(number, len(number)))) == number or other[0] == "0":
        pass
    return other


def hops(rng: Random) -> NeedleSource:
    """Two sentences in two places; the second is needed to answer what the first begins."""
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
    """Needles of a fixed list, in order; None for a set whose content is drawn.

    Args:
        source: a name of :data:`NAMES`, a JSONL file, or needles.

    Raises:
        InputError: for an unknown name, or with one sentence for every bad line.
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
    """One object a line: ``{"needle": text or list, "question": ..., "answer": ...}``."""
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
    """Read one object; ``real_needle`` is another name of ``answer`` in published files."""
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
    """Made-up names, all different."""
    syllables = _words()["syllables"]
    names = [start + end for start in syllables["starts"] for end in syllables["ends"]]
    yield from rng.sample(names, len(names))


# A sentence with the white space before it; it ends at a full stop, question or exclamation mark
# (with closing quotes), at a blank line, or with the text.
_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?][\"'\u201d\u2019)\]]*(?=\s|$)|(?=\n\s*\n)|$)", re.DOTALL)


@dataclass(frozen=True)
class Haystack:
    """Sentences, each with the white space before it.

    Attributes:
        name: what messages and provenance call it.
        sentences: in their order.
        ordered: whether the order is that of a text; else every example draws one of its own.
    """

    name: str
    sentences: tuple[str, ...]
    ordered: bool

    def endless(self, rng: Random) -> Iterator[str]:
        """The sentences, from the start again where they end; drawn anew each time if unordered."""
        while True:
            if self.ordered:
                yield from self.sentences
            else:
                yield from rng.sample(self.sentences, len(self.sentences))


def read_haystack(source: str | Path | None) -> Haystack:
    """The bundled sentences, or those of a UTF-8 file or of a folder's ``.txt`` and ``.md`` files.

    Raises:
        InputError: if there is nothing to read.
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
    """Sentences with the white space before each; joined they are the text, its end stripped."""
    found = [match.group() for match in _SENTENCE.finditer(text.rstrip())]
    if found and not found[0][0].isspace():
        found[0] = " " + found[0]  # as where the text starts again
    return tuple(found)
