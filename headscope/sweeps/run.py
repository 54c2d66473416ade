"""Running sweeps: loaded models, planning, cost estimates, execution with retries."""

import json
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from transformers.utils import logging

from headscope import edges
from headscope.ablation.engine import RecordedBatch
from headscope.ablation.run import Measurement, Placer, facts_of, without_rounding
from headscope.base.arguments import checked
from headscope.base.files import FolderClaim, clear
from headscope.base.options import RunOptions, track
from headscope.base.specs import versions
from headscope.edges.attribute import STEPPED, check_method
from headscope.edges.faithfulness import example_values
from headscope.edges.written import EdgeMeasurement
from headscope.edits import Variant
from headscope.errors import HeadscopeError, InputError, ModelLoadError
from headscope.heads import HeadIndex
from headscope.interventions import Scale
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.probes.config import build_probe
from headscope.probes.probe import Probe, probe_digest
from headscope.sweeps.config import (
    RUNTIME_KEYS,
    EdgeConfig,
    EditConfig,
    MetricConfig,
    ModelConfig,
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
    Rankings,
    cells,
    chunked,
    edge_cells,
    key,
    metric_of,
    plan_json,
)
from headscope.sweeps.store import RowName, Store, names_of, rows_table
from headscope.table import Provenance

if TYPE_CHECKING:
    import pyarrow


@dataclass
class Bench:
    """A loaded model of a sweep with its probes and running measurements.

    Reference values and validations of the current group are kept from chunk to chunk.
    """

    config: SweepConfig
    model: HeadModel
    probes: dict[str, Probe]
    begun: tuple[CellGroup, Measurement, Placer] | None = None
    scored: Path | None = None

    @classmethod
    def of(
        cls,
        config: SweepConfig,
        wanted: ModelConfig,
        checkpoint: str | None,
        scored: Path | None = None,
    ) -> "Bench":
        """Load a model and build all probes for it."""
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model = load(
                wanted.model, revision=checkpoint, dtype=wanted.dtype, device=config.device
            )
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()
        named = (*config.probes, *config.references)
        probes = {one.label: build_probe(one.plain, model) for one in named}
        bench = cls(config, model, probes, scored=scored)
        # The engine is tried out on the first probe that a model meets: always the same one, so
        # that what is recorded of it does not depend on where a sweep was resumed.
        bench.measurement(config.probes[0].label, config.metrics[:1])
        return bench

    @cached_property
    def rankings(self) -> Rankings:
        """Rankings of this model's heads."""
        return Rankings(self.model, self.probes, self.options())

    def options(self, seed: int = 0) -> RunOptions:
        """Options of a measurement; the sweep shows its own progress bar."""
        return RunOptions(self.config.batch_size, self.config.memory, seed, progress=False)

    def measurement(
        self, probe: str, metrics: Sequence[MetricConfig], seed: int = 0
    ) -> Measurement:
        """Validated measurement of metrics on a probe with this model."""
        first, *others = map(metric_of, metrics)
        return Measurement.of(
            self.model, self.probes[probe], first, self.options(seed), others=others
        )

    def placer(self, measurement: Measurement, edit: EditConfig) -> Placer:
        """Editor for an edit on a probe; refuses what does not fit."""
        if edit.factor is not None:
            return Placer(measurement, Scale(edit.factor), positions=edit.positions)
        reference = None if edit.reference is None else self.probes[edit.reference]
        own = reference is measurement.probe
        return Placer(
            measurement,
            edit.method,
            positions=edit.positions,
            reference=None if own else reference,
        )

    def data_digest(self, probe: str, reference: str | None = None) -> str:
        """Digest of a probe, and of the reference of an edit."""
        other = None if reference is None else self.probes[reference]
        return probe_digest(self.probes[probe], other)

    def _check_data(self, study: CellGroup) -> None:
        """Refuse a probe whose file has changed since planning."""
        other = _reference(study.edit)
        if self.data_digest(study.probe, other) != study.probe_digest:
            given = repr(study.probe) + (f" with its reference {other!r}" if other else "")
            raise InputError(
                f"the probe {given} is not the one that this sweep was planned with: start it in "
                "another folder."
            )

    def measure(self, plan: Plan, chunk: Chunk) -> "pyarrow.Table":
        """Rows of one chunk: every cell with the first metric, then with the next."""
        import pyarrow

        study = plan.studies[chunk.study]
        if isinstance(study.edit, EdgeConfig):
            self._check_data(study)
            return self._measure_edges(plan.models[study.model], study, chunk, study.edit)
        if self.begun is None or self.begun[0] is not study:
            self._check_data(study)
            measurement = self.measurement(study.probe, study.metrics, study.seed)
            self.begun = study, measurement, self.placer(measurement, study.edit)
        _, measurement, placer = self.begun
        wanted = [tuple(sorted(cell.heads)) for cell in chunk.cells]
        sets = list(dict.fromkeys(wanted))  # ends of curves are alike
        number = {heads: at for at, heads in enumerate(sets)}
        where = [number[heads] for heads in wanted]

        def variants(chosen: slice, batch: RecordedBatch) -> list[Variant]:
            place = placer.place(chosen, batch)
            # Proved on heads of the study, not of the chunk: the same record in all its chunks.
            placer.prove(batch, place, study.heads)
            return [(place(heads),) if heads else () for heads in sets]

        edited, clean = measurement.measure_all(variants, len(sets), "sweep")
        facts = facts_of(study.edit.method, None, study.edit.positions)
        facts = {**facts, "reference": study.edit.reference or facts["reference"]}
        if study.edit.factor is not None:
            facts["factor"] = study.edit.factor
        labels = measurement.probe.cluster_labels
        if labels is not None:
            facts["clusters"] = list(labels)
        parts = []
        for metric, values, unedited in zip(study.metrics, edited, clean, strict=True):
            chosen = metric_of(metric)
            origin = measurement.provenance(
                study.seed, checks=placer.checks, **facts, metric=chosen.name
            )
            parts.append(
                rows_table(
                    plan.models[study.model],
                    study,
                    names_of(chunk),
                    metric.label,
                    without_rounding(values[where] - unedited, unedited),
                    unedited,
                    json.dumps(origin.to_json(), sort_keys=True),
                    chosen.unit,
                    labels,
                )
            )
        return pyarrow.concat_tables(parts).unify_dictionaries().combine_chunks()

    def _measure_edges(
        self, model: PlannedModel, study: CellGroup, chunk: Chunk, wanted: EdgeConfig
    ) -> "pyarrow.Table":
        """Rows of one chunk of edges: one per edge or circuit."""
        (metric,), (cell,) = study.metrics, chunk.cells
        probe, chosen = self.probes[study.probe], metric_of(metric)
        graph = edges.attribute(
            self.model, probe, chosen, wanted.method, wanted.steps, ablation=wanted.ablation,
            batch_size=self.config.batch_size, resume=self.scored, progress=False,
        )  # fmt: skip
        measured = EdgeMeasurement.of(self.model, probe, chosen, graph.ablation, self.options())
        batches = list(measured.batches())
        clean = example_values(batches, measured)
        about = {**graph.provenance.probe, "parallel": list(graph.wiring.parallel)}
        if cell.edges == 0:
            names = [RowName(cell.set, 0, str(edge), 1) for edge in graph.edges]
            effects = graph.per_example.astype(np.float64)
        else:
            assert cell.edges is not None  # noqa: S101  # a circuit has a size
            circuit = edges.circuit(
                self.model, probe, chosen, graph, cell.edges, batch_size=self.config.batch_size
            )
            names = [RowName(cell.set, 0, ", ".join(map(str, circuit.edges)), len(circuit.edges))]
            effects = (example_values(batches, measured, circuit.kept) - clean)[None]
            assert circuit.checks is not None  # noqa: S101  # edges.circuit makes them
            about |= {"empty": circuit.empty, "checks": circuit.checks.to_json()}
        if probe.cluster_labels is not None:
            about["clusters"] = list(probe.cluster_labels)
        origin = replace(graph.provenance, probe=about).to_json()
        return rows_table(
            model, study, names, metric.label, effects, clean,
            json.dumps(origin, sort_keys=True), chosen.unit, probe.cluster_labels,
        )  # fmt: skip


def _reference(edit: EditConfig | EdgeConfig) -> str | None:
    """Name of the reference probe of an edit."""
    return edit.reference if isinstance(edit, EditConfig) else None


class Benches:
    """Cache of the model in use; loading another one replaces it."""

    def __init__(self, config: SweepConfig, scored: Path | None = None) -> None:
        """Start empty.

        Args:
            config: config of the sweep.
            scored: folder for finished batches of edge scores; None: none.
        """
        self._config, self._scored = config, scored
        self._held: tuple[int, str | None] | None = None
        self._bench: Bench | None = None
        self._checked: PlannedModel | None = None

    def of(self, entry: int, checkpoint: str | None) -> Bench:
        """The bench of a model of the config, loaded if necessary."""
        if self._bench is None or self._held != (entry, checkpoint):
            self.drop()  # the last model goes before the next one comes
            wanted = self._config.models[entry]
            self._bench = Bench.of(self._config, wanted, checkpoint, self._scored)
            self._held = (entry, checkpoint)
        return self._bench

    def drop(self) -> None:
        """Release the model."""
        self._bench = self._held = self._checked = None

    def measure(self, plan: Plan, chunk: Chunk) -> "pyarrow.Table":
        """Measure any chunk of a plan.

        Raises:
            InputError: if a model's weights have changed since planning.
        """
        planned = plan.models[plan.model_of(chunk)]
        bench = self.of(planned.entry, planned.checkpoint)
        if self._checked != planned:
            digest = bench.model.digest()
            if digest != planned.digest:
                raise InputError(
                    f"the weights of {planned.label} are not those that this sweep was planned "
                    f"with (digest {digest[:12]}, not {planned.digest[:12]}): start it in another "
                    "folder."
                )
            self._checked = planned
        return bench.measure(plan, chunk)


# Edits that draw: the others give the same with every seed, and are run once, as seed 0.
_DRAWS = {"resample"}


@checked
def make_plan(
    config: SweepConfig, *, benches: Benches | None = None, progress: bool | None = None
) -> Plan:
    """Plan a sweep, validating everything before it starts.

    Args:
        config: the sweep.
        benches: keeps the last model loaded for later use.
        progress: show a progress bar over the models. Default: only in a terminal or notebook.

    Raises:
        InputError: if a probe, edit, metric or set does not fit a model.
        ModelLoadError: if a model cannot be loaded.

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
            number = len(models) - 1
            for study, chosen in _groups(config, bench, number) if config.edits else ():
                chunks += chunked(models, study, len(studies), chosen, config.chunk)
                studies.append(study)
            for group, each in _edge_groups(config, bench, number):
                chunks += chunked(models, group, len(studies), each, 1)
                studies.append(group)
            advance(1)
    return Plan(config.name, tuple(models), tuple(studies), tuple(chunks))


def _groups(
    config: SweepConfig, bench: Bench, model: int
) -> Iterator[tuple[CellGroup, list[Cell]]]:
    """Groups of one model with their cells; metrics share common cells."""
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


def _edge_groups(
    config: SweepConfig, bench: Bench, model: int
) -> Iterator[tuple[CellGroup, tuple[Cell, ...]]]:
    """Groups of one model for edges: one per probe, metric and method."""
    for probe in config.probes:
        for metric in config.metrics:
            for wanted in config.edges:
                chosen = metric_of(metric)
                check_method(wanted.method, wanted.steps, chosen)
                wiring = EdgeMeasurement.of(
                    bench.model, bench.probes[probe.label], chosen, wanted.ablation, bench.options()
                ).wiring
                largest = max(wanted.circuits, default=1)
                if largest >= len(wiring):
                    raise InputError(
                        f"a circuit of {largest:,} edges is asked for, and {bench.model.name} has "
                        f"{len(wiring):,} in all."
                    )
                group = _study(bench, model, probe, wanted, (metric,), 0, ())
                yield replace(group, n_edges=len(wiring)), edge_cells(wanted)


def _study(
    bench: Bench,
    model: int,
    probe: NamedProbe,
    edit: EditConfig | EdgeConfig,
    metrics: tuple[MetricConfig, ...],
    seed: int,
    named: tuple[HeadIndex, ...],
) -> CellGroup:
    return CellGroup(
        model=model,
        probe=probe.label,
        probe_digest=bench.data_digest(probe.label, _reference(edit)),
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
    """Manifest of a sweep, written before it starts; contains no local paths."""
    return {
        "format": FORMAT,
        "name": config.name,
        "digest": config_digest(config),
        "config": portable_config(config),
        "versions": versions(),
        "plan": plan_json(plan),
    }


def config_digest(config: SweepConfig) -> str:
    """Digest of what a sweep computes, ignoring settings of how it is run."""
    said = portable_config(config)
    return key({name: value for name, value in said.items() if name not in RUNTIME_KEYS})


def portable_config(config: SweepConfig) -> Mapping[str, Any]:
    """Config as JSON values, with absolute paths cut to their last part."""
    return Provenance(probe=config.model_dump(mode="json", exclude_none=True)).probe


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a plan.

    Attributes:
        cells: number of rows: sets of heads with each metric.
        chunks: number of files.
        examples: number of edited examples over all sets; metrics share them.
        passes: the same in whole passes: a cell whose first head is in layer l of n counts (n - l)
            / n per example; each chunk adds its clean run.
        seconds: time on this machine in one process, extrapolated by passes from ``timed``.
        timed: what was measured for that.
        device: device of the measurement: the GPU's name, or a process on the CPU.
    """

    cells: int
    chunks: int
    examples: int
    passes: float
    seconds: float
    timed: str
    device: str


def estimate(config: SweepConfig, plan: Plan, benches: Benches) -> Estimate:
    """Estimate the cost, timing one cell of the loaded model (the last one planned)."""
    last = plan.models[-1]
    chunk = next(
        (one for one in reversed(plan.chunks) if plan.studies[one.study].heads), plan.chunks[-1]
    )
    study = plan.studies[chunk.study]
    if not study.heads:
        return _estimate_of_edges(plan, benches.of(last.entry, last.checkpoint))
    edited = [cell for cell in chunk.cells if cell.heads] or list(chunk.cells)
    one = replace(chunk, cells=(edited[len(edited) // 2],))
    few = replace(chunk, cells=tuple((edited * 9)[:9]))
    benches.measure(plan, one)  # reference values and proofs, once a study
    alone, several = (_seconds(benches, plan, part) for part in (one, few))
    # Eight more cells cost this much more: the clean run is in both.
    per_pass = max(several - alone, 0.05 * several) / (8 * _share(plan, one) * study.examples)
    passes = sum(passes_of_chunk(plan, part) for part in plan.chunks)
    planned = plan.models[study.model]
    return Estimate(
        cells=plan.n_cells,
        chunks=len(plan.chunks),
        examples=sum(len(part.cells) * plan.studies[part.study].examples for part in plan.chunks),
        passes=passes,
        seconds=passes * per_pass,
        timed=f"one cell of {planned.label} ({study.edit.label} of {one.cells[0].set!r} on "
        f"{study.examples} examples of {study.probe!r}), measured: "
        f"{1000 * per_pass * _share(plan, one) * study.examples:.1f} ms",
        device=_timed_on(benches.of(planned.entry, planned.checkpoint).model.device),
    )


def _estimate_of_edges(plan: Plan, bench: Bench) -> Estimate:
    """Estimate the cost of a sweep with edges only, from one clean run."""
    name, probe = next(iter(bench.probes.items()))
    bench.model.run(probe)
    started = time.perf_counter()
    bench.model.run(probe)
    taken = time.perf_counter() - started
    passes = sum(passes_of_chunk(plan, part) for part in plan.chunks)
    return Estimate(
        cells=plan.n_cells,
        chunks=len(plan.chunks),
        examples=sum(plan.studies[part.study].examples for part in plan.chunks),
        passes=passes,
        seconds=passes * taken / len(probe),
        timed=f"one clean run of {plan.models[-1].label} on {name!r}: {1000 * taken:.1f} ms",
        device=_timed_on(bench.model.device),
    )


def _timed_on(device: torch.device) -> str:
    name: str = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return name or f"process on the {device.type.upper()}"


def passes_of_chunk(plan: Plan, chunk: Chunk) -> float:
    """Number of whole passes of a chunk, per example.

    For edges a gradient counts as three passes, exact patching as a pass per edge, and a circuit
    with its checks as eight runs of three passes each.
    """
    study = plan.studies[chunk.study]
    if isinstance(study.edit, EdgeConfig):
        return study.examples * _edge_passes(plan, study, study.edit, chunk)
    return study.examples * (1 + _share(plan, chunk))


_CIRCUIT_RUNS, _CIRCUIT_PASSES = 8.0, 3.0


def _edge_passes(plan: Plan, study: CellGroup, wanted: EdgeConfig, chunk: Chunk) -> float:
    if chunk.cells[0].edges:
        return _CIRCUIT_RUNS * _CIRCUIT_PASSES
    layers = plan.models[study.model].layers
    steps = wanted.steps if wanted.method in STEPPED else 1
    groups = 2 * layers + 1 if wanted.method == "eap_ig_activations" else 1
    return 2.0 + (study.n_edges if wanted.method == "exact" else 3.0 * groups * steps)


def _share(plan: Plan, chunk: Chunk) -> float:
    """Cost of cells in whole passes: only layers from the first edited one on are run."""
    layers = plan.models[plan.model_of(chunk)].layers
    starts = [min(cell.heads).layer if cell.heads else layers for cell in chunk.cells]
    return sum((layers - start) / layers for start in starts) or 1.0


def _seconds(benches: Benches, plan: Plan, chunk: Chunk) -> float:
    """Shortest of three timings."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        benches.measure(plan, chunk)
        taken.append(time.perf_counter() - started)
    return min(taken)


ATTEMPTS = 3
OnFinished = Callable[[Chunk], None]


@dataclass(frozen=True)
class Work:
    """A sweep that is ready to run its chunks."""

    config: SweepConfig
    plan: Plan
    store: Store
    benches: Benches


@dataclass
class Stop:
    """Flag that a stop was requested after the current chunk."""

    asked: bool = False


@runtime_checkable
class Executor(Protocol):
    """Interface of executors, which run and commit the chunks of a sweep.

    An executor may also have a method ``check()``, which is called before any model is loaded.
    """

    def __call__(
        self, work: Work, chunks: Sequence[Chunk], stop: Stop, finished: OnFinished
    ) -> None:
        """Run chunks until all are done or a stop is requested; report each finished one."""


def run_chunk(work: Work, chunk: Chunk) -> None:
    """Measure and commit one chunk, or record why it failed for good.

    Transient errors (memory, disks, networks, devices) are tried three times with pauses;
    deterministic errors once.

    Raises:
        InputError: if a model has changed since planning, so that none of its chunks can run.
        ModelLoadError: if it is missing.
    """
    reasons: list[str] = []
    said = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * attempt)
        if work.store.has(chunk.id):  # another process was faster
            return
        try:
            work.store.commit(chunk.id, work.benches.measure(work.plan, chunk))
            return
        except (InputError, ModelLoadError):
            raise
        except Exception as error:  # whatever it is, the other chunks go on
            reasons.append(reason(error))
            said = told(error)
            if not may_pass(error):
                break
    work.store.fail(chunk.id, reasons, said)


def may_pass(error: BaseException) -> bool:
    """Whether an error is transient: caused by the machine, not by the request."""
    named = type(error).__name__
    out_of_memory = isinstance(error, MemoryError) or "OutOfMemory" in named
    device = named == "AcceleratorError" or (
        isinstance(error, RuntimeError)
        and any(word in str(error).lower() for word in ("out of memory", "cuda error", "nccl"))
    )
    return out_of_memory or device or isinstance(error, OSError)


def told(error: BaseException) -> str:
    """Traceback of an error, with file paths cut to the package."""
    return _FOLDERS.sub(r"\1", "".join(traceback.format_exception(error)))


# The folders before the package of a source file, and those of any other absolute path.
_FOLDERS = re.compile(
    r"(?:/|[A-Za-z]:[\\/])(?:[^\s\"'<>:*?|]+?[\\/])??((?:site-packages|headscope)[\\/]"
    r"[^\s\"']+|[^\s\"'/\\]+(?=[\"'\s,;:.)]|$))"
)
_PAUSE = 0.5  # seconds


def reason(error: BaseException) -> str:
    """Error in one line."""
    said = _FOLDERS.sub(r"\1", " ".join(str(error).split())) or "no message"
    return said if isinstance(error, HeadscopeError) else f"{type(error).__name__}: {said}"


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Attributes:
        total: number of chunks of the sweep, or of this shard.
        done: finished chunks.
        failed: failed chunks with reasons.
        stopped: whether a stop was requested.
        compacted: whether the table is written.
    """

    store: Store
    total: int
    done: int
    failed: Mapping[str, str]
    stopped: bool
    compacted: bool


def inline(work: Work, chunks: Sequence[Chunk], stop: Stop, finished: OnFinished) -> None:
    """Run chunks one after the other in this process."""
    for chunk in chunks:
        if stop.asked:
            return
        run_chunk(work, chunk)
        finished(chunk)


@checked
def run_sweep(
    config: SweepConfig,
    out: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    executor: Executor = inline,
    progress: bool | None = None,
    overwrite: bool = False,
    catch_signals: bool = False,
) -> Outcome:
    """Run a sweep into a folder, or resume it.

    Finished chunks are kept: run it again to resume, even after a kill. Failed chunks are tried
    again. An interrupt (Ctrl-C, or SIGTERM) lets the current chunk finish; a second one stops at
    once; neither loses a finished chunk.

    Args:
        config: the sweep; see :func:`headscope.sweeps.read_config`.
        out: the folder; several processes may share it.
        shard: ``(i, n)`` runs part i of n, from 1.
        executor: where the chunks run; default: in this process.
        progress: show progress bars. Default: only in a terminal or notebook, after 2 s.
        catch_signals: return normally after a signal, with ``stopped`` in the outcome, as the
            command line does. By default the signal is passed on to your program once the current
            chunk is saved: ``KeyboardInterrupt`` after Ctrl-C, the end of the process or your own
            handler after SIGTERM.
        overwrite: replace the files of another run in the folder; the same sweep is resumed.

    Raises:
        InputError: if the config does not fit a model, or the folder holds another run.

    Example:
        >>> import tempfile
        >>> import headscope as hs
        >>> config = hs.sweeps.SweepConfig(
        ...     name="small",
        ...     models=["tiny-gpt2"],
        ...     probes=[{"kind": "repeated_tokens", "length": 5, "batch": 2}],
        ...     edits=["zero"],
        ...     metrics=["loss"],
        ... )
        >>> with tempfile.TemporaryDirectory() as out:
        ...     outcome = hs.sweeps.run_sweep(config, out)
        ...     scores = hs.sweeps.read(out).scores()
        ...     hs.sweeps.status(out).cells_done, scores.mean.shape
        ...     hs.sweeps.export(out, "csv").name
        (12, (3, 4))
        'export.csv'
    """
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"there is no shard {shard[0]}/{shard[1]}: they count from 1.")
    if (check := getattr(executor, "check", None)) is not None:
        check()
    _claim(config, Path(out), overwrite=overwrite)
    store = Store.create(Path(out))
    benches = Benches(config, store.scored)
    plan = begun(config, store, benches, progress=progress)
    work = Work(config, plan, store, benches)
    mine = plan.shard(*shard)
    done = store.done()
    pending = [chunk for chunk in mine if chunk.id not in done]
    cells = sum(map(plan.count, pending))
    with (
        _stoppable(catch_signals) as stop,
        track(cells, f"sweeping {plan.name}", show=progress) as advance,
    ):
        if pending:
            executor(work, pending, stop, lambda one: advance(plan.count(one)))
    return outcome(store, plan, mine, stopped=stop.asked)


def _claim(config: SweepConfig, out: Path, *, overwrite: bool) -> None:
    """Refuse a folder with another run, or delete that run's files.

    Raises:
        InputError: if it holds another run that may not be replaced.
    """
    FolderClaim.create(out, "sweep", overwrite=overwrite)
    store = Store(out)
    if not overwrite:
        return
    try:
        same = store.manifest().get("digest") == config_digest(config)
    except InputError:
        same = False
    if not same:
        clear(out)


def begun(
    config: SweepConfig, store: Store, benches: Benches, *, progress: bool | None = None
) -> Plan:
    """Load the plan from the folder, or make and write it on the first run.

    Raises:
        InputError: if the folder holds another sweep.
    """
    if not store.manifest_file.exists():
        planned = make_plan(config, benches=benches, progress=progress)
        store.begin(manifest(config, planned))
    found = store.manifest()
    if found.get("digest") != config_digest(config):
        raise InputError(
            f"{store.path} holds a sweep with another config ({_difference(found, config)}): "
            "choose another folder, or replace it with overwrite=True (--overwrite)."
        )
    return store.plan()


def outcome(store: Store, plan: Plan, mine: Sequence[Chunk], *, stopped: bool = False) -> Outcome:
    """Outcome so far; compacts the table if all chunks are finished."""
    compacted = store.compact(plan)
    done, failed = store.done(), store.failed()
    ids = {chunk.id for chunk in mine}
    return Outcome(
        store=store,
        total=len(mine),
        done=len(ids & done),
        failed={chunk: why for chunk, why in failed.items() if chunk in ids},
        stopped=stopped and not ids <= done | failed.keys(),
        compacted=compacted,
    )


@contextmanager
def _stoppable(catch: bool) -> Iterator[Stop]:
    """Context manager: the first interrupt requests a stop, the second one stops.

    Unless caught, the signal is sent again at the end, to its previous handler.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    got: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        got.append(number)

    before = {one: signal.signal(one, on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if got and not catch:
        signal.raise_signal(got[0])


def _difference(found: Mapping[str, Any], config: SweepConfig) -> str:
    """Keys in which two configs differ."""
    there, here = found.get("config", {}), portable_config(config)
    names = sorted({*there, *here})
    return "differs in: " + ", ".join(n for n in names if there.get(n) != here.get(n))
