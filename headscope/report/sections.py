"""Page sections with their pictures drawn, as plain values for the template.

For results of any kind, for what a model's weights tell, and for a needle scan.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from headscope.base.result import Drawn, Facts, Rows, Section, TableCell, Words, reasons, short
from headscope.errors import InputError
from headscope.plots import (
    composition_graph,
    composition_matrix,
    curves,
    eigenvalues,
    heatmap,
    recall_grid,
    spectra,
)
from headscope.plots.figure import Theme
from headscope.plots.figures import Drawing
from headscope.table import (
    HeadEigenvalues,
    HeadScores,
    HeadSpectra,
    OrderCurve,
    PairScores,
    RecallGrid,
)
from headscope.table.kinds import control_words, copying_summary


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure in a light and a dark version; the page shows the one for the reader's theme.

    Attributes:
        light: version for light pages; a figure, or its stored JSON.
        dark: version for dark pages.
        said: text alternative for readers who cannot see it.
        caption: what to look for.
    """

    light: go.Figure | dict[str, Any]
    dark: go.Figure | dict[str, Any]
    said: str
    caption: str = ""


Block = Words | Facts | Rows | Drawn | Picture


def with_pictures(sections: Sequence[Section], drawings: Mapping[str, Drawing]) -> list[Section]:
    """Draw the sections' named figures in both themes; drop names without a figure."""
    return [
        Section(
            one.title,
            [_pictured(block, drawings) for block in one.blocks if _known(block, drawings)],
        )
        for one in sections
    ]


def laid(result: object) -> Sequence[Section]:
    """Sections of a result; none if it does not define any."""
    sections = getattr(result, "sections", None)
    return sections() if sections is not None else ()


def _known(block: Block, drawings: Mapping[str, Drawing]) -> bool:
    return not isinstance(block, Drawn) or block.name in drawings


def _pictured(block: Block, drawings: Mapping[str, Drawing]) -> Block:
    if not isinstance(block, Drawn):
        return block
    draw = drawings[block.name]
    caption = block.said if block.caption is None else block.caption
    return Picture(draw("light"), draw("dark"), said=block.said, caption=caption)


def laid_out(
    sections: Sequence[Section], first: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Convert sections to plain values for the template, with pictures numbered from ``first``."""
    pictures: list[dict[str, Any]] = []
    shown = []
    for number, section in enumerate(sections):
        blocks = []
        for block in section.blocks:
            plain: dict[str, Any] = {"kind": type(block).__name__.lower(), "is": block}
            if isinstance(block, Rows):
                plain["rows"] = [[_cell(cell) for cell in row] for row in block.rows]
            elif isinstance(block, Picture):
                plain["number"] = first + len(pictures)
                themes = {"light": block.light, "dark": block.dark}
                pictures.append({name: plain_figure(one) for name, one in themes.items()})
            blocks.append(plain)
        shown.append({"id": f"section-{number}", "title": section.title, "blocks": blocks})
    return shown, pictures


def plain_figure(figure: go.Figure | dict[str, Any]) -> dict[str, Any]:
    """A figure as JSON values."""
    if isinstance(figure, dict):
        return figure
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def _cell(cell: TableCell) -> dict[str, Any]:
    """Cell as text or as tokens, and whether it is numeric."""
    if isinstance(cell, tuple):
        return {"tokens": cell, "text": "", "number": False}
    if isinstance(cell, str):
        return {"tokens": (), "text": cell, "number": False}
    text = str(cell) if isinstance(cell, int) else short(float(cell))
    return {"tokens": (), "text": text, "number": True}


_MAX_BYTES = 100_000_000


def sections_json(sections: Sequence[Section]) -> bytes:
    """Serialise sections with their pictures in both themes as JSON."""
    plain = [
        {"title": one.title, "blocks": [_plain(block) for block in one.blocks]} for one in sections
    ]
    return json.dumps(plain, separators=(",", ":")).encode()


def read_sections(file: Path) -> list[Section]:
    """Read sections written by :func:`sections_json`.

    Raises:
        InputError: if the file holds something else.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError(f"{str(file)!r} is larger than {_MAX_BYTES // 10**6} MB.")
        return [
            Section(str(one["title"]), [_block(block) for block in one["blocks"]])
            for one in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{str(file)!r} holds no sections of a report: {error!r}.") from None


def _plain(block: Block) -> dict[str, Any]:
    if isinstance(block, Words):
        return {"kind": "words", "text": block.text, "quiet": block.quiet}
    if isinstance(block, Facts):
        return {"kind": "facts", "pairs": [list(pair) for pair in block.pairs]}
    if isinstance(block, Rows):
        rows = [list(row) for row in block.rows]
        return {
            "kind": "grid",
            "columns": list(block.columns),
            "rows": rows,
            "caption": block.caption,
        }
    if isinstance(block, Drawn):
        raise TypeError(f"the figure {block.name!r} is not drawn yet: see with_pictures.")
    return {
        "kind": "picture",
        "light": plain_figure(block.light),
        "dark": plain_figure(block.dark),
        "said": block.said,
        "caption": block.caption,
    }


def _block(plain: Mapping[str, Any]) -> Block:
    kind = plain["kind"]
    if kind == "words":
        return Words(str(plain["text"]), bool(plain["quiet"]))
    if kind == "facts":
        return Facts([(str(name), str(value)) for name, value in plain["pairs"]])
    if kind == "grid":
        rows = [tuple(_read_cell(cell) for cell in row) for row in plain["rows"]]
        return Rows(tuple(str(name) for name in plain["columns"]), rows, str(plain["caption"]))
    if kind == "picture":
        themes = {name: _figure(plain[name]) for name in ("light", "dark")}
        return Picture(**themes, said=str(plain["said"]), caption=str(plain["caption"]))
    raise ValueError(f"unknown kind of block {kind!r}")


def _read_cell(cell: object) -> TableCell:
    if isinstance(cell, list):
        return tuple(str(token) for token in cell)
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return str(cell)
    return cell


def _figure(plain: object) -> dict[str, Any]:
    """Data and layout of a figure, dropping anything else in the file."""
    if not isinstance(plain, dict):
        raise TypeError("a figure is an object")
    return {"data": list(plain["data"]), "layout": dict(plain["layout"])}


def drawings(
    pairs: Sequence[PairScores],
    singular: Sequence[HeadSpectra],
    complex_values: Sequence[HeadEigenvalues],
    nodes: HeadScores | None = None,
) -> dict[str, Drawing]:
    """Figures of a model's weights, by name, as functions of the theme."""
    found: dict[str, Drawing] = {}
    if pairs:
        found["composition"] = partial(_themed, composition_graph, pairs)
    for pair in pairs:
        found[pair.name] = partial(_themed, composition_matrix, pair)
        if pair.name.startswith("K"):
            coloured = partial(composition_graph, most=30, nodes=nodes)
            found[f"{pair.name}_graph"] = partial(_themed, coloured, pair)
    for one in singular:
        found[f"{one.name}_spectra"] = partial(_themed, spectra, one)
    for values in complex_values:
        found[f"{values.name}_eigenvalues"] = partial(_themed, eigenvalues, values)
    return found


def _themed(picture: Callable[..., go.Figure], of: object, theme: Theme) -> go.Figure:
    return picture(of, theme=theme)


def circuit_sections(
    paths: Mapping[str, Sequence[tuple[str, float]]],
    pictures: Mapping[str, Drawing],
    missing: Mapping[str, str],
) -> list[Section]:
    """Sections about weights: paths, composition, spectra, eigenvalues, and what is missing.

    Args:
        paths: per kind, chains of heads with their strength in units of chance.
        pictures: from :func:`drawings`.
        missing: what the model family does not allow, with the reason.
    """
    chains: list[Block] = [
        Words(
            "Chains of heads in which each reads the previous one's output, by weights alone. "
            "Strength: geometric mean of the composition scores, in units of chance; "
            "independent heads get 1. High composition does not prove use: ablate.",
        )
    ]
    for kind, found in paths.items():
        chains.append(Rows(("chain", "strength"), found, caption=kind))
    sections = [Section("Strongest paths", chains)] if any(paths.values()) else []
    for title, chosen, caption in (
        (
            "Composition",
            lambda name: "composition" in name,
            "How strongly the later head reads the earlier head's output: by its queries (Q), "
            "keys (K) or values (V).",
        ),
        (
            "Spectra",
            lambda name: name.endswith("_spectra"),
            "Values above the grey band were learned: random factors of the same shape and "
            "variance stay inside it. A line that falls steeply is a head that uses few "
            "directions.",
        ),
        (
            "Eigenvalues",
            lambda name: name.endswith("_eigenvalues"),
            "OV to the right: attended tokens raise their own logit; to the left: lower it. QK to "
            "the right: queries look for keys of their own token.",
        ),
    ):
        blocks: list[Block] = [Words(caption, quiet=True)]
        blocks += [
            Picture(draw("light"), draw("dark"), f"{name.replace('_', ' ')} of all heads")
            for name, draw in pictures.items()
            if chosen(name)
        ]
        if len(blocks) > 1:
            sections.append(Section(title, blocks))
    if missing:
        sections.append(Section("Not in this family", [missing_words(missing)]))
    return sections


def missing_words(missing: Mapping[str, str], model: str = "") -> Rows:
    """Explain which weight analyses are missing for this model, and why."""
    return Rows(("what", "why"), reasons(missing, model))


_MOST = 20


def retrieval_drawings(
    scores: HeadScores, grid: RecallGrid, masked: Mapping[str, OrderCurve]
) -> dict[str, Drawing]:
    """Figures of a needle scan, by name, as functions of the theme; none for missing scores."""
    found: dict[str, Drawing] = {"recall": partial(_recall, grid)}
    if np.isfinite(scores.mean).any():
        found = {scores.name: partial(_heatmap, scores)} | found
    return found | {f"masking_{name}": partial(_curve, one) for name, one in masked.items()}


def _heatmap(scores: HeadScores, theme: Theme) -> go.Figure:
    return heatmap(scores, theme=theme)


def _recall(grid: RecallGrid, theme: Theme) -> go.Figure:
    return recall_grid(grid, theme=theme)


def _curve(curve: OrderCurve, theme: Theme) -> go.Figure:
    return curves(curve.effects, controls=curve.controls, theme=theme)


def retrieval_sections(
    scores: HeadScores,
    grid: RecallGrid,
    masked: Mapping[str, OrderCurve],
    pictures: Mapping[str, Drawing],
    said: str,
) -> list[Section]:
    """Sections about retrieval: copying heads, where needles were found, effect of masking.

    Args:
        scores: retrieval scores, counted as in the paper.
        grid: recall by length and depth.
        masked: curves by task.
        pictures: from :func:`retrieval_drawings`.
        said: sentence that replaces the heads if no score could be computed.
    """
    heads = _heads(scores, pictures) if scores.name in pictures else [Words(said)]
    beyond = grid.provenance.probe.get("extrapolated_from")
    counted = f"{int(grid.count.sum())} texts, {float(np.nanmean(grid.share)):.0%} answered right."
    if beyond is not None:
        counted += (
            f" The model was trained on at most {beyond} tokens; positions were extrapolated."
        )
    where: list[Block] = [
        Words(counted),
        _picture("recall", "Answers by length and depth.", pictures),
    ]
    sections = [Section("Retrieval heads", heads), Section("Where needles are found", where)]
    if masked:
        what: list[Block] = [
            Words(
                "Correct answers while heads are masked (their attention made flat, from the "
                "last token of the prompt on): those that copy most, those that copy least, and "
                "random ones that are not retrieval heads. The needles differ from those that "
                "the heads were found on."
            )
        ]
        what += [_picture(f"masking_{name}", f"Task: {name}.", pictures) for name in masked]
        sections.append(Section("What masking does", what))
    return sections


def _heads(scores: HeadScores, pictures: Mapping[str, Drawing]) -> list[Block]:
    """Heads that copy, as text, picture and table."""
    limit = scores.threshold or 0.0
    when, which = "the model answers", "said"
    if scores.provenance.probe.get("form") == "forced":
        when, which = "the model reads the answer (teacher-forced; all texts count)", "next"
    beyond = scores.significant()
    above = [(head, value) for head, value in scores.top(scores.mean.size) if value > limit]
    return [
        Words(
            f"{copying_summary(scores)}. A head copies where, while {when}, its most attended "
            f"token lies in the needle's answer and is the token that is {which}. Grey: the "
            "layer's window hid the needle."
        ),
        _picture(scores.name, "Share of the needle that each head copies.", pictures),
        Rows(
            ("head", "share copied", "error", control_words(scores), "beyond chance"),
            [
                (
                    str(head),
                    value,
                    float(scores.sem[head]),
                    float(scores.null[head]),
                    "yes" if beyond[head] else "no",
                )
                for head, value in above[:_MOST]
            ],
            caption=f"Heads above {limit:g}, highest first",
        ),
    ]


def _picture(name: str, caption: str, pictures: Mapping[str, Drawing]) -> Picture:
    draw = pictures[name]
    return Picture(draw("light"), draw("dark"), said=caption, caption=caption)
