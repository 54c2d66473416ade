"""Circuits as pictures: what is drawn where, and what is told."""

import numpy as np
import pytest

import headscope as hs
from headscope.errors import InputError
from headscope.plots.figures import figures
from headscope.table import Circuit, EdgeGraph, Faithfulness, Wiring


def graph(layers: int = 2, heads: int = 2) -> EdgeGraph:
    wiring = Wiring(heads, (False,) * layers)
    drawn = np.random.default_rng(0)
    return EdgeGraph(wiring, "eap", "patch", drawn.standard_normal((len(wiring), 3)))


def test_the_largest_edges_are_drawn_and_told() -> None:
    scores = graph()
    figure = hs.plots.circuit_graph(scores, most=5)
    told = figure.data[-1].text
    assert len(told) == 5
    edge, score = scores.top(1)[0]
    assert told[0] == f"<b>{edge}</b><br>{score:.4g}"
    assert [one.name for one in figure.data if one.name] == [
        "query", "key", "value", "mlp", "output",
    ]  # fmt: skip


def test_wide_is_large_and_the_slider_hides_the_small() -> None:
    wiring = Wiring(1, (False,))
    values = np.zeros((len(wiring), 1))
    values[:2] = [[8.0], [0.1]]
    figure = hs.plots.circuit_graph(EdgeGraph(wiring, "eap", "patch", values))
    lines = {one.line.width: one.meta for one in figure.data if one.meta is not None}
    assert sorted(lines) == [0.6, 5.4]
    assert lines[5.4] > lines[0.6]
    last = figure.layout.sliders[0].steps[-1].args[0]["visible"]
    shown = [one.line.width for one, on in zip(figure.data, last, strict=True) if on and one.meta]
    assert shown == [5.4]


def test_a_circuit_shows_its_own_edges_alone() -> None:
    scores = graph()
    found = Circuit(scores.wiring, scores.chosen(4), scores.mean, 1.0, 1.0, 0.0)
    assert len(hs.plots.circuit_graph(found).data[-1].text) == 4
    bare = Circuit(
        scores.wiring, scores.chosen(4), np.full(len(scores.wiring), np.nan), 1.0, 1.0, 0.0
    )
    assert len(hs.plots.circuit_graph(bare, theme="dark").data[-1].text) == 4
    assert list(figures(found)) == [""]
    assert list(figures(scores)) == ["", "_by_head"]


def test_curves_carry_the_band_of_random_edges() -> None:
    sizes = np.array([0.1, 0.5, 1.0])
    value, control = np.array([0.5, 1.5, 2.0]), np.array([[0.0, 0.2, 2.0], [0.0, 0.6, 2.0]])
    curve = Faithfulness(sizes, np.array([1, 5, 10]), value, control, 2.0, 0.0, "eap", "patch")
    figure = hs.plots.faithfulness_curves({"one": curve, "two": curve})
    band, random, one = figure.data[:3]
    assert list(band.y) == [0.0, 0.1, 1.0, 1.0, 0.3, 0.0]
    assert list(random.y) == pytest.approx([0.0, 0.2, 1.0])
    assert list(one.y) == [0.25, 0.75, 1.0]
    assert list(one.x) == [10.0, 50.0, 100.0]


def test_mistakes_get_a_sentence() -> None:
    with pytest.raises(InputError, match="give 1 or more"):
        hs.plots.circuit_graph(graph(), most=0)
    with pytest.raises(InputError, match="no curve"):
        hs.plots.faithfulness_curves({})
