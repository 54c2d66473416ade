"""Work is never lost: results are saved before they are shown, whole, and where they belong."""

import contextlib
import inspect
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import tomllib
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from pyarrow import parquet

import headscope as hs
from headscope import plots
from headscope.base.configs import parse, read_yaml
from headscope.base.files import (
    FolderClaim,
    check_page,
    clear,
    occupant,
    subfolder,
    whole_file,
    whole_page,
)
from headscope.base.options import plain_line, track
from headscope.cli import main
from headscope.cli.compare import steps_of
from headscope.cli.output import without_folders
from headscope.edits import HeadEdit
from headscope.errors import HeadscopeError, HeadscopeWarning, InputError, WriteError
from headscope.probes.config import ProbeConfig
from headscope.report import RunPart, report_page
from headscope.report.folder import RunFolder
from headscope.sweeps import SweepConfig, cluster, read_config, run_sweep
from headscope.sweeps.cluster import check_address, check_temporary
from headscope.sweeps.run import Stop, inline, may_pass
from headscope.table import HeadTable
from tests.cli.support import run, sentence
from tests.sweeps.support import config as sweep_config
from tests.table.helpers import model_table, scores

SWEEP = """name: small
models: [tiny-gpt2]
probes: [{kind: repeated_tokens, length: 5, batch: 2}]
edits: [zero]
metrics: [loss]
"""
# Every command that writes a folder, small, and a file that it must leave behind.
WRITERS = {
    "scan": (["scan", "--scorers", "induction"], "table.parquet"),
    "circuits": (["circuits", "--tokens", "8", "--paths", "1"], "pairs.parquet"),
    "lens": (["lens", "the cat sat"], "lens.parquet"),
    "head": (["head", "L1H1", "--weights-only"], "L1H1.html"),
    "compare": (["compare", "SCAN", "SCAN"], "comparison.parquet"),
    "emergence": (["emergence", "SWEEP2"], "emergence.parquet"),
    "retrieval": (
        ["retrieval", "--lengths", "64", "--depths", "1", "--per-cell", "1", "--random", "-1"],
        "recall.csv",
    ),
    "influence": (["influence", "CORPUS", "--heads", "L2H1"], "ranked.jsonl"),
    "sweep": (["sweep", "CONFIG"], "table.parquet"),
}
READERS = [["scorers"], ["show", "SCAN"], ["status", "SWEPT"], ["doctor"], ["--help"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Inputs of the commands, by the words that stand for them."""
    place = tmp_path_factory.mktemp("made")
    (place / "small.yaml").write_text(SWEEP)
    two = SWEEP.replace("[tiny-gpt2]", "[{model: tiny-gpt2, checkpoints: all}]")
    (place / "two.yaml").write_text(two)
    (place / "corpus.jsonl").write_text('{"text": "The cat slept. The cat slept."}\n')
    run("scan", "--scorers", "induction", "--out", place / "scan")
    run("sweep", place / "small.yaml", "--out", place / "swept")
    run("sweep", place / "two.yaml", "--out", place / "along")
    return {
        "SCAN": str(place / "scan"),
        "SWEPT": str(place / "swept"),
        "SWEEP2": str(place / "along"),
        "CONFIG": str(place / "small.yaml"),
        "CORPUS": str(place / "corpus.jsonl"),
    }


@contextlib.contextmanager
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


@contextlib.contextmanager
def full_disk() -> Iterator[io.TextIOWrapper]:
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def called(words: list[str], stdout: object, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and standard error of the real entry point."""
    said = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["headscope", *words])
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", said)
        patch.setattr("warnings.showwarning", None)
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0), said.getvalue()


@pytest.mark.parametrize("name", WRITERS)
def test_d1_d5_results_are_saved_before_a_closed_pipe_is_met_and_tell_no_path(
    name: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, file = WRITERS[name]
    words = [made.get(word, word) for word in words]
    with closed_pipe() as stream:
        code, said = called([*words, f"--out={tmp_path}/secret/a"], stream, monkeypatch)
    assert code == 0, said
    assert "Traceback" not in said
    out = tmp_path / "secret" / "a"
    assert (out / file).is_file()
    parts = [str(tmp_path), "secret", str(Path(made["SCAN"]).parent)]
    for one in out.rglob("*"):
        held = one.read_bytes() if one.is_file() else b""
        assert not [part for part in parts if part.encode() in held], one


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["scan"])
def test_d1_results_are_saved_before_a_full_disk_is_met(
    name: str, made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, file = WRITERS[name]
    with full_disk() as stream:
        code, said = called([*words, "--out", str(tmp_path / "a")], stream, monkeypatch)
    assert code == 2
    assert said.strip().splitlines()[-1].startswith("headscope: cannot print the result: No space")
    assert (tmp_path / "a" / file).is_file()


@pytest.mark.parametrize("words", READERS, ids=lambda words: words[0])
def test_d1_commands_that_only_print_end_quietly(
    words: list[str], made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [made.get(word, word) for word in words]
    with closed_pipe() as stream:
        assert called(words, stream, monkeypatch) == (0, "")
    with monkeypatch.context() as patch:  # as `>&-` does
        patch.setattr(sys, "__stdout__", None)
        assert called(words, None, monkeypatch) == (0, "")


@pytest.mark.parametrize("name", WRITERS)
def test_d2_a_folder_belongs_to_one_run(name: str, made: dict[str, str], tmp_path: Path) -> None:
    words, file = WRITERS[name]
    words = [made.get(word, word) for word in words]
    run("scan", "--scorers", "entropy", "--out", tmp_path / "taken")
    before = {one: one.read_bytes() for one in (tmp_path / "taken").rglob("*") if one.is_file()}
    if name != "head":  # a page of one head stands beside a scan
        assert "--overwrite" in sentence(*words, "--out", tmp_path / "taken")
        after = {one: one.read_bytes() for one in (tmp_path / "taken").rglob("*") if one.is_file()}
        assert before == after
    if name in ("scan", "influence"):
        run(*words, "--out", tmp_path / "taken", "--overwrite")
        assert (tmp_path / "taken" / file).is_file()
        assert (occupant(tmp_path / "taken") or ("",))[0] == name


def test_d2_other_settings_and_models_are_refused_and_the_same_run_repeated(
    tmp_path: Path,
) -> None:
    out = tmp_path / "a"
    run("scan", "--scorers", "induction", "--out", out)
    assert "other seed" in sentence("scan", "--scorers", "induction", "--seed", 1, "--out", out)
    assert "other scorers" in sentence("scan", "--scorers", "entropy", "--out", out)
    said = sentence("scan", "tiny-llama", "--scorers", "induction", "--out", out)
    assert "other model, weights" in said
    run("scan", "--scorers", "induction", "--out", out)
    run("scan", "--scorers", "induction", "--seed", 1, "--out", out, "--overwrite")
    assert json.loads((out / "run.json").read_text())["asked"]["seed"] == 1
    assert "needs --out" in sentence("scan", "--overwrite")


def test_d2_a_sweep_and_other_runs_keep_apart(made: dict[str, str], tmp_path: Path) -> None:
    table = Path(made["SWEPT"], "table.parquet").read_bytes()
    assert "headscope sweep" in sentence("scan", "--out", made["SWEPT"])
    assert Path(made["SWEPT"], "table.parquet").read_bytes() == table
    config = SweepConfig(
        name="other",
        models=["tiny-gpt2"],
        probes=[{"kind": "repeated_tokens", "length": 6, "batch": 2}],
        edits=["zero"],
        metrics=["loss"],
    )
    folder = tmp_path / "taken"
    run("scan", "--scorers", "induction", "--out", folder)
    with pytest.raises(InputError, match="headscope scan"):
        run_sweep(config, folder)
    assert not (folder / "parts").exists()
    run_sweep(config, folder, overwrite=True)
    assert not (folder / "run.json").exists()
    assert run_sweep(config, folder).compacted  # resumed


def test_d2_what_is_done_finds_a_folder_when_its_own_was_taken_meanwhile(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "a", "scan").of({"seed": 1})
    second = RunFolder.create(tmp_path / "a", "scan").of({"seed": 2})
    for one in (first, second):
        one.ready().write(HeadTable([scores()]), {}, {}, pictures={})
    kept = [tmp_path / name / "run.json" for name in ("a", "a-2")]
    assert [json.loads(file.read_text())["asked"]["seed"] for file in kept] == [1, 2]


def test_d2_overwriting_removes_results_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("run.json", "table.parquet", "notes.md", "pictures/a.png", "pictures/mine.psd"):
        (tmp_path / name).write_text("{}")
    clear(tmp_path)
    left = sorted(one.relative_to(tmp_path).as_posix() for one in tmp_path.rglob("*"))
    assert left == ["notes.md", "pictures", "pictures/mine.psd"]
    (tmp_path / "table.parquet").write_text("of another program")
    with pytest.raises(InputError, match="does not say what it was"):
        FolderClaim.create(tmp_path, "scan")


def test_d2_pages_are_replaced_only_by_the_same(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        check_page(page, {"runs": ["--a"]}, overwrite=False)
    check_page(page, {"runs": ["--a"]}, overwrite=True)
    whole_page(page, "<p>x</p>", {"runs": ["--a"]})
    assert page.read_text().count("--") == 2  # the comment's own
    check_page(page, {"runs": ["--a"]}, overwrite=False)
    with pytest.raises(InputError, match="--overwrite"):
        check_page(page, {"runs": ["--b"]}, overwrite=False)


def _fill(opened: BinaryIO) -> None:
    opened.write(b"new")
    raise OSError(28, "No space left on device")


def test_d3_files_are_whole_or_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(WriteError, match="No space left"), whole_file(file) as opened:
        _fill(opened)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    file.chmod(0o444)
    with pytest.raises(WriteError, match="read-only"), whole_file(file) as opened:
        opened.write(b"new")
    with pytest.raises(WriteError, match="a folder"), whole_file(tmp_path) as opened:
        opened.write(b"new")
    with pytest.raises(WriteError, match="Make its folder"), whole_file(tmp_path / "a/b") as opened:
        opened.write(b"new")
    with pytest.raises(WriteError, match="device"), whole_file(Path("/dev/null")) as opened:
        opened.write(b"new")
    assert Path("/dev/null").is_char_device()


READ_ONLY = {
    "html": lambda file: plots.save(plots.heatmap(scores()), file),
    "png": lambda file: plots.save(plots.heatmap(scores()), file),
    "pdf": lambda file: plots.save(plots.heatmap(scores()), file),
    "parquet": lambda file: model_table().save(file),
    "htm": lambda file: whole_page(file, report_page([RunPart("a", "scan", model_table())])),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_d3_every_writer_refuses_a_target_that_it_cannot_write(kind: str, tmp_path: Path) -> None:
    kept = tmp_path / f"x.{kind}"
    kept.write_text("kept")
    kept.chmod(0o444)
    for file in (kept, tmp_path / "missing" / f"x.{kind}", Path("/proc") / f"x.{kind}"):
        with pytest.raises(HeadscopeError) as error:
            READ_ONLY[kind](file)
        assert "\n" not in str(error.value)
        assert str(file) in str(error.value)
    assert kept.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [kept]


def test_d4_links_are_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    precious = outside / "precious.png"
    precious.write_text("precious")
    inside = tmp_path / "run"
    (inside / "pictures").mkdir(parents=True)
    (inside / "pictures" / "induction.png").symlink_to(precious)
    plots.save(plots.heatmap(scores()), inside / "pictures" / "induction.png")
    assert precious.read_text() == "precious"
    assert not (inside / "pictures" / "induction.png").is_symlink()
    for name in ("pictures", "parts", "cells"):
        place = tmp_path / f"linked-{name}"
        place.mkdir()
        (place / name).symlink_to(outside)
        with pytest.raises(InputError, match="symbolic link"):
            subfolder(place, name)
        clear(place)
        assert precious.exists()
    place = tmp_path / "linked-pictures"
    folder = RunFolder.create(place, "scan").of({})
    with pytest.raises(InputError, match="symbolic link"):
        folder.write(HeadTable([scores()]), {}, {})
    assert [one.name for one in outside.iterdir()] == ["precious.png"]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("--out=/home/me/x", "--out=x"),
        ("-o/home/me/r.html", "-or.html"),
        ("--probe=~/p.yaml", "--probe=p.yaml"),
        ("C:\\Users\\me\\x", "x"),
        ("file:///home/me/x", "x"),
        ("--heads=/home/me/a,/home/me/b", "--heads=a,b"),
        ("--scorers=induction,entropy", "--scorers=induction,entropy"),
        ("runs/a", "runs/a"),
        ("either/or, he said", "either/or, he said"),
    ],
)
def test_d5_words_lose_the_folders_of_the_machine(word: str, shown: str) -> None:
    assert without_folders(word) == shown


def test_d11_pdf_text_is_truetype(tmp_path: Path) -> None:
    plots.save(plots.heatmap(scores()), tmp_path / "x.pdf")
    made = (tmp_path / "x.pdf").read_bytes()
    assert b"/Type3" not in made
    assert b"/CIDFontType2" in made


def test_d11_characters_without_a_font_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.plots.export._WIDE_FONTS", ())
    figure = go.Figure(go.Bar(x=["日本", "b"], y=[1, 2]))
    with pytest.warns(HeadscopeWarning, match=r"2 of the picture's characters \(日 本\)") as told:
        plots.save(figure, tmp_path / "x.pdf")
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    plots.save(figure, tmp_path / "x.svg")  # where the browser's fonts are used
    assert "日本" in (tmp_path / "x.svg").read_text(encoding="utf-8")


FOREIGN = {
    "lines": go.Figure(go.Scatter(y=[1, 2, 3])),
    "bars": go.Figure(go.Bar(y=[1, 2, 3])),
    "cells": go.Figure(go.Heatmap(z=[[1, None], [2, 3]])),
    "dates": go.Figure(go.Scatter(x=["2020-01-01", "2020-02-01"], y=[1, 2])),
    "note": go.Figure(go.Scatter(x=[1, 2], y=[1, 2])).add_annotation(x=1, y=1, text="here"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("kind", ["html", "png", "svg", "pdf"])
def test_e6_plain_plotly_figures_are_saved(name: str, kind: str, tmp_path: Path) -> None:
    plots.save(FOREIGN[name], tmp_path / f"x.{kind}")
    assert (tmp_path / f"x.{kind}").stat().st_size > 1000


REFUSED = {
    "histogram": go.Figure(go.Histogram(x=[1, 2])),
    "empty": go.Figure(),
    "horizontal": go.Figure(go.Bar(x=[1, 2], y=["a", "b"], orientation="h")),
    "several traces": go.Figure([go.Bar(y=[1]), go.Bar(y=[2])]),
    "only .html": go.Figure(go.Scatter(y=[1, 2], line_color="hsl(1,2%,3%)")),
}


def not_checked(function: Any) -> Any:
    """A function as users call it: without the tests' checks of annotations."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("why", REFUSED)
def test_e6_what_cannot_be_drawn_is_refused(why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        plots.save(REFUSED[why], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="not a dict"):
        not_checked(plots.save)({"data": []}, tmp_path / "x.png")


YAML = {
    "kind: text\nseed: 1\nseed: 2\n": "line 3: the key 'seed' stands twice",
    "kind: repeated_tokens\nlenght: 5\n": "line 2: unknown key 'lenght'",
    "kind: repeated_tokens\n\nlength: x\n": "line 3: length",
    "a: [1\nb: 2": "line 2",
    "x: 1\na: *x\n": "line 2",
    "a: &a [*a]\n": "line 1: an alias",
    "kind: text\nx: 2020-99-99\n": "line 2: '2020-99-99'",
    "- 1\n": "line 1",
    "x: 1\ny: " + "[" * 50: "line 2: more than 32 levels",
    "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(7)
    ): "more than 200000 values",
}


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_d6_every_yaml_error_has_its_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse(ProbeConfig, read_yaml(file), "a.yaml")
    assert YAML[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_d6_good_yaml_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfbase: &b {kind: text}\nprobe:\n  <<: *b\n  kind: ioi\n")
    assert read_yaml(file)["probe"] == {"kind": "ioi"}
    file.write_text(SWEEP.replace("zero", "zro"))
    with pytest.raises(InputError, match="line 4: unknown edit 'zro'"):
        read_config(file)


def test_d7_text_is_read_as_people_have_it(tmp_path: Path) -> None:
    model = hs.load()
    file = tmp_path / "a.jsonl"
    line = json.dumps({"text": "the cat\x85sat", "answer": None, "marks": None}, ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\n".encode())
    probe = hs.probes.from_jsonl(model, file)
    assert len(probe) == 2
    plain = hs.probes.from_tokens(probe.tokens)
    file.write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert hs.probes.from_jsonl(model, file).tokens.equal(plain.tokens)
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfthe cat sat\r\n\r\nthe dog ran")
    assert hs.probes.text(model, text).tokens.equal(
        hs.probes.text(model, ["the cat sat", "the dog ran"]).tokens
    )
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    found = list(hs.retrieval.Corpus(corpus).documents())
    assert [one.text for one in found] == ["a", "b"]
    assert corpus.read_bytes()[found[0].offset :].startswith(b'{"text": "a"}')


def test_d8_a_bos_that_is_there_is_kept_once() -> None:
    model = hs.load()
    bos = model.tokenizer.bos_token
    with pytest.warns(HeadscopeWarning, match="already begins with the model.s BOS"):
        found = hs.probes.text(model, [f"{bos}the cat sat"])
    assert found.tokens.equal(hs.probes.text(model, ["the cat sat"]).tokens)


def damaged(file: Path, **changed: object) -> Path:
    """A table whose metadata say something else."""
    rows = parquet.read_table(file)
    facts = json.loads(rows.schema.metadata[b"headscope"])
    for name, value in changed.items():
        (facts if name in facts else facts["scores"][0])[name] = value
    made = file.with_name("damaged.parquet")
    parquet.write_table(rows.replace_schema_metadata({b"headscope": json.dumps(facts)}), made)
    return made


@pytest.mark.parametrize(
    "changed",
    [
        {"scores": 3},
        {"scores": ["x"]},
        {"layers": "many"},
        {"layers": 10**9, "heads": 10**9},
        {"layers": 1e400},
        {"bounds": "01"},
        {"bounds": [{}, 1]},
        {"name": 7},
        {"unit": []},
        {"kv_heads": "two"},
        {"threshold": "high"},
        {"provenance": []},
        {"examples": {"per_example": 10**12}},
        {"examples": []},
    ],
)
def test_d9_damaged_metadata_get_a_sentence(changed: dict[str, object], tmp_path: Path) -> None:
    model_table().save(tmp_path / "t.parquet")
    with pytest.raises(InputError) as error:
        HeadTable.load(damaged(tmp_path / "t.parquet", **changed))
    assert "\n" not in str(error.value)


def test_d9_files_larger_than_the_limits_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_table().save(tmp_path / "t.parquet")
    for name, what in (("MAX_ROWS", "rows"), ("MAX_VALUES", "values"), ("MAX_BYTES", "bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(f"headscope.base.files.{name}", 3)
            with pytest.raises(InputError, match=f"claims [0-9,]+ {what}"):
                HeadTable.load(tmp_path / "t.parquet")


def test_d10_two_exports_at_once(made: dict[str, str], tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(hs.sweeps.export, made["SWEPT"], "sqlite", tmp_path / "e.sqlite")
            for _ in range(4)
        ]
        assert {one.result().name for one in jobs} == {"e.sqlite"}
    assert [one.name for one in tmp_path.iterdir()] == ["e.sqlite"]


class Listener:
    """Something that listens where a cluster should, says what it is told to, and hangs up."""

    def __init__(self, says: bytes | None) -> None:
        self._socket, self._says = socket.create_server(("127.0.0.1", 0)), says
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "Listener":
        threading.Thread(target=self._answer, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _answer(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.recv(100)
            if self._says is None:
                time.sleep(5)
            connection.sendall(self._says or b"")


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (None, "timed out"),  # a stopped cluster: the system still takes connections for it
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "something else"),
        (b"", "hangs up"),
    ],
)
def test_d10_a_cluster_that_does_not_answer_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, says: bytes | None, why: str
) -> None:
    monkeypatch.setattr(cluster, "_ANSWER", 0.3)
    with Listener(says) as there, pytest.raises(InputError, match=f"no Ray cluster.*{why}"):
        check_address(there.address)


def test_d10_what_speaks_grpc_is_left_to_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Listener(bytes((0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 64, 0, 0))) as there:
        check_address(there.address)
    assert 2 * cluster._ANSWER < 20  # to be reached, and to answer
    # Before anything is loaded: the model is missing, too.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        wanted = sweep_config(models=[str(tmp_path / "missing")])
        with pytest.raises(InputError, match="no Ray cluster answers"):
            hs.sweeps.run_sweep(wanted, tmp_path / "out", executor=hs.sweeps.RayExecutor(2))
    assert not (tmp_path / "out").exists()


def test_d10_ray_is_refused_where_it_could_not_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        started = time.monotonic()
        with pytest.raises(InputError, match="no Ray cluster answers"):
            check_address(f"127.0.0.1:{taken.getsockname()[1]}")
        assert time.monotonic() - started < 20
    check_address("auto")
    with pytest.raises(InputError, match="Set TMPDIR"):
        check_temporary(Path("/somewhere") / ("x" * 100))
    check_temporary(Path("/var/tmp"))  # noqa: S108


def failing(error: Exception, made: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """What a sweep keeps of chunks that fail."""

    def measure(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headscope.sweeps.run.Benches.measure", measure)
        patch.setattr("headscope.sweeps.run._PAUSE", 0.0)
        run_sweep(hs.sweeps.read_config(made["CONFIG"]), tmp_path / "s")
    file = next((tmp_path / "s" / "failed").iterdir())
    assert str(tmp_path) not in file.read_text()
    facts = json.loads(file.read_text())
    assert isinstance(facts, dict)
    return facts


def test_d15_failures_keep_their_traceback_and_only_what_may_pass_is_tried_again(
    made: dict[str, str], tmp_path: Path
) -> None:
    facts = failing(RuntimeError(f"sizes differ in {tmp_path}/x.txt"), made, tmp_path)
    assert facts["attempts"] == 1
    assert facts["reason"] == "RuntimeError: sizes differ in x.txt"
    assert any("headscope/sweeps/run.py" in line for line in facts["traceback"])
    assert not any('File "/' in line for line in facts["traceback"])
    assert failing(OSError(5, "Input/output error"), made, tmp_path / "b")["attempts"] == 3
    assert may_pass(MemoryError())
    assert may_pass(RuntimeError("CUDA out of memory"))
    assert not may_pass(KeyError("x"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_d16_a_signal_reaches_the_program_once_the_chunk_is_saved(
    number: int, made: dict[str, str], tmp_path: Path
) -> None:
    got: list[int] = []
    before = signal.signal(number, lambda *which: got.append(which[0]))
    config = hs.sweeps.read_config(made["CONFIG"])

    def executor(work: Any, chunks: Any, stop: Any, finished: Any) -> None:
        so_far = list(got)
        signal.raise_signal(number)
        assert stop.asked
        assert got == so_far  # not before the chunk is saved
        inline(work, chunks, Stop(), finished)

    try:
        assert run_sweep(config, tmp_path / "a", executor=executor).compacted
        assert got == [number]
        run_sweep(config, tmp_path / "b", executor=executor, catch_signals=True)
        assert got == [number]
    finally:
        signal.signal(number, before)


def test_d14_version_and_extras() -> None:
    assert run("--version") == f"headscope {version('headscope')}\n"
    names = metadata("headscope").get_all("Provides-Extra")
    assert list(json.loads(run("doctor", "--json"))["extras"]) == names


def test_d12_nbformat_comes_with_headscope() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert any(one.startswith("nbformat") for one in project["dependencies"])
    assert re.search(r"^nbformat==", Path("requirements.lock").read_text(), re.M)


def test_e8_a_bare_notebook_gets_progress_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, bundle: dict[str, str], raw: bool) -> None:
            shown.append(bundle["text/plain"])

    def display(bundle: dict[str, str], **_: object) -> Handle:
        shown.append(bundle["text/plain"])
        return Handle()

    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr("headscope.base.options.find_spec", lambda _: None)
    monkeypatch.setattr("headscope.base.options._PATIENCE", -1.0)
    monkeypatch.setattr("IPython.display.display", display)
    with track(4, "scoring") as advance:
        advance(1)
        advance(1)
    assert shown[0].startswith("scoring: 0% after 0:00")
    assert shown[-1].startswith("scoring: done in 0:0")
    assert plain_line("scoring", 1, 4, 60) == "scoring: 25% after 1:00, 3:00 left"


def test_e12_columns_say_what_they_were_measured_on(made: dict[str, str]) -> None:
    assert "Measured on repeated tokens: induction." in run("show", made["SCAN"])


def test_e18_distinctive_heads_stand_first() -> None:
    model = hs.load()
    found = hs.compare(model, model, scorers=["induction"])
    value = found.first[:, 0]
    far = np.abs(value - np.median(value)) / value.std()
    assert far[0] == far.max()
    assert (np.diff(far) <= 1e-4).all(), "equal up to four decimals, pairs keep their own order"


def test_e19_errors_name_what_was_given_and_what_is_known(tmp_path: Path) -> None:
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=5, batch=1)
    with pytest.raises(InputError, match=r"groups= needs a mapping .* not as list"):
        not_checked(hs.ablate_groups)(model, probe, hs.metrics.loss, [["L0H0"]])
    (tmp_path / "model-a").mkdir()
    with pytest.raises(HeadscopeError, match=r"Did you mean .*model-a"):
        hs.load(str(tmp_path / "modle-a"))
    edit = object.__new__(HeadEdit)  # past the tests' own checks of annotations
    known = {"name": "mine", "heads": {0: (0,)}, "donors": None, "site": "mlp", "scope": "all"}
    for name, value in known.items():
        object.__setattr__(edit, name, value)
    with pytest.raises(InputError, match=r"'mlp'.*known"):
        edit.__post_init__()


def test_e20_the_size_says_which_key_value_heads_stay() -> None:
    model = hs.load("tiny-llama")
    tokens = torch.zeros(1, 4, dtype=torch.long)
    size = hs.pruning.measure_size(hs.prune(model, "L0H1"), tokens)
    assert size.shared == ("L0 KV0, read by L0H0, L0H2, L0H3",)
    assert "L0 KV0" in str(size)
    assert hs.pruning.measure_size(model.module, tokens).shared == ()


def test_e22_headers_fit_a_terminal(made: dict[str, str]) -> None:
    printed = run("emergence", made["SWEEP2"])
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert steps_of(["step-000500", "step-010000"]) == ["500", "10000"]
    assert steps_of(["main", "step-1"]) == ["main", "step-1"]
