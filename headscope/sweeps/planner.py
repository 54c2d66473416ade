"""From a config to a plan, and what the plan will cost.

Every model is loaded once, to read its shape, weights and probes; time is measured on one cell.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from headscope.base.options import track
from headscope.base.specs import versions
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.sweeps.bench import Bench, Benches
from headscope.sweeps.config import (
    RUNTIME_KEYS,
    EditConfig,
    MetricConfig,
    NamedProbe,
    SweepConfig,
    check_config,
)
from headscope.sweeps.plan import (
    FORMAT,
    Cell,
    CellGroup,
    Chunk,
    Plan,
    PlannedModel,
    cells,
    chunked,
    key,
    plan_json,
)
from headscope.table import Provenance

# Edits that draw: the others give the same with every seed, and are run once, as seed 0.
_DRAWS = {"resample"}


def make_plan(
    config: SweepConfig, *, benches: Benches | None = None, progress: bool | None = None
) -> Plan:
    """Plan a sweep; everything that does not fit is found here, before it starts.

    Args:
        config: what is wanted.
        benches: keeps the last model, for whoever goes on with it.
        progress: show a progress bar over the models. Default: only in a terminal or notebook.

    Raises:
        InputError: if a probe, edit, metric or set does not fit a model.
        ModelLoadError: if a model cannot be had.

    Example:
        >>> config = hs.sweeps.read_config("configs/sweeps/ioi-all-heads.yaml")
        >>> hs.sweeps.make_plan(config).name
        'ioi-all-heads'
    """
    check_config(config)
    loader = benches or Benches(config)
    states = [
        (entry, revision)
        for entry, model in enumerate(config.models)
        for revision in model.revisions()
    ]
    models: list[PlannedModel] = []
    studies: list[CellGroup] = []
    chunks: list[Chunk] = []
    with track(len(states), f"planning {config.name}", show=progress) as advance:
        for entry, revision in states:
            wanted = config.models[entry]
            bench = loader.of(entry, revision)
            shape = bench.model.shape
            models.append(
                PlannedModel(
                    entry=entry,
                    name=wanted.label,
                    checkpoint=revision,
                    digest=bench.model.digest(),
                    layers=shape.n_layers,
                    heads=shape.n_heads,
                    kv_heads=shape.n_kv_heads,
                )
            )
            for study, chosen in _groups(config, bench, len(models) - 1):
                chunks += chunked(models, study, len(studies), chosen, config.chunk)
                studies.append(study)
            advance(1)
    return Plan(config.name, tuple(models), tuple(studies), tuple(chunks))


def _groups(
    config: SweepConfig, bench: Bench, model: int
) -> Iterator[tuple[CellGroup, list[Cell]]]:
    """Groups of one model with their cells; metrics share the cells that they have in common."""
    for probe in config.probes:
        wanted: dict[Cell, tuple[MetricConfig, ...]] = {}
        for metric in config.metrics:
            ranking = bench.rankings.of(probe.label, metric)
            for cell in cells(bench.model, config.sets, ranking):
                wanted[cell] = (*wanted.get(cell, ()), metric)
        shared: dict[tuple[MetricConfig, ...], list[Cell]] = {}
        for cell, metrics in wanted.items():
            shared.setdefault(metrics, []).append(cell)
        named = _named(wanted)
        for edit in config.edits:
            for metrics, chosen in shared.items():
                for seed in config.seeds if edit.method in _DRAWS else (0,):
                    bench.placer(bench.measurement(probe.label, metrics, seed), edit)
                    yield _study(bench, model, probe, edit, metrics, seed, named), chosen


def _study(
    bench: Bench,
    model: int,
    probe: NamedProbe,
    edit: EditConfig,
    metrics: tuple[MetricConfig, ...],
    seed: int,
    named: tuple[HeadIndex, ...],
) -> CellGroup:
    return CellGroup(
        model=model,
        probe=probe.label,
        probe_digest=bench.data_digest(probe.label, edit),
        examples=len(bench.probes[probe.label]),
        edit=edit,
        metrics=metrics,
        seed=seed,
        heads=named,
    )


def _named(chosen: Iterable[Cell]) -> tuple[HeadIndex, ...]:
    """All heads of some cells, in order."""
    heads = sorted({head for cell in chosen for head in cell.heads})
    if not heads:
        raise InputError("the sweep edits no heads.")
    return tuple(heads)


def manifest(config: SweepConfig, plan: Plan) -> dict[str, Any]:
    """What is written down of a sweep before it starts: nothing that tells of a home."""
    return {
        "format": FORMAT,
        "name": config.name,
        "digest": config_digest(config),
        "config": portable_config(config),
        "versions": versions(),
        "plan": plan_json(plan),
    }


def config_digest(config: SweepConfig) -> str:
    """Digest of what a sweep computes; settings of how it is run do not count."""
    said = portable_config(config)
    return key({name: value for name, value in said.items() if name not in RUNTIME_KEYS})


def portable_config(config: SweepConfig) -> Mapping[str, Any]:
    """A config as JSON values, absolute paths cut to their last part."""
    return Provenance(probe=config.model_dump(mode="json", exclude_none=True)).probe


@dataclass(frozen=True)
class Estimate:
    """Cost of a plan.

    Attributes:
        cells: rows of the table: sets of heads that are edited, with each metric.
        chunks: files that are written.
        examples: edited examples, over all sets; metrics share them.
        passes: the same in whole passes: a cell whose first head is in layer l of n counts
            (n - l) / n an example; each chunk adds its clean run.
        seconds: on this machine, one process; extrapolated by passes from ``timed``.
        timed: what was measured to tell.
    """

    cells: int
    chunks: int
    examples: int
    passes: float
    seconds: float
    timed: str


def estimate(config: SweepConfig, plan: Plan, benches: Benches) -> Estimate:
    """Count, and time one cell of the model at hand (the last one planned)."""
    chunk = plan.chunks[-1]
    study = plan.studies[chunk.study]
    edited = [cell for cell in chunk.cells if cell.heads] or list(chunk.cells)
    one = replace(chunk, cells=(edited[len(edited) // 2],))
    few = replace(chunk, cells=tuple((edited * 9)[:9]))
    benches.measure(plan, one)  # reference values and proofs, once a study
    alone, several = (_seconds(benches, plan, part) for part in (one, few))
    # Eight more cells cost this much more: the clean run is in both.
    per_pass = max(several - alone, 0.05 * several) / (8 * _share(plan, one) * study.examples)
    passes = sum(passes_of(plan, part) for part in plan.chunks)
    model = plan.models[study.model].label
    return Estimate(
        cells=plan.n_cells,
        chunks=len(plan.chunks),
        examples=sum(len(part.cells) * plan.studies[part.study].examples for part in plan.chunks),
        passes=passes,
        seconds=passes * per_pass,
        timed=f"one cell of {model} ({study.edit.label} of {one.cells[0].set!r} on "
        f"{study.examples} examples of {study.probe!r}), measured: "
        f"{1000 * per_pass * _share(plan, one) * study.examples:.1f} ms",
    )


def passes_of(plan: Plan, chunk: Chunk) -> float:
    """Whole passes that a chunk amounts to, one example each."""
    examples = plan.studies[chunk.study].examples
    return examples * (1 + _share(plan, chunk))


def _share(plan: Plan, chunk: Chunk) -> float:
    """Cells in units of whole passes: only layers from the first edited one on are run."""
    layers = plan.models[plan.model_of(chunk)].layers
    starts = [min(cell.heads).layer if cell.heads else layers for cell in chunk.cells]
    return sum((layers - start) / layers for start in starts) or 1.0


def _seconds(benches: Benches, plan: Plan, chunk: Chunk) -> float:
    """Shortest of three."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        benches.measure(plan, chunk)
        taken.append(time.perf_counter() - started)
    return min(taken)
