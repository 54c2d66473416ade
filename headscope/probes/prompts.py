"""Probes from user prompts: JSON Lines files, and in-context demonstrations with a query."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import read_lines
from headscope.errors import InputError
from headscope.probes.encoding import (
    Encoded,
    HasVocabulary,
    Tokenizer,
    at_positions,
    bos_prefix,
    check_length,
    delimiters,
    encode,
    frame,
    need_onwards,
    need_tokenizer,
    next_tokens,
    pad_right,
    reads_onwards,
    separators,
)
from headscope.probes.pairs import with_accuracy
from headscope.probes.probe import Probe

_WORDS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
]
_NTH = {word: number for number, word in enumerate(_WORDS, 1)} | {"last": 0}
_NAMED = re.compile(
    rf"""(?:the\s+)?(?P<nth>{"|".join(_NTH)}|\d+(?:st|nd|rd|th))\s+(?P<quote>['"])(?P<part>.+)(?P=quote)""",
    re.IGNORECASE | re.DOTALL,
)


def find_span(text: str, said: str) -> tuple[int, int]:
    """Find the characters of a part of a text, end excluded.

    Args:
        text: text to search.
        said: the part itself, which must occur exactly once; or an occurrence, with the part in
            quotes: ``the second 'Mary'``, ``the last 'to'``, ``the 12th ','``. Whole words are
            preferred.

    Raises:
        InputError: if the part does not occur, or occurs several times without an ordinal.

    Example:
        >>> from headscope.probes.prompts import find_span
        >>> find_span("Mary saw Mary.", "the second 'Mary'")
        (9, 13)
    """
    if not isinstance(said, str):
        raise InputError(f"the part of a text to find is itself a text, not {said!r}.")
    named = _NAMED.fullmatch(said.strip())
    part = said if named is None else named["part"]
    if not part.strip():
        raise InputError("the part of the text to find is empty.")
    whole = re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)
    starts = [match.start() for match in whole]
    if not starts:
        starts = [match.start() for match in re.finditer(re.escape(part), text)]
    if not starts:
        raise InputError(f"{part!r} does not occur in the text {_short(text)}.")
    if named is None and len(starts) > 1:
        raise InputError(
            f"{part!r} occurs {len(starts)} times in the text {_short(text)}: say which, e.g. "
            f"\"the second '{part}'\"."
        )
    number = 1 if named is None else _number(named["nth"].lower())
    if number > len(starts):
        raise InputError(
            f"there is no {said!r}: {part!r} occurs {len(starts)} times in the text {_short(text)}."
        )
    start = starts[number - 1]
    return start, start + len(part)


def _number(nth: str) -> int:
    """Number of an occurrence, from 1; 0 is the last one."""
    if nth in _NTH:
        return _NTH[nth]
    number = int(re.sub(r"\D", "", nth))
    if number < 1:
        raise InputError(f"{nth!r}: occurrences are counted from the first.")
    return number


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


_FIELDS = {
    "text", "clean", "answer", "foil", "marks", "pairs",
    "corrupt", "corrupt_answer", "corrupt_foil",
}  # fmt: skip
_SHOWN = 10


class _Line(NamedTuple):
    """One encoded prompt: tokens, ids of answer and foil (-1: none), and marks."""

    ids: list[int]
    answer: int
    foil: int
    marks: dict[str, list[int]]
    corrupt: "_Line | None" = None
    pairs: Mapping[str, list[tuple[int, int]]] = MappingProxyType({})


@checked
def from_jsonl(model: HasVocabulary, path: str | Path, *, bos: bool | None = None) -> Probe:
    """Read prompts from a JSON Lines file, one object per line.

    ``{"text": ..., "answer": ..., "foil": ..., "marks": {"name": [start, end]}}``; only ``text`` is
    required, and other fields may be null. ``answer`` is what follows the text, character by
    character (a new word starts with its space), and must be one token, as must ``foil``, the wrong
    alternative. A mark is a range of characters of the text, end excluded, and becomes every token
    that overlaps it; or the part of the text itself: ``"Mary"`` if it occurs once, otherwise ``"the
    second 'Mary'"``, ``"the last 'to'"``. Two marks are added unless the file has them: ``end``,
    the last token, and ``delimiter``.

    ``"pairs": {"name": [[query, key], ...]}`` are relations for :func:`headscope.scorers.relation`:
    each end is the name of a mark of the line, or a place in the form of a mark; every token of the
    first is paired with every token of the second. They become the probe's ``pairs``.

    Targets are the answers, only at ``end``; in a file without answers, the next tokens.

    Pairs for patching have a second text, ``{"clean": ..., "corrupt": ..., "answer": ..., "foil":
    ..., "corrupt_answer": ..., "corrupt_foil": ...}`` (``clean`` is an alias of ``text``): in every
    line or in none, with as many tokens as the first, so that positions correspond. They become the
    probe's ``corrupt``. ``corrupt_answer`` and ``corrupt_foil`` continue the corrupt text; default:
    the clean ones, so that a metric asks both runs for the same answer. Marks are ranges of the
    clean text and apply to both.

    With answers, and a model that can be run, ``settings["accuracy"]`` says how often the model
    prefers the answers, see :func:`headscope.probes.pairs`.

    Args:
        model: model whose tokenizer encodes the texts.
        path: path of the file.
        bos: prepend a BOS. Default: if the model's tokenizer does.

    Returns:
        A probe with one example per line.

    Raises:
        InputError: with one sentence for every bad line and its number.

    Example:
        >>> with open("mine.jsonl", "w") as file:
        ...     _ = file.write('{"text": "Mary gave a drink to", "answer": " John"}')
        >>> probe = hs.probes.from_jsonl(model, "mine.jsonl")
        >>> len(probe), sorted(probe.marks)
        (1, ['delimiter', 'end'])
    """
    tokenizer = need_tokenizer(model, "a JSONL probe")
    prefix, suffix = frame(model, bos)
    written = read_lines(path)
    lines, wrong = [], []
    for number, one in enumerate(written, 1):
        if not one.strip():
            continue
        try:
            line = _read(tokenizer, prefix, one)
            if line.answer >= 0:
                need_onwards(model, "an answer")
            check_length(model, len(line.ids) + len(suffix), what="its text", fix="shorten it")
            lines.append(line)
        except InputError as error:
            wrong.append(f"{path}, line {number}: {error}")
    if wrong:
        more = [f"... and {len(wrong) - _SHOWN} more bad lines."] if len(wrong) > _SHOWN else []
        raise InputError("\n".join([*wrong[:_SHOWN], *more]))
    if not lines:
        raise InputError(f"{path} is empty: write one JSON object with a 'text' on each line.")
    single = [number for number, line in enumerate(lines, 1) if line.corrupt is None]
    if single and len(single) < len(lines):
        raise InputError(
            f"{path}: some prompts have a 'corrupt' text and prompt {single[0]} has none: "
            "give it in every line or in none."
        )
    settings: dict[str, str | int | float | bool | None] = {
        "source": Path(path).name,
        "bos": bool(prefix),
    }
    make = partial(
        _probe, tokenizer, suffix=suffix, settings=settings, next_token=reads_onwards(model)
    )
    probe = make(lines)
    if not single:
        others = [line.corrupt for line in lines if line.corrupt is not None]
        probe = replace(probe, corrupt=make(others))
    return with_accuracy(model, probe) if any(line.answer >= 0 for line in lines) else probe


def _probe(
    tokenizer: Tokenizer,
    lines: list[_Line],
    suffix: list[int],
    settings: Mapping[str, str | int | float | bool | None],
    next_token: bool,
) -> Probe:
    tokens, real = pad_right([[*line.ids, *suffix] for line in lines])
    end = [len(line.ids) - 1 for line in lines]
    targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    rows = torch.arange(len(lines))
    targets[rows, end] = torch.tensor([line.answer for line in lines])
    foils[rows, end] = torch.tensor([line.foil for line in lines])
    marks = {
        "end": at_positions(tokens.shape[1], end),
        "delimiter": delimiters(tokenizer, tokens, real),
    }
    if not next_token:
        marks |= separators(tokenizer, tokens, real)
    answered = bool((targets >= 0).any())
    for name in sorted({name for line in lines for name in line.marks}):
        marks[name] = at_positions(tokens.shape[1], [line.marks.get(name, []) for line in lines])
    related = {
        name: [[row, *pair] for row, line in enumerate(lines) for pair in line.pairs.get(name, [])]
        for name in sorted({name for line in lines for name in line.pairs})
    }
    return Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=next_tokens(tokens, real) if next_token and not answered else targets,
        next_token=next_token and not answered,
        foils=foils if (foils >= 0).any() else None,
        marks=marks,
        pairs={name: torch.tensor(rows).reshape(-1, 3) for name, rows in related.items()},
        name="jsonl",
        settings=settings,
    )


def _read(tokenizer: Tokenizer, prefix: list[int], written: str) -> _Line:
    """Parse one line; raise :class:`InputError` with what is wrong with it."""
    try:
        fields = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise InputError("an object with a string 'text' is needed.")
    fields = {name: value for name, value in fields.items() if value is not None}  # null: absent
    if "text" in fields and "clean" in fields:
        raise InputError("'clean' is an alias of 'text': give only one of them.")
    named = "clean" if "clean" in fields else "text"
    if not isinstance(fields.get(named), str):
        raise InputError("an object with a string 'text' is needed.")
    if unknown := sorted(set(fields) - _FIELDS):
        raise InputError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}.")
    encoded = encode(tokenizer, fields[named], prefix)
    if len(encoded.ids) == len(prefix):
        raise InputError("its text is empty.")
    if "foil" in fields and "answer" not in fields:
        raise InputError("a foil needs an answer to differ from.")
    answer, foil = (
        _following(tokenizer, encoded, fields[name], name, len(prefix)) if name in fields else -1
        for name in ("answer", "foil")
    )
    if answer >= 0 and answer == foil:
        raise InputError("its answer and its foil are the same token.")
    corrupt = _corrupt(tokenizer, prefix, encoded, fields)
    marks = fields.get("marks", {})
    if not isinstance(marks, dict):
        raise InputError('its marks are not {"name": [start, end] or "part of the text"}.')
    marks = {name: at for name, at in marks.items() if at is not None}
    placed = {name: _span(encoded, name, at) for name, at in marks.items()}
    related = _pairs(encoded, {"end": [len(encoded.ids) - 1], **placed}, fields.get("pairs", {}))
    if corrupt is not None:
        corrupt = corrupt._replace(marks=placed, pairs=related)
    return _Line(encoded.ids, answer, foil, placed, corrupt, related)


def _pairs(
    encoded: Encoded, marks: Mapping[str, list[int]], given: object
) -> dict[str, list[tuple[int, int]]]:
    """Positions of the (query, key) pairs of every relation of a line."""
    if not isinstance(given, dict):
        raise InputError('its pairs are not {"name": [[query, key], ...]}.')
    found = {}
    for name, listed in given.items():
        if not isinstance(listed, list) or not all(
            isinstance(one, list) and len(one) == 2 for one in listed
        ):
            raise InputError(f"its pairs {name!r} are not a list of [query, key].")
        ends = [
            [
                marks[end] if isinstance(end, str) and end in marks else _span(encoded, name, end)
                for end in pair
            ]
            for pair in listed
        ]
        found[name] = [(query, key) for one, two in ends for query in one for key in two]
    return found


def _corrupt(
    tokenizer: Tokenizer, prefix: list[int], clean: Encoded, fields: Mapping[str, object]
) -> _Line | None:
    """Parse the corrupt text of a pair and its answers; None if there is none."""
    if "corrupt" not in fields:
        for name in ("corrupt_answer", "corrupt_foil"):
            if name in fields:
                raise InputError(f"a {name} needs a 'corrupt' text to follow.")
        return None
    text = fields["corrupt"]
    if not isinstance(text, str):
        raise InputError("its corrupt text is not a string.")
    encoded = encode(tokenizer, text, prefix)
    if len(encoded.ids) != len(clean.ids):
        raise InputError(
            f"its corrupt text is {len(encoded.ids) - len(prefix)} tokens and its clean one "
            f"{len(clean.ids) - len(prefix)}: replace words with others of the same number of "
            "tokens, so that positions correspond."
        )
    if encoded.ids == clean.ids:
        raise InputError("its corrupt text is the clean one.")
    if "corrupt_foil" in fields and "corrupt_answer" not in fields:
        raise InputError("a corrupt_foil needs a corrupt_answer to differ from.")
    answer, foil = (
        _following(tokenizer, encoded, word, name, len(prefix)) if word is not None else -1
        for name, word in _followers(fields)
    )
    if answer >= 0 and answer == foil:
        raise InputError("its corrupt_answer and its corrupt_foil are the same token.")
    return _Line(encoded.ids, answer, foil, {})


def _followers(fields: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Fields and words that follow a corrupt text: its own, or those of the clean one."""
    for name in ("answer", "foil"):
        own = f"corrupt_{name}"
        yield (own, fields[own]) if own in fields else (name, fields.get(name))


def _following(tokenizer: Tokenizer, before: Encoded, word: object, name: str, prefix: int) -> int:
    """Id of the single token that ``word`` adds to the text."""
    if not isinstance(word, str) or not word.strip():
        raise InputError(f"its {name} is not a word.")
    joint = before.text[-1] + word[0]
    if joint.isascii() and joint.isalpha():
        raise InputError(f"its {name} {word!r} would be glued to the text: start it with a space.")
    both = encode(tokenizer, before.text + word, before.ids[:prefix]).ids
    start = len(before.ids)
    if both[:start] != before.ids:
        raise InputError(f"its {name} {word!r} changes the tokens of the text that it follows.")
    if len(both) != start + 1:
        raise InputError(f"its {name} {word!r} is {len(both) - start} tokens: it must be one.")
    return both[start]


def _span(encoded: Encoded, name: str, at: object) -> list[int]:
    """Tokens of the characters ``at``: a range, or a part of the text in words."""
    if isinstance(at, str):
        try:
            at = list(find_span(encoded.text, at))
        except InputError as error:
            raise InputError(f"mark {name!r}: {error}") from error
    start, end = at if isinstance(at, list) and [type(n) for n in at] == [int, int] else (0, 0)
    if not 0 <= start < end <= len(encoded.text):
        raise InputError(
            f"mark {name!r} is {at!r}: two character positions [start, end] within the "
            f"{len(encoded.text)} characters of its text are needed, or the part itself."
        )
    found = encoded.covering(start, end)
    if not found:
        raise InputError(f"mark {name!r} covers no token.")
    return found


Example = tuple[str, str]
TEMPLATE = "{text} : {label}\n"
# Up to this many classes get their own marks.
_MOST_CLASSES = 12


class _Said(NamedTuple):
    """One prompt: its tokens up to the answer, the answer, and the positions of its words."""

    ids: list[int]
    answer: int
    labels: list[int]
    query: list[int]


@checked
def in_context(
    model: HasVocabulary,
    demonstrations: Sequence[Example],
    queries: Sequence[Example] | None = None,
    *,
    template: str = TEMPLATE,
    shots: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
) -> Probe:
    """Make few-shot prompts from labelled demonstrations; the target at ``end`` is the label.

    Every prompt has ``shots`` demonstrations in a seeded order, drawn class by class so that
    classes are as balanced as possible, and then the query without its label. A query is never
    among its own demonstrations. Marks: ``label`` (label words of the demonstrations), ``label_0``,
    ``label_1``, ... by class, in the order of ``settings["classes"]`` (up to 12 classes, if every
    prompt shows each), ``query`` (the query's text) and ``end``. Fact: ``class``.

    ``probe.corrupt`` has the same prompts with the demonstrations' labels permuted: the same words
    without the task. If all labels of a prompt are equal they stay.

    Args:
        model: its tokenizer encodes the prompts.
        demonstrations: pairs of a text and its label; a label must be one token in the prompt.
        queries: the same; default: every demonstration in turn.
        template: contains ``{text}`` and then ``{label}``, each once.
        shots: demonstrations per prompt; default: one of each class, at most 10.
        batch: keep this many queries, drawn with the seed; default: all.
        seed: seed of the draws.
        bos: whether to prepend a BOS; None follows the model's tokenizer.

    Raises:
        InputError: if a label is several tokens, a class has no demonstration, or the numbers do
            not fit.

    Example:
        >>> shown = [("cat", " Mary"), ("dog", " John"), ("park", " Mary"), ("box", " John")]
        >>> probe = hs.probes.in_context(model, shown, template="the {text} and{label} .")
        >>> probe.settings["classes"]
        ' Mary; John'
    """
    need_onwards(model, "an in-context probe")
    tokenizer = need_tokenizer(model, "an in-context probe")
    _check_template(template)
    shown = [_pair(one, "demonstration") for one in demonstrations]
    asked = shown if queries is None else [_pair(one, "query") for one in queries]
    classes = list(dict.fromkeys(label for _, label in shown))
    count = min(len(classes), 10) if shots is None else shots
    _check_numbers(shown, asked, classes, count, batch)
    rng = Random(f"in context {seed}")  # noqa: S311  prompts, not secrets
    order = list(range(len(asked)))
    if batch is not None:
        order = sorted(rng.sample(order, batch))
    prefix = bos_prefix(model, bos)
    said, other, rows = [], [], []
    for number in order:
        left = [one for one in shown if one != asked[number]]
        chosen = _drawn(left, classes, count, rng)
        labels = _moved([label for _, label in chosen], rng)
        swapped = [(text, label) for (text, _), label in zip(chosen, labels, strict=True)]
        rows.append(([label for _, label in chosen], labels))
        said.append(_said(tokenizer, prefix, template, chosen, asked[number]))
        other.append(_said(tokenizer, prefix, template, swapped, asked[number]))
    facts = torch.tensor([float(classes.index(asked[number][1])) for number in order])
    settings: dict[str, str | int | float | bool | None] = {
        "classes": ";".join(classes), "shots": count, "template": template, "bos": bool(prefix)
    }  # fmt: skip
    clean = _of_prompts(said, [one for one, _ in rows], classes, facts, seed, settings)
    check_length(model, clean.length, what="an in-context prompt", fix="give fewer shots")
    corrupt = _of_prompts(other, [one for _, one in rows], classes, facts, seed, settings)
    if [len(one.ids) for one in said] != [len(one.ids) for one in other]:
        return clean  # a label changed the tokens around it, so the pair is not aligned
    return replace(clean, corrupt=corrupt)


def _check_template(template: str) -> None:
    parts = [template.count("{text}"), template.count("{label}")]
    if parts != [1, 1] or template.index("{text}") > template.index("{label}"):
        raise InputError(
            f"the template {template!r} must hold {{text}} and then {{label}}, each once."
        )


def _pair(one: object, what: str) -> Example:
    if (
        not isinstance(one, Sequence) or isinstance(one, str) or len(one) != 2
        or not all(isinstance(part, str) and part.strip() for part in one)
    ):  # fmt: skip
        raise InputError(f"a {what} is a pair of texts, (text, label); got {one!r}.")
    return str(one[0]), str(one[1])


def _check_numbers(
    shown: Sequence[Example],
    asked: Sequence[Example],
    classes: Sequence[str],
    shots: int,
    batch: int | None,
) -> None:
    if not shown or not asked:
        raise InputError("demonstrations= is empty: give pairs (text, label).")
    for text, label in asked:
        if label not in classes:
            raise InputError(
                f"the class {label!r} of the query {text!r} has no demonstration: give one, or "
                "leave the query out."
            )
        if (
            not any(one != (text, label) and one[1] == label for one in shown)
            and len(classes) <= shots
        ):
            raise InputError(
                f"the class {label!r} has a single example, which is the query: give a second "
                "one to demonstrate it."
            )
    if shots < 1 or shots >= len(shown) + (asked is not shown):
        raise InputError(
            f"shots={shots}: there are only {len(shown)} demonstrations besides the query."
        )
    if batch is not None and not 1 <= batch <= len(asked):
        raise InputError(f"batch={batch}: there are {len(asked)} queries.")


def _drawn(
    shown: Sequence[Example], classes: Sequence[str], count: int, rng: Random
) -> list[Example]:
    """Draw demonstrations, class by class, in a random order."""
    by_class = {name: [one for one in shown if one[1] == name] for name in classes}
    for some in by_class.values():
        rng.shuffle(some)
    names, chosen = list(classes), list[Example]()
    while len(chosen) < count:
        rng.shuffle(names)
        for name in names:
            if by_class[name] and len(chosen) < count:
                chosen.append(by_class[name].pop())
    rng.shuffle(chosen)
    return chosen


def _moved(labels: list[str], rng: Random) -> list[str]:
    """Permute the labels; unchanged if all are equal."""
    if len(set(labels)) < 2:
        return labels
    while True:
        moved = rng.sample(labels, len(labels))
        if moved != labels:
            return moved


def _said(
    tokenizer: Tokenizer,
    prefix: list[int],
    template: str,
    shown: Sequence[Example],
    asked: Example,
) -> _Said:
    """Encode one prompt and find its words by characters, with all its labels."""
    text, labels, query = "", [], (0, 0)
    for words, label in (*shown, asked):
        before, between, after = template.replace("{text}", "{label}").split("{label}")
        start = len(text) + len(before)
        query = (start, start + len(words))
        text += before + words + between
        labels.append((len(text), len(text) + len(label)))
        text += label + after
    encoded = encode(tokenizer, text, prefix)
    places = [_one_token(encoded, span) for span in labels]
    end = places.pop()
    return _Said(encoded.ids[:end], encoded.ids[end], places, encoded.covering(*query))


def _one_token(encoded: Encoded, span: tuple[int, int]) -> int:
    found = encoded.word(*span)
    if found is None:
        label = encoded.text[slice(*span)]
        pieces = [encoded.text[slice(*encoded.spans[at])] for at in encoded.covering(*span)]
        raise InputError(
            f"the label {label!r} is not a separate token there ({pieces}): take "
            "another word, or end the template before it with a space."
        )
    return found


def _of_prompts(
    said: Sequence[_Said],
    labels: Sequence[Sequence[str]],
    classes: Sequence[str],
    facts: Tensor,
    seed: int,
    settings: dict[str, str | int | float | bool | None],
) -> Probe:
    tokens, real = pad_right([one.ids for one in said])
    length = tokens.shape[1]
    ends = [len(one.ids) - 1 for one in said]
    targets: Int[Tensor, "batch pos"] = torch.full_like(tokens, -1)
    targets[torch.arange(len(said)), torch.tensor(ends)] = torch.tensor(
        [one.answer for one in said]
    )
    marks = {
        "end": at_positions(length, ends),
        "label": at_positions(length, [one.labels for one in said]),
        "query": at_positions(length, [one.query for one in said]),
    }
    if len(classes) <= _MOST_CLASSES and all(set(row) == set(classes) for row in labels):
        for number, name in enumerate(classes):
            places = [
                [at for at, word in zip(one.labels, row, strict=True) if word == name]
                for one, row in zip(said, labels, strict=True)
            ]
            marks[f"label_{number}"] = at_positions(length, places)
    return Probe(
        tokens=tokens,
        real=real,
        structure=tokens.where(real, -1),
        targets=targets,
        marks=marks,
        facts={"class": facts},
        name="in_context",
        seed=seed,
        settings=settings,
    )
