"""Nothing that is finished is lost, whatever kills a sweep: the table is that of a quiet run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml

from headscope.sweeps import read, run_sweep, status
from headscope.sweeps.store import KEYS, Store
from tests.conftest import ROOT
from tests.sweeps.crash import crash_config
from tests.sweeps.support import REPEATED, config


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sweeps.crash", str(tmp_path), "0", "30"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["kills"].values()) == 30
    assert found["kills"]["after a while"] >= 5  # the others died inside the store
    assert len(found["kills"]) >= 5
    rows = pyarrow.parquet.read_table(tmp_path / "0" / "table.parquet").to_pandas()
    assert len(rows) == len(crash_config().edits) * 12
    assert not rows.duplicated(list(KEYS)).any()


def start(file: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "headscope", "sweep", str(file), "--out", str(out), *more]
    # Bytes are compared with those of this process, and rounding depends on the threads.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env)


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Wait until a running program has come so far."""
    end = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the program does not get on"
        time.sleep(0.05)


def test_a_killed_and_an_interrupted_program_resume(tmp_path: Path) -> None:
    wanted = config(
        probes=[REPEATED | {"length": 30, "batch": 24}], edits=["zero", "mean"], chunk=1
    )
    file, out = tmp_path / "sweep.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(wanted.model_dump(mode="json", exclude_none=True)))
    killed = start(file, out)
    wait_until(lambda: bool(Store(out).done()), killed)
    killed.kill()
    killed.communicate()
    before = status(out).done
    assert 0 < before < 24
    stopped = start(file, out)
    wait_until(lambda: len(Store(out).done()) > before, stopped)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, said
    assert f"Resume with: headscope sweep {file} --out {out}" in " ".join(said.split())
    assert before < status(out).done < 24
    outcome = run_sweep(wanted, out)
    assert outcome.compacted
    quiet = run_sweep(wanted, tmp_path / "quiet").store
    rows = [Store(path).rows(read(path).plan) for path in (out, quiet.path)]
    assert rows[0].equals(rows[1])
    assert Store(out).table_file.read_bytes() == quiet.table_file.read_bytes()
