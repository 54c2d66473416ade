"""``headscope compare``: heads of two models, matched."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.base.files import whole_file, whole_page
from headscope.cli.options import scorer_names
from headscope.cli.output import print_either, print_written, rows_of, run_folder, typed
from headscope.comparing import compare
from headscope.comparing.compared import way_to_match
from headscope.models.loading.load import load
from headscope.models.protocol import HeadModel
from headscope.table import Comparison, HeadTable, versions

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder


def run(
    first: str,
    second: str,
    *,
    by: str,
    scorers: str | None,
    out: Path | None,
    overwrite: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Read or score both, match, write, print."""
    way = way_to_match(by)
    names = scorer_names(scorers)
    folder = run_folder(out, "compare", overwrite=overwrite)
    started = time.perf_counter()
    one, two = _read(first), _read(second)
    if folder is not None:
        sides = {"first": _identity(one), "second": _identity(two)}
        folder = folder.of({**sides, "by": by, "scorers": names, "seed": seed})
    found = compare(one, two, by=way, scorers=names, seed=seed)
    seconds = time.perf_counter() - started
    if folder is None:
        print_either(lambda: rows_of(found), lambda: _shown(found), as_json=as_json)
        return
    folder = folder.ready()
    _write(folder, found, {"by": by, "seed": seed, "seconds": round(seconds, 2)})
    print_either(lambda: rows_of(found), lambda: _shown(found), as_json=as_json)
    print_written(folder.path, "comparison.parquet")


def _identity(side: "HeadModel | HeadTable") -> str:
    """What tells one side from another: a model's weights, or where a table came from."""
    if isinstance(side, HeadTable):
        origins = [[name, one.provenance.to_json()] for name, one in side.items()]
        return hashlib.sha256(json.dumps(origins, sort_keys=True).encode()).hexdigest()
    return side.digest()


def _read(name: str) -> "HeadModel | HeadTable":
    """A run's table, or a model; ``NAME@REVISION`` names a checkpoint."""
    place = Path(name)
    if place.is_file():
        return HeadTable.load(place)
    if (place / "table.parquet").is_file():
        return HeadTable.load(place / "table.parquet")
    source, _, revision = name.partition("@")
    return load(source, revision=revision or None)


def _shown(found: Comparison) -> Iterator[Any]:
    """The pairs that stand out most first, and their differences in the first five scores."""
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
    yield grid
    yield Text(repr(found))


def _write(folder: "RunFolder", found: Comparison, settings: dict[str, Any]) -> None:
    from headscope.report import sections_page

    with whole_file(folder.path / "comparison.parquet") as file:
        found.to_pandas().to_parquet(file, index=False)
    page = sections_page(
        f"{found.names[0]} and {found.names[1]}",
        "two models",
        "Matched heads of two models, by headscope.",
        found.sections(),
        [(name, str(value)) for name, value in settings.items()],
        typed(),
    )
    whole_page(folder.path / "index.html", page)
    folder.claim.write_facts({"command": typed(), "settings": settings, "versions": versions()})
