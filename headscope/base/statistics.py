"""Statistics over examples and over heads: pure functions of numpy arrays, NaN = missing.

Tests and intervals are scipy's where scipy has them. What is chosen here is which one holds its
level for the values at hand: see :func:`compare_means` and :func:`mean_interval`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.base.files import Stored
from headscope.errors import InputError, whole

Alternative = Literal["greater", "two-sided"]
Bounds = tuple[float | None, float | None]

# A test that can never give a p-value below this says nothing: its p-value is missing.
LEVEL = 0.05
# Values count as tied where at most this share of them are different.
_DIFFERENT = 0.8
# Two values are the same up to this share of the largest: rows are fp32.
_SAME = 1e-6


class Moments(NamedTuple):
    """Mean, standard error of the mean and number of values, per head."""

    mean: Float[np.ndarray, "*heads"]
    sem: Float[np.ndarray, "*heads"]
    n: Int[np.ndarray, "*heads"]


class MeanTest(NamedTuple):
    """Outcome of a test, per head.

    Attributes:
        p: p-value; NaN where there are too few examples for one below :data:`LEVEL`.
        effect: Hedges' g.
        floor: smallest p-value that the test can give with this many examples: 0 for t-tests.
    """

    p: Float[np.ndarray, "*heads"]
    effect: Float[np.ndarray, "*heads"]
    floor: Float[np.ndarray, "*heads"]


@dataclass(frozen=True)
class Design(Stored):
    """Pairing and clusters of the examples of a score, and of its control.

    Attributes:
        paired: whether example i of the control is example i of the score without the structure
            in question (flat attention, the needle replaced, the order shuffled). False: the
            control's examples are others.
        clusters: a label per example: examples with the same label share a needle, a document
            or a template and count as one observation in errors, intervals and tests. None:
            every example stands for itself.
        control_clusters: the same of the control's examples, where they are others.
    """

    paired: bool = False
    clusters: tuple[int, ...] | None = None
    control_clusters: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the design as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Design":
        """Rebuild from the output of :meth:`to_json`."""
        labels = {
            name: None if facts[name] is None else tuple(int(one) for one in facts[name])
            for name in ("clusters", "control_clusters")
        }
        return cls(paired=bool(facts["paired"]), **labels)


def mean_and_sem(
    values: Float[np.ndarray, "*heads example"], clusters: tuple[int, ...] | None = None
) -> Moments:
    """Mean over examples, its standard error, and n.

    The standard error is ``sd / sqrt(n)`` (sd with n - 1); with clusters it is that of the
    clusters' totals (Liang and Zeger 1986, with the factor ``G / (G - 1)`` for G clusters), which
    for clusters of one size is ``sd of their means / sqrt(G)``.

    NaN values are missing. The mean is NaN where n = 0, the standard error with fewer than two
    examples or clusters; equal values have a standard error of exactly 0.
    """
    mean, _, n = _moments(values)
    _, variance, units = _moments(_units(values, clusters).weighted)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Moments(mean, np.sqrt(variance / units), n)


def mean_interval(
    values: Float[np.ndarray, "*heads example"],
    level: float = 0.95,
    clusters: tuple[int, ...] | None = None,
    bounds: Bounds = (None, None),
) -> tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"]]:
    """Confidence interval of every head's mean.

    Student's t interval, with each end moved outwards to that of Hall's skewness-corrected
    interval (1992, cubic transformation, t quantiles) where this one lies farther out. For
    normal values that is 1-9% wider than t alone; for skewed ones (exponential, beta(1, 9),
    n from 8 to 32) it covers 94-96% where t covers 90-93% and bootstrap intervals (percentile,
    BCa) cover 86-93%. Where a score in [0, 1] took no other values than 0 and 1 it is the exact
    interval of Clopper and Pearson (1934). Never beyond the bounds.

    Args:
        values: value of every head on every example; NaN is missing.
        level: share of the intervals that hold the mean, between 0 and 1.
        clusters: label per example; see :class:`Design`.
        bounds: smallest and largest possible value of the score.

    Returns:
        Lower and upper end; NaN for heads with fewer than two examples (or clusters).

    Raises:
        InputError: if the level is not a share, or the labels do not fit.

    Example:
        >>> low, high = mean_interval(np.array([[1.0, 2.0, 3.0]]))
        >>> round(float(low[0]), 2), round(float(high[0]), 2)
        (-0.48, 4.48)
    """
    from scipy import special

    if not 0 < level < 1:
        raise InputError(f"level is a share between 0 and 1; got {level}.")
    mean, _, n = _moments(values)
    units = _units(values, clusters).weighted
    _, variance, count = _moments(units)
    tail = (1 - level) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        sem = np.sqrt(variance / count)
        reach = special.stdtrit(np.where(count > 1, count - 1.0, np.nan), 1 - tail)
        skew = _skewness(units) / np.sqrt(count)
        low = np.fmin(mean - sem * reach, mean - sem * _hall(reach, skew))
        high = np.fmax(mean + sem * reach, mean - sem * _hall(-reach, skew))
    lowest, highest = (np.nan if bound is None else float(bound) for bound in bounds)
    if clusters is None and (lowest, highest) == (0.0, 1.0):
        binary = _all(values, np.isin(values, (0.0, 1.0))) & (n > 1)
        exact = _clopper_pearson(np.round(mean * n), n, tail)
        low, high = (
            np.where(binary, one, end) for one, end in zip(exact, (low, high), strict=True)
        )
    low, high = (
        np.where(np.isnan(end), np.nan, np.fmin(np.fmax(end, lowest), highest))
        for end in (low, high)
    )
    return low, high


def interval_of_sem(
    mean: Float[np.ndarray, "*heads"],
    sem: Float[np.ndarray, "*heads"],
    n: Int[np.ndarray, "*heads"],
    level: float = 0.95,
) -> tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"]]:
    """Student's t interval from a standard error; normal if n is unknown.

    Example:
        >>> low, high = interval_of_sem(np.array([1.0]), np.array([0.1]), np.array([16]))
        >>> round(float(high[0] - low[0]), 3)  # t = 2.131 with 15 degrees of freedom
        0.426
    """
    from scipy import special

    tail = (1 + level) / 2
    quantile = np.where(n > 1, special.stdtrit(np.maximum(n - 1.0, 1.0), tail), special.ndtri(tail))
    return mean - quantile * sem, mean + quantile * sem


Known = tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"], Int[np.ndarray, "*heads"]]


def welch_interval(
    first: Known, second: Known, level: float = 0.95
) -> tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"]]:
    """Welch's interval (1947) of the difference of two independent means.

    Args:
        first: mean, standard error and n of every head.
        second: the same of the others.
        level: share of the intervals that hold the difference.
    """
    from scipy import special

    (mean, sem, n), (null, null_sem, null_n) = first, second
    parts = sem**2, null_sem**2
    with np.errstate(divide="ignore", invalid="ignore"):
        below = parts[0] ** 2 / (n - 1.0) + parts[1] ** 2 / (null_n - 1.0)
        df = np.where(below > 0, (parts[0] + parts[1]) ** 2 / below, 1.0)
    width = special.stdtrit(df, (1 + level) / 2) * np.sqrt(parts[0] + parts[1])
    return mean - null - width, mean - null + width


def compare_means(
    values: Float[np.ndarray, "*heads example"],
    control: Float[np.ndarray, "*heads control_example"],
    alternative: Alternative = "greater",
    design: Design | None = None,
    resolution: float = 0.0,
) -> MeanTest:
    """Test per head whether the mean of ``values`` is above (or differs from) ``control``'s.

    Which test, by the control and the values of each head:

    * Paired control, or an exact null (a control with one column, or one that does not vary):
      Student's t-test of the differences.
    * Independent control: Welch's t-test (1947), unequal variances.
    * Tied values (less than 80% of the differences that are not 0, or of the values, are
      different; binary and constant ones among them): a t-test takes ties for certainty, so the
      p-value is the larger of the t-test's and an exact test's. Of differences that is the sign
      test (McNemar's for binary values), of independent samples Mood's median test, which for
      binary values is Fisher's.
    * Binary values against chances between 0 and 1 (of flat attention, say): the exact binomial
      test with their mean, which holds its level for unequal chances too (Hoeffding 1956).

    Two-sided exact p-values are twice the smaller tail's, at most 1. Clustered examples enter as
    one observation per cluster.

    p is NaN where there are fewer than two observations, or too few for the exact test to give
    any p-value below .05: with n pairs it gives none below ``2^-n``. ``floor`` says what it could
    have given.

    effect: Hedges' g (1981), the difference over the pooled standard deviation (that of the
    values alone against an exact null), times the small-sample factor ``1 - 3 / (4 df - 1)``.
    Infinite where neither side varies but the means differ, 0 where they do not; NaN where the
    values, or a control of several columns, have fewer than two known examples.

    Args:
        values: values of the head on the probe; NaN is missing.
        control: values of the head on the control.
        alternative: ``greater`` or ``two-sided``.
        design: pairs and clusters; default: independent examples.
        resolution: differences up to this share of the larger value are rounding and count as 0.

    Raises:
        InputError: for another alternative, or a design that does not fit the examples.

    Example:
        >>> test = compare_means(np.array([[3.0, 4.0, 5.0]]), np.array([[1.0]]))
        >>> round(float(test.p[0]), 4)  # t = 3 / (1 / sqrt(3)), 2 degrees of freedom
        0.0175
    """
    design = design or Design()
    if alternative not in ("greater", "two-sided"):
        raise InputError(f"alternative is 'greater' or 'two-sided'; got {alternative!r}.")
    n_control = control.shape[-1]
    exact = n_control == 1
    if design.paired and not exact and n_control != values.shape[-1]:
        raise InputError(
            f"a paired control has an example for each of the {values.shape[-1]} examples; "
            f"got {n_control}."
        )
    effect = _hedges_g(values, control, exact=exact, resolution=resolution)
    x, null = values.astype(np.float64), control.astype(np.float64)
    if design.paired or exact:
        p, floor = _difference_test(x, null, alternative, design.clusters, resolution)
        return MeanTest(p, effect, floor)
    p, floor = _independent_test(x, null, alternative, design, resolution)
    lowest, spread, known = _moments(null)
    still = (known > 1) & (spread <= (_SAME * np.abs(lowest)) ** 2)
    if still.any():
        constant = np.where(still, lowest, np.nan)[..., None]
        own = _difference_test(x, constant, alternative, design.clusters, resolution)
        p, floor = (np.where(still, *pair) for pair in zip(own, (p, floor), strict=True))
    return MeanTest(p, effect, floor)


def examples_needed(heads: int, alternative: Alternative, level: float = LEVEL) -> int:
    """Number of examples with which an exact test can single out one head among many.

    With n pairs the sign test gives no p-value below ``2^-n`` (twice that, two-sided), and
    Benjamini-Hochberg asks ``level / heads`` of a head that stands alone.

    Example:
        >>> examples_needed(1024, "greater"), examples_needed(1024, "two-sided")
        (15, 16)
    """
    sides = 1 if alternative == "greater" else 2
    return ceil(log2(sides * max(heads, 1) / level))


def benjamini_hochberg(p: Float[np.ndarray, "*heads"]) -> Float[np.ndarray, "*heads"]:
    """Adjusted p-values that control the false discovery rate (Benjamini and Hochberg 1995).

    ``q_(i) = min over j >= i of (m / j) p_(j)``, at most 1, in the shape of ``p``, as
    ``scipy.stats.false_discovery_control`` gives them. NaN is not a test: it stays NaN and does not
    count in m.
    """
    from scipy import stats

    adjusted = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        adjusted[known] = stats.false_discovery_control(p[known].astype(np.float64))
    return adjusted


def rank_correlation(a: Float[np.ndarray, "*heads"], b: Float[np.ndarray, "*heads"]) -> float:
    """Spearman's rank correlation (``scipy.stats.spearmanr``), in [-1, 1]; ties share their rank.

    Heads that either side lacks are left out. NaN with fewer than two heads left, or where one
    side is constant.
    """
    from scipy import stats

    known = np.isfinite(a) & np.isfinite(b)
    sides = [side[known] for side in (a, b)]
    if known.sum() < 2 or any(np.ptp(side) == 0 for side in sides):
        return float("nan")
    return float(np.clip(stats.spearmanr(*sides).statistic, -1.0, 1.0))


def top_order(values: Float[np.ndarray, "*heads"], k: int) -> Int[np.ndarray, " top"]:
    """Flat indices of the k largest values, largest first; ties by lowest index; NaN never."""
    k = whole(k, "k", 0)
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


def _difference_test(
    values: Float[np.ndarray, "*heads example"],
    control: Float[np.ndarray, "*heads control_example"],
    alternative: Alternative,
    clusters: tuple[int, ...] | None,
    resolution: float,
) -> tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"]]:
    """p-value and its lower limit, for values against a control example by example."""
    chance = np.broadcast_to(control, values.shape)
    both = ~np.isnan(values) & ~np.isnan(chance)
    size = np.maximum(np.abs(values), np.abs(chance))
    difference = np.where(both, values - chance, np.nan)
    difference = np.where(np.abs(difference) <= resolution * size, 0.0, difference)
    units = _units(difference, clusters)
    mean, variance, n = _moments(units.weighted)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = _t_tail(_ratio(mean, np.sqrt(variance / n)), n - 1.0, alternative)
    size = np.abs(units.mean)
    tied = _tied(np.where(size > 0, size, np.nan))
    above, below = (units.mean > 0).sum(-1), (units.mean < 0).sum(-1)
    sign = _binomial(above, above + below, np.full(n.shape, 0.5), alternative)
    floor = np.where(tied, _sides(alternative) * 0.5**n, 0.0)
    p = np.where(tied, np.fmax(p, sign), p)
    if clusters is None:
        hits = np.where(both, values, np.nan)
        odds = np.where(both, chance, np.nan)
        binary = _all(hits, np.isin(hits, (0.0, 1.0))) & _all(odds, (odds > 0) & (odds < 1))
        rate = np.where(binary, _moments(odds)[0], 0.5)
        count = np.where(binary, np.nan_to_num(hits).sum(-1), 0).astype(int)
        p = np.where(binary, _binomial(count, n, rate, alternative), p)
        smallest = rate**n if alternative == "greater" else 2 * np.minimum(rate, 1 - rate) ** n
        floor = np.where(binary, smallest, floor)
    return np.where((n > 1) & (floor < LEVEL), p, np.nan), np.where(n > 1, floor, np.nan)


def _independent_test(
    values: Float[np.ndarray, "*heads example"],
    control: Float[np.ndarray, "*heads control_example"],
    alternative: Alternative,
    design: Design,
    resolution: float,
) -> tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"]]:
    """p-value and its lower limit, for values against independent examples."""
    from scipy import special, stats

    own, other = _units(values, design.clusters), _units(control, design.control_clusters)
    mean, variance, n = _moments(own.weighted)
    null, null_variance, null_n = _moments(other.weighted)
    rounding = np.abs(mean - null) <= resolution * np.maximum(np.abs(mean), np.abs(null))
    mean = np.where(rounding, null, mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        moments = (mean, np.sqrt(variance), n, null, np.sqrt(null_variance), null_n)
        p = stats.ttest_ind_from_stats(*moments, equal_var=False, alternative=alternative).pvalue
    pooled = np.concatenate([own.mean, other.mean], -1)
    tied = _tied(pooled)
    with np.errstate(divide="ignore", invalid="ignore"):
        least = _sides(alternative) / special.comb(n + null_n, n)
    floor = np.where(tied, least, 0.0)
    p = np.where(tied, np.fmax(p, _median_test(own.mean, other.mean, alternative)), p)
    enough = (n > 1) & (null_n > 1)
    return np.where(enough & (floor < LEVEL), p, np.nan), np.where(enough, floor, np.nan)


def _median_test(
    values: Float[np.ndarray, "*heads example"],
    control: Float[np.ndarray, "*heads control_example"],
    alternative: Alternative,
) -> Float[np.ndarray, "*heads"]:
    """Mood's median test with Fisher's exact test, on the more even split at the median."""
    from scipy import stats

    pooled = np.concatenate([values, control], -1)
    known = ~np.isnan(pooled)
    total = known.sum(-1)
    filled = np.where(known.any(-1, keepdims=True), pooled, 0.0)
    median = np.nanmedian(filled, -1, keepdims=True)
    more, least = (pooled > median).sum(-1), (pooled >= median).sum(-1)
    strict = np.abs(2 * more - total) <= np.abs(2 * least - total)
    high = np.where(strict, more, least)
    mine = np.where(strict, (values > median).sum(-1), (values >= median).sum(-1))
    table = (total, high, (~np.isnan(values)).sum(-1))
    upper, lower = stats.hypergeom.sf(mine - 1, *table), stats.hypergeom.cdf(mine, *table)
    return _two_tails(upper, lower, alternative)


def _binomial(
    hits: Int[np.ndarray, "*heads"],
    n: Int[np.ndarray, "*heads"],
    rate: Float[np.ndarray, "*heads"],
    alternative: Alternative,
) -> Float[np.ndarray, "*heads"]:
    """Exact binomial test; 1 without any trial."""
    from scipy import special

    upper = np.where(hits > 0, special.bdtrc(np.maximum(hits - 1, 0), n, rate), 1.0)
    return _two_tails(upper, special.bdtr(hits, n, rate), alternative)


def _two_tails(
    upper: Float[np.ndarray, "*heads"], lower: Float[np.ndarray, "*heads"], alternative: Alternative
) -> Float[np.ndarray, "*heads"]:
    if alternative == "greater":
        return np.asarray(upper)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(upper, lower)))


def _t_tail(
    t: Float[np.ndarray, "*heads"], df: Float[np.ndarray, "*heads"], alternative: Alternative
) -> Float[np.ndarray, "*heads"]:
    """Upper tail (or both tails) of Student's t; NaN without degrees of freedom."""
    from scipy import special

    df = np.where(df > 0, df, np.nan)
    if alternative == "greater":
        return np.asarray(special.stdtr(df, -t), dtype=np.float64)
    return np.asarray(2 * special.stdtr(df, -np.abs(t)), dtype=np.float64)


def _sides(alternative: Alternative) -> int:
    return 1 if alternative == "greater" else 2


def _tied(values: Float[np.ndarray, "*heads example"]) -> Bool[np.ndarray, "*heads"]:
    """Whether too many values are equal to come from a continuous distribution."""
    if values.shape[-1] == 0:
        return np.ones(values.shape[:-1], dtype=bool)
    ordered = np.sort(values, -1)  # NaN last
    count = (~np.isnan(ordered)).sum(-1)
    largest = np.abs(np.nan_to_num(ordered)).max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        new = (np.diff(ordered, axis=-1) > _SAME * largest).sum(-1)
    return np.asarray(new + (count > 0) <= _DIFFERENT * count)


def _all(
    values: Float[np.ndarray, "*heads example"], holds: Bool[np.ndarray, "*heads example"]
) -> Bool[np.ndarray, "*heads"]:
    """Whether something holds for every known value, and there is at least one."""
    known = ~np.isnan(values)
    return np.asarray((holds | ~known).all(-1) & known.any(-1))


def _hedges_g(
    values: Float[np.ndarray, "*heads example"],
    control: Float[np.ndarray, "*heads control_example"],
    *,
    exact: bool,
    resolution: float,
) -> Float[np.ndarray, "*heads"]:
    mean, variance, n = _moments(values)
    null, null_variance, null_n = _moments(control)
    difference = mean - null
    scale = np.maximum(np.abs(mean), np.abs(null))
    difference = np.where(np.abs(difference) <= resolution * scale, 0.0, difference)
    df = (n - 1) if exact else (n + null_n - 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        pooled = ((n - 1) * variance + (0 if exact else (null_n - 1) * null_variance)) / df
        return _ratio(difference, np.sqrt(pooled)) * (1 - 3 / (4 * df - 1))


class _Units(NamedTuple):
    """Independent observations: the examples, or one per cluster.

    Attributes:
        weighted: their mean is the mean over examples, and their spread its error, whatever the
            sizes of the clusters.
        mean: mean of each cluster.
    """

    weighted: Float[np.ndarray, "*heads unit"]
    mean: Float[np.ndarray, "*heads unit"]


def _units(values: Float[np.ndarray, "*heads example"], clusters: tuple[int, ...] | None) -> _Units:
    x = values.astype(np.float64)
    if clusters is None:
        return _Units(x, x)
    if len(clusters) != x.shape[-1]:
        raise InputError(f"{len(clusters)} cluster labels for {x.shape[-1]} examples.")
    labels, place = np.unique(np.asarray(clusters), return_inverse=True)
    member = np.eye(len(labels))[place]
    known = ~np.isnan(x)
    mean, _, n = _moments(x)
    count = known @ member
    with np.errstate(divide="ignore", invalid="ignore"):
        away = np.where(known, x - mean[..., None], 0.0) @ member  # of the total from its share
        there = np.where(count > 0, 0.0, np.nan)
        groups = (count > 0).sum(-1)
        weighted = mean[..., None] + away * (groups / n)[..., None] + there
        return _Units(weighted, mean[..., None] + away / count + there)


def _hall(
    quantile: Float[np.ndarray, "*heads"], skew: Float[np.ndarray, "*heads"]
) -> Float[np.ndarray, "*heads"]:
    """Quantiles after inverting Hall's cubic transformation of t; unchanged without skewness."""
    a = np.where(np.abs(skew) < 1e-9, np.nan, skew / 3)
    corrected = (np.cbrt(1 + 3 * a * (quantile - skew / 6)) - 1) / a
    return np.asarray(np.where(np.isnan(a), quantile, corrected))


def _skewness(values: Float[np.ndarray, "*heads example"]) -> Float[np.ndarray, "*heads"]:
    """Skewness without bias (Joanes and Gill's G1); 0 where fewer than three values are known."""
    mean, variance, n = _moments(values)
    away = np.where(np.isnan(values), 0.0, values - mean[..., None])
    with np.errstate(divide="ignore", invalid="ignore"):
        third = n * (away**3).sum(-1) / ((n - 1.0) * (n - 2.0) * variance**1.5)
    return np.where((n > 2) & (variance > 0), third, 0.0)


def _clopper_pearson(
    hits: Float[np.ndarray, "*heads"], n: Int[np.ndarray, "*heads"], tail: float
) -> tuple[Float[np.ndarray, "*heads"], Float[np.ndarray, "*heads"]]:
    from scipy import stats

    with np.errstate(invalid="ignore"):
        low = stats.beta.ppf(tail, hits, n - hits + 1)
        high = stats.beta.ppf(1 - tail, hits + 1, n - hits)
    return np.where(hits > 0, low, 0.0), np.where(hits < n, high, 1.0)


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
    """Ratio of difference to spread; 0 if the difference is 0."""
    ratio = difference / spread
    return np.where((difference == 0) & ~np.isnan(spread), 0.0, ratio)
