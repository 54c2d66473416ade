"""``headscope compare``: heads of two models, matched."""

import json
import time
from pathlib import Path
from typing import Any

from headscope.cli.command import typed
from headscope.cli.names import scorer_names
from headscope.cli.output import console, plain_rows
from headscope.comparing import compare
from headscope.comparing.compared import way_to_match
from headscope.files import whole_file, whole_page, writable_folder
from headscope.models.loading.load import load
from headscope.models.protocol import HeadModel
from headscope.table import Comparison, HeadTable


def run(
    first: str,
    second: str,
    *,
    by: str,
    scorers: str | None,
    out: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Read or score both, match, print, write."""
    way = way_to_match(by)
    names = scorer_names(scorers)
    folder = None if out is None else writable_folder(out)
    started = time.perf_counter()
    found = compare(_read(first), _read(second), by=way, scorers=names, seed=seed)
    seconds = time.perf_counter() - started
    if as_json:
        print(json.dumps(plain_rows(found.to_pandas()), allow_nan=False))
    else:
        _print(found)
    if folder is None:
        return
    _write(folder, found, {"by": by, "seed": seed, "seconds": round(seconds, 2)})
    console(stderr=True).print(
        f"Written to {out}: index.html (open it in a browser), comparison.parquet.", soft_wrap=True
    )


def _read(name: str) -> "HeadModel | HeadTable":
    """A run's table, or a model; ``NAME@REVISION`` names a checkpoint."""
    place = Path(name)
    if place.is_file():
        return HeadTable.load(place)
    if (place / "table.parquet").is_file():
        return HeadTable.load(place / "table.parquet")
    source, _, revision = name.partition("@")
    return load(source, revision=revision or None)


def _print(found: Comparison) -> None:
    """Pairs, closest first, and for each the scores that differ most."""
    from rich.table import Table
    from rich.text import Text

    one, two = found.names
    grid = Table(one, two, title=Text(f"closeness: {found.measure}"))
    grid.add_column("closeness", justify="right")
    for name in found.scores[:5]:
        grid.add_column(f"{name}, second - first", justify="right")
    for at, (a, b) in enumerate(found.pairs[:40]):
        cells = [
            f"{value:+.2f} [{low:.2f}, {high:.2f}]"
            for value, low, high in zip(
                found.difference[at, :5], found.low[at, :5], found.high[at, :5], strict=True
            )
        ]
        grid.add_row(str(a), str(b), f"{found.closeness[at]:.2f}", *map(Text, cells))
    terminal = console()
    terminal.print(grid)
    terminal.print(Text(repr(found)))


def _write(folder: Path, found: Comparison, settings: dict[str, Any]) -> None:
    from headscope.report import sections_page
    from headscope.report.comparison import comparison_sections

    with whole_file(folder / "comparison.parquet") as file:
        found.to_pandas().to_parquet(file, index=False)
    page = sections_page(
        f"{found.names[0]} and {found.names[1]}",
        "two models",
        "Matched heads of two models, by headscope.",
        comparison_sections(found),
        [(name, str(value)) for name, value in settings.items()],
        typed(),
    )
    whole_page(folder / "index.html", page)
