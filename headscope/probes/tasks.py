"""Tasks with one-token answers besides IOI: what each prompt says, in plain text.

The sentences are our own, after the tasks of the sources that each function names. A task is an
endless stream of :class:`Pair`; :mod:`headscope.probes.pairs` keeps those that the tokenizer reads
with single-token answers and in equally many tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import NamedTuple

_PERIODS = [
    "war", "siege", "voyage", "reign", "project", "trial", "contract", "drought", "expedition",
    "conflict",
]  # fmt: skip
_NOUNS = {
    "key": "keys", "book": "books", "picture": "pictures", "letter": "letters", "road": "roads",
    "boy": "boys", "girl": "girls", "door": "doors", "friend": "friends", "driver": "drivers",
    "teacher": "teachers", "student": "students", "table": "tables", "house": "houses",
    "river": "rivers", "window": "windows", "doctor": "doctors", "farmer": "farmers",
}  # fmt: skip
_VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
_BETWEEN = ("near", "behind", "beside", "with", "by")
_ARGUMENTS = [
    "load", "size", "file", "last", "name", "path", "mode", "time", "value", "key", "index",
    "data", "test", "user", "text", "line", "count", "start", "end", "result", "node", "table",
    "group", "code", "type", "item", "order", "list",
]  # fmt: skip
_DESCRIBED = [
    "crime", "population", "unit", "dark", "river", "garden", "window", "paper", "water", "summer",
    "stone", "market", "letter", "music",
]  # fmt: skip
_FUNCTIONS = ["port", "match", "find", "read", "build", "check", "open", "move", "save", "split"]
_COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "pink", "purple", "grey"]
_OBJECTS = [
    "pen", "cup", "book", "box", "bag", "ball", "hat", "ring", "lamp", "plate", "coin", "key",
    "chair", "bottle",
]  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens",
    "England": "London", "Austria": "Vienna", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Sweden": "Stockholm", "Norway": "Oslo", "Turkey": "Ankara", "Ireland": "Dublin",
    "Cuba": "Havana", "Peru": "Lima", "Iraq": "Baghdad", "Iran": "Tehran", "Kenya": "Nairobi",
}  # fmt: skip


class Pair(NamedTuple):
    """A prompt, the same with something else in it, and what follows the first.

    Attributes:
        clean, corrupt: texts that differ in some words.
        answer, foil: what follows the clean text, and a wrong alternative, with their spaces.
        flipped: whether after the corrupt text the foil is right and the answer wrong.
        marks: name -> characters of the clean text, end excluded.
    """

    clean: str
    corrupt: str
    answer: str
    foil: str
    flipped: bool
    marks: Mapping[str, tuple[int, int]]


def greater_than(rng: Random) -> Iterator[Pair]:
    """``The war lasted from the year 1732 to the year 17`` -> ``58``, not ``14``.

    Hanna et al. 2023 (arXiv 2305.00586). The corrupt prompt begins in the year 01 of the century,
    after which either is right. Where the tokenizer reads years digit by digit the answer is the
    tens digit. Mark: ``year``, the two digits that the answer must be greater than.
    """
    while True:
        century, start = rng.randint(11, 19), rng.randint(20, 79)
        noun = rng.choice(_PERIODS)
        tens = start // 10
        later, sooner = rng.randint(tens + 1, 9), rng.randint(0, tens - 1)
        text = f"The {noun} lasted from the year {century}{{}} to the year {century}"
        at = text.index("{")
        for more in (f"{rng.randint(0, 9)}", ""):
            yield Pair(
                text.format(start),
                text.format("01"),
                f"{later}{more}",
                f"{sooner}{more}",
                False,
                {"year": (at, at + 2)},
            )


def agreement(rng: Random) -> Iterator[Pair]:
    """``The key near the doors`` -> ``is``, not ``are``.

    Subject-verb agreement past a noun of the other number (Linzen et al. 2016,
    arXiv 1611.01368; with pairs as in Finlayson et al. 2021, arXiv 2106.06087). In the corrupt
    prompt the subject has the other number. Marks: ``subject``, ``attractor``.
    """
    while True:
        subject, other = rng.sample(sorted(_NOUNS), 2)
        plural = rng.random() < 0.5
        forms = (subject, _NOUNS[subject])
        attractor = other if plural else _NOUNS[other]
        between, verbs = rng.choice(_BETWEEN), rng.choice(_VERBS)
        clean, corrupt = (
            f"The {noun} {between} the {attractor}" for noun in (forms[plural], forms[not plural])
        )
        yield Pair(
            clean,
            corrupt,
            verbs[plural],
            verbs[not plural],
            True,
            {"subject": _place(clean, forms[plural]), "attractor": _last(clean, attractor)},
        )


def docstring(rng: Random) -> Iterator[Pair]:
    """A Python function whose docstring names its arguments in order -> the third of them.

    Heimersheim and Janiak 2023 (alignmentforum.org, "A circuit for Python docstrings in a
    4-layer attention-only transformer"). In the corrupt prompt the third and the fourth argument
    change places in the definition. Marks: ``argument`` (the third) and ``other`` (the fourth) in
    the definition, ``documented`` (the second in the docstring).
    """
    while True:
        a, b, c, d = rng.sample(_ARGUMENTS, 4)
        words = rng.sample(_DESCRIBED, 7)
        text = (
            f"def {rng.choice(_FUNCTIONS)}(self, {a}, {b}, {{}}, {{}}):\n"
            f'    """{words[0]} {words[1]} {words[2]}\n\n'
            f"    :param {a}: {words[3]} {words[4]}\n"
            f"    :param {b}: {words[5]} {words[6]}\n"
            "    :param"
        )
        clean = text.format(c, d)
        at = clean.index(f" {c}, {d}") + 1
        yield Pair(
            clean,
            text.format(d, c),
            f" {c}",
            f" {d}",
            True,
            {
                "argument": (at, at + len(c)),
                "other": (at + len(c) + 2, at + len(c) + 2 + len(d)),
                "documented": _last(clean, b, f"param {b}:"),
            },
        )


def colour_objects(rng: Random) -> Iterator[Pair]:
    """``... a red pen, a blue cup and a green book. The colour of the cup is`` -> ``blue``.

    After the coloured objects of BIG-bench, as Merullo et al. 2023 (arXiv 2310.08744) use them. The
    corrupt prompt asks for another of the objects. Marks: ``asked`` (the object asked for),
    ``object`` and ``colour`` where it is told.
    """
    while True:
        colours, objects = rng.sample(_COLOURS, 3), rng.sample(_OBJECTS, 3)
        told = [f"a {colour} {thing}" for colour, thing in zip(colours, objects, strict=True)]
        asked, other = rng.sample(range(3), 2)
        text = (
            f"On the table there is {told[0]}, {told[1]} and {told[2]}. "
            "The color of the {} on the table is"
        )
        clean = text.format(objects[asked])
        start = clean.index(told[asked]) + 2
        end = start + len(colours[asked])
        yield Pair(
            clean,
            text.format(objects[other]),
            f" {colours[asked]}",
            f" {colours[other]}",
            True,
            {
                "asked": _last(clean, objects[asked], f"the {objects[asked]} on"),
                "colour": (start, end),
                "object": (end + 1, end + 1 + len(objects[asked])),
            },
        )


def capital_of(rng: Random) -> Iterator[Pair]:
    """``The capital of France is the city of`` -> ``Paris``, not ``Rome``.

    A fact that is recalled, not read. The corrupt prompt names the foil's country. Mark:
    ``country``.
    """
    forms = (
        "The capital of {} is the city of",
        "The capital city of {} is called",
        "If you travel to the capital of {}, you arrive in",
        "In the capital of {}, the city of",
    )
    while True:
        country, other = rng.sample(sorted(CAPITALS), 2)
        form = rng.choice(forms)
        clean = form.format(country)
        yield Pair(
            clean,
            form.format(other),
            f" {CAPITALS[country]}",
            f" {CAPITALS[other]}",
            True,
            {"country": _place(clean, country)},
        )


TASKS: Mapping[str, Callable[[Random], Iterator[Pair]]] = {
    "greater_than": greater_than,
    "agreement": agreement,
    "docstring": docstring,
    "colour_objects": colour_objects,
    "capital_of": capital_of,
}


def _place(text: str, word: str) -> tuple[int, int]:
    start = text.index(f" {word}") + 1
    return start, start + len(word)


def _last(text: str, word: str, within: str = "") -> tuple[int, int]:
    """Where a word last stands, as part of ``within``."""
    whole = within or word
    start = text.rindex(whole) + whole.index(word)
    return start, start + len(word)
