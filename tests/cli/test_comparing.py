"""``headscope emergence`` and ``headscope compare``: files, pages, mistakes."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from headscope.cli.compare import of_sweep
from headscope.sweeps.results import read
from tests.cli.support import run, sentence

SWEEP = """
name: along
models:
  - {model: tiny-gpt2, checkpoints: [step-000000, step-005000]}
probes:
  - {kind: repeated_tokens, length: 6, batch: 2}
edits: [mean]
metrics: [loss]
"""


def test_emergence_prints_and_writes(tmp_path: Path) -> None:
    folder = tmp_path / "em"
    printed = run("emergence", "--checkpoints", "step-000000,step-005000", "--scorers", "induction",
                  "--out", str(folder))  # fmt: skip
    assert "induction: L2H" in printed
    frame = pandas.read_parquet(folder / "emergence.parquet")
    assert set(frame["step"]) == {0, 5000}
    assert "Along training" in (folder / "index.html").read_text()
    run("report", str(folder), "-o", str(tmp_path / "r.html"))
    assert "em: Along training" in (tmp_path / "r.html").read_text()


def test_a_sweep_over_checkpoints_is_a_story(tmp_path: Path) -> None:
    (tmp_path / "along.yaml").write_text(SWEEP)
    run("sweep", str(tmp_path / "along.yaml"), "--out", str(tmp_path / "sweep"))
    found = of_sweep(tmp_path / "sweep")
    assert found.steps == [0, 5000]
    results = read(tmp_path / "sweep")
    expected = results.scores(model="tiny-gpt2@step-005000").mean
    np.testing.assert_array_equal(found.of("mean:loss")[1], expected)
    rows = json.loads(run("emergence", str(tmp_path / "sweep"), "--json"))
    assert {row["kind"] for row in rows} == {"score", "curve"}


def test_compare_matches_runs_and_checkpoints(tmp_path: Path) -> None:
    run("scan", "--scorers", "induction", "--out", str(tmp_path / "scan"))
    folder = tmp_path / "pair"
    printed = run("compare", "tiny-gpt2@step-005000", str(tmp_path / "scan"), "--scorers",
                  "induction", "--out", str(folder))  # fmt: skip
    assert "12 pairs" in printed
    assert len(pandas.read_parquet(folder / "comparison.parquet")) == 12
    assert "Matched heads" in (folder / "index.html").read_text()
    rows = json.loads(run("compare", "tiny-gpt2@step-005000", "tiny-gpt2", "--by", "weights",
                          "--scorers", "induction", "--json"))  # fmt: skip
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compare", "tiny-gpt2", "tiny-llama", "--by", "wieghts"), "weights"),
        (("compare", "tiny-gpt2", "tiny-llama", "--by", "weights"), "not of one shape"),
        (("emergence", "tiny-llama"), "does not come with checkpoints"),
        (("emergence", "--scorers", "inducton"), "induction"),
        (("emergence", "--texts", "no-such-file"), "cannot be read"),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple[str, ...], said: str) -> None:
    assert said in sentence(*arguments)
