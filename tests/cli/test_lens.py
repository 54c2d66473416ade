"""``headscope lens`` as a user meets it."""

import html
import json
from pathlib import Path

import pandas
import pytest

from tests.cli.support import run, sentence
from tests.models.families import fresh

PROMPT = "When Mary and John went to the store, John gave a drink to"


def test_it_prints_and_leaves_a_run(tmp_path: Path) -> None:
    printed = run("lens", PROMPT, "--foil", " John", "--out", str(tmp_path / "run"))
    for word in ("logit lens, residual", "embedding", "promotes", "moved"):
        assert word in printed
    folder = tmp_path / "run"
    parts = pandas.read_parquet(folder / "attribution.parquet")
    facts = json.loads((folder / "run.json").read_text())
    assert facts["settings"]["foil"] == " John"
    assert {"head", "mlp", "token embedding"} <= set(parts.kind)
    read = pandas.read_parquet(folder / "lens.parquet")
    assert set(read.lens) == {"residual", "attention", "mlp"}
    page = (folder / "index.html").read_text()
    assert "default-src 'none'" in html.unescape(page)
    assert "What makes the logit" in page
    pictures = {one.stem for one in (folder / "pictures").iterdir()}
    assert {"lens_residual", "attribution", "attribution_by_source"} <= pictures


def test_json_goes_to_stdout_alone() -> None:
    found = json.loads(run("lens", PROMPT, "--json", "--top", "2"))
    total = sum(part["value"] for part in found["attribution"])
    assert total == pytest.approx(found["logit"], abs=1e-4)
    assert {one["rank"] for one in found["lens"]["residual"]} == {0, 1}
    assert found["attribution"][0]["head"] is None


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    fresh("gpt2").save_pretrained(mute)
    cases = {
        ("lens", " "): "prompt is empty",
        ("lens", "tiny-gpt2", "two", "words"): "in quotes",
        ("lens", "word " * 300): "reads at most 256",
        ("lens", str(mute), "some text"): "has no tokenizer",
        ("lens", PROMPT, "--target", "several words"): "must be one",
        ("lens", PROMPT, "--position", "99"): "positions 0 to",
        ("lens", PROMPT, "--lens", str(tmp_path)): "holds no saved lens",
    }
    for arguments, expected in cases.items():
        assert expected in sentence(*arguments), arguments
