"""Observers that keep a few positions of what lenses read."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.blocks import BlockStates
from headscope.models.protocol import LayerView

SITES = ("residual", "attention", "mlp")


def row_names(n_layers: int) -> tuple[str, ...]:
    """Places of the residual stream from the bottom up; the last one is the model's own."""
    return ("embedding", *(f"L{layer}" for layer in range(n_layers)))


@dataclass
class States:
    """Keeps chosen positions of chosen sites, by site and place, in layer order.

    Attributes:
        example, position: of each row.
        sites: which.
        rows: what was kept, in fp32.
        final: what entered the final norm.
    """

    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    sites: tuple[str, ...] = ("residual",)
    rows: dict[str, dict[str, Float[Tensor, "row d_model"]]] = field(default_factory=dict)
    final: Float[Tensor, "row d_model"] = field(default_factory=lambda: torch.empty(0, 0))
    wants_final: bool = True

    def __post_init__(self) -> None:
        """Make room."""
        self.rows = {site: {} for site in self.sites}

    def on_layer(self, view: LayerView) -> None:
        """Nothing is kept of single heads."""

    def on_block(self, states: BlockStates) -> None:
        """Keep what the sites name."""
        name = f"L{states.layer}"
        at = (self.example, self.position)
        if "residual" in self.sites:
            if states.layer == 0:
                self.rows["residual"]["embedding"] = states.entering[at].float()
            self.rows["residual"][name] = states.leaving[at].float()
        if "attention" in self.sites and states.attention is not None:
            self.rows["attention"][name] = states.attention[at].float()
        if "mlp" in self.sites:
            self.rows["mlp"][name] = states.mlp[at].float()

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep what enters the final norm."""
        self.final = residual[self.example, self.position].float()
