"""Statistics over examples and over heads: pure functions of numpy arrays, NaN = missing."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headscope.errors import InputError

Alternative = Literal["greater", "two-sided"]


class Moments(NamedTuple):
    """Mean, standard error of the mean and number of values, per head."""

    mean: Float[np.ndarray, "*heads"]
    sem: Float[np.ndarray, "*heads"]
    n: Int[np.ndarray, "*heads"]


class WelchTest(NamedTuple):
    """p-value and effect size, per head."""

    p: Float[np.ndarray, "*heads"]
    effect: Float[np.ndarray, "*heads"]


def mean_and_sem(values: Float[np.ndarray, "*heads example"]) -> Moments:
    """Mean over examples, its standard error ``sd / sqrt(n)`` (sd with n - 1), and n.

    NaN values are missing. The mean is NaN where n = 0, the standard error where n < 2; equal
    values have a standard error of exactly 0.
    """
    mean, variance, n = _moments(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Moments(mean, np.sqrt(variance / n), n)


def bootstrap_interval(
    per_example: Float[np.ndarray, "layer head example"],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
    """Percentile bootstrap interval of every head's mean (Efron and Tibshirani 1993, ch. 13).

    Whole examples are drawn with replacement, the same draws for all heads, so that differences
    between heads keep their correlation. With few examples (about 10 or less) it is too narrow.

    Args:
        per_example: value of every head on every example; NaN is missing.
        level: share of the resampled means inside, between 0 and 1.
        resamples: how many times the examples are drawn.
        seed: of the draws.

    Returns:
        Lower and upper end; NaN for heads with fewer than two values.
    """
    if not 0 < level < 1:
        raise InputError(f"level is a share between 0 and 1; got {level}.")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1; got {resamples}.")
    n_layers, n_heads, n = per_example.shape
    bounds = np.full((2, n_layers, n_heads), np.nan)
    if n == 0:
        return bounds[0], bounds[1]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    weights = counts.T.astype(np.float64)
    tails = [(1 - level) / 2, (1 + level) / 2]
    for layer, values in enumerate(per_example.astype(np.float64)):
        known = np.isfinite(values)
        enough = known.sum(-1) >= 2
        if not enough.any():
            continue
        with np.errstate(invalid="ignore"):
            means = np.where(known, values, 0.0)[enough] @ weights / (known[enough] @ weights)
        # nanquantile walks row by row: only pay for it where a resample can be empty.
        quantile = np.quantile if known[enough].all() else np.nanquantile
        bounds[:, layer, enough] = quantile(means, tails, axis=-1)
    return bounds[0], bounds[1]


def welch_test(
    values: Float[np.ndarray, "*heads example"],
    control: Float[np.ndarray, "*heads control_example"],
    alternative: Alternative = "greater",
    resolution: float = 0.0,
) -> WelchTest:
    """Test per head whether the mean of ``values`` is above (or differs from) ``control``'s.

    p: Welch's t-test (1947), unequal variances. A control with one column is an exact null and
    adds no variance: the test is then the one-sample t-test. Where neither side varies, p is the
    limit of vanishing variance: 0 or 1 by the sign of the difference, and 0.5 ("greater") or 1
    ("two-sided") where there is no difference.

    effect: Hedges' g (1981), the difference over the pooled standard deviation (that of the
    values alone against an exact null), times the small-sample factor ``1 - 3 / (4 df - 1)``.
    Infinite where neither side varies but the means differ, 0 where they do not.

    Both are NaN where the values, or a control of several columns, have fewer than two known
    examples.

    Args:
        values: of the head on the probe; NaN is missing.
        control: of the head on the control.
        alternative: ``greater`` or ``two-sided``.
        resolution: differences up to this share of the larger mean are rounding and count as 0.
    """
    if alternative not in ("greater", "two-sided"):
        raise InputError(f"alternative is 'greater' or 'two-sided'; got {alternative!r}.")
    exact = control.shape[-1] == 1
    mean, variance, n = _moments(values)
    null, null_variance, null_n = _moments(control)
    if exact:
        null_variance = np.where(null_n == 1, 0.0, np.nan)
    difference = mean - null
    scale = np.maximum(np.abs(mean), np.abs(null))
    difference = np.where(np.abs(difference) <= resolution * scale, 0.0, difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        part, null_part = variance / n, null_variance / null_n
        t = _ratio(difference, np.sqrt(part + null_part))
        null_df = np.zeros_like(part) if exact else null_part**2 / (null_n - 1)
        df = (part + null_part) ** 2 / (part**2 / (n - 1) + null_df)
        pooled_df = (n - 1) if exact else (n + null_n - 2)
        pooled = ((n - 1) * variance + (0 if exact else (null_n - 1) * null_variance)) / pooled_df
        g = _ratio(difference, np.sqrt(pooled)) * (1 - 3 / (4 * pooled_df - 1))
    return WelchTest(_p_value(t, df, alternative), np.where(np.isnan(t), np.nan, g))


def benjamini_hochberg(p: Float[np.ndarray, "*heads"]) -> Float[np.ndarray, "*heads"]:
    """Adjusted p-values that control the false discovery rate (Benjamini and Hochberg 1995).

    ``q_(i) = min over j >= i of (m / j) p_(j)``, at most 1, in the shape of ``p``. Never below
    ``p``. NaN is no test: it stays NaN and does not count in m.
    """
    adjusted = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    raw = p[known].astype(np.float64)
    order = np.argsort(raw, kind="stable")
    stepped = raw[order] * (raw.size / np.arange(1, raw.size + 1))
    back = np.empty_like(raw)
    back[order] = np.minimum.accumulate(stepped[::-1])[::-1]
    adjusted[known] = np.minimum(back, 1.0)
    return adjusted


def rank_correlation(a: Float[np.ndarray, "*heads"], b: Float[np.ndarray, "*heads"]) -> float:
    """Spearman's rank correlation, in [-1, 1]; ties share their mean rank.

    Heads that either side lacks are left out. NaN with fewer than two heads left, or where one
    side is constant.
    """
    known = np.isfinite(a) & np.isfinite(b)
    ranks = [_ranks(side[known]) for side in (a, b)]
    if known.sum() < 2 or any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    centred = [rank - rank.mean() for rank in ranks]
    norm = np.sqrt(np.sum(centred[0] ** 2) * np.sum(centred[1] ** 2))
    return float(np.clip(np.sum(centred[0] * centred[1]) / norm, -1.0, 1.0))


def top_order(values: Float[np.ndarray, "*heads"], k: int) -> Int[np.ndarray, " top"]:
    """Flat indices of the k largest values, largest first; ties by lowest index; NaN never."""
    if k < 0:
        raise InputError(f"k must not be negative; got {k}.")
    flat = values.ravel()
    order = np.argsort(-flat, kind="stable")
    return order[: min(k, int((~np.isnan(flat)).sum()))]


def top_k_overlap(a: Float[np.ndarray, "*heads"], b: Float[np.ndarray, "*heads"], k: int) -> float:
    """Jaccard index of the k largest heads of two scores: shared over all, in [0, 1].

    NaN where neither side has a value.
    """
    chosen = [set(top_order(side, k).tolist()) for side in (a, b)]
    union = chosen[0] | chosen[1]
    return len(chosen[0] & chosen[1]) / len(union) if union else float("nan")


def _moments(
    values: Float[np.ndarray, "*heads example"],
) -> tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"], Int[np.ndarray, "*heads"]]:
    """Mean, variance (n - 1) and n of the known values."""
    x = values.astype(np.float64)
    known = ~np.isnan(x)
    n = known.sum(-1)
    # Taken from the smallest value, equal values have a variance of 0 and not of rounding.
    lowest = np.where(known, x, np.inf).min(-1, initial=np.inf)
    origin = np.where(n > 0, lowest, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        shifted = np.where(known, x - origin[..., None], 0.0)
        shift = shifted.sum(-1) / n
        squares = np.where(known, (shifted - shift[..., None]) ** 2, 0.0).sum(-1)
        variance = np.where(n > 1, squares / (n - 1), np.nan)
    return origin + shift, variance, n


def _ratio(
    difference: Float[np.ndarray, "*heads"], spread: Float[np.ndarray, "*heads"]
) -> Float[np.ndarray, "*heads"]:
    """Difference over spread, 0 where there is no difference, whatever the spread."""
    ratio = difference / spread
    return np.where((difference == 0) & ~np.isnan(spread), 0.0, ratio)


def _p_value(
    t: Float[np.ndarray, "*heads"], df: Float[np.ndarray, "*heads"], alternative: Alternative
) -> Float[np.ndarray, "*heads"]:
    """Upper tail (or both tails) of Student's t; without variance, of its limit."""
    from scipy.special import stdtr

    df = np.where(np.isnan(df), 1.0, df)  # 0 / 0: neither side varies, t is 0 or infinite
    if alternative == "greater":
        return np.asarray(stdtr(df, -t), dtype=np.float64)
    return np.asarray(2 * stdtr(df, -np.abs(t)), dtype=np.float64)


def _ranks(values: Float[np.ndarray, " heads"]) -> Float[np.ndarray, " heads"]:
    """Ranks from 1; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse].astype(np.float64)
