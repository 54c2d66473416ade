"""Plan of a sweep: resolved sets of heads, groups of cells, and content-addressed chunks.

Sets of a config are ranked and resolved per model.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from headscope import pruning
from headscope.ablation.heads import estimate_heads
from headscope.base.options import RunOptions
from headscope.base.statistics import top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import Metric
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.scoring import score
from headscope.sweeps.config import (
    EDGES,
    METRICS,
    OWN_SCORES,
    EdgeConfig,
    EditConfig,
    HeadSet,
    MetricConfig,
    circuit_set,
)
from headscope.table import HeadTable

Ranking = Callable[[HeadSet], Float[np.ndarray, "layer head"]]


@dataclass(frozen=True, eq=False)
class Rankings:
    """Rankings of one model's heads, each computed once."""

    model: HeadModel
    probes: Mapping[str, Probe]
    options: RunOptions = RunOptions()
    known: dict[tuple[str, ...], Float[np.ndarray, "layer head"]] = field(default_factory=dict)

    def of(self, probe: str, metric: MetricConfig) -> Ranking:
        """Value of every head in the ranking of a set, for one probe and metric."""
        return partial(self._values, probe, metric)

    def _values(
        self, probe: str, metric: MetricConfig, one: HeadSet
    ) -> Float[np.ndarray, "layer head"]:
        assert one.score is not None  # noqa: S101  # only ranked sets ask
        said = {"probe": probe, "metric": metric.label}
        if one.table is not None:
            key: tuple[str, ...] = (one.score, "table", str(one.table))
        else:
            key = (one.score, *(said[need] for need in OWN_SCORES.get(one.score, ())))
        if key not in self.known:
            if one.table is not None:
                self.known[key] = _from_table(one.table, one.score, self.model)
            else:
                self.known[key] = self._measured(one.score, self.probes[probe], metric_of(metric))
        return self.known[key]

    def _measured(self, name: str, probe: Probe, metric: Metric) -> Float[np.ndarray, "layer head"]:
        model, size = self.model, self.options.batch_size
        if name == "attribution":
            estimate = estimate_heads(
                model, probe, metric, batch_size=size, memory=self.options.memory, progress=False
            )
            return np.asarray(np.abs(estimate.mean))
        if name == "gradient_importance":
            return pruning.gradient_importance(
                model, probe, metric, batch_size=size, progress=False
            ).mean
        if name == "confidence":
            return pruning.confidence(model, probe, batch_size=size).mean
        if name == "output_norm":
            return pruning.output_norm(model, probe, batch_size=size).mean
        if name == "weight_norm":
            return pruning.weight_norm(model).mean
        return score(model, None, [name], progress=False)[name].mean


def metric_of(metric: MetricConfig) -> Metric:
    """Metric of a config."""
    chosen = METRICS[metric.metric]
    return chosen if metric.at is None else chosen.at(metric.at)


def _from_table(table: Path, score: str, model: HeadModel) -> Float[np.ndarray, "layer head"]:
    """Score from a saved scan."""
    values = HeadTable.load(table)[score].mean
    expected = (model.shape.n_layers, model.shape.n_heads)
    if values.shape != expected:
        raise InputError(
            f"{table} ranks heads of a model with {values.shape[0]} layers of "
            f"{values.shape[1]} heads; {model.name} has {expected[0]} of {expected[1]}."
        )
    return values


@dataclass(frozen=True)
class Cell:
    """One unit of work: heads edited jointly, scores of all edges, or a circuit.

    Attributes:
        set: name of the set.
        draw: number of the draw of a random set; 0 otherwise.
        heads: in the order of the set; empty at the first point of a curve, and for edges.
        edges: None for heads; 0 for the scores of all edges; otherwise the size of a circuit.
    """

    set: str
    draw: int
    heads: tuple[HeadIndex, ...]
    edges: int | None = None


def edge_cells(wanted: EdgeConfig) -> tuple[Cell, ...]:
    """Cells for the scores of all edges, and for each circuit."""
    sizes = sorted(wanted.circuits)
    return (Cell(EDGES, 0, (), 0), *(Cell(circuit_set(size), 0, (), size) for size in sizes))


def cells(model: HeadModel, sets: tuple[HeadSet, ...], ranking: Ranking) -> tuple[Cell, ...]:
    """Cells of all sets, in order.

    Raises:
        InputError: if the model lacks a head, or a set has none.
    """
    by_name: dict[str, list[tuple[HeadIndex, ...]]] = {}
    # Sets that others exclude come first, whatever the order in the file.
    for one in sorted(sets, key=lambda one: one.not_in is not None):
        by_name[one.name] = _draws(model, one, ranking, by_name)
    return tuple(
        Cell(one.name, draw, heads)
        for one in sets
        for draw, drawn in enumerate(by_name[one.name])
        for heads in _arranged(one, drawn)
    )


def _draws(
    model: HeadModel,
    one: HeadSet,
    ranking: Ranking,
    earlier: Mapping[str, list[tuple[HeadIndex, ...]]],
) -> list[tuple[HeadIndex, ...]]:
    """Heads of a set, one list per draw."""
    among = _among(model, one)
    if one.score is not None:
        values = ranking(one)
        signed = values if one.order == "largest" else -values
        width = values.shape[1]
        ranked = [HeadIndex(*divmod(int(i), width)) for i in top_order(signed, values.size)]
        allowed = set(among)
        among = [head for head in ranked if head in allowed]
        if one.top is not None and one.top > len(among):
            raise InputError(
                f"the set {one.name!r} takes the top {one.top} heads, and {model.name} has "
                f"{len(among)} with a score."
            )
        among = among[: one.top]
    if not among:
        raise InputError(f"the set {one.name!r} has no heads in {model.name}.")
    if one.random is None:
        return [tuple(among)]
    if one.not_in is not None:
        if one.not_in not in earlier:
            raise InputError(f"the set {one.name!r} excludes {one.not_in!r}, which excludes too.")
        taken = {head for draw in earlier[one.not_in] for head in draw}
        among = [head for head in among if head not in taken]
    wanted = len(among) if one.random == "all" else one.random
    if not 0 < wanted <= len(among):
        raise InputError(
            f"the set {one.name!r} draws {one.random} heads, and {model.name} has {len(among)} to "
            "draw from."
        )
    streams = (np.random.default_rng([one.seed, draw]) for draw in range(one.draws))
    return [tuple(among[i] for i in stream.permutation(len(among))[:wanted]) for stream in streams]


def _among(model: HeadModel, one: HeadSet) -> list[HeadIndex]:
    """Heads that a set may contain."""
    heads = list(model.shape.heads)
    if one.heads is not None:
        heads = [model.shape.check(HeadIndex.parse(head)) for head in one.heads]
        heads = list(dict.fromkeys(heads))
    if one.layers is not None:
        for layer in one.layers:
            if layer not in model.shape.attention_layers:
                raise InputError(
                    f"the set {one.name!r} asks for layer {layer}, and {model.name} has no heads "
                    f"in layer {layer}."
                )
        heads = [head for head in heads if head.layer in one.layers]
    return heads


def _arranged(one: HeadSet, heads: tuple[HeadIndex, ...]) -> list[tuple[HeadIndex, ...]]:
    """Combinations of heads that are edited jointly."""
    if one.arrange == "each":
        return [(head,) for head in heads]
    if one.arrange == "together":
        # In layer order: what is edited does not depend on the order of a draw.
        return [tuple(sorted(heads))]
    steps = len(heads) if one.steps is None else min(one.steps, len(heads))
    counts = sorted({round(len(heads) * step / steps) for step in range(steps + 1)})
    return [heads[:count] for count in counts]


# Of the rows that a chunk writes: another format computes everything anew.
FORMAT = 2


@dataclass(frozen=True)
class PlannedModel:
    """One model at one revision.

    Attributes:
        entry: index of the config entry to load it by.
        name: name in results.
        checkpoint: requested revision.
        digest: digest of its weights.
        layers: number of layers.
        heads: heads per layer.
        kv_heads: key/value heads per layer.
    """

    entry: int
    name: str
    checkpoint: str | None
    digest: str
    layers: int
    heads: int
    kv_heads: int

    @property
    def label(self) -> str:
        """Name and checkpoint."""
        return self.name + (f"@{self.checkpoint}" if self.checkpoint else "")


@dataclass(frozen=True)
class CellGroup:
    """Cells with the same model, probe, edit and seed, which differ only in their heads.

    Or, for edges, with the same model, probe, metric and method; its cells are its scores and
    circuits.

    Attributes:
        model: index of the model in the plan.
        probe: name of the probe.
        probe_digest: digest of its tokens, marks and answers, and of the reference's.
        examples: number of examples of the probe.
        edit: name of the edit, or of the method that scores edges.
        metrics: metrics of every cell, on the same passes.
        seed: seed of the edit.
        heads: all heads edited on this probe; the edit is validated on the middle one.
        n_edges: number of edges of the model, if edges are scored.
    """

    model: int
    probe: str
    probe_digest: str
    examples: int
    edit: EditConfig | EdgeConfig
    metrics: tuple[MetricConfig, ...]
    seed: int
    heads: tuple[HeadIndex, ...]
    n_edges: int = 0


@dataclass(frozen=True)
class Chunk:
    """Cells of one group that are measured and saved together."""

    id: str
    study: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a sweep will compute, in table order."""

    name: str
    models: tuple[PlannedModel, ...]
    studies: tuple[CellGroup, ...]
    chunks: tuple[Chunk, ...]

    @cached_property
    def by_id(self) -> Mapping[str, Chunk]:
        """Chunks by their id."""
        return {chunk.id: chunk for chunk in self.chunks}

    @cached_property
    def n_cells(self) -> int:
        """Number of rows of the whole table."""
        return sum(map(self.count, self.chunks))

    def count(self, chunk: Chunk) -> int:
        """Number of rows of a chunk: each of its cells, or edges, with each metric."""
        study = self.studies[chunk.study]
        rows = sum(study.n_edges if cell.edges == 0 else 1 for cell in chunk.cells)
        return rows * len(study.metrics)

    def model_of(self, chunk: Chunk) -> int:
        """Index of the model that a chunk needs."""
        return self.studies[chunk.study].model

    def shard(self, index: int, count: int) -> tuple[Chunk, ...]:
        """Contiguous chunks of shard ``index`` of ``count``, from 1.

        Raises:
            InputError: if there is no such shard.
        """
        if not 1 <= index <= count:
            raise InputError(
                f"there is no shard {index}/{count}: shards are 1/{count} to {count}/{count}."
            )
        n = len(self.chunks)
        return self.chunks[(index - 1) * n // count : index * n // count]


def chunked(
    models: Sequence[PlannedModel],
    study: CellGroup,
    number: int,
    cells: Sequence[Cell],
    size: int,
) -> list[Chunk]:
    """Cut the cells of a group into chunks of equal size, at most ``size``."""
    pieces = -(-len(cells) // size)
    cuts = [len(cells) * i // pieces for i in range(pieces + 1)]
    parts = [tuple(cells[a:b]) for a, b in pairwise(cuts)]
    model = asdict(models[study.model]) | {"entry": 0}
    what = {"format": FORMAT, "model": model, "study": study_json(study) | {"model": 0}}
    return [Chunk(key(what | {"cells": cells_json(part)}), number, part) for part in parts]


def key(content: object) -> str:
    """Key of JSON content: the first 24 hexadecimal digits of its SHA-256."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {
        "name": plan.name,
        "models": [asdict(model) for model in plan.models],
        "studies": [study_json(study) for study in plan.studies],
        "chunks": [
            {"id": chunk.id, "study": chunk.study, "cells": cells_json(chunk.cells)}
            for chunk in plan.chunks
        ],
    }


def plan_from_json(found: Mapping[str, Any]) -> Plan:
    """Rebuild a plan from :func:`plan_json`."""
    return Plan(
        found["name"],
        tuple(PlannedModel(**model) for model in found["models"]),
        tuple(_study(study) for study in found["studies"]),
        tuple(
            Chunk(chunk["id"], chunk["study"], tuple(_cell(cell) for cell in chunk["cells"]))
            for chunk in found["chunks"]
        ),
    )


def study_json(study: CellGroup) -> dict[str, Any]:
    """A study as JSON values."""
    kept = {name: getattr(study, name) for name in ("model", "probe", "probe_digest", "examples")}
    edit = study.edit.model_dump(mode="json", exclude_none=True)
    if isinstance(study.edit, EdgeConfig):
        kept |= {"edges": edit, "n_edges": study.n_edges}
    else:
        kept |= {"edit": edit}
    return kept | {
        "metrics": [one.model_dump(mode="json", exclude_none=True) for one in study.metrics],
        "seed": study.seed,
        "heads": heads_text(study.heads),
    }


def cells_json(cells: Iterable[Cell]) -> list[list[Any]]:
    """Cells as JSON values."""
    return [
        [cell.set, cell.draw, heads_text(cell.heads), *([] if cell.edges is None else [cell.edges])]
        for cell in cells
    ]


def heads_text(heads: Iterable[HeadIndex]) -> str:
    """Format heads as in tables: ``L0H1 L2H0``."""
    return " ".join(map(str, heads))


def heads_of(text: str) -> tuple[HeadIndex, ...]:
    """Parse heads from that format."""
    return tuple(_head(word) for word in text.split())


@lru_cache(maxsize=2**16)
def _head(word: str) -> HeadIndex:
    return HeadIndex.parse(word)


def _cell(found: Sequence[Any]) -> Cell:
    edges = int(found[3]) if len(found) > 3 else None
    return Cell(str(found[0]), int(found[1]), heads_of(found[2]), edges)


def _study(found: Mapping[str, Any]) -> CellGroup:
    return CellGroup(
        model=found["model"],
        probe=found["probe"],
        probe_digest=found["probe_digest"],
        examples=found["examples"],
        edit=(
            EdgeConfig.model_validate(found["edges"])
            if "edges" in found
            else EditConfig.model_validate(found["edit"])
        ),
        metrics=tuple(MetricConfig.model_validate(one) for one in found["metrics"]),
        seed=found["seed"],
        heads=heads_of(found["heads"]),
        n_edges=int(found.get("n_edges", 0)),
    )
