"""Edges between heads: which node tells which what, and how faithful a circuit of some is.

graph = hs.edges.attribute(model, probe, hs.metrics.logit_difference, method="eap_ig")
graph.top(10)                        # [(Edge("L0H3", "L2H1", "key"), -0.8), ...]
graph.head_scores                    # [layer head]: sums of the edges that leave each head
curve = hs.edges.faithfulness(model, probe, hs.metrics.logit_difference, graph)
found = hs.edges.acdc(model, probe, hs.metrics.kl_divergence, threshold=0.05)
curve.cpr, curve.cmd                 # beside those of random edges
"""

from headscope.edges.attribute import attribute as attribute
from headscope.edges.discovery import Circuit as Circuit
from headscope.edges.discovery import acdc as acdc
from headscope.edges.discovery import grown as grown
from headscope.edges.discovery import run_circuit as run_circuit
from headscope.edges.exchange import read_eap_json as read_eap_json
from headscope.edges.exchange import write_eap_json as write_eap_json
from headscope.edges.faithfulness import Faithfulness as Faithfulness
from headscope.edges.faithfulness import faithfulness as faithfulness
from headscope.edges.graph import EdgeGraph as EdgeGraph
from headscope.edges.graph import EdgeScores as EdgeScores
from headscope.edges.quality import Completeness as Completeness
from headscope.edges.quality import Stability as Stability
from headscope.edges.quality import completeness as completeness
from headscope.edges.quality import minimality as minimality
from headscope.edges.quality import stability as stability
from headscope.edges.wiring import Edge as Edge
from headscope.edges.wiring import Wiring as Wiring
