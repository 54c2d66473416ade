"""Ray executor for sweeps: one actor per device with a loaded model, chunks assigned when idle.

Workers write their results into the folder themselves; the driver only learns that a chunk is
finished, so nothing is lost when it dies. Ray restarts a worker that dies and runs its chunk again;
a chunk that killed three workers is recorded as failed.
"""

import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from headscope.errors import HeadscopeError, InputError
from headscope.sweeps.config import SweepConfig
from headscope.sweeps.plan import Chunk, Plan
from headscope.sweeps.run import (
    ATTEMPTS,
    Benches,
    OnFinished,
    Stop,
    Work,
    passes_of_chunk,
    reason,
    run_chunk,
)
from headscope.sweeps.store import Store

# Seconds between the driver's checks for a requested stop.
_LOOK = 1.0
# How long a cluster may take to be reached, and again to answer, in seconds.
_ANSWER = 8.0
# What a client says first in HTTP/2 (RFC 9113, 3.4): preface and empty settings. Then the length of
# the header of a frame, and the type of frame that a server must say first.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME, _SETTINGS = 9, 4
_NO_RAY = "Ray is not installed: pip install 'headscope[ray]'."
# Names of sockets end after 107 characters; Ray adds this many to the temporary folder:
# /ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store
_LONGEST_SOCKET, _SOCKET = 107, 69


class Worker:
    """Ray actor that holds a model and runs chunks."""

    def __init__(self, config: dict[str, Any], folder: str, threads: int | None = None) -> None:
        """Read the plan; models are loaded when a chunk needs them.

        Args:
            config: config of the sweep.
            folder: of the sweep.
            threads: cores of this worker; None: as torch has it.
        """
        if threads is not None:  # an inherited OMP_NUM_THREADS would be for the whole machine
            torch.set_num_threads(min(threads, torch.get_num_threads()))
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

    def check(self) -> None:
        """Refuse what cannot work, before any model is loaded.

        Raises:
            InputError: if Ray is not installed, or no cluster answers at ``RAY_ADDRESS``.
        """
        if "ray" not in sys.modules and find_spec("ray") is None:
            raise InputError(_NO_RAY)
        if "RAY_ADDRESS" in os.environ:
            check_address(os.environ["RAY_ADDRESS"])

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
            count, resources = _workers(ray, self.workers)
            actor = ray.remote(Worker).options(
                max_restarts=-1,  # as often as it takes: each chunk has its own limit
                max_task_retries=ATTEMPTS - 1,
                **resources,
            )
            threads = resources["num_cpus"] or None
            config = work.config.model_dump(mode="json")
            folder = str(work.store.path.resolve())
            actors = [actor.remote(config, folder, threads) for _ in range(min(count, len(chunks)))]
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
    waiting = Waiting.of(work.plan, chunks)
    held: dict[int, int] = {}
    running: dict[Any, tuple[int, Chunk]] = {}
    free = list(range(len(actors)))
    while running or (waiting and not stop.asked):
        while free and waiting and not stop.asked:
            number = free.pop()
            chunk = waiting.take(held.get(number), Counter(held.values()))
            held[number] = chunk.study
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


@dataclass
class Waiting:
    """Chunks that are left, by group of cells, the most expensive of each group first.

    A worker keeps its model and, within it, its group, whose reference values and validations it
    has. Otherwise it goes where most work is left per worker. With the expensive chunks first, the
    last ones are short, and no worker waits long for another at the end.

    Attributes:
        plan: of the sweep.
        groups: chunks with their costs in whole passes, by number of the group.
        left: cost that is left, by number of the group.
    """

    plan: Plan
    groups: dict[int, deque[tuple[float, Chunk]]]
    left: dict[int, float]

    @classmethod
    def of(cls, plan: Plan, chunks: Sequence[Chunk]) -> "Waiting":
        """Sort chunks by group and cost."""
        groups: dict[int, list[tuple[float, Chunk]]] = {}
        for chunk in chunks:
            groups.setdefault(chunk.study, []).append((passes_of_chunk(plan, chunk), chunk))
        by_cost = {
            number: deque(sorted(group, key=lambda one: -one[0]))
            for number, group in groups.items()
        }
        left = {number: sum(cost for cost, _ in group) for number, group in groups.items()}
        return cls(plan, by_cost, left)

    def __bool__(self) -> bool:
        """Whether any are left."""
        return bool(self.groups)

    def take(self, held: int | None, workers: Mapping[int, int]) -> Chunk:
        """Remove the next chunk for a worker.

        Args:
            held: number of the group that it ran last; None: it has no model yet.
            workers: number of workers by the group that they ran last.
        """
        number = (
            held if held in self.groups else self._most_work(self._choices(held, workers), workers)
        )
        cost, chunk = self.groups[number].popleft()
        self.left[number] -= cost
        if not self.groups[number]:
            del self.groups[number], self.left[number]
        return chunk

    def _choices(self, held: int | None, workers: Mapping[int, int]) -> list[int]:
        """Groups of the model that a worker has, else of the model with most work per worker."""
        models: dict[int, list[int]] = {}
        for number in self.groups:
            models.setdefault(self._model(number), []).append(number)
        if held is not None and self._model(held) in models:
            return models[self._model(held)]
        loaded: Counter[int] = Counter()
        for number, count in workers.items():
            loaded[self._model(number)] += count

        def per_worker(model: int) -> float:
            return sum(self.left[one] for one in models[model]) / (1 + loaded[model])

        return models[max(models, key=per_worker)]

    def _most_work(self, numbers: Sequence[int], workers: Mapping[int, int]) -> int:
        return max(numbers, key=lambda one: self.left[one] / (1 + workers.get(one, 0)))

    def _model(self, number: int) -> int:
        return self.plan.studies[number].model


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
        raise InputError(_NO_RAY) from None
    if ray.is_initialized():  # the caller's own; theirs to end
        yield ray
        return
    if not joined:
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

    Ray's servers speak gRPC, which begins with a frame of HTTP/2 settings from either side; with
    TLS (``RAY_USE_TLS``) only the connection is tried.

    Raises:
        InputError: if nothing listens there, or what does is stopped or not a Ray cluster.
    """
    place = address.rpartition("://")[2].partition("/")[0]
    host, _, port = place.rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto", "local" or a name that Ray resolves itself
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as there:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            there.sendall(_GREETING)
            said = there.makefile("rb").read(_FRAME)
    except (OSError, OverflowError) as error:
        said, why = b"", str(error)
    else:
        why = "what listens there is something else" if said else "it hangs up"
    if len(said) < _FRAME or said[3] != _SETTINGS:
        raise InputError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({why}): start it with "
            "'ray start --head', or unset RAY_ADDRESS to run on this machine alone."
        )


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
