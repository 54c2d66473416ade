"""Sections of a page on matched heads of two models."""

import numpy as np

from headscope.report.sections import Grid, Section, Words
from headscope.table import Comparison

_MOST = 200

_ORDER = "Pairs first whose heads both stand out from the typical head of their model"


def comparison_sections(found: Comparison) -> list[Section]:
    """How heads were matched, and which scores differ by more than their interval."""
    one, two = found.names
    words = Words(
        f"{one} and {two}: {len(found.pairs)} heads matched, {found.moved:.0%} of them under "
        f"another address. Closeness: {found.measure}."
    )
    pairs = [
        (str(a), str(b), float(close))
        for (a, b), close in zip(found.pairs[:_MOST], found.closeness, strict=False)
    ]
    clear = np.argwhere((found.low > 0) | (found.high < 0))
    order = sorted(clear.tolist(), key=lambda at: -abs(_in_spread(found, at)))[:_MOST]
    rows = [
        (
            str(found.pairs[i][0]),
            str(found.pairs[i][1]),
            found.scores[j],
            float(found.first[i, j]),
            float(found.second[i, j]),
            float(found.difference[i, j]),
            float(found.low[i, j]),
            float(found.high[i, j]),
        )
        for i, j in order
    ]
    names = ("head", "match", "score", one, two, "difference", "95% from", "to")
    caption = "Differences whose 95% interval excludes 0, the largest of each score's spread first"
    return [
        Section("Matched heads", [words, Grid((one, two, "closeness"), pairs, _ORDER)]),
        Section("Differences", [Grid(names, rows, caption)]),
    ]


def _in_spread(found: Comparison, at: list[int]) -> float:
    """A difference in units of the score's spread over all heads shown."""
    pair, score = at
    spread = float(np.nanstd(np.concatenate([found.first[:, score], found.second[:, score]])))
    return float(found.difference[pair, score]) / (spread or 1.0)
