"""The card of one head on a terminal."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from headscope.base.glance import short
from headscope.heads import HeadIndex
from headscope.plots.text import visible
from headscope.table import HeadCard, HeadScores, HeadTable
from headscope.table.weights import NO_RANKS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHOWN = 3  # directions, and tokens at each end of them
_WEIGHTS = (
    "copying_eigenvalues",
    "copying_eigenvalues_mlp",
    "matching_eigenvalues",
    "ov_effective_rank",
    "ov_outliers",
    "qk_effective_rank",
    "qk_outliers",
)


def card_lines(
    card: HeadCard, head: HeadIndex, scan: HeadTable | None, effects: Sequence[HeadScores]
) -> Iterator["RenderableType"]:
    """What matters most of one head, for a terminal; the page has the rest."""
    from rich.text import Text

    yield (Text(f"{card.model} {card.head}", style="bold cyan"))
    if scan is not None or effects:
        yield (_behaviour(head, [*(() if scan is None else scan.values()), *effects]))
    yield (_weights(card))
    if not card.ranks:
        yield (Text(NO_RANKS, style="dim"))
    for title, views in (("reads -> writes (OV)", card.ov), ("query -> key (QK)", card.qk)):
        if views:
            yield (Text(f"\n{title}", style="bold"))
        for view in views[:_SHOWN]:
            for sign in (0, 1):
                left, right = (_tokens(view[side][sign]) for side in ("reads", "writes"))
                yield (Text(f"  {view['singular_value']:7.2f}  {left}  ->  {right}"))
    for title, partners in (("fed by", card.fed_by), ("feeds", card.feeds)):
        if any(partners.values()):
            yield (Text(f"\n{title}", style="bold"))
        for mode, found in partners.items():
            heads = ", ".join(f"{one} {value:.2f}" for one, value in found)
            if heads:
                yield (Text(f"  {mode}: {heads}"))
    for name, reason in card.missing.items():
        yield (Text(f"\nNo {name.replace('_', ' ')}: {reason}", style="dim"))


def _tokens(tokens: Iterable[str]) -> str:
    return " ".join(visible(one) for one in list(tokens)[:_SHOWN])


def _grid(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)


def _behaviour(head: HeadIndex, scores: Iterable[HeadScores]) -> "Table":
    """Scores on probes; those that make a role stand out."""
    from rich.text import Text

    grid = _grid("on probes", "mean", "±", "unit", "rank")
    for one in scores:
        mean: Any = one.mean[head]
        if mean != mean:
            continue
        known = one.mean[one.mean == one.mean]
        role = one.threshold is not None and bool(one.significant()[head])
        rank = f"{int((known > mean).sum()) + 1}/{known.size}" if known.size > 1 else ""
        grid.add_row(
            Text(one.name, style="bold green" if role else ""),
            short(float(mean)),
            short(float(one.sem[head])),
            Text(one.unit),
            rank,
        )
    return grid


def _weights(card: HeadCard) -> "Table":
    grid = _grid("from weights", "value", "rank")
    for name in _WEIGHTS:
        if name in card.scores:
            grid.add_row(name, short(card.scores[name]), str(card.ranks.get(name, "")))
    return grid
