"""Ray executor for sweeps: one actor per device with a loaded model, chunks assigned when idle.

Workers write their results into the folder themselves; the driver only learns that a chunk is
finished, so nothing is lost when it dies. Ray restarts a worker that dies and runs its chunk again;
a chunk that killed three workers is recorded as failed.
"""

import os
import secrets
import signal
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headscope.errors import HeadscopeError, InputError
from headscope.sweeps.config import SweepConfig
from headscope.sweeps.plan import Chunk
from headscope.sweeps.run import ATTEMPTS, Benches, OnFinished, Stop, Work, reason, run_chunk
from headscope.sweeps.store import Store

# Seconds between the driver's checks for a requested stop.
_LOOK = 1.0
# How long a cluster may take to answer, in seconds.
_ANSWER = 10.0
# Names of sockets end after 107 characters; Ray adds this many to the temporary folder:
# /ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store
_LONGEST_SOCKET, _SOCKET = 107, 69


class Worker:
    """Ray actor that holds a model and runs chunks."""

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        """Read the plan; models are loaded when a chunk needs them."""
        read = SweepConfig.model_validate(config)
        store = Store.open(Path(folder))
        self._work = Work(read, store.plan(), store, Benches(read, store.scored))

    def run(self, chunk: str) -> str:
        """Run one chunk; returns the reason if it failed for good."""
        try:
            run_chunk(self._work, self._work.plan.by_id[chunk])
        except HeadscopeError as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class RayExecutor:
    """Run chunks on a Ray cluster: that of ``RAY_ADDRESS``, or a local one.

    A local cluster listens on the loopback interface, has no dashboard, and requires a token that
    only this process and its workers know.

    Attributes:
        workers: number of workers; default: one per GPU, or one per two cores.
    """

    workers: int | None = None

    def __call__(
        self, work: Work, chunks: Sequence[Chunk], stop: Stop, finished: OnFinished
    ) -> None:
        """Run the chunks.

        Raises:
            InputError: if Ray is not installed.
            HeadscopeError: if a model has changed since it was planned.
        """
        work.benches.drop()  # the driver needs no model, and a GPU has room for one
        with _cluster(self.workers) as ray:
            count, devices = _workers(ray, self.workers)
            actor = ray.remote(Worker).options(
                max_restarts=-1,  # as often as it takes: each chunk has its own limit
                max_task_retries=ATTEMPTS - 1,
                **devices,
            )
            config = work.config.model_dump(mode="json")
            folder = str(work.store.path.resolve())
            actors = [actor.remote(config, folder) for _ in range(min(count, len(chunks)))]
            _drive(ray, actors, work, chunks, stop, finished)


def _drive(
    ray: Any,
    actors: list[Any],
    work: Work,
    chunks: Sequence[Chunk],
    stop: Stop,
    finished: OnFinished,
) -> None:
    """Assign chunks to idle actors until none are left."""
    waiting = list(chunks)
    held: dict[int, int] = {}
    running: dict[Any, tuple[int, Chunk]] = {}
    free = list(range(len(actors)))
    while running or (waiting and not stop.asked):
        while free and waiting and not stop.asked:
            number = free.pop()
            chunk = _next(work, waiting, held.get(number), Counter(held.values()))
            held[number] = work.plan.model_of(chunk)
            running[actors[number].run.remote(chunk.id)] = (number, chunk)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK)
        for reference in ready:
            number, chunk = running.pop(reference)
            free.append(number)
            try:
                fatal = ray.get(reference)
            except ray.exceptions.RayError as error:
                if getattr(error, "actor_init_failed", False):
                    raise HeadscopeError(f"a worker could not start: {reason(error)}") from error
                died = f"its worker died {ATTEMPTS} times ({reason(error)[:300]})"
                work.store.fail(chunk.id, [died])
                fatal = ""
            if fatal:
                raise HeadscopeError(fatal)
            finished(chunk)


def _next(work: Work, waiting: list[Chunk], held: int | None, loaded: Counter[int]) -> Chunk:
    """Next chunk for an actor: of its own model, else of the model with most work per actor."""
    left = Counter(work.plan.model_of(chunk) for chunk in waiting)
    model = held if held in left else max(left, key=lambda one: left[one] / (1 + loaded[one]))
    chosen = next(chunk for chunk in waiting if work.plan.model_of(chunk) == model)
    waiting.remove(chosen)
    return chosen


def _workers(ray: Any, wanted: int | None) -> tuple[int, dict[str, Any]]:
    """Number of actors, and the resources of each: as many as fit at once."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if gpus:
        count = wanted or gpus
        return count, {"num_gpus": 1 / -(-count // gpus), "num_cpus": 0}
    count = min(wanted or max(1, sum(cpus) // 2), max(1, sum(cpus)))
    shares = range(max(cpus, default=1), 0, -1)
    each = next((share for share in shares if sum(n // share for n in cpus) >= count), 1)
    return count, {"num_cpus": each}


@contextmanager
def _cluster(workers: int | None) -> Iterator[Any]:
    """Connect to Ray; a local cluster is shut down on exit.

    Ray reads its environment on import and keeps the token, so both stay set.
    """
    joined = "RAY_ADDRESS" in os.environ
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # not behind everything else on a shared box
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not joined:
        # Its name speaks of other systems, but everywhere it is what makes Ray bind to loopback:
        # asked for 127.0.0.1 it would look for an address that others can reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise InputError("Ray is not installed: pip install 'headscope[ray]'.") from None
    if ray.is_initialized():  # the caller's own; theirs to end
        yield ray
        return
    if joined:
        check_address(os.environ["RAY_ADDRESS"])
    else:
        check_temporary(Path(tempfile.gettempdir()))
    own = OWN | {"num_cpus": max(os.cpu_count() or 1, workers or 1)}
    with _handlers_kept():
        try:
            ray.init(**(JOINED if joined else own))
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"Ray does not start: {reason(error)[:300]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse a cluster address that does not answer, for which Ray would wait minutes.

    Raises:
        InputError: if nothing listens there.
    """
    place = address.rpartition("://")[2].partition("/")[0]
    host, _, port = place.rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto", "local" or a name that Ray resolves itself
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER):
            return
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start it with "
            "'ray start --head', or unset RAY_ADDRESS to run on this machine alone."
        ) from error


def check_temporary(folder: Path) -> None:
    """Refuse a temporary folder whose name is too long for Ray's sockets.

    Raises:
        InputError: with the folder and what to do.
    """
    if os.name == "posix" and len(str(folder)) + _SOCKET > _LONGEST_SOCKET:
        raise InputError(
            f"Ray cannot keep its sockets in {folder}: the name is {len(str(folder))} characters "
            f"long, and it takes {_LONGEST_SOCKET - _SOCKET} at most. Set TMPDIR=/tmp."
        )


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Context manager that restores signal handlers, since Ray installs its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


# A cluster of our own: no dashboard. One that exists has its own settings.
OWN: dict[str, Any] = {
    "address": "local",
    "include_dashboard": False,
    "dashboard_host": "127.0.0.1",
    "log_to_driver": False,
    "logging_level": "error",
}
JOINED: dict[str, Any] = {"address": "auto", "log_to_driver": False, "logging_level": "error"}
