"""Sentences to hide something in: bundled ones, or those of a file or folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random

from headscope.errors import InputError
from headscope.files import read_text

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
