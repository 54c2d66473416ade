"""What every intervention is: a value that makes edits of any heads, batch by batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from jaxtyping import Bool
from torch import Tensor

from headscope.edits import AnyEdit, Heads
from headscope.errors import InputError
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe

Place = Callable[[Heads], AnyEdit]
# Makes edits of one batch: of these examples, with the recorded outputs of its clean run by layer.
BatchPlace = Callable[[slice, Mapping[int, Tensor] | None], Place]


@dataclass(frozen=True, eq=False)
class Setting:
    """What an intervention is applied to.

    Attributes:
        model: that is edited.
        probe: that is run.
        positions: where to edit; None: everywhere.
        batch_size: examples of a recorded batch.
    """

    model: HeadModel
    probe: Probe
    positions: Bool[Tensor, "batch pos"] | None
    batch_size: int

    def where(self, chosen: slice) -> Bool[Tensor, "batch pos"] | None:
        """Positions to edit in one batch."""
        return None if self.positions is None else self.positions[chosen]


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """What heads become. Subclass it, with ``name`` and :meth:`prepare`, for an own one.

    Example:
        >>> zero = hs.interventions.Zero()
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, zero, heads="L0H1")
        >>> scores.name
        'zero_ablation'
    """

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, setting: Setting) -> BatchPlace:
        """Check the setting, compute what all batches share, and return what edits a batch.

        Args:
            setting: model, probe and positions.

        Raises:
            InputError: if the intervention does not fit the probe.
        """

    def reference_for(self, probe: Probe) -> Probe | None:
        """Probe that replacement values come from; None where there is none."""
        return None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name and numbers of the intervention, for provenance (JSON values)."""
        numbers = {
            one.name: value
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), str | int | float | bool)
        }
        return {"method": self.name, **numbers}


def need_same_length(probe: Probe, reference: Probe, name: str) -> None:
    """Refuse a reference that has other positions than the probe.

    Raises:
        InputError: if the lengths differ.
    """
    if reference.length != probe.length:
        raise InputError(
            f"{name} replaces position by position, but the reference has {reference.length} "
            f"positions and the probe {probe.length}."
        )
