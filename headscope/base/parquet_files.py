"""Reading Parquet from elsewhere: limits on rows, values and decompressed bytes come first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.errors import InputError

if TYPE_CHECKING:
    import pyarrow


MAX_ROWS = 50_000_000
MAX_VALUES = 500_000_000  # in all columns together; lists count by their items
MAX_BYTES = 8_000_000_000  # once decompressed


def read_parquet(
    path: "str | PathLike[str]", columns: Sequence[str] | None = None
) -> "pyarrow.Table":
    """Read a file whose footer claims no more than a table of results can hold.

    Words are kept as a dictionary, so a long one that stands in every row is held once.

    Args:
        path: of the file.
        columns: to read; default: all.

    Raises:
        InputError: if it is absent, no Parquet, larger than the limits, or lacks a column.
    """
    import pyarrow

    file = Path(path)
    try:
        return read_limited(file, columns, words_once=True)
    except FileNotFoundError:
        raise InputError(f"there is no file {str(file)!r}.") from None
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise InputError(f"{str(file)!r} is not a readable parquet file: {_line(error)}") from None


def read_part(file: Path, *, again: str = "run the same again") -> "pyarrow.Table":
    """Read a part of results that a run left and another goes on from, within the same limits.

    Args:
        file: of the part.
        again: what to do once a damaged part is deleted.

    Raises:
        FileNotFoundError: if it is absent.
        InputError: if it is not Parquet, or larger than the limits.
    """
    with readable(file, again=again):
        return read_limited(file)


@contextmanager
def readable(file: Path, *, again: str = "run the same again") -> Iterator[None]:
    """Scope in which a damaged part becomes a sentence, and an absent one stays FileNotFoundError.

    Args:
        file: of the part.
        again: what to do once it is deleted.

    Raises:
        InputError: if the file cannot be read, or holds other things than a part.
    """
    import pyarrow

    try:
        yield
    except (FileNotFoundError, InputError):
        raise
    except (
        *(OSError, pyarrow.ArrowException, MemoryError),
        *(ValueError, KeyError, TypeError, IndexError, AttributeError),
    ) as error:
        raise InputError(
            f"{file} is damaged ({_line(error)[:100]}): delete it, and {again}."
        ) from error


def read_limited(
    file: Path, columns: Sequence[str] | None = None, *, words_once: bool = False
) -> "pyarrow.Table":
    """Read a file within the limits; what is wrong with it is raised as pyarrow raises it.

    Args:
        file: its path.
        columns: to read; default: all.
        words_once: make dictionaries of columns of words.

    Raises:
        InputError: if it is larger than the limits, or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    _check_size(file, parquet.read_metadata(file))
    schema = parquet.read_schema(file)
    missing = [name for name in columns or () if name not in schema.names]
    if missing:
        raise InputError(f"{str(file)!r} has no column {missing[0]!r}.")
    words = [one.name for one in schema if words_once and pyarrow.types.is_string(one.type)]
    opened = parquet.ParquetFile(file, read_dictionary=words)
    return opened.read(columns=None if columns is None else list(columns))


def _check_size(file: Path, facts: "pyarrow.parquet.FileMetaData") -> None:
    """Refuse a file that would not fit, by its own account."""
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    values = sum(one.column(i).num_values for one in groups for i in range(one.num_columns))
    size = sum(one.total_byte_size for one in groups)
    for found, limit, what in (
        (facts.num_rows, MAX_ROWS, "rows"),
        (values, MAX_VALUES, "values"),
        (size, MAX_BYTES, "bytes once decompressed"),
    ):
        if not 0 <= found <= limit:
            raise InputError(
                f"{str(file)!r} claims {found:,} {what}; at most {limit:,} are read here."
            )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
