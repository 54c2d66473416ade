"""Statistics against scipy, hand-computed cases, and simulations of what they promise."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError
from scipy import stats

from headscope.base.statistics import (
    Design,
    benjamini_hochberg,
    compare_means,
    examples_needed,
    interval_of_sem,
    mean_and_sem,
    mean_interval,
    rank_correlation,
    top_k_overlap,
    top_order,
    welch_interval,
)
from headscope.errors import InputError

NAN = float("nan")
PAIRED = Design(paired=True)
values = arrays(np.float64, (2, 3, 6), elements=st.floats(-10, 10, width=32))
few_ranks = arrays(np.float64, 8, elements=st.integers(0, 4))


def test_mean_and_sem_by_hand() -> None:
    moments = mean_and_sem(np.array([[1.0, 3.0, NAN], [5.0, NAN, NAN], [NAN, NAN, NAN]]))
    np.testing.assert_allclose(moments.mean, [2, 5, NAN])
    np.testing.assert_allclose(moments.sem, [1, NAN, NAN])
    assert moments.n.tolist() == [2, 1, 0]


def test_equal_values_have_no_spread_at_all() -> None:
    moments = mean_and_sem(np.full((1, 7), 0.1))
    assert moments.sem[0] == 0
    assert moments.mean[0] == 0.1


@given(values)
def test_mean_and_sem_agree_with_scipy(x: np.ndarray) -> None:
    moments = mean_and_sem(x)
    np.testing.assert_allclose(moments.mean, x.mean(-1), atol=1e-12)
    np.testing.assert_allclose(moments.sem, stats.sem(x, axis=-1), atol=1e-12)


def test_clusters_of_one_size_count_as_their_means() -> None:
    x = np.random.default_rng(0).normal(size=(5, 12))
    clusters = tuple(range(4)) * 3
    means = x.reshape(5, 3, 4).mean(1)
    moments = mean_and_sem(x, clusters)
    np.testing.assert_allclose(moments.mean, x.mean(-1))
    np.testing.assert_allclose(moments.sem, stats.sem(means, axis=-1))
    null = np.zeros((5, 1))
    found = compare_means(x, null, "two-sided", Design(clusters=clusters))
    np.testing.assert_allclose(found.p, stats.ttest_1samp(means, 0, axis=-1).pvalue)
    low, high = mean_interval(x, clusters=clusters)
    again = mean_interval(means)
    np.testing.assert_allclose(low, again[0])
    np.testing.assert_allclose(high, again[1])


def test_clusters_of_several_sizes_by_hand() -> None:
    # mean 2; clusters (1, 1) and (4): totals less their shares -2 and 2; (4 + 4) * 2 / 9
    moments = mean_and_sem(np.array([[1.0, 1.0, 4.0]]), (7, 7, 3))
    np.testing.assert_allclose(moments.sem, [np.sqrt(16) / 3])
    assert np.isnan(mean_and_sem(np.array([[1.0, 2.0]]), (0, 0)).sem[0])
    with pytest.raises(InputError, match="2 cluster labels for 3 examples"):
        mean_and_sem(np.zeros((1, 3)), (0, 1))


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_independent_controls_get_welch(alternative: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 1, (4, 9)), rng.normal(0, 2, (4, 5))
    x[0, :3] = NAN
    ours = compare_means(x, y, alternative)
    theirs = stats.ttest_ind(
        x, y, axis=-1, equal_var=False, alternative=alternative, nan_policy="omit"
    )
    np.testing.assert_allclose(ours.p, np.asarray(theirs.pvalue), rtol=1e-10)
    assert (ours.floor == 0).all()


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_paired_controls_get_the_test_of_the_difference(alternative: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, (4, 9))
    y = x + rng.normal(-0.1, 0.1, (4, 9))
    x[1, 2] = y[2, 3] = NAN
    ours = compare_means(x, y, alternative, PAIRED)
    for head in range(4):
        both = ~np.isnan(x[head] + y[head])
        theirs = stats.ttest_rel(x[head, both], y[head, both], alternative=alternative)
        np.testing.assert_allclose(ours.p[head], theirs.pvalue, rtol=1e-9)
    with pytest.raises(InputError, match="an example for each of the 9"):
        compare_means(x, y[:, :5], alternative, PAIRED)


def test_an_exact_null_is_the_one_sample_test() -> None:
    x = np.random.default_rng(1).normal(0.3, 1, (4, 9))
    ours = compare_means(x, np.full((4, 1), 0.1))
    theirs = stats.ttest_1samp(x, 0.1, axis=-1, alternative="greater")
    np.testing.assert_allclose(ours.p, theirs.pvalue, rtol=1e-10)
    g = (x.mean(-1) - 0.1) / x.std(-1, ddof=1) * (1 - 3 / (4 * 8 - 1))
    np.testing.assert_allclose(ours.effect, g)


def test_a_constant_control_is_an_exact_null() -> None:
    x = np.random.default_rng(1).normal(0.3, 1, (4, 9))
    constant = compare_means(x, np.full((4, 5), 0.1))
    np.testing.assert_allclose(constant.p, compare_means(x, np.full((4, 1), 0.1)).p)


def test_hedges_g_by_hand() -> None:
    # means 3 and 1, variances 1 and 1, df 4: g = 2 * (1 - 3 / 15)
    effect = compare_means(np.array([[2.0, 3.0, 4.0]]), np.array([[0.0, 1.0, 2.0]])).effect
    np.testing.assert_allclose(effect, [1.6])


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize(
    ("value", "greater", "two_sided", "effect"),
    [(0.9, 2.0**-6, 2.0**-5, np.inf), (0.2, 1.0, 1.0, 0.0), (-0.3, 1.0, 2.0**-5, -np.inf)],
)
def test_constant_values_get_the_sign_test(
    value: float, greater: float, two_sided: float, effect: float, columns: int
) -> None:
    x, null = np.full((1, 6), value), np.full((1, columns), 0.2)
    assert compare_means(x, null, "greater").p[0] == pytest.approx(greater)
    assert compare_means(x, null, "two-sided").p[0] == pytest.approx(two_sided)
    assert compare_means(x, null).effect[0] == effect


@pytest.mark.parametrize(("n", "alternative"), [(4, "greater"), (5, "two-sided")])
def test_where_an_exact_test_can_say_nothing_p_is_missing(n: int, alternative: str) -> None:
    found = compare_means(np.ones((1, n)), np.zeros((1, 1)), alternative)
    assert np.isnan(found.p[0])
    assert found.floor[0] > 0.05
    more = compare_means(np.ones((1, n + 1)), np.zeros((1, 1)), alternative)
    assert more.p[0] == pytest.approx(more.floor[0])
    assert more.floor[0] < 0.05


def test_binary_pairs_get_mcnemar() -> None:
    rng = np.random.default_rng(2)
    x, y = (rng.random((6, 40)) < 0.6).astype(float), (rng.random((6, 40)) < 0.3).astype(float)
    for alternative in ("greater", "two-sided"):
        found = compare_means(x, y, alternative, PAIRED)
        for head in range(6):
            up, down = int((x > y)[head].sum()), int((x < y)[head].sum())
            exact = stats.binomtest(up, up + down, alternative=alternative).pvalue
            student = stats.ttest_rel(x[head], y[head], alternative=alternative).pvalue
            assert found.p[head] == pytest.approx(max(exact, student))


def test_binary_values_against_a_chance_get_the_binomial_test() -> None:
    x = np.array([[1.0, 1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]])
    found = compare_means(x, np.full((2, 1), 0.25))
    for head, hits in enumerate((5, 1)):
        assert found.p[head] == pytest.approx(
            stats.binomtest(hits, 8, 0.25, alternative="greater").pvalue
        )
    each = compare_means(x, np.tile([0.2, 0.3], (2, 4)), "greater", PAIRED)
    np.testing.assert_allclose(each.p, found.p)  # the mean chance, conservative by Hoeffding


def test_tied_independent_values_get_fishers_test_at_the_median() -> None:
    x, y = np.array([[1.0, 1, 1, 1, 0, 1, 1]]), np.array([[0.0, 0, 1, 0, 0, 0]])
    for alternative in ("greater", "two-sided"):
        found = compare_means(x, y, alternative).p[0]
        one_sided = stats.fisher_exact([[6, 1], [1, 5]], "greater").pvalue
        exact = one_sided if alternative == "greater" else 2 * one_sided
        welch = stats.ttest_ind(x, y, axis=-1, equal_var=False, alternative=alternative).pvalue[0]
        assert found == pytest.approx(max(exact, welch))


def test_one_example_has_no_p() -> None:
    one, many = np.array([[1.0, NAN, NAN]]), np.array([[1.0, 2.0, 3.0]])
    for result in (compare_means(one, many), compare_means(many, one)):
        assert np.isnan(result.p[0])
        assert np.isnan(result.effect[0])
    assert np.isnan(compare_means(one, many, design=PAIRED).p[0])
    assert np.isnan(compare_means(many, np.array([[NAN]])).p[0])


def test_rounding_is_no_difference() -> None:
    x = np.array([[0.2 + 1e-9, 0.2 + 2e-9, 0.2 + 1.5e-9, 0.2 + 1.7e-9, 0.2 + 1.2e-9]])
    null = np.array([[0.2]])
    assert compare_means(x, null).p[0] < 0.05
    assert compare_means(x, null, resolution=1e-6).p[0] == 1


def test_unknown_alternative_is_refused() -> None:
    with pytest.raises((InputError, TypeCheckError), match="alternative"):
        compare_means(np.zeros((1, 3)), np.zeros((1, 3)), "less")


def test_examples_that_an_exact_test_takes() -> None:
    assert examples_needed(1024, "greater") == 15
    assert 2.0**-15 <= 0.05 / 1024 < 2.0**-14
    assert examples_needed(1024, "two-sided") == 16
    assert examples_needed(12, "greater") == 8


@given(arrays(np.float64, (3, 5), elements=st.floats(0, 1)))
def test_benjamini_hochberg_by_its_definition(p: np.ndarray) -> None:
    ours = benjamini_hochberg(p)
    order = np.sort(p.ravel())
    slow = [min(min(15 / (j + 1) * order[j] for j in range(i, 15)), 1) for i in range(15)]
    np.testing.assert_allclose(np.sort(ours.ravel()), slow)
    assert (ours >= p - 1e-12).all()


def test_benjamini_hochberg_leaves_nan_out_of_the_count() -> None:
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.01, NAN, 0.04])), [0.02, NAN, 0.04])
    assert np.isnan(benjamini_hochberg(np.array([NAN]))).all()


@given(few_ranks, few_ranks)
def test_rank_correlation_is_that_of_the_ranks(a: np.ndarray, b: np.ndarray) -> None:
    ours = rank_correlation(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(ours)
    else:
        ranks = (stats.rankdata(side) for side in (a, b))
        np.testing.assert_allclose(ours, np.corrcoef(*ranks)[0, 1], atol=1e-12)


def test_rank_correlation_skips_missing_heads() -> None:
    there = rank_correlation(np.array([1.0, 2.0, 3.0, NAN]), np.array([5.0, 7.0, 9.0, 0.0]))
    assert there == pytest.approx(1.0)
    assert np.isnan(rank_correlation(np.array([1.0, NAN]), np.array([NAN, 2.0])))


def test_top_order_breaks_ties_low_and_never_returns_nan() -> None:
    x = np.array([[1.0, NAN], [3.0, 1.0]])
    assert top_order(x, 10).tolist() == [2, 0, 3]
    with pytest.raises(InputError, match="0 at least"):
        top_order(x, -1)


def test_overlap_by_hand() -> None:
    a, b = np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 1.0, 3.0, 2.0])
    assert top_k_overlap(a, b, 2) == pytest.approx(1 / 3)
    assert top_k_overlap(a, a, 3) == 1
    assert np.isnan(top_k_overlap(np.array([NAN]), np.array([NAN]), 1))


def test_intervals_of_symmetric_values_are_students() -> None:
    x = np.array([[-3.0, -1.0, 0.0, 1.0, 3.0]])
    low, high = mean_interval(x, 0.9)
    theirs = stats.ttest_1samp(x[0], 0).confidence_interval(0.9)
    np.testing.assert_allclose([low[0], high[0]], theirs)
    again = interval_of_sem(*mean_and_sem(x), 0.9)
    np.testing.assert_allclose([again[0][0], again[1][0]], theirs)


def test_intervals_of_skewed_values_reach_farther_to_the_tail() -> None:
    x = np.array([[0.0, 0.1, 0.1, 0.2, 0.3, 2.0]])
    student = stats.ttest_1samp(x[0], 0).confidence_interval()
    low, high = mean_interval(x)
    assert low[0] == pytest.approx(student.low)
    assert high[0] > student.high
    mirrored = mean_interval(-x)
    assert mirrored[0][0] == pytest.approx(-high[0])


def test_intervals_keep_to_the_bounds_and_shares_are_exact() -> None:
    x = np.array([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 8, [0.9, 1.0, *[0.95] * 6]])
    low, high = mean_interval(x, bounds=(0.0, 1.0))
    for head, hits in enumerate((1, 0)):
        exact = stats.binomtest(hits, 8).proportion_ci(method="exact")
        np.testing.assert_allclose([low[head], high[head]], exact, atol=1e-12)
    assert 0.9 < low[2] < high[2] <= 1
    assert mean_interval(x)[1][1] == 0  # without bounds there is nothing to tell from 0


def test_intervals_with_missing_examples() -> None:
    x = np.array([[[1.0, NAN, 3.0], [1.0, NAN, NAN], [2.0, 2.0, 2.0]]])
    low, high = mean_interval(x, bounds=(0.0, None))
    assert low[0, 0] == 0 < 3 < high[0, 0]
    assert np.isnan([low[0, 1], high[0, 1]]).all()
    assert low[0, 2] == high[0, 2] == 2
    for level in (0.0, 1.0):
        with pytest.raises(InputError, match="level"):
            mean_interval(x, level)


def test_welch_interval_agrees_with_scipy() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(0.3, 1, 9), rng.normal(0, 2, 5)
    theirs = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    ours = welch_interval(*(mean_and_sem(side[None]) for side in (x, y)))
    np.testing.assert_allclose([ours[0][0], ours[1][0]], theirs)


# What the tests and intervals promise, in simulation. 8,000 heads: a rate of 5% is known to
# within .5% (two standard errors).

HEADS = 8_000


def rate(p: np.ndarray) -> float:
    """Share of heads with p < .05; a missing p-value is none."""
    return float((np.nan_to_num(p, nan=1.0) < 0.05).mean())


def two_controls(kind: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Values and a paired control of one law, with examples that differ in level."""
    shape = (HEADS, n)
    if kind == "normal":
        level = rng.normal(0, 2, shape)
        return level + rng.normal(size=shape), level + rng.normal(size=shape)
    if kind == "skewed":
        level = rng.exponential(size=shape)
        return level + rng.exponential(size=shape), level + rng.exponential(size=shape)
    chance = {"binary": 0.25, "rare": 0.03}.get(kind)
    if chance is not None:
        first, second = ((rng.random(shape) < chance).astype(float) for _ in range(2))
        return first, second
    if kind == "tied":
        first, second = (rng.binomial(5, 0.2, shape) / 5 for _ in range(2))
        return first, second
    return np.full(shape, 0.3), np.full(shape, 0.3)


@pytest.mark.parametrize("n", [2, 5, 12, 16, 30, 100])
@pytest.mark.parametrize("kind", ["normal", "skewed", "binary", "rare", "tied", "constant"])
def test_paired_tests_hold_their_level(kind: str, n: int) -> None:
    x, y = two_controls(kind, n, np.random.default_rng(n))
    for alternative in ("greater", "two-sided"):
        found = rate(compare_means(x, y, alternative, PAIRED).p)
        assert found < 0.058
        if kind == "normal":
            assert found > 0.042
        if kind == "skewed" and n >= 12:
            assert found > 0.03


@pytest.mark.parametrize("n", [2, 4, 8, 16, 30])
@pytest.mark.parametrize("kind", ["normal", "skewed", "binary", "rare", "tied", "constant"])
def test_independent_tests_hold_their_level(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = two_controls(kind, n, rng)[0], two_controls(kind, n + 2, rng)[1]
    for alternative in ("greater", "two-sided"):
        found = rate(compare_means(x, y, alternative).p)
        assert found < 0.058
        if kind == "normal" and n > 2:
            assert found > 0.04


@pytest.mark.parametrize("n", [2, 5, 16, 30, 300])
def test_tests_against_a_chance_hold_their_level(n: int) -> None:
    rng = np.random.default_rng(n)
    for chance in (0.05, 0.25, 0.5, 0.8):
        hits = (rng.random((2000, n)) < chance).astype(float)
        for alternative in ("greater", "two-sided"):
            assert rate(compare_means(hits, np.full((2000, 1), chance), alternative).p) < 0.06


def test_clustered_tests_hold_their_level() -> None:
    rng = np.random.default_rng(0)
    for sizes in ([3] * 10, [1, 2, 3, 4, 5, 6] * 3):
        labels = tuple(np.repeat(np.arange(len(sizes)), sizes).tolist())
        shared = rng.normal(size=(HEADS, len(sizes)))[:, labels]
        x = shared + 0.3 * rng.normal(size=(HEADS, len(labels)))
        null = np.zeros((HEADS, 1))
        found = rate(compare_means(x, null, "two-sided", Design(clusters=labels)).p)
        assert 0.035 < found < 0.066
        assert rate(compare_means(x, null, "two-sided").p) > 0.2  # as if they were independent
        low, high = mean_interval(x, clusters=labels)
        assert ((low < 0) & (high > 0)).mean() > 0.94


MEANS = {"normal": 0.0, "skewed": 2.0, "binary": 0.25, "rare": 0.03, "tied": 0.2, "constant": 0.3}
DESIGNS = ("independent", "paired", "exact", "paired clusters", "independent clusters")


@cache
def under_a_null(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """1,024 heads without an effect and their controls; the same for every design."""
    x, y = (side[:1024].copy() for side in two_controls(kind, n, np.random.default_rng(n)))
    return x, y


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("n", [2, 4, 12, 16, 30, 300])
@pytest.mark.parametrize("kind", MEANS)
def test_benjamini_hochberg_names_hardly_any_head_under_a_null(
    kind: str, n: int, design: str
) -> None:
    x, y = under_a_null(kind, n)
    told = Design(paired=design.startswith("paired"))
    if design == "exact":
        y = np.full((1024, 1), MEANS[kind])
    if design.endswith("clusters"):  # three prompts say the same
        x, y = np.repeat(x, 3, 1), np.repeat(y, 3, 1)
        labels = tuple(np.repeat(np.arange(n), 3).tolist())
        told = Design(told.paired, labels, None if told.paired else labels)
    # Of skewed values against a known mean t is liberal in the short tail: 3 heads of 1,024.
    most = 0.005 if (kind, design) == ("skewed", "exact") else 0.002
    for alternative in ("greater", "two-sided"):
        p = compare_means(x, y, alternative, told).p
        assert (benjamini_hochberg(p) < 0.05).mean() <= most


LAWS = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "share": (lambda rng, shape: rng.beta(1, 9, shape), 0.1),
    "rare": (lambda rng, shape: (rng.random(shape) < 0.1).astype(float), 0.1),
}


@pytest.mark.parametrize("n", [8, 12, 16, 30, 32])
@pytest.mark.parametrize("law", LAWS)
def test_intervals_cover_what_they_say(law: str, n: int) -> None:
    draw, mean = LAWS[law]
    x = draw(np.random.default_rng(n), (HEADS, n))
    low, high = mean_interval(x, bounds=(0.0, 1.0) if law in ("share", "rare") else (None, None))
    assert ((low <= mean) & (mean <= high)).mean() >= 0.94


@pytest.mark.parametrize("kind", ["continuous", "binary", "constant"])
@pytest.mark.parametrize("n", [16, 30])
def test_one_true_head_among_1024_is_named(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    if kind == "continuous":
        x, y = rng.beta(1, 30, (2, 1024, n))
        x[500] = rng.beta(8, 4, n)
    elif kind == "binary":
        x, y = (rng.random((2, 1024, n)) < 0.02).astype(float)
        x[500], y[500] = 1.0, 0.0
    else:
        x, y = np.full((2, 1024, n), 0.1)
        x[500] = 0.9
    for alternative in ("greater", "two-sided"):
        named = benjamini_hochberg(compare_means(x, y, alternative, PAIRED).p) < 0.05
        assert named[500]
        assert named.sum() == 1


def test_twelve_texts_name_one_continuous_head_among_1024() -> None:
    rng = np.random.default_rng(0)
    x, flat = rng.beta(1, 30, (1024, 12)), rng.uniform(0.01, 0.02, (1024, 12))
    x[7] = rng.beta(8, 4, 12)
    assert (benjamini_hochberg(compare_means(x, flat, design=PAIRED).p) < 0.05)[7]
