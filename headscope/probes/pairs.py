"""Clean and corrupt prompt pairs with one-token answers, by task: IOI and others.

The sentences are our own, modelled on the tasks of the sources that each function names. A task is
an endless stream of :class:`Pair`; :func:`pairs` keeps those that the tokenizer encodes with
single-token answers and equal lengths. The prompts of IOI ("When Mary and John went to the store,
John gave a drink to" -> Mary; Wang et al. 2022, arXiv 2211.00593) use only names, places and
objects that are single tokens in the sentence, so that all prompts of one template have one length.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError, nearest, whole
from headscope.probes.encoding import (
    Encoded,
    HasVocabulary,
    Tokenizer,
    at_positions,
    bos_prefix,
    check_length,
    encode,
    need_onwards,
    need_tokenizer,
    pad_right,
)
from headscope.probes.probe import Probe

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
    """A clean and a corrupt prompt, with the answer and a wrong alternative.

    Attributes:
        clean, corrupt: texts that differ in some words.
        answer, foil: continuation of the clean text, and a wrong alternative, with leading spaces.
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

    Hanna et al. 2023 (arXiv 2305.00586). The corrupt prompt starts in the year 01 of the century,
    after which either is right. If the tokenizer splits years into digits, the answer is the tens
    digit. Mark: ``year``, the two digits that the answer must exceed.
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
    """A Python function whose docstring lists its arguments in order -> the third of them.

    Heimersheim and Janiak 2023 (alignmentforum.org, "A circuit for Python docstrings in a 4-layer
    attention-only transformer"). In the corrupt prompt the third and the fourth argument are
    swapped in the definition. Marks: ``argument`` (the third) and ``other`` (the fourth) in the
    definition, ``documented`` (the second in the docstring).
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

    Modelled on the coloured objects of BIG-bench, as used by Merullo et al. 2023 (arXiv
    2310.08744). The corrupt prompt asks for another of the objects. Marks: ``asked`` (the object
    asked for), ``object`` and ``colour`` in the list.
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

    Factual recall: the answer is not in the prompt. The corrupt prompt names the foil's country.
    Mark: ``country``.
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
    """Span of a word's last occurrence, within ``within``."""
    whole = within or word
    start = text.rindex(whole) + whole.index(word)
    return start, start + len(word)


Corruption = Literal["flip", "third"]

_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {gift} to {io}",
    "After {a} and {b} went to the {place}, {s} handed a {gift} to {io}",
    "While {a} and {b} rested at the {place}, {s} offered a {gift} to {io}",
    "When {a} and {b} returned to the {place}, {s} brought a {gift} to {io}",
    "After {a} and {b} walked to the {place}, {s} sent a {gift} to {io}",
    "While {a} and {b} worked at the {place}, {s} gave a {gift} to {io}",
)
_WORDS = {
    "names": """
        Mary Anna Emma Alice Sarah Laura Julia Kate Lucy Grace Ruth Jane Clara Rosa Helen Amy
        Susan Linda Karen Lisa John Tom James Peter Paul Mark David Simon Henry Jack Adam Max
        Victor Luke Sam Michael Robert Daniel Kevin Brian
    """,
    "places": """
        store park school market station library hospital office church river kitchen museum farm
    """,
    "gifts": """
        drink letter flower present ticket sandwich cake ball computer map snack coin book ring
    """,
}


class _Prompt(NamedTuple):
    """One sentence, with the positions of its words."""

    encoded: Encoded
    s1: int
    s2: int
    io: int
    answer: int


def ioi(
    model: HasVocabulary,
    batch: int = 32,
    seed: int = 0,
    *,
    corrupt: Corruption = "flip",
    bos: bool | None = None,
) -> Probe:
    """Indirect object identification: two names, one repeated; the answer is the other (IO).

    Half of the prompts name the IO first (ABBA), half the subject S (BABA). Prompts with the same
    template and order form a cluster: errors and tests count these (12 at most). The target at
    ``end`` is the IO, the foil is S. Marks: ``end``, ``io``, ``s1``, ``s1_next`` (the token after
    S1), ``s2``. ``probe.corrupt`` has the same sentences with another second name, aligned:

    * ``"flip"``: S2 becomes the IO. The right answer becomes S, and the corrupt probe's targets
      and foils say so.
    * ``"third"``: S2 becomes a third name (ABC). There is no right answer; targets and foils
      are kept, and a model has no reason to prefer either.

    Marks always refer to places: ``s2`` is where S2 was.

    Raises:
        InputError: if the tokenizer has fewer than three of the names, or no place or object,
            as single tokens.
    """
    if corrupt not in ("flip", "third"):
        raise InputError(f"corrupt={corrupt!r} is unknown: 'flip' or 'third'.")
    if whole(batch, "batch") < 1:
        raise InputError(f"batch={batch}: give 1 or more.")
    need_onwards(model, "an IOI probe")
    tokenizer = need_tokenizer(model, "an IOI probe")
    prefix = bos_prefix(model, bos)
    names, places, gifts = (
        [word for word in words.split() if _is_one_token(tokenizer, word)]
        for words in _WORDS.values()
    )
    if len(names) < 3 or not places or not gifts:
        raise InputError(
            f"the tokenizer of {model.name} has {len(names)} of our names, {len(places)} places "
            f"and {len(gifts)} objects as single tokens; IOI prompts need 3, 1 and 1: "
            "write your own prompts and use from_jsonl."
        )
    templates = _same_length(tokenizer, names, places[0], gifts[0])
    rng = Random(f"ioi {seed}")  # noqa: S311 - sentences, not secrets
    clean, other, forms = [], [], []
    for number in range(batch):
        template = rng.choice(templates)
        io, s, third = rng.sample(names, 3)
        a, b = (io, s) if number % 2 == 0 else (s, io)
        forms.append(2 * templates.index(template) + number % 2)
        words = {"a": a, "b": b, "place": rng.choice(places), "gift": rng.choice(gifts), "io": io}
        clean.append(_prompt(tokenizer, prefix, template, words, s, s))
        swapped = io if corrupt == "flip" else third
        other.append(_prompt(tokenizer, prefix, template, words, s, swapped))
    settings = {"corrupt": corrupt, "bos": bool(prefix), "templates": len(templates)}
    probe = _ioi_probe(clean, clean, seed, settings, flipped=False)
    check_length(model, probe.length, what="an IOI prompt", fix="this model is too small for it")
    paired = _ioi_probe(other, clean, seed, settings, flipped=corrupt == "flip")
    # Names, places and objects are random; prompts with the same template and order are a cluster.
    clusters = torch.tensor(forms)
    return replace(probe, corrupt=replace(paired, clusters=clusters), clusters=clusters)


def _is_one_token(tokenizer: Tokenizer, word: str) -> bool:
    return encode(tokenizer, f"and {word} went").word(4, 4 + len(word)) is not None


def _same_length(tokenizer: Tokenizer, names: list[str], place: str, gift: str) -> list[str]:
    """Largest set of templates with the same length in tokens; on ties the shortest."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for template in _TEMPLATES:
        said = {"a": names[0], "b": names[1], "s": names[0], "io": names[1]}
        full = template.format(**said, place=place, gift=gift)
        by_length[len(encode(tokenizer, full).ids)].append(template)
    return max(by_length.items(), key=lambda item: (len(item[1]), -item[0]))[1]


def _prompt(
    tokenizer: Tokenizer, prefix: list[int], template: str, words: dict[str, str], s: str, said: str
) -> _Prompt:
    """Encode one sentence up to its answer; ``said`` takes the place of S2."""
    full = template.format(**words, s=said)
    encoded = encode(tokenizer, full, prefix)
    first, last = full.index(f" {words['a']} ") + 1, full.rindex(" ") + 1
    second, again = full.index(f" {words['b']} ") + 1, full.index(", ") + 2
    s1, io = (first, second) if words["a"] == s else (second, first)
    ends = {s1: s, io: words["io"], again: said, last: words["io"]}
    places = {start: encoded.word(start, start + len(name)) for start, name in ends.items()}
    if None in places.values() or places[last] != len(encoded.ids) - 1:
        raise InputError(f"the tokenizer does not keep the names of {full!r} as single tokens.")
    s1_at, io_at, s2_at, answer_at = (int(places[at] or 0) for at in (s1, io, again, last))
    cut = Encoded(full, encoded.ids[:answer_at], encoded.spans[:answer_at])
    return _Prompt(cut, s1_at, s2_at, io_at, encoded.ids[answer_at])


def _ioi_probe(
    prompts: list[_Prompt],
    clean: list[_Prompt],
    seed: int,
    settings: Mapping[str, str | int | float | bool | None],
    *,
    flipped: bool,
) -> Probe:
    """Stack prompts; answers and positions are those of the clean ones."""
    tokens, real = pad_right([one.encoded.ids for one in prompts])
    end = [len(one.encoded.ids) - 1 for one in prompts]
    rows = torch.arange(len(prompts))
    answers = torch.tensor([one.answer for one in clean])
    subjects = torch.tensor([one.encoded.ids[one.s1] for one in clean])
    right, wrong = (subjects, answers) if flipped else (answers, subjects)
    targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    targets[rows, end], foils[rows, end] = right, wrong
    places = {
        "end": end,
        "io": [one.io for one in clean],
        "s1": [one.s1 for one in clean],
        "s1_next": [one.s1 + 1 for one in clean],
        "s2": [one.s2 for one in clean],
    }
    return Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=targets,
        foils=foils,
        marks={name: at_positions(tokens.shape[1], where) for name, where in places.items()},
        name="ioi",
        seed=seed,
        settings=settings,
    )


_TOKENS_PER_PASS = 8192


@runtime_checkable
class CanAnswer(Protocol):
    """Interface of a model that can be run on tokens; every ``HeadModel`` satisfies it."""

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        """Logits ``[batch pos d_vocab]``."""


def with_accuracy(model: object, probe: Probe) -> Probe:
    """Add the model's accuracy to the probe and its corrupt pair.

    ``facts["right"]`` is 1 if the model gives the target a higher logit than the foil (without
    foils: if the target is the most likely token), otherwise 0; ``settings["accuracy"]`` is its
    mean, and ``settings["accuracy_corrupt"]`` that of the corrupt prompts if they have their own
    answers. Without a model to run (a tokenizer alone) the probe is unchanged.
    """
    if not isinstance(model, CanAnswer):
        return probe
    own = _right(model, probe)
    told: dict[str, float] = {"accuracy": float(own.float().mean())}
    facts = {**probe.facts, "right": own.float()}
    other = probe.corrupt
    if other is not None and not torch.equal(other.targets, probe.targets):
        theirs = _right(model, other)
        told["accuracy_corrupt"] = float(theirs.float().mean())
        other = replace(
            other,
            facts={**other.facts, "right": theirs.float()},
            settings={**other.settings, **told},
        )
    return replace(probe, facts=facts, settings={**probe.settings, **told}, corrupt=other)


def _right(model: CanAnswer, probe: Probe) -> Bool[Tensor, " example"]:
    """Whether each example's answer has the highest logit of its alternatives."""
    at = (probe.targets >= 0).int().argmax(1)
    found: list[Bool[Tensor, " some"]] = []
    for rows in torch.arange(len(probe)).split(max(1, _TOKENS_PER_PASS // probe.length)):
        places: Sequence[int] = sorted(set(at[rows].tolist()))
        with torch.no_grad():
            logits = model.forward(
                probe.tokens[rows], real=probe.real[rows], logits_at=torch.tensor(places)
            )
        column = torch.tensor([places.index(place) for place in at[rows].tolist()])
        one = logits.cpu().float()[torch.arange(len(rows)), column]
        target = one.gather(1, probe.targets[rows, at[rows]][:, None])[:, 0]
        if probe.foils is None:
            found.append(target >= one.amax(1))
        else:
            found.append(target > one.gather(1, probe.foils[rows, at[rows]][:, None])[:, 0])
    return torch.cat(found)


NAMES = ("ioi", *TASKS)
# Prompts drawn per requested prompt; the others do not fit or are duplicates.
_DRAWN = 60


@checked
def pairs(
    model: HasVocabulary,
    task: str = "ioi",
    batch: int = 32,
    seed: int = 0,
    **options: bool | str | None,
) -> Probe:
    """Make paired prompts of a known task; ``probe.corrupt`` holds the corrupt prompts.

    Both are aligned position by position and have one length; answers and foils are single tokens
    after the text, checked for the model's tokenizer. Targets and foils are at ``end``. If the foil
    is right in the corrupt prompts, their targets and foils are swapped (``settings["flipped"]``).

    A model may be unable to do the task. If the model can be run, ``settings["accuracy"]`` is the
    share of the prompts in which the answer has a higher logit than the foil (0.5 by guessing),
    ``settings["accuracy_corrupt"]`` that of the corrupt ones if they are flipped, and
    ``facts["right"]`` gives it per example.

    Args:
        model: its tokenizer encodes the prompts.
        task: ``"ioi"`` (:func:`headscope.probes.pairs.ioi`), ``"greater_than"``, ``"agreement"``
            (of subject and verb), ``"docstring"``, ``"colour_objects"`` or ``"capital_of"``,
            described one by one in :mod:`headscope.probes.pairs`; hyphens work, too.
        batch: number of examples, all different pairs.
        seed: the same seed gives the same prompts.
        options: ``bos``, whether to prepend a BOS; for IOI also ``corrupt="third"``.

    Raises:
        InputError: if the task is unknown, the tokenizer cannot encode it, or it has too few
            prompts.

    Example:
        >>> probe = hs.probes.pairs(model, "ioi", batch=4)
        >>> probe.corrupt.tokens.shape == probe.tokens.shape
        True
    """
    task = task.replace("-", "_")
    if task == "ioi":
        make: Callable[..., Probe] = ioi
        return with_accuracy(model, make(model, batch, seed, **options))
    if task not in TASKS:
        raise InputError(nearest(task, NAMES, kind="task"))
    unknown = sorted(set(options) - {"bos"})
    if unknown:
        raise InputError(f"task {task!r} has no option {unknown[0]!r}; it takes bos.")
    bos = options.get("bos")
    if bos is not None and not isinstance(bos, bool):
        raise InputError(f"bos={bos!r} must be True, False or None.")
    return with_accuracy(model, _paired(model, task, batch, seed, bos))


class _Fitted(NamedTuple):
    """An encoded pair, with the ids of its answers and the positions of its marks."""

    clean: list[int]
    corrupt: list[int]
    answer: int
    foil: int
    flipped: bool
    marks: dict[str, list[int]]


def _paired(model: HasVocabulary, task: str, batch: int, seed: int, bos: bool | None) -> Probe:
    if whole(batch, "batch") < 1:
        raise InputError(f"batch={batch}: give 1 or more.")
    need_onwards(model, f"the task {task!r}")
    tokenizer = need_tokenizer(model, f"the task {task!r}")
    prefix = bos_prefix(model, bos)
    drawn = TASKS[task](Random(f"{task} {seed}"))  # noqa: S311 - sentences, not secrets
    by_length = _by_length(tokenizer, prefix, drawn, batch)
    found = max(by_length.values(), key=len, default=[])
    if len(found) < batch:
        raise InputError(_too_few(model, task, batch, len(found)))
    probe = _probe(found, task, seed, bool(prefix))
    check_length(model, probe.length, what=f"a prompt of {task!r}", fix="use a larger model")
    return probe


def _by_length(
    tokenizer: Tokenizer, prefix: list[int], drawn: Iterator[Pair], batch: int
) -> dict[int, list[_Fitted]]:
    """Draw different encodable pairs until one length has enough."""
    found: dict[int, list[_Fitted]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for pair in islice(drawn, _DRAWN * batch + 1000):
        if (pair.clean, pair.corrupt) in seen:
            continue
        one = _fitted(tokenizer, prefix, pair)
        if one is None:
            continue
        seen.add((pair.clean, pair.corrupt))
        found[len(one.clean)].append(one)
        if len(found[len(one.clean)]) == batch:
            break
    return found


def _too_few(model: HasVocabulary, task: str, batch: int, there: int) -> str:
    if there == 0:
        return (
            f"the tokenizer of {model.name} reads no prompt of {task!r} with single tokens as "
            "answers and both prompts in equally many tokens: write your own with from_jsonl."
        )
    return (
        f"the tokenizer of {model.name} reads only {there} different prompts of {task!r} with "
        f"one-token answers in one length: give batch={there} or fewer."
    )


def _fitted(tokenizer: Tokenizer, prefix: list[int], pair: Pair) -> _Fitted | None:
    """Encode the pair; None unless answers are single tokens and both texts are aligned."""
    clean, corrupt = (encode(tokenizer, text, prefix) for text in (pair.clean, pair.corrupt))
    if len(clean.ids) != len(corrupt.ids):
        return None
    words = (pair.answer, pair.foil)
    answer, foil = (_following(tokenizer, prefix, clean, word) for word in words)
    after = tuple(_following(tokenizer, prefix, corrupt, word) for word in words)
    if answer is None or foil is None or answer == foil or after != (answer, foil):
        return None
    marks = {name: clean.covering(*span) for name, span in pair.marks.items()}
    return _Fitted(clean.ids, corrupt.ids, answer, foil, pair.flipped, marks)


def _following(tokenizer: Tokenizer, prefix: list[int], before: Encoded, word: str) -> int | None:
    """Id of the single token that a word adds to a text; None if it adds several."""
    both = encode(tokenizer, before.text + word, prefix).ids
    added = both[len(before.ids) :]
    single = len(added) == 1 and both[:-1] == before.ids and added[0] != before.unknown
    return added[0] if single else None


def _probe(found: list[_Fitted], task: str, seed: int, bos: bool) -> Probe:
    rows = len(found)
    clean = torch.tensor([one.clean for one in found])
    flipped = found[0].flipped
    settings: dict[str, str | int | float | bool | None] = {
        "task": task,
        "bos": bos,
        "flipped": flipped,
    }
    right = torch.tensor([one.answer for one in found])
    wrong = torch.tensor([one.foil for one in found])
    end = clean.shape[1] - 1
    marks = {
        name: at_positions(clean.shape[1], [one.marks[name] for one in found])
        for name in found[0].marks
    }
    marks["end"] = at_positions(clean.shape[1], [end] * rows)

    def made(tokens: torch.Tensor, target: torch.Tensor, foil: torch.Tensor) -> Probe:
        targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
        targets[:, end], foils[:, end] = target, foil
        return Probe(
            tokens=tokens,
            real=torch.ones_like(tokens, dtype=torch.bool),
            structure=tokens,
            targets=targets,
            foils=foils,
            marks=marks,
            name=task,
            seed=seed,
            settings=settings,
        )

    corrupt = torch.tensor([one.corrupt for one in found])
    other = made(corrupt, wrong, right) if flipped else made(corrupt, right, wrong)
    return replace(made(clean, right, wrong), corrupt=other)
