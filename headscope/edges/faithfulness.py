"""``hs.edges.faithfulness``: how much of what a model does its best edges do alone.

In a circuit some edges carry what their source writes in the circuit, the others are out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.options import RunOptions
from headscope.edges.passes import measured_with, values_with
from headscope.edges.written import ENTRIES, EdgeBatch, EdgeMeasurement, heads_write
from headscope.errors import InputError
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table.edges import EdgeGraph, Faithfulness

if TYPE_CHECKING:
    pass


@torch.no_grad()
def circuit_value(
    batch: EdgeBatch, kept: Bool[np.ndarray, "target source"]
) -> Float[Tensor, " batch"]:
    """The metric of a circuit on every example.

    The nodes run in order. The input of every slot is the clean run's, less what its sources write
    there, plus what those of kept edges write in this run and those of the others once corrupted.
    With all edges that is the clean run.

    Args:
        batch: the batch.
        kept: edges of the circuit, as :meth:`Wiring.kept` has them.
    """
    return _Circuit(batch, torch.from_numpy(kept).to(batch.change.device)).run()


@dataclass(eq=False)
class _Circuit:
    batch: EdgeBatch
    kept: Bool[Tensor, "target source"]
    moved: Float[Tensor, "batch source pos d_model"] = field(init=False)

    def __post_init__(self) -> None:
        """Start from the clean run: no node writes anything else yet."""
        self.moved = torch.zeros_like(self.batch.change)
        self.moved[:, 0] = 0.0  # the embedding of a circuit is the clean one

    def run(self) -> Float[Tensor, " batch"]:
        wiring, clean = self.batch.study.wiring, self.batch.clean.taps
        for layer in range(wiring.n_layers):
            self._heads(layer)
            self._mlp(layer)
        last = Tap("resid_post", wiring.n_layers - 1)
        stream = clean[last] + self._entering(self.kept[-1:])
        return measured_with(self.batch, {last: stream})[0]

    def _entering(self, kept: Bool[Tensor, "row source"]) -> Float[Tensor, "row batch pos d_model"]:
        """How the input of some slots, given as rows of edges kept, differs from the clean one."""
        reach = kept.shape[1]
        share = kept.to(self.moved)
        inside = torch.einsum("rs,bspm->rbpm", share, self.moved[:, :reach])
        return inside + torch.einsum("rs,bspm->rbpm", 1 - share, self.batch.change[:, :reach])

    def _heads(self, layer: int) -> None:
        """Run the heads of a layer; slots that keep the same edges are run once."""
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
        )  # of the run in which this member of its group had its keys
        change = heads_write(batch.study.model, layer, own - batch.clean.taps[z_tap])
        self.moved[:, wiring.heads_of(layer)] = self._real(change)

    def _own(
        self, made: Float[Tensor, "row batch head pos d_head"], which: Tensor, shared: bool
    ) -> Float[Tensor, "member batch head pos d_head"]:
        """Every head's queries, keys or values from the run that had its input.

        One run per member of a group of query heads, as each sees the shared keys by its own edges.
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
    """Run circuits of the best edges of a graph, and of random ones, against the whole model.

    In a circuit, the input of every slot holds what the sources of kept edges write in this very
    run, and what those of the others write once corrupted. Edges are kept by the magnitude of
    their scores. Random circuits are nested draws from all edges, as many edges at every size.

    Args:
        model: the one that the graph is of.
        probe: of the kind that the graph was made on; other examples of it are welcome.
        metric: may be another than the graph's.
        graph: of :func:`attribute`.
        sizes: shares of all edges, increasing, from above 0 to 1; ``int(size * edges)`` are kept.
        ablation: what edges outside of the circuit carry; default: as in the graph.
        controls: draws of random edges.
        seed: of the draws.
        batch_size: examples per pass; changes no number.
        progress: show a bar.

    Returns:
        f at every size, its areas, and those of random edges.

    Raises:
        InputError: if the graph is of another model or kind of probe, or sizes are out of range.

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
        raise InputError(f"controls={controls!r}: draw random edges once or more.")
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
        study: what is measured.
        circuits: edges of each; one that occurs twice is run once.
        options: whether a bar is shown.
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
            f"sizes={list(sizes)!r}: give two shares of all edges or more, above 0 and up to 1."
        )
    if (np.diff(shares) <= 0).any():
        raise InputError(f"sizes={list(sizes)!r} must increase from one to the next.")
    return shares


def check_graph(model: HeadModel, probe: Probe, graph: EdgeGraph) -> None:
    """Refuse a graph of another model or kind of probe.

    Raises:
        InputError: if it is.
    """
    shape, about = model.shape, graph.provenance
    same = graph.wiring.n_layers == shape.n_layers and graph.wiring.n_heads == shape.n_heads
    if not same or (about.weight_digest and about.weight_digest != model.digest()):
        raise InputError(
            f"this graph is of another model ({about.model or 'unknown'}) than {model.name}: "
            "make one of this model with hs.edges.attribute."
        )
    kind = about.probe.get("kind", probe.name)
    if kind != probe.name:
        raise InputError(
            f"this graph was made on a probe of kind {kind!r}, and this one is {probe.name!r}: "
            "take a probe of the same kind, or make another graph."
        )
