"""What every executor shares: the sweep at hand, one chunk with its retries, and the stop sign."""

import re
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from headscope.errors import HeadscopeError, InputError, ModelLoadError
from headscope.sweeps.bench import Benches
from headscope.sweeps.config import SweepConfig
from headscope.sweeps.plan import Chunk, Plan
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
