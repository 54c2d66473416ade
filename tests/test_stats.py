"""Statistics against scipy, hand-computed cases and their own claims."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import TypeCheckError
from scipy import stats as scipy_stats

from headscope.errors import InputError
from headscope.stats import (
    benjamini_hochberg,
    bootstrap_interval,
    mean_and_sem,
    rank_correlation,
    top_k_overlap,
    top_order,
    welch_test,
)

NAN = float("nan")
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
    np.testing.assert_allclose(moments.sem, scipy_stats.sem(x, axis=-1), atol=1e-12)


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_welch_agrees_with_scipy(alternative: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 1, (4, 9)), rng.normal(0, 2, (4, 5))
    x[0, :3] = NAN
    ours = welch_test(x, y, alternative)
    theirs = scipy_stats.ttest_ind(
        x, y, axis=-1, equal_var=False, alternative=alternative, nan_policy="omit"
    )
    np.testing.assert_allclose(ours.p, np.asarray(theirs.pvalue), rtol=1e-10)


def test_an_exact_null_is_the_one_sample_test() -> None:
    x = np.random.default_rng(1).normal(0.3, 1, (4, 9))
    ours = welch_test(x, np.full((4, 1), 0.1))
    theirs = scipy_stats.ttest_1samp(x, 0.1, axis=-1, alternative="greater")
    np.testing.assert_allclose(ours.p, theirs.pvalue, rtol=1e-10)
    g = (x.mean(-1) - 0.1) / x.std(-1, ddof=1) * (1 - 3 / (4 * 8 - 1))
    np.testing.assert_allclose(ours.effect, g)


def test_a_constant_control_adds_no_variance() -> None:
    x = np.random.default_rng(1).normal(0.3, 1, (4, 9))
    constant = welch_test(x, np.full((4, 5), 0.1))
    np.testing.assert_allclose(constant.p, welch_test(x, np.full((4, 1), 0.1)).p)


def test_hedges_g_by_hand() -> None:
    # means 3 and 1, variances 1 and 1, df 4: g = 2 * (1 - 3 / 15)
    effect = welch_test(np.array([[2.0, 3.0, 4.0]]), np.array([[0.0, 1.0, 2.0]])).effect
    np.testing.assert_allclose(effect, [1.6])


@pytest.mark.parametrize(
    ("value", "greater", "two_sided", "effect"),
    [(1.0, 0.0, 0.0, np.inf), (0.2, 0.5, 1.0, 0.0), (0.0, 1.0, 0.0, -np.inf)],
)
@pytest.mark.parametrize("columns", [1, 4])
def test_without_variance_p_is_the_limit(
    value: float, greater: float, two_sided: float, effect: float, columns: int
) -> None:
    x, null = np.full((1, 5), value), np.full((1, columns), 0.2)
    assert welch_test(x, null, "greater").p[0] == greater
    assert welch_test(x, null, "two-sided").p[0] == two_sided
    assert welch_test(x, null).effect[0] == effect


def test_one_example_has_no_p() -> None:
    one, many = np.array([[1.0, NAN, NAN]]), np.array([[1.0, 2.0, 3.0]])
    for result in (welch_test(one, many), welch_test(many, one)):
        assert np.isnan(result.p[0])
        assert np.isnan(result.effect[0])
    assert np.isnan(welch_test(many, np.array([[NAN]])).p[0])


def test_rounding_is_no_difference() -> None:
    x = np.array([[0.2 + 1e-9, 0.2 + 2e-9, 0.2 + 1.5e-9]])
    null = np.array([[0.2]])
    assert welch_test(x, null).p[0] < 0.05
    assert welch_test(x, null, resolution=1e-6).p[0] == 0.5


def test_unknown_alternative_is_refused() -> None:
    with pytest.raises((InputError, TypeCheckError), match="alternative"):
        welch_test(np.zeros((1, 3)), np.zeros((1, 3)), "less")


@given(arrays(np.float64, (3, 5), elements=st.floats(0, 1)))
def test_benjamini_hochberg_agrees_with_scipy(p: np.ndarray) -> None:
    ours = benjamini_hochberg(p)
    np.testing.assert_allclose(ours.ravel(), scipy_stats.false_discovery_control(p.ravel()))
    assert (ours >= p).all()


def test_benjamini_hochberg_leaves_nan_out_of_the_count() -> None:
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.01, NAN, 0.04])), [0.02, NAN, 0.04])
    assert np.isnan(benjamini_hochberg(np.array([NAN]))).all()


@given(few_ranks, few_ranks)
def test_rank_correlation_agrees_with_scipy(a: np.ndarray, b: np.ndarray) -> None:
    ours = rank_correlation(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(ours)
    else:
        np.testing.assert_allclose(ours, scipy_stats.spearmanr(a, b).statistic, atol=1e-12)


def test_rank_correlation_skips_missing_heads() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 3.0, NAN]), np.array([5.0, 7.0, 9.0, 0.0])) == 1.0
    assert np.isnan(rank_correlation(np.array([1.0, NAN]), np.array([NAN, 2.0])))


def test_top_order_breaks_ties_low_and_never_returns_nan() -> None:
    x = np.array([[1.0, NAN], [3.0, 1.0]])
    assert top_order(x, 10).tolist() == [2, 0, 3]
    with pytest.raises(InputError, match="negative"):
        top_order(x, -1)


def test_overlap_by_hand() -> None:
    a, b = np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 1.0, 3.0, 2.0])
    assert top_k_overlap(a, b, 2) == pytest.approx(1 / 3)
    assert top_k_overlap(a, a, 3) == 1
    assert np.isnan(top_k_overlap(np.array([NAN]), np.array([NAN]), 1))


def test_bootstrap_is_reproducible_and_covers() -> None:
    x = np.random.default_rng(2).normal(1.0, 1.0, (1, 200, 40))
    low, high = bootstrap_interval(x, 0.95, 1000, seed=3)
    again = bootstrap_interval(x, 0.95, 1000, seed=3)
    np.testing.assert_array_equal(low, again[0])
    assert not np.array_equal(low, bootstrap_interval(x, 0.95, 1000, seed=4)[0])
    assert 0.88 < ((low < 1) & (high > 1)).mean() < 0.98
    width = 2 * 1.96 * mean_and_sem(x).sem
    np.testing.assert_allclose((high - low) / width, 1, atol=0.15)


def test_bootstrap_with_missing_examples() -> None:
    x = np.array([[[1.0, NAN, 3.0], [1.0, NAN, NAN], [2.0, 2.0, 2.0]]])
    low, high = bootstrap_interval(x)
    assert 1 <= low[0, 0] <= high[0, 0] <= 3
    assert np.isnan(low[0, 1])
    assert low[0, 2] == high[0, 2] == 2


@pytest.mark.parametrize(("level", "resamples"), [(0.0, 10), (1.0, 10), (0.9, 0)])
def test_bootstrap_refuses_senseless_settings(level: float, resamples: int) -> None:
    with pytest.raises(InputError):
        bootstrap_interval(np.zeros((1, 1, 3)), level, resamples)
