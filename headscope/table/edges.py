"""Edges between heads: a model's graph, edge scores, circuits and their faithfulness."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.base.files import Saved, Stored, read_parquet, whole_file
from headscope.base.result import (
    Drawn,
    Facts,
    Glance,
    Listed,
    Rows,
    Section,
    Shown,
    Tabular,
    Words,
    counted,
    number,
    shaded,
)
from headscope.base.specs import Provenance
from headscope.base.statistics import Design, mean_and_sem
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.table.scores import HeadScores

if TYPE_CHECKING:
    import networkx
    import pandas

_KEY = b"headscope"
_KIND, _FORMAT = "edge graph", 1
STABLE = 0.8
LEAST_PROMPTS = 100
_TOLERANCE = 1e-6
_NULL_LIMIT = 1e-3
_LISTED = 20

Slot = Literal["query", "key", "value", "mlp", "output"]
SLOTS: tuple[str, ...] = get_args(Slot)
HEAD_SLOTS = ("query", "key", "value")
_SHORT = {"q": "query", "k": "key", "v": "value"}


class Edge(NamedTuple):
    """An edge from a writing node to an input of a reading node; equals the plain tuple.

    Attributes:
        source: ``embed``, a head such as ``L0H1``, or an MLP such as ``MLP0``.
        target: a head, an MLP, or ``logits``.
        slot: input of the target: ``query``, ``key`` or ``value`` of a head, ``mlp``, ``output``.
    """

    source: str
    target: str
    slot: str

    def __str__(self) -> str:
        """Format as ``L0H0 -> L1H0.key``."""
        slot = f".{self.slot}" if self.slot in HEAD_SLOTS else ""
        return f"{self.source} -> {self.target}{slot}"


@dataclass(frozen=True)
class Wiring(Stored):
    """Computational graph of a model: its nodes and all edges between them.

    Sources are the embedding, every head and every MLP, in the order in which they write. A head
    has three inputs and an MLP one; the last target is the output. A target always reads the first
    so many sources, so one number describes its inputs. Query heads that share a key/value head
    have a key and a value slot each: an edge into such a slot changes only what that query head
    sees of the shared key or value.

    Attributes:
        n_heads: query heads per layer.
        parallel: per layer, whether its MLP reads the same stream as its attention, instead of the
            stream after attention.
    """

    n_heads: int
    parallel: tuple[bool, ...]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.parallel)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the writing nodes, in order."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [str(HeadIndex(layer, head)) for head in range(self.n_heads)]
            names.append(f"MLP{layer}")
        return tuple(names)

    @cached_property
    def targets(self) -> tuple[tuple[str, str], ...]:
        """Names of the reading nodes with slot: per layer queries, keys, values, then the MLP."""
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
        """Slice of a layer's heads among the sources; its MLP follows."""
        first = self.before(layer)
        return slice(first, first + self.n_heads)

    def inputs_of(self, layer: int) -> slice:
        """Slice of the slots of a layer's heads among the targets; its MLP follows."""
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
        """Mask ``[target source]`` of the pairs that are edges."""
        found: np.ndarray = np.arange(len(self.sources)) < self.reach[:, None]
        return found

    @cached_property
    def ends(self) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
        """Target and source indices of every edge, in the order of :attr:`edges`."""
        targets, sources = np.nonzero(self.present)
        return targets, sources

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, target by target, sources in the order in which they write."""
        return tuple(
            Edge(self.sources[source], *self.targets[target])
            for target, source in zip(*self.ends, strict=True)
        )

    @cached_property
    def number(self) -> dict[Edge, int]:
        """Index of every edge in :attr:`edges`."""
        return {edge: at for at, edge in enumerate(self.edges)}

    def __len__(self) -> int:
        """Number of edges: 3 H sum(1 + l (H + 1)), and those of MLPs and the output."""
        return int(self.reach.sum())

    def find(self, edge: Sequence[str]) -> int:
        """Index of an edge, given as (source, target, slot); ``q k v`` abbreviate the slots.

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
        """Scatter values of all edges into ``[target source]``; NaN where there is no edge."""
        placed = np.full(self.present.shape, np.nan)
        placed[self.ends] = values
        return placed

    def kept(self, chosen: Bool[np.ndarray, " edge"]) -> Bool[np.ndarray, "target source"]:
        """Scatter a mask over edges into a matrix ``[target source]``."""
        placed = np.zeros(self.present.shape, bool)
        placed[self.ends] = chosen
        return placed


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Mapping[Edge, float]):
    """Mapping from (source, target, slot) to a number; ``q``, ``k``, ``v`` abbreviate slots.

    Attributes:
        wiring: graph of the model.
        by_number: values in the order of the edges.
    """

    wiring: Wiring
    by_number: Float[np.ndarray, " edge"]

    def __getitem__(self, edge: Sequence[str]) -> float:
        """Value of one edge.

        Raises:
            InputError: if the model has no such edge.
        """
        return float(self.by_number[self.wiring.find(edge)])

    def __contains__(self, edge: object) -> bool:
        """Whether the model has this edge."""
        return isinstance(edge, tuple) and edge in self.wiring.number

    def __iter__(self) -> Iterator[Edge]:
        """Iterate over the edges, target by target."""
        return iter(self.wiring.edges)

    def __len__(self) -> int:
        """Number of edges."""
        return len(self.wiring)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Values in the order of the edges."""
        return np.array(self.by_number, dtype=dtype)


@dataclass(frozen=True, eq=False, repr=False)
class EdgeGraph(Shown, Tabular):
    """Effect of removing each edge on a metric, estimated or measured.

    A score is the metric without the edge minus the metric of the clean run, so an edge that the
    answer needs has a negative score if the metric is higher for right answers.

    Attributes:
        wiring: nodes and edges of the model.
        method: as in :func:`headscope.edges.attribute`.
        ablation: what a removed edge carries: ``patch`` (its source's output in the paired run),
            ``zero``, or ``mean`` (its source's average output).
        per_example: scores; NaN where the metric reads nothing of an example.
        kv_heads: number of key/value heads.
        steps: steps of integrated gradients; 0 for other methods.
        unit: unit of the metric.
        provenance: where it came from.
        clusters: label per example; examples with the same label count as one observation.
    """

    wiring: Wiring
    method: str
    ablation: str
    per_example: Float[np.ndarray, "edge example"]
    kv_heads: int = 1
    steps: int = 0
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    clusters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the shape and freeze the array."""
        if self.per_example.ndim != 2 or len(self.per_example) != len(self.wiring):
            raise InputError(
                f"scores of shape {self.per_example.shape} do not fit {len(self.wiring):,} edges."
            )
        values = np.array(self.per_example, np.float32)
        values.setflags(write=False)
        object.__setattr__(self, "per_example", values)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, in the order of :attr:`mean`."""
        return self.wiring.edges

    @cached_property
    def mean(self) -> Float[np.ndarray, " edge"]:
        """Mean score over examples, in the metric's unit."""
        return mean_and_sem(self.per_example.astype(np.float64)).mean

    @cached_property
    def sem(self) -> Float[np.ndarray, " edge"]:
        """Standard error of the mean; NaN with fewer than two examples."""
        return mean_and_sem(self.per_example.astype(np.float64), self.clusters).sem

    @property
    def scores(self) -> EdgeScores:
        """Mean score of every edge, by (source, target, slot)."""
        return EdgeScores(self.wiring, self.mean)

    @property
    def matrix(self) -> Float[np.ndarray, "target source"]:
        """Mean scores ``[target source]``; NaN where there is no edge."""
        return self.wiring.dense(self.mean)

    @property
    def head_scores(self) -> Float[np.ndarray, "layer head"]:
        """Sum of the mean scores of the edges that leave each head.

        For ``eap`` this is the attribution of the head itself, change times gradient, since all
        edges that leave a head carry the same output.
        """
        mean: np.ndarray = self._by_head(self.mean[:, None])[..., 0]
        return mean

    @cached_property
    def heads(self) -> HeadScores:
        """Turn :attr:`head_scores` into a score of heads, tested against 0."""
        found = self._by_head(self.per_example.astype(np.float64))
        return HeadScores.from_effects(
            f"{self.method}_edges",
            found,
            kv_heads=self.kv_heads,
            design=Design(clusters=self.clusters),
            unit=self.unit,
            description="Sum of the scores of the edges that leave the head.",
            source="Syed et al. 2023, arXiv 2310.10348; Hanna et al. 2024, arXiv 2403.17806",
            provenance=self.provenance,
        )

    def _by_head(self, values: Float[np.ndarray, "edge n"]) -> Float[np.ndarray, "layer head n"]:
        wiring = self.wiring
        total = np.zeros((len(wiring.sources), values.shape[1]))
        np.add.at(total, wiring.ends[1], values)
        return np.stack([total[wiring.heads_of(layer)] for layer in range(wiring.n_layers)])

    def rank(self) -> Int[np.ndarray, " edge"]:
        """Indices of the edges by magnitude, largest first; ties keep their order."""
        return np.argsort(-np.abs(np.nan_to_num(self.mean)), kind="stable")

    def top(self, k: int = 10) -> list[tuple[Edge, float]]:
        """The k edges of largest magnitude, largest first."""
        return [(self.edges[at], float(self.mean[at])) for at in self.rank()[: max(k, 0)].tolist()]

    def chosen(self, count: int) -> Bool[np.ndarray, " edge"]:
        """Mask of the ``count`` edges of largest magnitude."""
        found = np.zeros(len(self.wiring), bool)
        found[self.rank()[:count]] = True
        return found

    def auroc(self, truth: Iterable[Any]) -> float:
        """Area under the ROC curve of the magnitudes, with the true edges as positives.

        The share of pairs of a true and another edge in which the true edge has the larger
        magnitude. Ties count against it, so that scores that are all 0 get 0 and not a half.

        Args:
            truth: edges as (source, target, slot), or with these attributes.

        Raises:
            InputError: if an edge does not exist, or all or none of the edges are true.
        """
        true = np.zeros(len(self.wiring), bool)
        for edge in truth:
            named = edge if isinstance(edge, tuple) else (edge.source, edge.target, edge.slot)
            true[self.wiring.find(named)] = True
        if true.all() or not true.any():
            raise InputError("an AUROC needs edges that are true and edges that are not.")
        size = np.abs(np.nan_to_num(self.mean))
        below = np.searchsorted(np.sort(size[~true]), size[true], side="left")
        return float(below.mean() / (~true).sum())

    def glance(self) -> Glance:
        """Show the largest edges, and the sums per head as a picture."""
        layers = [f"L{layer}" for layer in range(self.wiring.n_layers)]
        heads = [f"H{head}" for head in range(self.wiring.n_heads)]
        return Glance(
            f"edges by {self.method}",
            [
                f"{len(self.wiring):,} edges",
                f"ablation {self.ablation}",
                f"{self.unit or 'metric'}, mean of {counted(self.per_example.shape[1])}",
                self.provenance.model,
            ],
            ("edge", "score"),
            [(str(edge), number(score)) for edge, score in self.top(6)],
            shaded(layers, heads, self.head_scores.tolist()),
            hint="graph.top(10), graph.heads, hs.edges.faithfulness(model, probe, metric, graph)",
        )

    def sections(self) -> list[Section]:
        """Report the graph, and its largest edges with their errors."""
        rows = [
            (str(self.edges[at]), float(self.mean[at]), float(self.sem[at]))
            for at in self.rank()[:_LISTED].tolist()
        ]
        said = f"Edges by {self.method}, {self.unit or 'metric'}, ablation {self.ablation}."
        return [
            Section(
                "Edges",
                [
                    Words(
                        "A score is the change of the metric when the edge carries what its source "
                        "writes once corrupted."
                    ),
                    Drawn("edges", said),
                    Rows(("edge", "score", "standard error"), rows, "The largest edges."),
                ],
            )
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per edge: source, target, slot, score, sem."""
        import pandas

        return pandas.DataFrame(
            [(*edge, *pair) for edge, *pair in zip(self.edges, self.mean, self.sem, strict=True)],
            columns=["source", "target", "slot", "score", "sem"],
        )

    def to_json(self, count: int | None = None) -> dict[str, Any]:
        """Nodes and edges as JSON values, for use in other programs.

        Args:
            count: keep this many edges, by magnitude; None: all.
        """
        kept = self.top(len(self.wiring) if count is None else count)
        return {
            "nodes": [*self.wiring.sources, "logits"],
            "edges": [{**edge._asdict(), "score": score} for edge, score in kept],
            "method": self.method,
            "ablation": self.ablation,
            "provenance": self.provenance.to_json(),
        }

    def to_networkx(self, count: int | None = None) -> "networkx.MultiDiGraph":
        """Nodes and edges as a directed graph; an edge's key is its slot.

        Args:
            count: keep this many edges, by magnitude; None: all.
        """
        import networkx

        found: Any = networkx.MultiDiGraph(method=self.method, ablation=self.ablation)
        found.add_nodes_from([*self.wiring.sources, "logits"])
        for edge, score in self.top(len(self.wiring) if count is None else count):
            found.add_edge(edge.source, edge.target, key=edge.slot, score=score)
        return found

    def to_dot(self, count: int = 100) -> str:
        """Edges as a graph in Graphviz's language: wide is large, dashed is positive.

        Args:
            count: keep this many edges, by magnitude.
        """
        kept = self.top(count)
        most = max((abs(score) for _, score in kept), default=0.0) or 1.0
        lines = [
            f'  "{edge.source}" -> "{edge.target}" [label="{edge.slot}", tooltip="{score:.4g}", '
            f"penwidth={0.5 + 4.5 * abs(score) / most:.2f}, "
            f"style={'dashed' if score > 0 else 'solid'}];"
            for edge, score in kept
        ]
        return "\n".join(["digraph edges {", "  rankdir=BT;", *lines, "}"]) + "\n"

    def save(self, path: "str | PathLike[str]") -> None:
        """Save as one Parquet file, atomically: a row per edge, the rest in its metadata.

        Args:
            path: path of the file; an existing file is replaced.
        """
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_pandas(self.to_pandas(), preserve_index=False)
        lists = pyarrow.array(list(self.per_example), pyarrow.list_(pyarrow.float32()))
        table = table.append_column("per_example", lists)
        head = {
            "kind": _KIND,
            "format": _FORMAT,
            "n_heads": self.wiring.n_heads,
            "parallel": list(self.wiring.parallel),
            "provenance": self.provenance.to_json(),
            **{name: getattr(self, name) for name in _FACTS},
        }
        known = {_KEY: json.dumps(head, allow_nan=False).encode()}
        with whole_file(Path(path)) as file:
            parquet.write_table(table.replace_schema_metadata(known), file, compression="zstd")

    @classmethod
    def load(cls, path: "str | PathLike[str]") -> "EdgeGraph":
        """Load a file written by :meth:`save`.

        Raises:
            InputError: if the file is missing, damaged, or holds something else.
        """
        rows = read_parquet(path)
        try:
            head = json.loads((rows.schema.metadata or {})[_KEY])
            if head["kind"] != _KIND or head["format"] != _FORMAT:
                raise ValueError(f"it holds {head['kind']!r}")
            wiring = Wiring(int(head["n_heads"]), tuple(map(bool, head["parallel"])))
            if rows.num_rows != len(wiring):
                raise ValueError(f"it has {rows.num_rows} rows for {len(wiring)} edges")
            clusters = head.pop("clusters")
            return cls(
                wiring,
                per_example=np.array(rows["per_example"].to_pylist(), np.float32),
                provenance=Provenance.from_json(head["provenance"]),
                clusters=None if clusters is None else tuple(clusters),
                **{name: head[name] for name in _FACTS if name != "clusters"},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{str(path)!r} is not a saved edge graph, or is damaged: {error}."
            ) from None


_FACTS = ("method", "ablation", "kv_heads", "steps", "unit", "clusters")


@dataclass(frozen=True, repr=False)
class Stability(Stored, Listed):
    """How much the set of strongest edges changes when the prompts are resampled.

    Attributes:
        jaccard: mean overlap (intersection over union) of the chosen edges with those chosen on
            bootstrap draws of the prompts, in [0, 1].
        low, high: the middle 95% of the draws.
        chance: expected overlap of two random sets of the same size.
        count: number of edges compared.
        prompts: number of examples (or clusters of them) drawn from.
    """

    jaccard: float
    low: float
    high: float
    chance: float
    count: int
    prompts: int

    @property
    def verdict(self) -> str:
        """``stable`` from a mean overlap of 0.8, else ``unstable``, or what is missing."""
        if self.prompts < LEAST_PROMPTS:
            return f"not known: {self.prompts} prompts, and it takes {LEAST_PROMPTS}"
        return "stable" if self.jaccard >= STABLE else "unstable"

    def __str__(self) -> str:
        """Format overlap, range, chance and verdict on one line."""
        return (
            f"Jaccard of the {self.count} edges over resampled prompts {self.jaccard:.2f}"
            f" ({self.low:.2f} to {self.high:.2f}; by chance {self.chance:.2f}): {self.verdict}"
        )


@dataclass(frozen=True, eq=False)
class Checks(Stored):
    """Sanity checks of a circuit: stability, uniqueness, and controls that it could have failed.

    Attributes:
        stability: stability over resampled prompts; None if no per-prompt scores were kept.
        rival: overlap, in [0, 1], with a circuit of the same size that was grown from another
            start, from the embedding up; NaN if there is none.
        rival_chance: expected overlap of two random sets of the same size.
        rival_faithfulness: faithfulness of that circuit. If it is as faithful with little overlap,
            there is more than one circuit of this size.
        positive: positive control: mean over examples of the metric with all edges minus that with
            none, in the metric's unit. If corruption changes nothing, there is no circuit to find.
        positive_sem: its standard error.
        null: null position: largest magnitude by which removing all edges changes the metric where
            both texts of a pair are still identical, which must be 0; NaN if there is no such
            position.
        matched: faithfulness of the circuit with its heads exchanged for random heads of the same
            layers, one value per draw.
    """

    stability: Stability | None = None
    rival: float = float("nan")
    rival_chance: float = float("nan")
    rival_faithfulness: float = float("nan")
    positive: float = float("nan")
    positive_sem: float = float("nan")
    null: float = float("nan")
    matched: Float[np.ndarray, " draw"] = field(default_factory=lambda: np.zeros(0))

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON values; what is not known is None."""
        facts = asdict(self) | {"matched": self.matched.tolist()}
        return {
            name: None if isinstance(one, float) and np.isnan(one) else one
            for name, one in facts.items()
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "Checks":
        """Read what :meth:`to_json` gave."""
        kept = {name: one for name, one in facts.items() if one is not None}
        stability = kept.pop("stability", None)
        matched = np.array(kept.pop("matched", []), float)
        found = None if stability is None else Stability(**stability)
        return cls(stability=found, matched=matched, **kept)

    @property
    def verdict(self) -> str:
        """``stable``, ``unstable``, or why neither is known."""
        if self.stability is None:
            return "not known: no scores per prompt"
        return self.stability.verdict

    def rows(self) -> list[tuple[str, str]]:
        """List every check with its outcome in words."""
        said = self.verdict if self.stability is None else str(self.stability)
        return [
            ("stability", said),
            ("rival", self._rival()),
            ("positive control", self._positive()),
            ("null position", self._null()),
            ("matched heads", self._matched()),
        ]

    def _rival(self) -> str:
        if np.isnan(self.rival):
            return "none: the edges were not chosen from scores"
        return (
            f"overlap {self.rival:.2f} (by chance {self.rival_chance:.2f}), faithfulness "
            f"{number(self.rival_faithfulness)}, grown from the embedding up"
        )

    def _positive(self) -> str:
        said = f"all edges out: {number(-self.positive)} +- {number(self.positive_sem)}"
        clear = abs(self.positive) > 2 * self.positive_sem
        return said if clear else f"{said}: corruption changes nothing, so there is no circuit"

    def _null(self) -> str:
        if np.isnan(self.null):
            return "none: no position where both texts are still the same"
        return f"largest change {number(self.null)}" + (
            "" if self.null < _NULL_LIMIT else ": must be 0"
        )

    def _matched(self) -> str:
        if not len(self.matched):
            return "none drawn"
        return (
            f"faithfulness {number(float(self.matched.mean()))} of random heads of the same layers "
            f"({len(self.matched)} draws)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Saved, Shown, Tabular):
    """A set of edges, and the metric of the model restricted to them.

    Attributes:
        wiring: nodes and edges of the model.
        kept: mask of the circuit's edges, in the order of ``wiring.edges``.
        changes: change of the metric when the edge was removed in its turn, or the score by which
            edges were chosen; NaN for edges that were not tried.
        value: mean metric of the circuit.
        full: mean metric of the whole model.
        empty: mean metric with every edge removed.
        method: how it was found.
        order: order in which edges were tried; empty if they were not.
        threshold: change up to which an edge was removed; NaN if none was set.
        ablation: what edges outside carry.
        unit: unit of the metric.
        provenance: where it came from.
        checks: stability and controls; None if they were not requested.
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
    checks: Checks | None = None

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges of the circuit, target by target."""
        return tuple(self.wiring.edges[at] for at in np.nonzero(self.kept)[0])

    @cached_property
    def heads(self) -> tuple[HeadIndex, ...]:
        """Heads that are the source of an edge of the circuit, in order."""
        sources = {edge.source for edge in self.edges}
        every = (
            HeadIndex(layer, head)
            for layer in range(self.wiring.n_layers)
            for head in range(self.wiring.n_heads)
        )
        return tuple(head for head in every if str(head) in sources)

    @property
    def faithfulness(self) -> float:
        """``(value - empty) / (full - empty)``: 1 if the circuit matches the whole model."""
        span = self.full - self.empty
        return (self.value - self.empty) / span if span else float("nan")

    def jaccard(self, other: "Circuit") -> float:
        """Jaccard overlap with the edges of another circuit; 1 for two empty ones.

        Raises:
            InputError: if the other circuit belongs to a model with other nodes.
        """
        if self.wiring != other.wiring:
            raise InputError("these circuits are of models with different nodes.")
        either = (self.kept | other.kept).sum()
        return float((self.kept & other.kept).sum() / either) if either else 1.0

    def glance(self) -> Glance:
        """Show its size, faithfulness, stability and edges."""
        share = self.kept.mean()
        checks = [] if self.checks is None else self.checks.rows()
        verdict = "" if self.checks is None else self.checks.verdict
        return Glance(
            f"circuit by {self.method}",
            [
                f"{len(self.edges):,} of {len(self.wiring):,} edges ({100 * share:.2g}%)",
                f"{len(self.heads)} heads",
                f"faithfulness {number(self.faithfulness)}",
                f"stability {verdict}" if verdict.startswith("not known") else verdict,
                self.provenance.model,
            ],
            ("check or edge", "outcome, or change when taken out"),
            [*checks, *[(str(edge), number(change)) for edge, change in self._strongest(6)]],
            hint="circuit.edges, circuit.heads, hs.edges.completeness(model, probe, metric, ...)",
        )

    def sections(self) -> list[Section]:
        """Report the circuit, its checks and its edges."""
        facts = [
            ("edges", f"{len(self.edges):,} of {len(self.wiring):,}"),
            ("heads", " ".join(map(str, self.heads)) or "none"),
            ("faithfulness", f"{number(self.faithfulness)} ({self.method}, {self.ablation})"),
            *([] if self.checks is None else self.checks.rows()),
        ]
        rows = [(str(edge), change) for edge, change in self._strongest(_LISTED)]
        return [
            Section(
                "Circuit",
                [
                    Facts(facts),
                    Drawn("circuit", "Its edges, heads by layer, wide where much is carried."),
                    Rows(("edge", "score"), rows, "Its edges, strongest first."),
                ],
            )
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per edge of the circuit: source, target, slot, change."""
        import pandas

        return pandas.DataFrame(
            [(*edge, change) for edge, change in self._strongest(len(self.edges))],
            columns=["source", "target", "slot", "change"],
        )

    def _strongest(self, count: int) -> list[tuple[Edge, float]]:
        places = np.nonzero(self.kept)[0]
        sizes = np.nan_to_num(np.abs(self.changes[places]))
        chosen = places[np.argsort(-sizes, kind="stable")[:count]]
        return [(self.wiring.edges[at], float(self.changes[at])) for at in chosen]


class HeadAt(NamedTuple):
    """A head at one position."""

    layer: int
    head: int
    pos: int

    def __str__(self) -> str:
        """Head and position, as in ``L5H1@7``."""
        return f"{HeadIndex(self.layer, self.head)}@{self.pos}"


@dataclass(frozen=True, eq=False, repr=False)
class PositionCircuit(Saved, Shown, Tabular):
    """Heads at positions, found backwards from the metric, and those that are needed of them.

    Attributes:
        found: layer, head and position of every node, in the order in which it was found.
        rounds: round in which each was found, from 1.
        targets: row of the node in whose output each was found; -1 for those of round 1, which
            were found by the metric.
        shares: change of the metric without the node (round 1), or its share of the target's
            output, from 0 to 1.
        kept: mask of the nodes that are left after pruning.
        value: mean metric when all other heads, everywhere, write what they write once taken out.
        unpruned: the same before pruning.
        full: mean metric of the model.
        empty: mean metric with all heads taken out at all positions.
        tokens: tokens of the first text; empty without a tokenizer.
        unit: unit of the metric.
        provenance: where it came from.
    """

    found: Int[np.ndarray, "node 3"]
    rounds: Int[np.ndarray, " node"]
    targets: Int[np.ndarray, " node"]
    shares: Float[np.ndarray, " node"]
    kept: Bool[np.ndarray, " node"]
    value: float
    unpruned: float
    full: float
    empty: float
    tokens: tuple[str, ...] = ()
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def nodes(self) -> tuple[HeadAt, ...]:
        """Every node that was found, in order."""
        return tuple(HeadAt(*row) for row in self.found.tolist())

    @property
    def circuit(self) -> tuple[HeadAt, ...]:
        """The nodes that are left after pruning."""
        return tuple(node for node, there in zip(self.nodes, self.kept, strict=True) if there)

    def _share(self, value: float) -> float:
        span = self.full - self.empty
        return (value - self.empty) / span if span else float("nan")

    @property
    def faithfulness(self) -> float:
        """``(value - empty) / (full - empty)``: 1 where it does what the model does."""
        return self._share(self.value)

    def _rows(self) -> list[tuple[str, ...]]:
        nodes = self.nodes
        return [
            (
                str(node),
                self.tokens[node.pos] if self.tokens else "",
                str(self.rounds[at]),
                "metric" if self.targets[at] < 0 else str(nodes[self.targets[at]]),
                number(float(self.shares[at])),
                "kept" if self.kept[at] else "pruned",
            )
            for at, node in enumerate(nodes)
        ]

    def glance(self) -> Glance:
        """The nodes, round by round, and how faithful they are."""
        return Glance(
            "heads at positions by contextual decomposition",
            [
                f"{int(self.kept.sum())} of {len(self.kept)} nodes kept",
                f"faithfulness {number(self.faithfulness)}",
                f"{number(self._share(self.unpruned))} before pruning",
                self.provenance.model,
            ],
            _POSITION_COLUMNS,
            self._rows()[:12],
            hint="result.circuit, result.nodes, result.to_pandas()",
        )

    def sections(self) -> list[Section]:
        """The same as a table, and as a picture."""
        said = (
            "Heads at positions, found round by round from the metric backwards; a share is of the "
            "target's output."
        )
        facts = [
            ("faithfulness", number(self.faithfulness)),
            ("before pruning", number(self._share(self.unpruned))),
        ]
        drawn = Drawn("positions", "Nodes by position and layer, and what each was found in.")
        rows = Rows(_POSITION_COLUMNS, self._rows())
        return [Section("Heads at positions", [Words(said), Facts(facts), drawn, rows])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per node."""
        import pandas

        frame = pandas.DataFrame(self.found, columns=["layer", "head", "pos"])
        named = {"round": self.rounds, "target": self.targets, "share": self.shares}
        return frame.assign(**named, kept=self.kept)


_POSITION_COLUMNS = ("node", "token", "round", "found in", "share", "")


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Saved, Shown, Tabular):
    """Metric of circuits of the best edges by size, with circuits of random edges as control.

    ``f(k) = (m(C_k) - m(none)) / (m(all) - m(none))`` of means over examples: 1 if the circuit
    matches the whole model, 0 if it does no better than the model with every edge removed. It can
    lie outside [0, 1], as some edges work against the answer.

    Attributes:
        sizes: nominal shares of all edges.
        counts: edges of each circuit, ``int(size * edges)``.
        value: mean metric of each circuit.
        control: mean metric of circuits of the same number of random edges, one row per draw.
        full: mean metric with all edges, the clean run.
        empty: mean metric without any edge.
        method: what ranked the edges.
        ablation: what edges outside the circuit carry.
        unit: unit of the metric.
        provenance: where it came from.
    """

    sizes: Float[np.ndarray, " size"]
    counts: Int[np.ndarray, " size"]
    value: Float[np.ndarray, " size"]
    control: Float[np.ndarray, "draw size"]
    full: float
    empty: float
    method: str = ""
    ablation: str = ""
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def _share(self, value: Float[np.ndarray, "*any size"]) -> Float[np.ndarray, "*any size"]:
        span = self.full - self.empty
        if abs(span) < _TOLERANCE * max(1.0, abs(self.full)):
            return np.full(value.shape, np.nan)
        return np.asarray((value - self.empty) / span)

    @cached_property
    def faithfulness(self) -> Float[np.ndarray, " size"]:
        """Faithfulness f of every circuit; NaN if removing all edges changes nothing."""
        return self._share(self.value)

    @cached_property
    def random(self) -> Float[np.ndarray, "draw size"]:
        """Faithfulness f of circuits of random edges."""
        return self._share(self.control)

    @property
    def cpr(self) -> float:
        """Area under f over the nominal sizes (trapezoids): higher is better, unbounded.

        Integrated circuit performance ratio. Sizes from half to all edges make up half of its axis.
        """
        return area(self.sizes, self.faithfulness)

    @property
    def cpr_capped(self) -> float:
        """Like :attr:`cpr`, with f clipped to [0, 1]."""
        return area(self.sizes, self.faithfulness.clip(0.0, 1.0))

    @property
    def cmd(self) -> float:
        """Circuit-model distance: area under ``|1 - f|`` over the nominal sizes; 0 is best."""
        return area(self.sizes, np.abs(1 - self.faithfulness))

    @property
    def log_area(self) -> float:
        """Mean of f along log sizes (trapezoids, over the length of the axis): about 1 is best.

        Small circuits count as much as large ones, so methods may rank differently than by
        :attr:`cpr`.
        """
        logs = np.log10(self.sizes)
        return area(logs, self.faithfulness) / float(logs[-1] - logs[0])

    @property
    def value_area(self) -> float:
        """Area under the metric itself over the nominal sizes; of ``accuracy`` its accuracy-AUC."""
        return area(self.sizes, self.value)

    @property
    def random_cpr(self) -> float:
        """Mean :attr:`cpr` of random edges."""
        return float(np.mean([area(self.sizes, one) for one in self.random]))

    @property
    def random_cmd(self) -> float:
        """Mean :attr:`cmd` of random edges."""
        return float(np.mean([area(self.sizes, np.abs(1 - one)) for one in self.random]))

    @property
    def random_log_area(self) -> float:
        """Mean :attr:`log_area` of random edges."""
        logs = np.log10(self.sizes)
        return float(np.mean([area(logs, one) for one in self.random]) / (logs[-1] - logs[0]))

    def glance(self) -> Glance:
        """Show the areas with those of random edges, and the curve."""
        rows = [
            (f"{count:,} edges ({100 * size:.3g}%)", number(f), number(float(control)))
            for size, count, f, control in zip(
                self.sizes, self.counts, self.faithfulness, self.random.mean(0), strict=True
            )
        ]
        areas = [
            ("CPR", number(self.cpr), number(self.random_cpr)),
            ("CMD", number(self.cmd), number(self.random_cmd)),
            ("area over log size", number(self.log_area), number(self.random_log_area)),
        ]
        return Glance(
            f"faithfulness of circuits by {self.method}",
            [f"ablation {self.ablation}", self.unit, self.provenance.model],
            ("circuit", "f", "random edges"),
            [*areas, *rows],
            hint="curve.faithfulness, curve.random, curve.to_pandas()",
        )

    def sections(self) -> list[Section]:
        """Report the curve and its areas, with those of random edges."""
        areas = [
            ("CPR", self.cpr, self.random_cpr),
            ("CPR, f cut to [0, 1]", self.cpr_capped, float("nan")),
            ("CMD", self.cmd, self.random_cmd),
            ("area over log size", self.log_area, self.random_log_area),
        ]
        said = "Faithfulness of circuits of the best edges; in grey, of random ones."
        table = Rows(("area", self.method, "random edges"), areas)
        return [Section("Faithfulness", [Drawn("faithfulness", said), table])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per size: size, edges, value, faithfulness, mean of random edges."""
        import pandas

        return pandas.DataFrame(
            {
                "size": self.sizes,
                "edges": self.counts,
                "value": self.value,
                "faithfulness": self.faithfulness,
                "random": self.random.mean(0),
            }
        )


def area(at: Float[np.ndarray, " size"], height: Float[np.ndarray, " size"]) -> float:
    """Trapezoidal area under a curve, from the first point to the last.

    Example:
        >>> area(np.array([0.5, 1.0]), np.array([0.0, 1.0]))
        0.25
    """
    return float(((at[1:] - at[:-1]) * (height[1:] + height[:-1]) / 2).sum())


@dataclass(frozen=True, eq=False, repr=False)
class Completeness(Saved, Shown, Tabular):
    """Metric left after removing the same heads from a circuit and from the whole model.

    If a circuit is complete, removing the same heads from both lowers both alike. A gap means that
    something outside the circuit compensates for the removed heads.

    Attributes:
        subsets: removed heads per draw; the first draws are single heads.
        circuit: mean metric of the circuit without them.
        model: mean metric of the whole model without them.
        unit: unit of the metric.
        provenance: where the circuit came from.
    """

    subsets: tuple[tuple[HeadIndex, ...], ...]
    circuit: Float[np.ndarray, " draw"]
    model: Float[np.ndarray, " draw"]
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def gap(self) -> Float[np.ndarray, " draw"]:
        """Absolute difference ``|m(C - K) - m(M - K)|``, in the metric's unit."""
        return np.asarray(np.abs(self.circuit - self.model))

    def sections(self) -> list[Section]:
        """The sets with the largest gaps, as a table."""
        said = (
            "Metric of the circuit and of the whole model with the same heads taken out: a gap "
            "says that something outside of the circuit stands in for them."
        )
        worst = np.argsort(-self.gap)[:_LISTED]
        rows = [
            (
                " ".join(map(str, self.subsets[at])) or "none",
                float(self.circuit[at]),
                float(self.model[at]),
                float(self.gap[at]),
            )
            for at in worst.tolist()
        ]
        columns = ("heads taken", "circuit", "whole model", "gap")
        return [Section("Completeness", [Words(said), Rows(columns, rows)])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per set: heads, circuit, model, gap."""
        import pandas

        heads = [" ".join(map(str, one)) for one in self.subsets]
        columns = {"heads": heads, "circuit": self.circuit, "model": self.model, "gap": self.gap}
        return pandas.DataFrame(columns)

    def glance(self) -> Glance:
        """Show the largest gaps."""
        worst = np.argsort(-self.gap)[:6]
        return Glance(
            "completeness of a circuit",
            [
                f"{len(self.subsets)} sets of heads",
                f"mean gap {number(float(self.gap.mean()))} {self.unit}",
                self.provenance.model,
            ],
            ("heads taken", "circuit", "whole model", "gap"),
            [
                (
                    " ".join(map(str, self.subsets[at])),
                    number(float(self.circuit[at])),
                    number(float(self.model[at])),
                    number(float(self.gap[at])),
                )
                for at in worst
            ],
            hint="result.gap, result.subsets",
        )


@dataclass(frozen=True, eq=False, repr=False)
class MethodComparison(Saved, Shown, Tabular):
    """Agreement of estimates of edges and heads with exact patching on the same texts.

    Attributes:
        methods: names of the methods; methods for heads only have no edge results.
        edges: Spearman rank correlation of the magnitudes of edge scores with those of exact
            patching, in [-1, 1]; NaN for methods for heads.
        edges_low, edges_high: the middle 95% over bootstrap draws of the examples.
        signed: the same for signed scores.
        overlap: Jaccard overlap of the strongest edges with those of exact patching, in [0, 1].
        count: number of edges compared for the overlap.
        heads: rank correlation of the magnitudes per head, outgoing edges summed, with the effect
            of removing each head alone.
        heads_low, heads_high: as for edges; NaN if a method has no per-example scores.
        gradients: gradients (passes, for exact) per example.
        seconds: time that each method took; NaN for scores that were given.
        ablation: what replaces a removed edge.
        unit: unit of the metric.
        provenance: where it came from.
        compared: number of edges that exact patching measured; 0 if it was not recorded.
    """

    methods: tuple[str, ...]
    edges: Float[np.ndarray, " method"]
    edges_low: Float[np.ndarray, " method"]
    edges_high: Float[np.ndarray, " method"]
    signed: Float[np.ndarray, " method"]
    overlap: Float[np.ndarray, " method"]
    count: int
    heads: Float[np.ndarray, " method"]
    heads_low: Float[np.ndarray, " method"]
    heads_high: Float[np.ndarray, " method"]
    gradients: Int[np.ndarray, " method"]
    seconds: Float[np.ndarray, " method"]
    ablation: str = ""
    unit: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    compared: int = 0

    def _rows(self) -> list[tuple[str, str, str, str, str, str, str]]:
        return [
            (
                name,
                _ranged(self.edges[at], self.edges_low[at], self.edges_high[at]),
                _ranged(self.signed[at]),
                _ranged(self.overlap[at]),
                _ranged(self.heads[at], self.heads_low[at], self.heads_high[at]),
                f"{self.gradients[at]:,}",
                "" if np.isnan(self.seconds[at]) else f"{self.seconds[at]:.2g}",
            )
            for at, name in enumerate(self.methods)
        ]

    def _names(self) -> tuple[str, ...]:
        return (
            "method", "edges, |score|", "with sign", f"top {self.count}", "heads, |score|",
            "gradients", "seconds",
        )  # fmt: skip

    def glance(self) -> Glance:
        """Show one row per method, best first."""
        return Glance(
            "estimates against exact patching",
            [
                f"rank correlations over {self.compared:,} edges",
                f"ablation {self.ablation}",
                self.provenance.model,
            ],
            self._names(),
            self._rows(),
            hint="result.to_pandas()",
        )

    def sections(self) -> list[Section]:
        """Report the same as a table."""
        said = "Rank correlations with exact patching on the same texts, with 95% intervals."
        return [Section("Methods", [Words(said), Rows(self._names(), self._rows())])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per method."""
        import pandas

        names = (
            *("edges", "edges_low", "edges_high", "signed", "overlap", "heads", "heads_low"),
            *("heads_high", "gradients", "seconds"),
        )
        return pandas.DataFrame(
            {"method": list(self.methods), **{name: getattr(self, name) for name in names}}
        )


def _ranged(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} ({low:.2f} to {high:.2f})"
