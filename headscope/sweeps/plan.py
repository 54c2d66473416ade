"""What a sweep is to run: studies of cells, cut into chunks that are keyed by their content."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.sweeps.config import EditConfig, MetricConfig
from headscope.sweeps.selection import Cell

# Of the rows that a chunk writes: another format computes everything anew.
FORMAT = 2


@dataclass(frozen=True)
class PlannedModel:
    """One model at one revision.

    Attributes:
        entry: number of the config's entry that says how to load it.
        name: how results call it.
        checkpoint: the revision that was asked for.
        digest: of its weights.
        layers: how many it has.
        heads: in a layer.
        kv_heads: key/value heads in a layer.
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
class Study:
    """One model, probe, edit and seed; the cells differ in their heads alone.

    Attributes:
        model: number of the model in the plan.
        probe: name of the probe.
        probe_digest: of its tokens, marks and answers, and of the reference's.
        examples: in the probe.
        edit: what is done.
        metrics: what is measured of every cell, on the same passes.
        seed: of the edit.
        heads: all heads edited on this probe; the ablation is proved on the one in the middle.
    """

    model: int
    probe: str
    probe_digest: str
    examples: int
    edit: EditConfig
    metrics: tuple[MetricConfig, ...]
    seed: int
    heads: tuple[HeadIndex, ...]


@dataclass(frozen=True)
class Chunk:
    """Cells of one study that are measured and saved together."""

    id: str
    study: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a sweep will compute, in the order of its table."""

    name: str
    models: tuple[PlannedModel, ...]
    studies: tuple[Study, ...]
    chunks: tuple[Chunk, ...]

    @cached_property
    def by_id(self) -> Mapping[str, Chunk]:
        """Chunks by their id."""
        return {chunk.id: chunk for chunk in self.chunks}

    @cached_property
    def n_cells(self) -> int:
        """Rows of the whole table."""
        return sum(map(self.count, self.chunks))

    def count(self, chunk: Chunk) -> int:
        """Rows that a chunk gives: each of its cells with each metric."""
        return len(chunk.cells) * len(self.studies[chunk.study].metrics)

    def model_of(self, chunk: Chunk) -> int:
        """Number of the model that a chunk needs."""
        return self.studies[chunk.study].model

    def shard(self, index: int, count: int) -> tuple[Chunk, ...]:
        """Chunks of shard ``index`` of ``count``, from 1: neighbours, so that few models load.

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
    study: Study,
    number: int,
    cells: Sequence[Cell],
    size: int,
) -> list[Chunk]:
    """Cut the cells of a study into chunks of equal size, at most ``size``."""
    pieces = -(-len(cells) // size)
    cuts = [len(cells) * i // pieces for i in range(pieces + 1)]
    parts = [tuple(cells[a:b]) for a, b in pairwise(cuts)]
    model = asdict(models[study.model]) | {"entry": 0}
    what = {"format": FORMAT, "model": model, "study": study_json(study) | {"model": 0}}
    return [Chunk(key(what | {"cells": cells_json(part)}), number, part) for part in parts]


def key(content: object) -> str:
    """Name of JSON content: 24 hexadecimal digits of its SHA-256."""
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
    """Read what :func:`plan_json` gave."""
    return Plan(
        found["name"],
        tuple(PlannedModel(**model) for model in found["models"]),
        tuple(_study(study) for study in found["studies"]),
        tuple(
            Chunk(chunk["id"], chunk["study"], tuple(_cell(cell) for cell in chunk["cells"]))
            for chunk in found["chunks"]
        ),
    )


def study_json(study: Study) -> dict[str, Any]:
    """A study as JSON values."""
    kept = {name: getattr(study, name) for name in ("model", "probe", "probe_digest", "examples")}
    return kept | {
        "edit": study.edit.model_dump(mode="json", exclude_none=True),
        "metrics": [one.model_dump(mode="json", exclude_none=True) for one in study.metrics],
        "seed": study.seed,
        "heads": heads_text(study.heads),
    }


def cells_json(cells: Iterable[Cell]) -> list[list[Any]]:
    """Cells as JSON values."""
    return [[cell.set, cell.draw, heads_text(cell.heads)] for cell in cells]


def heads_text(heads: Iterable[HeadIndex]) -> str:
    """Heads as they stand in tables: ``L0H1 L2H0``."""
    return " ".join(map(str, heads))


def heads_of(text: str) -> tuple[HeadIndex, ...]:
    """Heads of such a text."""
    return tuple(_head(word) for word in text.split())


@lru_cache(maxsize=2**16)
def _head(word: str) -> HeadIndex:
    return HeadIndex.parse(word)


def _cell(found: Sequence[Any]) -> Cell:
    return Cell(str(found[0]), int(found[1]), heads_of(found[2]))


def _study(found: Mapping[str, Any]) -> Study:
    return Study(
        model=found["model"],
        probe=found["probe"],
        probe_digest=found["probe_digest"],
        examples=found["examples"],
        edit=EditConfig.model_validate(found["edit"]),
        metrics=tuple(MetricConfig.model_validate(one) for one in found["metrics"]),
        seed=found["seed"],
        heads=heads_of(found["heads"]),
    )
