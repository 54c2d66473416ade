"""Pictures of what weights say: spectra, eigenvalues, composition."""

import numpy as np
import pytest

from headscope import plots
from headscope.base.specs import ScoreSpec
from headscope.errors import InputError
from headscope.plots.export import draw
from headscope.table import HeadEigenvalues, HeadSpectra, PairScores, Provenance
from tests.table.helpers import scores

MODEL = Provenance(model="<b>toy</b>")


def spectra_of(layers: int = 3, heads: int = 2, rank: int = 4) -> HeadSpectra:
    values = np.tile(np.array([4.0, 2.0, 1.0, 0.5])[:rank], (layers, heads, 1))
    values[1] = np.nan  # a layer without attention
    values[2, 1] *= 3
    scale = np.full((layers, heads), 2.0)
    return HeadSpectra("OV", values, scale, np.full(rank, 0.4), np.full(rank, 1.1), "draws", MODEL)


def eigenvalues_of() -> HeadEigenvalues:
    values = np.array([[[2.0, 1j, -1j], [-3.0, -1.0, 0.0]]])
    return HeadEigenvalues("OV", values, "token to logit", MODEL)


def pairs_of(mode: str = "K", layers: int = 3, heads: int = 2, seed: int = 0) -> PairScores:
    values = np.random.default_rng(seed).uniform(0.1, 0.5, (layers, heads, layers, heads))
    values[0, 1, 2, 0] = 0.9
    return PairScores(
        ScoreSpec(f"{mode}_composition", unit="share of norm"), values, provenance=MODEL
    )


def test_spectra_are_in_units_of_chance_one_line_per_head() -> None:
    figure = plots.spectra(spectra_of())
    lines = [one for one in figure.data if one.customdata is not None]
    assert [one.hovertemplate[:5] for one in lines] == ["<b>L0", "<b>L2"]  # layer 1 has none
    np.testing.assert_allclose(lines[0].y[:5], [2, 1, 0.5, 0.25, np.nan])
    np.testing.assert_allclose(lines[1].y[5:9], [6, 3, 1.5, 0.75])
    assert list(lines[1].customdata) == [0] * 5 + [1] * 5
    band = figure.data[0]
    assert (max(band.y), min(band.y)) == (1.1, 0.4)
    assert figure.data[-1].text[0] == "L2H1"


def test_spectra_of_chosen_heads_leave_the_others_grey() -> None:
    figure = plots.spectra(spectra_of(), heads=["L0H1"])
    widths = {one.hovertemplate[3:5]: set() for one in figure.data if one.customdata is not None}
    for one in figure.data:
        if one.customdata is not None:
            widths[one.hovertemplate[3:5]].add(one.line.width)
    assert len(widths["L0"]) == 2
    assert len(widths["L2"]) == 1
    assert figure.data[-1].text == ("L0H1",)


def test_a_head_of_zeros_has_no_line_and_no_error() -> None:
    zero = HeadSpectra("OV", np.zeros((1, 1, 2)), np.zeros((1, 1)), np.ones(2), np.ones(2))
    figure = plots.spectra(zero)
    assert not [one for one in figure.data if one.customdata is not None]


def test_eigenvalues_lie_in_the_unit_circle_by_head() -> None:
    figure = plots.eigenvalues(eigenvalues_of())
    points = figure.data[1]
    np.testing.assert_allclose(points.x, [1, 0, 0, -1, -1 / 3, 0], atol=1e-7)
    np.testing.assert_allclose(points.y, [0, 0.5, -0.5, 0, 0, 0], atol=1e-7)
    assert points.customdata[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    one = plots.eigenvalues(eigenvalues_of(), ["L0H1"])
    assert "ratio -1.00" in one.layout.title.subtitle.text
    for heads, said in (([], "no heads"), (["L4H0"], "no head L4H0")):
        with pytest.raises(InputError, match=said):
            plots.eigenvalues(eigenvalues_of(), heads)


def test_of_many_eigenvalues_the_heads_with_the_farthest_ratio_are_kept() -> None:
    values = np.full((4, 60, 64), 1j)
    values[2, 7] = 1.0
    figure = plots.eigenvalues(HeadEigenvalues("QK", values))
    assert len(figure.data[1].x) <= 10_000
    assert [2, 7] in figure.data[1].customdata.tolist()
    assert "156 of 240 heads" in figure.layout.title.subtitle.text


def test_the_graph_draws_the_strongest_pairs_and_names_their_heads() -> None:
    figure = plots.composition_graph(pairs_of(), most=3)
    strongest = pairs_of().top(3)
    heads = figure.data[-1]
    assert {one for one in heads.text if one} == {str(h) for a, b, _ in strongest for h in (a, b)}
    hover = figure.data[-2]
    assert hover.text[0] == "L0H1 -K-> L2H0"
    np.testing.assert_allclose(hover.customdata, [value for *_, value in strongest])
    widths = [one.line.width for one in figure.data if one.mode == "lines" and len(one.x) > 1]
    assert max(widths) > min(widths)
    assert "3 strongest of 12 pairs" in figure.layout.title.subtitle.text


def test_the_graph_keeps_its_threshold_and_curves_start_and_end_at_heads() -> None:
    figure = plots.composition_graph(pairs_of(), threshold=0.8)
    (curve,) = [one for one in figure.data if one.mode == "lines" and len(one.x) > 1]
    assert (curve.x[0], curve.y[0]) == (1, 0)
    assert (curve.x[-2], curve.y[-2]) == (0, 2)
    nothing = plots.composition_graph(pairs_of(), threshold=2.0)
    assert not any(nothing.data[-1].text)


def test_several_kinds_have_colours_of_their_own() -> None:
    figure = plots.composition_graph([pairs_of("Q"), pairs_of("V", seed=1)])
    shown = [one for one in figure.data if one.name]
    assert [one.name for one in shown] == ["Q", "V"]
    assert len({one.line.color for one in shown}) == 2
    assert [text.get_text() for text in draw(figure).axes[0].get_legend().texts] == ["Q", "V"]


def test_graphs_of_two_models_are_refused() -> None:
    with pytest.raises(InputError, match="one model"):
        plots.composition_graph([pairs_of(), pairs_of(layers=4)])
    with pytest.raises(InputError, match="one model"):
        plots.composition_graph(pairs_of(), nodes=scores())


def test_heads_are_coloured_by_a_score() -> None:
    means = np.arange(6.0).reshape(3, 2)
    figure = plots.composition_graph(pairs_of(), nodes=scores("rank", means, bounds=(0.0, None)))
    assert list(figure.data[-1].marker.color) == [0, 1, 2, 3, 4, 5]


def test_the_matrix_holds_pairs_that_exist() -> None:
    pairs = pairs_of()
    trace = plots.composition_matrix(pairs).data[0]
    assert trace.x == ("L1H0", "L1H1", "L2H0", "L2H1")
    assert trace.y == ("L0H0", "L0H1", "L1H0", "L1H1")
    np.testing.assert_allclose(trace.z[:2, :2], pairs.values[0, :, 1], rtol=1e-6)
    assert np.isnan(trace.z[2:, :2]).all()


def test_a_large_matrix_keeps_the_largest_of_each_block() -> None:
    values = np.zeros((2, 600, 2, 600))
    values[0, 77, 1, 431] = 0.7
    figure = plots.composition_matrix(PairScores(ScoreSpec("K_composition"), values))
    trace = figure.data[0]
    assert trace.z.shape == (300, 300)
    assert trace.z[38, 215] == np.nanmax(trace.z) == np.float32(0.7)
    assert "2 x 2 pairs" in figure.layout.title.subtitle.text


def test_a_signed_matrix_is_coloured_about_zero() -> None:
    values = pairs_of().values - 0.3
    trace = plots.composition_matrix(PairScores(ScoreSpec("K_composition"), values)).data[0]
    assert trace.zmin == -trace.zmax


def test_all_of_them_can_be_drawn_and_hold_names_as_text() -> None:
    for theme in ("light", "dark"):
        for figure in (
            plots.spectra(spectra_of(), theme=theme),
            plots.eigenvalues(eigenvalues_of(), theme=theme),
            plots.composition_graph(pairs_of(), nodes=None, theme=theme),
            plots.composition_matrix(pairs_of(), theme=theme),
        ):
            assert "<b>toy" not in figure.layout.title.subtitle.text
            assert draw(figure).axes
