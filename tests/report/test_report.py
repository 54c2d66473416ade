"""Reports read run folders and join them; what the page does is tested in a browser."""

import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from headscope.base.specs import ScoreSpec
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.plots import heatmap
from headscope.report import Facts, Picture, Rows, RunPart, Section, Words, read_run, report_page
from headscope.report.folder import RunFolder
from headscope.report.joined import read_partners
from headscope.report.page import packed
from headscope.report.sections import read_sections, sections_json
from headscope.table import AttentionExample, HeadTable, PairScores, Provenance
from tests.report.example import HOSTILE, hostile_run, run_of
from tests.table.helpers import model_table, scores


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S)[1])


def floats(found: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(found["data"]), dtype="<" + found["kind"])


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)


def test_numbers_are_those_of_the_table() -> None:
    table = model_table()
    (model,) = data_of(report_page([RunPart("toy", "scan", table)]))["models"]
    names = [one["name"] for one in model["scores"]]
    assert names == ["induction", "previous_token", "entropy", "effect"]
    for one in model["scores"]:
        score = table[one["name"]]
        np.testing.assert_array_equal(floats(one["mean"]), score.mean.astype("f4").ravel())
        np.testing.assert_allclose(floats(one["null"]), score.null.ravel(), rtol=2e-3)
        low, high = score.interval()
        reach = np.nanmax(np.abs(score.mean))
        np.testing.assert_allclose(floats(one["low"]), low.ravel(), rtol=2e-3, atol=1e-6 * reach)
        np.testing.assert_allclose(floats(one["high"]), high.ravel(), rtol=2e-3, atol=1e-6 * reach)
    (role,) = model["roles"]
    assert role["heads"] == [13, 3]  # L3H1, L0H3
    assert model["kvHeads"] == 2


def test_runs_of_one_model_are_joined_and_names_kept_apart() -> None:
    first, second = (HeadTable([scores("induction", threshold=0.5)]) for _ in range(2))
    other = HeadTable([scores("induction", provenance=Provenance(model="b"))])
    page = report_page([RunPart("one", "scan", first), RunPart("two", "scan", second)])
    (model,) = data_of(page)["models"]
    assert [one["name"] for one in model["scores"]] == ["induction", "induction (two)"]
    models = data_of(report_page([RunPart("one", "scan", first), RunPart("b", "scan", other)]))[
        "models"
    ]
    assert [one["name"] for one in models] == ["model", "b"]


def test_equal_weights_are_one_model() -> None:
    def of(revision: str | None, digest: str) -> HeadTable:
        return HeadTable([scores(provenance=Provenance("m", revision, digest))])

    sides = {"a": of(None, "x"), "b": of("step-1", "x"), "c": of("step-2", "y")}
    page = report_page([RunPart(name, "scan", table) for name, table in sides.items()])
    assert [one["name"] for one in data_of(page)["models"]] == ["m", "m@step-2"]


def test_the_page_is_small_and_fetches_nothing() -> None:
    page = report_page([run_of(4, 4)])
    assert len(page) < 10_000_000
    policy = html.unescape(re.search(r'Policy" content="([^"]+)"', page)[1])
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
    assert not re.search(r'<(?:script|img|link)[^>]*\b(?:src|href)="?http', page)


def test_the_largest_report_stays_below_its_limit() -> None:
    page = report_page([run_of(64, 64)])
    assert 5_000_000 < len(page.encode()) < 10_000_000


def test_hostile_text_stays_inside_its_script() -> None:
    plain, hostile = report_page([hostile_run("plain")]), report_page([hostile_run(None)])
    assert Tags(plain).tags == Tags(hostile).tags
    block = re.search(r'id="figures">(.*?)</script>', hostile, re.S)[1]
    assert not re.search("[<>&\u2028\u2029]", block)
    tokens = data_of(hostile)["models"][0]["attention"]["tokens"]
    assert max(map(len, tokens)) < 200
    assert "\u202e" not in "".join(tokens)
    assert HOSTILE[0][:8] in tokens[0]


def test_a_run_folder_is_read_back(tmp_path: Path) -> None:
    table = model_table()
    figure = heatmap(table["induction"])
    sections = [
        Section("One", [Words("said", True), Facts([("a", "b")]), Picture(figure, figure, "x")]),
        Section("Two", [Rows(("c", "d"), [("r", 1.5), ("s", ("t1", "t2"))], "cap")]),
    ]
    RunFolder.create(tmp_path / "run", "circuits").write(
        table,
        {"command": "circuits", "model": "toy", "seed": 3},
        {"read_seconds": 1.5},
        sections=sections,
        pictures={},
    )
    found = read_run(tmp_path / "run")
    assert (found.label, found.kind) == ("run", "circuits")
    assert found.command == "headscope circuits toy --seed 3"
    assert found.facts["timings"] == "read seconds 1.5"
    assert [one.title for one in found.sections] == ["One", "Two"]
    assert found.sections[0].blocks[0] == Words("said", True)
    assert found.sections[0].blocks[2].light == json.loads(figure.to_json())
    assert found.sections[1].blocks[0] == sections[1].blocks[0]
    assert data_of(report_page([found]))["pictures"][0]["light"]["data"]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"title": "x"}]', '[{"title":"x","blocks":[{"kind":"y"}]}]']
)
def test_damaged_sections_get_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "sections.json").write_text(text)
    with pytest.raises(InputError, match="no sections"):
        read_sections(tmp_path / "sections.json")


def test_sections_hold_nothing_but_what_is_asked_for(tmp_path: Path) -> None:
    figure = heatmap(model_table()["induction"])
    kept = json.loads(sections_json([Section("x", [Picture(figure, figure, "y")])]))
    kept[0]["blocks"][0]["light"]["config"] = {"plotlyServerURL": "http://evil"}
    (tmp_path / "s.json").write_text(json.dumps(kept))
    (section,) = read_sections(tmp_path / "s.json")
    assert set(section.blocks[0].light) == {"data", "layout"}


def test_partners_are_the_largest_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 1, (3, 4, 3, 4))
    pairs = PairScores(ScoreSpec("K_composition"), values)
    pairs.to_pandas().to_parquet(tmp_path / "pairs.parquet")
    found = read_partners(tmp_path / "pairs.parquet", (3, 4))
    for head in range(12):
        mine = [(b, v) for a, b, v in pairs.top(10**4) if 4 * a.layer + a.head == head][:5]
        listed = found.feeds[0]
        kept = [w for w, v in zip(listed.which[head], listed.value[head], strict=True) if v > 0]
        assert kept == [4 * b.layer + b.head for b, _ in mine]
        mine = [(a, v) for a, b, v in pairs.top(10**4) if 4 * b.layer + b.head == head][:5]
        listed = found.fed_by[0]
        np.testing.assert_allclose(listed.value[head][: len(mine)], [v for _, v in mine], rtol=1e-6)


def test_attention_is_packed_below_the_diagonal_and_kept(tmp_path: Path) -> None:
    pattern = np.tril(np.random.default_rng(0).uniform(0, 1, (2, 4, 4)))
    made = AttentionExample.of([HeadIndex(0, 1), HeadIndex(1, 0)], list("abcd"), pattern, "words")
    made.save(tmp_path / "attention.safetensors")
    read = AttentionExample.load(tmp_path / "attention.safetensors")
    np.testing.assert_array_equal(read.pattern, np.rint(pattern * 255))
    assert (read.heads, read.tokens, read.words) == (((0, 1), (1, 0)), tuple("abcd"), "words")
    table = HeadTable([scores()])
    (model,) = data_of(report_page([RunPart("x", "scan", table, attention=read)]))["models"]
    kept = floats(model["attention"]["pattern"]).reshape(2, 10)
    np.testing.assert_array_equal(kept, read.pattern[:, *np.tril_indices(4)])
    assert model["attention"]["heads"] == [1, 2]


def test_halves_and_missing_numbers() -> None:
    assert packed(np.array([np.nan, np.nan]), "f2") is None
    np.testing.assert_array_equal(floats(packed(np.array([1.5, np.nan]), "f2")), [1.5, np.nan])


def test_what_half_precision_would_lose_is_kept_whole() -> None:
    for values in ([1e5, 1.0], [3e-8, 1e-7]):
        found = packed(np.array(values), "f2")
        assert found["kind"] == "f4"
        np.testing.assert_allclose(floats(found), values, rtol=1e-6)


@pytest.mark.parametrize("name", ["none", "empty"])
def test_what_is_no_run_gets_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no finished run"):
        read_run(tmp_path / name)
    with pytest.raises(InputError, match="at least one run"):
        report_page([])


def test_failures_and_commands_are_shown() -> None:
    run = RunPart("s", "sweep", model_table(), effects=True, command="headscope sweep s.yaml",
              config="name: s\n", failed={"chunk-1": "out of memory"})  # fmt: skip
    page = report_page([run])
    for said in ("out of memory", "headscope sweep s.yaml", "name: s", "Failed"):
        assert said in page
