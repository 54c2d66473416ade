"""``headscope export``: a sweep's results for other programs."""

from pathlib import Path

from headscope.cli.output import console
from headscope.sweeps.export import export


def run(folder: Path, *, to: str, out: Path | None) -> None:
    """Write the file and say where it is."""
    file = export(folder, to, out)
    console(stderr=True).print(f"Written to {file}.", soft_wrap=True)
