"""Pages take results of any kind: figures by registration, sections from the result itself."""

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import pytest

import headscope as hs
from headscope.base.result import Drawn, Glance, Result, Rows, Section, Shown, Words
from headscope.plots import figures, figures_of
from headscope.plots.figures import Drawing
from headscope.report.folder import RunFolder
from headscope.report.sections import Picture, with_pictures


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    model = hs.load()
    prompt = "The cat sat on the mat because the cat"
    probe = hs.probes.text(model, [prompt])
    routes, norms = hs.flow.routes(model, prompt), hs.flow.norms(model, probe)
    return {
        "routes": routes,
        "flow_by_head": routes.head_scores(),
        "rollout": hs.flow.rollout(model, probe),
        "mixing": norms,
        "norm_share": norms.norm_share,
        "lens": hs.lens.logit_lens(model, prompt),
        "attribution": hs.lens.attribute(model, prompt),
    }


def _drawn(found: dict[str, object]) -> list[Drawn]:
    sections = [
        one for each in found.values() if isinstance(each, Shown) for one in each.sections()
    ]
    return [block for one in sections for block in one.blocks if isinstance(block, Drawn)]


def test_every_figure_that_a_section_names_can_be_drawn(found: dict[str, object]) -> None:
    drawings = figures_of(found)
    named = _drawn(found)
    assert len(named) > 6
    for one in named:
        assert one.name in drawings
        assert one.said
        assert all(isinstance(drawings[one.name](theme), go.Figure) for theme in ("light", "dark"))


def test_most_results_share_the_protocol(found: dict[str, object]) -> None:
    for name in ("routes", "lens", "attribution"):
        assert isinstance(found[name], Result)
        assert isinstance(found[name], Shown)


@dataclass(frozen=True, repr=False)
class Mine(Shown):
    """A kind of result that nothing here knows."""

    value: float

    def glance(self) -> Glance:
        return Glance("mine", ["a fact"], ("what", "value"), [("it", f"{self.value:g}")])


@figures.register
def _(result: Mine) -> dict[str, Drawing]:
    return {"": lambda theme: go.Figure(go.Bar(y=[result.value]))}


def test_a_new_kind_of_result_needs_no_change_of_pages(tmp_path: Path) -> None:
    table = hs.score(hs.load(), scorers="entropy")
    folder = RunFolder.create(tmp_path / "run", "mine").of({}).ready()
    folder.write(table, {}, {}, results={"my_bar": Mine(3.5)})
    page = (folder.path / "index.html").read_text("utf-8")
    assert "a fact" in page
    assert "3.5" in page
    assert [one.stem for one in (folder.path / "pictures").iterdir()] == ["my_bar"]


def test_figures_without_a_drawing_are_left_out() -> None:
    section = Section("one", [Words("text"), Drawn("there", "a bar"), Drawn("missing", "nothing")])
    (shown,) = with_pictures([section], figures_of({"there": Mine(1.0)}))
    assert isinstance(shown.blocks[0], Words)
    picture = shown.blocks[1]
    assert isinstance(picture, Picture)
    assert (picture.said, picture.caption, len(shown.blocks)) == ("a bar", "a bar", 2)


def test_a_glance_is_a_section() -> None:
    (section,) = Mine(2.0).sections()
    assert section == Section("mine", [Words("a fact"), Rows(("what", "value"), [("it", "2")])])
