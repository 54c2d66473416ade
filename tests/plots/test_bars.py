import numpy as np
import pytest

from headscope import plots
from headscope.table import HeadScores
from tests.table.helpers import scores


def test_bars_are_the_best_heads_in_order() -> None:
    bar = plots.ranking(scores(), 3).data[0]
    assert list(bar.x) == ["L0H0", "L1H1", "L1H0"]
    np.testing.assert_allclose(bar.y, [0.9, 0.8, 0.2])


def test_error_bars_are_the_interval() -> None:
    one = scores(n=12)
    bar = plots.ranking(one, 1).data[0]
    low, high = one.interval(0.95)
    assert bar.error_y.array[0] == pytest.approx(high[0, 0] - one.mean[0, 0])
    assert bar.error_y.arrayminus[0] == pytest.approx(one.mean[0, 0] - low[0, 0])


def test_without_examples_they_are_standard_errors() -> None:
    mean, sem = np.array([[0.5, 0.4]]), np.array([[0.1, 0.2]])
    one = HeadScores.from_summary("x", mean, kv_heads=1, known={"sem": sem})
    assert plots.ranking(one).data[0].error_y.array == pytest.approx([0.196, 0.392], abs=1e-4)
    n = np.array([[16, 16]])
    known = HeadScores.from_summary("x", mean, kv_heads=1, n=n, known={"sem": sem})
    drawn = plots.ranking(known).data[0].error_y.array
    assert drawn == pytest.approx([0.21314, 0.42629], abs=1e-4)  # t with 15 degrees of freedom


def test_colour_tells_significance_and_the_band_the_null() -> None:
    figure = plots.ranking(scores(), 4)
    colours = figure.data[0].marker.color
    assert colours[0] == colours[1] != colours[3]
    assert figure.layout.shapes[0].y0 == pytest.approx(0.1)
    assert "null" in figure.layout.title.subtitle.text


def test_without_a_control_there_is_no_band() -> None:
    figure = plots.ranking(scores(control_per_example=None))
    assert not figure.layout.shapes
    assert "null" not in figure.layout.title.subtitle.text


def test_signed_scores_rank_by_size() -> None:
    one = scores(means=((0.1, -0.9), (0.5, -0.2)), bounds=(None, None))
    assert list(plots.ranking(one, 2).data[0].x) == ["L0H1", "L1H0"]
