"""Metric values of many edited variants of one batch: stacked, read where asked, averaged.

Cheap measurements prove once a call that an ablation hit; they are recorded in the result.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.ablation.sources import Engine, ForwardSource, Source
from headscope.base.options import Advance, free_cached_memory, is_out_of_memory
from headscope.edits import Variant, cut, zero
from headscope.errors import HeadscopeError
from headscope.heads import HeadIndex
from headscope.interventions import Place
from headscope.metrics import AnyMetric, LogitRows, Metric, WholeMetric
from headscope.models.protocol import HeadModel
from headscope.models.taps import Reads, Tap, TapView
from headscope.probes.probe import Probe


@dataclass(eq=False)
class MetricReading:
    """A metric with its place among the positions whose logits are computed.

    Attributes:
        read: positions that the metric reads.
        among: positions whose logits are computed: at least those.
        inside: which of these, in order, the metric reads.
        reference: their logits in the clean run, where the metric compares with it.
    """

    probe: Probe
    metric: AnyMetric
    read: Bool[Tensor, "batch pos"]
    among: InitVar[Bool[Tensor, "batch pos"]]
    inside: Bool[Tensor, " row"] = field(init=False)
    reference: Tensor | None = None

    def __post_init__(self, among: Bool[Tensor, "batch pos"]) -> None:
        """Find its own rows, and number them."""
        self.inside = self.read[among]
        self._all = bool(self.inside.all())
        self._number = self.inside.cumsum(0) - 1

    def own(self, logits: Float[Tensor, "row d_vocab"], at: Int[Tensor, " row"]) -> Tensor:
        """Those of some rows that are the metric's.

        Args:
            logits: of positions of a run.
            at: which positions they are.
        """
        return logits if self._all else logits[self.inside[at].to(logits.device)]

    def numbers(self, logits: Float[Tensor, "row d_vocab"], at: Int[Tensor, " row"]) -> Tensor:
        """The metric of every row that is its own; of a whole run, if it is a function of that."""
        if isinstance(self.metric, WholeMetric):
            return self.metric(logits.view(*self.read.shape, -1), self.probe)
        mine = self._number[at[self.inside[at]]].to(logits.device)
        return self.metric.value(self.facts(self.own(logits, at), mine))

    def facts(
        self, logits: Float[Tensor, "row d_vocab"], number: Tensor | slice = slice(None)
    ) -> LogitRows:
        """Logits of the metric's rows with what the probe says about them.

        Args:
            logits: of some of the positions that the metric reads.
            number: which of them; default: all of one run.
        """
        probe, device = self.probe, logits.device
        return LogitRows(
            logits,
            probe.targets[self.read].to(device)[number],
            None if probe.foils is None else probe.foils[self.read].to(device)[number],
            None if self.reference is None else self.reference[number].float(),
        )

    def by_example(self, parts: Sequence[Tensor], runs: int) -> Float[Tensor, "run batch"]:
        """One number per run and example from those of its rows; NaN where it reads nothing."""
        numbers = torch.cat(list(parts)).cpu().double()
        if not isinstance(self.metric, Metric):
            return numbers.view(runs, -1)
        example = self.read.nonzero()[:, 0].cpu()
        count = torch.bincount(example, minlength=len(self.probe))
        total = numbers.new_zeros(runs, len(self.probe))
        return total.index_add(1, example, numbers.view(runs, len(example))) / count


def partner_rows(
    model: HeadModel, probe: Probe, metrics: Sequence[AnyMetric]
) -> Float[Tensor, "row d_vocab"] | None:
    """What the clean run says of the partners of all examples; None where no metric asks.

    Args:
        model: that is run.
        probe: with partners, where a metric needs them.
        metrics: that read the run.
    """
    asking = [one for one in metrics if "pair" in one.needs]
    if not asking or probe.corrupt is None:
        return None
    partner = replace(probe.corrupt, corrupt=probe)
    read = asking[0].reads(partner)
    source = ForwardSource(model, partner.tokens, partner.real, read, inputs=partner.inputs)
    rows: Tensor = source.clean()
    return rows.float()


# Tokens of one stack: on a CPU what stays near its caches, on a GPU what keeps each of its
# processors busy with four tiles of 128 rows.
CPU_STACK, _ROWS_PER_PROCESSOR = 1024, 4 * 128
# Rows whose logits are computed at once.
_ROWS = 512
# Seconds of finished stacks that wait for more, where variants are kept as they are finished.
_EVERY = 5.0

Keep = Callable[[list[int], Float[Tensor, "metric variant batch"]], None]


def stack_tokens(model: HeadModel, memory: int | None) -> int:
    """Tokens that one stack of variants may hold.

    Args:
        model: whose device decides.
        memory: bytes that a stack's activations may take; None: what the device works best with.
    """
    if memory is not None:
        width = 16 * model.shape.d_model * model.dtype.itemsize
        return max(1, memory // width)
    return gpu_stack(model.device) if model.device.type == "cuda" else CPU_STACK


@cache
def gpu_stack(device: torch.device) -> int:
    """Tokens of one stack on a GPU, asked of the device once a process.

    Told by what the device is and never by a clock: stacks of one size give the same sums, so that
    two workers on the same kind of device write the same table to the byte.
    """
    return _ROWS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass
class RecordedBatch:
    """A batch of a probe, run once cleanly and ready for variants.

    Attributes:
        metric: what :meth:`values` gives.
        read: positions whose logits are computed.
        limit: tokens per stack; halved whenever memory runs out.
        reads: each metric that shares the runs, and the positions that it reads; default: the one
            metric, at ``read``.
        partner: rows of the partners of all examples in the clean run, where a metric compares
            with them.
        all_clean: every metric on the unedited batch.
    """

    probe: Probe
    metric: AnyMetric
    source: Source
    read: Bool[Tensor, "batch pos"]
    limit: int
    reads: Sequence[tuple[AnyMetric, Bool[Tensor, "batch pos"]]] = ()
    partner: Float[Tensor, "row d_vocab"] | None = None
    readings: tuple[MetricReading, ...] = field(init=False)
    all_clean: Float[Tensor, "metric batch"] = field(init=False)

    def __post_init__(self) -> None:
        """Read the clean run."""
        reads = self.reads or [(self.metric, self.read)]
        self.readings = tuple(
            MetricReading(self.probe, one, read, self.read) for one, read in reads
        )
        rows = self.source.clean()
        for reading in self.readings:
            if "pair" in reading.metric.needs:
                reading.reference = self.partner
            if "clean" in reading.metric.needs:
                reading.reference = torch.cat(
                    [reading.own(logits, at) for logits, at in self._logits(rows, _ROWS)]
                )
        self.all_clean = self._reduced([rows])[:, 0]

    @classmethod
    def of(
        cls,
        model: HeadModel,
        engine: Engine,
        probe: Probe,
        reads: Sequence[tuple[AnyMetric, Bool[Tensor, "batch pos"]]],
        limit: int,
    ) -> "RecordedBatch":
        """Run a batch cleanly."""
        read = torch.stack([one for _, one in reads]).any(0)
        if not bool(read.any()):  # a run reads something, if only for no metric
            read[0, int(probe.last[0])] = True
        source = engine.source(model, probe.tokens, probe.real, read, probe.inputs)
        partner = partner_rows(model, probe, [one for one, _ in reads])
        return cls(probe, reads[0][0], source, read, limit, reads, partner)

    @property
    def clean(self) -> Float[Tensor, " batch"]:
        """The metric on the unedited batch."""
        return self.all_clean[0]

    def values(
        self, variants: Sequence[Variant], advance: Advance | None = None
    ) -> Float[Tensor, "variant batch"]:
        """The metric of every variant on every example."""
        return self.all_values(variants, advance)[0]

    def all_values(
        self,
        variants: Sequence[Variant],
        advance: Advance | None = None,
        keep: Keep | None = None,
    ) -> Float[Tensor, "metric variant batch"]:
        """Every metric of every variant on every example; each variant is run once.

        Args:
            variants: to run.
            advance: told how many examples were run.
            keep: given the numbers of variants as they are finished, and their values.
        """
        size = (len(self.readings), len(variants), len(self.probe))
        done = torch.full(size, float("nan"), dtype=torch.float64)
        waiting: list[tuple[list[int], Tensor]] = []
        per_variant, since = int(self.read.sum()), time.monotonic()
        for chosen, rows in self._stacks(variants):
            waiting.append((chosen, rows))
            due = keep is not None and time.monotonic() - since > _EVERY
            if due or sum(len(index) for index, _ in waiting) * per_variant >= _ROWS:
                self._flush(waiting, done, keep)
                since = time.monotonic()
            if advance is not None:
                advance(float(len(chosen) * len(self.probe)))
        self._flush(waiting, done, keep)
        return done

    def _flush(
        self, waiting: list[tuple[list[int], Tensor]], done: Tensor, keep: Keep | None
    ) -> None:
        if waiting:
            index = [number for chosen, _ in waiting for number in chosen]
            done[:, index] = self._reduced([rows for _, rows in waiting])
            waiting.clear()
            if keep is not None:
                keep(index, done[:, index])

    def _stacks(self, variants: Sequence[Variant]) -> Iterator[tuple[list[int], Tensor]]:
        """Run the variants, those that start in one layer together, late positions first."""
        starts = [self.source.start(variant) for variant in variants]
        order = sorted(range(len(variants)), key=lambda i: (starts[i][0], -starts[i][1], i))
        at = 0
        while at < len(order):
            count = self._fitting([starts[i] for i in order[at:]])
            chosen = order[at : at + count]
            rows = None
            try:
                rows = self.source.rows([variants[i] for i in chosen])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or count == 1:
                    raise
            if rows is None:
                self.limit //= 2
                free_cached_memory()
                continue
            yield chosen, rows
            at += count

    def _fitting(self, starts: Sequence[tuple[int, int]]) -> int:
        """How many of these variants make the next stack."""
        count = 0
        for layer, first in starts:
            tokens = (count + 1) * len(self.probe) * (self.probe.length - first)
            if count and (layer != starts[0][0] or tokens > self.limit):
                break
            count += 1
        return count

    def _reduced(self, parts: Sequence[Tensor]) -> Float[Tensor, "metric variant batch"]:
        """One number per metric, variant and example from rows, whole variants in order."""
        rows = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        size = int(self.read.sum())
        whole = any(isinstance(one.metric, WholeMetric) for one in self.readings)
        found: list[list[Tensor]] = [[] for _ in self.readings]
        for logits, at in self._logits(rows, size if whole else _ROWS):
            for reading, numbers in zip(self.readings, found, strict=True):
                numbers.append(reading.numbers(logits, at))
        pairs = zip(self.readings, found, strict=True)
        return torch.stack([one.by_example(numbers, len(rows) // size) for one, numbers in pairs])

    def _logits(self, rows: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of some rows at a time, and which positions of a variant these are."""
        size = int(self.read.sum())
        for start in range(0, len(rows), step):
            logits = self.source.logits(rows[start : start + step]).float()
            yield logits, torch.arange(start, start + len(logits)) % size


# The metric of a replay and of a whole pass may differ by this, beside the metric's own size.
_AGREEMENT = 1e-3
_HALF_AGREEMENT = 1e-1
_SILENT_LENGTH = 16


@dataclass
class _Layer:
    """Keeps the outputs of one layer."""

    layer: int
    z: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def reads(self) -> Reads:
        """The layer's outputs."""
        return {Tap("z", self.layer): self._keep}

    def _keep(self, view: TapView) -> None:
        self.z = view.z.float().clone()


def proofs(
    model: HeadModel, engine: Engine, batch: RecordedBatch, place: Place, heads: Sequence[HeadIndex]
) -> dict[str, Any]:
    """Measure, on one example and the head in the middle of the list, that edits do what they say.

    Returns:
        ``engine``; ``noop_error``, the change of the logits by an edit of nothing, as a share of
        the largest; ``head_checked``; ``own_output_changed``; ``other_heads_changed``, in the
        layer of the edited one (0: none); ``replay_error``, between a metric by replay and by a
        whole pass, the largest over metrics; ``heads_off_error``, how much of the logits still
        depends on other positions when all heads are zeroed (0: nothing).

    Raises:
        HeadscopeError: if an edit changed another head of its layer, or if replay and whole pass
            disagree.
    """
    head = heads[len(heads) // 2]
    changed, error = _check_head(model, engine, batch, place, head)
    return {
        "engine": "suffix replay" if engine.replays else "whole passes",
        "prefix_reuse": engine.prefix,
        "noop_error": engine.noop_error,
        "head_checked": str(head),
        "own_output_changed": changed,
        "other_heads_changed": 0,
        "replay_error": error,
        "heads_off_error": heads_off_error(model, batch),
    }


@torch.no_grad()
def _check_head(
    model: HeadModel, engine: Engine, batch: RecordedBatch, place: Place, head: HeadIndex
) -> tuple[bool, float | None]:
    """Whether a head's own output changed, and how far replay and whole pass are apart."""
    at = int(batch.read.any(1).nonzero()[0])  # an example that the metrics read
    chosen = slice(at, at + 1)
    one, read = batch.probe.examples(chosen), batch.read[chosen]
    reads = [(reading.metric, reading.read[chosen]) for reading in batch.readings]
    variant: Variant = cut((place([head]),), examples=chosen)
    after = _Layer(head.layer)
    whole_pass = ForwardSource(model, one.tokens, one.real, read, after.reads, inputs=one.inputs)
    partner = partner_rows(model, one, [metric for metric, _ in reads])
    alone = RecordedBatch(one, batch.metric, whole_pass, read, batch.limit, reads, partner)
    whole = alone.all_values([variant])
    z = _clean_z(model, batch, head.layer, chosen)
    difference = (after.z - z).abs().amax((0, 1, 3))
    others = torch.arange(len(difference), device=difference.device) != head.head
    if not bool((difference[others] <= 1e-5 * (float(z.abs().max()) or 1.0)).all()):  # or NaN
        raise HeadscopeError(
            f"ablating {head} changed the output of another head of its layer: the edit does not "
            "do what it says."
        )
    changed = bool(difference[head.head] > 0)
    if not engine.replays:
        return changed, None
    source = engine.source(model, one.tokens, one.real, read, one.inputs)
    again = RecordedBatch(one, batch.metric, source, read, batch.limit, reads, partner)
    replayed = again.all_values([variant])
    errors = (whole - replayed).abs().nan_to_num()
    error = float(errors.max())
    allowed = _AGREEMENT if model.dtype in (torch.float32, torch.float64) else _HALF_AGREEMENT
    if bool((errors > allowed * whole.abs().nan_to_num().clamp_min(1.0)).any()):
        raise HeadscopeError(
            f"ablating {head} by replay and by a whole pass gives metrics {error:.2g} apart."
        )
    return changed, error


def _clean_z(
    model: HeadModel, batch: RecordedBatch, layer: int, chosen: slice
) -> Float[Tensor, "1 pos head d_head"]:
    """Outputs of a layer on one example, unedited.

    Run alone, as the edited pass is: beside others it would be rounded differently, and a deep
    model makes more of that than the check allows.
    """
    before, one = _Layer(layer), batch.probe.examples(chosen)
    model.run(one, reads=before.reads, logits_at=torch.empty(0, dtype=torch.long))
    return before.z


@torch.no_grad()
def heads_off_error(model: HeadModel, batch: RecordedBatch) -> float | None:
    """How much the last logits still depend on earlier tokens when all heads give 0.

    With attention removed nothing can move between positions. As a share of the largest logit;
    None where it cannot be told (one token, layers without attention that mix positions, or
    what the model reads beside tokens).
    """
    if batch.probe.inputs:
        return None
    text = batch.probe.tokens[0, batch.probe.real[0]][:_SILENT_LENGTH]
    hybrid = len(model.shape.attention_layers) < model.shape.n_layers
    if hybrid or len(text) < 2:
        return None
    tokens = torch.stack([text, torch.cat([text[:-1].flip(0), text[-1:]])])
    last = torch.tensor([len(text) - 1])
    off = model.forward(tokens, edits=(zero(model.shape.heads),), logits_at=last).float()
    return float((off[0] - off[1]).abs().max() / off.abs().max().clamp_min(1e-12))
