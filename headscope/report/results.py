"""What each kind of result says on a page: sections of texts, facts, tables and pictures.

Circuits, matched models, emergence along training, flow, lens readings, needle scans.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import plotly.graph_objects as go

from headscope.plots import (
    composition_graph,
    composition_matrix,
    curves,
    eigenvalues,
    emergence,
    heatmap,
    lens_grid,
    mixing_map,
    recall_grid,
    route_graph,
    source_bars,
    spectra,
    token_flow,
    waterfall,
)
from headscope.plots.style import Theme
from headscope.report.sections import Block, Grid, Picture, Section, Words
from headscope.table import (
    Attribution,
    Comparison,
    Contributions,
    Emergence,
    HeadEigenvalues,
    HeadScores,
    HeadSpectra,
    HeadWords,
    LensGrid,
    OrderCurve,
    PairScores,
    RecallGrid,
    Routes,
    TokenFlow,
)
from headscope.table.notable import against, copying

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
            "heads get that know nothing of each other. High composition is no proof of use: "
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


_MOST_PAIRS = 200

_ORDER = "Pairs first whose heads both stand out from the typical head of their model"


def comparison_sections(found: Comparison) -> list[Section]:
    """How heads were matched, and which scores differ by more than their interval."""
    one, two = found.names
    words = Words(
        f"{one} and {two}: {len(found.pairs)} heads matched, {found.moved:.0%} of them under "
        f"another address. Closeness: {found.measure}."
    )
    pairs = [
        (str(a), str(b), float(close))
        for (a, b), close in zip(found.pairs[:_MOST_PAIRS], found.closeness, strict=False)
    ]
    clear = np.argwhere((found.low > 0) | (found.high < 0))
    order = sorted(clear.tolist(), key=lambda at: -abs(_in_spread(found, at)))[:_MOST_PAIRS]
    rows = [
        (
            str(found.pairs[i][0]),
            str(found.pairs[i][1]),
            found.scores[j],
            float(found.first[i, j]),
            float(found.second[i, j]),
            float(found.difference[i, j]),
            float(found.low[i, j]),
            float(found.high[i, j]),
        )
        for i, j in order
    ]
    names = ("head", "match", "score", one, two, "difference", "95% from", "to")
    caption = "Differences whose 95% interval excludes 0, the largest of each score's spread first"
    return [
        Section("Matched heads", [words, Grid((one, two, "closeness"), pairs, _ORDER)]),
        Section("Differences", [Grid(names, rows, caption)]),
    ]


def _in_spread(found: Comparison, at: list[int]) -> float:
    """A difference in units of the score's spread over all heads shown."""
    pair, score = at
    spread = float(np.nanstd(np.concatenate([found.first[:, score], found.second[:, score]])))
    return float(found.difference[pair, score]) / (spread or 1.0)


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


def flow_drawings(
    routes: Routes, flows: Sequence[TokenFlow], norms: Contributions
) -> dict[str, Drawing]:
    """Every picture of a prompt, by name, to be drawn in a theme."""

    def themed(picture: Callable[..., go.Figure], of: object) -> Drawing:
        return lambda theme: partial(picture, of)(theme=theme)

    found = {"routes": themed(route_graph, routes)}
    found["flow_by_head"] = themed(heatmap, routes.head_scores())
    found |= {flow.name: themed(token_flow, flow) for flow in flows}
    found["mixing"] = themed(mixing_map, norms)
    found["norm_share"] = themed(heatmap, norms.norm_share)
    return found


def flow_sections(routes: Routes, pictures: Mapping[str, Drawing]) -> list[Section]:
    """Sections of the page: the routes, matrices from token to token, and norms.

    Args:
        routes: of the prompt.
        pictures: of :func:`flow_drawings`.
    """
    strongest = [(str(head), value) for head, value in routes.top(12)]
    order = sorted(range(len(routes.tokens)), key=lambda at: -routes.token_flow[at])[:12]
    tokens = [(f"{at} {routes.tokens[at]}", float(routes.token_flow[at])) for at in order]
    traced = Section(
        "Routes",
        [
            Words(
                f"What position {routes.position} holds has importance 1 and is handed down by "
                "shares, layer by layer. Parts with a share below "
                f"{routes.part_threshold:g} are dropped; edges from {routes.edge_threshold:g} are "
                f"drawn. {routes.bias.sum():.1%} ended in biases of attention."
            ),
            _picture("routes", "Edges on the way to the target; wide where much flows.", pictures),
            _picture("flow_by_head", "Importance that passes through each head.", pictures),
            Grid(("head", "flow"), strongest, caption="Heads that most passes through"),
            Grid(("token", "flow"), tokens, caption="Input tokens that most goes back to"),
        ],
    )
    said = {
        "rollout": "Attention multiplied over layers, half of every step the residual stream.",
        "alti": "The same of the vectors that attention moves, by how near they bring the sum.",
    }
    matrices = [_picture(name, said[name], pictures) for name in said if name in pictures]
    norms = [
        _picture("mixing", "How much of each position comes from others, by layer.", pictures),
        _picture("norm_share", "Share of its layer's norms that each head moves.", pictures),
    ]
    return [traced, Section("From token to token", matrices), Section("What moves", norms)]


def _picture(name: str, caption: str, pictures: Mapping[str, Drawing]) -> Picture:
    draw = pictures[name]
    return Picture(draw("light"), draw("dark"), said=caption, caption=caption)


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
        Section("What single heads say", [_head_words(split, words)]),
    ]


def _head_words(split: Attribution, words: HeadWords) -> Grid:
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


_MOST_HEADS = 20


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
    heads = _top_heads(scores, pictures) if scores.name in pictures else [Words(said)]
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
                "ones that are no retrieval heads. The needles are others than those that the "
                "heads were found on."
            )
        ]
        what += [_picture(f"masking_{name}", f"Task: {name}.", pictures) for name in masked]
        sections.append(Section("What masking does", what))
    return sections


def _top_heads(scores: HeadScores, pictures: Mapping[str, Drawing]) -> list[Block]:
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
                for head, value in above[:_MOST_HEADS]
            ],
            caption=f"Heads above {limit:g}, highest first",
        ),
    ]
