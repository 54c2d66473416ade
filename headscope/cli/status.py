"""``headscope status``: where a sweep stands, also while it runs."""

import json
from pathlib import Path

from headscope.cli.output import console
from headscope.sweeps.status import status


def run(folder: Path, *, as_json: bool) -> None:
    """Print counts, models and reasons."""
    found = status(folder)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    say = console().print
    say(
        f"{found.name}: {found.done} of {found.total} chunks done, {found.pending} pending, "
        f"{len(found.failed)} failed ({found.cells_done} of {found.cells} cells)",
        highlight=False,
    )
    for model, (done, total) in found.models.items():
        say(f"  {model}: {done} of {total}", highlight=False, markup=False)
    for chunk, why in found.failed.items():
        say(f"  failed {chunk}: {why}", highlight=False, markup=False, soft_wrap=True)
    if found.left_seconds is not None:
        say(f"  about {found.left_seconds:.0f} s left at the pace so far", highlight=False)
    if found.compacted:
        say(f"  all in {folder / 'table.parquet'}", highlight=False, soft_wrap=True)
