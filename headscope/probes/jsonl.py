"""Your own prompts, from a JSON Lines file, with parts of a text named in words."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from headscope.base.files import read_lines
from headscope.errors import InputError
from headscope.probes.encoding import (
    Encoded,
    at_positions,
    delimiters,
    encode,
    next_tokens,
    pad_right,
    separators,
)
from headscope.probes.pairs import with_accuracy
from headscope.probes.probe import Probe
from headscope.probes.vocabulary import (
    HasVocabulary,
    Tokenizer,
    check_length,
    frame,
    need_onwards,
    need_tokenizer,
    reads_onwards,
)

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
    """Characters of a part of a text, end excluded.

    Args:
        text: to look in.
        said: the part itself, which must stand there once; or which of several it is, the part in
            quotes: ``the second 'Mary'``, ``the last 'to'``, ``the 12th ','``. As whole words if
            it stands there as whole words.

    Raises:
        InputError: if it does not stand there, or more often than once where nothing says which.

    Example:
        >>> from headscope.probes.jsonl import find_span
        >>> find_span("Mary saw Mary.", "the second 'Mary'")
        (9, 13)
    """
    named = _NAMED.fullmatch(said.strip())
    part = said if named is None else named["part"]
    if not part.strip():
        raise InputError("a part of a text without a character cannot be found.")
    whole = re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", text)
    starts = [match.start() for match in whole]
    if not starts:
        starts = [match.start() for match in re.finditer(re.escape(part), text)]
    if not starts:
        raise InputError(f"{part!r} does not stand in the text {_short(text)}.")
    if named is None and len(starts) > 1:
        raise InputError(
            f"{part!r} stands {len(starts)} times in the text {_short(text)}: say which, e.g. "
            f"\"the second '{part}'\"."
        )
    number = 1 if named is None else _number(named["nth"].lower())
    if number > len(starts):
        raise InputError(
            f"there is no {said!r}: {part!r} stands {len(starts)} times in the text {_short(text)}."
        )
    start = starts[number - 1]
    return start, start + len(part)


def _number(nth: str) -> int:
    """Which occurrence, from 1; 0 is the last one."""
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
    """One prompt: its tokens, the ids of answer and foil (-1: none), and its marks."""

    ids: list[int]
    answer: int
    foil: int
    marks: dict[str, list[int]]
    corrupt: "_Line | None" = None
    pairs: Mapping[str, list[tuple[int, int]]] = MappingProxyType({})


def from_jsonl(model: HasVocabulary, path: str | Path, *, bos: bool | None = None) -> Probe:
    """Read prompts, one JSON object a line.

    ``{"text": ..., "answer": ..., "foil": ..., "marks": {"name": [start, end]}}``; all but
    ``text`` may be left out, or be null. ``answer`` is what follows the text, character by
    character (a new word starts with its space), and must be one token, as must ``foil``, the
    wrong alternative.
    A mark is a range of characters of the text, end excluded, and becomes every token that
    holds one of them; or the part of the text itself, ``"Mary"``, where it stands once, or ``"the
    second 'Mary'"``, ``"the last 'to'"``. Two marks are added unless the file has them: ``end``,
    the last token, and ``delimiter``.

    ``"pairs": {"name": [[query, key], ...]}`` are relations for :func:`headscope.scorers.relation`:
    each end is a mark of the line by its name, or named as a mark's place is; every token of
    the first is paired with every token of the second. They become the probe's ``pairs``.

    Targets are the answers, at ``end`` alone; in a file without answers, the next tokens.

    Pairs for patching have a second text, ``{"clean": ..., "corrupt": ..., "answer": ..., "foil":
    ..., "corrupt_answer": ..., "corrupt_foil": ...}`` (``clean`` is another word for ``text``): in
    every line or in none, in as many tokens as the first, so that positions correspond. They are
    the probe's ``corrupt``. ``corrupt_answer`` and ``corrupt_foil`` are what follows the corrupt
    text; default: the same as of the clean one, which makes a metric ask of both runs for the
    same answer. Marks are ranges of the clean text and name positions of both.

    With answers, and a model that can be run, ``settings["accuracy"]`` says how often the model
    prefers them, see :func:`headscope.probes.pairs`.

    Raises:
        InputError: with one sentence for every bad line, naming it.

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
    """One line; raises :class:`InputError` with what is wrong with it."""
    try:
        fields = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no valid JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise InputError("an object with a string 'text' is needed.")
    fields = {name: value for name, value in fields.items() if value is not None}  # null: absent
    if "text" in fields and "clean" in fields:
        raise InputError("'clean' is another word for 'text': give one of them.")
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
    """The second text of a pair with what follows it; None where there is none."""
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
            f"{len(clean.ids) - len(prefix)}: change words for others of as many tokens, so that "
            "positions correspond."
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
    """Names and words of what follows a corrupt text: its own, or those of the clean one."""
    for name in ("answer", "foil"):
        own = f"corrupt_{name}"
        yield (own, fields[own]) if own in fields else (name, fields.get(name))


def _following(tokenizer: Tokenizer, before: Encoded, word: object, name: str, prefix: int) -> int:
    """Id of the one token that ``word`` adds to the text."""
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
