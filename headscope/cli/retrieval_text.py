"""What ``headscope retrieval`` prints: heads, recall by length and depth, masking curves."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from headscope.cli.output import console
from headscope.retrieval import Retrieval
from headscope.table import OrderCurve, RecallGrid
from headscope.table.notable import against

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 12


def show(found: Retrieval, masked: Mapping[str, OrderCurve]) -> None:
    """Print it all; tables that would be empty are left out."""
    from rich.text import Text

    terminal = console()
    heads = _heads(found)
    if heads.row_count:
        terminal.print(heads)
    terminal.print(Text(str(found)))
    terminal.print(_recall(found.recall_grid()))
    for task, curve in masked.items():
        terminal.print(_curve(task, curve))
    if not masked and not found.runs.counted.any():
        terminal.print("Without right answers there is no masking curve.")
        terminal.print(Text(found.hint()))
    beyond = found.by_set.provenance.probe.get("extrapolated_from")
    if beyond is not None:
        terminal.print(f"Trained on at most {beyond} tokens: longer texts use positions beyond.")


def _heads(found: Retrieval) -> "Table":
    from rich.table import Table

    scores, steps, acts = found.by_set, found.by_step, found.activation
    table = Table("head", title="retrieval heads, by the share of the needle that they copy")
    for name in ("share copied", "by steps", "active in", against(scores)):
        table.add_column(name, justify="right")
    for head, value in scores.top(_SHOWN):
        numbers = (value, float(steps[head]), float(acts[head]), float(scores.null[head]))
        table.add_row(str(head), *_shares(numbers))
    return table


def _recall(grid: RecallGrid) -> "Table":
    from rich.table import Table

    table = Table("tokens", title="share of needles found, by depth")
    for depth in grid.depths:
        table.add_column(f"{100 * depth:.0f}%", justify="right")
    for length, row in zip(grid.lengths, grid.share, strict=True):
        table.add_row(f"{int(length)}", *_shares(row))
    return table


def _curve(task: str, curve: OrderCurve) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("masked", title=Text(f"right answers with heads masked: {task}"))
    for count in curve.counts:
        table.add_column(str(count), justify="right")
    for arm, means in zip(curve.effects.labels[0], curve.mean, strict=True):
        table.add_row(arm, *_shares(means))
    return table


def _shares(values: Iterable[float]) -> list[str]:
    """Two digits; nothing where there is no value."""
    return ["" if one != one else f"{one:.2f}" for one in values]
