"""``headscope kinds`` as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from headscope.table.kinds import KindTable
from tests.cli.support import run, sentence

NAMES = "induction,previous_token,next_token"


def test_it_prints_a_page_and_leaves_a_run(tmp_path: Path) -> None:
    asked = ("kinds", "--kinds", NAMES, "--out", str(tmp_path / "run"))
    printed = run(*asked)
    assert "not asked, next_token" in printed
    folder = tmp_path / "run"
    found = KindTable.load(folder / "kinds.safetensors")
    assert found.named("induction")
    assert (folder / "page.txt").read_text() == found.summary() + "\n"
    page = (folder / "index.html").read_text()
    for title in ("which heads are what", "how they were asked", "not asked"):
        assert title in page.lower()
    assert json.loads((folder / "run.json").read_text())["settings"]["kinds"] == NAMES
    assert "other seed" in sentence(*asked, "--seed", "3")
    assert "other kinds" in sentence(*asked[:1], "--kinds", "induction", *asked[3:])
    kept = {file: file.stat().st_mtime_ns for file in (folder / "kinds").iterdir()}
    assert run(*asked) == printed
    assert {file: file.stat().st_mtime_ns for file in (folder / "kinds").iterdir()} == kept


def test_killed_it_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "headscope", "kinds", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept, deadline = folder / "kinds", time.monotonic() + 120
    while not (kept.is_dir() and len(list(kept.glob("*.safetensors"))) > 2):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "run.json").exists()
    before = {file: file.stat().st_mtime_ns for file in kept.glob("*.safetensors")}
    names = [file.name.split("-heads-")[0] for file in before]
    run("kinds", "--kinds", ",".join(names), "--no-confirm", "--out", str(folder))
    assert {file: file.stat().st_mtime_ns for file in kept.glob("*.safetensors")} == before
    assert set(KindTable.load(folder / "kinds.safetensors").values) <= set(names)


def test_json_and_mistakes() -> None:
    found = json.loads(run("kinds", "--kinds", "induction", "--no-confirm", "--json"))
    assert found["asked"] == ["induction"]
    assert {"kind", "layer", "head", "value", "p_adjusted"} <= found["findings"][0].keys()
    assert "did you mean" in sentence("kinds", "--kinds", "inducton")
    assert "--overwrite needs --out" in sentence("kinds", "--overwrite")
