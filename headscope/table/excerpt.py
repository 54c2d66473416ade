"""The part of a table that is worth a glance: which scores, which heads, how written."""

import math
from collections.abc import Iterable

from headscope.heads import HeadIndex
from headscope.table.scores import HeadScores
from headscope.table.table import HeadTable


def by_interest(table: HeadTable) -> list[HeadScores]:
    """Scores with a role first, else in the table's order."""
    return sorted(table.values(), key=lambda one: one.threshold is None)


def best(scores: HeadScores, k: int = 3) -> list[tuple[HeadIndex, float]]:
    """The k most notable heads: the largest means, or of a signed score the farthest from 0."""
    if not scores.signed:
        return scores.top(k)
    both = dict(scores.top(k)) | dict(scores.bottom(k))
    return sorted(both.items(), key=lambda pair: (-abs(pair[1]), pair[0]))[:k]


def best_heads(scores: Iterable[HeadScores], k: int = 3) -> list[HeadIndex]:
    """Union of the k best heads of each score, in head order."""
    return sorted({head for one in scores for head, _ in best(one, k)})


def unreached(scores: HeadScores) -> str | None:
    """Why a score has no value at all, in a sentence; None if it has one."""
    if bool((scores.n > 0).any()) or not bool((scores.missing > 0).any()):
        return None
    return (
        f"{scores.name} has no value: what it looks for was out of reach of every query (a text "
        "too short for it, or a window)."
    )


def written(value: float) -> str:
    """A number in at most seven characters; a dash where it is missing."""
    if math.isnan(value):
        return "-"
    if value != 0 and not 0.001 <= abs(value) < 10000:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    digits = 3 if abs(value) < 0.1 else 2 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def fraction(scores: HeadScores, value: float) -> float:
    """Where a value lies between the ends of its score, in [0, 1], for a colour scale."""
    low, high = scores.bounds
    seen = [mean for _, mean in (*scores.top(1), *scores.bottom(1))]
    if math.isnan(value) or not seen:
        return 0.0
    low = min(seen) if low is None else low
    high = max(seen) if high is None else high
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0
