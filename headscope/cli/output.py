"""How the commands print: tables for people, JSON for programs."""

import json
import math
from typing import Any

from headscope.table import HeadTable


def print_table(table: HeadTable, *, as_json: bool) -> None:
    """Print a table on stdout."""
    if as_json:
        print(json.dumps(table_rows(table), allow_nan=False))
        return
    console().print(table)


def table_rows(table: HeadTable) -> list[dict[str, Any]]:
    """One JSON object per head and score; numbers that are not finite become null."""
    return plain_rows(table.to_pandas())


def plain_rows(frame: Any) -> list[dict[str, Any]]:
    """Rows of a data frame as JSON objects; what is missing or not finite becomes null."""
    records: list[dict[str, Any]] = frame.to_dict(orient="records")
    return [{key: _plain(value) for key, value in record.items()} for record in records]


def console(*, stderr: bool = False) -> Any:
    """Terminal to print on; 100 columns where the output is not a terminal."""
    import sys

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 100)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if type(value).__name__ == "NAType":  # pandas' own missing number
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
