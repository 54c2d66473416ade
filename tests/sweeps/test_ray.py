"""Ray for real: two workers, a driver killed, workers killed, and the table of a quiet run."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from headscope.errors import InputError
from headscope.models import bundled
from headscope.sweeps import RayExecutor, SweepConfig, run_sweep, status
from headscope.sweeps.plan import Chunk
from headscope.sweeps.run import OnFinished, Stop, Work, inline
from headscope.sweeps.store import Store
from tests.conftest import ROOT
from tests.sweeps.support import REPEATED, config
from tests.sweeps.test_crash import wait_until

pytest.importorskip("ray")

# One chunk takes its worker with it once, another one always does, a third one never ends.
DEADLY = """
import os, pathlib, sys, time
from headscope.sweeps import RayExecutor, cluster, read_config, run_sweep

file, out, once, always, endless, mark = sys.argv[1:]
Worker = cluster.Worker

class Deadly(Worker):
    def run(self, chunk):
        met = pathlib.Path(mark)
        if chunk == always or (chunk == once and not met.exists()):
            if chunk == once:
                met.touch()
            os.kill(os.getpid(), 9)
        if chunk == endless:
            time.sleep(600)
        return Worker.run(self, chunk)

cluster.Worker = Deadly
run_sweep(read_config(file), out, executor=RayExecutor(2))
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


@pytest.fixture(scope="session")
def ended() -> Iterator[list[psutil.Process]]:
    """Processes that are gone when all tests are over, one way or the other."""
    known: list[psutil.Process] = []
    yield known
    _, alive = psutil.wait_procs(known, timeout=150)  # its agents take a minute to notice
    for process in alive:
        process.kill()
    assert not alive, "a cluster outlived its driver"


def test_killed_drivers_and_workers_lose_nothing(
    tmp_path: Path, wanted: SweepConfig, ended: list[psutil.Process]
) -> None:
    """A sweep that stops by half goes on on Ray, where workers die, and then the driver."""
    file, out, mark = tmp_path / "sweep.yaml", tmp_path / "ray", tmp_path / "mark"
    file.write_text(yaml.safe_dump(wanted.model_dump(mode="json", exclude_none=True)))
    quiet = run_sweep(wanted, tmp_path / "quiet").store
    run_sweep(wanted, out, executor=first_ones)
    plan, begun = Store(out).plan(), Store(out).done()
    assert len(begun) == 4
    once, always, endless = (plan.chunks[at].id for at in (5, 7, -1))
    code = [sys.executable, "-c", DEADLY, file, out, once, always, endless, mark]
    driver = subprocess.Popen(list(map(str, code)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: Store(out).done() > begun, driver)
    ended += psutil.Process(driver.pid).children(recursive=True)
    check_closed(ended)
    wait_until(lambda: always in Store(out).failed(), driver)
    wait_until(lambda: len(Store(out).done()) == len(plan.chunks) - 2, driver)
    ended += psutil.Process(driver.pid).children(recursive=True)  # workers that came later
    driver.kill()
    driver.communicate()
    left = status(out)
    assert mark.exists()
    assert once in Store(out).done()
    assert (left.done, left.pending) == (len(plan.chunks) - 2, 1)
    assert set(left.failed) == {always}
    assert "its worker died 3 times" in left.failed[always]
    assert run_sweep(wanted, out).compacted
    assert Store(out).table_file.read_bytes() == quiet.table_file.read_bytes()


def first_ones(work: Work, chunks: Sequence[Chunk], stop: Stop, finished: OnFinished) -> None:
    """Run four chunks."""
    inline(work, chunks[:4], stop, finished)


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
