"""Circuits: sets of edges that were found to matter, and how they were found."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.glance import Glance, Shown, number
from headscope.base.options import RunOptions
from headscope.base.saved import Saved
from headscope.base.specs import Provenance
from headscope.edges.faithfulness import circuit_value
from headscope.edges.graph import EdgeGraph
from headscope.edges.wiring import HEAD_SLOTS, Edge, Wiring
from headscope.edges.written import EdgeBatch, Study
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes.probe import Probe

Order = Literal["later first", "earlier first"]


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Saved, Shown):
    """A set of edges, and the metric of the model that has these edges alone.

    Attributes:
        wiring: nodes and edges of the model.
        kept: which edges are in the circuit, in the order of ``wiring.edges``.
        changes: what taking an edge out changed in the metric when its turn came; NaN for edges
            that were not tried.
        value: mean metric of the circuit.
        full: mean metric of the whole model.
        empty: mean metric with every edge taken out.
        method: how it was found.
        order: in which order edges were tried; empty where they were not.
        threshold: change up to which an edge was taken out; NaN where none was set.
        ablation: what edges outside carry.
        unit: of the metric.
        provenance: where it came from.
    """

    wiring: Wiring
    kept: Bool[np.ndarray, " edge"]
    changes: Float[np.ndarray, " edge"]
    value: float
    full: float
    empty: float
    method: str = ""
    order: str = ""
    threshold: float = float("nan")
    ablation: str = ""
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges of the circuit, target by target."""
        return tuple(self.wiring.edges[at] for at in np.nonzero(self.kept)[0])

    @cached_property
    def heads(self) -> tuple[HeadIndex, ...]:
        """Heads that an edge of the circuit leaves, in order."""
        sources = {edge.source for edge in self.edges}
        every = (
            HeadIndex(layer, head)
            for layer in range(self.wiring.n_layers)
            for head in range(self.wiring.n_heads)
        )
        return tuple(head for head in every if str(head) in sources)

    @property
    def faithfulness(self) -> float:
        """``(value - empty) / (full - empty)``: 1 where it does what the model does."""
        span = self.full - self.empty
        return (self.value - self.empty) / span if span else float("nan")

    def jaccard(self, other: "Circuit") -> float:
        """Edges in both over edges in either; 1 for two empty ones.

        Raises:
            InputError: if the other circuit is of a model with other nodes.
        """
        if self.wiring != other.wiring:
            raise InputError("these circuits are of models with different nodes.")
        either = (self.kept | other.kept).sum()
        return float((self.kept & other.kept).sum() / either) if either else 1.0

    def glance(self) -> Glance:
        """How large and how faithful it is, and its edges."""
        share = self.kept.mean()
        return Glance(
            f"circuit by {self.method}",
            [
                f"{len(self.edges):,} of {len(self.wiring):,} edges ({100 * share:.2g}%)",
                f"{len(self.heads)} heads",
                f"faithfulness {number(self.faithfulness)}",
                self.provenance.model,
            ],
            ("edge", "change when taken out"),
            [(str(edge), number(change)) for edge, change in self._strongest(6)],
            hint="circuit.edges, circuit.heads, hs.edges.completeness(model, probe, metric, ...)",
        )

    def _strongest(self, count: int) -> list[tuple[Edge, float]]:
        places = np.nonzero(self.kept)[0]
        sizes = np.nan_to_num(np.abs(self.changes[places]))
        chosen = places[np.argsort(-sizes, kind="stable")[:count]]
        return [(self.wiring.edges[at], float(self.changes[at])) for at in chosen]


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
    """Find a circuit by taking edges out for good, one by one, while the metric allows it.

    Targets are visited from the output down. Of each, every edge is taken out in turn; it stays
    out if the mean metric changes by less than ``threshold`` from what it was before. Edges into a
    node that no edge leaves any more go without a trial. What was decided early bears on what
    follows, so the result depends on the order: run the other one, too, and compare.

    A single edge costs a pass of the whole model over all examples: minutes for hundreds of edges.

    Args:
        model: the model; as in :func:`attribute`.
        probe: texts with answers, and the pair ``corrupt`` for ``patch``.
        metric: of :mod:`headscope.metrics`, e.g. ``kl_divergence`` as in the paper, or
            ``f(logits, probe) -> [batch]``.
        threshold: in the metric's unit, above 0.
        order: of a target's sources: ``later first`` as in the paper, or ``earlier first``.
        absolute: compare the magnitude of the change; else only a rise of the metric counts, as
            for a divergence.
        ablation: what an edge that is taken out carries, as in :func:`attribute`.
        batch_size: examples per pass; changes no number.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if probe, metric, threshold or order do not fit.
        UnsupportedModelError: as :func:`attribute` raises it.

    Source:
        Conmy et al. 2023, "Towards automated circuit discovery", arXiv 2304.14997.

    Example:
        >>> made = hs.compiled.from_library("previous")
        >>> found = acdc(made.model, made.probe(4), hs.metrics.loss, 0.01, ablation="zero")
        >>> Edge("L0H0", "logits", "output") in found.edges
        True
    """
    if order not in get_args(Order):
        raise InputError(nearest(str(order), get_args(Order), kind="order"))
    if not threshold > 0:
        raise InputError(f"threshold={threshold!r}: give a number above 0, in the metric's unit.")
    options = RunOptions(batch_size, progress=progress)
    study = Study.of(model, probe, metric, ablation, options)
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
    about = origin(
        model, probe, attention="whole passes", metric=study.metric.name, method="acdc",
        ablation=study.ablation, threshold=threshold, order=order, absolute=absolute,
    )  # fmt: skip
    return Circuit(
        wiring, kept, changes, value, full, empty, "acdc", order, float(threshold),
        study.ablation, study.metric.unit, about,
    )  # fmt: skip


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
    """Run a circuit whose edges are known: those of a paper, of a graph's top, or of the truth.

    Args:
        model: the model; as in :func:`attribute`.
        probe: texts with answers.
        metric: as in :func:`attribute`.
        edges: as (source, target, slot).
        ablation: what edges outside carry, as in :func:`attribute`.
        method: how the edges were found, to be said with the result.
        batch_size: examples per pass; changes no number.

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
    study = Study.of(model, probe, metric, ablation, RunOptions(batch_size))
    kept = np.zeros(len(study.wiring), bool)
    for edge in edges:
        kept[study.wiring.find(edge)] = True
    batches = list(study.batches())
    every, none = np.ones_like(kept), np.zeros_like(kept)
    value, full, empty = (mean_value(batches, study, one) for one in (kept, every, none))
    about = origin(
        model, probe, attention="whole passes", metric=study.metric.name, method=method,
        ablation=study.ablation,
    )  # fmt: skip
    return Circuit(
        study.wiring, kept, np.full(len(kept), np.nan), value, full, empty, method,
        ablation=study.ablation, unit=study.metric.unit, provenance=about,
    )  # fmt: skip


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
    waiting = graph.rank().tolist()
    inside: set[str] = {"logits"}
    chosen: list[Edge] = []
    while len(chosen) < count:
        at = next(place for place in waiting if graph.edges[place].target in inside)
        waiting.remove(at)
        chosen.append(graph.edges[at])
        inside.add(graph.edges[at].source)
    return chosen


def _visits(wiring: Wiring, order: str) -> Iterable[tuple[str, list[int]]]:
    """Targets from the output down, each slot apart, with the places of their edges."""
    by_target: dict[tuple[str, str], list[int]] = {}
    for at, edge in enumerate(wiring.edges):
        by_target.setdefault((edge.target, edge.slot), []).append(at)
    for target, slot in sorted(by_target, key=_depth(wiring), reverse=True):
        places = by_target[target, slot]
        yield target, places[::-1] if order == "later first" else places


def _depth(wiring: Wiring) -> Callable[[tuple[str, str]], tuple[int, int]]:
    """Place of a target in the order of computation; slots of a head in the order q, k, v."""
    places: Mapping[str, int] = {name: at for at, name in enumerate((*wiring.sources, "logits"))}
    slots = {name: at for at, name in enumerate(HEAD_SLOTS)}
    return lambda target: (places[target[0]], slots.get(target[1], 0))


def _is_left(wiring: Wiring, kept: Bool[np.ndarray, " edge"], target: str) -> bool:
    """Whether anything still reads a node; the output is always read."""
    if target == "logits":
        return True
    number = wiring.sources.index(target)
    return bool(kept[wiring.ends[1] == number].any())


def mean_value(
    batches: Sequence[EdgeBatch], study: Study, kept: Bool[np.ndarray, " edge"]
) -> float:
    """Mean metric of a circuit over the examples that the metric reads."""
    found: list[Any] = []
    for batch in batches:
        values = circuit_value(batch, study.wiring.kept(kept))
        found.append(values[batch.measured.counted.to(values.device)].cpu().double())
    return float(torch.cat(found).mean())
