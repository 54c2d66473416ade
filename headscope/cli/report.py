"""``headscope report``: runs of one model or more as one HTML file."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from headscope.base.files import check_page, whole_page
from headscope.cli.output import console, typed
from headscope.errors import InputError
from headscope.report import Run, read_run, report_page


def run(places: Sequence[Path], *, out: Path, overwrite: bool, title: str | None) -> None:
    """Read, join, write."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out.name!r} should end in .html.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")
    asked = {"kind": "report", "runs": [place.resolve().name for place in places]}
    runs = [one for place in places for one in read(place)]
    command = typed() or shlex.join(["headscope", "report", *(one.name for one in places)])
    page = report_page(runs, title=title, command=command)
    check_page(out, asked, overwrite=overwrite)
    whole_page(out, page, asked)
    console(stderr=True).print(
        f"Written to {out} ({len(page.encode()) / 1e6:.1f} MB, open it in a browser).",
        soft_wrap=True,
    )


def read(place: Path) -> list[Run]:
    """The runs of a folder: one, or of a sweep one per model.

    Raises:
        InputError: if there is no run.
    """
    if not place.exists():
        raise InputError(f"there is no run at {place}.")
    if (place / "manifest.json").is_file():
        from headscope.cli.sweep_runs import sweep_runs

        return sweep_runs(place)
    if place.is_file() and place.suffix == ".parquet" and (curve := _curve(place)):
        return [curve]
    return [read_run(place)]


def _curve(place: Path) -> Run | None:
    """A saved curve of pruning or masking; None where the file is something else."""
    from headscope.plots import curves
    from headscope.pruning import PruningCurve
    from headscope.report import Picture, Section
    from headscope.table import OrderCurve

    for kind in (PruningCurve, OrderCurve):
        try:
            found = kind.load(place)
        except InputError:
            continue
        light, dark = (
            curves(found.effects, controls=found.controls, theme=theme)
            for theme in ("light", "dark")
        )
        said = f"{found.effects.description} Orders: {', '.join(found.orders)}."
        section = Section("Curves", [Picture(light, dark, said, said)])
        origin = found.effects.provenance
        return Run(place.stem, "curve", None, sections=[section], of=origin)
    return None
