"""Comparisons of heads: between two models, and along the training of one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from headscope.base.files import Saved
from headscope.base.result import Drawn, Glance, Rows, Section, Shown, Tabular, Words, number
from headscope.base.statistics import LEVEL, mean_and_sem
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.table.table import HeadTable

if TYPE_CHECKING:
    import pandas

# Pairs that are shown at a glance.
_MOST = 10

_ROWS = 200  # of a section
_ORDER = "Pairs first whose heads both stand out from the typical head of their model"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Saved, Shown, Tabular):
    """Matched heads of two models, the most unusual heads first.

    Attributes:
        names: names of the two models.
        pairs: each head of the first model with its match in the second.
        closeness: closeness of each pair; see ``measure``.
        measure: what closeness is, in words.
        scores: scores that both tables have.
        first: means of the first model's heads.
        second: means of their matches.
        low: lower end of the 95% interval of ``second - first``; NaN without standard errors.
        high: upper end.
        paired: for each score, whether both models saw the same examples.
        p: two-sided p-value that the two heads score the same, one pair and score at a time; NaN
            where there are too few examples.
        p_adjusted: adjusted over all pairs and scores (Benjamini-Hochberg).
        effect_size: Hedges' g: the difference over the pooled standard deviation over examples;
            NaN where examples were not kept.
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
    p: Float[np.ndarray, "pair score"]
    p_adjusted: Float[np.ndarray, "pair score"]
    effect_size: Float[np.ndarray, "pair score"]

    @classmethod
    def _of_parts(cls, parts: dict[str, Any]) -> "Comparison":
        """Make it again of what was saved; older files have no tests."""
        none = np.full(np.shape(parts["first"]), np.nan)
        return cls(**(dict.fromkeys(("p", "p_adjusted", "effect_size"), none) | parts))

    @property
    def difference(self) -> Float[np.ndarray, "pair score"]:
        """Second minus first."""
        return np.asarray(self.second - self.first)

    @property
    def moved(self) -> float:
        """Share of pairs whose two heads have different addresses."""
        return float(np.mean([a != b for a, b in self.pairs])) if self.pairs else 0.0

    @property
    def tests(self) -> str:
        """Describe how the scores were tested, in one sentence."""
        apart = [name for name, same in zip(self.scores, self.paired, strict=True) if not same]
        if not apart:
            return "Tests are paired by example."
        which = "All scores" if len(apart) == len(self.scores) else ", ".join(apart)
        return (
            f"{which}: tested as independent samples, since the examples differ or were not kept "
            "(headscope scan --examples keeps them)."
        )

    def match(self, head: "str | tuple[int, int]") -> HeadIndex | None:
        """The second model's match for a head of the first; None if it has none."""
        index = HeadIndex.parse(head)
        return next((b for a, b in self.pairs if a == index), None)

    def largest(self, score: str, k: int = 10) -> list[tuple[HeadIndex, HeadIndex, float]]:
        """Pairs that differ most in one score, by magnitude, with second minus first.

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
        (95% interval of the difference), paired, effect_size, p, p_adjusted.
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
                "effect_size": self.effect_size.ravel(),
                "p": self.p.ravel(),
                "p_adjusted": self.p_adjusted.ravel(),
            }
        )

    def glance(self) -> Glance:
        """Show the first pairs, with the score in which each differs most."""
        rows = []
        for at, (mine, other) in enumerate(self.pairs[:_MOST]):
            size = np.abs(self.difference[at])
            row = [str(mine), str(other), number(float(self.closeness[at]))]
            if np.isfinite(size).any():
                most = int(np.nanargmax(size))
                ends = [number(float(side[at, most])) for side in (self.first, self.second)]
                row.append(f"{self.scores[most]} {' to '.join(ends)}")
            rows.append([*row, ""][:4])
        return Glance(
            "comparison",
            [
                f"{self.names[0]} with {self.names[1]}",
                f"{len(self.pairs)} pairs",
                f"{self.moved:.0%} under another address",
            ],
            (self.names[0], self.names[1], self.measure, "moved most"),
            rows,
            hint=", ".join(
                [f"comparison.largest({one!r})" for one in self.scores[:1]]
                + ["comparison.to_pandas()"]
            ),
        )

    def sections(self) -> list[Section]:
        """Report how heads were matched, and which scores differ beyond chance."""
        one, two = self.names
        words = Words(
            f"{one} and {two}: {len(self.pairs)} heads matched, {self.moved:.0%} of them under "
            f"another address. Closeness: {self.measure}."
        )
        pairs = [
            (str(a), str(b), float(close))
            for (a, b), close in zip(self.pairs[:_ROWS], self.closeness, strict=False)
        ]
        clear = np.argwhere(self.p_adjusted < LEVEL)
        order = sorted(clear.tolist(), key=lambda at: -abs(self._in_spread(at)))[:_ROWS]
        rows = [
            (
                str(self.pairs[i][0]),
                str(self.pairs[i][1]),
                self.scores[j],
                float(self.first[i, j]),
                float(self.second[i, j]),
                float(self.difference[i, j]),
                float(self.low[i, j]),
                float(self.high[i, j]),
                float(self.effect_size[i, j]),
                float(self.p_adjusted[i, j]),
            )
            for i, j in order
        ]
        names = (
            *("head", "match", "score", one, two, "difference", "95% from", "to"),
            *("effect size", "adjusted p"),
        )
        caption = (
            f"{len(clear)} of {np.isfinite(self.p).sum()} differences have an adjusted p-value "
            f"below {LEVEL}, the largest in units of the score's spread first. {self.tests}"
        )
        return [
            Section("Matched heads", [words, Rows((one, two, "closeness"), pairs, _ORDER)]),
            Section("Differences", [Rows(names, rows, caption)]),
        ]

    def _in_spread(self, at: list[int]) -> float:
        """Difference in units of the score's spread over all heads shown."""
        pair, score = at
        both = np.concatenate([self.first[:, score], self.second[:, score]])
        return float(self.difference[pair, score]) / (float(np.nanstd(both)) or 1.0)


LossCurve = Float[np.ndarray, "checkpoint example"]


@dataclass(frozen=True, eq=False, repr=False)
class Emergence(Saved, Shown, Tabular):
    """Head scores and losses of one model at several checkpoints, earliest first.

    Attributes:
        model: its name.
        checkpoints: names of the checkpoints.
        tables: scores at each checkpoint.
        losses: curves by name, such as ``loss``: values per checkpoint and example; NaN is missing.
        units: units of the curves.
    """

    model: str
    checkpoints: tuple[str, ...]
    tables: tuple[HeadTable, ...]
    losses: Mapping[str, LossCurve] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that there are at least two checkpoints of one architecture."""
        if len(self.checkpoints) < 2 or len(self.checkpoints) != len(self.tables):
            raise InputError(
                f"a story of training needs a table for each of two checkpoints or more; got "
                f"{len(self.checkpoints)} and {len(self.tables)}."
            )
        if len({table.shape for table in self.tables}) > 1:
            raise InputError("the checkpoints are not of one architecture.")
        for name, values in self.losses.items():
            if len(values) != len(self.checkpoints):
                raise InputError(f"{name!r} has {len(values)} values, not one per checkpoint.")

    def glance(self) -> Glance:
        """Show each score's best head at the last checkpoint, and when it emerges."""
        rows = []
        for score in self.scores:
            values = self.of(score)
            if not np.isfinite(values[-1]).any():
                continue
            head = self.best(score)
            at = self.appears(score, head)
            ends = [number(float(values[(place, *head)])) for place in (0, -1)]
            rows.append((score, str(head), *ends, "-" if at is None else self.checkpoints[at]))
        return Glance(
            "emergence",
            [f"{len(self.checkpoints)} checkpoints", self.model],
            ("score", "head", self.checkpoints[0], self.checkpoints[-1], "past half-way at"),
            rows,
            hint="hs.plots.emergence(story), story.findings(), story.to_pandas()",
        )

    @property
    def steps(self) -> list[int]:
        """Training step of each checkpoint: the last number in its name, or its index."""
        found = [re.findall(r"\d+", name) for name in self.checkpoints]
        steps = [int(numbers[-1]) if numbers else -1 for numbers in found]
        ordered = all(a < b for a, b in pairwise(steps))
        return steps if ordered and steps[0] >= 0 else list(range(len(steps)))

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that all checkpoints share."""
        return tuple(name for name in self.tables[0] if all(name in one for one in self.tables))

    def of(self, score: str) -> Float[np.ndarray, "checkpoint layer head"]:
        """Means of one score at every checkpoint.

        Raises:
            InputError: if there is no such score.
        """
        if score not in self.scores:
            raise InputError(nearest(score, self.scores, kind="score"))
        return np.stack([table[score].mean for table in self.tables])

    def best(self, score: str) -> HeadIndex:
        """Head with the largest mean at the last checkpoint (magnitude for a signed score).

        Raises:
            InputError: if no head has a value.
        """
        last = self.of(score)[-1]
        if np.isnan(last).all():
            raise InputError(f"no head has a value of {score!r} at {self.checkpoints[-1]}.")
        size = np.abs(last) if self.tables[-1][score].signed else last
        layer, head = np.unravel_index(int(np.nanargmax(size)), last.shape)
        return HeadIndex(int(layer), int(head))

    def appears(self, score: str, head: "str | tuple[int, int] | None" = None) -> int | None:
        """Index of the first checkpoint from which a head stays above half of its final rise.

        The level is half-way between its value at the first and at the last checkpoint; None if the
        two are equal.

        Args:
            score: name of the score.
            head: which head; default: :meth:`best`.
        """
        values = self.of(score)[(slice(None), *HeadIndex.parse(head or self.best(score)))]
        first, last = float(values[0]), float(values[-1])
        if not np.isfinite(first + last) or first == last:
            return None
        share = (values - first) / (last - first)
        below = np.flatnonzero(~(share >= 0.5))
        return int(below[-1]) + 1

    def mean(self, curve: str) -> Float[np.ndarray, " checkpoint"]:
        """Mean of a curve over examples."""
        return mean_and_sem(self.losses[curve]).mean

    def sem(self, curve: str) -> Float[np.ndarray, " checkpoint"]:
        """Standard error of that mean."""
        return mean_and_sem(self.losses[curve]).sem

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per checkpoint, head and score, then one per checkpoint and curve.

        Columns: checkpoint, step, kind (``score`` or ``curve``), name, head (empty for curves),
        mean, sem, n, unit.
        """
        import pandas

        parts = []
        for name, step, table in zip(self.checkpoints, self.steps, self.tables, strict=True):
            rows = table.to_pandas()[["label", "score", "mean", "sem", "n", "unit"]]
            rows = rows.rename(columns={"label": "head", "score": "name"})
            parts.append(rows.assign(checkpoint=name, step=step, kind="score"))
        for curve, values in self.losses.items():
            moments = mean_and_sem(values)
            columns = {"checkpoint": self.checkpoints, "step": self.steps, "mean": moments.mean}
            rows = pandas.DataFrame({**columns, "sem": moments.sem, "n": moments.n})
            unit = self.units.get(curve, "")
            parts.append(rows.assign(kind="curve", name=curve, head="", unit=unit))
        order = ["checkpoint", "step", "kind", "name", "head", "mean", "sem", "n", "unit"]
        return pandas.concat(parts, ignore_index=True)[order]

    def findings(self) -> list[str]:
        """One sentence per score with a role: which head, and when it emerges."""
        said = []
        for score in self.scores:
            threshold = self.tables[-1][score].threshold
            if threshold is None:
                continue
            role = score.replace("_", " ")
            head = self.best(score)
            values = self.of(score)[(slice(None), *head)]
            at = self.appears(score, head)
            if values[-1] < threshold or at is None:
                said.append(f"no {role} head by {self.checkpoints[-1]}")
                continue
            said.append(
                f"{role}: {head} goes from {values[0]:.2f} to {values[-1]:.2f}; past half-way at "
                f"{self.checkpoints[at]}"
            )
        return said

    def sections(self) -> list[Section]:
        """Report the findings, the picture, and the numbers behind it."""
        blocks: list[Any] = [Words(f"{one}.") for one in self.findings()]
        blocks.append(
            Drawn(
                "emergence",
                f"Scores of heads and losses of {self.model} against training step.",
                "",
            )
        )
        if "in-context score" in self.losses:
            blocks.append(
                Words(
                    "In-context score: mean loss of the last tenth of a text less that from 5% to "
                    "15% of it; negative where context helps (Olsson et al. 2022).",
                    quiet=True,
                )
            )
        best = {name: self.best(name) for name in self.scores}
        columns = ["checkpoint", *(f"{name} {head}" for name, head in best.items()), *self.losses]
        rows: list[tuple[str | float, ...]] = [
            (
                name,
                *(float(self.tables[at][score].mean[head]) for score, head in best.items()),
                *(float(self.mean(curve)[at]) for curve in self.losses),
            )
            for at, name in enumerate(self.checkpoints)
        ]
        blocks.append(Rows(columns, rows, "Each score of the head that is best at the end; losses"))
        return [Section("Along training", blocks)]


def joined_curves(
    parts: Sequence[Mapping[str, Float[np.ndarray, " example"]]],
) -> dict[str, LossCurve]:
    """Join curves of single checkpoints along training; shorter ones are padded with NaN."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    width = {name: max(len(part[name]) for part in parts if name in part) for name in names}
    made = {name: np.full((len(parts), width[name]), np.nan) for name in names}
    for place, part in enumerate(parts):
        for name, values in part.items():
            made[name][place, : len(values)] = values
    return made
