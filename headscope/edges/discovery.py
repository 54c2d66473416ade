"""Circuit discovery (ACDC), running known circuits, and exchange with other tools."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import whole_file
from headscope.base.options import RunOptions
from headscope.edges.faithfulness import check_graph, checks_of, grown, mask_of, mean_value
from headscope.edges.written import EdgeMeasurement
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table.edges import HEAD_SLOTS, Circuit, Edge, EdgeGraph, Wiring

SearchOrder = Literal["later first", "earlier first"]


@checked
@own_types()
def acdc(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    threshold: float,
    *,
    order: str = "later first",
    absolute: bool = True,
    ablation: str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Circuit:
    """Find a circuit with ACDC: remove edges one by one as long as the metric allows.

    Targets are visited from the output down. Each incoming edge of a target is removed in turn, and
    stays removed if the mean metric changes by less than ``threshold``. Edges into a node without
    outgoing edges are removed without a test. Earlier decisions influence later ones, so the result
    depends on the order: run both orders and compare.

    Each edge costs a full pass over all examples, so hundreds of edges take minutes.

    Args:
        model: see :func:`attribute`.
        probe: texts with answers, and the pair ``corrupt`` for ``patch``.
        metric: metric from :mod:`headscope.metrics`, e.g. ``kl_divergence`` as in the paper, or
            ``f(logits, probe) -> [batch]``.
        threshold: largest change for removal, in the metric's unit, above 0.
        order: order of a target's sources: ``later first`` as in the paper, or ``earlier first``.
        absolute: compare the magnitude of the change; if False, only a rise of the metric counts,
            as for a divergence.
        ablation: what a removed edge carries; see :func:`attribute`.
        batch_size: examples per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the probe does not fit the metric, or threshold or order is invalid.
        UnsupportedModelError: see :func:`attribute`.

    Source:
        Conmy et al. 2023, "Towards automated circuit discovery", arXiv 2304.14997.

    Example:
        >>> made = hs.compiled.from_library("previous")
        >>> found = acdc(made.model, made.probe(4), hs.metrics.loss, 0.01, ablation="zero")
        >>> hs.edges.Edge("L0H0", "logits", "output") in found.edges
        True
    """
    if order not in get_args(SearchOrder):
        raise InputError(nearest(str(order), get_args(SearchOrder), kind="order"))
    if not threshold > 0:
        raise InputError(f"threshold={threshold!r}: give a number above 0, in the metric's unit.")
    options = RunOptions(batch_size, progress=progress)
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    wiring = study.wiring
    kept, changes = np.ones(len(wiring), bool), np.full(len(wiring), np.nan)
    batches = list(study.batches())
    with options.track(float(len(wiring)), "acdc") as advance:
        full = value = mean_value(batches, study, kept)
        for target, places in _visits(wiring, order):
            if _is_left(wiring, kept, target):
                for at in places:
                    kept[at] = False
                    tried = mean_value(batches, study, kept)
                    changes[at] = tried - value
                    change = abs(changes[at]) if absolute else changes[at]
                    if change < threshold:
                        value = tried
                    else:
                        kept[at] = True
                    advance(1.0)
            else:
                kept[places] = False
                advance(float(len(places)))
        value = mean_value(batches, study, kept)
        empty = mean_value(batches, study, np.zeros(len(wiring), bool))
        checks = checks_of(study, batches, kept)
    about = origin(
        model, probe, attention="whole passes", metric=study.metric.name, method="acdc",
        ablation=study.ablation, threshold=threshold, order=order, absolute=absolute,
    )  # fmt: skip
    return Circuit(
        wiring, kept, changes, value, full, empty, "acdc", order, float(threshold),
        study.ablation, study.metric.unit, about, checks,
    )  # fmt: skip


@checked
@own_types()
def run_circuit(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    edges: Iterable[Sequence[str]],
    *,
    ablation: str | None = None,
    method: str = "given",
    batch_size: int | None = None,
) -> Circuit:
    """Run a circuit with known edges: from a paper, a graph's top edges, or ground truth.

    Args:
        model: see :func:`attribute`.
        probe: texts with answers.
        metric: see :func:`attribute`.
        edges: edges of the circuit, as (source, target, slot).
        ablation: what edges outside the circuit carry; see :func:`attribute`.
        method: how the edges were found, to record with the result.
        batch_size: examples per pass; affects only time and memory.

    Raises:
        InputError: if the model has no such edge, or probe and metric do not fit.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> some = hs.edges.grown(graph, 20)
        >>> found = hs.edges.run_circuit(model, names, hs.metrics.logit_difference, some)
        >>> len(found.edges)
        20
    """
    study = EdgeMeasurement.of(model, probe, metric, ablation, RunOptions(batch_size))
    kept = np.zeros(len(study.wiring), bool)
    for edge in edges:
        kept[study.wiring.find(edge)] = True
    return _measured(study, kept, np.full(len(kept), np.nan), method, None, 0)


@checked
@own_types()
def circuit(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    graph: EdgeGraph,
    count: int,
    *,
    seed: int = 0,
    batch_size: int | None = None,
) -> Circuit:
    """Grow a circuit from a graph's scores, run it, and check it.

    Its edges are those of :func:`grown`. ``circuit.checks`` holds its stability over resampled
    prompts (stable needs 100 prompts and an overlap of 0.8), the result of a circuit of the same
    size grown from the embedding up, and controls: all edges removed, a position that corruption
    does not reach, and random heads from the same layers.

    Args:
        model: model that the graph was computed on.
        probe: probe that the graph was computed on.
        metric: metric that the graph was computed with.
        graph: graph from :func:`attribute`.
        count: number of edges in the circuit.
        seed: seed for resampled prompts and random heads.
        batch_size: examples per pass; affects only time and memory.

    Raises:
        InputError: if the graph has fewer edges, or belongs to another model or probe.

    Source:
        Hanna et al. 2024, arXiv 2403.17806 (greedy search); Meloux et al. 2025,
        arXiv 2502.20914 (circuits that are not unique).

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=4)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> found = hs.edges.circuit(model, names, hs.metrics.logit_difference, graph, 20)
        >>> len(found.edges), found.checks.verdict
        (20, 'not known: 4 prompts, and it takes 100')
    """
    check_graph(model, probe, graph)
    edges = grown(graph, count)
    study = EdgeMeasurement.of(
        model, probe, metric, graph.ablation, RunOptions(batch_size, seed=seed)
    )
    kept = mask_of(study.wiring, np.array([study.wiring.find(edge) for edge in edges]))
    return _measured(study, kept, graph.mean, f"{graph.method}, grown", graph, seed)


def _measured(
    study: EdgeMeasurement,
    kept: Bool[np.ndarray, " edge"],
    changes: Float[np.ndarray, " edge"],
    method: str,
    graph: EdgeGraph | None,
    seed: int,
) -> Circuit:
    """Run a circuit, all edges and no edges, and compute the checks."""
    batches = list(study.batches())
    every, none = np.ones_like(kept), np.zeros_like(kept)
    value, full, empty = (mean_value(batches, study, one) for one in (kept, every, none))
    about = origin(
        study.model, study.probe, attention="whole passes", metric=study.metric.name,
        method=method, ablation=study.ablation,
    )  # fmt: skip
    return Circuit(
        study.wiring, kept, changes, value, full, empty, method,
        ablation=study.ablation, unit=study.metric.unit, provenance=about,
        checks=checks_of(study, batches, kept, graph, seed),
    )  # fmt: skip


def _visits(wiring: Wiring, order: str) -> Iterable[tuple[str, list[int]]]:
    """Targets from the output down, each slot separately, with the indices of their edges."""
    by_target: dict[tuple[str, str], list[int]] = {}
    for at, edge in enumerate(wiring.edges):
        by_target.setdefault((edge.target, edge.slot), []).append(at)
    for target, slot in sorted(by_target, key=_depth(wiring), reverse=True):
        places = by_target[target, slot]
        yield target, places[::-1] if order == "later first" else places


def _depth(wiring: Wiring) -> Callable[[tuple[str, str]], tuple[int, int]]:
    """Position of a target in the order of computation; slots of a head in the order q, k, v."""
    places: Mapping[str, int] = {name: at for at, name in enumerate((*wiring.sources, "logits"))}
    slots = {name: at for at, name in enumerate(HEAD_SLOTS)}
    return lambda target: (places[target[0]], slots.get(target[1], 0))


def _is_left(wiring: Wiring, kept: Bool[np.ndarray, " edge"], target: str) -> bool:
    """Whether a node still has outgoing edges; the output always counts."""
    if target == "logits":
        return True
    number = wiring.sources.index(target)
    return bool(kept[wiring.ends[1] == number].any())


@checked
def write_eap_json(
    path: "str | PathLike[str]",
    graph: EdgeGraph,
    kept: Bool[np.ndarray, " edge"] | None = None,
    *,
    d_model: int = 0,
) -> None:
    """Write scores of edges, and a circuit among them, for EAP-IG and MIB.

    As here, a score in this format is the change in the metric when the edge is corrupted; tools
    whose metric is a loss have the opposite sign.

    Args:
        path: path of the file; an existing file is replaced.
        graph: scores of all edges.
        kept: mask of the circuit's edges, e.g. ``circuit.kept`` or ``graph.chosen(100)``. Default:
            all.
        d_model: width of the model, recorded in the file.

    Raises:
        InputError: if ``kept`` has another shape, or only some layers have a parallel MLP.

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
            "only some layers of this model have a parallel MLP, which this format cannot "
            "represent."
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


@checked
def read_eap_json(path: "str | PathLike[str]") -> tuple[EdgeGraph, Bool[np.ndarray, " edge"]]:
    """Read a file written by EAP-IG, MIB or :func:`write_eap_json`.

    Args:
        path: path of the file.

    Returns:
        The scores as a graph of one example, and a mask of the circuit's edges.

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
    """Score and membership of an edge; some files have only one of them."""
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
