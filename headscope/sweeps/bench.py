"""One loaded model with its probes and studies, ready to measure any chunk of a sweep."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from transformers.utils import logging

from headscope.ablation.engine import RecordedBatch
from headscope.ablation.run import Measurement, Placer, facts_of, without_rounding
from headscope.base.options import RunOptions
from headscope.edits import Variant
from headscope.errors import InputError
from headscope.interventions import Scale
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.probes.config import build_probe
from headscope.probes.probe import Probe, probe_digest
from headscope.sweeps.config import EditConfig, MetricConfig, ModelConfig, SweepConfig
from headscope.sweeps.plan import CellGroup, Chunk, Plan, PlannedModel, Rankings, metric_of
from headscope.sweeps.store import rows_table

if TYPE_CHECKING:
    import pyarrow


@dataclass
class Bench:
    """A model of a sweep, its probes, and the studies that were begun on it.

    The reference values and proofs of the study at hand are kept from chunk to chunk.
    """

    config: SweepConfig
    model: HeadModel
    probes: dict[str, Probe]
    begun: tuple[CellGroup, Measurement, Placer] | None = None

    @classmethod
    def of(cls, config: SweepConfig, wanted: ModelConfig, checkpoint: str | None) -> "Bench":
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
        bench = cls(config, model, probes)
        # The engine is tried out on the first probe that a model meets: always the same one, so
        # that what is recorded of it does not depend on where a sweep was resumed.
        bench.measurement(config.probes[0].label, config.metrics[:1])
        return bench

    @cached_property
    def rankings(self) -> Rankings:
        """What heads of this model are ranked by."""
        return Rankings(self.model, self.probes, self.options())

    def options(self, seed: int = 0) -> RunOptions:
        """How a measurement of the sweep is run; the sweep shows the bar."""
        return RunOptions(self.config.batch_size, self.config.memory, seed, progress=False)

    def measurement(
        self, probe: str, metrics: Sequence[MetricConfig], seed: int = 0
    ) -> Measurement:
        """A probe and metrics on this model; everything that can be checked is."""
        first, *others = map(metric_of, metrics)
        return Measurement.of(
            self.model, self.probes[probe], first, self.options(seed), others=others
        )

    def placer(self, measurement: Measurement, edit: EditConfig) -> Placer:
        """How an edit is done on a probe; what does not fit is refused."""
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

    def data_digest(self, probe: str, edit: EditConfig) -> str:
        """Digest of a probe, and of what an edit takes values from."""
        other = None if edit.reference is None else self.probes[edit.reference]
        return probe_digest(self.probes[probe], other)

    def _check_data(self, study: CellGroup) -> None:
        """Refuse a probe that was read from a file which changed since."""
        if self.data_digest(study.probe, study.edit) != study.probe_digest:
            other = study.edit.reference
            given = repr(study.probe) + (f" with its reference {other!r}" if other else "")
            raise InputError(
                f"the probe {given} is not the one that this sweep was planned with: start it in "
                "another folder."
            )

    def measure(self, plan: Plan, chunk: Chunk) -> "pyarrow.Table":
        """Rows of one chunk: every cell with the first metric, then with the next."""
        import pyarrow

        study = plan.studies[chunk.study]
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
                    chunk,
                    metric.label,
                    without_rounding(values[where] - unedited, unedited),
                    unedited,
                    json.dumps(origin.to_json(), sort_keys=True),
                    chosen.unit,
                    labels,
                )
            )
        return pyarrow.concat_tables(parts).unify_dictionaries().combine_chunks()


class Benches:
    """The bench of the model in use; another one's takes its place."""

    def __init__(self, config: SweepConfig) -> None:
        """Load nothing yet."""
        self._config = config
        self._held: tuple[int, str | None] | None = None
        self._bench: Bench | None = None
        self._checked: PlannedModel | None = None

    def of(self, entry: int, checkpoint: str | None) -> Bench:
        """The bench of a model of the config: the one in use, or a new one."""
        if self._bench is None or self._held != (entry, checkpoint):
            self.drop()  # the last model goes before the next one comes
            self._bench = Bench.of(self._config, self._config.models[entry], checkpoint)
            self._held = (entry, checkpoint)
        return self._bench

    def drop(self) -> None:
        """Let go of the model."""
        self._bench = self._held = self._checked = None

    def measure(self, plan: Plan, chunk: Chunk) -> "pyarrow.Table":
        """Rows of any chunk of a plan.

        Raises:
            InputError: if a model's weights are not those that the sweep was planned with.
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
