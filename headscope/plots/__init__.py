"""Pictures of tables, as plotly figures. Nothing here runs a model, shows a window or fetches.

One score: :func:`heatmap`, :func:`ranking`. Several: :func:`heatmaps`, :func:`scatter`. One head:
:func:`attention_pattern`. To a file: :func:`save` (html, png, svg, pdf).
"""

from headscope.plots.bars import ranking as ranking
from headscope.plots.export import save as save
from headscope.plots.grid import heatmap as heatmap
from headscope.plots.grid import heatmaps as heatmaps
from headscope.plots.pattern import attention_pattern as attention_pattern
from headscope.plots.points import scatter as scatter
