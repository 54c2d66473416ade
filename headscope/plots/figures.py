"""Figures of any kind of result."""

from collections.abc import Callable, Mapping
from functools import partial, singledispatch

import plotly.graph_objects as go

from headscope.base.arguments import checked
from headscope.base.result import Composed
from headscope.plots.curves import curves, emergence, layers, token_losses
from headscope.plots.edges import circuit_graph, faithfulness_curves, position_circuit
from headscope.plots.figure import Theme
from headscope.plots.flow import (
    lens_grid,
    mixing_map,
    route_graph,
    source_bars,
    token_flow,
    waterfall,
)
from headscope.plots.images import head_maps
from headscope.plots.scores import effect_heatmap, heatmap, heatmaps, recall_grid
from headscope.plots.weights import (
    composition_graph,
    composition_matrix,
    eigenvalues,
    head_map,
    head_similarity,
    spectra,
)
from headscope.table import (
    AttentionMaps,
    Attribution,
    BackPatch,
    Circuit,
    Contributions,
    EdgeGraph,
    EffectGrid,
    Emergence,
    Faithfulness,
    HeadEigenvalues,
    HeadScores,
    HeadSimilarity,
    HeadSpectra,
    HeadTable,
    LensGrid,
    OrderCurve,
    PairScores,
    RecallGrid,
    Routes,
    TokenFlow,
    TokenLosses,
)
from headscope.table.edges import PositionCircuit
from headscope.table.kinds import KindTable
from headscope.table.lens import LayerTable
from headscope.table.relevance import Anchors, TokenRelevance

Drawing = Callable[[Theme], go.Figure]


@checked
@singledispatch
def figures(result: object) -> dict[str, Drawing]:
    """All figures of a result, by name, as functions of the theme.

    The main figure is named ``""``; others by a suffix to the result's name, such as ``_by_head``.
    A result without figures has none. Further result types are added with ``figures.register``.

    Args:
        result: result of any kind.

    Example:
        >>> list(hs.plots.figures(table))[:2]
        ['previous_token', 'induction']
        >>> hs.plots.figures(table["induction"])[""]("dark").layout.title.text is not None
        True
    """
    return {}


@checked
def figures_of(results: Mapping[str, object]) -> dict[str, Drawing]:
    """Figures of several results, with each result's name as prefix.

    Args:
        results: results of any kind, by name.

    Example:
        >>> list(figures_of({"induction": table["induction"]}))
        ['induction']
    """
    return {
        name + added: draw
        for name, result in results.items()
        for added, draw in figures(result).items()
    }


def _themed(picture: Callable[..., go.Figure], *of: object) -> Drawing:
    return lambda theme: partial(picture, *of)(theme=theme)


@figures.register
def _(result: Composed) -> dict[str, Drawing]:
    return figures_of(result.inside())


@figures.register
def _(result: HeadScores) -> dict[str, Drawing]:
    return {"": _themed(heatmap, result)}


@figures.register
def _(result: HeadTable) -> dict[str, Drawing]:
    return {name: _themed(heatmap, scores) for name, scores in result.items()}


@figures.register
def _(result: KindTable) -> dict[str, Drawing]:
    scores = result.scores()
    return {"": _themed(heatmaps, HeadTable(scores))} if scores else {}


@figures.register
def _(result: AttentionMaps) -> dict[str, Drawing]:
    return {"": _themed(head_maps, result)}


@figures.register
def _(result: EffectGrid) -> dict[str, Drawing]:
    return {"": _themed(effect_heatmap, result)} if len(result.axes) <= 2 else {}


@figures.register
def _(result: OrderCurve) -> dict[str, Drawing]:
    return {"": lambda theme: curves(result.effects, controls=result.controls, theme=theme)}


@figures.register
def _(result: PairScores) -> dict[str, Drawing]:
    return {"": _themed(composition_matrix, result), "_graph": _themed(composition_graph, result)}


@figures.register
def _(result: HeadSimilarity) -> dict[str, Drawing]:
    found = {"": _themed(head_similarity, result)}
    return found | ({"_map": _themed(head_map, result)} if result.within else {})


@figures.register
def _(result: HeadSpectra) -> dict[str, Drawing]:
    return {"": _themed(spectra, result)}


@figures.register
def _(result: HeadEigenvalues) -> dict[str, Drawing]:
    return {"": _themed(eigenvalues, result)}


@figures.register
def _(result: LensGrid) -> dict[str, Drawing]:
    return {"": _themed(lens_grid, result)}


@figures.register
def _(result: Attribution) -> dict[str, Drawing]:
    found = {"": _themed(waterfall, result)}
    if result.sources is not None:
        found["_by_source"] = _themed(source_bars, result)
    return found | {"_by_head": _themed(heatmap, result.head_scores())}


@figures.register
def _(result: Routes) -> dict[str, Drawing]:
    return {"": _themed(route_graph, result)}


@figures.register
def _(result: TokenFlow) -> dict[str, Drawing]:
    return {"": _themed(token_flow, result)}


@figures.register
def _(result: Contributions) -> dict[str, Drawing]:
    return {"": _themed(mixing_map, result)}


@figures.register
def _(result: RecallGrid) -> dict[str, Drawing]:
    return {"": _themed(recall_grid, result)}


@figures.register
def _(result: TokenLosses) -> dict[str, Drawing]:
    return {"": _themed(token_losses, result)}


@figures.register
def _(result: Emergence) -> dict[str, Drawing]:
    return {"": _themed(emergence, result)}


@figures.register
def _(result: LayerTable) -> dict[str, Drawing]:
    return {"": _themed(layers, result)}


@figures.register
def _(result: EdgeGraph) -> dict[str, Drawing]:
    return {"": _themed(circuit_graph, result), "_by_head": _themed(heatmap, result.heads)}


@figures.register
def _(result: Circuit) -> dict[str, Drawing]:
    return {"": _themed(circuit_graph, result)}


@figures.register
def _(result: PositionCircuit) -> dict[str, Drawing]:
    return {"": _themed(position_circuit, result)}


@figures.register
def _(result: Faithfulness) -> dict[str, Drawing]:
    return {"": _themed(faithfulness_curves, result)}


@figures.register
def _(result: TokenRelevance | Anchors) -> dict[str, Drawing]:
    return {"": _themed(effect_heatmap, result.grid())}


@figures.register
def _(result: BackPatch) -> dict[str, Drawing]:
    return {
        "": _themed(effect_heatmap, result.effects),
        "_null": _themed(effect_heatmap, result.null),
    }
