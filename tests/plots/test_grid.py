import numpy as np
import plotly.io as pio
import pytest

from headscope import plots
from tests.table.helpers import NAN, model_table, scores


def test_cells_hold_the_means_with_layer_0_on_top() -> None:
    one = scores()
    figure = plots.heatmap(one)
    np.testing.assert_allclose(figure.data[0].z, one.mean, rtol=1e-6)
    top, bottom = figure.layout.yaxis.range[::-1]
    assert top < bottom
    assert figure.layout.yaxis.title.text == "layer"
    assert figure.layout.xaxis.title.text == "head"


def test_colours_span_the_bounds_so_that_pictures_compare() -> None:
    trace = plots.heatmap(scores(means=((0.01, 0.02),))).data[0]
    assert (trace.zmin, trace.zmax) == (0, 1)
    assert plots.heatmap(scores(), limits=(0.2, 0.4)).data[0].zmax == 0.4


def test_a_signed_score_is_coloured_about_zero() -> None:
    figure = plots.heatmap(scores(means=((-3.0, 1.0),), bounds=(None, None)))
    assert figure.data[0].zmin == -figure.data[0].zmax == pytest.approx(-3.0)
    assert figure.data[0].colorscale != plots.heatmap(scores()).data[0].colorscale


def test_hover_tells_what_is_known_and_nothing_else() -> None:
    template = plots.heatmap(scores(kv_heads=1)).data[0].hovertemplate
    for said in ("L%{y}H%{x}", "KV head", "standard error", "null", "p, adjusted"):
        assert said in template
    assert "null" not in plots.heatmap(scores(control_per_example=None)).data[0].hovertemplate


def test_kv_head_of_each_cell() -> None:
    figure = plots.heatmap(model_table()["induction"])
    assert figure.data[0].customdata[0, :, 0].tolist() == [0, 0, 1, 1]


def test_missing_cells_are_told() -> None:
    figure = plots.heatmap(scores(means=((0.5, NAN),)))
    assert "grey: no value" in figure.layout.title.subtitle.text
    assert "grey" not in plots.heatmap(scores()).layout.title.subtitle.text


def test_only_missing_cells_still_draw() -> None:
    assert plots.heatmap(scores(means=((NAN, NAN),))).data[0].zmax > 0


@pytest.mark.parametrize("name", ["<b>x</b>", "<a href='http://x'>y</a>", "%{z}", "a\u202eb"])
def test_names_are_text(name: str) -> None:
    title = plots.heatmap(scores(name, unit=name)).layout.title.text
    assert "<" not in title
    assert "%{" not in title
    assert "\u202e" not in title


def test_several_side_by_side() -> None:
    table = model_table()
    figure = plots.heatmaps(table, ["induction", "effect"])
    assert [note.text for note in figure.layout.annotations] == ["induction", "effect (logits)"]
    np.testing.assert_allclose(figure.data[1].z[0], table["effect"].mean[0], rtol=1e-6)
    assert len(plots.heatmap(table).data) == 4


def test_themes_differ_and_the_global_template_stays() -> None:
    before = pio.templates.default
    light, dark = plots.heatmap(scores()), plots.heatmap(scores(), theme="dark")
    assert light.layout.paper_bgcolor != dark.layout.paper_bgcolor
    assert pio.templates.default == before


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 8), (80, 64)])
def test_any_size_fits_a_screen(layers: int, heads: int) -> None:
    figure = plots.heatmap(scores(means=np.full((layers, heads), 0.5)))
    assert 200 <= figure.layout.height <= 1000
    assert 300 <= figure.layout.width <= 1000
