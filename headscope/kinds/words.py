"""Words and prompts that kinds are asked with; sentences are our own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import torch
from jaxtyping import Bool
from torch import Tensor

from headscope.kinds.kind import CannotAskError
from headscope.probes.encoding import at_positions, encode, pad_right
from headscope.probes.pairs import CAPITALS
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import HasVocabulary, bos_prefix, check_length, need_tokenizer

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
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "black", "white"),
    "animal": ("dog", "cat", "horse", "cow", "bird", "fish"),
    "day": ("Monday", "Friday", "Sunday", "Tuesday", "Saturday", "Thursday"),
    "number": ("two", "three", "five", "seven", "eight", "nine"),
}
LETTERS = ("A", "B", "C", "D")


def token_of(model: HasVocabulary, word: str) -> int | None:
    """Id of a word with a space in front, if it is one token; else None."""
    tokenizer = need_tokenizer(model, "a word")
    text = f"and {word}"
    at = encode(tokenizer, text).word(4, len(text))
    return None if at is None else encode(tokenizer, text).ids[at]


def known(model: HasVocabulary, pairs: Mapping[str, str]) -> list[tuple[int, int]]:
    """Pairs of which both words are one token; different words have different tokens."""
    found = [(token_of(model, a), token_of(model, b)) for a, b in pairs.items()]
    return [(a, b) for a, b in found if a is not None and b is not None]


def marked(
    model: HasVocabulary,
    said: Sequence[tuple[str, Mapping[str, tuple[int, int]], str, str]],
    name: str,
    seed: int | None = None,
) -> Probe:
    """Prompts with marks by characters, and an answer and a foil that are single tokens.

    Args:
        model: whose tokenizer reads them.
        said: text, its marks, answer and foil (with their spaces; empty: none).
        name: of the probe.
        seed: of the draw.

    Raises:
        CannotAskError: if fewer than eight can be read so.
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
            f"{name}: the tokenizer of {model.name} reads {len(rows)} of {len(said)} prompts with "
            "answers of one token, and 8 are needed."
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
    """Id of the one token that a word is behind a text; -1 for no word, None if it is more."""
    if not word:
        return -1
    tokenizer = need_tokenizer(model, "an answer")
    before, both = encode(tokenizer, text).ids, encode(tokenizer, text + word).ids
    return both[-1] if both[:-1] == before else None


def choices(model: HasVocabulary, seed: int) -> Probe:
    """Questions with four lettered options in a drawn order; the answer is a letter."""
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
    made = marked(model, said, "choices", seed)
    letters = torch.stack([made.mark(f"option_{letter}") for letter in LETTERS]).any(0)
    return replace(made, marks={**made.marks, "letters": letters})


def yes_or_no(model: HasVocabulary, seed: int) -> Probe:
    """Questions that are to be answered with yes or no, which stand there in both orders."""
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
    return marked(model, said, "yes or no", seed)


def contradicted(model: HasVocabulary, seed: int) -> Probe:
    """A text says a wrong capital and asks for it: the context's answer, and memory's as foil."""
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
    return marked(model, said, "contradicted facts", seed)


def statements(model: HasVocabulary) -> tuple[Probe, Probe]:
    """True and false statements of capitals; a false one swaps those of every other country.

    Countries at even places and at odd ones share no word, so that what is fitted to the first is
    tried on words that it has not seen.
    """
    names = sorted(CAPITALS)[: 2 * (len(CAPITALS) // 2)]
    true = [f"The city of {CAPITALS[one]} is the capital of {one}." for one in names]
    false = [
        f"The city of {CAPITALS[names[(at + 2) % len(names)]]} is the capital of {one}."
        for at, one in enumerate(names)
    ]
    return _texts(model, true, "true statements"), _texts(model, false, "false statements")


def opinions(model: HasVocabulary) -> tuple[Probe, Probe]:
    """Sentences with a good and with a bad word, none of them twice."""
    form = "Everybody who saw it said that the film was {}."
    good, bad = ([form.format(word) for word in words] for words in (GOOD, BAD))
    return _texts(model, good, "good opinions"), _texts(model, bad, "bad opinions")


def _texts(model: HasVocabulary, texts: Sequence[str], name: str) -> Probe:
    return marked(model, [(text, {}, "", "") for text in texts], name)


def _at(text: str, word: str, behind: str) -> tuple[int, int]:
    start = text.index(word, text.index(behind)) + 1
    return start, start + len(word) - 1


def pieces(model: HasVocabulary, probe: Probe) -> list[tuple[int, int, int]]:
    """Pairs of a token and an earlier piece of the same word: example, query, key."""
    tokenizer = need_tokenizer(model, "a text")
    rows = [row[real].tolist() for row, real in zip(probe.tokens, probe.real, strict=True)]
    beside = sorted({pair for row in rows for pair in pairwise(row)})
    alone = sorted({token for row in rows for token in row})
    both = tokenizer.batch_decode([list(pair) for pair in beside])
    first = dict(zip(alone, tokenizer.batch_decode([[one] for one in alone]), strict=True))
    # One token's text may lack the space in front of it, or have a sign for its absence: whether
    # a word goes on is seen in the text of two.
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
    """Tokens that hold an apostrophe."""
    tokenizer = need_tokenizer(model, "a text")
    ids = sorted(set(probe.tokens[probe.real].tolist()))
    held = [one for one in ids if any(c in tokenizer.batch_decode([[one]])[0] for c in "'\u2019")]
    return torch.isin(probe.tokens, torch.tensor(held, dtype=torch.long)) & probe.real
