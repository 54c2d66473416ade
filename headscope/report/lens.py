"""Sections and pictures of what lenses read of one prompt."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import plotly.graph_objects as go

from headscope.plots import heatmap, lens_grid, source_bars, waterfall
from headscope.plots.style import Theme
from headscope.report.sections import Block, Grid, Picture, Section, Words
from headscope.table import Attribution, HeadWords, LensGrid

Drawing = Callable[[Theme], go.Figure]


def lens_drawings(grids: Mapping[str, LensGrid], split: Attribution) -> dict[str, Drawing]:
    """Every picture of a prompt, by name, to be drawn in a theme."""
    found: dict[str, Drawing] = {
        f"lens_{site}": partial(_themed, lens_grid, grid) for site, grid in grids.items()
    }
    found["attribution"] = partial(_themed, waterfall, split)
    if split.sources is not None:
        found["attribution_by_source"] = partial(_themed, source_bars, split)
    found["attribution_by_head"] = partial(_themed, heatmap, split.head_scores())
    return found


def _themed(picture: Callable[..., go.Figure], of: object, theme: Theme) -> go.Figure:
    return picture(of, theme=theme)


def lens_sections(
    grids: Mapping[str, LensGrid],
    split: Attribution,
    words: HeadWords,
    pictures: Mapping[str, Drawing],
) -> list[Section]:
    """Sections of the page: what each layer says, what makes the logit, what heads say.

    Args:
        grids: of the lens, by site.
        split: of the logit.
        words: of heads at the same position.
        pictures: of :func:`lens_drawings`.
    """
    layers: list[Block] = [
        Words(
            "What the model would say next if it stopped here: each state through the model's own "
            "final norm and unembedding. The top row of the residual stream is the model itself."
        )
    ]
    layers += [_picture(f"lens_{site}", grid.name, pictures) for site, grid in grids.items()]
    largest = [(part.name, part.value) for part in split.top(12)]
    parts: list[Block] = [
        Words(
            f"The logit of {split.name} at position {split.position} is {split.whole:.4g}; its "
            f"parts sum to it up to {abs(split.gap):.1e}. The scales of norms are held fixed."
        ),
        _picture("attribution", "Largest parts of the logit.", pictures),
        _picture("attribution_by_head", "What each head adds.", pictures),
    ]
    if "attribution_by_source" in pictures:
        caption = "Which token's value was moved."
        parts.append(_picture("attribution_by_source", caption, pictures))
        rows = [(head, f"{at} {split.tokens[at]}", value) for head, at, value in
                split.top_sources(12)]  # fmt: skip
        parts.append(Grid(("head", "token", "logits"), rows, caption="Strongest moves"))
    parts.append(Grid(("part", "logits"), largest, caption="Largest parts"))
    return [
        Section("Layer by layer", layers),
        Section("What makes the logit", parts),
        Section("What single heads say", [_heads(split, words)]),
    ]


def _heads(split: Attribution, words: HeadWords) -> Grid:
    """Tokens of the heads that matter most."""
    rows = []
    for head in strongest(split):
        promoted = tuple(text for text, _ in words.promoted(head))
        suppressed = tuple(text for text, _ in words.suppressed(head))
        rows.append((head, promoted, suppressed))
    return Grid(("head", "promotes", "suppresses"), rows, caption="Heads with the largest parts")


def strongest(split: Attribution, k: int = 8) -> Sequence[str]:
    """Heads with the largest parts."""
    return [part.name for part in split.top(len(list(split))) if part.kind == "head"][:k]


def _picture(name: str, caption: str, pictures: Mapping[str, Drawing]) -> Picture:
    draw = pictures[name]
    return Picture(draw("light"), draw("dark"), said=caption, caption=caption)
