"""What every circuit is shown with: stability, a rival, and controls that could fail.

A circuit is a claim on prompts that were drawn by chance, found by a search that starts somewhere.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom

from headscope.base.statistics import mean_and_sem
from headscope.edges.faithfulness import circuit_value
from headscope.edges.written import EdgeBatch, EdgeMeasurement
from headscope.errors import InputError
from headscope.metrics import Metric
from headscope.models.protocol import lacks
from headscope.probes.probe import Probe
from headscope.table.edges import Checks, Edge, EdgeGraph, Stability, Wiring

Chosen = Bool[np.ndarray, " edge"]
Choose = Callable[[Float[np.ndarray, " edge"]], Chosen]
_MATCHED = 3


def values_of(
    batches: Sequence[EdgeBatch], study: EdgeMeasurement, kept: Chosen
) -> Float[np.ndarray, " example"]:
    """The metric of a circuit on every example that it reads."""
    found = []
    for batch in batches:
        values = circuit_value(batch, study.wiring.kept(kept))
        found.append(values[batch.measured.counted.to(values.device)].cpu().double())
    values_: np.ndarray = torch.cat(found).numpy()
    return values_


def mean_value(batches: Sequence[EdgeBatch], study: EdgeMeasurement, kept: Chosen) -> float:
    """Mean metric of a circuit over the examples that the metric reads."""
    return float(values_of(batches, study, kept).mean())


def strongest(values: Float[np.ndarray, " edge"], count: int) -> Chosen:
    """The ``count`` edges of the largest magnitude; equal ones in their order."""
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:count]] = True
    return chosen


def grown_from(
    wiring: Wiring, values: Float[np.ndarray, " edge"], count: int, start: str = "logits"
) -> Int[np.ndarray, " chosen"]:
    """Edges of the largest magnitude that hang together, in the order in which they join.

    Args:
        wiring: nodes and edges.
        values: scores.
        count: edges to choose; fewer where no more hang together.
        start: ``logits`` grows downwards, an edge joining when its target is inside; ``embed``
            grows upwards, by its source.
    """
    down = start == "logits"
    size = np.abs(np.nan_to_num(values))
    place = {name: at for at, name in enumerate((*wiring.sources, "logits"))}
    target = np.array([place[name] for name, _slot in wiring.targets])[wiring.ends[0]]
    near, far = (target, wiring.ends[1]) if down else (wiring.ends[1], target)
    order = np.lexsort((np.arange(len(size)), -size, near))
    bounds = np.searchsorted(near[order], np.arange(len(place) + 1))
    queue: list[tuple[float, int, int, int]] = []

    def offer(at: int, node: int) -> None:
        if at < bounds[node + 1]:
            edge = int(order[at])
            heapq.heappush(queue, (-float(size[edge]), edge, at, node))

    inside = {place[start]}
    offer(int(bounds[place[start]]), place[start])
    chosen: list[int] = []
    while queue and len(chosen) < count:
        _, edge, at, node = heapq.heappop(queue)
        chosen.append(edge)
        offer(at + 1, node)
        if (joined := int(far[edge])) not in inside:
            inside.add(joined)
            offer(int(bounds[joined]), joined)
    return np.array(chosen, int)


def grown(graph: EdgeGraph, count: int) -> list[Edge]:
    """Edges of the largest magnitude that hang together: grown from the output, best first.

    An edge can join when its target is in the circuit already, so that every edge has a way to the
    output; the plain top of a ranking has edges that lead nowhere.

    Args:
        graph: of :func:`attribute`.
        count: edges to choose.

    Raises:
        InputError: if there are not as many.

    Source:
        Hanna et al. 2024, arXiv 2403.17806, greedy search.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> hs.edges.grown(graph, 1)[0].target
        'logits'
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= len(graph.wiring):
        raise InputError(f"count={count!r}: there are 1 to {len(graph.wiring):,} edges to choose.")
    return [graph.edges[at] for at in grown_from(graph.wiring, graph.mean, count).tolist()]


def stability(graph: EdgeGraph, count: int, *, draws: int = 200, seed: int = 0) -> Stability:
    """Draw the prompts again, with replacement, and compare the strongest edges.

    Costs no pass: the scores of every example are in the graph. Examples of a cluster are drawn
    together.

    Args:
        graph: of :func:`attribute`.
        count: how many of the strongest edges make the circuit.
        draws: bootstrap draws.
        seed: of the draws.

    Raises:
        InputError: if there are not as many edges, or a single example.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=8)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> found = hs.edges.stability(graph, 10, draws=20)
        >>> 0.0 <= found.jaccard <= 1.0
        True
    """
    return resampled(graph, count, lambda values: strongest(values, count), draws, seed)


def resampled(
    graph: EdgeGraph, count: int, choose: Choose, draws: int = 200, seed: int = 0
) -> Stability:
    """Overlap of the edges that a rule chooses with those that it chooses on resampled prompts.

    Args:
        graph: scores per example.
        count: edges chosen.
        choose: the rule, from mean scores.
        draws: bootstrap draws.
        seed: of the draws.

    Raises:
        InputError: if there are not as many edges, or a single example.
    """
    total, examples = graph.per_example.shape
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < total:
        raise InputError(f"count={count!r}: compare 1 to {total - 1:,} edges.")
    labels = np.arange(examples) if graph.clusters is None else np.array(graph.clusters)
    _, group = np.unique(labels, return_inverse=True)
    groups = int(group.max()) + 1
    if groups < 2:
        raise InputError("the graph has a single example (or cluster): nothing can be drawn again.")
    drawn = np.random.default_rng(seed)
    values = graph.per_example.astype(np.float64)
    known = ~np.isnan(values)
    values = np.where(known, values, 0.0)
    first = choose(graph.mean)
    overlaps = []
    for _ in range(draws):
        times = np.bincount(drawn.integers(0, groups, groups), minlength=groups)[group]
        mean = values @ times / np.maximum(known @ times, 1)
        overlaps.append(jaccard(first, choose(mean)))
    low, high = np.quantile(overlaps, [0.025, 0.975])
    return Stability(
        float(np.mean(overlaps)), float(low), float(high), chance(count, total), count, groups
    )


def chance(count: int, total: int) -> float:
    """Mean Jaccard overlap of two random sets of ``count`` out of ``total``.

    The overlap is hypergeometric with mean ``count^2 / total``; the expectation is summed exactly.

    Example:
        >>> round(chance(1, 4), 4)
        0.25
    """
    both = np.arange(count + 1)
    weights = hypergeom.pmf(both, total, count, count)
    return float((weights * both / (2 * count - both)).sum())


def jaccard(a: Chosen, b: Chosen) -> float:
    """Edges in both over edges in either; 1 for two empty sets."""
    either = (a | b).sum()
    return float((a & b).sum() / either) if either else 1.0


def checks_of(
    study: EdgeMeasurement,
    batches: Sequence[EdgeBatch],
    kept: Chosen,
    graph: EdgeGraph | None = None,
    seed: int = 0,
) -> Checks:
    """Stability and controls of a circuit.

    Args:
        study: what is measured.
        batches: all batches of it.
        kept: edges of the circuit.
        graph: scores that the circuit was grown from; None: it was found in another way.
        seed: of all draws.
    """
    every = np.ones_like(kept)
    full, empty = (values_of(batches, study, one) for one in (every, ~every))
    gap = full - empty
    effect = mean_and_sem(gap[None], _counted_clusters(study))
    span = float(gap.mean())

    def share(other: Chosen) -> float:
        value = mean_value(batches, study, other)
        return (value - float(empty.mean())) / span if span else float("nan")

    matched = np.array([share(one) for one in _exchanged(study.wiring, kept, seed)])
    found = Checks(
        positive=span, positive_sem=float(effect.sem[0]), null=_null(study), matched=matched
    )
    return found if graph is None else _with_scores(found, graph, kept, share, seed)


def _with_scores(
    found: Checks, graph: EdgeGraph, kept: Chosen, share: Callable[[Chosen], float], seed: int
) -> Checks:
    """Checks with what scores per prompt allow: stability, and a rival from another start."""
    count, wiring = int(kept.sum()), graph.wiring

    def choose(values: Float[np.ndarray, " edge"]) -> Chosen:
        return mask_of(wiring, grown_from(wiring, values, count))

    rival = mask_of(wiring, grown_from(wiring, graph.mean, count, "embed"))
    enough = graph.per_example.shape[1] > 1 and 0 < count < len(wiring)
    return replace(
        found,
        stability=resampled(graph, count, choose, seed=seed) if enough else None,
        rival=jaccard(kept, rival),
        rival_chance=chance(count, len(wiring)),
        rival_faithfulness=share(rival),
    )


def mask_of(wiring: Wiring, places: Int[np.ndarray, " chosen"]) -> Chosen:
    """Edges by their places, as a mask."""
    chosen = np.zeros(len(wiring), bool)
    chosen[places] = True
    return chosen


def _counted_clusters(study: EdgeMeasurement) -> tuple[int, ...] | None:
    labels = study.probe.cluster_labels
    if labels is None:
        return None
    counted = study.metric.reads(study.probe).any(1).tolist()
    return tuple(label for label, there in zip(labels, counted, strict=True) if there)


def _exchanged(wiring: Wiring, kept: Chosen, seed: int) -> Iterator[Chosen]:
    """The circuit with its heads exchanged for random ones of the same layers."""
    if wiring.n_heads < 2:
        return
    drawn = np.random.default_rng(seed)
    for _ in range(_MATCHED):
        sources, targets = np.arange(len(wiring.sources)), np.arange(len(wiring.targets))
        for layer in range(wiring.n_layers):
            order = drawn.permutation(wiring.n_heads)
            sources[wiring.heads_of(layer)] = sources[wiring.heads_of(layer)][order]
            slots = targets[wiring.inputs_of(layer)].reshape(3, -1)
            targets[wiring.inputs_of(layer)] = slots[:, order].reshape(-1)
        exchanged = wiring.kept(kept)[np.ix_(targets, sources)]
        yield exchanged[wiring.ends]


def _null(study: EdgeMeasurement) -> float:
    """Largest change of the metric where the texts of a pair are still the same; NaN for none."""
    probe, metric = study.probe, study.metric
    causal = lacks(study.model, "bidirectional") is not None
    if study.ablation != "patch" or not causal or not isinstance(metric, Metric):
        return float("nan")
    null = _null_probe(probe, metric.reads(probe))
    if null is None:
        return float("nan")
    apart = replace(study, probe=null, metric=replace(metric, mark=None))
    batches = list(apart.batches())
    every = np.ones(len(study.wiring), bool)
    full, empty = (values_of(batches, apart, one) for one in (every, ~every))
    return float(np.abs(full - empty).max())


def _null_probe(probe: Probe, read: Bool[torch.Tensor, "batch pos"]) -> Probe | None:
    """The probe, asked for its answers at the last position at which its pair is the same."""
    assert probe.corrupt is not None  # noqa: S101  # the ablation needs it
    same = (probe.tokens == probe.corrupt.tokens) | ~probe.real
    shared = probe.real & (same.long().cumprod(1) > 0)
    rows = (shared.any(1) & read.any(1)).nonzero().squeeze(1)
    if not len(rows):
        return None
    length = probe.tokens.shape[1]
    last = length - 1 - shared[rows].flip(1).long().argmax(1)
    asked = read[rows].long().argmax(1)
    targets = torch.full_like(probe.targets, -1)
    targets[rows, last] = probe.targets[rows, asked].clamp_min(0)
    foils = None
    if probe.foils is not None:
        foils = torch.full_like(probe.foils, -1)
        foils[rows, last] = probe.foils[rows, asked].clamp_min(0)
    return replace(probe, targets=targets, foils=foils)
