"""How well two scores agree on which heads matter."""

from dataclasses import dataclass

import numpy as np

from headscope.base.statistics import rank_correlation, top_k_overlap
from headscope.errors import InputError
from headscope.table import HeadScores


@dataclass(frozen=True)
class Agreement:
    """Two scores of the same heads.

    Attributes:
        rank_correlation: Spearman's, over all heads, in [-1, 1]; NaN if one score is constant.
        overlap: Jaccard index of the two sets of ``k`` highest heads, in [0, 1].
        k: how many heads.
        largest_difference: between two means of the same head.
    """

    rank_correlation: float
    overlap: float
    k: int
    largest_difference: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"rank correlation {self.rank_correlation:.3f}, overlap of the {self.k} highest heads "
            f"{self.overlap:.2f}, largest difference {self.largest_difference:.3f}"
        )


def agreement(a: HeadScores, b: HeadScores, k: int = 10) -> Agreement:
    """Compare two scores head by head.

    Heads tie where neither form saw them copy; of equals the lowest are taken, in both.

    Raises:
        InputError: if they are not of the same heads.

    Example:
        >>> scores = table["induction"]
        >>> found = agreement(scores, scores, k=3)
        >>> found.overlap, found.largest_difference
        (1.0, 0.0)
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"{a.name} has heads {a.mean.shape}, {b.name} {b.mean.shape}.")
    return Agreement(
        rank_correlation(np.asarray(a.mean), np.asarray(b.mean)),
        top_k_overlap(np.asarray(a.mean), np.asarray(b.mean), k),
        k,
        float(np.nanmax(np.abs(a.mean - b.mean))),
    )
