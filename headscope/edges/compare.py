"""Compare estimates of edges and heads with exact patching on the same texts."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.statistics import rank_correlation
from headscope.edges.attribute import EdgeMethod, attribute, passes_of
from headscope.edges.faithfulness import jaccard, strongest
from headscope.edges.gates import best_heads, causal_gates
from headscope.edges.written import EdgeBatch, EdgeMeasurement, measured_with
from headscope.errors import InputError, nearest
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table.edges import Edge, EdgeGraph, MethodComparison, Wiring

OF_HEADS = ("causal_gates", "best_heads")
_DRAWS = 200
_GATE_STEPS = 60
Ranked = dict[str, Any]


@checked
@own_types()
def compare_methods(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    methods: Sequence[str | EdgeGraph] | None = None,
    *,
    steps: int = 5,
    ablation: str | None = None,
    exact: EdgeGraph | None = None,
    sample: int | None = None,
    count: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> MethodComparison:
    """Rank methods by their agreement with exact patching.

    Edge scores are compared with the effect of ablating each edge alone, and head scores (summed
    outgoing edges, or gates) with that of ablating each head alone, by Spearman's rank correlation
    of magnitudes. Intervals resample examples, the same on both sides.

    Exact patching takes a pass per edge: pass ``exact`` if you already have it. If a model has too
    many edges, ``sample`` patches a random subset, or ``exact`` may cover only some edges, as from
    ``attribute(..., edges=)``; edges are then compared on those.

    Args:
        model: as in :func:`attribute`.
        probe: texts with answers.
        metric: see :func:`attribute`; gates need a metric with a direction.
        methods: methods of :func:`attribute`, ``causal_gates`` and ``best_heads`` for heads, or
            graphs computed on the same texts. Default: all except exact patching.
        steps: number of gradients in integrated methods.
        ablation: see :func:`attribute`.
        exact: scores from ``exact`` on the same texts, for all or some edges. Default: computed.
        sample: patch this many edges, drawn at random, instead of all.
        count: number of strongest edges whose overlap is compared. Default: one in twenty.
        seed: seed for the bootstrap and the sample.
        batch_size: examples per pass.
        progress: show progress bars. Default: only in a terminal or notebook, after 2 s.

    Returns:
        One row per method, best first.

    Raises:
        InputError: if there is no such method, or ``exact`` belongs to other texts.

    Example:
        >>> case = hs.compiled.make_case("previous", {}, batch=4)
        >>> found = hs.edges.compare_methods(
        ...     case.made.model, case.probe, hs.metrics.answer_log_prob, ["eap", "eap_ig"]
        ... )
        >>> set(found.methods) == {"eap", "eap_ig"}
        True
    """
    known = (*get_args(EdgeMethod), *OF_HEADS)
    asked = [one for one in known if one != "exact"] if methods is None else list(methods)
    for name in asked:
        if not isinstance(name, EdgeGraph) and name not in known:
            raise InputError(nearest(str(name), known, kind="method"))
    if sample is not None and exact is not None:
        raise InputError(
            "give exact or sample, not both: exact already determines which edges are compared."
        )
    options = RunOptions(batch_size, seed=seed, progress=progress)
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    common = {"ablation": study.ablation, "batch_size": batch_size, "progress": progress}
    scored = partial(
        attribute,
        model,
        probe,
        metric,
        ablation=study.ablation,
        batch_size=batch_size,
        progress=progress,
    )
    if exact is not None:
        _check_exact(exact, study)
    for one in asked:
        if isinstance(one, EdgeGraph):
            _check_given(one, study)
    truth = exact or scored(method="exact", edges=_drawn(study.wiring, sample, seed))
    size = count or max(1, int((~np.isnan(truth.mean)).sum()) // 20)
    heads = heads_out(study)
    rows = []
    for name in asked:
        started = time.perf_counter()
        if isinstance(name, EdgeGraph):
            row = _of_edges(name, truth, heads, size, seed)
            row |= {"method": name.method, "seconds": float("nan")}
            row["gradients"] = passes_of(study.wiring, name.method, max(1, name.steps))
        elif name in OF_HEADS:
            row = _of_gates(name, study, heads, common)
        else:
            graph = scored(method=name, steps=steps)
            row = _of_edges(graph, truth, heads, size, seed)
            row["gradients"] = passes_of(study.wiring, name, steps)
        rows.append({"method": name, "seconds": time.perf_counter() - started, **row})
    rows.sort(key=lambda row: -np.nan_to_num(row["edges"], nan=-1.0))
    columns = {
        name: np.array([row[name] for row in rows], int if name == "gradients" else float)
        for name in rows[0]
        if name != "method"
    }
    return MethodComparison(
        tuple(row["method"] for row in rows),
        count=size,
        compared=int((~np.isnan(truth.mean)).sum()),
        ablation=study.ablation,
        unit=study.metric.unit,
        provenance=origin(
            model, probe, attention="whole passes", metric=study.metric.name,
            ablation=study.ablation, steps=steps, draw_seed=seed,
        ),
        **columns,
    )  # fmt: skip


def _drawn(wiring: Wiring, sample: int | None, seed: int) -> list[Edge] | None:
    """Draw random edges; None: all."""
    if sample is None:
        return None
    if isinstance(sample, bool) or not isinstance(sample, int) or not 2 <= sample <= len(wiring):
        raise InputError(f"sample={sample!r}: draw 2 to {len(wiring):,} edges.")
    drawn = np.random.default_rng(seed).choice(len(wiring), sample, replace=False)
    return [wiring.edges[at] for at in sorted(drawn.tolist())]


def _check_given(graph: EdgeGraph, study: EdgeMeasurement) -> None:
    """Raise if a graph has another model, metric or ablation, or another number of texts."""
    about, shape = graph.provenance, (len(study.wiring), len(study.probe))
    said = {"ablation": study.ablation, "metric": study.metric.name, "kind": study.probe.name}
    same = graph.wiring == study.wiring and graph.per_example.shape == shape
    same = same and about.weight_digest in ("", study.model.digest())
    if not same or any(about.probe.get(name, value) != value for name, value in said.items()):
        raise InputError(
            f"the graph by {graph.method!r} ({graph.per_example.shape[1]} examples, ablation "
            f"{graph.ablation!r}) was not computed with this model, probe, metric and ablation: "
            "give the name of the method to run it."
        )


def _check_exact(exact: EdgeGraph, study: EdgeMeasurement) -> None:
    """Raise if scores are not exact, or belong to other texts or another model."""
    shape = (len(study.wiring), len(study.probe))
    same = exact.method == "exact" and exact.ablation == study.ablation
    if exact.wiring != study.wiring or not same or exact.per_example.shape != shape:
        raise InputError(
            f"exact holds scores by {exact.method!r} with ablation {exact.ablation!r} on "
            f"{exact.per_example.shape[1]} examples: give those of hs.edges.attribute(..., "
            f"method='exact', ablation={study.ablation!r}) on the same model and probe."
        )


@torch.no_grad()
def heads_out(study: EdgeMeasurement) -> Float[np.ndarray, "layer head example"]:
    """Change in the metric when one head is ablated; NaN for examples that it does not read."""
    parts = []
    for batch in study.batches():
        values = (
            torch.stack([_layer_out(batch, layer) for layer in range(study.wiring.n_layers)])
            - batch.clean_value()
        )
        unread = ~batch.measured.counted.to(values.device)
        parts.append(values.masked_fill(unread, float("nan")).cpu().double().numpy())
    return np.concatenate(parts, -1)


def _layer_out(batch: EdgeBatch, layer: int) -> Float[Tensor, "head batch"]:
    """Metric with each head of a layer ablated in turn."""
    tap = Tap("attn_out", layer)
    change = batch.change[:, batch.study.wiring.heads_of(layer)].transpose(0, 1)
    return measured_with(batch, {tap: batch.clean.taps[tap] + change})


def _of_edges(
    graph: EdgeGraph,
    exact: EdgeGraph,
    heads: Float[np.ndarray, "layer head example"],
    count: int,
    seed: int,
) -> Ranked:
    """Agreement of a graph's edges, and of their sums per head."""
    mine, truth = graph.per_example.astype(np.float64), exact.per_example.astype(np.float64)
    sums = _by_head(graph.wiring, mine)
    known = ~np.isnan(exact.mean)
    means = graph.mean[known], exact.mean[known]
    low, high = _interval(mine[known], truth[known], graph.clusters, seed)
    heads_low, heads_high = _interval(sums, heads.reshape(sums.shape), graph.clusters, seed)
    return {
        "edges": rank_correlation(*map(np.abs, means)),
        "edges_low": low,
        "edges_high": high,
        "signed": rank_correlation(*means),
        "overlap": jaccard(*(strongest(mean, count) for mean in means)),
        "heads": _correlation(sums, heads.reshape(sums.shape)),
        "heads_low": heads_low,
        "heads_high": heads_high,
    }


def _by_head(
    wiring: Wiring, values: Float[np.ndarray, "edge example"]
) -> Float[np.ndarray, "head example"]:
    """Sums of the edges that leave each head, layer by layer."""
    total = np.zeros((len(wiring.sources), values.shape[1]))
    np.add.at(total, wiring.ends[1], values)
    return np.concatenate([total[wiring.heads_of(layer)] for layer in range(wiring.n_layers)])


def _correlation(
    a: Float[np.ndarray, "item example"], b: Float[np.ndarray, "item example"]
) -> float:
    """Rank correlation of the magnitudes of means."""
    return rank_correlation(*(np.abs(np.nanmean(one, 1)) for one in (a, b)))


def _interval(
    a: Float[np.ndarray, "item example"],
    b: Float[np.ndarray, "item example"],
    clusters: tuple[int, ...] | None,
    seed: int,
) -> tuple[float, float]:
    """Central 95% interval of the correlation when resampling examples (or clusters)."""
    counted = ~(np.isnan(a).all(0) | np.isnan(b).all(0))
    labels = np.arange(a.shape[1]) if clusters is None else np.array(clusters)
    _, group = np.unique(labels[counted], return_inverse=True)
    groups = int(group.max()) + 1
    if groups < 2:
        return float("nan"), float("nan")
    a, b = a[:, counted], b[:, counted]
    drawn = np.random.default_rng(seed)
    found = []
    for _ in range(_DRAWS):
        times = np.bincount(drawn.integers(0, groups, groups), minlength=groups)[group]
        found.append(rank_correlation(np.abs(a @ times), np.abs(b @ times)))
    if np.isnan(found).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def _of_gates(
    name: str,
    study: EdgeMeasurement,
    heads: Float[np.ndarray, "layer head example"],
    common: dict[str, Any],
) -> Ranked:
    """Agreement of learned gates, for heads only."""
    given = (study.model, study.probe, study.metric)
    if name == "causal_gates":
        table = causal_gates(*given, **common, steps=_GATE_STEPS)
        values = 1 - table["irrelevant"].mean
    else:
        half = max(1, len(study.model.shape.heads) // 2)
        values = best_heads(*given, half, **common, steps=_GATE_STEPS).mean
    missing = float("nan")
    return {
        "edges": missing, "edges_low": missing, "edges_high": missing, "signed": missing,
        "overlap": missing,
        "heads": rank_correlation(values, np.abs(np.nanmean(heads, -1))),
        "heads_low": missing, "heads_high": missing,
        "gradients": _GATE_STEPS * (3 if name == "causal_gates" else 1),
    }  # fmt: skip
