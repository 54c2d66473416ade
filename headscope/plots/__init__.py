"""Plots of results as plotly figures. Nothing here runs a model, opens a window or fetches.

One score: :func:`heatmap`, :func:`ranking`. Several: :func:`heatmaps`, :func:`scatter`. One head:
:func:`attention_pattern`. Weights: :func:`spectra`, :func:`eigenvalues`, :func:`composition_graph`,
:func:`composition_matrix`. Similarity: :func:`head_similarity`, :func:`head_map`. Ablation and
pruning curves: :func:`curves`. Needles: :func:`recall_grid`. Losses by token: :func:`token_losses`.
Layers: :func:`layers`. Lenses: :func:`lens_grid`, :func:`waterfall`, :func:`source_bars`. Images:
:func:`image_overlay`, :func:`head_maps`. Any result: :func:`figures`. To a file: :func:`save`
(html, png, svg, pdf).
"""

from headscope.plots.curves import curves as curves
from headscope.plots.curves import emergence as emergence
from headscope.plots.curves import layers as layers
from headscope.plots.curves import token_losses as token_losses
from headscope.plots.edges import circuit_graph as circuit_graph
from headscope.plots.edges import faithfulness_curves as faithfulness_curves
from headscope.plots.edges import position_circuit as position_circuit
from headscope.plots.export import save as save
from headscope.plots.figures import figures as figures
from headscope.plots.figures import figures_of as figures_of
from headscope.plots.flow import attention_pattern as attention_pattern
from headscope.plots.flow import lens_grid as lens_grid
from headscope.plots.flow import mixing_map as mixing_map
from headscope.plots.flow import route_graph as route_graph
from headscope.plots.flow import source_bars as source_bars
from headscope.plots.flow import token_flow as token_flow
from headscope.plots.flow import waterfall as waterfall
from headscope.plots.images import head_maps as head_maps
from headscope.plots.images import image_overlay as image_overlay
from headscope.plots.scores import heatmap as heatmap
from headscope.plots.scores import heatmaps as heatmaps
from headscope.plots.scores import ranking as ranking
from headscope.plots.scores import recall_grid as recall_grid
from headscope.plots.scores import scatter as scatter
from headscope.plots.weights import composition_graph as composition_graph
from headscope.plots.weights import composition_matrix as composition_matrix
from headscope.plots.weights import eigenvalues as eigenvalues
from headscope.plots.weights import head_map as head_map
from headscope.plots.weights import head_similarity as head_similarity
from headscope.plots.weights import spectra as spectra
