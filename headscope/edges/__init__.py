"""Edges between heads: attribution of edges, circuits, and their faithfulness.

graph = hs.edges.attribute(model, probe, hs.metrics.logit_difference, method="eap_ig")
graph.top(10)                        # [(Edge("L0H3", "L2H1", "key"), -0.8), ...]
graph.head_scores                    # [layer head]: sums of the edges that leave each head
circuit = hs.edges.circuit(model, probe, hs.metrics.logit_difference, graph, 30)
circuit.faithfulness, circuit.checks # and how stable, and what the controls give
curve = hs.edges.faithfulness(model, probe, hs.metrics.logit_difference, graph)
found = hs.edges.acdc(model, probe, hs.metrics.kl_divergence, threshold=0.05)
curve.cpr, curve.cmd                 # beside those of random edges
"""

from headscope.edges.attribute import attribute as attribute
from headscope.edges.compare import compare_methods as compare_methods
from headscope.edges.contextual import Contextual as Contextual
from headscope.edges.contextual import contextual as contextual
from headscope.edges.contextual import contextual_circuit as contextual_circuit
from headscope.edges.discovery import acdc as acdc
from headscope.edges.discovery import circuit as circuit
from headscope.edges.discovery import read_eap_json as read_eap_json
from headscope.edges.discovery import run_circuit as run_circuit
from headscope.edges.discovery import write_eap_json as write_eap_json
from headscope.edges.discrete import Discrete as Discrete
from headscope.edges.discrete import discrete as discrete
from headscope.edges.exact import HeadLoadings as HeadLoadings
from headscope.edges.exact import ScoreAttribution as ScoreAttribution
from headscope.edges.exact import head_loadings as head_loadings
from headscope.edges.exact import score_attribution as score_attribution
from headscope.edges.faithfulness import completeness as completeness
from headscope.edges.faithfulness import faithfulness as faithfulness
from headscope.edges.faithfulness import grown as grown
from headscope.edges.faithfulness import minimality as minimality
from headscope.edges.faithfulness import stability as stability
from headscope.edges.gates import best_heads as best_heads
from headscope.edges.gates import causal_gates as causal_gates
from headscope.table.edges import Checks as Checks
from headscope.table.edges import Circuit as Circuit
from headscope.table.edges import Completeness as Completeness
from headscope.table.edges import Edge as Edge
from headscope.table.edges import EdgeGraph as EdgeGraph
from headscope.table.edges import EdgeScores as EdgeScores
from headscope.table.edges import Faithfulness as Faithfulness
from headscope.table.edges import HeadAt as HeadAt
from headscope.table.edges import MethodComparison as MethodComparison
from headscope.table.edges import PositionCircuit as PositionCircuit
from headscope.table.edges import Stability as Stability
from headscope.table.edges import Wiring as Wiring
