"""Matched heads of two models, and how their scores differ."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Comparison:
    """Pairs of heads of two models, those that differ most from a typical head first.

    Attributes:
        names: of the two models.
        pairs: a head of the first with its match in the second.
        closeness: of each pair; see ``measure``.
        measure: what closeness is, in words.
        scores: names that both have.
        first: means of the first model's heads.
        second: means of the heads that they were matched with.
        low: lower end of the 95% interval of ``second - first``; NaN without errors.
        high: upper end.
        paired: for each score, whether both models saw the same examples.
    """

    names: tuple[str, str]
    pairs: tuple[tuple[HeadIndex, HeadIndex], ...]
    closeness: Float[np.ndarray, " pair"]
    measure: str
    scores: tuple[str, ...]
    first: Float[np.ndarray, "pair score"]
    second: Float[np.ndarray, "pair score"]
    low: Float[np.ndarray, "pair score"]
    high: Float[np.ndarray, "pair score"]
    paired: tuple[bool, ...]

    @property
    def difference(self) -> Float[np.ndarray, "pair score"]:
        """Second less first."""
        return np.asarray(self.second - self.first)

    @property
    def moved(self) -> float:
        """Share of pairs whose heads have different addresses."""
        return float(np.mean([a != b for a, b in self.pairs])) if self.pairs else 0.0

    def match(self, head: "str | tuple[int, int]") -> HeadIndex | None:
        """The second model's match of a head of the first; None where it has none."""
        index = HeadIndex.parse(head)
        return next((b for a, b in self.pairs if a == index), None)

    def largest(self, score: str, k: int = 10) -> list[tuple[HeadIndex, HeadIndex, float]]:
        """Pairs that differ most in one score, by magnitude, with second less first.

        Raises:
            InputError: if the models do not share such a score.
        """
        if score not in self.scores:
            raise InputError(nearest(score, self.scores, kind="score"))
        values = self.difference[:, self.scores.index(score)]
        size = np.where(np.isfinite(values), np.abs(values), -1.0)
        order = [i for i in np.argsort(-size, kind="stable") if size[i] >= 0][:k]
        return [(*self.pairs[i], float(values[i])) for i in order]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per pair and score.

        Columns: first_head, second_head, closeness, score, first, second, difference, low, high
        (95% interval of the difference), paired.
        """
        import pandas

        n_pairs, n_scores = self.first.shape
        pair, score = (axis.ravel() for axis in np.indices((n_pairs, n_scores)))
        return pandas.DataFrame(
            {
                "first_head": [str(self.pairs[i][0]) for i in pair],
                "second_head": [str(self.pairs[i][1]) for i in pair],
                "closeness": self.closeness[pair],
                "score": [self.scores[i] for i in score],
                "first": self.first.ravel(),
                "second": self.second.ravel(),
                "difference": self.difference.ravel(),
                "low": self.low.ravel(),
                "high": self.high.ravel(),
                "paired": [self.paired[i] for i in score],
            }
        )

    def __repr__(self) -> str:
        """The models, and how many heads were matched."""
        return (
            f"Comparison({self.names[0]} with {self.names[1]}: {len(self.pairs)} pairs, "
            f"{self.moved:.0%} under another address)"
        )
