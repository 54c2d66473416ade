"""What a metric is: a number per example from the logits at the positions that it reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.specs import Direction, ScoreSpec, Specified
from headscope.errors import InputError


@runtime_checkable
class Answered(Protocol):
    """What a metric needs to know of a probe (or of a batch of one)."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """False at padding."""

    @property
    def targets(self) -> Int[Tensor, "batch pos"]:
        """Token to predict at each position; -1 for none."""

    @property
    def foils(self) -> Int[Tensor, "batch pos"] | None:
        """Wrong alternative to each target."""

    @property
    def marks(self) -> Mapping[str, Bool[Tensor, "batch pos"]]:
        """Named sets of positions."""

    def mark(self, name: str) -> Bool[Tensor, "batch pos"]:
        """One of them."""


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Logits of the positions that a metric reads, one row each, in fp32.

    Attributes:
        targets: -1 where there is none.
        foils: None where the probe has none.
        clean: logits of the unedited run; None where the metric does not ask for them.
    """

    logits: Float[Tensor, "row d_vocab"]
    targets: Int[Tensor, " row"]
    foils: Int[Tensor, " row"] | None = None
    clean: Float[Tensor, "row d_vocab"] | None = None

    def of(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Logit of one token per row."""
        return self.logits.gather(1, tokens[:, None]).squeeze(1)


@dataclass(frozen=True, eq=False)
class Metric(Specified):
    """A number per position read, averaged over the positions of an example.

    Attributes:
        spec: what the metric declares: name, unit, bounds, which direction is better, ...
        value: the number of every row.
        needs: which of ``target``, ``foil`` and ``clean`` it compares the logits with;
            ``embedding`` where it is a number of embeddings and not of logits, ``pair`` where it
            compares with the partner of an example.
        mark: which positions it reads; None: those with a target (and a foil, if it needs one).
    """

    spec: ScoreSpec
    value: Callable[[LogitRows], Float[Tensor, " row"]]
    needs: frozenset[str] = frozenset({"target"})
    mark: str | None = None

    def at(self, mark: str) -> "Metric":
        """The same metric, read at the positions with this mark (that have a target)."""
        return replace(self, mark=mark)

    def reads(self, probe: Answered) -> Bool[Tensor, "batch pos"]:
        """Positions whose logits it reads.

        Raises:
            InputError: if there are none.
        """
        # Of an image one position speaks for the whole.
        speaking: Bool[Tensor, "batch pos"] = getattr(probe, "answering", probe.real)
        answered = speaking & (probe.targets >= 0)
        if "foil" in self.needs:
            if probe.foils is None:
                raise InputError(
                    f"{self.name} compares the target with a foil, and this probe has no foils: "
                    "use a probe of pairs, or another metric."
                )
            answered = answered & (probe.foils >= 0)
        if self.mark is None:
            any_target = "target" in self.needs or bool(answered.any())
            read = answered if any_target else speaking
        else:
            read = probe.mark(self.mark) & (answered if "target" in self.needs else speaking)
        if not bool(read.any()):
            what = f"mark {self.mark!r}" if self.mark is not None else "target"
            raise InputError(
                f"{self.name} has nothing to read: no position of the probe has a {what}"
                f"{' and a target' if self.mark is not None and 'target' in self.needs else ''}; "
                "for an encoder, hs.probes.masked hides tokens and asks for them."
            )
        return read

    def by_position(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        probe: Answered,
        clean: Float[Tensor, "batch pos d_vocab"] | None = None,
    ) -> Float[Tensor, "batch pos"]:
        """The number at every position read; NaN elsewhere."""
        read = self.reads(probe).to(logits.device)
        rows = rows_of(logits[read], probe, read, None if clean is None else clean[read])
        values = torch.full(read.shape, float("nan"), dtype=torch.float32, device=logits.device)
        values[read] = self.value(rows)
        return values

    def __call__(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        probe: Answered,
        clean: Float[Tensor, "batch pos d_vocab"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """One number per example: the mean over the positions read."""
        return self.by_position(logits, probe, clean).nanmean(1)


@dataclass(frozen=True, eq=False)
class WholeMetric(Specified):
    """A user's own function of the logits of all positions and the batch's probe."""

    function: Callable[..., Tensor]
    spec: ScoreSpec
    needs: frozenset[str] = frozenset()

    def reads(self, probe: Answered) -> Bool[Tensor, "batch pos"]:
        """Every position."""
        return torch.ones_like(probe.real)

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], probe: Answered
    ) -> Float[Tensor, " batch"]:
        """Call the function and check that it gave one number per example."""
        values = self.function(logits, probe)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            raise InputError(
                f"the metric {self.name!r} must give one number per example, a tensor of shape "
                f"[{len(logits)}]; it gave {getattr(values, 'shape', type(values).__name__)}."
            )
        return values


AnyMetric = Metric | WholeMetric


def as_metric(metric: Metric | WholeMetric | Callable[..., Tensor]) -> AnyMetric:
    """A metric as it is; a plain function as a :class:`WholeMetric`.

    Raises:
        InputError: if it is neither.

    Example:
        >>> as_metric(lambda logits, probe: logits.amax((1, 2))).name
        'lambda'
    """
    if isinstance(metric, Metric | WholeMetric):
        return metric
    if not callable(metric):
        raise InputError(f"a metric is a value of headscope.metrics or a function; got {metric!r}.")
    return WholeMetric(metric, ScoreSpec(getattr(metric, "__name__", "metric").strip("<>")))


def cost_sign(metric: AnyMetric, better: Direction | None = None) -> int:
    """1 where a rise of the metric is damage, -1 where a fall is.

    Args:
        metric: one of :mod:`headscope.metrics`, or a user's.
        better: which direction is better; needed where the metric does not declare it.

    Raises:
        InputError: if it cannot be told.

    Example:
        >>> cost_sign(hs.metrics.loss), cost_sign(hs.metrics.accuracy)
        (1, -1)
    """
    known = better or metric.spec.direction
    if known not in ("higher", "lower"):
        raise InputError(
            f"metric {metric.name!r} has no direction: pass better='higher' or better='lower'."
        )
    return 1 if known == "lower" else -1


def rows_of(
    logits: Float[Tensor, "row d_vocab"],
    probe: Answered,
    read: Bool[Tensor, "batch pos"],
    clean: Float[Tensor, "row d_vocab"] | None = None,
) -> LogitRows:
    """Rows with what the probe says about them.

    Example:
        >>> len(rows_of(torch.zeros(40, 9), probe, probe.targets >= 0).targets)
        40
    """
    device = logits.device
    where = read.to(probe.targets.device)
    return LogitRows(
        logits.float(),
        probe.targets[where].to(device),
        None if probe.foils is None else probe.foils[where].to(device),
        None if clean is None else clean.float(),
    )
