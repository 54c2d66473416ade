"""``headscope report``: real runs of the bundled model in one file; mistakes in one sentence."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope.cli.output import typed
from headscope.cli.runs import sweep_runs
from headscope.errors import HeadscopeError
from headscope.sweeps.results import read
from tests.cli.support import run, sentence

SWEEP = """
name: small
models: [tiny-gpt2]
probes:
  - {kind: repeated_tokens, length: 6, batch: 2}
edits: [mean]
metrics: [loss]
sets:
  - {name: each, heads: [L0H0, L2H1]}
  - {name: pair, heads: [L0H0, L2H1], arrange: together}
  - {name: random, random: 3, draws: 2, arrange: cumulative}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(SWEEP)
    run("scan", "--scorers", "induction,previous_token", "--out", str(folder / "scan"))
    run("circuits", "--tokens", "8", "--paths", "2", "--out", str(folder / "circuits"))
    run("lens", "The cat", "--out", str(folder / "lens"))
    run("sweep", str(folder / "small.yaml"), "--out", str(folder / "sweep"))
    return folder


def test_runs_are_joined_into_one_page(runs: Path) -> None:
    names = ("scan", "circuits", "lens", "sweep")
    out = runs / "report.html"
    run("report", *(str(runs / name) for name in names), "-o", str(out))
    page = out.read_text(encoding="utf-8")
    assert len(page.encode()) < 10_000_000
    (model,) = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S)[1])["models"]
    assert model["name"] == "tiny-gpt2"
    scores = {one["name"]: one["kind"] for one in model["scores"]}
    assert scores["induction"] == "probe"
    assert scores["ov_effective_rank"] == "weights"
    assert scores["mean:loss:repeated_tokens"] == "effect"
    assert set(model["words"]["L2H1"]) == {"OV", "QK"}
    assert [one["name"] for one in model["partners"]["modes"]] == ["K", "Q", "V"]
    assert [one["name"] for one in model["spectra"]] == ["OV", "QK"]
    assert len(model["says"]["L0H0"][0]) == 5
    assert len(model["attention"]["heads"]) == 12
    for said in ("circuits: Composition", "lens: What makes the logit", "sweep: Curves",
                 "Sets of heads edited together", "headscope circuits tiny-gpt2 --seed 0",
                 "name: small"):  # fmt: skip
        assert said in page, said


def test_a_sweep_keeps_its_numbers(runs: Path) -> None:
    (found,) = sweep_runs(runs / "sweep")
    results = read(runs / "sweep")
    effect = results.scores("each")
    np.testing.assert_array_equal(found.table["mean:loss:repeated_tokens"].mean, effect.mean)
    curve, groups = found.sections
    lines = [one.name for one in curve.blocks[0].light.data if one.name]
    assert lines == ["random (2)"]
    drawn = next(one for one in curve.blocks[0].light.data if one.name)
    grid = results.effects("random")
    expected = grid.mean.mean(0) + grid.unedited.mean()
    np.testing.assert_allclose(drawn.y, expected, rtol=1e-6)
    assert groups.blocks[0].rows[0][3] == pytest.approx(float(results.effects("pair").mean[0, 0]))


def test_a_saved_pruning_curve_is_drawn(runs: Path) -> None:
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=5, batch=2)
    curve = hs.pruning.pruning_curve(model, probe, counts=[0, 3], random=2)
    curve.save(runs / "curve.parquet")
    out = runs / "curve.html"
    run("report", str(runs / "scan"), str(runs / "curve.parquet"), "-o", str(out))
    assert "curve: Curves" in out.read_text(encoding="utf-8")
    with pytest.raises(HeadscopeError, match="no table of heads"):
        run("report", str(runs / "curve.parquet"), "-o", str(out))


def test_two_models_stand_in_one_report(runs: Path) -> None:
    run("scan", "tiny-llama", "--scorers", "induction", "--out", str(runs / "llama"))
    out = runs / "two.html"
    run("report", str(runs / "scan"), str(runs / "llama"), "-o", str(out))
    assert out.read_text(encoding="utf-8").count('id="atlas-') == 2


def test_the_command_is_kept_without_paths_of_this_computer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["/x/bin/headscope", "scan", "gpt2", "--out", "/home/me/runs/a b"]
    monkeypatch.setattr("sys.argv", words)
    assert typed() == "headscope scan gpt2 --out 'a b'"
    monkeypatch.setattr("sys.argv", ["/x/headscope/__main__.py", "scan"])
    assert typed() == "headscope scan"
    monkeypatch.setattr("sys.argv", ["/x/pytest/__main__.py", "tests"])
    assert typed() is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "no run at nowhere"),
        ((".",), "holds no finished run"),
        ((".", "-o", "x.pdf"), "should end in .html"),
        ((".", "-o", "no/such/x.html"), "no folder"),
    ],
)
def test_mistakes_get_a_sentence(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in sentence("report", *arguments)
