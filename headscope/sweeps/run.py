"""Running a sweep: chunks with their retries, resumed and stopped in good order; run inline."""

import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from headscope.base.files import FolderClaim, clear
from headscope.base.options import track
from headscope.errors import HeadscopeError, InputError, ModelLoadError
from headscope.sweeps.bench import Benches
from headscope.sweeps.config import SweepConfig
from headscope.sweeps.plan import Chunk, Plan
from headscope.sweeps.planner import config_digest, make_plan, manifest, portable_config
from headscope.sweeps.store import Store

ATTEMPTS = 3
Finished = Callable[[Chunk], None]


@dataclass(frozen=True)
class Work:
    """A sweep, ready to run its chunks."""

    config: SweepConfig
    plan: Plan
    store: Store
    benches: Benches


@dataclass
class Stop:
    """Whether somebody asked to stop after the chunk at hand."""

    asked: bool = False


@runtime_checkable
class Executor(Protocol):
    """Runs chunks of a sweep; each is committed by whoever ran it."""

    def __call__(self, work: Work, chunks: Sequence[Chunk], stop: Stop, finished: Finished) -> None:
        """Run chunks until all are done or a stop was asked for; tell each that is finished."""


def run_chunk(work: Work, chunk: Chunk) -> None:
    """Measure and commit one chunk; if it fails for good record the reason instead.

    What may pass (memory, disks, networks, devices) is tried three times, a pause between; what
    would fail the same way again is tried once.

    Raises:
        InputError: if a model is no longer the one that was planned with: no chunk of it can run.
        ModelLoadError: if it is no longer there.
    """
    reasons: list[str] = []
    said = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * attempt)
        if work.store.has(chunk.id):  # another process was faster
            return
        try:
            work.store.commit(chunk.id, work.benches.measure(work.plan, chunk))
            return
        except (InputError, ModelLoadError):
            raise
        except Exception as error:  # whatever it is, the other chunks go on
            reasons.append(reason(error))
            said = told(error)
            if not may_pass(error):
                break
    work.store.fail(chunk.id, reasons, said)


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help: an error of the machine, not of what was asked."""
    named = type(error).__name__
    out_of_memory = isinstance(error, MemoryError) or "OutOfMemory" in named
    device = named == "AcceleratorError" or (
        isinstance(error, RuntimeError)
        and any(word in str(error).lower() for word in ("out of memory", "cuda error", "nccl"))
    )
    return out_of_memory or device or isinstance(error, OSError)


def told(error: BaseException) -> str:
    """The traceback of an error, its files cut to where a package begins."""
    return _FOLDERS.sub(r"\1", "".join(traceback.format_exception(error)))


# The folders before the package of a source file, and those of any other absolute path.
_FOLDERS = re.compile(
    r"(?:/|[A-Za-z]:[\\/])(?:[^\s\"'<>:*?|]+?[\\/])??((?:site-packages|headscope)[\\/]"
    r"[^\s\"']+|[^\s\"'/\\]+(?=[\"'\s,;:.)]|$))"
)
_PAUSE = 0.5  # seconds


def reason(error: BaseException) -> str:
    """An error in one line."""
    said = _FOLDERS.sub(r"\1", " ".join(str(error).split())) or "no message"
    return said if isinstance(error, HeadscopeError) else f"{type(error).__name__}: {said}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        total: chunks of the sweep, or of this shard.
        done: of those.
        failed: chunks given up, and why.
        stopped: whether somebody stopped it.
        compacted: whether the table is written.
    """

    store: Store
    total: int
    done: int
    failed: Mapping[str, str]
    stopped: bool
    compacted: bool


def inline(work: Work, chunks: Sequence[Chunk], stop: Stop, finished: Finished) -> None:
    """Run chunks one after the other in this process."""
    for chunk in chunks:
        if stop.asked:
            return
        run_chunk(work, chunk)
        finished(chunk)


def run_sweep(
    config: SweepConfig,
    out: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    executor: Executor = inline,
    progress: bool | None = None,
    overwrite: bool = False,
    catch_signals: bool = False,
) -> Outcome:
    """Run a sweep, or what is left of it, into a folder.

    Finished chunks are kept: run it again to resume, also after a kill. Chunks that were given up
    are tried again. Interrupt it (Ctrl-C, or SIGTERM) and it finishes the chunk at hand; interrupt
    it twice and it stops at once; neither loses a finished chunk.

    Args:
        config: what is wanted; see :func:`headscope.sweeps.read_config`.
        out: the folder; several processes may share it.
        shard: ``(i, n)`` runs part i of n, from 1.
        executor: where the chunks are run; default: here.
        progress: show progress bars. Default: only in a terminal or notebook, after 2 s.
        catch_signals: end in good order after a signal, with ``stopped`` in the outcome, as the
            command line does. By default the signal goes on to your program once the chunk at
            hand is saved: ``KeyboardInterrupt`` after Ctrl-C, the end of the process or your own
            handler after SIGTERM.
        overwrite: replace what another run left in the folder; the same sweep is resumed.

    Raises:
        InputError: if the config does not fit a model, or the folder holds another run.

    Example:
        >>> import tempfile
        >>> import headscope as hs
        >>> config = hs.sweeps.SweepConfig(
        ...     name="small",
        ...     models=["tiny-gpt2"],
        ...     probes=[{"kind": "repeated_tokens", "length": 5, "batch": 2}],
        ...     edits=["zero"],
        ...     metrics=["loss"],
        ... )
        >>> with tempfile.TemporaryDirectory() as out:
        ...     outcome = hs.sweeps.run_sweep(config, out)
        ...     scores = hs.sweeps.read(out).scores()
        ...     hs.sweeps.status(out).cells_done, scores.mean.shape
        ...     hs.sweeps.export(out, "csv").name
        (12, (3, 4))
        'export.csv'
    """
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"there is no shard {shard[0]}/{shard[1]}: they count from 1.")
    _claim(config, Path(out), overwrite=overwrite)
    store = Store.create(Path(out))
    benches = Benches(config)
    plan = begun(config, store, benches, progress=progress)
    work = Work(config, plan, store, benches)
    mine = plan.shard(*shard)
    done = store.done()
    pending = [chunk for chunk in mine if chunk.id not in done]
    cells = sum(map(plan.count, pending))
    with (
        _stoppable(catch_signals) as stop,
        track(cells, f"sweeping {plan.name}", show=progress) as advance,
    ):
        if pending:
            executor(work, pending, stop, lambda one: advance(plan.count(one)))
    return outcome(store, plan, mine, stopped=stop.asked)


def _claim(config: SweepConfig, out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that another run wrote, or remove what it left there.

    Raises:
        InputError: if it holds another run, and that may not be replaced.
    """
    FolderClaim.create(out, "sweep", overwrite=overwrite)
    store = Store(out)
    if not overwrite:
        return
    try:
        same = store.manifest().get("digest") == config_digest(config)
    except InputError:
        same = False
    if not same:
        clear(out)


def begun(
    config: SweepConfig, store: Store, benches: Benches, *, progress: bool | None = None
) -> Plan:
    """The plan in the folder; made and written if it is the first time.

    Raises:
        InputError: if the folder holds another sweep.
    """
    if not store.manifest_file.exists():
        planned = make_plan(config, benches=benches, progress=progress)
        store.begin(manifest(config, planned))
    found = store.manifest()
    if found.get("digest") != config_digest(config):
        raise InputError(
            f"{store.path} holds a sweep with another config ({_difference(found, config)}): "
            "choose another folder, or replace it with overwrite=True (--overwrite)."
        )
    return store.plan()


def outcome(store: Store, plan: Plan, mine: Sequence[Chunk], *, stopped: bool = False) -> Outcome:
    """Where a sweep stands; compacts it if nothing is missing."""
    compacted = store.compact(plan)
    done, failed = store.done(), store.failed()
    ids = {chunk.id for chunk in mine}
    return Outcome(
        store=store,
        total=len(mine),
        done=len(ids & done),
        failed={chunk: why for chunk, why in failed.items() if chunk in ids},
        stopped=stopped and not ids <= done | failed.keys(),
        compacted=compacted,
    )


@contextmanager
def _stoppable(catch: bool) -> Iterator[Stop]:
    """Scope in which the first interrupt asks to stop and the second one stops.

    Unless it is caught, the signal is sent again at the end, to whoever handled it before.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    got: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        got.append(number)

    before = {one: signal.signal(one, on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if got and not catch:
        signal.raise_signal(got[0])


def _difference(found: Mapping[str, Any], config: SweepConfig) -> str:
    """Keys in which two configs differ."""
    there, here = found.get("config", {}), portable_config(config)
    names = sorted({*there, *here})
    return "differs in: " + ", ".join(n for n in names if there.get(n) != here.get(n))
