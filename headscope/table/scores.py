"""One score for every head: its numbers, its meaning and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from headscope.base.saved import Saved
from headscope.base.statistics import (
    LEVEL,
    Alternative,
    Bounds,
    Design,
    benjamini_hochberg,
    examples_needed,
    mean_interval,
    top_order,
)
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table.provenance import Provenance
from headscope.table.summary import FLOATS, Summary, frozen

if TYPE_CHECKING:
    import pandas


def alternative_for(bounds: Bounds) -> Alternative:
    """What to test of a score: ``two-sided`` where 0 lies inside the bounds, else ``greater``."""
    low, high = bounds
    signed = (low is None or low < 0) and (high is None or high > 0)
    return "two-sided" if signed else "greater"


class Facts(TypedDict, total=False):
    """What a score says about itself; the attributes of :class:`HeadScores` of these names."""

    unit: str
    bounds: Bounds
    description: str
    source: str
    threshold: float | None
    provenance: Provenance


@dataclass(frozen=True, eq=False)
class HeadScores(Saved):
    """One score for every head of a model. Make it with :meth:`from_examples`.

    Cells without a value are NaN: layers without attention, and heads that no query could serve.

    Attributes:
        name: of the score.
        summary: mean, standard error, n, null, effect size and p-value per head.
        kv_heads: number of key/value heads.
        unit: of the values, e.g. ``attention``, ``nats``, ``logits``, ``tokens``.
        bounds: smallest and largest possible value; None where there is none.
        description: what a high value means, in one sentence.
        source: paper and definition.
        threshold: mean from which a significant head has the role of this name; None: no role.
        alternative: what the p-value tests: ``greater`` than the control, or ``two-sided``.
        provenance: where it came from.
        examples: values per example, where they are known; NaN is missing.
        control_examples: the same on the control; one column means an exact null.
        design: how the examples, and those of the control, belong together.
    """

    name: str
    summary: Summary
    kv_heads: int
    unit: str = ""
    bounds: Bounds = (None, None)
    description: str = ""
    source: str = ""
    threshold: float | None = None
    alternative: Alternative = "greater"
    provenance: Provenance = field(default_factory=Provenance)
    examples: Float[np.ndarray, "layer head example"] | None = None
    control_examples: Float[np.ndarray, "layer head control_example"] | None = None
    design: Design = field(default_factory=Design)

    def __post_init__(self) -> None:
        """Check what every user of a score relies on; freeze the arrays."""
        shape = self.summary.mean.shape
        if self.kv_heads < 1 or shape[1] % self.kv_heads:
            raise InputError(
                f"{self.name!r}: {shape[1]} query heads cannot share {self.kv_heads} "
                f"key/value heads evenly."
            )
        for name in ("examples", "control_examples"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, frozen(values, np.float64))

    @classmethod
    def from_examples(
        cls,
        name: str,
        per_example: Float[np.ndarray, "layer head example"],
        *,
        kv_heads: int,
        control_per_example: Float[np.ndarray, "layer head control_example"] | None = None,
        design: Design | None = None,
        alternative: Alternative | None = None,
        missing: Int[np.ndarray, "layer head"] | None = None,
        **facts: Unpack[Facts],
    ) -> "HeadScores":
        """Make a score of its values per example.

        Args:
            name: of the score.
            per_example: NaN is missing.
            kv_heads: number of key/value heads.
            control_per_example: values on the control, if there is one; a last axis of length 1
                is an exact null.
            design: which examples are paired with the control's, and which share a cluster;
                default: independent examples.
            alternative: what the p-value tests; default: ``two-sided`` where 0 lies inside the
                bounds, so that the sign has a meaning, else ``greater``.
            missing: queries per head whose target was out of reach.
            facts: other attributes of the class, by name.
        """
        shape = per_example.shape[:2]
        if control_per_example is not None and control_per_example.shape[:2] != shape:
            raise InputError(
                f"{name!r}: the control has heads {control_per_example.shape[:2]}, not {shape}."
            )
        design = design or Design()
        tested = alternative or alternative_for(facts.get("bounds", (None, None)))
        return cls(
            name=name,
            summary=Summary.of_examples(per_example, control_per_example, tested, missing, design),
            kv_heads=kv_heads,
            alternative=tested,
            design=design,
            examples=per_example,
            control_examples=control_per_example,
            **facts,
        )

    @classmethod
    def from_summary(
        cls,
        name: str,
        mean: Float[np.ndarray, "layer head"],
        *,
        kv_heads: int,
        n: Int[np.ndarray, "layer head"] | None = None,
        known: Mapping[str, Shaped[np.ndarray, "layer head"]] | None = None,
        alternative: Alternative | None = None,
        **facts: Unpack[Facts],
    ) -> "HeadScores":
        """Make a score whose examples are not kept, or that has none (weights).

        Args:
            name: of the score.
            mean: value of every head; NaN is missing.
            kv_heads: number of key/value heads.
            n: examples behind it; 1 where there is a value unless given.
            known: any of ``sem``, ``null``, ``effect_size``, ``p_value``, ``p_floor``,
                ``missing``.
            alternative: what the p-value tests; default: as in :meth:`from_examples`.
            facts: other attributes of the class, by name.
        """
        arrays = dict.fromkeys(FLOATS, np.full(mean.shape, np.nan))
        arrays |= {"mean": mean, "missing": np.zeros(mean.shape, int)}
        arrays["n"] = (~np.isnan(mean)).astype(int) if n is None else n
        arrays |= known or {}
        tested = alternative or alternative_for(facts.get("bounds", (None, None)))
        return cls(name, Summary(**arrays), kv_heads, alternative=tested, **facts)

    @property
    def mean(self) -> Float[np.ndarray, "layer head"]:
        """Mean over examples."""
        return self.summary.mean

    @property
    def sem(self) -> Float[np.ndarray, "layer head"]:
        """Standard error of the mean, by cluster; NaN with fewer than two."""
        return self.summary.sem

    @property
    def n(self) -> Int[np.ndarray, "layer head"]:
        """Examples with a value."""
        return self.summary.n

    @property
    def missing(self) -> Int[np.ndarray, "layer head"]:
        """Queries whose target was out of reach."""
        return self.summary.missing

    @property
    def null(self) -> Float[np.ndarray, "layer head"]:
        """Mean on the control."""
        return self.summary.null

    @property
    def effect_size(self) -> Float[np.ndarray, "layer head"]:
        """Hedges' g against the control; infinite where nothing varies."""
        return self.summary.effect_size

    @property
    def p_value(self) -> Float[np.ndarray, "layer head"]:
        """p-value against the control, one head at a time; NaN where there are too few examples.

        Which test: :func:`headscope.base.statistics.compare_means`.
        """
        return self.summary.p_value

    @property
    def p_floor(self) -> Float[np.ndarray, "layer head"]:
        """Smallest p-value that the head's test can give with this many examples."""
        return self.summary.p_floor

    @cached_property
    def p_adjusted(self) -> Float[np.ndarray, "layer head"]:
        """p-values adjusted over all heads (Benjamini-Hochberg)."""
        return frozen(benjamini_hochberg(self.p_value), np.float64)

    @cached_property
    def labels(self) -> Shaped[np.ndarray, "layer head"]:
        """Names of the heads: ``L0H0`` and so on."""
        layers, heads = self.mean.shape
        return np.array([[str(HeadIndex(i, j)) for j in range(heads)] for i in range(layers)])

    @property
    def present(self) -> Bool[np.ndarray, "layer head"]:
        """Heads that were scored, those included whose every query was out of reach."""
        return (self.n > 0) | (self.missing > 0)

    @property
    def signed(self) -> bool:
        """Whether 0 lies inside the bounds, so that the sign has a meaning."""
        return alternative_for(self.bounds) == "two-sided"

    @property
    def per_example(self) -> Float[np.ndarray, "layer head example"]:
        """Values per example.

        Raises:
            InputError: if they were not kept.
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
            InputError: if they were not kept.
        """
        return self.control_examples if self.per_example is not None else None

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """Confidence interval of the mean, lower and upper end, by cluster.

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
        """Heads that differ from the control at false discovery rate alpha, past any threshold.

        Above the control, and at or above the threshold; of a two-sided score on either side of
        the control, and at least the threshold away from 0.
        """
        found = self.p_adjusted < alpha
        if self.threshold is None:
            return found
        size = np.abs(self.mean) if self.alternative == "two-sided" else self.mean
        return np.asarray(found & (size >= self.threshold))

    def examples_needed(self, alpha: float = LEVEL) -> int | None:
        """How many examples it takes for one head among these to be significant by itself.

        An exact test on n examples gives no p-value below ``2^-n``, and Benjamini-Hochberg asks
        ``alpha / heads`` of a head that stands alone. None where these examples are enough for
        every head (past the threshold, if there is one), where the score has no control, or where
        the smallest p-values are not known.
        """
        heads = int(self.present.sum())
        short = (self.p_floor > alpha / max(heads, 1)) | (np.isnan(self.p_floor) & (self.n == 1))
        if self.threshold is not None:
            size = np.abs(self.mean) if self.alternative == "two-sided" else self.mean
            short &= size >= self.threshold
        if not (short & ~np.isnan(self.null)).any():
            return None
        return examples_needed(heads, self.alternative, alpha)

    def __getitem__(self, head: "str | tuple[int, int]") -> float:
        """Mean of one head, named ``"L5H1"``, ``"5.1"`` or ``(5, 1)``."""
        index = HeadIndex.parse(head)
        layers, heads = self.mean.shape
        if not (0 <= index.layer < layers and 0 <= index.head < heads):
            raise InputError(f"there is no head {index} among {layers} layers of {heads} heads.")
        return float(self.mean[index])

    def __repr__(self) -> str:
        """Name, size and best heads."""
        best = ", ".join(f"{head} {value:.3g}" for head, value in self.top(3))
        layers, heads = self.mean.shape
        return f"HeadScores({self.name!r}, {layers} layers x {heads} heads, top: {best or 'none'})"

    def _repr_html_(self) -> str:
        """Layers by heads as a small static table."""
        from headscope.table.score_html import score_html

        return score_html(self)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head; see :meth:`HeadTable.to_pandas`."""
        from headscope.table.frames import tidy

        return tidy([self])

    def _ranked(
        self, key: Float[np.ndarray, "layer head"], k: int
    ) -> list[tuple[HeadIndex, float]]:
        heads = key.shape[1]
        order = [HeadIndex(*divmod(int(flat), heads)) for flat in top_order(key, k)]
        return [(index, float(self.mean[index])) for index in order]
