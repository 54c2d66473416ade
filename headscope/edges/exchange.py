"""Circuits in the files of other tools: the JSON of EAP-IG, which the MIB benchmark takes too.

Nodes are ``input``, ``a0.h1``, ``m0`` and ``logits`` there, and edges ``a0.h0->a1.h0<q>``.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from headscope.base.files import whole_file
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table.edges import HEAD_SLOTS, Edge, EdgeGraph, Wiring


def write_eap_json(
    path: "str | PathLike[str]",
    graph: EdgeGraph,
    kept: Bool[np.ndarray, " edge"] | None = None,
    *,
    d_model: int = 0,
) -> None:
    """Write scores of edges, and a circuit among them, for EAP-IG and MIB.

    A score there is, as here, the change of the metric when the edge is corrupted; a tool whose
    metric is a loss has the other sign.

    Args:
        path: of the file; what is there is replaced.
        graph: scores of all edges.
        kept: edges of the circuit, as ``circuit.kept`` or ``graph.chosen(100)`` have them; default:
            all.
        d_model: width of the model, which the format holds.

    Raises:
        InputError: if ``kept`` does not fit, or layers differ in whether their MLP is parallel.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> hs.edges.write_eap_json("circuit.json", graph, graph.chosen(10))
        >>> int(hs.edges.read_eap_json("circuit.json")[1].sum())
        10
    """
    wiring = graph.wiring
    inside = np.ones(len(wiring), bool) if kept is None else kept
    if inside.shape != (len(wiring),):
        raise InputError(f"kept has shape {inside.shape}, and the graph {len(wiring):,} edges.")
    if len(set(wiring.parallel)) > 1:
        raise InputError(
            "some layers of this model have an MLP beside their attention and some behind it, "
            "which this format cannot say."
        )
    used = {wiring.edges[at].source for at in np.nonzero(inside)[0]}
    text = {
        "cfg": {
            "n_layers": wiring.n_layers,
            "n_heads": wiring.n_heads,
            "parallel_attn_mlp": any(wiring.parallel),
            "d_model": d_model,
        },
        "nodes": {
            _node(name): {"in_graph": name in used or name == "logits"}
            for name in (*wiring.sources, "logits")
        },
        "edges": {
            _edge(edge): {"score": float(score), "in_graph": bool(there)}
            for edge, score, there in zip(wiring.edges, graph.mean, inside, strict=True)
        },
    }
    with whole_file(Path(path)) as file:
        file.write(json.dumps(text, allow_nan=False).encode())


def read_eap_json(path: "str | PathLike[str]") -> tuple[EdgeGraph, Bool[np.ndarray, " edge"]]:
    """Read what EAP-IG, MIB or :func:`write_eap_json` wrote.

    Args:
        path: of the file.

    Returns:
        The scores as a graph of one example, and which edges are in the circuit.

    Raises:
        InputError: if the file is missing or is not such a file.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> hs.edges.write_eap_json("all.json", graph)
        >>> scores, kept = hs.edges.read_eap_json("all.json")
        >>> bool(kept.all()), len(scores.wiring) == len(graph.wiring)
        (True, True)
    """
    try:
        text = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON: {error}.") from None
    try:
        facts = text["cfg"]
        parallel = bool(facts.get("parallel_attn_mlp", False))
        wiring = Wiring(int(facts["n_heads"]), (parallel,) * int(facts["n_layers"]))
        values, kept = np.zeros(len(wiring)), np.zeros(len(wiring), bool)
        for at, edge in enumerate(wiring.edges):
            values[at], kept[at] = _said(text["edges"][_edge(edge)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is not a circuit of EAP-IG or MIB: {type(error).__name__} at {error}."
        ) from None
    return EdgeGraph(wiring, "read from a file", "", values[:, None]), kept


def _said(entry: Any) -> tuple[float, bool]:
    """Score and membership of an edge; some files hold one of them alone."""
    if isinstance(entry, dict):
        score = entry.get("score", 0.0)
        return (0.0 if score is None else float(score)), bool(entry.get("in_graph", False))
    return 0.0, bool(entry)


def _node(name: str) -> str:
    if name == "embed":
        return "input"
    if name.startswith("MLP"):
        return f"m{name[3:]}"
    if name == "logits":
        return name
    head = HeadIndex.parse(name)
    return f"a{head.layer}.h{head.head}"


def _edge(edge: Edge) -> str:
    slot = f"<{edge.slot[0]}>" if edge.slot in HEAD_SLOTS else ""
    return f"{_node(edge.source)}->{_node(edge.target)}{slot}"
