"""Scores of every edge of a model: a result that can be ranked, shown, and kept on disk."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.base.files import whole_file
from headscope.base.glance import Glance, Shown, number, shaded
from headscope.base.parquet_files import read_parquet
from headscope.base.result import Tabular
from headscope.base.statistics import Design, mean_and_sem
from headscope.edges.wiring import Edge, Wiring
from headscope.errors import InputError
from headscope.table import HeadScores, Provenance

if TYPE_CHECKING:
    import pandas

_KEY = b"headscope"
_KIND, _FORMAT = "edge graph", 1


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Mapping[Edge, float]):
    """A number for every edge, by (source, target, slot); ``q``, ``k``, ``v`` stand for slots.

    Attributes:
        wiring: which edges there are.
        by_number: in the order of the edges.
    """

    wiring: Wiring
    by_number: Float[np.ndarray, " edge"]

    def __getitem__(self, edge: Sequence[str]) -> float:
        """Number of one edge.

        Raises:
            InputError: if the model has no such edge.
        """
        return float(self.by_number[self.wiring.find(edge)])

    def __contains__(self, edge: object) -> bool:
        """Whether the model has this edge."""
        return isinstance(edge, tuple) and edge in self.wiring.number

    def __iter__(self) -> Iterator[Edge]:
        """Edges, target by target."""
        return iter(self.wiring.edges)

    def __len__(self) -> int:
        """Number of edges."""
        return len(self.wiring)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Numbers in the order of the edges."""
        return np.array(self.by_number, dtype=dtype)


@dataclass(frozen=True, eq=False, repr=False)
class EdgeGraph(Shown, Tabular):
    """What taking out each edge does to a metric, estimated or measured.

    A score is the metric with the edge taken out less that of the clean run, so an edge that the
    answer needs has a negative score where the metric is large for right answers.

    Attributes:
        wiring: nodes and edges of the model.
        method: ``eap``, ``eap_ig`` or ``exact``.
        ablation: what an edge that is taken out carries: ``patch`` (what its source writes in the
            paired run), ``zero``, or ``mean`` (what it writes on average).
        per_example: scores; NaN where the metric reads nothing of an example.
        kv_heads: number of key/value heads.
        steps: of integrated gradients; 0 where there are none.
        unit: of the metric.
        provenance: where it came from.
        clusters: label per example; those with one label count as one observation.
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
        """Check the shape; freeze the array."""
        if self.per_example.ndim != 2 or len(self.per_example) != len(self.wiring):
            raise InputError(
                f"scores of shape {self.per_example.shape} do not fit {len(self.wiring):,} edges."
            )
        values = np.array(self.per_example, np.float32)
        values.setflags(write=False)
        object.__setattr__(self, "per_example", values)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, in the order of :attr:`mean`."""
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
        """Mean scores with targets downwards and sources to the right; NaN where no edge is."""
        return self.wiring.dense(self.mean)

    @property
    def head_scores(self) -> Float[np.ndarray, "layer head"]:
        """Sum of the mean scores of the edges that leave each head.

        By ``eap`` this is the attribution of the head itself, change times gradient: what it
        writes enters all its edges alike.
        """
        mean: np.ndarray = self._by_head(self.mean[:, None])[..., 0]
        return mean

    @cached_property
    def heads(self) -> HeadScores:
        """:attr:`head_scores` as a score of the table, tested against 0."""
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
        """Numbers of the edges, largest magnitude first; equal ones in their order."""
        return np.argsort(-np.abs(np.nan_to_num(self.mean)), kind="stable")

    def top(self, k: int = 10) -> list[tuple[Edge, float]]:
        """The k edges with the largest magnitudes, largest first."""
        return [(self.edges[at], float(self.mean[at])) for at in self.rank()[: max(k, 0)].tolist()]

    def chosen(self, count: int) -> Bool[np.ndarray, " edge"]:
        """The ``count`` edges with the largest magnitudes, as a mask over the edges."""
        found = np.zeros(len(self.wiring), bool)
        found[self.rank()[:count]] = True
        return found

    def auroc(self, truth: Iterable[Any]) -> float:
        """How well magnitudes tell true edges from the others: area under the ROC curve.

        The share of pairs of a true and another edge in which the true one has the larger
        magnitude; ties count against it, so that scores that are all 0 have 0, not a half.

        Args:
            truth: edges as (source, target, slot), or with these attributes.

        Raises:
            InputError: if there is no such edge, or all or none are true.
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
        """The largest edges, and the sums of heads as a picture."""
        layers = [f"L{layer}" for layer in range(self.wiring.n_layers)]
        heads = [f"H{head}" for head in range(self.wiring.n_heads)]
        return Glance(
            f"edges by {self.method}",
            [
                f"{len(self.wiring):,} edges",
                f"ablation {self.ablation}",
                f"{self.unit or 'metric'}, mean of {self.per_example.shape[1]} examples",
                self.provenance.model,
            ],
            ("edge", "score"),
            [(str(edge), number(score)) for edge, score in self.top(6)],
            shaded(layers, heads, self.head_scores.tolist()),
            hint="graph.top(10), graph.heads, hs.edges.faithfulness(model, probe, metric, graph)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per edge: source, target, slot, score, sem."""
        import pandas

        return pandas.DataFrame(
            [(*edge, *pair) for edge, *pair in zip(self.edges, self.mean, self.sem, strict=True)],
            columns=["source", "target", "slot", "score", "sem"],
        )

    def to_json(self, count: int | None = None) -> dict[str, Any]:
        """Nodes and edges as JSON values, for other programs.

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

    def save(self, path: "str | PathLike[str]") -> None:
        """Write one Parquet file atomically: a row per edge, everything else in its metadata.

        Args:
            path: of the file; what is there is replaced.
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
        """Read what :meth:`save` wrote.

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
