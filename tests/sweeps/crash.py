"""Kill a sweep again and again, at random moments, and see what its folder becomes.

Run as a program: ``python -m tests.sweeps.crash OUT SEED KILLS``. Loading torch takes seconds, so
one process loads everything and forks a child per attempt; the child runs the sweep and is
killed, half of the time after a random while and half of the time by itself inside a random
step of the store: before or after a sync, a rename, a link, an unlink, or with half of a
file written. Prints JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from headscope.sweeps import SweepConfig, make_plan, run_sweep
from headscope.sweeps import run as running
from headscope.sweeps.run import Benches
from tests.sweeps.support import config

# Steps of the store that a child may die in. A chunk takes about six.
_STEPS = 60


def crash_config() -> SweepConfig:
    """Sixty chunks of one cell."""
    return config(edits=["zero", "mean", "mean_pos", "uniform", "attend_to_first"], chunk=1)


def forked(action: Callable[[], object]) -> int:
    """Process that does something and ends."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def waited(process: int) -> int | None:
    """Signal that ended a process; None if it ended well."""
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "a child failed by itself"
    return None


def dying(number: int, after: bool, note: Path) -> None:
    """Let this process kill itself in the store's step of this number."""
    left = [number]

    def die(name: str) -> None:
        note.write_text(name)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **words: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                die(f"before {name}")
            result = function(*arguments, **words)
            if left[0] == 0:
                die(f"after {name}")
            return result

        return step

    write = pyarrow.parquet.write_table

    def half(table: Any, file: Any, **words: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            file.write(b"PAR1" + bytes(500))
            file.flush()
            die("half of a file")
        write(table, file, **words)

    pyarrow.parquet.write_table = half
    os.fsync = wrapped("fsync", os.fsync)
    os.link = wrapped("link", os.link)
    Path.replace = wrapped("rename", Path.replace)
    Path.unlink = wrapped("unlink", Path.unlink)


def whole(folder: Path) -> bool:
    """Whether every file under its own name is complete."""
    files = [*folder.glob("parts/*.parquet"), *folder.glob("table.parquet")]
    ends = (file.read_bytes() for file in files)
    return all(data[:4] == data[-4:] == b"PAR1" for data in ends)


def _nothing() -> None:
    """Live."""


def _attempt(arm: Callable[[], None], wanted: SweepConfig, folder: Path) -> None:
    arm()
    run_sweep(wanted, folder, progress=False)


def main(out: Path, seed: int, kills: int) -> dict[str, Any]:
    """Kill, resume, kill; compare every folder that is finished with the uninterrupted one."""
    torch.set_num_threads(1)
    wanted = crash_config()
    warm = Benches(wanted)
    make_plan(wanted, benches=warm)
    running.Benches = lambda *_: warm  # children start with the model in memory
    started = time.monotonic()
    reference = out / "reference"
    assert waited(forked(lambda: run_sweep(wanted, reference, progress=False))) is None
    lasted = time.monotonic() - started
    expected = (reference / "table.parquet").read_bytes()
    chance, landed, finished = random.Random(seed), Counter[str](), 0
    folder, note = out / "0", out / "note"
    while True:
        note.unlink(missing_ok=True)
        last = sum(landed.values()) >= kills
        inside, number, after = chance.random() < 0.5, chance.randint(1, _STEPS), chance.random()
        delay = chance.uniform(0, lasted / 6)
        arm = partial(dying, number, after < 0.5, note) if inside and not last else _nothing
        child = forked(partial(_attempt, arm, wanted, folder))
        if not inside and not last:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        if waited(child) is not None:
            landed[note.read_text() if note.exists() else "after a while"] += 1
            assert whole(folder), "a file is not whole"
            continue
        assert (folder / "table.parquet").read_bytes() == expected, "another table"
        assert not list((folder / "parts").iterdir()), "something was left behind"
        finished += 1
        if last:
            return {"kills": dict(landed), "finished": finished, "seconds": lasted}
        folder = out / str(finished)


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(found))
