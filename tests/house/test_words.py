"""Phrases that docstrings, comments and messages do without, each with what to say instead."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import headscope

PACKAGE = Path(headscope.__file__).parent
# Texts that models read; not ours to word.
TEXTS = ("models/bundled/__init__.py",)
PHRASES = {
    r"(?<!there )\b(?:is|are) no (?!longer\b|more\b)": "'is not a ...'",
    r"\bof your own\b": "'your own ...', or say what it is",
    r"\bwhatever kills\b": "'atomic'",
    r"\bwhere somebody looks on\b": "'in a terminal or notebook'",
    r"\bnobody\b": "say what does not do it",
    r"\bstays done\b": "'finished chunks are kept'",
    r"\bknows of\b": "'knows'",
    r"\bthe way out\b": "'what to do'",
    r"\bless that (?:of|without)\b": "'minus that ...'",
    r"\bof equals\b": "'on ties'",
    r"\bwhoever\b": "say who or what does it",
    r"\bsomebody\b": "say who or what does it",
    r"\bforetells?\b": "'predict'",
    r"\blikeliest\b": "'most likely'",
    r"\bleaves? nothing to\b": "'give 1 or more'",
    r"\bwhole or absent\b": "'atomically'",
    r"\bmakes? no sense\b": "'is invalid'",
    r"\bas they are now\b": "'current'",
    r"\bgoes on from there\b": "'resumes'",
    r"\bNone where\b": "'None if ...'",
    r"\bwhere there (?:is|are) none\b": "'if there is none'",
    r"\bwhat becomes of\b": "say what is done with it",
    r"\bcan do with(?:out)? (?:an?|few|fewer|less|no)\b": "'needs only ...'",
    r"\bhands? over\b": "'pass' or 'return'",
    r"\bheld against\b": "'compared with'",
    r"\bbelongs? to no\b": "'is not part of a ...'",
    r"\blikelier\b": "'more likely'",
    r"\b(?:one|two|three|ten) (?:\w+ )?at least(?=[.,;:)]|$)": "'at least one ...'",
    r"\bsaid (?:twice|again)\b": "'repeated'",
    r"\btried on\b": "'tested on'",
    r"\bshow (?:a bar|bars)\b": "'show a progress bar'",
    r"\bchanges? no(?:thing but| number)\b": "'affects only ...'",
    r"\bone an? \w+ of\b": "'one ... per ...'",
    r": likewise\.": "name what it is, or where it is described",
    r": that (?:is|are) (?:run|asked|read)\b": "name the thing: 'model: model to run'",
    r"\bspread evenly\b": "'uniform'",
    r"\bwith what to do\b": "say when it is raised",
    r"\bof kind ``": "name the thing: 'needle probe'",
}
# Words that were left for the field's own, with these.
LEFT = {
    "Matches": "QueryKeys",
    "match_scorer": "qk_scorer",
    "InputNorm": "Norm",
    "Readout": "Unembedding",
    "readout": "unembedding",
}
# The same concept on both paths into a model.
SHARED = {"AttentionTaps", "EditScope", "Look"}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.as_posix().endswith(TEXTS)]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a source, parts of f-strings included, on one line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


def test_no_source_has_such_a_phrase() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {match[0]!r}: say {better}"
        for path in FILES
        for line, text in texts(path)
        for phrase, better in PHRASES.items()
        if (match := re.search(phrase, text, re.IGNORECASE))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "'x' is no shard.",
        "an edit of your own",
        "Nobody reads it.",
        "It stays done.",
        "the metric less that without",
        "of equals the first",
        "whoever calls it",
        "the likeliest token",
        "steps=0 leaves nothing to run",
        "each file is whole or absent",
        "it goes on from there",
        "the norm; None where there is none",
        "heads that can do with a short cache",
        "the answer becomes likelier",
        "x: points; two at least.",
        "random tokens said twice",
        "progress: show a bar.",
        "model: that is run.",
    ],
)
def test_a_planted_phrase_is_found(text: str) -> None:
    assert any(re.search(phrase, text, re.IGNORECASE) for phrase in PHRASES)


@pytest.mark.parametrize(
    "text",
    [
        "there is no head L9H9",
        "it is no longer there",
        "known of old",
        "what headscope can do with MODEL",
        "give at least two examples",
    ],
)
def test_good_words_pass(text: str) -> None:
    assert not any(re.search(phrase, text, re.IGNORECASE) for phrase in PHRASES)


def classes(path: Path) -> list[str]:
    """Names of the public classes of a source."""
    tree = ast.parse(path.read_text("utf-8"))
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [name for name in found if not name.startswith("_")]


def test_a_name_is_of_one_class() -> None:
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for name in classes(path):
            homes.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    several = {name: where for name, where in homes.items() if len(where) > 1}
    assert several.keys() == SHARED, several


def test_words_that_were_left_stay_away() -> None:
    word = re.compile(rf"\b({'|'.join(LEFT)})\b")
    found = [
        f"{path.relative_to(PACKAGE)}: {old}: say {LEFT[old]}"
        for path in FILES
        for old in sorted(set(word.findall(path.read_text("utf-8"))))
    ]
    assert not found, "\n" + "\n".join(found)


def unfilled(path: Path) -> Iterator[str]:
    """Texts that name a local variable in braces and are no f-strings: their f was forgotten."""
    tree = ast.parse(path.read_text("utf-8"))
    filled = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {one.arg for one in ast.walk(function) if isinstance(one, ast.arg)}
        names |= {one.id for one in ast.walk(function) if isinstance(one, ast.Name)}
        raised = {
            part
            for node in ast.walk(function)
            if isinstance(node, ast.Raise)
            for part in ast.walk(node)
        }
        for node in set(ast.walk(function)) - filled:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                end = r"[^{}]*" if node in raised else r"\([^{}]*"  # elsewhere, calls alone
                found = re.findall(rf"(?<![%{{])\{{([a-z_]\w*)(?!: ){end}\}}", node.value)
                if node.value != ast.get_docstring(function, clean=False):
                    yield from (
                        f"{path.name}:{node.lineno}: {{{one}" for one in found if one in names
                    )


def test_messages_are_filled_in(tmp_path: Path) -> None:
    source = tmp_path / "planted.py"
    source.write_text('def f(place):\n    raise ValueError("in {place}: ", f"at {place}")\n')
    assert list(unfilled(source)) == ["planted.py:2: {place"]
    assert not [one for path in FILES for one in unfilled(path)]
