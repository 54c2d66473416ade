"""Figures for papers, measured in the files: width, text, fonts, dots per inch, colours."""

import inspect
import re
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from plotly.colors import sample_colorscale

from headscope import plots
from headscope.base.specs import ScoreSpec
from headscope.errors import InputError
from headscope.plots.export import DPI, WIDTHS, at_width, contrast_ratio, lightness
from headscope.plots.figure import SEQUENTIAL, STYLES
from headscope.table import EffectGrid, Provenance
from tests.table.helpers import model_table, scores

ORIGIN = Provenance(model="toy", probe={"kind": "pairs", "metric": "loss"}, seed=3, control="flat")
RNG = np.random.default_rng(0)


def signed(**facts: Any) -> go.Figure:
    values = np.array([[0.5, -1.0], [2.0, 0.1]])
    made = scores("effect", values, unit="logits", bounds=(None, None), provenance=ORIGIN)
    return plots.heatmap(made, **facts)


def curve() -> go.Figure:
    arms, steps = ("importance", "loss", "random 1", "random 2"), ("0", "2", "4")
    effects = np.cumsum(RNG.uniform(0, 0.3, (4, 3, 8)), 1)
    grid = EffectGrid(
        ScoreSpec("mean ablation", unit="nats"), ("order", "removed"), (arms, steps), effects,
        np.ones(8),
        provenance=ORIGIN,
    )  # fmt: skip
    return plots.curves(grid, controls=arms[2:])


def best() -> go.Figure:
    values = RNG.uniform(0.2, 0.9, (4, 6))
    return plots.ranking(scores("induction", values, n=24, jitter=0.001, provenance=ORIGIN), 12)


FIGURES = {"cells": signed, "curve": curve, "bars": best}


def pdf_of(figure: go.Figure, folder: Path, width: str) -> tuple[bytes, str]:
    """The file, and the drawing commands of its page."""
    plots.save(figure, folder / "x.pdf", width=width)
    made = (folder / "x.pdf").read_bytes()
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", made, re.DOTALL)
    pages = []
    for one in streams:
        try:
            pages.append(zlib.decompress(one))
        except zlib.error:
            continue
    return made, next(page for page in pages if b" Tf" in page).decode("latin-1")


@pytest.mark.parametrize("width", ["column", "text"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_pdf_has_the_width_and_embeds_text_of_eight_points(
    name: str, width: str, tmp_path: Path
) -> None:
    made, page = pdf_of(FIGURES[name](), tmp_path, width)
    box = re.search(rb"/MediaBox \[ ?([^\]]*)\]", made)
    assert box is not None
    left, _, right, top = (float(one) for one in box[1].split())
    assert (right - left) / 72 == pytest.approx({"column": 3.25, "text": 6.75}[width], abs=1e-3)
    assert 1.5 < top / 72 < 10
    sizes = {float(one) for one in re.findall(r"/\S+ ([\d.]+) Tf", page)}
    assert sizes == {8.0}
    # Coordinates in which text is drawn may be turned, but neither shrunk nor stretched.
    number = r"(-?[\d.]+) "
    drawn = re.findall(number * 6 + r"cm\s+BT", page)
    scales = [float(a) * float(d) - float(b) * float(c) for a, b, c, d, *_ in drawn]
    assert scales == pytest.approx([1.0] * len(scales))
    assert len(scales) > 0  # at least the title of the vertical axis, which is turned
    fonts = re.findall(rb"/Type /FontDescriptor", made)
    files = re.findall(rb"/FontFile2 \d+ 0 R", made)
    assert len(fonts) == len(files) > 0
    assert b"/Type3" not in made


@pytest.mark.parametrize("width", ["column", "text"])
def test_a_png_has_300_dots_per_inch_and_the_width(width: str, tmp_path: Path) -> None:
    plots.save(curve(), tmp_path / "x.png", width=width)
    with Image.open(tmp_path / "x.png") as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)  # of the pHYs chunk
        assert image.width == {"column": 975, "text": 2025}[width]


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_leaves_the_page_or_covers_another(name: str) -> None:
    canvas = at_width(FIGURES[name](), "column")
    FigureCanvasAgg(canvas).draw()
    page = canvas.bbox
    hidden = {
        label
        for area in canvas.axes
        for axis in (area.xaxis, area.yaxis)
        for at, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
        if not min(axis.get_view_interval()) <= at <= max(axis.get_view_interval())
    }  # which matplotlib keeps, and does not draw
    texts = [one for one in canvas.findobj(Text) if one.get_text() and one.get_visible()]
    boxes = [one.get_window_extent() for one in texts if one not in hidden]
    assert len(boxes) > 10
    assert all(box.x0 > -1 and box.x1 < page.x1 + 1 for box in boxes)
    assert all(box.y0 > -1 and box.y1 < page.y1 + 1 for box in boxes)
    for area in canvas.axes:
        names = [one for one in area.get_xticklabels() if one.get_text() and one not in hidden]
        for a, b in pairwise(names):
            left, right = a.get_window_extent(), b.get_window_extent()
            turned = abs(np.sin(np.deg2rad(a.get_rotation())))
            apart = (right.x1 - left.x1) * turned  # between the lines of turned text
            assert left.x1 < right.x0 or apart > 8 * canvas.dpi / 72


def test_the_caption_says_n_seed_method_control_and_interval() -> None:
    for figure, said in (
        (signed(), ["n = 4 examples per head", "mean effect", "95% interval", "null"]),
        (curve(), ["n = 8 examples", "mean ablation", "95% interval", "2 random controls"]),
        (best(), ["n = 24 examples per head", "mean induction", "95% intervals", "null"]),
    ):
        caption = " ".join(at_width(figure, "column").texts[-1].get_text().split())
        for one in (*said, "seed: 3", "probe: pairs", "control: flat"):
            assert one in caption


def test_a_diverging_scale_is_centred_at_0_and_cells_below_carry_a_dot() -> None:
    area = at_width(signed(limits=(-0.5, 2.0)), "column").axes[0]
    mesh, dots = area.collections[:2]
    assert mesh.get_clim() == (-2.0, 2.0)
    np.testing.assert_allclose(mesh.cmap(mesh.norm(0.0))[:3], [0xF7 / 255] * 3, atol=0.01)
    assert dots.get_offsets().tolist() == [[1, 0]]
    plain = at_width(plots.heatmap(scores()), "column").axes[0]
    assert plain.collections[0].get_clim() == (0.0, 1.0)
    assert len(plain.collections) == 1


def test_lightness_is_that_of_cie() -> None:
    # Y = 0.2126 for red: L* = 116 * 0.2126 ** (1 / 3) - 16
    assert lightness("#ff0000") == pytest.approx(53.23, abs=0.02)
    assert lightness("#000000") == 0
    assert lightness("#ffffff") == pytest.approx(100)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_sequential_scales_rise_in_lightness_and_diverging_ones_turn_at_the_middle(
    theme: Any,
) -> None:
    def steps(scale: Any) -> np.ndarray:
        colours = sample_colorscale([list(one) for one in scale], np.linspace(0, 1, 41).tolist())
        return np.diff([lightness(one) for one in colours])

    assert (steps(SEQUENTIAL) > 0).all()
    sides = steps(STYLES[theme].diverging) * (1 if theme == "light" else -1)
    assert (sides[:20] > 0).all()
    assert (sides[20:] < 0).all()


def test_a_scale_that_grey_cannot_tell_apart_is_refused(tmp_path: Path) -> None:
    figure = go.Figure(go.Heatmap(z=[[1, 2], [3, 4]], colorscale="Jet"))
    with pytest.raises(InputError, match=r"one lightness.*viridis"):
        plots.save(figure, tmp_path / "x.pdf", width="column")
    assert list(tmp_path.iterdir()) == []


def test_lines_and_bars_are_told_apart_without_colour() -> None:
    area = at_width(curve(), "column").axes[0]
    assert len(area.patches) >= 3  # a band for each of both arms and for the controls
    named = [line for line in area.get_lines() if not line.get_label().startswith("_")]
    assert len({line.get_linestyle() for line in named}) == len(named) == 3
    assert all(contrast_ratio(to_hex(line.get_color()), "#ffffff") >= 3 for line in named)
    # WCAG's own example: #777777 on white has 4.48
    assert contrast_ratio("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    style = STYLES["light"]
    assert contrast_ratio(style.muted, style.paper) < 3  # so it was darkened
    bars = go.Figure(go.Bar(y=[1, 2, 3], marker={"color": [style.accent] * 2 + [style.muted]}))
    canvas = at_width(bars, "column")
    hatches = [bar.get_hatch() for bar in canvas.axes[0].patches[:3]]
    assert hatches[:2] == [None, None]
    assert hatches[2]
    assert "grey bars are hatched" in canvas.texts[-1].get_text()


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    def save(figure: go.Figure, name: str = "x.pdf", **how: Any) -> None:
        inspect.unwrap(plots.save)(figure, tmp_path / name, **how)

    with pytest.raises(InputError, match=r"'page'.*'column' or 'text'"):
        save(signed(), width="page")
    with pytest.raises(InputError, match=r"no printed width"):
        save(signed(), "x.html", width="column")
    with pytest.raises(InputError, match="300 dots per inch"):
        save(signed(), "x.png", width="column", scale=3.0)
    with pytest.raises(InputError, match=r"panels run into each other.*width='text'"):
        save(plots.heatmaps(model_table()), width="column")
    many = go.Figure(go.Bar(x=[f"L{i}H11" for i in range(60)], y=list(range(60))))
    with pytest.raises(InputError, match="60 names of bars do not fit"):
        save(many, width="column")
    words = [["a long sentence"] * 8] * 2
    cells = go.Figure(go.Heatmap(z=np.ones((2, 8)), text=words, texttemplate="%{text}"))
    with pytest.raises(InputError, match="8 x 2 cells"):
        save(cells, width="column")
    assert list(tmp_path.iterdir()) == []
    save(plots.heatmaps(model_table()), width="text")


def test_without_a_width_nothing_changes(tmp_path: Path) -> None:
    plots.save(signed(limits=(-0.5, 2.0)), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width == 2 * signed().layout.width
    assert (WIDTHS, DPI) == ({"column": 3.25, "text": 6.75}, 300)
