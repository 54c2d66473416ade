"""Metric values of many edited variants of one batch: stacked, read where asked, averaged."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.ablation.sources import Plan, Source
from headscope.edits import Variant
from headscope.memory import is_out_of_memory
from headscope.metrics import AnyMetric, LogitRows, Metric, WholeMetric
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.progress import Advance

# Tokens of one stack: on a CPU what stays near its caches, on a GPU what keeps it busy.
CPU_STACK, GPU_STACK = 1024, 65536
# Rows whose logits are computed at once.
_ROWS = 512


def stack_tokens(model: HeadModel, memory: int | None) -> int:
    """Tokens that one stack of variants may hold.

    Args:
        model: whose device decides.
        memory: bytes that a stack's activations may take; None: what the device works best with.
    """
    if memory is not None:
        width = 16 * model.shape.d_model * model.dtype.itemsize
        return max(1, memory // width)
    return GPU_STACK if model.device.type == "cuda" else CPU_STACK


@dataclass
class Batch:
    """A batch of a probe, run once cleanly and ready for variants.

    Attributes:
        read: positions that the metric reads.
        clean: the metric on the unedited batch.
        limit: tokens per stack; halved whenever memory runs out.
    """

    probe: Probe
    metric: AnyMetric
    source: Source
    read: Bool[Tensor, "batch pos"]
    limit: int
    clean: Float[Tensor, " batch"] = field(init=False)
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        """Read the clean run."""
        rows = self.source.clean()
        if "clean" in self.metric.needs:
            self.reference = torch.cat([self.source.logits(part) for part in rows.split(_ROWS)])
        self.clean = self._reduced([rows])[0]

    @classmethod
    def of(
        cls, model: HeadModel, plan: Plan, probe: Probe, metric: AnyMetric, limit: int
    ) -> "Batch":
        """Run a batch cleanly."""
        read = metric.reads(probe)
        return cls(probe, metric, plan.source(model, probe.tokens, probe.real, read), read, limit)

    def values(
        self, variants: Sequence[Variant], advance: Advance | None = None
    ) -> Float[Tensor, "variant batch"]:
        """The metric of every variant on every example."""
        done = torch.full((len(variants), len(self.probe)), float("nan"), dtype=torch.float64)
        waiting: list[tuple[list[int], Tensor]] = []
        per_variant = int(self.read.sum())
        for chosen, rows in self._stacks(variants):
            waiting.append((chosen, rows))
            if sum(len(index) for index, _ in waiting) * per_variant >= _ROWS:
                self._flush(waiting, done)
            if advance is not None:
                advance(float(len(chosen) * len(self.probe)))
        self._flush(waiting, done)
        return done

    def _flush(self, waiting: list[tuple[list[int], Tensor]], done: Tensor) -> None:
        if waiting:
            index = [number for chosen, _ in waiting for number in chosen]
            done[index] = self._reduced([rows for _, rows in waiting])
            waiting.clear()

    def _stacks(self, variants: Sequence[Variant]) -> Iterator[tuple[list[int], Tensor]]:
        """Run the variants, those that start in one layer together, late positions first."""
        starts = [self.source.start(variant) for variant in variants]
        order = sorted(range(len(variants)), key=lambda i: (starts[i][0], -starts[i][1], i))
        at = 0
        while at < len(order):
            count = self._fitting([starts[i] for i in order[at:]])
            chosen = order[at : at + count]
            try:
                rows = self.source.rows([variants[i] for i in chosen])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or count == 1:
                    raise
                self._spare()
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

    def _spare(self) -> None:
        self.limit //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _reduced(self, parts: Sequence[Tensor]) -> Float[Tensor, "variant batch"]:
        """One number per variant and example from rows, whole variants in order."""
        rows = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        size = int(self.read.sum())
        if not isinstance(self.metric, Metric):
            values = [self._whole(self.metric, one) for one in rows.split(size)]
            return torch.stack(values).double().cpu()
        numbers = self._row_values(self.metric, rows)
        example = self.read.nonzero()[:, 0]
        count = torch.bincount(example, minlength=len(self.probe))
        by_variant = numbers.double().cpu().view(-1, size)
        total = by_variant.new_zeros(len(by_variant), len(self.probe))
        return total.index_add(1, example.cpu(), by_variant) / count.cpu()

    def _row_values(self, metric: Metric, rows: Tensor) -> Float[Tensor, " row"]:
        """Values of some whole variants, a few hundred rows at a time."""
        values = []
        for start in range(0, len(rows), _ROWS):
            logits = self.source.logits(rows[start : start + _ROWS]).float()
            at = torch.arange(start, start + len(logits)) % int(self.read.sum())
            values.append(metric.value(self.facts(logits, at.to(logits.device))))
        return torch.cat(values)

    def facts(self, logits: Tensor, at: Tensor | slice = slice(None)) -> LogitRows:
        """Logits with what the probe says about the positions that they belong to.

        Args:
            logits: of some positions read.
            at: which of them; default: all of one variant.
        """
        probe, device = self.probe, logits.device
        return LogitRows(
            logits,
            probe.targets[self.read].to(device)[at],
            None if probe.foils is None else probe.foils[self.read].to(device)[at],
            None if self.reference is None else self.reference[at].float(),
        )

    def _whole(self, metric: WholeMetric, rows: Tensor) -> Float[Tensor, " batch"]:
        """A function of the user's own, on the logits of all positions."""
        logits = self.source.logits(rows)
        return metric(logits.view(*self.read.shape, -1).float(), self.probe)
