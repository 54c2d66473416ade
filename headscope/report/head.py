"""Report on one head: its page, small tables for notebooks, and a summary for the terminal."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from headscope.base.result import Rows, Section, Words, reasons, said, short
from headscope.heads import HeadIndex
from headscope.plots import attention_pattern, eigenvalues, spectra
from headscope.plots.figure import visible
from headscope.report.page import sections_page
from headscope.report.sections import Block, Picture, missing_words
from headscope.table import HeadCard, HeadEigenvalues, HeadScores, HeadSpectra, HeadTable
from headscope.table.kinds import probe_of
from headscope.table.weights import NO_RANKS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


_NAMES = {"Q": "queries", "K": "keys", "V": "values"}


@dataclass(frozen=True, eq=False)
class HeadExample:
    """One head's attention on one text.

    Attributes:
        pattern: probabilities.
        tokens: text of every position.
        words: description of the text.
    """

    pattern: Float[np.ndarray, "query key"]
    tokens: Sequence[str]
    words: str


@dataclass(frozen=True, eq=False)
class HeadEvidence:
    """Evidence about a head beyond its card; what was not computed is None.

    Attributes:
        spectra: singular values of all heads.
        eigenvalues: eigenvalues of all heads.
        scan: scores of all heads on probes.
        example: attention on a text.
        effects: effect of ablating this head; other heads may be missing.
    """

    spectra: Sequence[HeadSpectra] = ()
    eigenvalues: Sequence[HeadEigenvalues] = ()
    scan: HeadTable | None = None
    example: HeadExample | None = None
    effects: Sequence[HeadScores] = ()


def head_page(card: HeadCard, evidence: HeadEvidence, facts: Sequence[tuple[str, str]] = ()) -> str:
    """Build the self-contained page of one head; see :func:`headscope.report.sections_page`."""
    head = HeadIndex.parse(card.head)
    sections = [
        *_behaviour(card, evidence, head),
        *_directions(card),
        *_spectra(evidence, head),
        *_partners(card),
        _weights(card),
    ]
    if card.missing:
        sections.append(Section("Not in this family", [missing_words(card.missing, card.model)]))
    return sections_page(
        f"{card.model} {card.head}",
        "one head",
        f"One attention head (key/value head {card.kv_head}), by headscope.",
        sections,
        facts,
    )


def _behaviour(card: HeadCard, evidence: HeadEvidence, head: HeadIndex) -> list[Section]:
    sections = []
    if evidence.scan is not None:
        table = evidence.scan
        known = [one for one in table.values() if np.isfinite(one.mean[head])]
        rows = [
            (
                one.name,
                float(one.mean[head]),
                float(one.sem[head]),
                one.unit,
                _rank(one, head),
                _role(one, head),
                probe_of(one),
                one.description,
            )
            for one in known
        ]
        columns = (
            "score", "mean", "standard error", "unit", "rank", "role", "measured on", "high means",
        )  # fmt: skip
        sections.append(Section("On probes", [Rows(columns, rows, "Scores of this head")]))
    if evidence.effects:
        rows_ = [
            (one.name, float(one.mean[head]), float(one.sem[head]), one.unit, one.description)
            for one in evidence.effects
        ]
        names = ("effect", "mean", "standard error", "unit", "meaning")
        grid = Rows(names, rows_, "What changes when this head is ablated")
        sections.append(Section("Ablation", [grid]))
    if evidence.example is not None:
        one = evidence.example
        drawn = partial(attention_pattern, one.pattern, one.tokens, title=f"{card.model} {head}")
        light, dark = drawn(), drawn(theme="dark")
        said = f"Attention of {head}: queries by keys"
        sections.append(Section("Attention", [Picture(light, dark, said, one.words)]))
    return sections


def _rank(scores: HeadScores, head: HeadIndex) -> str:
    known = scores.mean[np.isfinite(scores.mean)]
    return f"{int((known > scores.mean[head]).sum()) + 1} of {known.size}"


def _role(scores: HeadScores, head: HeadIndex) -> str:
    return "yes" if scores.threshold is not None and scores.significant()[head] else ""


def _directions(card: HeadCard) -> list[Section]:
    sections = []
    for title, views, reads, writes, words in (
        (
            "What it reads and writes (OV)",
            card.ov,
            "reads",
            "writes",
            "Largest singular directions of the OV circuit. A token on the left, attended to, "
            "raises the logits of the tokens on the right; signs belong together, line by line.",
        ),
        (
            "What it looks for (QK)",
            card.qk,
            "query tokens",
            "key tokens",
            "Largest singular directions of the QK circuit: queries on the left attend to keys on "
            "the right.",
        ),
    ):
        rows: list[tuple[Any, ...]] = []
        for number, view in enumerate(views):
            for sign, mark in enumerate("+-"):
                both = (tuple(view["reads"][sign]), tuple(view["writes"][sign]))
                rows.append((f"{number} {mark}", float(view["singular_value"]), *both))
        if rows:
            grid = Rows(("direction", "singular value", reads, writes), rows)
            sections.append(Section(title, [Words(words, quiet=True), grid]))
    return sections


def _spectra(evidence: HeadEvidence, head: HeadIndex) -> list[Section]:
    blocks: list[Block] = []
    for one in evidence.spectra:
        light, dark = spectra(one, [head]), spectra(one, [head], theme="dark")
        blocks.append(Picture(light, dark, f"{one.name} singular values of {head}, others in grey"))
    for values in evidence.eigenvalues:
        light, dark = eigenvalues(values, [head]), eigenvalues(values, [head], theme="dark")
        blocks.append(Picture(light, dark, f"{values.name} eigenvalues of {head}"))
    return [Section("Spectrum and copying", blocks)] if blocks else []


def _partners(card: HeadCard) -> list[Section]:
    blocks: list[Block] = []
    for title, partners in (("fed by", card.fed_by), ("feeds", card.feeds)):
        rows = [
            (f"{_NAMES.get(mode, mode)}", ", ".join(f"{one} {value:.3f}" for one, value in found))
            for mode, found in partners.items()
            if found
        ]
        if rows:
            blocks.append(Rows(("through", "heads, strongest first"), rows, title))
    return [Section("Composition partners", blocks)] if blocks else []


def _weights(card: HeadCard) -> Section:
    rows = [
        (name, value, card.ranks.get(name, ""))
        for name, value in card.scores.items()
        if np.isfinite(value)
    ]
    told = "1 is the largest" if card.ranks else NO_RANKS
    return Section("Weight scores", [Rows(("score", "value", "rank"), rows, told)])


_CELL = "padding:1px 8px;text-align:left"
_MARK = "padding:0 .3em;background:rgba(127,127,127,.18);border-radius:3px;white-space:pre"


def head_html(card: HeadCard, scan: HeadTable | None, effects: Sequence[HeadScores]) -> str:
    """Render title, scores, tokens of the largest direction, and partners."""
    head = HeadIndex.parse(card.head)
    known = [one for one in (scan or {}).values() if np.isfinite(one.mean[head])]
    scores = [_row_html(one, head) for one in [*known, *effects]]
    parts = [f"<h4>{_said(card.model)} {card.head}</h4>"]
    if scores:
        parts.append(_table_html(("score", "mean", "± standard error", "null", "unit"), scores))
    parts += [
        _directions_html("reads → writes (OV)", card.ov),
        _directions_html("query → key (QK)", card.qk),
    ]
    for title, partners in (("fed by", card.fed_by), ("feeds", card.feeds)):
        lines = [
            f"{_said(mode)}: {', '.join(f'{one} {value:.2f}' for one, value in found)}"
            for mode, found in partners.items()
            if found
        ]
        if lines:
            parts.append(f"<p><b>{title}</b> {'; '.join(lines)}</p>")
    parts += [
        f"<p>No {_said(names)}: {said(why, 400)}</p>"
        for names, why in reasons(card.missing, card.model)
    ]
    return "".join(parts)


def _row_html(scores: HeadScores, head: HeadIndex) -> tuple[str, ...]:
    role = scores.threshold is not None and bool(scores.significant()[head])
    name = f"<b>{_said(scores.name)}</b>" if role else _said(scores.name)
    values = (float(one[head]) for one in (scores.mean, scores.sem, scores.null))
    return (name, *map(short, values), _said(scores.unit))


def _directions_html(title: str, views: Sequence[dict[str, Any]]) -> str:
    if not views:
        return ""
    first = views[0]
    lines = []
    for sign in (0, 1):
        sides = [_tokens_html(first[side][sign]) for side in ("reads", "writes")]
        lines.append(f"{sides[0]} → {sides[1]}")
    return f"<p><b>{title}</b><br>{'<br>'.join(lines)}</p>"


def _tokens_html(tokens: Iterable[str]) -> str:
    return " ".join(f'<span style="{_MARK}">{_said(one)}</span>' for one in list(tokens)[:6])


def _table_html(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f'<th style="{_CELL}">{name}</th>' for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td style={chr(34)}{_CELL}{chr(34)}>{cell}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _said(text: str) -> str:
    return escape(visible(text[:80]))


_SHOWN = 3  # directions, and tokens at each end
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
    """Summarise a head for the terminal; the page has the rest."""
    from rich.text import Text

    yield (Text(f"{card.model} {card.head}", style="bold cyan"))
    if scan is not None or effects:
        yield (_behaviour_lines(head, [*(() if scan is None else scan.values()), *effects]))
    yield (_weight_lines(card))
    if not card.ranks:
        yield (Text(NO_RANKS, style="dim"))
    for title, views in (("reads -> writes (OV)", card.ov), ("query -> key (QK)", card.qk)):
        if views:
            yield (Text(f"\n{title}", style="bold"))
        for view in views[:_SHOWN]:
            for sign in (0, 1):
                left, right = (_token_line(view[side][sign]) for side in ("reads", "writes"))
                yield (Text(f"  {view['singular_value']:7.2f}  {left}  ->  {right}"))
    for title, partners in (("fed by", card.fed_by), ("feeds", card.feeds)):
        if any(partners.values()):
            yield (Text(f"\n{title}", style="bold"))
        for mode, found in partners.items():
            heads = ", ".join(f"{one} {value:.2f}" for one, value in found)
            if heads:
                yield (Text(f"  {mode}: {heads}"))
    for names, reason in reasons(card.missing, card.model):
        yield (Text(f"\nNo {names}: {reason}", style="dim"))


def _token_line(tokens: Iterable[str]) -> str:
    return " ".join(visible(one) for one in list(tokens)[:_SHOWN])


def _grid_lines(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)


def _behaviour_lines(head: HeadIndex, scores: Iterable[HeadScores]) -> "Table":
    """Format scores on probes, those that define a role in bold."""
    from rich.text import Text

    grid = _grid_lines("on probes", "mean", "±", "unit", "rank", "measured on")
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
            Text(probe_of(one)),
        )
    return grid


def _weight_lines(card: HeadCard) -> "Table":
    grid = _grid_lines("from weights", "value", "rank")
    for name in _WEIGHTS:
        if name in card.scores:
            grid.add_row(name, short(card.scores[name]), str(card.ranks.get(name, "")))
    return grid
