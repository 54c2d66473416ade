"""A table in the terminal: best heads of the scores that fit, the others in a line each, roles."""

from typing import TYPE_CHECKING

from headscope.table.excerpt import best, best_heads, by_interest, unreached, written
from headscope.table.roles import find_roles
from headscope.table.scores import HeadScores
from headscope.table.table import HeadTable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


def render(table: HeadTable, width: int) -> "list[RenderableType]":
    """Renderables for a console of ``width`` columns."""
    from rich.text import Text

    scores = by_interest(table)
    shown = _fitting(scores, width)
    layers, heads = table.shape
    rows = len(best_heads(shown))
    parts: list[RenderableType] = [_grid(shown)]
    model = next(iter(table.values())).provenance.model
    of_model = f" of {model}" if model else ""
    parts.append(
        Text(
            f"{rows} of {layers * heads} heads{of_model} ({layers} layers x {heads}): the 3 best "
            f"of each score. Bold: significant (Benjamini-Hochberg, 5%).",
            style="dim",
        )
    )
    parts += [Text(said, style="dim") for said in map(unreached, scores) if said]
    parts += [Text(said, style="dim") for said in measured_on(scores)]
    rest = scores[len(shown) :]
    if rest:
        parts += [Text("\nOther scores, 3 best heads", style="bold"), *map(_line, rest)]
    findings = find_roles(scores, 0.05)
    if findings:
        parts.append(Text("\nRoles", style="bold"))
        parts += [
            Text(f"  {finding}", style="" if finding.heads else "dim") for finding in findings
        ]
    return parts


def measured_on(scores: list[HeadScores]) -> list[str]:
    """What each score was measured on, a line per probe; none where that is not known."""
    by_probe: dict[str, list[str]] = {}
    for one in scores:
        probe = one.provenance.probe
        kind = str(probe.get("name") or probe.get("kind") or "").replace("_", " ")
        if kind:
            by_probe.setdefault(kind, []).append(one.name.replace("_", " "))
    return [f"Measured on {probe}: {', '.join(names)}." for probe, names in by_probe.items()]


def _fitting(scores: list[HeadScores], width: int) -> list[HeadScores]:
    """As many leading scores as fit beside the head column, at least one."""
    used = 10
    shown: list[HeadScores] = []
    for one in scores:
        used += max(7, *map(len, one.name.split("_"))) + 3
        if shown and used > width:
            break
        shown.append(one)
    return shown


def _grid(scores: list[HeadScores]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    grid.add_column("head", style="bold cyan", no_wrap=True, vertical="bottom")
    for one in scores:
        grid.add_column(Text(one.name.replace("_", "\n")), justify="right", vertical="bottom")
    marks = [one.significant() for one in scores]
    for head in best_heads(scores):
        cells = [
            Text(written(one[head]), style=_style(one, bool(mark[head])))
            for one, mark in zip(scores, marks, strict=True)
        ]
        grid.add_row(str(head), *cells)
    return grid


def _style(scores: HeadScores, significant: bool) -> str:
    if not significant:
        return "dim" if scores.threshold is not None else ""
    return "bold green" if scores.threshold is not None else "bold"


def _line(scores: HeadScores) -> "Text":
    from rich.text import Text

    unit = f" ({scores.unit})" if scores.unit else ""
    heads = ", ".join(f"{head} {written(mean)}" for head, mean in best(scores))
    return Text(f"  {scores.name}{unit}: ").append(heads or "no values", style="cyan")
