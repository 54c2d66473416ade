"""``headscope flow`` as a user meets it."""

import json
from pathlib import Path

import pandas
import pytest

from headscope.table import Routes
from tests.cli.support import run, sentence
from tests.models.families import fresh

PROMPT = "When Mary and John went to the store, John gave a drink to"


def test_it_prints_and_leaves_a_run(tmp_path: Path) -> None:
    printed = run("flow", PROMPT, "--out", str(tmp_path / "run"))
    for word in ("on the route", "source tokens", "strongest moves", "ended in attention biases"):
        assert word in printed
    folder = tmp_path / "run"
    edges = pandas.read_parquet(folder / "edges.parquet")
    assert {"attention", "residual", "mlp"} <= set(edges.kind)
    assert len(Routes.load(folder / "routes.safetensors").edges) == len(edges)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["settings"]["edge_threshold"] == 0.04
    page = (folder / "index.html").read_text()
    for title in ("Routes", "From token to token", "What moves"):
        assert title in page
    pictures = {one.stem for one in (folder / "pictures").iterdir()}
    assert {"routes", "flow_by_head", "rollout", "alti", "mixing", "norm_share"} <= pictures


def test_json_goes_to_stdout_alone() -> None:
    found = json.loads(run("flow", PROMPT, "--json", "--part-threshold", "0"))
    assert sum(found["token_flow"]) + sum(found["bias_flow"]) == pytest.approx(1, abs=1e-4)
    assert len(found["heads"]) == 12
    assert len(found["tokens"]) == found["position"] + 1


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    fresh("gpt2").save_pretrained(mute)
    cases = {
        ("flow", " "): "prompt is empty",
        ("flow", "tiny-gpt2", "two", "words"): "in quotes",
        ("flow", PROMPT, "--part-threshold", "1"): "a share from 0 to below 1",
        ("flow", PROMPT, "--edge-threshold", "2"): "a share from 0 to 1",
        ("flow", PROMPT, "--position", "99"): "positions 0 to",
        ("flow", str(mute), "some text"): "has no tokenizer",
        ("flow", PROMPT, "--overwrite"): "--overwrite needs --out",
    }
    for arguments, expected in cases.items():
        assert expected in sentence(*arguments), arguments
