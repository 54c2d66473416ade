"""A metric on a batch of texts: which positions it reads, and one number per run and example."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.metrics import AnyMetric, LogitRows, Metric
from headscope.probes.probe import Probe


@dataclass(eq=False)
class Measured:
    """A metric on one batch.

    Attributes:
        metric: what is measured.
        probe: the batch, clean, with its answers.
        read: positions that the metric reads.
        clean: logits of the clean run at :attr:`at`, for metrics that compare with it.
    """

    metric: AnyMetric
    probe: Probe
    read: Bool[Tensor, "batch pos"]
    clean: Float[Tensor, "batch at d_vocab"] | None = None

    @cached_property
    def at(self) -> Int[Tensor, " at"]:
        """Positions whose logits are needed."""
        return self.read.any(0).nonzero().squeeze(1)

    @cached_property
    def counted(self) -> Bool[Tensor, " batch"]:
        """Examples in which it reads anything."""
        return self.read.any(1)

    def __call__(self, logits: Float[Tensor, "row at d_vocab"]) -> Float[Tensor, "run batch"]:
        """One number per run and example; 0 where it reads nothing.

        Args:
            logits: of one or several runs of the batch, runs outermost.
        """
        runs = logits.unflatten(0, (-1, len(self.probe)))
        if not isinstance(self.metric, Metric):
            return torch.stack([self.metric(run.float(), self.probe) for run in runs])
        return self._averaged(self.metric, runs)

    def _averaged(
        self, metric: Metric, runs: Float[Tensor, "run batch at d_vocab"]
    ) -> Float[Tensor, "run batch"]:
        device, n = runs.device, len(runs)
        read = self.read[:, self.at].to(device)
        example = read.nonzero()[:, 0]
        probe, clean = self.probe, self.clean
        foils = None if probe.foils is None else probe.foils[self.read].to(device).repeat(n)
        rows = LogitRows(
            runs[:, read].flatten(0, 1).float(),
            probe.targets[self.read].to(device).repeat(n),
            foils,
            None if clean is None else clean[read].float().repeat(n, 1),
        )
        values = metric.value(rows).view(n, -1)
        total = values.new_zeros(n, len(probe)).index_add(1, example, values)
        return total / read.sum(1).clamp_min(1)
