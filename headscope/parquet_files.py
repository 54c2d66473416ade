"""Reading Parquet from elsewhere: limits on rows, values and decompressed bytes come first."""

from collections.abc import Sequence
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
    from pyarrow import parquet

    file = Path(path)
    try:
        facts = parquet.read_metadata(file)
        _check_size(file, facts)
        schema = parquet.read_schema(file)
        missing = [name for name in columns or () if name not in schema.names]
        if missing:
            raise InputError(f"{str(file)!r} has no column {missing[0]!r}.")
        words = [one.name for one in schema if pyarrow.types.is_string(one.type)]
        opened = parquet.ParquetFile(file, read_dictionary=words)
        return opened.read(columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise InputError(f"there is no file {str(file)!r}.") from None
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise InputError(f"{str(file)!r} is no readable parquet file: {_line(error)}") from None


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
