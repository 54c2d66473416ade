"""``headscope scorers``: what can be scored."""

import json

from headscope.cli.output import console
from headscope.scorers import CATALOGUE, DEFAULT


def run(*, as_json: bool) -> None:
    """Print the catalogue."""
    rows = [
        {
            "name": name,
            "kind": scorer.kind,
            "unit": scorer.unit,
            "range": list(scorer.bounds),
            "default": name in DEFAULT,
            "description": scorer.description,
            "source": scorer.source,
        }
        for name, scorer in CATALOGUE.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    from rich.table import Table

    grid = Table("name", "reads", "unit", "range", "what it measures", "source", show_lines=False)
    for name, scorer in CATALOGUE.items():
        low, high = ("-" if bound is None else f"{bound:g}" for bound in scorer.bounds)
        mark = "" if name in DEFAULT else " *"
        span = f"{low}..{high}"
        said = (scorer.description, scorer.source)
        grid.add_row(name + mark, scorer.kind, scorer.unit, span, *said)
    console().print(grid)
    console().print("* not in a plain scan; ask for it by name.")
