"""Sections and pictures of a needle scan: what was found, by whom, and what masking them does."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go

from headscope.base.sections import Grid, Section, Words
from headscope.plots import curves, heatmap, recall_grid
from headscope.plots.style import Theme
from headscope.report.sections import Block, Picture
from headscope.table import HeadScores, OrderCurve, RecallGrid
from headscope.table.notable import against, copying

Drawing = Callable[[Theme], go.Figure]
_MOST = 20


def retrieval_drawings(
    scores: HeadScores, grid: RecallGrid, masked: Mapping[str, OrderCurve]
) -> dict[str, Drawing]:
    """Every picture of a needle scan, by name, to be drawn in a theme; none of missing scores."""
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
    """Sections of the page: heads that copy, where needles were found, what masking does.

    Args:
        scores: of retrieval, by the paper's counting.
        grid: of recall.
        masked: curves by task.
        pictures: of :func:`retrieval_drawings`.
        said: in one sentence, which stands for the heads where no score could be had.
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
                "Right answers while heads are masked (their attention made flat, from the last "
                "token of the prompt on): those that copy most, those that copy least, and random "
                "ones that are not retrieval heads. The needles are others than those that the "
                "heads were found on."
            )
        ]
        what += [_picture(f"masking_{name}", f"Task: {name}.", pictures) for name in masked]
        sections.append(Section("What masking does", what))
    return sections


def _heads(scores: HeadScores, pictures: Mapping[str, Drawing]) -> list[Block]:
    """Which heads copy, as words, picture and table."""
    limit = scores.threshold or 0.0
    when, which = "the model answers", "said"
    if scores.provenance.probe.get("form") == "forced":
        when, which = "the model reads the answer (teacher-forced; all texts count)", "next"
    beyond = scores.significant()
    above = [(head, value) for head, value in scores.top(scores.mean.size) if value > limit]
    return [
        Words(
            f"{copying(scores)}. A head copies where, while {when}, its most attended token lies "
            f"in the needle's answer and is the token that is {which}. Grey: the layer's window "
            "hid the needle."
        ),
        _picture(scores.name, "Share of the needle that each head copies.", pictures),
        Grid(
            ("head", "share copied", "error", against(scores), "beyond chance"),
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
