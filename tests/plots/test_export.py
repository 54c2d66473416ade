import builtins
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from headscope import plots
from headscope.errors import InputError
from headscope.plots.export import draw
from tests.table.helpers import model_table, scores


class Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_html_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    plots.save(plots.heatmap(scores()), tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    parser = Addresses()
    parser.feed(page)
    assert parser.found == []
    assert len(page) > 1_000_000


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_figure_is_the_same_bytes(tmp_path: Path, kind: str) -> None:
    for name in "ab":
        plots.save(plots.ranking(scores()), tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_drawn_heatmap_has_the_cells_colours_and_direction() -> None:
    one = model_table()["effect"]
    figure = plots.heatmap(one)
    area, bar = draw(figure).axes
    mesh = area.collections[0]
    np.testing.assert_allclose(mesh.get_array().filled(np.nan), one.mean, rtol=1e-6)
    assert mesh.get_clim() == (figure.data[0].zmin, figure.data[0].zmax)
    assert area.get_ylim() == (3.5, -0.5)
    assert (area.get_xlabel(), area.get_ylabel(), bar.get_ylabel()) == ("head", "layer", "logits")


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (3, 1), (1, 1), (2, 3)])
def test_every_cell_of_a_drawn_heatmap_is_a_unit_wide_and_high(rows: int, columns: int) -> None:
    values = np.arange(rows * columns, dtype=float).reshape(rows, columns)
    figure = go.Figure(go.Heatmap(z=values, x=[*"abc"[:columns]], y=[*"rst"[:rows]]))
    corners = draw(figure).axes[0].collections[0].get_coordinates()
    assert corners.shape == (rows + 1, columns + 1, 2)
    np.testing.assert_allclose(corners[0, :, 0], np.arange(columns + 1) - 0.5)
    np.testing.assert_allclose(corners[:, 0, 1], np.arange(rows + 1) - 0.5)


def test_drawn_bars_points_and_lines() -> None:
    bars = draw(plots.ranking(scores(), 3)).axes[0]
    assert [round(bar.get_height(), 3) for bar in bars.patches[:3]] == [0.9, 0.8, 0.2]
    points = draw(plots.scatter(scores("a"), scores("b"))).axes[0]
    assert len(points.collections[0].get_offsets()) == 4
    line = go.Figure(go.Scatter(x=[1, 10], y=[3, 4], mode="lines")).update_xaxes(type="log")
    drawn = draw(line).axes[0]
    assert drawn.lines[0].get_ydata().tolist() == [3, 4]
    assert drawn.get_xscale() == "log"


def test_every_picture_of_the_package_can_be_drawn(tmp_path: Path) -> None:
    table = model_table()
    for theme in ("light", "dark"):
        for figure in (
            plots.heatmaps(table, theme=theme),
            plots.ranking(table["effect"], theme=theme),
            plots.scatter(table["effect"], table["induction"], theme=theme),
            plots.attention_pattern(np.eye(3), ["<b>", "$a_b$", "\\n"], theme=theme),
        ):
            plots.save(figure, tmp_path / "x.png")
            assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_dollar_is_no_formula_and_an_entity_is_read() -> None:
    drawn = draw(plots.heatmap(scores("<b> $x_1$ & more")))
    texts = [text.get_text() for text in drawn.texts]
    assert texts[0] == r"<b> \$x_1\$ & more"


def test_unknown_endings_and_traces(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.html, \.png"):
        plots.save(plots.heatmap(scores()), tmp_path / "x.gif")
    with pytest.raises(InputError, match="pie"):
        plots.save(go.Figure(go.Pie(values=[1])), tmp_path / "x.png")


def test_matplotlib_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"headscope\[paper\]"):
        plots.save(plots.heatmap(scores()), tmp_path / "x.png")


def test_importing_plots_loads_neither_torch_nor_matplotlib() -> None:
    code = "import sys, headscope.plots; print({'torch', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_pictures_below_attention_are_drawn_where_they_lie() -> None:
    """A picture of four colours, a map of 2 x 4 cells over it, and a frame around one of them."""
    image = np.zeros((8, 16, 3), np.uint8)
    image[:4, :8, 0] = 255
    image[4:, 8:, 2] = 255
    weights = np.arange(8.0).reshape(2, 4)
    figure = plots.image_overlay(image, weights, boxes=[(0.25, 0.5, 0.5, 1.0)], opacity=0.5)
    area = draw(figure).axes[0]
    (mesh,) = area.collections
    corners = mesh.get_coordinates()
    assert corners[0, 0].tolist() == [0.0, 0.0]
    assert corners[-1, -1].tolist() == [4.0, 2.0]
    assert mesh.get_alpha() == 0.5
    (shown,) = area.images
    assert shown.get_extent() == [0, 4, 2, 0]
    assert (shown.get_array()[0, 0, 0], shown.get_array()[-1, -1, 2]) == (1.0, 1.0)
    frames = [patch for patch in area.patches if not patch.get_fill()]
    assert [frame.get_bbox().bounds for frame in frames] == [(1.0, 1.0, 1.0, 1.0)]
    assert not area.xaxis.get_visible()
