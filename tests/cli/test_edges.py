"""``headscope edges`` as a user meets it."""

import json
from pathlib import Path

from headscope.edges import Circuit, EdgeGraph
from tests.cli.support import run, sentence


def test_it_prints_and_leaves_a_run(tmp_path: Path) -> None:
    asked = ("edges", "--examples", "4", "--method", "eap", "--out", str(tmp_path / "run"))
    printed = run(*asked)
    for word in ("edges by eap", "circuit", "stability", "null position", "CPR"):
        assert word in printed
    folder = tmp_path / "run"
    graph = EdgeGraph.load(folder / "edges.parquet")
    circuit = Circuit.load(folder / "circuit.safetensors")
    assert set(circuit.edges) <= set(graph.edges)
    page = (folder / "index.html").read_text()
    for title in ("Edges", "Circuit", "Faithfulness", "positive control"):
        assert title in page
    pictures = {one.stem for one in (folder / "pictures").iterdir()}
    assert {"edges", "edges_by_head", "circuit", "faithfulness"} <= pictures
    assert list((folder / "scored").iterdir())
    assert json.loads((folder / "run.json").read_text())["settings"]["method"] == "eap"
    assert "other method" in sentence(*asked[:3], "--method", "exact", *asked[5:])


def test_json_goes_to_stdout_alone() -> None:
    found = json.loads(run("edges", "--examples", "3", "--method", "eap", "--count", "7", "--json"))
    assert len(found["circuit"]["edges"]) == 7
    assert found["circuit"]["verdict"].startswith("not known")
    assert len(found["heads"]) == 12
    assert found["edges"][0].keys() == {"source", "target", "slot", "score", "sem"}


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    cases = {
        ("--method", "eapp"): "did you mean",
        ("--metric", "accuracyy"): "metric",
        ("--count", "0"): "give 1 or more",
        ("--probe", "ioj"): "ioi",
        ("--probe", str(tmp_path / "none.jsonl")): "none.jsonl",
        ("--ablation", "nothing"): "ablation",
        ("--overwrite",): "--overwrite needs --out",
        ("--examples", "2", "--count", "100000"): "262 edges",
    }
    for arguments, expected in cases.items():
        assert expected in sentence("edges", *arguments), arguments
