"""``headscope circuits`` and ``headscope head``: results, pages, and mistakes in one sentence."""

import html
import json
from pathlib import Path

import pandas
import pytest

from headscope.circuits import strongest_paths
from headscope.models.loading import load
from headscope.table import HeadTable
from tests.cli.support import run, sentence


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "weights"
    return folder, run("circuits", "--out", str(folder), "--tokens", "16", "--paths", "4")


def test_circuits_print_scores_and_paths(read: tuple[Path, str]) -> None:
    _, printed = read
    best = strongest_paths(load(), 1, ["K"])[0]
    assert "copying_eigenvalues" in printed
    assert str(best) in printed


def test_circuits_leave_a_run_folder(read: tuple[Path, str]) -> None:
    folder, _ = read
    table = HeadTable.load(folder / "table.parquet")
    assert {"ov_effective_rank", "copying_eigenvalues", "maps_copy"} <= set(table)
    pairs = pandas.read_parquet(folder / "pairs.parquet")
    assert set(pairs["score"]) == {"Q_composition", "K_composition", "V_composition"}
    assert len(pairs) == 3 * 3 * 16  # three kinds, three pairs of layers, 4 x 4 heads
    paths = json.loads((folder / "paths.json").read_text())
    assert len(paths["three heads"]) == 4
    facts = json.loads((folder / "run.json").read_text())
    assert facts["settings"]["command"] == "circuits"
    page = (folder / "index.html").read_text()
    assert "default-src 'none'" in html.unescape(page)
    assert "Strongest paths" in page
    assert page.count("data-figure=") == 9
    shown = {file.name for file in (folder / "pictures").iterdir()}
    assert {"composition.png", "K_composition.png", "OV_spectra.png", "scores.png"} <= shown


def test_circuits_as_json() -> None:
    found = json.loads(run("circuits", "--json", "--tokens", "8"))
    assert {row["score"] for row in found["scores"]} >= {"qk_norm", "ov_norm"}
    assert found["paths"]["two heads"][0]["strength"] > 1
    assert found["missing"] == {}


def test_a_head_is_printed_and_has_a_page(tmp_path: Path) -> None:
    (best, _), *_ = load_induction()
    printed = run("head", str(best), "--out", str(tmp_path), "--text", "the <b>cat</b>")
    for said in (str(best), "induction", "mean_ablation", "reads -> writes", "fed by"):
        assert said in printed
    page = (tmp_path / f"{best}.html").read_text()
    for title in ("On probes", "Ablation", "Attention", "Spectrum", "partners", "Weight scores"):
        assert title in page
    assert "<b>" not in page.replace("<script", "").partition("<body>")[2].partition("<script")[0]


def load_induction() -> list:
    found = json.loads(run("scan", "--scorers", "induction", "--json"))
    best = max(found, key=lambda row: row["mean"])
    return [(f"L{best['layer']}H{best['head']}", best["mean"])]


def test_a_head_by_weights_alone_as_json() -> None:
    found = json.loads(run("head", "tiny-llama", "1.1", "--weights-only", "--json"))
    assert found["head"] == "L1H1"
    assert found["model"] == "tiny-llama"
    assert found["probes"] == found["effects"] == {}
    assert len(found["ov"]) == 5
    assert found["scores"]["ov_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("head", "L9H9"), "no head L9H9"),
        (("head", "tiny-gpt2"), "not a head"),
        (("head", "tiny-gpt2", "L1H1", "x"), "not 3 names"),
        (("head", "L1H1", "--weights-only", "--text", "x"), "leave out --weights-only"),
        (("head", "L1H1", "--text", " "), "--text is empty"),
        (("circuits", "no-such-model"), "no model 'no-such-model'"),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple[str, ...], said: str) -> None:
    assert said in sentence(*arguments)
