"""Sections and pictures of what a model's weights say."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import plotly.graph_objects as go

from headscope.base.sections import Grid, Section, Words
from headscope.plots import composition_graph, composition_matrix, eigenvalues, spectra
from headscope.plots.style import Theme
from headscope.report.sections import Block, Picture
from headscope.table import HeadEigenvalues, HeadScores, HeadSpectra, PairScores

Drawing = Callable[[Theme], go.Figure]


def drawings(
    pairs: Sequence[PairScores],
    singular: Sequence[HeadSpectra],
    complex_values: Sequence[HeadEigenvalues],
    nodes: HeadScores | None = None,
) -> dict[str, Drawing]:
    """Every picture of a model's weights, by name, to be drawn in a theme."""
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
    """Sections of the page: paths, composition, spectra, eigenvalues, what is missing.

    Args:
        paths: per kind, chains of heads with their strength in units of chance.
        pictures: of :func:`drawings`.
        missing: what the family does not allow, with the reason.
    """
    chains: list[Block] = [
        Words(
            "Chains of heads in which each reads what the one before it writes, by weights alone. "
            "Strength: geometric mean of the composition scores, in units of chance; 1 is what "
            "heads get that know nothing of each other. High composition is not proof of use: "
            "ablate.",
        )
    ]
    for kind, found in paths.items():
        chains.append(Grid(("chain", "strength"), found, caption=kind))
    sections = [Section("Strongest paths", chains)] if any(paths.values()) else []
    for title, chosen, caption in (
        (
            "Composition",
            lambda name: "composition" in name,
            "How much of what the earlier head writes the later one reads: with its queries (Q), "
            "keys (K) or values (V).",
        ),
        (
            "Spectra",
            lambda name: name.endswith("_spectra"),
            "What stands above the grey band was learned: random factors of the same shape and "
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


def missing_words(missing: Mapping[str, str]) -> Grid:
    """What weights cannot say of this model, and why."""
    return Grid(("what", "why"), list(missing.items()))
