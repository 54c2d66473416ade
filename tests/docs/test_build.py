"""The documentation builds without a warning, and what is generated for it is right."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import headscope as hs
from docs.pages.benchmarks import benchmarks_page
from docs.pages.gallery import gallery_pages
from docs.pages.reference import reference_pages
from docs.pages.scorers import applicable, scorer_pages
from docs.pages.write import plain
from headscope.scorers import CATALOGUE
from tests.docs.pages import ROOT


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    # Every page is read and every link resolved; pictures and HTML are for `make docs`.
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "dummy",
         "-d", str(tmp_path / "trees"), "docs", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_pages_score_what_can_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hs.load()

    def run(*_: object, **__: object) -> None:
        raise InterruptedError  # so far everything was allowed

    monkeypatch.setattr(type(model), "run", run)
    asked = applicable(model)
    with pytest.raises(InterruptedError):
        hs.score(model, scorers=asked)
    for name in set(CATALOGUE) - set(asked):
        if CATALOGUE[name].kind != "weight":
            with pytest.raises(hs.HeadscopeError):
                hs.score(model, scorers=[name])


def test_every_scorer_is_told() -> None:
    pages = scorer_pages(None)
    told = "\n".join(pages.values())
    for name, scorer in CATALOGUE.items():
        assert name in told
        assert scorer.source in told or plain(scorer.source) in told  # in tables, with escapes
        said = scorer.description.split(":")[0]
        assert said in " ".join(told.split()) or plain(said) in told
    for name in hs.circuits.score(hs.load()):
        assert f"``{name}``" in pages["scorers/weights.rst"]


def test_every_public_name_is_in_the_reference() -> None:
    pages = reference_pages()
    for name in hs._HOME:
        assert name in pages["reference/top.rst"] or f"reference/{name}.rst" in pages


def test_a_ratio_is_worse_from_fifteen_percent_on_and_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    import check  # type: ignore[import-not-found]

    took = iter([[1.3, 1.0], [1.1, 1.0], [1.0, 2.0], [1.0, 2.1], [1.0, 2.2], [9.0, 1.0]])
    monkeypatch.setattr(check, "cpu_seconds", lambda *_: next(took))
    slow, fast = (check.Ratio(int, int, faster=one) for one in (False, True))
    found: dict[str, float] = {}
    failed = check.compare(
        {"plain": slow, "loop": fast, "new": slow}, {"plain": 1.0, "loop": 3.0}, found
    )
    assert failed == ["loop"]
    assert found == {"plain": 1.1, "loop": 2.2, "new": 9.0}
    assert not check.worse(1.14, 1.0, faster=False)
    assert check.worse(0.86, 1.0, faster=True)
    committed = json.loads((folder / "results" / "check.json").read_text("utf-8"))
    assert all(one > 0 for one in committed["ratios"].values())


def test_benchmarks_are_shown_as_they_were_printed(tmp_path: Path) -> None:
    assert "make bench" in benchmarks_page(tmp_path / "none")["benchmarks.rst"]
    found = {
        "benchmark": "scan",
        "speed": {"seconds": {"headscope": {"median": 0.51234567}, "plain": {"median": 0.2}}},
        "times": 2.5,
        "memory": [{"tokens": 1024, "ratio": 1.25}],
        "machine": {"processor": "x86", "threads": 2, "gpu": None, "versions": {"torch": "9"}},
    }
    (tmp_path / "cpu.json").write_text(json.dumps(found))
    page = benchmarks_page(tmp_path)["benchmarks.rst"]
    for piece in ("scan (cpu)", "x86, 2 threads; torch 9", "0.5123", "2.5", "1024", "1.25"):
        assert piece in page
    assert page.count("<rect") == 1  # the one ratio, right of the line at 1
    assert 'x="660.0"' in page


def test_outputs_of_notebooks_stay_text(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    figure = {"data": [{"type": "bar", "x": [evil], "y": [1]}], "layout": {}}
    mime = "application/vnd.plotly.v1+json"
    cells = [
        nbformat.v4.new_markdown_cell("# A title\n\nWhat it is. And more."),
        nbformat.v4.new_code_cell(
            "1",
            outputs=[
                nbformat.v4.new_output("stream", text=evil),
                nbformat.v4.new_output("display_data", {"text/plain": evil}),
                nbformat.v4.new_output("display_data", {mime: figure}),
            ],
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "07_evil.ipynb")
    pages = gallery_pages(tmp_path, None)
    assert "[A title](07_evil.md): What it is." in pages["gallery/index.md"]
    assert "<img" not in pages["gallery/07_evil.md"]
    assert pages["gallery/07_evil.md"].count("</script>") == 2  # the loader's and the figure's own
