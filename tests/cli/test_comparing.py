"""``headscope emergence`` and ``headscope compare``: files, pages, mistakes."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from headscope.cli.compare import of_sweep
from headscope.sweeps.results import read
from headscope.table import HeadSimilarity
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


def test_similarity_of_heads_prints_and_writes(tmp_path: Path) -> None:
    folder = tmp_path / "alike"
    (tmp_path / "text.txt").write_text("one small step for a reader\n\nand another one for a text")
    text = ["--text", str(tmp_path / "text.txt")]
    printed = run("similarity", "tiny-gpt2", *text, "--out", str(folder))
    assert "most alike" in printed
    assert len(pandas.read_parquet(folder / "similarity.parquet")) == 12 * 11 // 2
    assert "Heads of tiny-gpt2" in (folder / "index.html").read_text()
    again = HeadSimilarity.load(folder / "similarity.safetensors")
    assert again.within
    rows = json.loads(
        run("similarity", "tiny-gpt2", "tiny-gpt2@step-005000", *text, "--by", "cka", "--json")
    )
    assert len(rows) == 144
    assert {"first", "second", "output_cka", "null", "p_value"} == set(rows[0])
    assert "pattern" in sentence("similarity", "--by", "patern")


def test_heads_of_relations_print_and_write(tmp_path: Path) -> None:
    words = ("1 the 3 det", "2 red 3 amod", "3 door 4 nsubj", "4 closed 0 root")
    lines = []
    for line in words:
        number, word, head, relation = line.split()
        lines.append("\t".join((number, word, *"____", head, relation, "_", "_")))
    file = tmp_path / "bank.conllu"
    file.write_text(("\n".join(lines) + "\n\n") * 6)
    folder = tmp_path / "syntax"
    given = ["--treebank", str(file), "--least", "2", "--epochs", "1"]
    printed = run("syntax", "tiny-gpt2", *given, "--out", str(folder))
    assert "Heads of relations" in printed
    assert "attachment score" in printed
    assert "Heads of relations" in (folder / "index.html").read_text()
    found = json.loads(run("syntax", "tiny-gpt2", *given, "--json"))
    assert [row["relation"] for row in found["syntax"]][:2] == ["all", "det"]
    assert len(found["probe"]) == 12
    assert "No such file" in sentence("syntax", "--treebank", str(tmp_path / "none.conllu"))
    file.write_text("1\tthe\n")
    assert "columns" in sentence("syntax", "--treebank", str(file))
