"""One score for every head: values, declaration and provenance."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from headscope.base.files import Saved, Stored, read_only
from headscope.base.result import Glance, Grid, Shown, short
from headscope.base.specs import Direction, Provenance, ScoreSpec, Specified, specified
from headscope.base.statistics import (
    LEVEL,
    Alternative,
    Bounds,
    Design,
    benjamini_hochberg,
    compare_means,
    examples_needed,
    mean_and_sem,
    mean_interval,
    top_order,
)
from headscope.errors import InputError
from headscope.heads import STACK_LETTERS, HeadIndex

if TYPE_CHECKING:
    import pandas

# Most layers and heads of a grid that is shown whole.
_MOST = 32
# Rows are computed in fp32, whose rounding is about 1e-7 a step.
_RESOLUTION = 1e-6


@dataclass(frozen=True, eq=False)
class Summary(Stored):
    """Statistics of one score for every head; NaN is missing.

    Attributes:
        mean: mean over examples.
        sem: standard error of the mean; by cluster if examples are clustered.
        n: number of examples with a value.
        missing: number of queries whose target was out of reach.
        null: mean on the control.
        effect_size: Hedges' g of the values against the control.
        p_value: p-value of the test against the control, per head; see
            :func:`headscope.base.statistics.compare_means`.
        p_floor: smallest p-value that the test can give with this many examples; 0 for t-tests.
    """

    mean: Float[np.ndarray, "layer head"]
    sem: Float[np.ndarray, "layer head"]
    n: Int[np.ndarray, "layer head"]
    missing: Int[np.ndarray, "layer head"]
    null: Float[np.ndarray, "layer head"]
    effect_size: Float[np.ndarray, "layer head"]
    p_value: Float[np.ndarray, "layer head"]
    p_floor: Float[np.ndarray, "layer head"]

    def __post_init__(self) -> None:
        """Copy and freeze the arrays."""
        for name in ("n", "missing"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.int64))
        for name in FLOATS:
            object.__setattr__(self, name, read_only(getattr(self, name), np.float64))

    @classmethod
    def of_examples(
        cls,
        values: Float[np.ndarray, "layer head example"],
        control: Float[np.ndarray, "layer head control_example"] | None,
        alternative: Alternative,
        missing: Int[np.ndarray, "layer head"] | None,
        design: Design,
    ) -> "Summary":
        """Average the examples and test them against the control."""
        mean, sem, n = mean_and_sem(values, design.clusters)
        counted = np.zeros_like(n) if missing is None else missing
        if control is None:
            blank = np.full_like(mean, np.nan)
            return cls(mean, sem, n, counted, blank, blank, blank, blank)
        test = compare_means(values, control, alternative, design, _RESOLUTION)
        null = np.where((n > 0) | (counted > 0), mean_and_sem(control).mean, np.nan)
        return cls(mean, sem, n, counted, null, test.effect, test.p, test.floor)


FLOATS = ("mean", "sem", "null", "effect_size", "p_value", "p_floor")


class Declared(TypedDict, total=False):
    """Fields of :class:`headscope.base.specs.ScoreSpec` other than the name."""

    unit: str
    bounds: Bounds
    direction: Direction | None
    source: str
    threshold: float | None
    alternative: Alternative | None
    description: str


def declared(name: str | ScoreSpec, facts: Declared) -> ScoreSpec:
    """Copy a declaration with some fields changed, or make a new one with this name."""
    if isinstance(name, ScoreSpec):
        return replace(name, **facts) if facts else name
    return ScoreSpec(name, **facts)


@dataclass(frozen=True, eq=False)
class HeadScores(Saved, Specified, Shown):
    """One score for every head of a model. Construct it with :meth:`from_examples`.

    Cells without a value are NaN: layers without attention, and heads for which no query counted.

    Attributes:
        spec: name, unit, bounds, direction, source, threshold and other declared facts.
        numbers: mean, standard error, n, null, effect size and p-value per head.
        kv_heads: number of key/value heads.
        provenance: where it came from.
        examples: values per example, if known; NaN is missing.
        control_examples: the same on the control; a single column is an exact null.
        design: pairing and clusters of the examples and of those of the control.
        stack: attention stack of the heads; empty in a model with a single stack.
    """

    spec: ScoreSpec
    numbers: Summary
    kv_heads: int
    provenance: Provenance = field(default_factory=Provenance)
    examples: Float[np.ndarray, "layer head example"] | None = None
    control_examples: Float[np.ndarray, "layer head control_example"] | None = None
    design: Design = field(default_factory=Design)
    stack: str = ""

    def __post_init__(self) -> None:
        """Check the invariants of a score and freeze the arrays."""
        shape = self.numbers.mean.shape
        HeadIndex(0, 0, self.stack)  # which knows the names of stacks
        if self.kv_heads < 1 or shape[1] % self.kv_heads:
            raise InputError(
                f"{self.name!r}: {shape[1]} query heads cannot share {self.kv_heads} "
                f"key/value heads evenly."
            )
        for name in ("examples", "control_examples"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, read_only(values, np.float64))

    @classmethod
    def from_examples(
        cls,
        spec: str | ScoreSpec,
        per_example: Float[np.ndarray, "layer head example"],
        *,
        kv_heads: int,
        control_per_example: Float[np.ndarray, "layer head control_example"] | None = None,
        design: Design | None = None,
        missing: Int[np.ndarray, "layer head"] | None = None,
        provenance: Provenance | None = None,
        **facts: Unpack[Declared],
    ) -> "HeadScores":
        """Build a score from its values per example.

        Args:
            spec: declaration of the score, or only its name.
            per_example: values; NaN is missing.
            kv_heads: number of key/value heads.
            control_per_example: values on the control, if there is one; a last axis of length 1 is
                an exact null.
            design: which examples are paired with the control's, and which share a cluster;
                default: independent examples.
            missing: number of queries per head whose target was out of reach.
            provenance: where it came from.
            facts: fields of the declaration that add to or replace those of ``spec``.

        Example:
            >>> values = np.array([[[0.25, 0.75]]])
            >>> hs.HeadScores.from_examples("mine", values, kv_heads=1, unit="share").mean.tolist()
            [[0.5]]
        """
        made = declared(spec, facts)
        shape = per_example.shape[:2]
        if control_per_example is not None and control_per_example.shape[:2] != shape:
            raise InputError(
                f"{made.name!r}: the control has heads {control_per_example.shape[:2]}, not "
                f"{shape}."
            )
        design = design or Design()
        return cls(
            made,
            Summary.of_examples(per_example, control_per_example, made.tested, missing, design),
            kv_heads,
            provenance or Provenance(),
            per_example,
            control_per_example,
            design,
        )

    @classmethod
    def from_effects(
        cls,
        spec: str | ScoreSpec,
        effects: Float[np.ndarray, "layer head example"],
        *,
        kv_heads: int,
        design: Design | None = None,
        provenance: Provenance | None = None,
        **facts: Unpack[Declared],
    ) -> "HeadScores":
        """Build a score from effects per example, tested (two-sided) against no effect.

        Args:
            spec: declaration of the score, or only its name.
            effects: changes of a metric; NaN is missing.
            kv_heads: number of key/value heads.
            design: which examples share a cluster; default: independent examples.
            provenance: where it came from.
            facts: fields of the declaration that add to or replace those of ``spec``.

        Example:
            >>> effects = np.array([[[0.5, 0.75, 0.625, 0.5]]])
            >>> one = hs.HeadScores.from_effects("change", effects, kv_heads=1, bounds=(0.0, None))
            >>> one.alternative, one.null.tolist()
            ('two-sided', [[0.0]])
        """
        none = np.where(np.isnan(effects).all(-1, keepdims=True), np.nan, 0.0)
        return cls.from_examples(
            replace(declared(spec, facts), alternative="two-sided"),
            effects,
            kv_heads=kv_heads,
            control_per_example=none,
            design=design,
            provenance=provenance,
        )

    @classmethod
    def from_summary(
        cls,
        spec: str | ScoreSpec,
        mean: Float[np.ndarray, "layer head"],
        *,
        kv_heads: int,
        n: Int[np.ndarray, "layer head"] | None = None,
        known: Mapping[str, Shaped[np.ndarray, "layer head"]] | None = None,
        provenance: Provenance | None = None,
        **facts: Unpack[Declared],
    ) -> "HeadScores":
        """Build a score from means alone, for scores without examples (weights) or with none kept.

        Args:
            spec: declaration of the score, or only its name.
            mean: value of every head; NaN is missing.
            kv_heads: number of key/value heads.
            n: number of examples; default: 1 where there is a value.
            known: any of ``sem``, ``null``, ``effect_size``, ``p_value``, ``p_floor``, ``missing``.
            provenance: where it came from.
            facts: fields of the declaration that add to or replace those of ``spec``.
        """
        arrays = dict.fromkeys(FLOATS, np.full(mean.shape, np.nan))
        arrays |= {"mean": mean, "missing": np.zeros(mean.shape, int)}
        arrays["n"] = (~np.isnan(mean)).astype(int) if n is None else n
        arrays |= known or {}
        return cls(declared(spec, facts), Summary(**arrays), kv_heads, provenance or Provenance())

    @classmethod
    def _of_parts(cls, parts: dict[str, Any]) -> "HeadScores":
        """Rebuild a score from its saved parts, accepting the names that older files use."""
        if "summary" in parts:
            parts["numbers"] = parts.pop("summary")
        return cls(**specified(parts))

    @property
    def mean(self) -> Float[np.ndarray, "layer head"]:
        """Mean over examples."""
        return self.numbers.mean

    @property
    def sem(self) -> Float[np.ndarray, "layer head"]:
        """Standard error of the mean, by cluster; NaN with fewer than two."""
        return self.numbers.sem

    @property
    def n(self) -> Int[np.ndarray, "layer head"]:
        """Examples with a value."""
        return self.numbers.n

    @property
    def missing(self) -> Int[np.ndarray, "layer head"]:
        """Number of queries whose target was out of reach."""
        return self.numbers.missing

    @property
    def null(self) -> Float[np.ndarray, "layer head"]:
        """Mean on the control."""
        return self.numbers.null

    @property
    def effect_size(self) -> Float[np.ndarray, "layer head"]:
        """Hedges' g against the control; infinite if nothing varies."""
        return self.numbers.effect_size

    @property
    def p_value(self) -> Float[np.ndarray, "layer head"]:
        """p-value against the control, per head; NaN with too few examples.

        The test is chosen by :func:`headscope.base.statistics.compare_means`.
        """
        return self.numbers.p_value

    @property
    def p_floor(self) -> Float[np.ndarray, "layer head"]:
        """Smallest p-value that the head's test can give with this many examples."""
        return self.numbers.p_floor

    @cached_property
    def p_adjusted(self) -> Float[np.ndarray, "layer head"]:
        """p-values adjusted over all heads (Benjamini-Hochberg)."""
        return read_only(benjamini_hochberg(self.p_value), np.float64)

    @cached_property
    def labels(self) -> Shaped[np.ndarray, "layer head"]:
        """Addresses of the heads: ``L0H0`` and so on."""
        layers, heads = self.mean.shape
        return np.array(
            [[str(HeadIndex(i, j, self.stack)) for j in range(heads)] for i in range(layers)]
        )

    @property
    def present(self) -> Bool[np.ndarray, "layer head"]:
        """Mask of the heads that were scored, including those without any value."""
        return (self.n > 0) | (self.missing > 0)

    @property
    def per_example(self) -> Float[np.ndarray, "layer head example"]:
        """Values per example.

        Raises:
            InputError: if the values were not kept.
        """
        if self.examples is None:
            raise InputError(
                f"{self.name!r} holds only means: its values per example were not kept "
                f"(save them with examples=True)."
            )
        return self.examples

    @property
    def control_per_example(self) -> Float[np.ndarray, "layer head control_example"] | None:
        """Values per example on the control; None if the score has none.

        Raises:
            InputError: if the values were not kept.
        """
        return self.control_examples if self.per_example is not None else None

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """Confidence interval of the mean, by cluster: lower and upper end.

        Student's t, widened for skewness; see :func:`headscope.base.statistics.mean_interval`.
        """
        return mean_interval(self.per_example, level, self.design.clusters, self.bounds)

    def top(self, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """The k heads with the largest mean, largest first; ties by lowest head; never NaN."""
        return self._ranked(self.mean, k)

    def bottom(self, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """The k heads with the smallest mean, smallest first; ties by lowest head; never NaN."""
        return self._ranked(-self.mean, k)

    def significant(self, alpha: float = 0.05) -> Bool[np.ndarray, "layer head"]:
        """Heads that differ from the control at false discovery rate alpha and pass the threshold.

        For a one-sided score: above the control, and at or above the threshold. For a two-sided
        one: on either side of the control, and at least the threshold away from 0.
        """
        found = self.p_adjusted < alpha
        if self.threshold is None:
            return found
        size = np.abs(self.mean) if self.alternative == "two-sided" else self.mean
        return np.asarray(found & (size >= self.threshold))

    def examples_needed(self, alpha: float = LEVEL) -> int | None:
        """Number of examples that one head needs to be significant on its own.

        An exact test on n examples gives no p-value below ``2^-n``, and Benjamini-Hochberg requires
        ``alpha / heads`` of a single significant head. None if these examples are enough for every
        head (that passes the threshold, if there is one), if the score has no control, or if the
        smallest possible p-values are unknown.
        """
        heads = int(self.present.sum())
        short = (self.p_floor > alpha / max(heads, 1)) | (np.isnan(self.p_floor) & (self.n == 1))
        if self.threshold is not None:
            size = np.abs(self.mean) if self.alternative == "two-sided" else self.mean
            short &= size >= self.threshold
        if not (short & ~np.isnan(self.null)).any():
            return None
        return examples_needed(heads, self.alternative, alpha)

    def renamed(self, name: str) -> "HeadScores":
        """Return the same score under another name."""
        return replace(self, spec=replace(self.spec, name=name))

    def of_stack(self, stack: str) -> "HeadScores":
        """Return the same score for the heads of a named attention stack."""
        return replace(self, stack=stack)

    def __getitem__(self, head: "str | tuple[int, int]") -> float:
        """Mean of one head, addressed as ``"L5H1"``, ``"5.1"`` or ``(5, 1)``."""
        index = HeadIndex.parse(head)
        layers, heads = self.mean.shape
        inside = 0 <= index.layer < layers and 0 <= index.head < heads
        if not inside or index.stack not in ("", self.stack):
            where = f" of the stack {self.stack!r}" if self.stack else ""
            raise InputError(
                f"there is no head {index} among {layers} layers of {heads} heads{where}."
            )
        return float(self.mean[index])

    def __repr__(self) -> str:
        """Name, size and most notable heads."""
        best = ", ".join(f"{head} {value:.3g}" for head, value in self.notable(3))
        layers, heads = self.mean.shape
        return f"HeadScores({self.name!r}, {layers} layers x {heads} heads, top: {best or 'none'})"

    def columns(self) -> dict[str, Any]:
        """Columns of a tidy table: one entry per scored head, in head order."""
        layer, head = np.nonzero(self.present)
        at = (layer, head)
        numbers = ("null", "effect_size", "p_value", "p_floor", "p_adjusted")
        return {
            "layer": layer.astype(np.int16),
            "head": head.astype(np.int16),
            "kv_head": (head // (self.mean.shape[1] // self.kv_heads)).astype(np.int16),
            "label": self.labels[at],
            "score": np.full(layer.size, self.name),
            "unit": np.full(layer.size, self.unit),
            "mean": self.mean[at],
            "sem": self.sem[at],
            "n": self.n[at].astype(np.int32),
            "missing": self.missing[at].astype(np.int64),
            **{name: getattr(self, name)[at] for name in numbers},
        }

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head; see :meth:`HeadTable.to_pandas`."""
        import pandas

        return pandas.DataFrame(self.columns())

    def glance(self) -> Glance:
        """Show a grid of layers by heads, or for a large model the ten most notable heads."""
        layers, heads = self.mean.shape
        if layers > _MOST or heads > _MOST:
            found = self.notable(10)
            grid = self._grid([str(head) for head, _ in found], [""], [[head] for head, _ in found])
            notes = [f"10 of {layers * heads} heads."]
        else:
            rows, columns = range(layers), range(heads)
            at = [[HeadIndex(row, column, self.stack) for column in columns] for row in rows]
            named = [f"{STACK_LETTERS[self.stack]}{row}" for row in rows]
            grid = self._grid(named, [f"H{one}" for one in columns], at)
            notes = []
        first = [
            (str(head), short(value), short(float(self.null[head])))
            for head, value in self.notable(5)
        ]
        return Glance(
            self.name,
            [self.unit, self.description],
            ("head", "mean", "control"),
            first,
            grid=grid,
            notes=notes,
        )

    def _grid(
        self, rows: Sequence[str], columns: Sequence[str], at: Sequence[Sequence[HeadIndex]]
    ) -> Grid:
        marks = self.significant()
        return Grid(
            rows,
            columns,
            [[short(float(self.mean[head])) for head in row] for row in at],
            [[self.fraction(float(self.mean[head])) for head in row] for row in at],
            [["strong" if marks[head] else "" for head in row] for row in at],
        )

    def notable(self, k: int = 3) -> list[tuple[HeadIndex, float]]:
        """The k most notable heads: the largest means, or magnitudes of a signed score."""
        if not self.signed:
            return self.top(k)
        both = dict(self.top(k)) | dict(self.bottom(k))
        return sorted(both.items(), key=lambda pair: (-abs(pair[1]), pair[0]))[:k]

    def fraction(self, value: float | np.floating[Any]) -> float:
        """Position of a value between the ends of the score, in [0, 1], for a colour scale."""
        low, high = self.bounds
        seen = [mean for _, mean in (*self.top(1), *self.bottom(1))]
        if math.isnan(value) or not seen:
            return 0.0
        low = min(seen) if low is None else low
        high = max(seen) if high is None else high
        return min(1.0, max(0.0, (float(value) - low) / (high - low))) if high > low else 0.0

    def _ranked(
        self, key: Float[np.ndarray, "layer head"], k: int
    ) -> list[tuple[HeadIndex, float]]:
        heads = key.shape[1]
        places = (divmod(int(flat), heads) for flat in top_order(key, k))
        order = [HeadIndex(layer, head, self.stack) for layer, head in places]
        return [(index, float(self.mean[index])) for index in order]
