"""``headscope retrieval`` and ``headscope influence`` as a user meets them."""

import html
import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from headscope.cli.options import parse_depths, parse_lengths
from headscope.table import HeadTable
from tests.cli.support import run, sentence
from tests.models.families import fresh

SMALL = ("--lengths", "64,110", "--depths", "0,0.5", "--per-cell", "2", "--random", "2")


def test_it_prints_and_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    printed = run("retrieval", "tiny-llama", *SMALL, "--out", str(folder))
    for word in ("retrieval heads", "share of needles found", "heads masked: needle", "random 1"):
        assert word in printed
    table = HeadTable.load(folder / "table.parquet")
    assert table["retrieval_set"].top(1)[0][1] > 0.9
    facts = json.loads((folder / "run.json").read_text())
    assert facts["settings"]["lengths"] == "64,110"
    assert facts["settings"]["heads"]
    recall = pandas.read_csv(folder / "recall.csv")
    assert recall[["length", "depth"]].values.tolist() == [[64, 0], [64, 0.5], [110, 0], [110, 0.5]]
    masking = pandas.read_csv(folder / "masking.csv")
    assert set(masking.arm) == {"top", "lowest", "random 0", "random 1"}
    said = [json.loads(one) for one in (folder / "responses.jsonl").read_text().splitlines()]
    assert len(said) == 8
    page = (folder / "index.html").read_text()
    assert "default-src 'none'" in html.unescape(page)
    for title in ("Retrieval heads", "Where needles are found", "What masking does"):
        assert title in page
    pictures = {one.stem for one in (folder / "pictures").iterdir()}
    assert pictures == {"retrieval_set", "recall", "masking_needle"}
    cells = {one: one.stat().st_mtime_ns for one in (folder / "cells").glob("*.parquet")}
    assert len(cells) == 4
    found = json.loads(run("retrieval", "tiny-llama", *SMALL, "--out", str(folder), "--json"))
    assert {one: one.stat().st_mtime_ns for one in cells} == cells
    assert found["heads"] == facts["settings"]["heads"]
    assert len(found["recall"]) == 4
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"words": "The cat slept. The cat slept."}\n{"words": "One day"}\n')
    options = ("--model", "tiny-llama", "--heads", str(folder), "--out", str(tmp_path / "inf"))
    rows = json.loads(run("influence", str(corpus), "--field", "words", *options, "--json"))
    assert sorted(one["line"] for one in rows) == [1, 2]
    assert json.loads((tmp_path / "inf" / "run.json").read_text())["settings"]["heads"] == sorted(
        found["heads"], key=found["heads"].index
    )


def test_tasks_of_a_config_are_masked(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        "tasks: {copying: {kind: repeated_tokens, length: 10, batch: 2}}\n"
        "counts: [0, 2]\nrandom: 1\nright: share\n"
    )
    found = json.loads(run("retrieval", *SMALL, "--masking", str(tasks), "--json"))
    assert list(found["masking"]) == ["copying"]
    assert {row["masked"] for row in found["masking"]["copying"]} == {0, 2}
    none = json.loads(run("retrieval", *SMALL[:-1], "-1", "--json"))
    assert none["masking"] == {}


def test_longer_texts_than_trained_say_so() -> None:
    printed = run(
        "retrieval", "tiny-llama", "--lengths", "250..500", "--depths", "0.9", "--per-cell", "1",
        "--random", "-1", "--extrapolate",
    )  # fmt: skip
    assert "Trained on at most 256 tokens" in printed


def test_no_answer_at_all_is_a_result(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--lengths", "1k", "--depths", "0,1", "--per-cell", "1", "--extrapolate")
    printed = run("retrieval", "tiny-llama", *options, "--out", str(folder))
    said = "No run was answered well enough to score: 0 of 2 with recall above 0.5"
    assert said in printed
    assert "heads masked" not in printed
    assert "there is no masking curve" in printed
    page = (folder / "index.html").read_text()
    assert said in page
    assert "What masking does" not in page
    assert pandas.read_csv(folder / "recall.csv").share.tolist() == [0, 0]
    table = HeadTable.load(folder / "table.parquet")
    scores = table["retrieval_set"]
    assert np.isnan(scores.mean).all()
    assert scores.provenance.probe["runs_counted"] == 0
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert (settings["runs"], settings["runs_counted"], settings["heads"]) == (2, 0, [])
    assert not (folder / "masking.csv").exists()
    assert [one.name for one in (folder / "pictures").iterdir()] == ["recall.png"]
    found = json.loads(run("retrieval", "tiny-llama", *options, "--out", str(folder), "--json"))
    assert found["said"].startswith(said)
    assert found["scores"] == []  # a frame leaves out heads without a value
    assert found["masking"] == {}


def test_teacher_forced_texts_are_scored_without_an_answer(tmp_path: Path) -> None:
    options = ("--lengths", "128,1k", "--depths", "1", "--per-cell", "1", "--random", "1")
    folder = tmp_path / "run"
    long = ("--extrapolate", "--form", "forced", "--out", str(folder))
    found = json.loads(run("retrieval", "tiny-llama", *options, *long, "--json"))
    assert (found["form"], found["runs"], found["runs_counted"]) == ("forced", 2, 2)
    assert found["runs_answered"] == 1
    assert len(found["scores"]) == 3 * 24  # three scores of every head
    assert "needle" in found["masking"]
    assert "teacher-forced" in (folder / "index.html").read_text()


def test_heads_for_influence_are_found_by_needles(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "The cat slept. The cat slept."}\n{"text": "One day"}\n')
    printed = run("influence", str(corpus), "--out", str(tmp_path / "out"))
    assert "loss of tiny-gpt2 without L" in printed
    assert (tmp_path / "out" / "ranked.jsonl").exists()
    named = run("influence", str(corpus), "--heads", "L2H1, 0.3", "--out", str(tmp_path / "two"))
    assert "without L2H1, L0H3" in named


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1k..32k", [1024, 2048, 4096, 8192, 16384, 32768]),
        ("64", [64]),
        ("64, 100,1K", [64, 100, 1024]),
        ("100..500", [100, 200, 400]),
        ("32..64,64", [32, 64]),
        ("1m", [2**20]),
    ],
)
def test_lengths(text: str, expected: list[int]) -> None:
    assert parse_lengths(text) == expected


def test_depths() -> None:
    assert parse_depths("10") == 10
    assert parse_depths("0,0.5,1") == [0, 0.5, 1]
    assert parse_depths("0.5") == [0.5]


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    fresh("gpt2").save_pretrained(mute)
    corpus, bad = tmp_path / "c.jsonl", tmp_path / "bad.yaml"
    corpus.write_text('{"text": "One day"}\n')
    bad.write_text("tasks: {a: {kind: ioii}}\n")
    cases = {
        ("retrieval", "--lengths", "many"): "not a list of lengths",
        ("retrieval", "--lengths", "4k..1k"): "in descending order",
        ("retrieval", "--lengths", ",".join(map(str, range(1, 80)))): "at most 64",
        ("retrieval", "--lengths", "0"): "not a list of lengths",
        ("retrieval", "--depths", "0,2"): "shares from 0",
        ("retrieval", "--depths", "few"): "is not a list of depths",
        ("retrieval", "--needles", "fact"): "did you mean 'facts'",
        ("retrieval", "--form", "force"): "did you mean 'forced'",
        ("retrieval", "--form", "forced", "--new-tokens", "3"): "generates nothing",
        ("retrieval", "--haystack", str(tmp_path / "none.txt")): "cannot be read",
        ("retrieval", "--masking", str(bad)): "bad.yaml",
        ("retrieval", "--lengths", "512"): "reads at most 256",
        ("retrieval", "--lengths", "512", "--extrapolate"): "has a table of",
        ("retrieval", str(mute)): "needs a tokenizer",
        ("influence", str(tmp_path / "none.jsonl")): "cannot be read",
        ("influence", str(corpus), "--field", "words"): 'under "words"',
        ("influence", str(corpus), "--denominator", "both"): "unknown denominator",
        ("influence", str(corpus), "--heads", "L9H9", "--out", str(tmp_path / "a")): "L9H9",
        ("influence", str(corpus), "--heads", "first", "--out", str(tmp_path / "b")): "first",
        ("influence", str(corpus), "--heads", str(tmp_path), "--out", str(tmp_path / "c")): "table",
    }
    for arguments, expected in cases.items():
        assert expected in sentence(*arguments), arguments
