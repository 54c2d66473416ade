"""What every causal measurement shares: read the arguments, run batches, say where it came from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope import capture
from headscope.ablation.arguments import Maker, Metricish, Positions, intervention_of, marked
from headscope.ablation.checks import proofs
from headscope.ablation.engine import Batch, stack_tokens
from headscope.ablation.kept import KeptEffects
from headscope.ablation.sources import Plan, plan_for
from headscope.edits import AnyEdit, HeadEdit, Heads, Variant
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.interventions import Place, Setting
from headscope.interventions.base import BatchPlace
from headscope.memory import parse_memory
from headscope.metrics import AnyMetric, as_metric
from headscope.models.protocol import HeadModel
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.progress import Advance, track
from headscope.table import Provenance

# Tokens of one recorded batch on a GPU; on a CPU a batch is one stack.
_GPU_BATCH = 8192


@dataclass(frozen=True, eq=False)
class Study:
    """A model, a probe and a metric, ready for any number of variants.

    Attributes:
        others: more metrics, measured on the same passes.
        limit: tokens per stack.
        size: examples per batch.
    """

    model: HeadModel
    probe: Probe
    metric: AnyMetric
    plan: Plan
    limit: int
    size: int
    progress: bool | None
    others: tuple[AnyMetric, ...] = ()

    @classmethod
    def of(
        cls,
        model: HeadModel,
        probe: Probe,
        metric: Metricish,
        *,
        others: Sequence[Metricish] = (),
        batch_size: int | None = None,
        memory: str | int | None = None,
        progress: bool | None = None,
    ) -> "Study":
        """Check everything that can be checked before the first pass, and choose the engine."""
        chosen, *more = map(as_metric, (metric, *others))
        answers = any("target" in one.needs for one in (chosen, *more))
        capture.check_fits(model, probe, answers=answers)
        for one in (chosen, *more):
            one.reads(probe)
        limit = stack_tokens(model, parse_memory(memory))
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size={batch_size} leaves nothing to run: give 1 or more.")
        room = limit if model.device.type == "cpu" else min(limit, _GPU_BATCH)
        size = batch_size or max(1, room // probe.length)
        plan = plan_for(model, probe.tokens, probe.real)
        size = min(size, len(probe))
        return cls(model, probe, chosen, plan, limit, size, progress, tuple(more))

    def batches(self) -> Iterator[tuple[slice, Batch]]:
        """Batches of the probe, each run once cleanly."""
        # Of the whole probe: what is read of an example does not depend on who is beside it.
        reads = [(one, one.reads(self.probe)) for one in (self.metric, *self.others)]
        for start in range(0, len(self.probe), self.size):
            chosen = slice(start, min(start + self.size, len(self.probe)))
            part = self.probe.examples(chosen)
            own = [(one, read[chosen]) for one, read in reads]
            yield chosen, Batch.of(self.model, self.plan, part, own, self.limit)

    def measure(
        self,
        variants: Callable[[slice, Batch], Sequence[Variant]],
        count: int,
        what: str,
        kept: KeptEffects | None = None,
    ) -> tuple[Float[np.ndarray, "variant example"], Float[np.ndarray, " example"]]:
        """The metric of every variant on every example, and on the clean run.

        Args:
            variants: of one batch; ``count`` of them.
            count: how many there are, for the progress bar.
            what: is being done, for the progress bar.
            kept: variants of an earlier call, which are not run again, and where those that are
                finished go; None: nowhere.
        """
        edited, clean = self.measure_all(variants, count, what, kept)
        return edited[0], clean[0]

    def measure_all(
        self,
        variants: Callable[[slice, Batch], Sequence[Variant]],
        count: int,
        what: str,
        kept: KeptEffects | None = None,
    ) -> tuple[Float[np.ndarray, "metric variant example"], Float[np.ndarray, "metric example"]]:
        """What :meth:`measure` gives, of the metric and all others; each variant is run once."""
        edited, clean = [], []
        total = float(count * len(self.probe))
        with track(total, what, show=self.progress) as advance:
            for chosen, batch in self.batches():
                made = variants(chosen, batch)
                if kept is None:
                    edited.append(batch.all_values(made, advance))
                else:
                    edited.append(_with_kept(batch, chosen, made, advance, kept))
                clean.append(batch.all_clean)
        return torch.cat(edited, 2).numpy(), torch.cat(clean, 1).numpy()

    def provenance(self, seed: int | None = None, **facts: Any) -> Provenance:
        """Where the result came from; ``facts`` join those of the probe, ``checks`` apart."""
        return origin(
            self.model,
            self.probe,
            seed=seed,
            attention="suffix replay" if self.plan.replays else "whole passes",
            **{"metric": self.metric.name, **facts},
        )


def _with_kept(
    batch: Batch, chosen: slice, variants: Sequence[Variant], advance: Advance, kept: KeptEffects
) -> Float[Tensor, "1 variant batch"]:
    """Values of a batch's variants, of which only those run that are not finished."""
    kept.prove(chosen, lambda number: batch.values([variants[number]]))
    left = kept.left(chosen)
    advance(float((len(variants) - len(left)) * len(batch.probe)))
    batch.all_values(
        [variants[number] for number in left],
        advance,
        lambda index, values: kept.keep(chosen, [left[i] for i in index], values[0]),
    )
    return torch.from_numpy(kept.values(chosen))[None]


class Placer:
    """How one call edits heads, batch by batch, with its proofs taken on the first batch."""

    def __init__(
        self,
        study: Study,
        method: Maker,
        *,
        positions: Positions = None,
        reference: Probe | None = None,
        seed: int = 0,
    ) -> None:
        self._study, self._maker = study, method
        self.checks: dict[str, Any] = {}
        where = marked(study.probe, positions)
        self._batch: BatchPlace | None = None
        intervention = intervention_of(method, reference, seed)
        if intervention is not None:
            read = intervention.reference_for(study.probe)
            if read is not None:
                capture.check_fits(study.model, read)
            setting = Setting(study.model, study.probe, where, study.size)
            self._batch = intervention.prepare(setting)
        elif where is not None:
            raise InputError(
                "positions= applies to interventions and their names: set it in your edit function."
            )

    @property
    def method(self) -> Maker:
        """What heads are ablated to: a name, or a function from heads to an edit."""
        return self._maker

    def place(self, chosen: slice, batch: Batch) -> Place:
        """How to edit any heads of one batch."""
        if self._batch is not None:
            return self._batch(chosen, batch.source.z)
        maker = self._maker
        assert callable(maker)  # noqa: S101  # a name has a method

        def own(heads: Heads) -> AnyEdit:
            edit = maker(heads)
            return edit.cut(chosen) if isinstance(edit, HeadEdit) else edit

        return own

    def prove(self, batch: Batch, place: Place, heads: Sequence[HeadIndex]) -> None:
        """Take the proofs, once."""
        if not self.checks:
            study = self._study
            self.checks = proofs(study.model, study.plan, batch, place, heads)
