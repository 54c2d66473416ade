"""Nodes and edges of a transformer: who can read what whom wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.base.saved import Stored
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex

Slot = Literal["query", "key", "value", "mlp", "output"]
SLOTS: tuple[str, ...] = get_args(Slot)
HEAD_SLOTS = ("query", "key", "value")
_SHORT = {"q": "query", "k": "key", "v": "value"}


class Edge(NamedTuple):
    """One node that reads what another wrote; equal to a plain tuple of its three names.

    Attributes:
        source: ``embed``, a head such as ``L0H1``, or an MLP such as ``MLP0``.
        target: a head, an MLP, or ``logits``.
        slot: by which input: ``query``, ``key`` or ``value`` of a head, ``mlp``, ``output``.
    """

    source: str
    target: str
    slot: str

    def __str__(self) -> str:
        """Both ends and the slot of a head, as in ``L0H0 -> L1H0.key``."""
        slot = f".{self.slot}" if self.slot in HEAD_SLOTS else ""
        return f"{self.source} -> {self.target}{slot}"


@dataclass(frozen=True)
class Wiring(Stored):
    """Nodes of a model and every edge between them.

    Sources are the embedding, every head and every MLP, in the order in which they write. A head
    has three inputs, an MLP one; the last target is the output. A target reads a run of the
    sources from the first on, so the number of sources that it reads says which. Query heads that
    share a key/value head have a key and a value slot each: an edge into one of them changes what
    that query head alone sees of the shared key or value.

    Attributes:
        n_heads: query heads per layer.
        parallel: of every layer, whether its MLP reads what its attention reads, instead of what
            comes after the attention.
    """

    n_heads: int
    parallel: tuple[bool, ...]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.parallel)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of what writes, in order."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [str(HeadIndex(layer, head)) for head in range(self.n_heads)]
            names.append(f"MLP{layer}")
        return tuple(names)

    @cached_property
    def targets(self) -> tuple[tuple[str, str], ...]:
        """Names of what reads, with the slot: per layer all queries, keys, values, then the MLP."""
        found: list[tuple[str, str]] = []
        for layer in range(self.n_layers):
            heads = [str(HeadIndex(layer, head)) for head in range(self.n_heads)]
            found += [(head, slot) for slot in HEAD_SLOTS for head in heads]
            found.append((f"MLP{layer}", "mlp"))
        return (*found, ("logits", "output"))

    def before(self, layer: int) -> int:
        """Number of sources that write before a layer."""
        return 1 + layer * (self.n_heads + 1)

    def before_mlp(self, layer: int) -> int:
        """Number of sources that an MLP reads."""
        return self.before(layer) + (0 if self.parallel[layer] else self.n_heads)

    def heads_of(self, layer: int) -> slice:
        """Where the heads of a layer stand among the sources; its MLP follows."""
        first = self.before(layer)
        return slice(first, first + self.n_heads)

    def inputs_of(self, layer: int) -> slice:
        """Where the slots of a layer's heads stand among the targets; its MLP follows."""
        first = layer * (3 * self.n_heads + 1)
        return slice(first, first + 3 * self.n_heads)

    @cached_property
    def reach(self) -> Int[np.ndarray, " target"]:
        """Number of sources that each target reads."""
        counts: list[int] = []
        for layer in range(self.n_layers):
            counts += [self.before(layer)] * (3 * self.n_heads)
            counts.append(self.before_mlp(layer))
        return np.array([*counts, len(self.sources)])

    @cached_property
    def present(self) -> Bool[np.ndarray, "target source"]:
        """Which pairs are edges."""
        found: np.ndarray = np.arange(len(self.sources)) < self.reach[:, None]
        return found

    @cached_property
    def ends(self) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
        """Target and source of every edge, by number, in the order of :attr:`edges`."""
        targets, sources = np.nonzero(self.present)
        return targets, sources

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, target by target, sources in the order in which they write."""
        return tuple(
            Edge(self.sources[source], *self.targets[target])
            for target, source in zip(*self.ends, strict=True)
        )

    @cached_property
    def number(self) -> dict[Edge, int]:
        """Place of every edge in :attr:`edges`."""
        return {edge: at for at, edge in enumerate(self.edges)}

    def __len__(self) -> int:
        """Return the number of edges: 3 H sum(1 + l (H + 1)) and those of MLPs and the output."""
        return int(self.reach.sum())

    def find(self, edge: Sequence[str]) -> int:
        """Place of an edge, given as (source, target, slot); ``q k v`` stand for the slots.

        Raises:
            InputError: if the model has no such edge.
        """
        if isinstance(edge, str) or len(edge) != 3:
            raise InputError(f"an edge is (source, target, slot); got {edge!r}.")
        source, target, slot = edge
        named = Edge(str(source), str(target), _SHORT.get(slot, slot))
        if named in self.number:
            return self.number[named]
        if named.slot not in SLOTS:
            raise InputError(nearest(str(slot), (*SLOTS, *_SHORT), kind="slot"))
        raise InputError(
            f"there is no edge {named}: sources are embed, heads such as L0H1 and MLPs such as "
            "MLP0, and a target reads only what was written before it."
        )

    def dense(self, values: Float[np.ndarray, " edge"]) -> Float[np.ndarray, "target source"]:
        """Values of all edges as a matrix; NaN where there is no edge."""
        placed = np.full(self.present.shape, np.nan)
        placed[self.ends] = values
        return placed

    def kept(self, chosen: Bool[np.ndarray, " edge"]) -> Bool[np.ndarray, "target source"]:
        """Edges that are kept, as a matrix."""
        placed = np.zeros(self.present.shape, bool)
        placed[self.ends] = chosen
        return placed
