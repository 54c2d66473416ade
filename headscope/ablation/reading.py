"""One metric on one batch: which rows of a run are its own, and one number per example."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.metrics import AnyMetric, LogitRows, Metric, WholeMetric
from headscope.probes.probe import Probe


@dataclass(eq=False)
class Reading:
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
