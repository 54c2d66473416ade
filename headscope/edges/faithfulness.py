"""Evaluation of circuits: faithfulness, completeness, minimality, stability, controls."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.statistics import mean_and_sem
from headscope.edges.written import (
    ENTRIES,
    EdgeBatch,
    EdgeMeasurement,
    heads_write,
    measured_with,
    values_with,
)
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric, Metric
from headscope.models.protocol import HeadModel, lacks
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table.edges import (
    Checks,
    Circuit,
    Completeness,
    Edge,
    EdgeGraph,
    Faithfulness,
    Stability,
    Wiring,
)


@torch.no_grad()
def circuit_value(
    batch: EdgeBatch, kept: Bool[np.ndarray, "target source"]
) -> Float[Tensor, " batch"]:
    """Run of a circuit that measures the metric on every example.

    Nodes run in order. The input of each slot is the clean input minus its sources' clean writes,
    plus the writes of kept edges' sources in this run and the corrupted writes of all other
    sources. With all edges this is the clean run.

    Args:
        batch: batch to run.
        kept: mask of the circuit's edges, from :meth:`Wiring.kept`.
    """
    return _Circuit(batch, torch.from_numpy(kept).to(batch.change.device)).run()


@dataclass(eq=False)
class _Circuit:
    batch: EdgeBatch
    kept: Bool[Tensor, "target source"]
    moved: Float[Tensor, "batch source pos d_model"] = field(init=False)

    def __post_init__(self) -> None:
        """Start from the clean run, with no changed outputs."""
        self.moved = torch.zeros_like(self.batch.change)
        self.moved[:, 0] = 0.0  # a circuit always has the clean embedding

    def run(self) -> Float[Tensor, " batch"]:
        wiring, clean = self.batch.study.wiring, self.batch.clean.taps
        for layer in range(wiring.n_layers):
            self._heads(layer)
            self._mlp(layer)
        last = Tap("resid_post", wiring.n_layers - 1)
        stream = clean[last] + self._entering(self.kept[-1:])
        return measured_with(self.batch, {last: stream})[0]

    def _entering(self, kept: Bool[Tensor, "row source"]) -> Float[Tensor, "row batch pos d_model"]:
        """Difference of slot inputs from the clean run, given rows of kept edges."""
        reach = kept.shape[1]
        share = kept.to(self.moved)
        inside = torch.einsum("rs,bspm->rbpm", share, self.moved[:, :reach])
        return inside + torch.einsum("rs,bspm->rbpm", 1 - share, self.batch.change[:, :reach])

    def _heads(self, layer: int) -> None:
        """Run the heads of a layer; slots with the same kept edges are run once."""
        batch, wiring = self.batch, self.batch.study.wiring
        rows = self.kept[wiring.inputs_of(layer), : wiring.before(layer)]
        unique, which = torch.unique(rows, dim=0, return_inverse=True)
        stream, taps = Tap("resid_pre", layer), tuple(Tap(site, layer) for site in ENTRIES)
        inputs = batch.clean.taps[stream] + self._entering(unique)
        made = values_with(batch, {stream: inputs}, taps)
        query, key, value = (
            self._own(made[tap], which.view(3, -1)[entry], entry > 0)
            for entry, tap in enumerate(taps)
        )
        z_tap = Tap("z", layer)
        z = values_with(batch, dict(zip(taps, (query, key, value), strict=True)), (z_tap,))[z_tap]
        own = torch.stack(
            [z[head % len(z), :, :, head] for head in range(wiring.n_heads)], 2
        )  # index of the run with this group member's own keys
        change = heads_write(batch.study.model, layer, own - batch.clean.taps[z_tap])
        self.moved[:, wiring.heads_of(layer)] = self._real(change)

    def _own(
        self, made: Float[Tensor, "row batch head pos d_head"], which: Tensor, shared: bool
    ) -> Float[Tensor, "member batch head pos d_head"]:
        """Every head's queries, keys or values from the run with its own input.

        One run per member of a group of query heads, since each receives the shared keys through
        its own edges.
        """
        group = self.batch.study.model.shape.group_size
        members = []
        for member in range(group):
            heads = range(made.shape[2])
            chosen = [head * group + member for head in heads] if shared else list(heads)
            parts = [made[which[own], :, head] for head, own in zip(heads, chosen, strict=True)]
            members.append(torch.stack(parts, 1))
        return torch.stack(members)

    def _mlp(self, layer: int) -> None:
        batch, wiring = self.batch, self.batch.study.wiring
        out = Tap("mlp_out", layer)
        entry = Tap("resid_pre" if wiring.parallel[layer] else "attn_out", layer)
        rows = self.kept[wiring.inputs_of(layer).stop, : wiring.before_mlp(layer)][None]
        made = values_with(batch, {entry: batch.clean.taps[entry] + self._entering(rows)}, (out,))
        change = (made[out][0] - batch.clean.taps[out])[:, None].float()
        self.moved[:, wiring.heads_of(layer).stop] = self._real(change)[:, 0]

    def _real(
        self, change: Float[Tensor, "batch node pos d_model"]
    ) -> Float[Tensor, "batch node pos d_model"]:
        real = self.batch.texts.real.to(change.device)
        return change * real[:, None, :, None]


# Shares of all edges at which circuits are compared (Mueller et al. 2025).
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@checked
@own_types()
def faithfulness(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    graph: EdgeGraph,
    sizes: Sequence[float] = SIZES,
    ablation: str | None = None,
    *,
    controls: int = 3,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Faithfulness:
    """Measure circuits of a graph's best edges, and of random edges, against the full model.

    In a circuit, kept edges carry their source's write in the same run and all other edges its
    corrupted write. Edges are kept in order of the magnitude of their scores. Random circuits are
    nested samples of all edges, with as many edges at every size.

    Args:
        model: the one that the graph is of.
        probe: probe of the same kind as the graph's, ideally with other examples.
        metric: metric to measure; may differ from the graph's.
        graph: graph from :func:`attribute`.
        sizes: increasing shares of all edges, from above 0 to 1; ``int(size * edges)`` are kept.
        ablation: what edges outside the circuit carry. Default: as in the graph.
        controls: number of random orders of edges.
        seed: seed for the random draws.
        batch_size: examples per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Faithfulness f at every size, its areas, and the same for random edges.

    Raises:
        InputError: if the graph belongs to another model or kind of probe, or sizes are out of
            range.

    Source:
        Mueller et al. 2025, arXiv 2504.13151 (CPR, CMD); Wang et al. 2022, arXiv 2211.00593;
        Hanna et al. 2024, arXiv 2403.17806.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> metric = hs.metrics.logit_difference
        >>> graph = hs.edges.attribute(model, names, metric)
        >>> curve = faithfulness(model, names, metric, graph, sizes=[0.1, 1.0], controls=1)
        >>> float(curve.faithfulness[-1])
        1.0
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    shares = _checked_sizes(sizes)
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 1:
        raise InputError(f"controls={controls!r}: give 1 or more.")
    check_graph(model, probe, graph)
    study = EdgeMeasurement.of(model, probe, metric, ablation or graph.ablation, options)
    total = len(study.wiring)
    counts = np.floor(shares * total + 1e-9).astype(int)
    orders = [graph.rank(), *_random_orders(total, controls, seed)]
    circuits = [_first(order, count) for order in orders for count in (*counts.tolist(), 0, total)]
    means = mean_values(study, circuits, options).reshape(len(orders), -1)
    return Faithfulness(
        shares,
        counts,
        means[0, :-2],
        means[1:, :-2],
        full=float(means[0, -1]),
        empty=float(means[0, -2]),
        method=graph.method,
        ablation=study.ablation,
        unit=study.metric.unit,
        provenance=origin(
            model,
            probe,
            attention="whole passes",
            metric=study.metric.name,
            method=graph.method,
            ablation=study.ablation,
            granularity="edges",
            direction="keep the circuit",
            positions="all",
            control_seed=seed,
        ),
    )


def mean_values(
    study: EdgeMeasurement,
    circuits: Sequence[Bool[np.ndarray, " edge"]],
    options: RunOptions = RunOptions(),
) -> Float[np.ndarray, " circuit"]:
    """Mean metric of every circuit over the examples that the metric reads.

    Args:
        study: the measurement.
        circuits: mask of edges for each; duplicates are run once.
        options: run options, including whether a progress bar is shown.
    """
    keys = [circuit.tobytes() for circuit in circuits]
    unique = dict(zip(keys, circuits, strict=True))
    found: dict[bytes, list[Tensor]] = {key: [] for key in unique}
    with options.track(float(len(unique) * len(study.probe)), "circuits") as advance:
        for batch in study.batches():
            counted = batch.measured.counted.to(batch.change.device)
            for key, circuit in unique.items():
                values = circuit_value(batch, study.wiring.kept(circuit))
                found[key].append(values[counted].cpu().double())
                advance(float(len(values)))
    means = {key: float(torch.cat(parts).mean()) for key, parts in found.items()}
    return np.array([means[key] for key in keys])


def _first(order: Int[np.ndarray, " edge"], count: int) -> Bool[np.ndarray, " edge"]:
    chosen = np.zeros(len(order), bool)
    chosen[order[:count]] = True
    return chosen


def _random_orders(total: int, draws: int, seed: int) -> list[Int[np.ndarray, " edge"]]:
    drawn = np.random.default_rng(seed)
    return [drawn.permutation(total) for _ in range(draws)]


def _checked_sizes(sizes: Sequence[float]) -> Float[np.ndarray, " size"]:
    try:
        shares = np.array(list(sizes), float)
    except (TypeError, ValueError):
        raise InputError(
            f"sizes are shares of all edges, such as [0.1, 1.0]; got {sizes!r}."
        ) from None
    if shares.ndim != 1 or len(shares) < 2 or not ((shares > 0) & (shares <= 1)).all():
        raise InputError(
            f"sizes={list(sizes)!r}: give at least two shares of all edges, above 0 and up to 1."
        )
    if (np.diff(shares) <= 0).any():
        raise InputError(f"sizes={list(sizes)!r} must be increasing.")
    return shares


def check_graph(model: HeadModel, probe: Probe, graph: EdgeGraph) -> None:
    """Raise InputError if a graph belongs to another model or kind of probe.

    Raises:
        InputError: if the graph does not belong to the model and kind of probe.
    """
    shape, about = model.shape, graph.provenance
    same = graph.wiring.n_layers == shape.n_layers and graph.wiring.n_heads == shape.n_heads
    if not same or (about.weight_digest and about.weight_digest != model.digest()):
        raise InputError(
            f"this graph is of another model ({about.model or 'unknown'}) than {model.name}: "
            "compute one for this model with hs.edges.attribute."
        )
    kind = about.probe.get("kind", probe.name)
    if kind != probe.name:
        raise InputError(
            f"this graph was made on a probe of kind {kind!r}, and this one is {probe.name!r}: "
            "use a probe of the same kind, or compute another graph."
        )


Chosen = Bool[np.ndarray, " edge"]
Choose = Callable[[Float[np.ndarray, " edge"]], Chosen]
_MATCHED = 3


def values_of(
    batches: Sequence[EdgeBatch], study: EdgeMeasurement, kept: Chosen
) -> Float[np.ndarray, " example"]:
    """Metric of a circuit on every example that the metric reads."""
    found = []
    for batch in batches:
        values = circuit_value(batch, study.wiring.kept(kept))
        found.append(values[batch.measured.counted.to(values.device)].cpu().double())
    values_: np.ndarray = torch.cat(found).numpy()
    return values_


def example_values(
    batches: Sequence[EdgeBatch], study: EdgeMeasurement, kept: Chosen | None = None
) -> Float[np.ndarray, " example"]:
    """Metric of a circuit on every example; NaN for examples that the metric does not read.

    Args:
        batches: all batches of the measurement.
        study: the measurement.
        kept: mask of the circuit's edges; None: the full model.
    """
    found = []
    for batch in batches:
        if kept is None:
            values = batch.clean_value()
        else:
            values = circuit_value(batch, study.wiring.kept(kept))
        unread = ~batch.measured.counted.to(values.device)
        found.append(values.detach().double().masked_fill(unread, float("nan")).cpu())
    values_: np.ndarray = torch.cat(found).numpy()
    return values_


def mean_value(batches: Sequence[EdgeBatch], study: EdgeMeasurement, kept: Chosen) -> float:
    """Mean metric of a circuit over the examples that the metric reads."""
    return float(values_of(batches, study, kept).mean())


def strongest(values: Float[np.ndarray, " edge"], count: int) -> Chosen:
    """Mask of the ``count`` edges with the largest magnitudes; on ties, the first ones."""
    chosen = np.zeros(len(values), bool)
    chosen[np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:count]] = True
    return chosen


def grown_from(
    wiring: Wiring, values: Float[np.ndarray, " edge"], count: int, start: str = "logits"
) -> Int[np.ndarray, " chosen"]:
    """Connected edges with the largest magnitudes, in the order in which they join.

    Args:
        wiring: nodes and edges.
        values: scores of the edges.
        count: number of edges to choose; fewer if no more are connected.
        start: ``logits`` grows downwards, from targets already in the circuit; ``embed`` grows
            upwards, from sources.
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


@checked
def grown(graph: EdgeGraph, count: int) -> list[Edge]:
    """Grow a connected circuit from the output by the largest magnitudes, best first.

    An edge can join once its target is in the circuit, so every edge has a path to the output;
    simply taking the top of a ranking includes edges that lead nowhere.

    Args:
        graph: graph from :func:`attribute`.
        count: number of edges to choose.

    Raises:
        InputError: if there are fewer edges.

    Source:
        Hanna et al. 2024, arXiv 2403.17806, greedy search.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = hs.edges.attribute(model, names, hs.metrics.logit_difference)
        >>> hs.edges.grown(graph, 1)[0].target
        'logits'
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= len(graph.wiring):
        raise InputError(f"count={count!r}: give 1 to {len(graph.wiring):,} edges.")
    return [graph.edges[at] for at in grown_from(graph.wiring, graph.mean, count).tolist()]


@checked
def stability(graph: EdgeGraph, count: int, *, draws: int = 200, seed: int = 0) -> Stability:
    """Overlap of the strongest edges with those on resampled prompts.

    Needs no forward pass, since the graph holds scores per example. Examples of a cluster are drawn
    together.

    Args:
        graph: graph from :func:`attribute`.
        count: number of strongest edges in the circuit.
        draws: number of bootstrap draws.
        seed: seed for the random draws.

    Raises:
        InputError: if there are fewer edges, or only a single example.

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
        count: number of edges chosen.
        choose: rule that chooses edges from mean scores.
        draws: number of bootstrap draws.
        seed: seed for the random draws.

    Raises:
        InputError: if there are fewer edges, or only a single example.
    """
    total, examples = graph.per_example.shape
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < total:
        raise InputError(f"count={count!r}: give 1 to {total - 1:,} edges.")
    labels = np.arange(examples) if graph.clusters is None else np.array(graph.clusters)
    _, group = np.unique(labels, return_inverse=True)
    groups = int(group.max()) + 1
    if groups < 2:
        raise InputError(
            "the graph has a single example (or cluster), so it cannot be resampled: give more."
        )
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
    """Expected Jaccard overlap of two random sets of ``count`` out of ``total``.

    The number of shared edges is hypergeometric with mean ``count^2 / total``; the expectation is
    summed exactly.

    Example:
        >>> round(chance(1, 4), 4)
        0.25
    """
    both = np.arange(count + 1)
    weights = hypergeom.pmf(both, total, count, count)
    return float((weights * both / (2 * count - both)).sum())


def jaccard(a: Chosen, b: Chosen) -> float:
    """Jaccard index: edges in both sets over edges in either; 1 for two empty sets."""
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
        study: the measurement.
        batches: all batches of the measurement.
        kept: mask of the circuit's edges.
        graph: scores that the circuit was grown from; None if it was found in another way.
        seed: seed for all draws.
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
    """Checks that need per-prompt scores: stability, and a rival circuit from another start."""
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
    """Mask of edges given by index."""
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
    """The circuit with its heads replaced by random ones of the same layers."""
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
    """Largest change in the metric where a pair's texts are still identical; NaN if none."""
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
    """The probe with its answers at the last position at which its pair is identical."""
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


@checked
@own_types()
def completeness(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    circuit: Circuit,
    *,
    draws: int = 20,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Completeness:
    """Remove heads from a circuit and from the whole model, and compare the metrics.

    Each head of the circuit is removed alone, then random sets of heads, each with probability one
    half. Removing a head removes all edges that leave it.

    Args:
        model: model that the circuit was found in.
        probe: texts with answers.
        metric: metric that the circuit was measured with.
        circuit: circuit from :func:`acdc` or :func:`run_circuit`.
        draws: number of random sets.
        seed: seed for the random draws.
        batch_size: examples per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the circuit belongs to another model or has no heads.

    Source:
        Wang et al. 2022, arXiv 2211.00593, section 4 (completeness).

    Example:
        >>> made = hs.compiled.from_library("previous")
        >>> found = hs.edges.acdc(made.model, made.probe(4), hs.metrics.loss, 0.01, ablation="zero")
        >>> gaps = hs.edges.completeness(made.model, made.probe(4), hs.metrics.loss, found, draws=2)
        >>> float(gaps.gap.max()) < 0.01
        True
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    study = _study(model, probe, metric, circuit, options)
    if not circuit.heads:
        raise InputError("this circuit has no heads to remove: give one with at least one head.")
    drawn = np.random.default_rng(seed)
    halves = drawn.random((draws, len(circuit.heads))) < 0.5
    subsets: list[tuple[HeadIndex, ...]] = [(head,) for head in circuit.heads]
    subsets += [tuple(h for h, on in zip(circuit.heads, row, strict=True) if on) for row in halves]
    batches = list(study.batches())
    left: list[list[float]] = [[], []]
    every = np.ones_like(circuit.kept)
    with options.track(2.0 * len(subsets), "completeness") as advance:
        for heads in subsets:
            out = edges_leaving(study.wiring, heads)
            for side, kept in zip(left, (circuit.kept, every), strict=True):
                side.append(mean_value(batches, study, kept & ~out))
                advance(1.0)
    return Completeness(
        tuple(subsets), np.array(left[0]), np.array(left[1]), circuit.unit, circuit.provenance
    )


@checked
@own_types()
def minimality(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    circuit: Circuit,
    *,
    draws: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[HeadIndex, float]:
    """How much each head of a circuit matters when other heads are removed as well.

    ``max over K of |m(C - K - head) - m(C - K)|`` over the empty set and random sets K of other
    heads in the circuit. A head with a value near 0 is redundant.

    Args:
        model: model that the circuit was found in.
        probe: texts with answers.
        metric: metric that the circuit was measured with.
        circuit: circuit from :func:`acdc` or :func:`run_circuit`.
        draws: number of random sets besides the empty one.
        seed: seed for the random draws.
        batch_size: examples per pass; affects only time and memory.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the circuit belongs to another model.

    Source:
        Wang et al. 2022, arXiv 2211.00593, section 4 (minimality).

    Example:
        >>> made = hs.compiled.from_library("previous")
        >>> found = hs.edges.acdc(made.model, made.probe(4), hs.metrics.loss, 0.01, ablation="zero")
        >>> list(hs.edges.minimality(made.model, made.probe(4), hs.metrics.loss, found, draws=1))
        [L0H0]
    """
    options = RunOptions(batch_size, seed=seed, progress=progress)
    study = _study(model, probe, metric, circuit, options)
    drawn = np.random.default_rng(seed)
    batches = list(study.batches())
    found: dict[HeadIndex, float] = {}
    with options.track(float(len(circuit.heads) * (draws + 1)), "minimality") as advance:
        for head in circuit.heads:
            others = [one for one in circuit.heads if one != head]
            sets = [[], *([h for h in others if drawn.random() < 0.5] for _ in range(draws))]
            most = 0.0
            for taken in sets:
                kept = circuit.kept & ~edges_leaving(study.wiring, taken)
                without = kept & ~edges_leaving(study.wiring, [head])
                change = mean_value(batches, study, without) - mean_value(batches, study, kept)
                most = max(most, abs(change))
                advance(1.0)
            found[head] = most
    return found


def edges_leaving(wiring: Wiring, heads: Sequence[HeadIndex]) -> Bool[np.ndarray, " edge"]:
    """Mask of the edges that leave some heads."""
    numbers: Int[np.ndarray, " source"] = np.array(
        [wiring.sources.index(str(head)) for head in heads], int
    )
    return np.isin(wiring.ends[1], numbers)


def _study(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    circuit: Circuit,
    options: RunOptions,
) -> EdgeMeasurement:
    digest = circuit.provenance.weight_digest
    if digest and digest != model.digest():
        raise InputError(
            f"this circuit is of another model ({circuit.provenance.model}) than {model.name}."
        )
    return EdgeMeasurement.of(model, probe, metric, circuit.ablation, options)
