"""``headscope show``: print the table of a finished run."""

from pathlib import Path

from headscope.cli.output import print_table
from headscope.errors import InputError
from headscope.table import HeadTable


def run(place: Path, *, as_json: bool) -> None:
    """Print the table in a run folder, or in the parquet file itself."""
    file = place / "table.parquet" if place.is_dir() else place
    if not file.exists():
        raise InputError(f"{place} holds no finished run: there is no {file.name} in it.")
    print_table(HeadTable.load(file), as_json=as_json)
