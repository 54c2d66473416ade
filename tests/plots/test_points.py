import pytest

from headscope import plots
from headscope.errors import InputError
from tests.table.helpers import NAN, scores


def test_every_head_that_both_scores_have_is_a_point() -> None:
    a = scores("a", means=((0.1, NAN), (0.3, 0.4)))
    b = scores("b", means=((0.5, 0.6), (0.7, 0.8)), unit="nats")
    figure = plots.scatter(a, b)
    points = figure.data[0]
    assert list(points.x) == pytest.approx([0.1, 0.3, 0.4])
    assert list(points.y) == pytest.approx([0.5, 0.7, 0.8])
    assert list(points.customdata) == ["L0H0", "L1H0", "L1H1"]
    assert list(points.marker.color) == [0, 1, 1]
    assert figure.layout.yaxis.title.text == "b (nats)"
    assert "correlation 1.00" in figure.layout.title.subtitle.text


def test_best_heads_carry_names_and_close_ones_do_not_collide() -> None:
    a = scores("a", means=((0.9, 0.9001), (0.9, 0.1)))
    points = plots.scatter(a, a, named=3).data[0]
    named = [(text, place) for text, place in zip(points.text, points.textposition, strict=True)]
    shown = [pair for pair in named if pair[0]]
    assert [place for _, place in shown] == ["top center", "bottom center"]


def test_two_models_do_not_mix() -> None:
    with pytest.raises(InputError, match="one model"):
        plots.scatter(scores("a"), scores("b", means=((0.1, 0.2),)))
