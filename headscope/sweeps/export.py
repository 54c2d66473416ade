"""A sweep's rows in the formats of other programs."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.base.files import whole_path, writable_folder
from headscope.errors import InputError, WriteError, nearest
from headscope.sweeps.results import Results, read

if TYPE_CHECKING:
    import pandas


def export(folder: str | Path, kind: str, target: str | Path | None = None) -> Path:
    """Write a sweep's results for another program.

    ``csv``: one row per cell. ``sqlite`` and ``duckdb``: table ``cells`` (the same) and table
    ``examples`` (``cell``, ``example``, ``effect``, ``clean``), joined by ``cells.cell``.

    Args:
        folder: of the sweep.
        kind: ``csv``, ``sqlite`` or ``duckdb``.
        target: the file; default: ``export.csv``, ``.sqlite`` or ``.duckdb`` in the folder.

    Returns:
        The file.

    Raises:
        InputError: if the kind is unknown, its library missing, or the file cannot be written.

    Example:
        >>> hs.sweeps.export("runs/ioi-all-heads", "sqlite")  # doctest: +SKIP
        PosixPath('runs/ioi-all-heads/export.sqlite')
    """
    if kind not in WRITERS:
        raise InputError(nearest(kind, WRITERS, kind="format"))
    results = read(folder)
    file = Path(folder) / f"export.{kind}" if target is None else Path(target)
    writable_folder(file.parent)
    try:
        with whole_path(file) as beside:
            WRITERS[kind](results, beside)
    except WriteError:
        raise
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {file}: {reason}.") from error
    return file


def _cells(results: Results) -> "pandas.DataFrame":
    """One row per cell, numbered; words as plain text."""
    frame = results.to_pandas()
    words = frame.select_dtypes("category").columns
    frame = frame.astype(dict.fromkeys(words, object))
    frame.insert(0, "cell", range(len(frame)))
    return frame


def _examples(results: Results) -> "pandas.DataFrame":
    """One row per cell and example."""
    import pandas

    rows = results.rows.select(["effects", "clean_values"]).to_pandas()
    rows = rows.rename(columns={"effects": "effect", "clean_values": "clean"})
    rows.insert(0, "cell", range(len(rows)))
    long = rows.explode(["effect", "clean"], ignore_index=True)
    long.insert(1, "example", long.groupby("cell").cumcount())
    long[["effect", "clean"]] = long[["effect", "clean"]].astype(float)
    assert isinstance(long, pandas.DataFrame)  # noqa: S101  # pandas has no types
    return long


def _csv(results: Results, file: Path) -> None:
    _cells(results).to_csv(file, index=False)


def _sqlite(results: Results, file: Path) -> None:
    with closing(sqlite3.connect(file)) as base:
        _cells(results).to_sql("cells", base, index=False)
        _examples(results).to_sql("examples", base, index=False)
        base.commit()


def _duckdb(results: Results, file: Path) -> None:
    try:
        import duckdb
    except ImportError:
        raise InputError("duckdb is not installed: pip install 'headscope[duckdb]'.") from None
    import pyarrow

    with closing(duckdb.connect(str(file))) as base:
        for name, frame in (("cells", _cells(results)), ("examples", _examples(results))):
            base.register("given", pyarrow.Table.from_pandas(frame, preserve_index=False))
            base.execute(f"create table {name} as select * from given")  # noqa: S608
            base.unregister("given")


WRITERS: dict[str, Callable[[Results, Path], None]] = {
    "csv": _csv,
    "sqlite": _sqlite,
    "duckdb": _duckdb,
}
