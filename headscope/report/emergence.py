"""Sections of a page on how heads appear along training."""

from functools import partial

from headscope.plots import emergence
from headscope.report.sections import Block, Grid, Picture, Section, Words
from headscope.table import Emergence


def emergence_sections(story: Emergence) -> list[Section]:
    """Findings, the picture, and the numbers behind it."""
    drawn = partial(emergence, story)
    blocks: list[Block] = [Words(f"{one}.") for one in story.findings()]
    blocks.append(
        Picture(
            drawn(),
            drawn(theme="dark"),
            f"Scores of heads and losses of {story.model} against training step.",
        )
    )
    if "in-context score" in story.losses:
        blocks.append(
            Words(
                "In-context score: mean loss of the last tenth of a text less that from 5% to 15% "
                "of it; negative where context helps (Olsson et al. 2022).",
                quiet=True,
            )
        )
    best = {name: story.best(name) for name in story.scores}
    columns = ["checkpoint", *(f"{name} {head}" for name, head in best.items()), *story.losses]
    rows: list[tuple[str | float, ...]] = [
        (
            name,
            *(float(story.tables[at][score].mean[head]) for score, head in best.items()),
            *(float(story.mean(curve)[at]) for curve in story.losses),
        )
        for at, name in enumerate(story.checkpoints)
    ]
    blocks.append(Grid(columns, rows, "Each score of the head that is best at the end; losses"))
    return [Section("Along training", blocks)]
