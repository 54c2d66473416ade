import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import stats

from headscope.base.statistics import Design
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table import HeadScores
from tests.table.helpers import NAN, scores


def test_numbers_come_from_the_examples() -> None:
    rng = np.random.default_rng(0)
    values, control = rng.random((2, 3, 5)), rng.random((2, 3, 4))
    one = HeadScores.from_examples("x", values, kv_heads=3, control_per_example=control)
    np.testing.assert_allclose(one.mean, values.mean(-1))
    np.testing.assert_allclose(one.sem, values.std(-1, ddof=1) / np.sqrt(5))
    np.testing.assert_allclose(one.null, control.mean(-1))
    welch = stats.ttest_ind(values, control, axis=-1, equal_var=False)
    np.testing.assert_allclose(one.p_value, welch.pvalue)  # no bounds: the sign has a meaning
    adjusted = stats.false_discovery_control(welch.pvalue.ravel())
    np.testing.assert_allclose(one.p_adjusted.ravel(), adjusted)
    pooled = np.sqrt((4 * values.var(-1, ddof=1) + 3 * control.var(-1, ddof=1)) / 7)
    g = (values.mean(-1) - control.mean(-1)) / pooled * (1 - 3 / 27)
    np.testing.assert_allclose(one.effect_size, g)


def test_paired_and_clustered_examples() -> None:
    rng = np.random.default_rng(0)
    values, control = rng.random((2, 3, 6)), rng.random((2, 3, 6))
    design = Design(paired=True, clusters=(0, 0, 1, 1, 2, 2))
    one = HeadScores.from_examples(
        "x", values, kv_heads=3, control_per_example=control, bounds=(0.0, 1.0), design=design
    )
    means = (values - control).reshape(2, 3, 3, 2).mean(-1)
    test = stats.ttest_1samp(means, 0, axis=-1, alternative="greater")
    np.testing.assert_allclose(one.p_value, test.pvalue)
    np.testing.assert_allclose(one.sem, stats.sem(values.reshape(2, 3, 3, 2).mean(-1), axis=-1))


def test_a_head_that_suppresses_is_significant_where_the_sign_has_a_meaning() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.1, (1, 4, 16))
    values[0, 2] -= 3.0
    none = np.zeros((1, 4, 1))
    for facts in ({}, {"threshold": 0.5}, {"bounds": (-9.0, 9.0)}):
        one = HeadScores.from_examples("x", values, kv_heads=1, control_per_example=none, **facts)
        assert one.alternative == "two-sided"
        assert one.significant().tolist() == [[False, False, True, False]]
    far = HeadScores.from_examples("x", values, kv_heads=1, control_per_example=none, threshold=5.0)
    assert not far.significant().any()


def test_too_few_examples_are_said() -> None:
    def of(n: int) -> HeadScores:
        values = np.zeros((2, 512, n))
        values[0, 0] = 1.0
        return HeadScores.from_examples(
            "x", values, kv_heads=1, control_per_example=np.zeros((2, 512, n)), bounds=(0.0, 1.0)
        )

    assert [of(n).examples_needed() for n in (1, 2, 14, 15)] == [15, 15, 15, None]
    assert [bool(of(n).significant()[0, 0]) for n in (2, 14, 15)] == [False, False, True]
    assert scores(means=((0.9, 0.3), (0.2, 0.8))).examples_needed() is None
    assert scores(control_per_example=None).examples_needed() is None


def test_order_of_examples_changes_nothing() -> None:
    values = np.random.default_rng(0).random((2, 3, 5))
    one = HeadScores.from_examples("x", values, kv_heads=3)
    two = HeadScores.from_examples("x", values[..., ::-1].copy(), kv_heads=3)
    np.testing.assert_allclose(one.mean, two.mean)
    np.testing.assert_allclose(one.sem, two.sem)


def test_top_and_bottom_break_ties_low_and_skip_missing() -> None:
    one = scores(means=((0.5, NAN), (0.5, 0.1)), jitter=0)
    assert [head for head, _ in one.top(9)] == [(0, 0), (1, 0), (1, 1)]
    assert [head for head, _ in one.bottom(2)] == [(1, 1), (0, 0)]
    assert isinstance(one.top(1)[0][0], HeadIndex)


@pytest.mark.parametrize("address", ["L1H0", "1.0", (1, 0), HeadIndex(1, 0)])
def test_one_head_by_any_address(address: str | tuple[int, int]) -> None:
    assert scores()[address] == pytest.approx(0.2)


@pytest.mark.parametrize("address", ["L2H0", "L0H2", (-1, 0), "head one"])
def test_a_head_that_is_not_there(address: str | tuple[int, int]) -> None:
    with pytest.raises(InputError):
        scores()[address]


def test_significant_needs_the_threshold_too() -> None:
    assert scores().significant().tolist() == [[True, False], [True, True]]
    assert scores(threshold=0.5).significant().tolist() == [[True, False], [False, True]]
    assert not scores(threshold=0.5, n=1).significant().any()


def test_interval_holds_the_mean() -> None:
    one = scores(n=20)
    low, high = one.interval()
    assert ((low <= one.mean) & (one.mean <= high)).all()
    assert (low < high).all()


def test_without_examples_what_needs_them_is_refused() -> None:
    one = HeadScores.from_summary("x", np.array([[1.0, NAN]]), kv_heads=1)
    assert one.n.tolist() == [[1, 0]]
    assert np.isnan(one.sem).all()
    for ask in (one.interval, lambda: one.per_example, lambda: one.control_per_example):
        with pytest.raises(InputError, match="not kept"):
            ask()


def test_missing_heads_count_as_present_but_absent_layers_do_not() -> None:
    missing = np.array([[0, 7], [0, 0]])
    one = scores(means=((0.5, NAN), (NAN, NAN)), missing=missing)
    assert one.present.tolist() == [[True, True], [False, False]]
    assert list(one.to_pandas()["label"]) == ["L0H0", "L0H1"]


def test_a_missing_head_is_not_a_test() -> None:
    full = scores(means=((0.3, 0.1), (0.2, 0.8)), n=6)
    holed = scores(means=((0.3, NAN), (0.2, 0.8)), n=6)
    assert np.isnan(holed.p_adjusted[0, 1])
    assert holed.p_adjusted[0, 0] < full.p_adjusted[0, 0]


def test_arrays_cannot_be_written_to_and_do_not_alias() -> None:
    values = np.zeros((1, 2, 3))
    one = HeadScores.from_examples("x", values, kv_heads=1)
    values[:] = 5
    assert one.per_example.max() == 0
    with pytest.raises(ValueError, match="read-only"):
        one.mean[0, 0] = 1


@pytest.mark.parametrize(
    ("bounds", "signed"),
    [((0.0, 1.0), False), ((0.0, None), False), ((None, None), True), ((-1.0, 1.0), True)],
)
def test_signed(bounds: tuple[float | None, float | None], signed: bool) -> None:
    assert scores(bounds=bounds).signed == signed


def test_uneven_groups_and_foreign_controls_are_refused() -> None:
    with pytest.raises(InputError, match="evenly"):
        scores(means=((1.0, 2.0, 3.0),), kv_heads=2)
    with pytest.raises((InputError, TypeCheckError), match="control"):
        scores(control_per_example=np.zeros((1, 1, 1)))
