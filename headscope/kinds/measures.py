"""Definition of a kind of head, and the measurements that kinds are tested with."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import edits, probes
from headscope.base.arguments import checked
from headscope.base.statistics import Design
from headscope.errors import HeadscopeError, InputError
from headscope.heads import HeadIndex
from headscope.metrics import Metric
from headscope.models.protocol import HeadModel, lacks
from headscope.origin import of_weights
from headscope.probes.encoding import (
    HasVocabulary,
    at_positions,
    bos_prefix,
    check_length,
    encode,
    need_tokenizer,
    pad_right,
)
from headscope.probes.pairs import CAPITALS
from headscope.probes.probe import Probe
from headscope.relevance.anchors import anchors
from headscope.relevance.memorized import rare_attention
from headscope.scorer import OTHER_EXAMPLE, REPEATED, TEXT, DefaultProbe, Scorer, output_scorer
from headscope.scorers import CATALOGUE, between, relation
from headscope.scorers.patterns import relative_offset
from headscope.scorers.relation import PairsLike, PairsOf
from headscope.scorers.writing import copying
from headscope.scoring.score import score
from headscope.steering.effects import direction, indirect_effect
from headscope.steering.vectors import outputs_at
from headscope.table import HeadScores, HeadTable
from headscope.views import HeadOutputs

HeadValues = Float[np.ndarray, "layer head"]


class Criterion(NamedTuple):
    """One condition that heads of a kind must meet.

    Attributes:
        what: short description of what is measured.
        value: value of every head, ``[layer, head]``; higher means more of the kind.
        least: smallest value that counts.
        p: one-sided p-value of every head; None if the criterion is only a threshold.
    """

    what: str
    value: HeadValues
    least: float
    p: HeadValues | None = None


@checked
def above(scores: HeadScores, least: float | None = None) -> Criterion:
    """Build a criterion: a score is above its null and reaches a threshold.

    Args:
        scores: scores with a null.
        least: threshold. Default: the one the score declares, else 0.

    Example:
        >>> hs.kinds.above(table["induction"]).least
        0.4
    """
    threshold = scores.threshold if least is None else least
    return Criterion(scores.name, scores.mean, threshold or 0.0, one_sided(scores, 1))


@checked
def below(scores: HeadScores, least: float = 0.0) -> Criterion:
    """Build a criterion: a signed score is below its null and at most ``-least``.

    Args:
        scores: scores with a null.
        least: distance below 0 that the score must reach.

    Example:
        >>> effects = hs.ablate_heads(model, probe, hs.metrics.loss, "zero")
        >>> hs.kinds.below(effects).what
        'negative zero_ablation'
    """
    return Criterion(f"negative {scores.name}", -scores.mean, least, one_sided(scores, -1))


@checked
def one_sided(scores: HeadScores, sign: int) -> HeadValues:
    """Turn a score's p-values into one-sided ones, for a mean above (1) or below (-1) its null.

    Args:
        scores: scores with a null.
        sign: 1 to test above the null, -1 to test below it.

    Returns:
        P-values ``[layer head]``.

    Example:
        >>> p = hs.kinds.one_sided(table["induction"], 1)
        >>> bool((p == table["induction"].p_value)[np.isfinite(p)].all())
        True
    """
    p = scores.p_value
    if scores.alternative == "greater":
        return p if sign > 0 else 1 - p
    ahead = (scores.mean - scores.null) * sign > 0
    return np.where(ahead, p / 2, 1 - p / 2)


@dataclass(frozen=True, eq=False)
class Confirm:
    """What ablating a head of a kind should do.

    Attributes:
        probe: gives the probe to run.
        metric: metric whose change under mean-ablation is measured.
        sign: 1 if the metric should rise, -1 if it should fall.
        said: the predicted effect, in words.
    """

    probe: Callable[["AskedModel"], Probe]
    metric: Metric
    sign: int
    said: str


@dataclass(frozen=True, eq=False)
class Kind:
    """Definition of a kind of attention head.

    A head is named if every criterion holds. The p-value of a kind is the largest p-value of its
    criteria (an intersection-union test, which needs no correction for the number of criteria).

    Attributes:
        name: name of the kind.
        said: what such a head does.
        probe, control: what is run, and what the values are compared with, in words.
        measure: returns the criteria; raises a :class:`~headscope.errors.HeadscopeError` with a
            reason if the kind cannot be tested on this model.
        source: source of the definition.
        weakness: what else can look like this kind.
        confirm: ablation that confirms such a head; None if no metric depends on it alone.
        needs: required model capabilities, named as for scorers, or ``tokenizer``.
    """

    name: str
    said: str
    probe: str
    control: str
    measure: Callable[["AskedModel"], Sequence[Criterion]]
    source: str
    weakness: str
    confirm: Confirm | None = None
    needs: tuple[str, ...] = ()

    def lacking(self, model: HeadModel) -> str:
        """Reason why a model cannot be tested, known before any pass; empty if it can be."""
        for need in self.needs:
            if need == "tokenizer":
                if model.tokenizer is None:
                    return f"{model.name} has no tokenizer, and this kind is tested on texts."
            elif (reason := lacks(model, need)) is not None:
                return reason
        return ""


@dataclass(frozen=True)
class Unasked:
    """A kind from the literature for which there is no built-in probe.

    Attributes:
        name: name of the kind.
        reason: what a test would need.
        source: paper that describes the kind.
    """

    name: str
    reason: str
    source: str


class CannotAskError(InputError):
    """Raised when a kind cannot be tested on a model or tokenizer; the message says why."""


@dataclass(eq=False)
class AskedModel:
    """A model under test, with a cache of the probes and scores that several kinds share.

    Attributes:
        model: model under test.
        seed: seed for all probes.
        batch_size: examples per pass.
    """

    model: HeadModel
    seed: int = 0
    batch_size: int | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """Cache a value, or the error raised while computing it, under a key."""
        if key not in self._kept:
            try:
                self._kept[key] = make(), None
            except HeadscopeError as error:
                self._kept[key] = None, error
        value, wrong = self._kept[key]
        if wrong is not None:
            raise wrong
        return value

    def probe(self, kind: DefaultProbe) -> Probe:
        """Default probe of a scorer; for needles, a shorter one that fits in one pass."""
        suited = kind.suited(self.model)
        if not suited.possible(self.model):
            raise CannotAskError(f"{self.model.name} has no tokenizer for the probe {kind.name!r}.")
        make = _SHORTER.get(suited.name, suited.make)
        # Keyed by the factory, since two declarations of texts and words share one probe.
        made: Probe = self.keep(("probe", make), lambda: make(self.model, self.seed))
        return made

    def pairs(self, task: str) -> Probe:
        """Prompts of a known task: 16, or 8 if the tokenizer supports no more."""

        def make() -> Probe:
            try:
                return probes.pairs(self.model, task, batch=16, seed=self.seed)
            except InputError:
                return probes.pairs(self.model, task, batch=8, seed=self.seed)

        made: Probe = self.keep(("pairs", task), make)
        return made

    def scores(self, scorer: Scorer, beside: Sequence[Scorer] = ()) -> HeadScores:
        """Score the model on the scorer's default probe.

        Args:
            scorer: scorer to run.
            beside: scorers on the same probe that other kinds will need, so that one pass serves
                all of them. Pass the same list each time, since it is part of the cache key.

        Raises:
            CannotAskError: if the model lacks what the scorer needs.
        """
        for need in scorer.needs:
            if (reason := lacks(self.model, need)) is not None:
                raise CannotAskError(reason)
        if scorer.probe is None:
            raise CannotAskError(f"the scorer {scorer.name!r} has no default probe.")
        probe = self.probe(scorer.probe)
        suited = scorer.probe.suited(self.model).name
        others = [
            one
            for one in beside
            if one.probe is not None
            and one.probe.suited(self.model).name == suited
            and not self._lacks(one)
        ]
        asked = others if any(one is scorer for one in others) else [scorer]
        return self.table(probe, asked)[scorer.name]

    def _lacks(self, scorer: Scorer) -> bool:
        return any(lacks(self.model, need) is not None for need in scorer.needs)

    def table(self, probe: Probe, scorers: Sequence[Scorer]) -> HeadTable:
        """Score a probe in one cached pass."""
        key = (_Same(probe), *(one.name for one in scorers))
        found: HeadTable = self.keep(
            key,
            lambda: score(
                self.model, probe, list(scorers), batch_size=self.batch_size, progress=False
            ),
        )
        return found

    def attention(self, probe: Probe, mark: str, query: str = "end") -> HeadScores:
        """Attention from one mark of a probe to another, against uniform attention.

        The first call measures attention to all marks of the probe and direct effects on its answer
        in the same pass.
        """
        return self._of_marks(probe, query)[_ATTENTION.format(mark=mark)]

    def effect(self, probe: Probe) -> HeadScores:
        """Direct effect on the target's logit minus the foil's, against zero.

        Raises:
            CannotAskError: if the logits are not linear in the heads' writes.
        """
        own = CATALOGUE[_EFFECT]
        for need in own.needs:
            if (reason := lacks(self.model, need)) is not None:
                raise CannotAskError(reason)
        found = self._of_marks(probe, "end")[own.name]
        return HeadScores.from_effects(
            found.spec, found.per_example, kv_heads=found.kv_heads, provenance=found.provenance
        )

    def _of_marks(self, probe: Probe, query: str) -> HeadTable:
        scorers = [
            between(query, mark, name=_ATTENTION.format(mark=mark))
            for mark in probe.marks
            if mark != query
        ]
        own = CATALOGUE[_EFFECT]
        answered = probe.foils is not None and query == "end"
        if answered and not self._lacks(own):
            scorers.append(own)
        return self.table(probe, scorers)


@dataclass(frozen=True)
class _Same:
    """Cache key for a probe by identity; keeps the probe alive."""

    probe: Probe

    def __hash__(self) -> int:
        """By identity."""
        return id(self.probe)

    def __eq__(self, other: object) -> bool:
        """By identity."""
        return isinstance(other, _Same) and other.probe is self.probe


def _short_needle(model: HeadModel, seed: int) -> Probe:
    """Needle probe of 15 texts with 256 tokens, or the model's context if shorter."""
    length = min(256, model.shape.n_ctx or 256)
    return probes.needle(model, lengths=length, depths=5, per_cell=3, seed=seed)


_SHORTER: Mapping[str, Callable[[Any, int], Probe]] = {"needle": _short_needle}
_EFFECT = "direct_logit_difference"
_ATTENTION = "attention to {mark}"


ORDERS: Mapping[str, tuple[str, ...]] = {
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September",
        "October", "November", "December",
    ),
    "numbers": tuple(str(n) for n in range(1, 21)),
    "number words": (
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
        "twelve",
    ),
    "ordinals": ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}  # fmt: skip
PLURALS = {
    "cat": "cats", "dog": "dogs", "house": "houses", "tree": "trees", "car": "cars",
    "book": "books", "door": "doors", "window": "windows", "river": "rivers", "table": "tables",
    "chair": "chairs", "friend": "friends", "teacher": "teachers", "student": "students",
    "letter": "letters", "picture": "pictures", "road": "roads", "doctor": "doctors",
}  # fmt: skip
PASTS = {
    "go": "went", "take": "took", "give": "gave", "see": "saw", "come": "came", "find": "found",
    "make": "made", "know": "knew", "say": "said", "write": "wrote", "run": "ran", "eat": "ate",
    "drink": "drank", "sing": "sang", "begin": "began", "fall": "fell", "hold": "held",
    "bring": "brought",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "good": "bad", "high": "low", "long": "short",
    "fast": "slow", "light": "dark", "happy": "sad", "rich": "poor", "strong": "weak",
    "early": "late", "open": "closed", "left": "right", "up": "down", "day": "night",
}  # fmt: skip
RELATIONS: Mapping[str, Mapping[str, str]] = {
    "capital": CAPITALS, "plural": PLURALS, "past_tense": PASTS, "opposite": OPPOSITES
}  # fmt: skip
GOOD = (
    "wonderful", "excellent", "lovely", "brilliant", "great", "beautiful", "delightful", "superb",
    "charming", "fantastic", "perfect", "amazing", "splendid", "pleasant", "marvellous", "fine",
)  # fmt: skip
BAD = (
    "terrible", "awful", "dreadful", "horrible", "bad", "ugly", "boring", "poor", "nasty",
    "disgusting", "worthless", "annoying", "miserable", "painful", "hateful", "dull",
)  # fmt: skip
MORE_GOOD = (
    "good", "nice", "clever", "funny", "exciting", "interesting", "impressive", "moving",
    "enjoyable", "brave", "fresh", "smart", "graceful", "thrilling", "sweet", "elegant",
)  # fmt: skip
MORE_BAD = (
    "silly",
    "stupid", "sad", "weak", "tedious", "mediocre", "clumsy", "lifeless", "tasteless", "shallow",
    "offensive", "foolish", "cheap", "lame", "pathetic", "pointless",
)  # fmt: skip
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "black", "white"),
    "animal": ("dog", "cat", "horse", "cow", "bird", "fish"),
    "day": ("Monday", "Friday", "Sunday", "Tuesday", "Saturday", "Thursday"),
    "number": ("two", "three", "five", "seven", "eight", "nine"),
}
RARE_WORDS = (
    "xylophonist", "quartzite", "bandicoot", "fjordland", "gyroscopes", "ptarmigan", "rhododendron",
    "zymurgy", "kookaburra", "obsidianite", "thunderstruck", "vexillology", "wheelwrights",
)  # fmt: skip
PEOPLE = ("Mary", "John", "Anna", "Peter", "Tom", "Paul", "James", "David", "Sarah", "Jack")
MORE_CAPITALS = {
    "Albania": "Tirana", "Algeria": "Algiers", "Angola": "Luanda", "Argentina": "Buenos Aires",
    "Armenia": "Yerevan", "Australia": "Canberra", "Azerbaijan": "Baku", "Bangladesh": "Dhaka",
    "Belarus": "Minsk", "Belgium": "Brussels", "Bolivia": "Sucre", "Brazil": "Brasilia",
    "Bulgaria": "Sofia", "Cambodia": "Phnom Penh", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Cyprus": "Nicosia", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "Georgia": "Tbilisi", "Ghana": "Accra",
    "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran",
    "Iraq": "Baghdad", "Jamaica": "Kingston", "Jordan": "Amman", "Kenya": "Nairobi",
    "Laos": "Vientiane", "Latvia": "Riga", "Lebanon": "Beirut", "Libya": "Tripoli",
    "Lithuania": "Vilnius", "Mali": "Bamako", "Malta": "Valletta", "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat", "Nepal": "Kathmandu", "Nigeria": "Abuja", "Pakistan": "Islamabad",
    "Peru": "Lima", "Philippines": "Manila", "Qatar": "Doha", "Romania": "Bucharest",
    "Senegal": "Dakar", "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana",
    "Sudan": "Khartoum", "Syria": "Damascus", "Thailand": "Bangkok", "Tunisia": "Tunis",
    "Turkey": "Ankara", "Uganda": "Kampala", "Ukraine": "Kyiv", "Uruguay": "Montevideo",
    "Venezuela": "Caracas", "Vietnam": "Hanoi", "Zambia": "Lusaka", "Zimbabwe": "Harare",
}  # fmt: skip
LETTERS = ("A", "B", "C", "D")


def token_of(model: HasVocabulary, word: str) -> int | None:
    """Id of a word with a leading space if that is a single token, else None."""
    tokenizer = need_tokenizer(model, "a word")
    text = f"and {word}"
    at = encode(tokenizer, text).word(4, len(text))
    return None if at is None else encode(tokenizer, text).ids[at]


def known(model: HasVocabulary, pairs: Mapping[str, str]) -> list[tuple[int, int]]:
    """Token ids of the pairs whose words are two distinct single tokens."""
    found = [(token_of(model, a), token_of(model, b)) for a, b in pairs.items()]
    return [(a, b) for a, b in found if a is not None and b is not None]


def marked_prompts(
    model: HasVocabulary,
    said: Sequence[tuple[str, Mapping[str, tuple[int, int]], str, str]],
    name: str,
    seed: int | None = None,
) -> Probe:
    """Build prompts with marks given by character spans, and single-token answers and foils.

    Args:
        model: model whose tokenizer encodes them.
        said: per prompt: text, marks as character spans, answer and foil with their leading spaces
            (empty for none).
        name: name of the probe.
        seed: seed recorded with the probe.

    Raises:
        CannotAskError: if fewer than eight prompts have single-token answers.
    """
    tokenizer, prefix = need_tokenizer(model, f"the probe {name!r}"), bos_prefix(model, None)
    rows: list[list[int]] = []
    places: list[dict[str, list[int]]] = []
    answers: list[tuple[int, int]] = []
    for text, marks, answer, foil in said:
        encoded = encode(tokenizer, text, prefix)
        target, other = (_following(model, text, word) for word in (answer, foil))
        found = {mark: encoded.covering(*span) for mark, span in marks.items()}
        if target is None or other is None or not all(found.values()):
            continue
        rows.append(encoded.ids)
        places.append({**found, "end": [len(encoded.ids) - 1]})
        answers.append((target, other))
    if len(rows) < 8:
        raise CannotAskError(
            f"{name}: the tokenizer of {model.name} gives single-token answers for {len(rows)} of "
            f"{len(said)} prompts, and 8 are needed."
        )
    tokens, real = pad_right(rows)
    check_length(model, tokens.shape[1], what=f"a prompt of {name!r}", fix="use a larger model")
    targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    for row, (place, pair) in enumerate(zip(places, answers, strict=True)):
        targets[row, place["end"]], foils[row, place["end"]] = pair[0], pair[1]
    every = dict.fromkeys(mark for one in places for mark in one)
    shown = {
        mark: at_positions(tokens.shape[1], [one.get(mark, []) for one in places]) for mark in every
    }
    return Probe(
        tokens=tokens, real=real, structure=tokens.where(real, -1), targets=targets, foils=foils,
        marks=shown, name=name, seed=seed,
    )  # fmt: skip


def _following(model: HasVocabulary, text: str, word: str) -> int | None:
    """Id of the single token that a word adds to a text; -1 for no word, None for several."""
    if not word:
        return -1
    tokenizer = need_tokenizer(model, "an answer")
    before, both = encode(tokenizer, text).ids, encode(tokenizer, text + word)
    single = both.ids[:-1] == before and both.ids[-1] != both.unknown
    return both.ids[-1] if single else None


def choices(model: HasVocabulary, seed: int) -> Probe:
    """Multiple-choice questions with four lettered options in random order."""
    rng, said = Random(f"choices {seed}"), []  # noqa: S311  # questions, not secrets
    for number in range(24):
        wanted = list(CATEGORIES)[number % len(CATEGORIES)]
        kinds = rng.sample(list(CATEGORIES), len(CATEGORIES))
        text, marks = f"Question: Which of these is a {wanted}?\n", {}
        for letter, kind in zip(LETTERS, kinds, strict=True):
            marks[f"option_{letter}"] = (len(text), len(text) + 1)
            text += f"{letter}. {rng.choice(CATEGORIES[kind])}\n"
        right = LETTERS[kinds.index(wanted)]
        marks["right"] = marks[f"option_{right}"]
        foil = LETTERS[(kinds.index(wanted) + 1 + number % 3) % 4]
        said.append((text + "Answer:", marks, f" {right}", f" {foil}"))
    made = marked_prompts(model, said, "choices", seed)
    letters = torch.stack([made.mark(f"option_{letter}") for letter in LETTERS]).any(0)
    return replace(made, marks={**made.marks, "letters": letters})


def yes_or_no(model: HasVocabulary, seed: int) -> Probe:
    """Yes-or-no questions, with the two words in both orders."""
    rng, said = Random(f"yes or no {seed}"), []  # noqa: S311  # questions, not secrets
    for number in range(24):
        kind = list(CATEGORIES)[number % len(CATEGORIES)]
        is_one = number // 4 % 2 == 0
        other = rng.choice([one for one in CATEGORIES if one != kind])
        word = rng.choice(CATEGORIES[kind if is_one else other])
        order = ("yes", "no") if number % 2 else ("no", "yes")
        text = f"Question: Is {word} a {kind}? Say {order[0]} or {order[1]}.\nAnswer:"
        marks = {one: _at(text, f" {one}", "Say") for one in order}
        answer, foil = (" yes", " no") if is_one else (" no", " yes")
        said.append((text, marks, answer, foil))
    return marked_prompts(model, said, "yes or no", seed)


def contradicted(model: HasVocabulary, seed: int) -> Probe:
    """Texts that state a wrong capital and ask for it; the foil is the true one."""
    rng, said = Random(f"contradicted {seed}"), []  # noqa: S311  # prompts, not secrets
    names = sorted(CAPITALS)
    for _ in range(24):
        country, other = rng.sample(names, 2)
        form = f"The capital of {country} is the city of"
        text = f"{form} {CAPITALS[other]}. {form}"
        at = len(form) + 1
        marks = {
            "context": (at, at + len(CAPITALS[other])),
            "country": (text.rindex(country), text.rindex(country) + len(country)),
        }
        said.append((text, marks, f" {CAPITALS[other]}", f" {CAPITALS[country]}"))
    return marked_prompts(model, said, "contradicted facts", seed)


def successions(model: HasVocabulary, seed: int) -> Probe:
    """Three consecutive items of an ordered sequence; the answer is the next, the foil another."""
    rng, said = Random(f"successions {seed}"), []  # noqa: S311  # prompts, not secrets
    for order in ORDERS.values():
        for at in range(len(order) - 3):
            shown, due = order[at : at + 3], order[at + 3]
            foil = rng.choice([one for one in order if one not in (*shown, due)])
            text = " ".join(shown)
            marks = {"last": (len(text) - len(shown[-1]), len(text))}
            said.append((text, marks, f" {due}", f" {foil}"))
    return marked_prompts(model, rng.sample(said, len(said)), "successions", seed)


def related_words(model: HasVocabulary, seed: int) -> Probe:
    """Words from three categories, each followed by a name, then another word from one category.

    The answer is the name after the word of the same category, and the foil is another name: ``red
    Mary, dog Peter, two Anna, blue``. The mark ``related`` is on the answer's name.

    Raises:
        CannotAskError: if fewer than three categories have two single-token words.
    """
    rng, said = Random(f"related words {seed}"), []  # noqa: S311  # prompts, not secrets
    # Words of several tokens may share one (Sunday, Monday), and plain induction would find it.
    single = {
        kind: [one for one in words if token_of(model, one) is not None]
        for kind, words in CATEGORIES.items()
    }
    askable = [kind for kind, words in single.items() if len(words) > 1]
    if len(askable) < 3:
        raise CannotAskError(
            f"related words: the tokenizer of {model.name} has two single-token words in "
            f"{len(askable)} categories, and 3 are needed."
        )
    for number in range(32):
        kinds = rng.sample(askable, 3)
        people, text = rng.sample(PEOPLE, 3), ""
        words = {kind: rng.sample(single[kind], 2) for kind in kinds}
        marks: dict[str, tuple[int, int]] = {}
        for at, (kind, person) in enumerate(zip(kinds, people, strict=True)):
            text += f"{words[kind][0]} {person}, "
            marks[f"follower_{at}"] = (len(text) - 2 - len(person), len(text) - 2)
        asked = number % 3
        marks["related"] = marks[f"follower_{asked}"]
        foil = people[(asked + 1 + number // 3 % 2) % 3]
        text += words[kinds[asked]][1]
        said.append(("and " + text, {name: (a + 4, b + 4) for name, (a, b) in marks.items()},
                     f" {people[asked]}", f" {foil}"))  # fmt: skip
    made = marked_prompts(model, said, "related words", seed)
    every = torch.stack([made.mark(f"follower_{at}") for at in range(3)]).any(0)
    return replace(made, marks={**made.marks, "followers": every})


def denials(model: HasVocabulary, seed: int) -> Probe:
    """Questions of :func:`yes_or_no`, all with 'no' as the answer and 'yes' as the foil."""
    made = yes_or_no(model, seed)
    assert made.foils is not None  # noqa: S101  # see above
    no, yes = (_following(model, "Answer:", word) for word in (" no", " yes"))
    there = made.targets >= 0
    return replace(
        made, targets=made.targets.masked_fill(there, no or 0),
        foils=made.foils.masked_fill(there, yes or 0),
    )  # fmt: skip


class LabelledTexts(NamedTuple):
    """Texts of two classes that are otherwise matched.

    Attributes:
        high: texts of the positive class.
        low: texts of the negative class, as many; example i of both is a pair.
        clusters: cluster label per example. Examples that share a content word share a label, fall
            on the same side of the split, and count as one observation.

    Example:
        >>> good = hs.probes.from_tokens([[5, 9, 6], [5, 10, 6], [5, 11, 6], [5, 12, 6]])
        >>> bad = hs.probes.from_tokens([[9, 5, 6], [10, 5, 6], [11, 5, 6], [12, 5, 6]])
        >>> len(hs.kinds.LabelledTexts(good, bad, clusters=(0, 1, 2, 3)).clusters)
        4
    """

    high: Probe
    low: Probe
    clusters: tuple[int, ...]


def statements(model: HeadModel) -> LabelledTexts:
    """True and false statements about capitals; false ones swap the capitals of two countries.

    Every name is in as many true as false statements, so the words alone carry no information.
    Countries at even and at odd indices share no word; two countries of the same parity that swap
    their capitals form a cluster.
    """
    capitals = {**MORE_CAPITALS, **CAPITALS}
    names = sorted(capitals)[: 4 * (len(capitals) // 4)]
    partner = {one: names[at + 2 if at % 4 < 2 else at - 2] for at, one in enumerate(names)}
    form = "The city of {} is the capital of {}."
    true = [form.format(capitals[one], one) for one in names]
    false = [form.format(capitals[partner[one]], one) for one in names]
    clusters = tuple(2 * (at // 4) + at % 2 for at in range(len(names)))
    return LabelledTexts(
        _texts(model, true, "true statements"), _texts(model, false, "false statements"), clusters
    )


def opinions(model: HeadModel) -> LabelledTexts:
    """Positive and negative opinions, half of them with a negation.

    Positive ones are "quite wonderful" and "not terrible", negative ones "quite terrible" and "not
    wonderful": every word is in as many positive as negative ones, so the words alone carry no
    information. The four sentences of a positive and a negative word form a cluster.
    """
    form = "Everybody who saw it said that the film was {} {}."
    good, bad = [], []
    for well, ill in zip(GOOD + MORE_GOOD, BAD + MORE_BAD, strict=True):
        good += [form.format("quite", well), form.format("not", ill)]
        bad += [form.format("quite", ill), form.format("not", well)]
    clusters = tuple(at // 2 for at in range(len(good)))
    return LabelledTexts(
        _texts(model, good, "good opinions"), _texts(model, bad, "bad opinions"), clusters
    )


def _texts(model: HasVocabulary, texts: Sequence[str], name: str) -> Probe:
    return marked_prompts(model, [(text, {}, "", "") for text in texts], name)


def _at(text: str, word: str, behind: str) -> tuple[int, int]:
    start = text.index(word, text.index(behind)) + 1
    return start, start + len(word) - 1


def pieces(model: HasVocabulary, probe: Probe) -> list[tuple[int, int, int]]:
    """Pairs of a token and an earlier piece of the same word, as ``(example, query, key)``."""
    tokenizer = need_tokenizer(model, "a text")
    rows = [row[real].tolist() for row, real in zip(probe.tokens, probe.real, strict=True)]
    beside = sorted({pair for row in rows for pair in pairwise(row)})
    alone = sorted({token for row in rows for token in row})
    both = tokenizer.batch_decode([list(pair) for pair in beside])
    first = dict(zip(alone, tokenizer.batch_decode([[one] for one in alone]), strict=True))
    # A token's own text may lack its leading space or mark its absence, so decode two tokens
    # together to see whether a word continues.
    goes_on = {
        pair: text.startswith(first[pair[0]]) and text[len(first[pair[0]]) :].isalpha()
        for pair, text in zip(beside, both, strict=True)
    }
    found: list[tuple[int, int, int]] = []
    for example, row in enumerate(rows):
        start, word = int(probe.first[example]), [0]
        for at, pair in enumerate(pairwise(row), 1):
            if not (goes_on[pair] and first[pair[0]].strip(" #").isalpha()):
                word = [at]
                continue
            found += [(example, start + at, start + earlier) for earlier in word]
            word.append(at)
    return found


def with_apostrophe(model: HasVocabulary, probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Mask of tokens with an apostrophe."""
    tokenizer = need_tokenizer(model, "a text")
    ids = sorted(set(probe.tokens[probe.real].tolist()))
    held = [one for one in ids if any(c in tokenizer.batch_decode([[one]])[0] for c in "'\u2019")]
    return torch.isin(probe.tokens, torch.tensor(held, dtype=torch.long)) & probe.real


Measure = Callable[[AskedModel], Sequence[Criterion]]
_ATTENDS = 0.25  # of a task's heads: about half the mean of published ones
_TELLS = 0.8  # held-out AUC
_LEADS = 0.1  # in AUC, over a baseline
_SHARE = 0.05  # share of all direct effects on an answer
_NEEDS_WRITE = ("attention_write", "unembedding")


def shared(name: str) -> Measure:
    """Measure a catalogue score: it must be above its null and its threshold."""
    return lambda asked: [above(_scored(asked, CATALOGUE[name]))]


def _scored(asked: AskedModel, scorer: Scorer) -> HeadScores:
    """Score from one shared pass over the scorer's probe."""
    assert scorer.probe is not None  # noqa: S101  # ours have one
    return asked.scores(scorer, _together(scorer.probe.name))


@cache
def _together(probe: str) -> tuple[Scorer, ...]:
    """Scorers that kinds use on the same probe."""
    own = {
        "repeated_tokens": (
            *(CATALOGUE[name] for name in _OF_REPEATED),
            *_FIXED_PLACES.values(),
            raised, lowered, _SINK_OF_REPEATED,
        ),
        "text": tuple(CATALOGUE[name] for name in _OF_TEXT),
        "needle": tuple(CATALOGUE[name] for name in ("retrieval", "query_focused_retrieval")),
    }  # fmt: skip
    return own.get(probe, ())


_OF_REPEATED = (
    "previous_token", "next_token", "current_token", "duplicate_token", "induction"
)  # fmt: skip
_OF_TEXT = ("first_token", "delimiter", "separator", "local_window")
_FIXED_PLACES = {n: relative_offset(n) for n in (2, 3, 4, 5)}
_SINK_OF_REPEATED = replace(CATALOGUE["first_token"], probe=REPEATED)


def part_of(scores: HeadScores, sign: int) -> Criterion:
    """Criterion: signed direct effect as a share of the absolute effects of all heads."""
    total = np.nansum(np.abs(scores.mean)) or 1.0
    one = above(scores, 0.0) if sign > 0 else below(scores, 0.0)
    said = "share of all direct effects on the answer"
    return Criterion(said if sign > 0 else f"{said}, negative", one.value / total, _SHARE, one.p)


def task(name: str, mark: str, sign: int = 1) -> Measure:
    """Measure attention from the end of a task's prompts to a mark, and a signed direct effect."""

    def measure(asked: AskedModel) -> list[Criterion]:
        probe = asked.pairs(name)
        return [
            above(asked.attention(probe, mark), _ATTENDS),
            part_of(asked.effect(probe), sign),
        ]

    return measure


def attends(name: str, mark: str) -> Measure:
    """Measure attention from the end of a task's prompts to a mark."""
    return lambda asked: [above(asked.attention(asked.pairs(name), mark), _ATTENDS)]


def positional(asked: AskedModel) -> list[Criterion]:
    """Attention two to five positions back, at the offset that gets most."""
    scores = [_scored(asked, one) for one in _FIXED_PLACES.values()]
    means = np.stack([np.nan_to_num(one.mean, nan=-1.0) for one in scores])
    most = means.argmax(0)[None]
    value, p = (
        np.take_along_axis(np.stack(ones), most, 0)[0]
        for ones in ([one.mean for one in scores], [one.p_value for one in scores])
    )
    return [Criterion("attention at a fixed offset", value, 0.4, np.minimum(len(scores) * p, 1))]


@output_scorer(
    unit="share", bounds=(0.0, 1.0), probe=REPEATED, control=OTHER_EXAMPLE, needs=_NEEDS_WRITE,
    source="Olsson et al. 2022 (arXiv 2209.11895), behavioural copying score",
)  # fmt: skip
def raised(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of the logits a head raises that falls on the attended tokens; null: other tokens."""
    return copying.function(outputs, probe)


@output_scorer(
    unit="share", bounds=(0.0, 1.0), probe=REPEATED, control=OTHER_EXAMPLE, needs=_NEEDS_WRITE,
    source="McDougall et al. 2023 (arXiv 2310.04625), copy suppression",
)  # fmt: skip
def lowered(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Share of the logits a head lowers that falls on the attended tokens; null: other tokens."""
    return copying.function(replace(outputs, z=-outputs.z), probe)


def copies(asked: AskedModel) -> list[Criterion]:
    """Criterion: raises the logits of the tokens that it attends to."""
    return [above(_scored(asked, raised), 0.4)]


def suppresses(asked: AskedModel) -> list[Criterion]:
    """Criterion: lowers the logits of the tokens that it attends to."""
    return [above(_scored(asked, lowered), 0.4)]


def backs_up(asked: AskedModel) -> list[Criterion]:
    """Rise in a head's direct effect on the name when the name movers are ablated.

    Raises:
        CannotAskError: if no name mover was found.
    """
    probe = asked.pairs("ioi")
    attention, effect = task("ioi", "io")(asked)
    assert attention.p is not None and effect.p is not None  # noqa: PT018, S101  # scores have
    sure = (attention.value >= attention.least) & (effect.value >= effect.least)
    sure &= np.maximum(attention.p, effect.p) < 0.01
    movers = [HeadIndex(int(layer), int(head)) for layer, head in np.argwhere(sure)]
    if not movers:
        raise CannotAskError("no name mover was found, so there is nothing to back up.")
    before = asked.effect(probe)
    with asked.model.edited([edits.zero(movers)]):
        after = score(
            asked.model, probe, "direct_logit_difference",
            batch_size=asked.batch_size, progress=False,
        )["direct_logit_difference"]  # fmt: skip
    rise = without_norm(before.per_example, after.per_example, movers) - before.per_example
    for mover in movers:
        rise[mover] = np.nan
    scores = HeadScores.from_effects(
        "rise", rise, kv_heads=before.kv_heads, unit="logits", description="takes over"
    )
    total = float(np.abs([before.mean[mover] for mover in movers]).sum()) or 1.0
    one = above(scores, 0.0)
    return [Criterion("share of the ablated effect taken over", one.value / total, _SHARE, one.p)]


@checked
def without_norm(
    before: Float[np.ndarray, "layer head example"],
    after: Float[np.ndarray, "layer head example"],
    ablated: Sequence[HeadIndex],
) -> Float[np.ndarray, "layer head example"]:
    """Direct effects after an ablation, with the final norm's scale from before it.

    Ablating heads shrinks the residual stream, so the final norm scales up all other direct effects
    alike. Heads up to the first ablated layer write what they wrote before, so the change in their
    direct effects is due to the norm alone and is divided out.

    Args:
        before: direct effects of every head.
        after: the same with some heads ablated.
        ablated: heads that were ablated.

    Example:
        >>> before = np.array([[[1.0], [3.0]], [[2.0], [0.5]]])
        >>> after = 2 * before + np.array([[[0.0], [0.0]], [[0.0], [1.0]]])
        >>> hs.kinds.without_norm(before, after, [hs.HeadIndex(0, 1)])[1, 1].tolist()
        [1.0]
    """
    same = np.zeros(before.shape[:2], dtype=bool)
    same[: min(head.layer for head in ablated) + 1] = True
    same[tuple(np.transpose(ablated))] = False
    pairs = np.nan_to_num(before[same]), np.nan_to_num(after[same])
    size = (pairs[0] ** 2).sum(0)
    scale = np.divide((pairs[0] * pairs[1]).sum(0), size, out=np.ones_like(size), where=size > 0)
    fixed: np.ndarray = after / scale
    return fixed


def next_in_order(asked: AskedModel) -> list[Criterion]:
    """Share of ordinals whose successor gets the largest logit within its sequence."""
    orders = [[token_of(asked.model, word) for word in one] for one in ORDERS.values()]
    kept = [[one for one in order if one is not None] for order in orders]
    whole = [some for some, order in zip(kept, orders, strict=True) if len(some) == len(order) > 3]
    if not whole:
        raise CannotAskError(
            f"the tokenizer of {asked.model.name} has no ordered sequence (days, months, numbers, "
            "letters) of single tokens."
        )
    sets = [list(pairwise(one)) for one in whole]
    return [above(relation_scores(asked.model, sets, "successor"), 0.4)]


def related(name: str) -> Measure:
    """Share of pairs whose second word gets the largest logit among all second words."""

    def measure(asked: AskedModel) -> list[Criterion]:
        pairs = known(asked.model, RELATIONS[name])
        if len(pairs) < 8:
            raise CannotAskError(
                f"the tokenizer of {asked.model.name} has {len(pairs)} pairs of the relation "
                f"{name!r} as single tokens, and 8 are needed."
            )
        return [above(relation_scores(asked.model, [pairs], name), 0.4)]

    return measure


@checked
@torch.no_grad()
def relation_scores(
    model: HeadModel, sets: Sequence[Sequence[tuple[int, int]]], name: str = "relation"
) -> HeadScores:
    """Share of token pairs (a, b) for which a head attending to a gives b the largest logit.

    ``argmax over the second tokens of a set of (norm(e_a) W_V + b_V) W_O . d``, with e the token's
    embedding, plus the first MLP's output from the second layer on, and d the unembedding
    directions minus their mean. One value per pair, 1 or 0; the null is one over the number of
    distinct second tokens in the set.

    Args:
        model: model to analyse.
        sets: sets of token-id pairs; candidate answers are the second tokens of the same set.
        name: name of the score.

    Raises:
        InputError: if a set has fewer than two answers.
        UnsupportedModelError: if the embedding, a norm or the values are not available as weights.

    Source: Gould et al. 2023 (arXiv 2312.09230), successor heads; Elhelo and Geva 2024
    (arXiv 2412.11965), relations from parameters.

    Example:
        >>> found = hs.kinds.relation_scores(model, [[(5, 6), (6, 7), (7, 8)]])
        >>> round(float(found.null[0, 0]), 3)
        0.333
    """
    if any(len({b for _, b in pairs}) < 2 for pairs in sets) or not sets:
        raise InputError("a relation needs pairs with at least two distinct second tokens.")
    shape, plain = model.shape, model.parts.embedding
    pairs = [pair for one in sets for pair in one]
    first: Int[Tensor, " pair"] = torch.tensor([a for a, _ in pairs], device=plain.device)
    bare = plain[first].float()
    later = bare + model.parts.first_mlp(bare).float()
    ends = np.cumsum([0, *map(len, sets)])
    answers = [sorted({b for _, b in one}) for one in sets]
    directions = [
        model.unembedding.directions(torch.tensor(one, device=plain.device)) for one in answers
    ]
    best = []
    for layer in shape.attention_layers:
        model.parts.need_values(layer)
        weights = model.weights(layer)
        x = model.parts.input_norm(layer)(bare if layer == 0 else later)
        v = torch.einsum("pm,hmd->hpd", x, weights.W_V.float()) + weights.b_V.float()[:, None]
        v = v.repeat_interleave(shape.group_size, 0)
        write = torch.einsum("hpd,hdm->hpm", v, model.output_weights(layer).float())
        parts = [
            (write[:, start:end] @ one.T).argmax(-1)
            for start, end, one in zip(ends[:-1], ends[1:], directions, strict=True)
        ]
        best.append(torch.cat(parts, -1))
    place = [some.index(b) for some, one in zip(answers, sets, strict=True) for _, b in one]
    values = np.full((shape.n_layers, shape.n_heads, len(pairs)), np.nan)
    values[list(shape.attention_layers)] = torch.stack(best).cpu().numpy() == np.array(place)
    for layer, head in shape.removed:
        values[layer, head] = np.nan
    chance = [1 / len(some) for some, one in zip(answers, sets, strict=True) for _ in one]
    null = np.where(np.isnan(values), np.nan, np.array(chance))
    return HeadScores.from_examples(
        name, values, kv_heads=shape.n_kv_heads, control_per_example=null,
        design=Design(paired=True), unit="share", bounds=(0.0, 1.0),
        description="its weights map tokens to their partners",
        source="Gould et al. 2023 (arXiv 2312.09230)", provenance=of_weights(model),
    )  # fmt: skip


def _options(
    asked: AskedModel,
) -> tuple[Probe, HeadScores, Float[np.ndarray, "layer head example 4"]]:
    """Attention from the last token to the letters of four options: total, and per letter."""
    probe: Probe = asked.keep("choices", lambda: choices(asked.model, asked.seed))
    parts = [asked.attention(probe, f"option_{one}").per_example for one in LETTERS]
    return probe, asked.attention(probe, "letters"), np.stack(parts, -1)


def _share_of_right(
    name: str, probe: Probe, mass: HeadScores, parts: Float[np.ndarray, "layer head example part"],
    marks: Sequence[str], right: str,
) -> HeadScores:  # fmt: skip
    """Share of the attention to some marks that falls on the correct one; null: equal shares."""
    there = torch.stack([(probe.host.mark(one) & probe.host.mark(right)).any(-1) for one in marks])
    at = there.int().argmax(0).numpy()
    picked = np.take_along_axis(parts, at[None, None, :, None], -1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = picked / parts.sum(-1)
    missing = np.isnan(share).all(-1, keepdims=True)
    return HeadScores.from_examples(
        name, share, kv_heads=mass.kv_heads,
        control_per_example=np.where(missing, np.nan, 1 / len(marks)),
    )  # fmt: skip


def correct_letter(asked: AskedModel) -> list[Criterion]:
    """Share of the attention to four letters on the correct one, and the direct effect on it."""
    probe, mass, by_letter = _options(asked)
    marks = [f"option_{one}" for one in LETTERS]
    scores = _share_of_right("right letter", probe, mass, by_letter, marks, "right")
    return [above(scores, 0.5), above(mass, 0.1), part_of(asked.effect(probe), 1)]


def semantic_induction(asked: AskedModel) -> list[Criterion]:
    """Share of attention to three names on the related word's name, and the direct effect on it."""
    probe: Probe = asked.keep("related words", lambda: related_words(asked.model, asked.seed))
    marks = [f"follower_{at}" for at in range(3)]
    parts = np.stack([asked.attention(probe, one).per_example for one in marks], -1)
    mass = asked.attention(probe, "followers")
    scores = _share_of_right(
        "the token after the related word", probe, mass, parts, marks, "related"
    )
    return [above(scores, 0.6), above(mass, 0.1), part_of(asked.effect(probe), 1)]


def constant_letters(asked: AskedModel) -> list[Criterion]:
    """High attention to the four letters, nearly equal for each in every question."""
    _, mass, by_letter = _options(asked)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = by_letter / by_letter.sum(-1, keepdims=True)
        evenness = -np.nansum(share * np.log(share), -1).mean(-1) / np.log(4)
    return [above(mass, _ATTENDS), Criterion("evenness over letters", evenness, 0.95)]


def single_letter(asked: AskedModel) -> list[Criterion]:
    """High attention to the four letters, mostly to one, whatever its option says."""
    _, mass, by_letter = _options(asked)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = by_letter.mean(2) / by_letter.mean(2).sum(-1, keepdims=True)
    return [above(mass, _ATTENDS), Criterion("share of one letter", share.max(-1), 0.7)]


def negative(asked: AskedModel) -> list[Criterion]:
    """``(A_yes + A_no) log(A_no / A_yes)`` at the end of questions, above 0."""
    probe: Probe = asked.keep("yes or no", lambda: yes_or_no(asked.model, asked.seed))
    yes, no = (asked.attention(probe, one).per_example for one in ("yes", "no"))
    small = 1e-6
    values = (yes + no) * np.log((no + small) / (yes + small))
    scores = HeadScores.from_effects(
        "negative attention", values, kv_heads=asked.model.shape.n_kv_heads, unit="nats"
    )
    return [above(scores, 0.1)]


def in_context_task(asked: AskedModel) -> list[Criterion]:
    """Indirect effect of injecting the head's task mean, against its mean on shuffled labels."""
    found = indirect_effect(
        asked.model, task_prompts(asked), batch_size=asked.batch_size, progress=False
    )
    return [above(found, 0.01)]


def task_prompts(asked: AskedModel) -> dict[str, Probe]:
    """Prompts of the first two relations with enough single-token pairs.

    Raises:
        CannotAskError: if there is no such relation.
    """
    found: dict[str, Probe] = {}
    for name in RELATIONS:
        with suppress(CannotAskError):
            found[name] = relation_prompts(asked, name)
        if len(found) == 2:
            break
    if not found:
        raise CannotAskError(
            f"the tokenizer of {asked.model.name} has no relation with 8 single-token pairs."
        )
    return found


def relation_prompts(asked: AskedModel, name: str) -> Probe:
    """Eight prompts with six demonstrations of a relation.

    Raises:
        CannotAskError: if fewer than eight of its pairs are single tokens.
    """
    single = [(f" {a}", f" {b}") for a, b in RELATIONS[name].items() if _both(asked.model, a, b)]
    if len(single) < 8:
        raise CannotAskError(
            f"the tokenizer of {asked.model.name} has {len(single)} pairs of the relation "
            f"{name!r} as single tokens, and 8 are needed."
        )

    def make() -> Probe:
        return probes.in_context(
            asked.model, single, template="{text} :{label}\n", shots=min(6, len(single) - 1),
            batch=8, seed=asked.seed,
        )  # fmt: skip

    made: Probe = asked.keep(("relation", name), make)
    return made


def _both(model: HeadModel, a: str, b: str) -> bool:
    return token_of(model, a) is not None and token_of(model, b) is not None


def label_words(asked: AskedModel) -> list[Criterion]:
    """How well attention to demonstrations' label words predicts the model's answer."""
    probe = label_prompts(asked)
    found = anchors(asked.model, probe, batch_size=asked.batch_size, progress=False)
    if len(set(found.predicted.tolist())) < 2:
        raise CannotAskError("the model gives every prompt the same label.")
    score = found.heads["anchor_auc"]
    return [above(score, _TELLS), lead_in_layer(score.mean)]


def label_prompts(asked: AskedModel) -> Probe:
    """Demonstrations of colours and animals with their class, then another word.

    Raises:
        CannotAskError: if a class is not a single token.
    """
    shown = [(word, f" {kind}") for kind in ("colour", "animal") for word in CATEGORIES[kind]]
    for _, label in shown:
        if token_of(asked.model, label.strip()) is None:
            raise CannotAskError(f"{asked.model.name} splits the label{label} into several tokens.")
    made: Probe = asked.keep(
        "labels",
        lambda: probes.in_context(
            asked.model, shown, template="{text} :{label}\n", shots=4, seed=asked.seed
        ),
    )
    return made


def rare_words(asked: AskedModel) -> list[Criterion]:
    """Kendall's tau between attention and token count, below that with shuffled counts."""
    text = probes.text(asked.model, length=32, seed=asked.seed)
    ends = torch.zeros_like(text.real)
    ends[:, 31] = True
    probe = replace(text, marks={**text.marks, "end": ends})
    if text.length < 32 or not bool(text.real.all()):
        raise CannotAskError("its context is too short for texts of 32 tokens.")
    counts = torch.bincount(text.tokens.flatten(), minlength=asked.model.shape.d_vocab)
    found = rare_attention(asked.model, probe, counts, asked.seed, batch_size=asked.batch_size)
    return [below(found, 0.3)]


def word_pieces(asked: AskedModel) -> list[Criterion]:
    """Attention to earlier pieces of the same word."""
    probe = asked.probe(TEXT)
    pairs = pieces(asked.model, probe)
    if len({one[0] for one in pairs}) < 5:
        texts = [f"The {word} near the {other} was old." for word, other in pairwise(RARE_WORDS)]
        probe = probes.text(asked.model, texts)
        pairs = pieces(asked.model, probe)
    if len({one[0] for one in pairs}) < 5:
        raise CannotAskError(
            f"the tokenizer of {asked.model.name} splits hardly any word of the texts into pieces."
        )
    scorer = relation("pieces", torch.tensor(pairs), control="flat").mass
    return [above(asked.table(probe, [scorer])[scorer.name], _ATTENDS)]


def apostrophes(asked: AskedModel) -> list[Criterion]:
    """Attention to apostrophes in texts that contain them."""
    texts = [
        "It's the dog's ball, and the cat's bed isn't far.",
        "The teacher's book wasn't on Anna's table.",
        "She didn't know that the king's horse couldn't swim.",
        "Leo's boat won't sail if the wind's too strong.",
        "They've seen Tom's house, but they haven't been inside.",
        "Don't touch the baker's bread; it's hot.",
        "I'm sure that the doctor's car wasn't here.",
        "We'll bring the farmer's letter if it's ready.",
    ]
    probe = probes.text(asked.model, texts)
    mark = with_apostrophe(asked.model, probe)
    if not bool(mark.any(1).all()):
        raise CannotAskError(f"the tokenizer of {asked.model.name} drops apostrophes.")
    seen = mark.int().cumsum(1) - mark.int() > 0
    known = replace(probe, marks={"apostrophe": mark, "behind": seen & probe.real}, control=None)
    return [above(asked.attention(known, "apostrophe", "behind"), _ATTENDS)]


def dormant(asked: AskedModel) -> list[Criterion]:
    """High attention to the first token on either text or random tokens, and low on the other.

    The p-value is two-sided, for independent samples.
    """
    text, other = (_scored(asked, one) for one in (CATALOGUE["first_token"], _SINK_OF_REPEATED))
    design = Design(clusters=text.design.clusters, control_clusters=other.design.clusters)
    scores = HeadScores.from_examples(
        "sink in one domain", text.per_example, kv_heads=text.kv_heads, design=design,
        control_per_example=other.per_example, alternative="two-sided",
    )  # fmt: skip
    gap = np.abs(scores.mean - scores.null)
    return [Criterion("difference of sink attention", gap, 0.4, scores.p_value)]


def of_context(asked: AskedModel) -> list[Criterion]:
    """Attends to the answer in the text and raises its logit over the remembered answer."""
    probe = _contradicted(asked)
    return [
        above(asked.attention(probe, "context"), _ATTENDS), part_of(asked.effect(probe), 1)
    ]  # fmt: skip


def of_memory(asked: AskedModel) -> list[Criterion]:
    """Raises the logit of the remembered answer over the one in the text."""
    return [part_of(asked.effect(_contradicted(asked)), -1)]


def _contradicted(asked: AskedModel) -> Probe:
    probe: Probe = asked.keep("contradicted", lambda: contradicted(asked.model, asked.seed))
    return probe


@checked
def told_apart(make: Callable[[HeadModel], LabelledTexts]) -> Measure:
    """Measure whether a linear probe on a head's output separates two classes of texts.

    Three criteria, on held-out clusters of texts (see :func:`placements`): an AUC of at least 0.8
    and above chance; at least 0.1 above the same probe on the text's mean token embedding, which
    any head that attends to the right words can recover; and at least 0.1 above the median of the
    layer's other heads, since most heads can recover what the residual stream already contains.

    Args:
        make: builds the texts; outputs are read at the mark ``end``, else over all positions.

    Source: Li et al. 2023 (arXiv 2306.03341), probes of head outputs; Hewitt and Liang 2019
    (arXiv 1909.03368): a probe's accuracy says something only against a control. The two margins
    are ours.

    Example:
        >>> good = hs.probes.from_tokens([[5, 9, 6], [5, 10, 6], [5, 11, 6], [5, 12, 6]])
        >>> bad = hs.probes.from_tokens([[9, 5, 6], [10, 5, 6], [11, 5, 6], [12, 5, 6]])
        >>> texts = hs.kinds.LabelledTexts(good, bad, clusters=(0, 1, 2, 3))
        >>> measure = hs.kinds.told_apart(lambda model: texts)
        >>> [one.least for one in measure(hs.kinds.AskedModel(model))]
        [0.8, 0.1, 0.1]
    """

    def measure(asked: AskedModel) -> list[Criterion]:
        texts = make(asked.model)
        sides = [outputs_at(asked.model, one, None, asked.batch_size) for one in texts[:2]]
        bags = [mean_embedding(asked.model, one)[:, None, None] for one in texts[:2]]
        return separations(
            (sides[0], sides[1]), (bags[0], bags[1]), texts.clusters, asked.model.shape.n_kv_heads
        )

    return measure


_Outputs = Float[Tensor, "example layer head d_head"]
_Words = Float[Tensor, "example 1 1 d_model"]


@checked
def separations(
    sides: tuple[_Outputs, _Outputs],
    words: tuple[_Words, _Words],
    clusters: tuple[int, ...],
    kv_heads: int,
) -> list[Criterion]:
    """Criteria of :func:`told_apart` from head outputs and mean token embeddings.

    Args:
        sides: ``z`` of the positive and of the negative texts.
        words: the baseline in the same shape, with layer and head axes of size 1.
        clusters: cluster label per example.
        kv_heads: number of key/value heads.

    Example:
        >>> z, words = torch.randn(8, 2, 4, 3), torch.randn(8, 1, 1, 6)
        >>> found = hs.kinds.separations((z + 9, z), (words, words), tuple(range(8)), 4)
        >>> float(found[0].value.min())
        1.0
    """
    heads, held = placements(*sides, clusters)
    baseline = np.broadcast_to(placements(*words, clusters)[0], heads.shape)
    there = np.where(np.isnan(heads), np.nan, 1.0)
    against = [
        HeadScores.from_examples(
            "held-out AUC", heads, kv_heads=kv_heads,
            control_per_example=control * there, design=Design(paired=True, clusters=held),
        )
        for control in (np.full(heads.shape, 0.5), baseline)
    ]  # fmt: skip
    lead = against[1].mean - against[1].null
    return [
        above(against[0], _TELLS),
        Criterion("AUC minus that of the mean embedding", lead, _LEADS, one_sided(against[1], 1)),
        lead_in_layer(against[0].mean),
    ]


@checked
def lead_in_layer(value: Float[np.ndarray, "layer head"]) -> Criterion:
    """Criterion: at least 0.1 above the median of the layer's other heads; an only head passes.

    Args:
        value: AUC of every head, ``[layer head]``.

    Returns:
        The criterion, a threshold without a p-value.

    Example:
        >>> found = hs.kinds.lead_in_layer(np.array([[0.9, 0.9, 0.9], [0.5, 0.9, 0.6]]))
        >>> (found.value >= found.least).tolist()
        [[False, False, False], [False, True, False]]
    """
    lead = np.full(value.shape, np.nan)
    for layer, head in np.argwhere(np.isfinite(value)):
        others = np.delete(value[layer], head)
        known = others[np.isfinite(others)]
        lead[layer, head] = value[layer, head] - np.median(known) if len(known) else np.inf
    return Criterion("AUC minus the layer's median", lead, _LEADS)


@checked
def placements(
    high: Float[Tensor, "example layer head size"],
    low: Float[Tensor, "example layer head size"],
    clusters: tuple[int, ...],
) -> tuple[Float[np.ndarray, "layer head held_out"], tuple[int, ...]]:
    """Per-example values on held-out texts whose mean is a linear probe's AUC.

    The linear discriminant of :func:`headscope.steering.direction` is fitted to the clusters at
    even indices and tested on those at odd indices. With V_i the share of low examples below high
    example i, and W_i the share of high examples above low example i (ties count half), the value
    is ``V_i + W_i - AUC``. Its mean is the AUC, and its standard deviation over sqrt(n) is DeLong's
    standard error of the AUC for paired examples, so ordinary tests of means apply.

    Args:
        high: head outputs of the positive class.
        low: head outputs of the negative class; example i of both is a pair.
        clusters: cluster label per example.

    Returns:
        Values per held-out example, and the cluster of each.

    Source: DeLong et al. 1988 (Biometrics 44, 837); Obuchowski 1997 (Biometrics 53, 567), clusters.

    Example:
        >>> points = torch.randn(8, 1, 1, 4, generator=torch.Generator().manual_seed(0))
        >>> values, held = hs.kinds.placements(points + 9, points, tuple(range(8)))
        >>> values.mean(-1).tolist(), held
        ([[1.0]], (1, 3, 5, 7))
    """
    order = list(dict.fromkeys(clusters))
    odd = torch.tensor([order.index(one) % 2 == 1 for one in clusters])
    vector = direction(high[~odd].float(), low[~odd].float(), "probe")
    up, down = (
        torch.einsum("nlhd,lhd->lhn", one[odd].float(), vector).double().numpy()
        for one in (high, low)
    )
    wins = (np.sign(up[..., :, None] - down[..., None, :]) + 1) / 2
    area = wins.mean((-2, -1), keepdims=True)[..., 0]
    held = tuple(one for one, kept in zip(clusters, odd.tolist(), strict=True) if kept)
    return wins.mean(-1) + wins.mean(-2) - area, held


@checked
def mean_embedding(model: HeadModel, probe: Probe) -> Float[Tensor, "example d_model"]:
    """Mean embedding of a text's tokens, without positions: a bag of words.

    Args:
        model: model whose embedding is used.
        probe: texts; padding is left out.

    Example:
        >>> hs.kinds.mean_embedding(model, probe).shape == (len(probe), model.shape.d_model)
        True
    """
    table, host = model.parts.embedding, probe.host
    real = host.real[..., None].float()
    found = table[host.tokens.to(table.device)].detach().float().cpu()
    return (found * real).sum(1) / real.sum(1)


@checked
def of_relation(
    name: str,
    probe: Probe,
    pairs: PairsOf | PairsLike,
    *,
    least: float = 0.25,
    steady: float | None = None,
    said: str = "attends along a given relation",
    source: str = "given",
) -> Kind:
    """Define a kind: heads that attend along given (query, key) pairs more than uniform attention.

    With ``steady`` this is the test for iteration heads: each step of an algorithm attends to the
    tokens that it uses (``least=0.5``), whatever they are, and 1 minus the standard deviation of
    the mass over examples is at least ``steady``. Other uses are dependency edges, neighbours in a
    maze, or relation triples.

    Args:
        name: name of the kind.
        probe: probe to run.
        pairs: (query, key) pairs, in any form that :func:`headscope.scorers.relation` takes.
        least: smallest attention mass on the keys for a head to be named, between 0 and 1.
        steady: smallest consistency over examples, between 0 and 1; None: not required.
        said: what such a head does.
        source: source of the definition.

    Raises:
        InputError: if ``least`` or ``steady`` is not between 0 and 1.

    Source: Cabannes et al. 2024 (arXiv 2406.02128), iteration heads: peaky, and the same whatever
    the tokens. The paper measures single entries of the pattern; here it is the mass on all keys of
    a query.

    Example:
        >>> pairs = [(row, at, at - 2) for row in range(len(probe)) for at in range(3, 9)]
        >>> kind = hs.kinds.of_relation("two_back", probe, torch.tensor(pairs))
        >>> hs.kinds.survey(model, kind, confirm=False).asked[0].name
        'two_back'
    """
    for what, one in (("least", least), ("steady", steady)):
        if one is not None and not 0 < one <= 1:
            raise InputError(f"{what}={one!r}: give a number between 0 and 1.")
    scorer = relation(name, pairs, control="flat").mass

    def measure(asked: AskedModel) -> list[Criterion]:
        found = asked.table(probe, [scorer])[scorer.name]
        criteria = [above(found, least)]
        if steady is not None:
            spread = np.nanstd(found.per_example, -1)
            criteria.append(Criterion("sameness over examples", 1 - spread, steady))
        return criteria

    return Kind(
        name, said, probe.name or "yours", "uniform attention", measure, source,
        "attention alone: does not check what the head writes",
    )  # fmt: skip


@checked
def clustering(
    probe: Probe, relevant: str, groups: Sequence[int], *, query: str = "end", seed: int = 0
) -> Kind:
    """Define a kind: clustering heads of your task, which attend only to the tokens that matter.

    Such a head attends from ``query`` to the tokens marked ``relevant`` (mass at least 0.8, and
    above uniform attention), equally to each (normalised entropy among them at least 0.9), and its
    outputs cluster by group: the variance between groups is at least 0.8 of the total. The p-value
    of the last criterion comes from 999 permutations of the groups.

    Args:
        probe: texts of your task, with both marks.
        relevant: mark on the tokens that decide the answer.
        groups: group number per example; examples that the task treats alike share a group.
        query: mark on one position in each example.
        seed: seed for the permutations.

    Raises:
        InputError: if there are not as many group numbers as examples, or all are equal.

    Source: Cabannes et al. 2024 (arXiv 2410.24050), clustering heads of sparse modular addition;
    the thresholds are headscope's.

    Example:
        >>> marks = {"few": probe.mark("first_copy"), "end": torch.arange(probe.length) == 9}
        >>> texts = hs.probes.from_tokens(probe.tokens, marks={
        ...     "few": marks["few"], "end": marks["end"].expand(len(probe), -1)})
        >>> kind = hs.kinds.clustering(texts, "few", [0, 1] * (len(texts) // 2))
        >>> hs.kinds.survey(model, kind, confirm=False).asked[0].name
        'clustering'
    """
    labels = np.asarray(groups)
    if labels.shape != (len(probe),) or len(set(labels.tolist())) < 2:
        raise InputError(
            f"{len(labels)} groups for {len(probe)} examples: give a number for each, and at least "
            "two different ones."
        )
    probe.mark(relevant)
    keys = probe.host.mark(relevant)[:, None, :] & probe.host.mark(query)[:, :, None]
    scorers = relation("relevant", keys, control="flat")

    def measure(asked: AskedModel) -> list[Criterion]:
        found = asked.table(probe, [scorers.mass, scorers.evenness])
        z = outputs_at(asked.model, probe, query, asked.batch_size).double().numpy()
        ratio, p = cluster_ratio(z, labels, seed)
        return [
            above(found[scorers.mass.name], 0.8),
            Criterion("evenness among them", found[scorers.evenness.name].mean, 0.9),
            Criterion("variance between groups", ratio, 0.8, p),
        ]

    return Kind(
        "clustering",
        "attends equally to the tokens that matter, and its output separates their groups",
        probe.name or "yours", "uniform attention; permuted groups", measure,
        "Cabannes et al. 2024 (arXiv 2410.24050)",
        "relevant tokens at fixed positions can be found by position alone",
    )  # fmt: skip


@checked
def cluster_ratio(
    z: Float[np.ndarray, "example layer head size"], groups: Int[np.ndarray, " example"], seed: int
) -> tuple[HeadValues, HeadValues]:
    """Between-group share of the variance of head outputs, and its p-value.

    ``sum over groups of n_g |mean_g - mean|^2 / sum over examples of |z - mean|^2``: 1 if outputs
    are equal within each group and differ between groups, NaN if outputs do not vary. The p-value
    is the share of 1,000 groupings (999 permutations and the given one) that reach it.

    Args:
        z: head outputs.
        groups: group number per example.
        seed: seed for the permutations.

    Example:
        >>> z = np.array([0.0, 0.0, 1.0, 1.0])[:, None, None, None]
        >>> hs.kinds.cluster_ratio(z, np.array([0, 0, 1, 1]), 0)[0].tolist()
        [[1.0]]
    """
    centred = z - z.mean(0)
    flat = centred.reshape(len(z), -1)
    whole_variance = (centred**2).sum((0, -1))
    member = (groups[:, None] == np.unique(groups)).astype(float)

    def ratio(order: Int[np.ndarray, " example"]) -> HeadValues:
        chosen = member[order]
        means = (chosen.T @ flat).reshape(chosen.shape[1], *z.shape[1:])
        between: HeadValues = ((means**2).sum(-1) / chosen.sum(0)[:, None, None]).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(whole_variance > 0, between / whole_variance, np.nan)

    draw = np.random.default_rng(seed)
    own = ratio(np.arange(len(z)))
    reached = sum(ratio(draw.permutation(len(z))) >= own - 1e-12 for _ in range(999))
    return own, np.where(np.isnan(own), np.nan, (1 + reached) / 1000)
