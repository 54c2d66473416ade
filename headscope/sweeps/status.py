"""Where a sweep stands, read from its folder alone: no model, no lock, any time."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headscope.sweeps.store import Store


@dataclass(frozen=True)
class Status:
    """Counts of a sweep.

    Attributes:
        name: of the sweep.
        total: chunks in all.
        done: chunks finished.
        failed: chunks given up so far, and why; running the sweep again tries them again.
        cells: rows of the whole table: sets of heads, with each metric.
        cells_done: of those.
        models: model -> chunks done and in all.
        compacted: whether everything is in one table.
        left_seconds: at the pace of the parts so far; None if that cannot be told, or if nothing
            was finished in the time of the last ten parts.
    """

    name: str
    total: int
    done: int
    failed: Mapping[str, str]
    cells: int
    cells_done: int
    models: Mapping[str, tuple[int, int]]
    compacted: bool
    left_seconds: float | None

    @property
    def pending(self) -> int:
        """Chunks neither done nor given up."""
        return self.total - self.done - len(self.failed)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return asdict(self) | {"pending": self.pending}


def status(folder: str | Path) -> Status:
    """Read how far a sweep is.

    Raises:
        InputError: if the folder holds no sweep.

    Example:
        >>> hs.sweeps.status("runs/ioi-all-heads").pending  # doctest: +SKIP
        0
    """
    store = Store.open(Path(folder))
    plan, done, failed = store.plan(), store.done(), store.failed()
    inside = store.compacted()
    finished = [chunk for chunk in plan.chunks if chunk.id in done]
    models: dict[str, tuple[int, int]] = {}
    for chunk in plan.chunks:
        label = plan.models[plan.model_of(chunk)].label
        known, total = models.get(label, (0, 0))
        models[label] = (known + (chunk.id in done), total + 1)
    pending = len(plan.chunks) - len(finished) - len(failed)
    return Status(
        name=plan.name,
        total=len(plan.chunks),
        done=len(finished),
        failed=failed,
        cells=plan.n_cells,
        cells_done=sum(map(plan.count, finished)),
        models=models,
        compacted=set(plan.by_id) <= inside,
        left_seconds=_left(store, pending),
    )


def _left(store: Store, pending: int) -> float | None:
    """Seconds left at the pace of the last ten parts."""
    times = []
    for part in (store.path / "parts").glob("*.parquet"):
        try:
            times.append(part.stat().st_mtime)
        except FileNotFoundError:  # compacted meanwhile
            continue
    recent = sorted(times)[-10:]
    if not pending or len(recent) < 2:
        return None
    span = recent[-1] - recent[0]
    if time.time() - recent[-1] > max(10 * span, 60.0):
        return None  # no worker is running
    return pending * span / (len(recent) - 1)
