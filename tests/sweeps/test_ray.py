"""Ray for real: two workers, a driver killed, workers killed, and the table of a quiet run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from headscope.errors import InputError
from headscope.models import bundled
from headscope.sweeps import RayExecutor, SweepConfig, run_sweep, status
from headscope.sweeps.store import Store
from tests.conftest import ROOT
from tests.sweeps.support import REPEATED, config
from tests.sweeps.test_crash import start, wait_for_parts

pytest.importorskip("ray")

# The third chunk takes its worker with it once; the fifth one always does.
DEADLY = """
import os, pathlib, sys
from headscope.sweeps import RayExecutor, cluster, read_config, run_sweep
from headscope.sweeps.store import Store

file, out, once, always, mark = sys.argv[1:]
Worker = cluster.Worker

class Deadly(Worker):
    def run(self, chunk):
        met = pathlib.Path(mark)
        if chunk == always or (chunk == once and not met.exists()):
            if chunk == once:
                met.touch()
            os.kill(os.getpid(), 9)
        return Worker.run(self, chunk)

cluster.Worker = Deadly
outcome = run_sweep(read_config(file), out, executor=RayExecutor(2))
assert not outcome.compacted
"""


@pytest.fixture(scope="module")
def wanted() -> SweepConfig:
    first, *_, last = bundled.checkpoints("tiny-gpt2")
    return config(
        models=[{"model": "tiny-gpt2", "checkpoints": [first, last]}],
        probes=[REPEATED | {"length": 20, "batch": 16}],
        edits=["zero", "mean"],
        chunk=2,
    )


@pytest.fixture
def ended() -> Iterator[list[psutil.Process]]:
    """Processes that are gone when the test is over, one way or the other."""
    known: list[psutil.Process] = []
    yield known
    _, alive = psutil.wait_procs(known, timeout=150)  # its agents take a minute to notice
    for process in alive:
        process.kill()
    assert not alive, "a cluster outlived its driver"


def test_killed_drivers_and_workers_lose_nothing(
    tmp_path: Path, wanted: SweepConfig, ended: list[psutil.Process]
) -> None:
    file, out, mark = tmp_path / "sweep.yaml", tmp_path / "ray", tmp_path / "mark"
    file.write_text(yaml.safe_dump(wanted.model_dump(mode="json", exclude_none=True)))
    quiet = run_sweep(wanted, tmp_path / "quiet").store
    driver = start(file, out, "--executor", "ray", "--workers", "2")
    wait_for_parts(out, driver)
    ended += psutil.Process(driver.pid).children(recursive=True)
    check_closed(ended)
    driver.kill()
    driver.communicate()
    before = status(out)
    assert before.done > 0
    plan = Store(out).plan()
    missing = [chunk.id for chunk in plan.chunks if chunk.id not in Store(out).done()]
    assert len(missing) > 6, "the driver was killed too late to tell anything"
    code = [sys.executable, "-c", DEADLY, file, out, missing[2], missing[4], mark]
    done = subprocess.run(
        list(map(str, code)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    after = status(out)
    assert set(after.failed) == {missing[4]}
    assert "its worker died 3 times" in after.failed[missing[4]]
    assert (after.done, after.pending) == (23, 0)
    assert run_sweep(wanted, out).compacted
    assert Store(out).table_file.read_bytes() == quiet.table_file.read_bytes()


def check_closed(processes: list[psutil.Process]) -> None:
    """Look at the cluster from outside: no dashboard, nothing but loopback, tokens."""
    environments, listening = [], []
    for process in processes:
        try:
            if process.name() in ("gcs_server", "raylet"):  # others overwrite what they show of it
                environments.append(process.environ())
            listening += [one for one in process.net_connections("tcp") if one.status == "LISTEN"]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    assert len(environments) == 2
    assert all(one["RAY_AUTH_MODE"] == "token" for one in environments)
    assert all(len(one["RAY_AUTH_TOKEN"]) == 64 for one in environments)
    assert 8265 not in {one.laddr.port for one in listening}
    assert {one.laddr.ip for one in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_without_ray_there_is_a_sentence(
    tmp_path: Path, wanted: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_USAGE_STATS_ENABLED",
        "RAY_worker_niceness",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'headscope\[ray\]'"):
        run_sweep(wanted, tmp_path, executor=RayExecutor(2))
