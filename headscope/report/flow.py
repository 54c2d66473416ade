"""Sections and pictures of how information flows in one prompt."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import plotly.graph_objects as go

from headscope.plots import heatmap, mixing_map, route_graph, token_flow
from headscope.plots.style import Theme
from headscope.report.sections import Grid, Picture, Section, Words
from headscope.table import Contributions, Routes, TokenFlow

Drawing = Callable[[Theme], go.Figure]


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
