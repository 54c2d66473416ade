"""Display of results: glances, sections and tables that every result provides."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from headscope.base.arguments import check_methods

if TYPE_CHECKING:
    import pandas
    from rich.console import RenderableType
    from rich.table import Table


TableCell = str | int | float | tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """Paragraph of text; ``quiet`` makes it small."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Facts:
    """List of names with values."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Rows:
    """Small table. A cell is a text, a number, or a tuple of tokens.

    Attributes:
        columns: their names.
        rows: cells; the first of each names the row.
        caption: what the table shows.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    caption: str = ""


@dataclass(frozen=True)
class Drawn:
    """Reference to a named figure, drawn in the page's themes.

    Attributes:
        name: name of the figure; if no figure has it, nothing is shown.
        said: what it shows, for readers who cannot see it.
        caption: what to look for; default: the same.
    """

    name: str
    said: str
    caption: str | None = None


@dataclass(frozen=True)
class Section:
    """Heading with content: any of the above, or a finished picture."""

    title: str
    blocks: Sequence[Any]


_MOST_ROWS, _MOST_COLUMNS = 40, 48  # of a coloured grid
_TEXT_ROWS, _TEXT_WIDTH = 6, 56
_CELL = "padding:1px 6px;text-align:right;font-variant-numeric:tabular-nums;white-space:pre"
_LEFT = "padding:1px 8px;text-align:left;white-space:pre"


@dataclass(frozen=True)
class Grid:
    """Grid of coloured cells with text.

    Attributes:
        rows: labels downwards.
        columns: labels to the right.
        cells: text of every cell.
        shades: from -1 to 1, blue above 0 and orange below; NaN is grey.
        emphasis: how much each cell counts: ``role`` or ``strong`` (bold), ``faint``, or nothing.
        titles: what the columns are, in a sentence each.
        whole: show every column, however many.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    shades: Sequence[Sequence[float]]
    emphasis: Sequence[Sequence[str]] = ()
    titles: Sequence[str] = ()
    whole: bool = False


class Line(NamedTuple):
    """Line of a list, with its emphasis."""

    text: str
    strong: str = ""
    faint: bool = False


class Lines(NamedTuple):
    """A list of lines with a heading."""

    heading: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Glance:
    """Short overview of a result.

    Attributes:
        title: what it is.
        facts: its shape, its model, its unit, in a few words each.
        columns: names of the columns of ``rows``.
        rows: its most notable entries.
        grid: a picture in cells, for notebooks.
        hint: what to do next, as code.
        notes: sentences below.
        lists: further lists below, each with a heading.
        whole: show every row in a terminal too, not the first few: they are all that there is.
    """

    title: str
    facts: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    grid: Grid | None = None
    hint: str = ""
    notes: Sequence[str] = ()
    lists: Sequence[Lines] = ()
    whole: bool = False

    def text(self) -> str:
        """Render as a few lines for a terminal."""
        lines = [f"{self.title}: {', '.join(self._facts)}" if self._facts else self.title]
        rows = self.rows if self.whole else self.rows[:_TEXT_ROWS]
        shown = [[readable(one, _TEXT_WIDTH) for one in row] for row in rows]
        if shown:
            table = [list(self.columns), *shown] if self.columns else shown
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += [("  " + "  ".join(map(str.ljust, row, widths))).rstrip() for row in table]
        return "\n".join([*lines, f"  next: {self.hint}"] if self.hint else lines)

    def html(self) -> str:
        """Render as static HTML, escaped and self-contained."""
        facts = f" <span>{said(', '.join(self._facts), 400)}</span>" if self._facts else ""
        parts = [f"<p><b>{said(self.title, 120)}</b>{facts}</p>"] if self.title else []
        if self.grid is not None:
            parts.append(_grid_html(self.grid))
        elif self.rows:
            parts.append(_rows_html(self.columns, self.rows[:_MOST_ROWS]))
        parts += [f"<p>{said(note, 400)}</p>" for note in self.notes]
        for heading, lines in self.lists:
            items = "".join(f"<li>{said(line.text + line.strong, 400)}</li>" for line in lines)
            parts.append(f"<p>{said(heading)}</p><ul>{items}</ul>")
        if self.hint:
            parts.append(f"<p>next: <code>{escape(self.hint)}</code></p>")
        return "".join(parts)

    def terminal(self) -> "list[RenderableType]":
        """Render the grid, the notes and the lists for a rich console."""
        from rich.text import Text

        parts: list[RenderableType] = [] if self.grid is None else [_grid_terminal(self.grid)]
        parts += [Text(readable(note, 400), style="dim") for note in self.notes]
        for heading, lines in self.lists:
            parts.append(Text(f"\n{heading}", style="bold"))
            for line in lines:
                text = Text(f"  {line.text}", style="dim" if line.faint else "")
                parts.append(text.append(line.strong, style="cyan"))
        return parts

    @property
    def _facts(self) -> list[str]:
        return [fact for fact in self.facts if fact]


class Shown:
    """Base of objects that display their :meth:`glance` in notebooks.

    Public methods of classes derived from it check their arguments; with ``checks=False``, as for
    models, whose methods run in every pass, they do not.
    """

    def __init_subclass__(cls, *, checks: bool = True, **options: Any) -> None:
        """Let public methods refuse arguments of the wrong kind."""
        super().__init_subclass__(**options)
        if checks:
            check_methods(cls)

    def glance(self) -> Glance:
        """Short overview of the result."""
        return Glance(type(self).__name__)

    def summary(self) -> str:
        """The overview as a few lines of text."""
        return self.glance().text()

    def sections(self) -> list[Section]:
        """Sections of a page; default: the glance."""
        seen = self.glance()
        blocks: list[Any] = [Words(", ".join(fact for fact in seen.facts if fact))]
        if seen.rows:
            blocks.append(Rows(seen.columns or [""] * len(seen.rows[0]), seen.rows))
        return [Section(seen.title, blocks)]

    def __repr__(self) -> str:
        """The overview as text."""
        return self.summary()

    def _repr_html_(self) -> str:
        """The overview as static HTML."""
        return self.glance().html()


class Listed(Shown):
    """Base of dataclasses that display their fields: sizes of arrays, the first of many texts."""

    def glance(self) -> Glance:
        """One row per field that holds something."""
        dataclass: Any = self
        held = [(one.name, getattr(self, one.name)) for one in fields(dataclass)]
        rows = [(name.replace("_", " "), in_words(value)) for name, value in held]
        told = str(self) if type(self).__str__ is not object.__str__ else ""
        return Glance(
            _spaced(type(self).__name__),
            [told],
            columns=("field", "value"),
            rows=[row for row in rows if row[1]],
            whole=True,
        )


def _spaced(name: str) -> str:
    """The name of a class as words: ``rotary bands`` of ``RotaryBands``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def in_words(value: Any) -> str:
    """A value of any type in a few words; empty for nothing.

    Example:
        >>> in_words(np.array([[0.25, 0.75]])), in_words(("a", "b")), in_words(None)
        ('[1, 2], mean 0.5, 0.25 to 0.75', "'a', 'b'", '')
    """
    if value is None or (isinstance(value, tuple | list | Mapping) and not value):
        return ""
    if isinstance(value, Shown):
        return value.summary().partition("\n")[0]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array_in_words(value)
    if isinstance(value, Mapping):
        return _first([str(one) for one in value])
    if isinstance(value, tuple | list) and type(value).__str__ in (tuple.__str__, list.__str__):
        return _first([_one(one) for one in value])
    return _one(value)


def _one(value: Any) -> str:
    if isinstance(value, str):
        return repr(readable(value))
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return readable(str(value), 80)


def _first(said: Sequence[str]) -> str:
    """The first of many, and how many there are."""
    few = ", ".join(said[:4])
    return few if len(said) <= 4 else f"{few} ... ({len(said)})"


def _array_in_words(value: Any) -> str:
    """Shape, mean and range of an array or a tensor."""
    values = np.asarray(value.detach().float().cpu() if hasattr(value, "detach") else value)
    shape = str(list(values.shape))
    if values.dtype.kind not in "biuf" or not np.isfinite(values.astype(float)).any():
        return shape
    known = values.astype(float)[np.isfinite(values.astype(float))]
    if values.dtype.kind == "b":
        return f"{shape}, {int(known.sum()):,} true"
    return f"{shape}, mean {number(known.mean())}, {number(known.min())} to {number(known.max())}"


def readable(text: str, most: int = 40) -> str:
    """Text on one line, with invisible characters spelled out, truncated."""
    line = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )
    return line if len(line) <= most else line[: most - 1] + "…"


def reasons(missing: Mapping[str, str], model: str = "") -> list[tuple[str, str]]:
    """Rows of inapplicable things grouped by reason.

    Args:
        missing: reason of each.
        model: its name or folder, which reasons that begin with it need not repeat.
    """
    found: dict[str, list[str]] = {}
    for name, reason in missing.items():
        own = reason
        if model and (named := re.match(rf"\S*{re.escape(model)}(?: \([^)]*\))?:? ", reason)):
            own = reason[named.end() :]
        found.setdefault(own, []).append(name.replace("_", " "))
    return [(", ".join(names), reason) for reason, names in found.items()]


def said(text: str, most: int = 40) -> str:
    """:func:`readable` text, escaped for HTML."""
    return escape(readable(text, most))


def number(value: float) -> str:
    """Format a number in three digits; a dash if it is missing."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def short(value: float) -> str:
    """Format a number in at most seven characters; a dash if it is missing."""
    if math.isnan(value):
        return "-"
    if value != 0 and not 0.001 <= abs(value) < 10000:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    digits = 3 if abs(value) < 0.1 else 2 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def sizes(names: Sequence[str], counts: Sequence[int]) -> str:
    """Format a shape: ``12 layers x 8 heads``."""
    return " x ".join(
        f"{count} {name}{'' if count == 1 else 's'}"
        for name, count in zip(names, counts, strict=True)
    )


def counted(count: int, noun: str = "example") -> str:
    """Format a number of things: ``1 example``, ``12 examples``."""
    return sizes((noun,), (count,))


def shaded(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Grid:
    """Grid of numbers, coloured relative to the largest magnitude."""
    known = [abs(one) for row in values for one in row if math.isfinite(one)]
    most = max(known, default=0.0) or 1.0
    cells = [[number(one) for one in row] for row in values]
    return Grid(rows, columns, cells, [[one / most for one in row] for row in values])


def _rows_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f'<th style="{_LEFT}">{said(one)}</th>' for one in columns)
    body = "".join(
        f"<tr>{''.join(f'<td style={chr(34)}{_LEFT}{chr(34)}>{said(one, 80)}</td>' for one in row)}"
        "</tr>"
        for row in rows
    )
    return _table(f"<tr>{names}</tr>" if columns else "", body)


def _grid_html(grid: Grid) -> str:
    rows = grid.rows[:_MOST_ROWS]
    columns = grid.columns if grid.whole else grid.columns[-_MOST_COLUMNS:]
    first = len(grid.columns) - len(columns)
    titles = list(grid.titles or [""] * len(grid.columns))[first:]
    names = "".join(
        f'<th style="{_CELL}" title="{said(title, 400)}">'
        f"{said(one, 120 if grid.whole else 12)}</th>"
        for one, title in zip(columns, titles, strict=True)
    )
    body = "".join(
        f'<tr><th style="{_CELL}">{said(name, 20)}</th>'
        + "".join(
            f'<td style="{_CELL}{_ground(shade)}{_WEIGHT.get(weight, "")}">{said(cell, 12)}</td>'
            for cell, shade, weight in zip(
                cells[first:], shades[first:], weights[first:], strict=True
            )
        )
        + "</tr>"
        for name, cells, shades, weights in zip(
            rows, grid.cells, grid.shades, _emphasis(grid), strict=False
        )
    )
    left = []
    if first:
        left.append(f"the last {len(columns)} of {len(grid.columns)} columns")
    if len(rows) < len(grid.rows):
        left.append(f"the first {len(rows)} of {len(grid.rows)} rows")
    note = f"<p>{' and '.join(left)}</p>" if left else ""
    return _table(f"<tr><th></th>{names}</tr>", body) + note


_WEIGHT = {"role": ";font-weight:700", "strong": ";font-weight:700"}
_STYLE = {"role": "bold green", "strong": "bold", "faint": "dim"}


def _emphasis(grid: Grid) -> Sequence[Sequence[str]]:
    return grid.emphasis or [[""] * len(row) for row in grid.cells]


def _grid_terminal(grid: Grid) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("head", style="bold cyan", no_wrap=True, vertical="bottom")
    for name in grid.columns:
        table.add_column(Text(name.replace("_", "\n")), justify="right", vertical="bottom")
    for name, cells, weights in zip(grid.rows, grid.cells, _emphasis(grid), strict=True):
        styled = (Text(cell, _STYLE.get(w, "")) for cell, w in zip(cells, weights, strict=True))
        table.add_row(name, *styled)
    return table


def _ground(shade: float) -> str:
    if math.isnan(shade):
        return ";background:rgba(127,127,127,.15)"
    colour = "38,130,190" if shade >= 0 else "214,110,50"
    return f";background:rgba({colour},{0.65 * min(1.0, abs(shade)):.2f})"


def _table(head: str, body: str) -> str:
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse">'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


@runtime_checkable
class Result(Protocol):
    """Interface of all results. :func:`headscope.plots.figures` draws them."""

    def glance(self) -> Glance:
        """Short overview, for a terminal and a notebook."""

    def summary(self) -> str:
        """The overview as a few lines of text."""

    def sections(self) -> list[Section]:
        """Sections of a page, with figures referenced by name."""

    def columns(self) -> dict[str, Any]:
        """The numbers, column by column."""

    def to_pandas(self) -> "pandas.DataFrame":
        """The numbers as a data frame."""

    def save(self, path: "str | PathLike[str]") -> None:
        """Save to one file, which ``load`` of the same class reads."""


class Tabular:
    """Base of results with rows of numbers."""

    if TYPE_CHECKING:  # a method of every class that derives from it

        def to_pandas(self) -> "pandas.DataFrame":
            """The numbers as a data frame."""
            ...

    def columns(self) -> dict[str, Any]:
        """The numbers by column, with the names of :meth:`to_pandas`."""
        frame = self.to_pandas()
        return {str(name): frame[name].to_numpy() for name in frame}


class Composed:
    """Base of results whose figures are those of results inside."""

    def inside(self) -> Mapping[str, Any]:
        """Results inside, by the suffix of their figures' names."""
        return {}
