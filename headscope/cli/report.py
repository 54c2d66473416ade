"""``headscope report``: runs of one model or more as one HTML file."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from headscope.cli.command import typed
from headscope.cli.output import console
from headscope.errors import InputError
from headscope.files import whole_file
from headscope.report import Run, read_run, report_page


def run(places: Sequence[Path], *, out: Path, title: str | None) -> None:
    """Read, join, write."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out.name!r} should end in .html.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")
    runs = [one for place in places for one in read(place)]
    command = typed() or shlex.join(["headscope", "report", *(one.name for one in places)])
    page = report_page(runs, title=title, command=command)
    with whole_file(out) as file:
        file.write(page.encode())
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
    return [read_run(place)]
