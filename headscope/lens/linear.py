"""A lens that maps the residual stream of each layer to a later one, by one matrix per layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from headscope.errors import InputError
from headscope.lens.report import FitReport
from headscope.lens.saved import Saved, save_lens
from headscope.models.protocol import HeadModel

_TITLES = {"tuned": "tuned lens", "shortcut": "linear shortcuts"}


@dataclass(frozen=True, eq=False, repr=False)
class ResidualLens:
    """``x @ weight + bias`` for the stream at each place, then the model's own readout.

    Attributes:
        kind: how it was fitted: ``tuned`` or ``shortcut``.
        weight, bias: of each place, from the bottom up; places above are read as they are.
        report: held-out loss beside that of the plain logit lens.
        model: name of the model that it belongs to.
        digest: of its weights.
        settings: what it was fitted with. JSON values.

    Example:
        >>> lens = hs.lens.tuned_lens(model, probe, steps=1)
        >>> lens.title, lens.translate(torch.zeros(3, model.shape.d_model), 0).shape[0]
        ('tuned lens', 3)
    """

    kind: Literal["tuned", "shortcut"]
    weight: Float[Tensor, "row d_model d_model"]
    bias: Float[Tensor, "row d_model"]
    report: FitReport
    model: str
    digest: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What pictures call it."""
        return _TITLES[self.kind]

    def translate(self, rows: Float[Tensor, "row d_model"], place: int) -> Tensor:
        """Rows ``[row d_model]`` of one place, as the lens sees them further up."""
        if place >= len(self.weight):
            return rows
        return rows.float() @ self.weight[place].to(rows.device) + self.bias[place].to(rows.device)

    def check(self, model: HeadModel) -> None:
        """Raise InputError if the lens belongs to another model."""
        if model.digest() != self.digest:
            raise InputError(
                f"this {self.title} was fitted to {self.model}, and {model.name} has other weights."
            )

    def save(self, folder: "str | PathLike[str]") -> None:
        """Write ``lens.safetensors`` and ``config.json`` into a folder, each whole or absent."""
        tensors = {"weight": self.weight, "bias": self.bias}
        facts = Saved(
            kind=self.kind,
            model=self.model,
            digest=self.digest,
            settings=dict(self.settings),
            report=self.report.to_json(),
        )
        save_lens(folder, tensors, facts)

    def __repr__(self) -> str:
        """Return what it is and whether it is worth anything."""
        return f"<{self.title} of {self.model}: {self.report}>"
