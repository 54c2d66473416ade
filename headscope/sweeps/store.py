"""Storage of a sweep: one Parquet file per finished chunk, written atomically.

The status of a sweep follows from its folder alone: without a model or a lock, at any time.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from headscope.base.arguments import checked
from headscope.base.files import (
    read_part,
    readable,
    subfolder,
    sync_folder,
    whole_file,
    writable_folder,
)
from headscope.base.statistics import Design, compare_means, mean_and_sem
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.sweeps.plan import (
    FORMAT,
    CellGroup,
    Chunk,
    Plan,
    PlannedModel,
    heads_text,
    plan_from_json,
)

if TYPE_CHECKING:
    import pyarrow


_IDS = b"headscope.chunks"
_MANIFEST = b"headscope.manifest"
_AGAIN = "run the sweep again"
_PATIENCE = 10
_WAIT = 0.01  # seconds, doubled each time
# How often a file is tried: disks of networks are away at times.
_TRIES = 3
_PAUSE = 0.2  # seconds between tries


@dataclass(frozen=True)
class Store:
    """The folder of one sweep."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> "Store":
        """Create the folder.

        Raises:
            InputError: if it is not writable.
        """
        writable_folder(path)
        for name in ("parts", "failed"):
            subfolder(path, name)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open a folder that holds a sweep.

        Raises:
            InputError: if it does not.
        """
        store = cls(path)
        if not store.manifest_file.exists():
            raise InputError(f"{path} holds no sweep: there is no manifest.json in it.")
        return store

    @property
    def manifest_file(self) -> Path:
        """Path of the manifest."""
        return self.path / "manifest.json"

    @property
    def table_file(self) -> Path:
        """Path of the table of all rows, written when every chunk is finished."""
        return self.path / "table.parquet"

    @property
    def scored(self) -> Path:
        """Folder for finished batches of edge scores of chunks in progress."""
        return self.path / "scored"

    def part(self, chunk: str) -> Path:
        """Path of one chunk's file."""
        return self.path / "parts" / f"{chunk}.parquet"

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, unless another process did so first."""
        # A line per key: a plan of many cells is written and read several times as fast in one.
        lines = (f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in manifest.items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        beside = self.path / f".manifest.{secrets.token_hex(4)}.tmp"
        _write(beside, lambda file: file.write(text.encode()))
        try:
            os.link(beside, self.manifest_file)  # unlike a rename, never replaces
        except FileExistsError:
            pass
        except OSError:  # a disk without hard links
            if not self.manifest_file.exists():
                beside.replace(self.manifest_file)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(self.path)

    def manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            InputError: if it is unreadable, or of another version.
        """
        try:
            found = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            version = found["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.manifest_file} is not a readable manifest: {error!r}"
            ) from None
        if version != FORMAT:
            raise InputError(
                f"{self.path} was written in format {version}; this version reads {FORMAT}."
            )
        assert isinstance(found, dict)  # noqa: S101  # it has keys
        return found

    def plan(self) -> Plan:
        """The plan in the manifest."""
        try:
            return plan_from_json(self.manifest()["plan"])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.manifest_file} is damaged: {error!r}") from None

    def has(self, chunk: str) -> bool:
        """Whether a chunk is finished."""
        return self.part(chunk).exists() or chunk in self.compacted()

    def done(self) -> frozenset[str]:
        """Finished chunks."""
        # Parts first: one that vanishes meanwhile is in the table by then.
        parts = {file.stem for file in (self.path / "parts").glob("*.parquet")}
        return frozenset(parts | self.compacted())

    def compacted(self) -> frozenset[str]:
        """Chunks in the compacted table."""
        from pyarrow import parquet

        try:
            with readable(self.table_file, again=_AGAIN):
                found = parquet.read_schema(self.table_file).metadata or {}
                return frozenset(json.loads(found.get(_IDS, b"[]")))
        except FileNotFoundError:
            return frozenset()

    def commit(self, chunk: str, rows: "pyarrow.Table") -> None:
        """Save a finished chunk atomically.

        Raises:
            InputError: if it cannot be written.
        """
        from pyarrow import parquet

        _write(self.part(chunk), lambda file: parquet.write_table(rows, file, compression="zstd"))
        (self.path / "failed" / f"{chunk}.json").unlink(missing_ok=True)

    def fail(self, chunk: str, reasons: list[str], traceback: str = "") -> None:
        """Record why a chunk failed, unless another process finished it.

        Args:
            chunk: its id.
            reasons: one line per attempt.
            traceback: traceback of the last attempt, without local folders.
        """
        if self.has(chunk):
            return
        facts: dict[str, Any] = {
            "chunk": chunk,
            "attempts": len(reasons),
            "reason": reasons[-1],
            "all": reasons,
        }
        facts["traceback"] = traceback.splitlines()
        text = json.dumps(facts, indent=1).encode() + b"\n"
        _write(self.path / "failed" / f"{chunk}.json", lambda file: file.write(text))

    def failed(self) -> dict[str, str]:
        """Failed chunks with reasons, except those that were finished later."""
        found, done = {}, self.done()
        for file in sorted((self.path / "failed").glob("*.json")):
            try:
                facts = json.loads(file.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                continue  # done meanwhile
            if file.stem not in done:
                found[file.stem] = str(facts.get("reason", "unknown"))
        return found

    def rows(self, plan: Plan) -> "pyarrow.Table":
        """All rows so far, in the order of the plan, each chunk once."""
        for attempt in range(_PATIENCE):
            if attempt:
                time.sleep(min(_WAIT * 2**attempt, 1.0))  # a part has just become the table
            if set(plan.by_id) <= self.compacted():
                return read_part(self.table_file, again=_AGAIN)
            try:
                rows = self._parts(plan)
            except FileNotFoundError:
                continue
            if not set(plan.by_id) <= self.compacted():
                return rows
            # Compacted between two looks: look again.
        raise InputError(f"{self.path} changes faster than it can be read: try again.")

    def _parts(self, plan: Plan) -> "pyarrow.Table":
        """Rows of all existing parts."""
        import pyarrow

        there = {file.stem for file in (self.path / "parts").glob("*.parquet")}
        files = [self.part(chunk.id) for chunk in plan.chunks if chunk.id in there]
        empty = row_schema().empty_table()
        tables = [self._part(file, row_schema()) for file in files]
        return pyarrow.concat_tables([empty, *tables]).unify_dictionaries()

    def _part(self, file: Path, schema: "pyarrow.Schema") -> "pyarrow.Table":
        """Rows of one part."""
        with readable(file, again=_AGAIN):
            return read_part(file, again=_AGAIN).cast(schema)

    def compact(self, plan: Plan) -> bool:
        """Join all parts to one table once every chunk is finished; returns whether it exists.

        Several processes may do this at once, since all write the same content.
        """
        from pyarrow import parquet

        ids = [chunk.id for chunk in plan.chunks]
        if not set(ids) <= self.compacted():
            if not set(ids) <= self.done():
                return False
            rows = self.rows(plan)
            facts = {_IDS: json.dumps(ids), _MANIFEST: self.manifest()["digest"]}
            table = rows.replace_schema_metadata(facts)
            _write(
                self.table_file,
                lambda file: parquet.write_table(table, file, compression="zstd"),
            )
        for chunk in ids:
            self.part(chunk).unlink(missing_ok=True)
        for left in (self.path / "parts").glob(".*.tmp"):  # of processes that were killed
            left.unlink(missing_ok=True)
        for kept in self.scored.glob("*.npy"):
            kept.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or another process just wrote into it
            self.scored.rmdir()
        return True


def _write(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically.

    Raises:
        InputError: if the disk refuses it.
    """
    for left in reversed(range(_TRIES)):
        if left < _TRIES - 1:
            time.sleep(_PAUSE)
        try:
            with whole_file(file) as opened:
                write(opened)
            return
        except OSError as error:
            if not left:
                raise InputError(
                    f"cannot write {file}: {error.strerror or error}. Finished chunks are "
                    "kept: fix the problem, and run the same command again to resume."
                ) from error


# Columns that name a cell; together they are unique in a sweep.
KEYS = ("model", "checkpoint", "probe", "edit", "seed", "metric", "set", "draw", "heads")


def row_schema() -> "pyarrow.Schema":
    """Columns of a part and of the whole table.

    ``model checkpoint probe edit seed metric set draw`` identify the run; ``heads`` were edited
    jointly, ``count`` of them; ``layer`` and ``head`` are filled for a single head. For edges
    ``edit`` is the method, ``set`` is ``edges`` or the circuit, and ``heads`` lists the removed
    edges, or the edges of the circuit, separated by commas. ``effect`` is metric(edited) -
    metric(clean), a mean over ``n`` examples with its standard error ``sem`` and the two-sided
    ``p_value`` of no effect; ``clean`` is the mean metric of the unedited run. ``effects`` and
    ``clean_values`` hold them per example, ``provenance`` is JSON.
    """
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    numbers = pa.list_(pa.float64())
    columns = {
        **dict.fromkeys(("model", "checkpoint", "probe", "edit"), word),
        "seed": pa.int64(),
        **dict.fromkeys(("metric", "unit", "set"), word),
        "draw": pa.int32(),
        "heads": pa.string(),
        **dict.fromkeys(("count", "layer", "head", "n"), pa.int32()),
        **dict.fromkeys(("effect", "sem", "p_value", "clean"), pa.float64()),
        "effects": numbers,
        "clean_values": numbers,
        "provenance": word,
    }
    return pa.schema(list(columns.items()))


class RowName(NamedTuple):
    """Subject of a row: edited heads, an edge, or a circuit.

    Attributes:
        set: name of the set.
        draw: number of the draw of a random set.
        heads: heads or edges, as text.
        size: number of these.
        alone: the head, if it is a single one.
    """

    set: str
    draw: int
    heads: str
    size: int
    alone: HeadIndex | None = None


def names_of(chunk: Chunk) -> list[RowName]:
    """Subjects of rows for edited heads."""
    return [
        RowName(
            cell.set,
            cell.draw,
            heads_text(cell.heads),
            len(cell.heads),
            cell.heads[0] if len(cell.heads) == 1 else None,
        )
        for cell in chunk.cells
    ]


def rows_table(
    model: PlannedModel,
    study: CellGroup,
    names: Sequence[RowName],
    metric: str,
    effects: Float[np.ndarray, "cell example"],
    clean: Float[np.ndarray, " example"],
    provenance: str,
    unit: str,
    clusters: tuple[int, ...] | None = None,
) -> "pyarrow.Table":
    """Rows of one chunk and metric."""
    import pyarrow as pa

    size = len(names)
    mean, sem, n = mean_and_sem(effects, clusters)
    none = np.zeros((size, 1))
    p = compare_means(effects, none, "two-sided", Design(clusters=clusters)).p
    columns = {
        "model": [model.name] * size,
        "checkpoint": [model.checkpoint] * size,
        "probe": [study.probe] * size,
        "edit": [study.edit.label] * size,
        "seed": [study.seed] * size,
        "metric": [metric] * size,
        "unit": [unit] * size,
        "set": [one.set for one in names],
        "draw": [one.draw for one in names],
        "heads": [one.heads for one in names],
        "count": [one.size for one in names],
        "layer": [None if one.alone is None else one.alone.layer for one in names],
        "head": [None if one.alone is None else one.alone.head for one in names],
        "n": n,
        "effect": mean,
        "sem": sem,
        "p_value": p,
        "clean": [mean_and_sem(clean[None]).mean[0]] * size,
        "effects": list(effects),
        "clean_values": [clean] * size,
        "provenance": [provenance] * size,
    }
    schema = row_schema()
    arrays = [pa.array(columns[f.name], f.type, from_pandas=True) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


@dataclass(frozen=True)
class Status:
    """Progress of a sweep.

    Attributes:
        name: name of the sweep.
        total: number of chunks.
        done: finished chunks.
        failed: failed chunks with reasons; running the sweep again retries them.
        cells: rows of the whole table: sets of heads, with each metric.
        cells_done: finished rows.
        models: model -> chunks finished and in total.
        compacted: whether everything is in one table.
        left_seconds: remaining time at the current pace; None if unknown, or if nothing was
            finished in the time of the last ten parts.
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
        """Number of chunks neither finished nor failed."""
        return self.total - self.done - len(self.failed)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return asdict(self) | {"pending": self.pending}


@checked
def status(folder: str | Path) -> Status:
    """Read the progress of a sweep.

    Args:
        folder: folder of the sweep.

    Returns:
        Finished, failed and pending chunks, and an estimate of the time left.

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
    """Remaining seconds at the pace of the last ten parts."""
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
