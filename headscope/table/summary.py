"""What is known of a score per head once its examples have been averaged."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headscope.base.saved import Stored
from headscope.base.statistics import Alternative, Design, compare_means, mean_and_sem

# Rows are computed in fp32, whose rounding is about 1e-7 a step.
_RESOLUTION = 1e-6


@dataclass(frozen=True, eq=False)
class Summary(Stored):
    """Numbers of one score for every head; NaN where there is none.

    Attributes:
        mean: over examples.
        sem: standard error of the mean; of clustered examples, by cluster.
        n: how many examples had a value.
        missing: queries whose target was out of reach.
        null: mean on the control.
        effect_size: Hedges' g of the values against the control.
        p_value: of the test against the control, one head at a time; see
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
            object.__setattr__(self, name, frozen(getattr(self, name), np.int64))
        for name in FLOATS:
            object.__setattr__(self, name, frozen(getattr(self, name), np.float64))

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


def frozen(array: np.ndarray, kind: type) -> np.ndarray:
    """Return a copy that cannot be written to."""
    copy: np.ndarray = np.array(array, dtype=kind)
    copy.setflags(write=False)
    return copy
