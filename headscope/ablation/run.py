"""Shared parts of causal measurements: arguments, batches, checkpoints, provenance.

Values of ablated heads can be stored on disk as they are finished.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope import capture
from headscope.ablation.engine import Engine, RecordedBatch, engine_for, proofs, stack_tokens
from headscope.base.files import check_same, whole_file, writable_folder
from headscope.base.options import Advance, RunOptions
from headscope.edits import AnyEdit, HeadEdit, Heads, Variant, head_list
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.interventions import BatchPlace, Intervention, Place, Setting, named
from headscope.metrics import AnyMetric, EmbeddingMetric, Metric, as_metric
from headscope.models.protocol import HeadModel, embedding_of, need_model
from headscope.origin import origin
from headscope.probes.probe import Probe, probe_digest
from headscope.table import Provenance

Metricish = AnyMetric | Callable[..., Tensor]
Positions = str | Bool[Tensor, "batch pos"] | None
# What heads are ablated to: a value, its name, or a function from heads to an edit.
InterventionLike = str | Intervention | Callable[[Heads], AnyEdit]


def intervention_of(
    method: InterventionLike, reference: Probe | None = None, seed: int = 0, kind: str = "method"
) -> Intervention | None:
    """Resolve a method to an intervention; None for a user's edit function.

    Raises:
        InputError: if the name is unknown, or the method would ignore the reference.
    """
    if isinstance(method, str):
        return named(method, reference, seed, kind)
    if reference is not None:
        raise InputError(
            f"reference= goes with the name of a {kind}: give it to the intervention itself, e.g. "
            "hs.interventions.Mean(reference=other), or set it in your edit function."
        )
    if isinstance(method, Intervention):
        return method
    if isinstance(method, type) or not callable(method):
        made = f"{method.__name__}()" if isinstance(method, type) else "hs.interventions.Zero()"
        raise InputError(
            f"{kind}={method!r}: give the name of a {kind}, an intervention as {made}, or a "
            "function from heads to an edit."
        )
    return None


def marked(probe: Probe, positions: Positions) -> Bool[Tensor, "batch pos"] | None:
    """Resolve positions given by mark or as a mask.

    Raises:
        InputError: if the probe has no such mark, or the shape is wrong.
    """
    where = probe.mark(positions) if isinstance(positions, str) else positions
    if not isinstance(where, Tensor | None):
        raise InputError(
            f"positions={where!r}: give the name of a mark, or True and False in the shape of the "
            f"tokens {tuple(probe.tokens.shape)}."
        )
    if where is not None and where.shape != probe.tokens.shape:
        raise InputError(
            f"positions have shape {tuple(where.shape)}, but the probe has shape "
            f"{tuple(probe.tokens.shape)}."
        )
    if where is not None and not bool(where.any()):
        raise InputError("there are no positions to edit: the mark is empty.")
    return None if where is None else where.bool()


def present(model: HeadModel, heads: Heads | None) -> tuple[HeadIndex, ...]:
    """The requested heads; default: all.

    Raises:
        InputError: if the model lacks a head, or none was named.
    """
    need_model(model)
    if heads is None:
        return model.shape.heads
    chosen = tuple(model.shape.check(head) for head in head_list(heads))
    if not chosen:
        raise InputError("no heads given: name at least one, or leave them out for all.")
    return chosen


def by_head(
    model: HeadModel, heads: Sequence[HeadIndex], values: Float[np.ndarray, "variant example"]
) -> Float[np.ndarray, "layer head example"]:
    """Scatter values of some heads into ``[layer head]``; NaN for the others."""
    shape = (model.shape.n_layers, model.shape.n_heads, values.shape[1])
    placed = np.full(shape, np.nan)
    for head, row in zip(heads, values, strict=True):
        placed[head.layer, head.head] = row
    return placed


def without_rounding(
    effects: Float[np.ndarray, "variant example"], clean: Float[np.ndarray, " example"]
) -> Float[np.ndarray, "variant example"]:
    """Set effects below fp32 rounding (a millionth of the clean metric) to 0."""
    known = np.abs(clean[np.isfinite(clean)])
    floor = 1e-6 * float(known.max()) if known.size else 0.0
    return np.where(np.abs(effects) <= floor, 0.0, effects)


def seed_of(method: InterventionLike, seed: int) -> int:
    """Seed of the random draws: the intervention's own, or the call's for a named method."""
    return int(getattr(method, "seed", seed))


def facts_of(
    method: InterventionLike, reference: Probe | None, positions: Positions
) -> Mapping[str, Any]:
    """Settings of the measurement, for provenance."""
    where = positions if isinstance(positions, str) else "given" if positions is not None else "all"
    other = "own" if reference is None else reference.name
    facts: dict[str, Any] = {"method": method, "reference": other, "positions": where}
    if isinstance(method, Intervention):
        given = getattr(method, "reference", None)
        named_reference = {} if given is None else {"reference": given.name}
        own = {name: value for name, value in method.facts.items() if name != "seed"}
        return {**facts, **own, **named_reference}
    if not isinstance(method, str):
        facts["method"] = getattr(method, "__name__", "edit")
    return facts


# Tolerance for re-measuring a finished head, relative to its size.
_AGREEMENT = 1e-4
_HALF_AGREEMENT = 5e-2


class KeptEffects:
    """Checkpoint of the metric with each head ablated: one value per head and example.

    The file also keeps the heads of earlier calls with the same facts.

    Args:
        file: safetensors file, rewritten atomically whenever heads are finished.
        facts: JSON values that determine the numbers; a file with other facts is refused.
        heads: heads to measure now, in the order of the variants.
        examples: number of examples of the probe.

    Raises:
        InputError: if the file belongs to another measurement, or cannot be read or written.
    """

    def __init__(
        self, file: Path, facts: Mapping[str, Any], heads: Sequence[HeadIndex], examples: int
    ) -> None:
        writable_folder(file.parent)
        self._file, self._facts, self._asked = file, json.loads(json.dumps(facts)), len(heads)
        earlier = self._read()
        self._heads = list(dict.fromkeys([*map(str, heads), *earlier]))
        self._values = np.full((len(self._heads), examples), np.nan)
        self._finished = np.zeros(self._values.shape, dtype=np.bool_)
        for head, (values, finished) in earlier.items():
            row = self._heads.index(head)
            self._values[row], self._finished[row] = values, finished
        self._proved = False

    def left(self, chosen: slice) -> list[int]:
        """Indices of the variants that are not finished on every example of a batch."""
        finished = self._finished[: self._asked, chosen].all(1)
        return [int(number) for number in np.flatnonzero(~finished)]

    def values(self, chosen: slice) -> Float[np.ndarray, "variant example"]:
        """Values of all variants on the examples of a batch; NaN where unfinished."""
        return self._values[: self._asked, chosen]

    def keep(
        self, chosen: slice, variants: Sequence[int], values: Float[Tensor, "variant example"]
    ) -> None:
        """Store finished variants of a batch, and write the file."""
        rows = np.asarray(variants)
        self._values[rows, chosen] = values.numpy()
        self._finished[rows, chosen] = True
        self._write()

    def prove(self, chosen: slice, measure: Callable[[int], Float[Tensor, "1 example"]]) -> None:
        """Re-measure one finished variant per call, the most extreme one, to validate the file.

        The facts distinguish named methods and metrics, but not two functions of the same name, nor
        a model that runs differently on the same weights.

        Raises:
            InputError: if its values differ now.
        """
        finished = sorted(set(range(self._asked)) - set(self.left(chosen)))
        if self._proved or not finished:
            return
        self._proved = True
        values = self.values(chosen)[finished]
        distance = np.abs(np.nan_to_num(values - np.median(values, axis=0))).sum(1)
        at = finished[int(distance.argmax())]
        now, kept = measure(at)[0].numpy(), self.values(chosen)[at]
        whole = self._facts["dtype"] in ("float32", "float64")
        allowed = _AGREEMENT if whole else _HALF_AGREEMENT
        if not np.allclose(now, kept, rtol=allowed, atol=allowed, equal_nan=True):
            raise InputError(
                f"{self._file} is of another ablation (its values of {self._heads[at]} are up to "
                f"{np.nanmax(np.abs(now - kept)):.2g} from what is measured now): give another "
                "name, or delete it."
            )

    def _read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Read values and finished flags, by head; empty if there is no file."""
        from safetensors import SafetensorError, safe_open

        if not self._file.exists():
            return {}
        try:
            with safe_open(self._file, "np") as file:
                told = file.metadata() or {}
                facts, heads = dict(json.loads(told["facts"])), list(json.loads(told["heads"]))
                values, finished = file.get_tensor("values"), file.get_tensor("finished")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{self._file} is not a checkpoint of an ablation: give another name, or delete it."
            ) from error
        check_same(self._file, facts, self._facts, "ablation")
        rows = zip(values, finished.astype(np.bool_), strict=True)
        return dict(zip(heads, rows, strict=True))

    def _write(self) -> None:
        from safetensors.numpy import save

        told = {"facts": json.dumps(self._facts), "heads": json.dumps(self._heads)}
        tensors = {"values": self._values, "finished": self._finished.astype(np.uint8)}
        with whole_file(self._file) as file:
            file.write(save(tensors, told))


def deciding(
    about: Provenance,
    probe: Probe,
    reference: Probe | None,
    metric: AnyMetric,
    method: InterventionLike,
    positions: Positions,
) -> dict[str, Any]:
    """Facts that determine the value of an ablated head: weights, data, metric, method, seed."""
    where: Any = positions
    if isinstance(positions, Tensor):
        where = hashlib.sha256(positions.bool().cpu().contiguous().numpy().tobytes()).hexdigest()
    return {
        "weights": about.weight_digest,
        "dtype": about.dtype,
        "data": probe_digest(probe, getattr(method, "reference", reference)),
        "metric": metric.name,
        "mark": metric.mark if isinstance(metric, Metric) else None,
        **_said_of(method),
        "positions": where,
        "seed": seed_of(method, about.seed or 0),
    }


def _said_of(method: InterventionLike) -> dict[str, Any]:
    """Name of the method, with an intervention's parameters."""
    if isinstance(method, Intervention):
        return {**method.facts}
    return {"method": method if isinstance(method, str) else getattr(method, "__name__", "edit")}


# Tokens of a recorded batch on a GPU; on a CPU a batch is one stack.
_GPU_BATCH = 8192


def _speaking(model: HeadModel, metrics: Sequence[AnyMetric]) -> HeadModel:
    """The model, or a wrapper that returns embeddings if the metrics need those.

    Raises:
        InputError: if metrics of embeddings are mixed with metrics of logits or other poolings.
    """
    poolings = {one.pooling if isinstance(one, EmbeddingMetric) else "logits" for one in metrics}
    if len(poolings) > 1:
        names = ", ".join(one.name for one in metrics)
        raise InputError(
            f"the metrics {names} read different things (logits, or embeddings pooled in different "
            "ways), which one run does not give: measure them apart."
        )
    (pooling,) = poolings
    return model if pooling == "logits" else embedding_of(model, pooling)


@dataclass(frozen=True, eq=False)
class Measurement:
    """A model, a probe and a metric, ready for any number of variants.

    Attributes:
        others: further metrics, measured on the same passes.
        limit: tokens per stack.
        size: examples per batch.
        options: batch size, memory and progress.
    """

    model: HeadModel
    probe: Probe
    metric: AnyMetric
    engine: Engine
    limit: int
    size: int
    options: RunOptions
    others: tuple[AnyMetric, ...] = ()

    @classmethod
    def of(
        cls,
        model: HeadModel,
        probe: Probe,
        metric: Metricish,
        options: RunOptions = RunOptions(),
        *,
        others: Sequence[Metricish] = (),
    ) -> "Measurement":
        """Check the arguments before the first pass, and choose the engine."""
        chosen, *more = map(as_metric, (metric, *others))
        probe = capture.on_grid_of(model, probe)
        model = _speaking(model, (chosen, *more))
        if (reason := model.limits.get("logits")) is not None:
            raise UnsupportedModelError(f"{chosen.name} is a number of the logits: {reason}")
        answers = any("target" in one.needs for one in (chosen, *more))
        capture.check_fits(model, probe, answers=answers)
        for one in (chosen, *more):
            one.reads(probe)
        limit = stack_tokens(model, options.memory_bytes)
        room = limit if model.device.type == "cpu" else min(limit, _GPU_BATCH)
        engine = engine_for(model, probe.tokens, probe.real, probe.inputs)
        size = min(options.per_pass(probe.length, room), len(probe))
        return cls(model, probe, chosen, engine, limit, size, options, tuple(more))

    def batches(self) -> Iterator[tuple[slice, RecordedBatch]]:
        """Yield the batches of the probe, each run once cleanly."""
        # Checked on the whole probe, since what is read of an example does not depend on its batch.
        reads = [(one, one.reads(self.probe)) for one in (self.metric, *self.others)]
        for start in range(0, len(self.probe), self.size):
            chosen = slice(start, min(start + self.size, len(self.probe)))
            part = self.probe.examples(chosen)
            own = [(one, read[chosen]) for one, read in reads]
            yield chosen, RecordedBatch.of(self.model, self.engine, part, own, self.limit)

    def measure(
        self,
        variants: Callable[[slice, RecordedBatch], Sequence[Variant]],
        count: int,
        what: str,
        kept: KeptEffects | None = None,
    ) -> tuple[Float[np.ndarray, "variant example"], Float[np.ndarray, " example"]]:
        """Metric of every variant on every example, and on the clean run.

        Args:
            variants: makes the variants of one batch; ``count`` of them.
            count: number of variants, for the progress bar.
            what: label of the progress bar.
            kept: checkpoint with variants of earlier calls, which are not run again; None: none.
        """
        edited, clean = self.measure_all(variants, count, what, kept)
        return edited[0], clean[0]

    def measure_all(
        self,
        variants: Callable[[slice, RecordedBatch], Sequence[Variant]],
        count: int,
        what: str,
        kept: KeptEffects | None = None,
    ) -> tuple[Float[np.ndarray, "metric variant example"], Float[np.ndarray, "metric example"]]:
        """Like :meth:`measure`, for the metric and all others; each variant is run once."""
        edited, clean = [], []
        total = float(count * len(self.probe))
        with self.options.track(total, what) as advance:
            for chosen, batch in self.batches():
                made = variants(chosen, batch)
                if kept is None:
                    edited.append(batch.all_values(made, advance))
                else:
                    edited.append(_with_kept(batch, chosen, made, advance, kept))
                clean.append(batch.all_clean)
        return torch.cat(edited, 2).numpy(), torch.cat(clean, 1).numpy()

    def provenance(self, seed: int | None = None, **facts: Any) -> Provenance:
        """Provenance of the result; ``facts`` join the probe's, ``checks`` are stored apart."""
        return origin(
            self.model,
            self.probe,
            seed=seed,
            attention=self.engine.name,
            **{"metric": self.metric.name, **facts},
        )


def _with_kept(
    batch: RecordedBatch,
    chosen: slice,
    variants: Sequence[Variant],
    advance: Advance,
    kept: KeptEffects,
) -> Float[Tensor, "1 variant batch"]:
    """Values of a batch's variants, running only those that are not finished."""
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
    """Builds head edits batch by batch, and validates them on the first batch."""

    def __init__(
        self,
        measurement: Measurement,
        method: InterventionLike,
        *,
        positions: Positions = None,
        reference: Probe | None = None,
    ) -> None:
        self.measurement, self.method = measurement, method
        self.positions, self.reference = positions, reference
        self.checks: dict[str, Any] = {}
        probe = capture.seen_by(measurement.model, measurement.probe)
        where = marked(probe, positions)
        self._batch: BatchPlace | None = None
        intervention = intervention_of(method, reference, measurement.options.seed)
        if intervention is not None:
            read = intervention.reference_for(probe)
            if read is not None:
                capture.check_fits(measurement.model, read)
            setting = Setting(measurement.model, probe, where, measurement.size)
            self._batch = intervention.prepare(setting)
        elif where is not None:
            raise InputError(
                "positions= applies to interventions and their names: set it in your edit function."
            )

    @classmethod
    def of(
        cls,
        model: HeadModel,
        probe: Probe,
        metric: Metricish,
        method: InterventionLike,
        positions: Positions,
        reference: Probe | None,
        options: RunOptions,
    ) -> "Placer":
        """Begin a measurement of one metric, with what heads become in it."""
        measurement = Measurement.of(model, probe, metric, options)
        return cls(measurement, method, positions=positions, reference=reference)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Settings of the measurement, for provenance."""
        return facts_of(self.method, self.reference, self.positions)

    def place(self, chosen: slice, batch: RecordedBatch) -> Place:
        """Function from heads to their edit in one batch."""
        if self._batch is not None:
            return self._batch(chosen, batch.source.z)
        maker = self.method
        assert callable(maker)  # noqa: S101  # a name has a method

        def own(heads: Heads) -> AnyEdit:
            edit = maker(heads)
            return edit.cut(chosen) if isinstance(edit, HeadEdit) else edit

        return own

    def prove(self, batch: RecordedBatch, place: Place, heads: Sequence[HeadIndex]) -> None:
        """Run the checks once."""
        if not self.checks:
            measurement = self.measurement
            self.checks = proofs(measurement.model, measurement.engine, batch, place, heads)
