"""What every executor shares: the sweep at hand, one chunk with its retries, and the stop sign."""

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
    """Measure and commit one chunk; after three failures record the reason instead.

    Raises:
        InputError: if a model is no longer the one that was planned with: no chunk of it can run.
        ModelLoadError: if it is no longer there.
    """
    reasons: list[str] = []
    for _ in range(ATTEMPTS):
        if work.store.has(chunk.id):  # another process was faster
            return
        try:
            work.store.commit(chunk.id, work.benches.measure(work.plan, chunk))
            return
        except (InputError, ModelLoadError):
            raise
        except Exception as error:  # whatever it is, the other chunks go on
            reasons.append(reason(error))
    work.store.fail(chunk.id, reasons)


def reason(error: BaseException) -> str:
    """An error in one line."""
    said = " ".join(str(error).split()) or "no message"
    return said if isinstance(error, HeadscopeError) else f"{type(error).__name__}: {said}"
