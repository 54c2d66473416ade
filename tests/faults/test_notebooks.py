"""Figures show wherever a notebook is opened: with plotly or without, trusted or not."""

import base64
import copy
import doctest
import inspect
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from nbclient import NotebookClient

import headscope as hs
from headscope import plots
from headscope.plots import figure as figures
from headscope.plots.figure import Figure, live_html, static_html
from tests.table.helpers import model_table, scores

PLOTLY = "application/vnd.plotly.v1+json"
# Those whose examples need no long run of a model; the next test holds the others.
NAMES = [
    *("attention_pattern", "composition_graph", "composition_matrix", "heatmap", "heatmaps"),
    *("layers", "lens_grid", "ranking", "recall_grid", "scatter", "spectra", "waterfall"),
]
FOLDER = Path(plots.__file__).parent


class Page(HTMLParser):
    """What is on a page that no script touches."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def pixels(png: str) -> tuple[int, int]:
    """Width and height of a PNG in base64, from its header."""
    raw = base64.b64decode(png, validate=True)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.style", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(autouse=True)
def renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What plotly chooses in a kernel of Jupyter, whatever this machine has."""
    monkeypatch.setattr(pio.renderers, "_default_name", "plotly_mimetype")
    monkeypatch.setattr(pio.renderers, "_default_renderers", [pio.renderers["plotly_mimetype"]])


@cache
def given() -> dict[str, Any]:
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=10, batch=2)
    table = hs.score(model, probe, ["previous_token", "induction"])
    return {"hs": hs, "np": np, "model": model, "probe": probe, "table": table}


@pytest.mark.parametrize("name", NAMES)
def test_d12_every_figure_of_the_package_has_a_picture(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Figure] = []
    real = Figure.__init__

    def kept(self: Figure, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Figure, "__init__", kept)
    function = getattr(plots, name)
    scope = vars(sys.modules[function.__module__]) | given()
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(function) or ""):
        exec(compile(example.source, name, "single"), scope)  # noqa: S102
    monkeypatch.undo()
    assert made, f"plots.{name} returns a figure that is not headscope.plots.figure.Figure"
    bundle = made[-1]._repr_mimebundle_()
    width, height = pixels(bundle["image/png"])
    layout = made[-1].layout
    assert (width, height) == pytest.approx((2 * layout.width, 2 * layout.height), abs=2)
    assert bundle[PLOTLY]["data"]
    assert "text/html" not in bundle  # front ends would prefer it to the picture
    assert json.dumps(bundle)


def test_d12_no_picture_is_made_of_a_plain_figure() -> None:
    plain = {file.name for file in FOLDER.glob("*.py") if "= go.Figure(" in file.read_text("utf-8")}
    bare = {
        file.name
        for file in FOLDER.glob("*.py")
        if "make_subplots(\n" in (text := file.read_text("utf-8")) and "figure=Figure()" not in text
    }
    assert not plain | bare


def test_d12_a_figure_is_still_plotlys(tmp_path: Path) -> None:
    made = plots.heatmap(scores())
    made.data[0].z = np.array([[0.25, 0.5], [0.75, 1.0]], dtype=np.float32)
    assert isinstance(made, go.Figure)
    assert made.update_layout(title_text="other") is made
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301
        assert type(other) is Figure
        assert other == made
        assert "other" in repr(other)
        assert other._repr_mimebundle_()["image/png"] == made._repr_mimebundle_()["image/png"]
        assert "0.75" in Page(static_html(other)).text  # its arrays are in base64 by now
    plots.save(pio.from_json(made.to_json()), tmp_path / "loaded.png")
    assert go.Figure(made).to_dict() == made.to_dict()
    assert pio.from_json(made.to_json()) == made
    made.add_trace(go.Pie(values=[1]))  # matplotlib does not draw it here
    assert PLOTLY in (bundle := made._repr_mimebundle_())
    assert "image/png" not in bundle
    assert "other" in bundle["text/html"]


def test_d12_without_matplotlib_the_numbers_are_html(monkeypatch: pytest.MonkeyPatch) -> None:
    without_matplotlib(monkeypatch)
    table = model_table()
    bundle = plots.heatmap(table["induction"])._repr_mimebundle_()
    assert set(bundle) == {PLOTLY, "text/html", "text/plain"}
    page = Page(bundle["text/html"])
    assert "script" not in page.tags
    assert not page.addresses
    assert "induction" in page.text
    for value in table["induction"].mean.ravel():
        assert f"{value:.3g}" in page.text
    signed = Page(static_html(plots.heatmap(table["effect"])))
    assert signed.text.count("-") >= 4  # the layer without values
    bars = Page(plots.ranking(table["induction"], 3)._repr_mimebundle_()["text/html"])
    assert "L3H1" in bars.text
    assert "0.95" in bars.text
    points = plots.scatter(table["effect"], table["induction"])._repr_mimebundle_()["text/html"]
    assert "hs.plots.save" in points
    assert "<table" not in points


def test_d12_names_stay_text_in_the_static_html(monkeypatch: pytest.MonkeyPatch) -> None:
    without_matplotlib(monkeypatch)
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    tokens = [evil, "b", "c"]
    for made in (
        plots.heatmap(scores(evil)),
        plots.attention_pattern(np.eye(3), tokens, title=evil),
        Figure(go.Bar(x=tokens, y=[1.0, float("nan"), None])),
        Figure(go.Heatmap(z=[[1.0, None]], text=[[evil, "b"]], texttemplate="%{text}")),
    ):
        page = Page(made._repr_mimebundle_()["text/html"])
        assert not {"script", "img"} & set(page.tags)


@pytest.mark.parametrize(
    "made",
    [
        Figure(),
        Figure(go.Heatmap(z=[])),
        Figure(go.Heatmap(z=[[None, float("nan")]])),
        Figure(go.Heatmap(z=np.ones((2, 2)), zmin=1, zmax=1)),
        Figure(go.Heatmap(z=np.zeros((300, 300)))),
        Figure(go.Heatmap(z=[["a", "b"], ["c"]])),
        Figure(go.Bar(y=[])),
        Figure(go.Scatter3d(x=[1], y=[1], z=[1])),
        Figure(go.Bar(x=list(range(50)), y=list(range(50)))),
    ],
    ids=["empty", "no cell", "no value", "one value", "large", "ragged", "no bar", "3d", "bars"],
)
@pytest.mark.parametrize("drawn", [True, False])
def test_d12_odd_figures_show_a_sentence(
    made: Figure, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not drawn:
        without_matplotlib(monkeypatch)
    bundle = made._repr_mimebundle_()
    assert bundle.keys() & {"image/png", "text/html"}
    assert len(made._repr_html_()) < 200_000
    assert len(bundle["text/plain"]) < 300


@pytest.mark.parametrize("name", ["notebook", "notebook_connected", "png", "browser", ""])
def test_d12_a_renderer_that_fails_or_needs_scripts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [pio.renderers[name]] if name else []
    monkeypatch.setattr(pio.renderers, "_default_name", name)
    monkeypatch.setattr(pio.renderers, "_default_renderers", chosen)
    monkeypatch.setattr(pio.renderers, "_to_activate", [])
    if name == "png":  # as without Chrome

        def fails(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("Chrome is missing")

        monkeypatch.setattr(type(chosen[0]), "to_mimebundle", fails)
    bundle = plots.heatmap(scores())._repr_mimebundle_()
    assert pixels(bundle["image/png"])
    if "notebook" not in name:
        assert PLOTLY in bundle
        assert "text/html" not in bundle
        return
    page = Page(bundle["text/html"])
    assert page.tags.index("img") < page.tags.index("script")
    assert any(one.startswith("data:image/png") for one in page.addresses)


def test_d12_scripts_take_the_static_picture_away() -> None:
    page = live_html("<p>still</p>", "<script>draw()</script>", "x")
    still, rest = page.split("</div>", 1)
    assert still == '<div id="x-static"><p>still</p>'
    assert rest.startswith('<div id="x-live" hidden><script>')
    assert rest.index("remove()") < rest.index("hidden = false") < rest.index("draw()")


CELL = """
import headscope as hs, numpy as np
hs.plots.attention_pattern(np.eye(4), list("abcd"), title="one cell")
"""


def test_d12_a_cell_holds_both_without_nbformat(tmp_path: Path) -> None:
    # nbformat is absent from the kernel, as in an environment that only JupyterLab's lacks.
    hidden = "import sys; sys.modules['nbformat'] = None"
    cells = [nbformat.v4.new_code_cell(source) for source in (hidden, CELL, CELL + ".show()")]
    cells[2]["source"] = CELL.replace("hs.plots", "figure = hs.plots") + "figure.show()"
    notebook = nbformat.v4.new_notebook(cells=cells)
    environment = {k: v for k, v in os.environ.items() if k != "PLOTLY_RENDERER"}
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute(env=environment)
    for cell in notebook.cells[1:]:
        (shown,) = [out for out in cell.outputs if out.output_type != "stream"]
        assert set(shown.data) == {PLOTLY, "image/png", "text/plain"}
        width, height = pixels(shown.data["image/png"])
        about = shown.metadata["image/png"]
        assert (about["width"], about["height"]) == (width // 2, height // 2)
        assert about["alt"].startswith("one cell: 4 queries x 4 keys")
    nbformat.validate(notebook)


def test_d12_neither_ipython_nor_nbformat_is_needed() -> None:
    code = (
        "import sys\n"
        "for name in ('IPython', 'IPython.display', 'nbformat', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np\n"
        "from headscope import plots\n"
        "figure = plots.attention_pattern(np.eye(3), list('abc'))\n"
        "print(sorted(figure._repr_mimebundle_()), figure._repr_html_()[:5], figure)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"['{PLOTLY}', 'text/html', 'text/plain'] <div> <Figure")


def test_d12_a_terminal_without_a_browser_prints_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plots.heatmap(scores())

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no browser")

    monkeypatch.setattr(pio.renderers, "_default_name", "browser")
    monkeypatch.setattr(figures.pio, "show", fails)
    made._ipython_display_()
    said = capsys.readouterr().out
    assert said.startswith("<Figure induction")
    assert len(said) < 300
    monkeypatch.setattr(pio.renderers, "_render_on_display", False)
    made._ipython_display_()
    assert capsys.readouterr().out.startswith("<Figure induction")


def test_d12_a_viewer_without_its_frame_says_what_to_do() -> None:
    view = hs.attention_view(given()["model"], heads=["L2H1"], length=12)
    page = view._repr_html_()
    assert "iframe" in Page(page).tags
    left = page[page.index(">") + 1 : page.rindex("</iframe>")]  # what a sanitiser leaves
    assert left.startswith("The attention viewer runs scripts")
    assert ".save(" in left
