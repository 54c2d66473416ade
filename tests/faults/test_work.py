"""Work is never lost: results are saved before they are shown, whole, and where they belong."""

import contextlib
import inspect
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import plotly.graph_objects as go
import pytest

from headscope import plots
from headscope.cli import main
from headscope.cli.command import portable
from headscope.errors import HeadscopeError, HeadscopeWarning, InputError, WriteError
from headscope.files import check_page, subfolder, whole_file, whole_page
from headscope.folders import Claim, clear, occupant
from headscope.report import Run, report_page
from headscope.report.folder import RunFolder
from headscope.sweeps import SweepConfig, run_sweep
from headscope.table import HeadTable
from tests.cli.support import run, sentence
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
        Claim.create(tmp_path, "scan")


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
    "htm": lambda file: whole_page(file, report_page([Run("a", "scan", model_table())])),
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
    assert portable(word) == shown


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
