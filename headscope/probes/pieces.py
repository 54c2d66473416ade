"""Texts put together from marked pieces, and the tokens of each mark."""

from collections.abc import Sequence
from typing import NamedTuple

from headscope.probes.encoding import encode
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
