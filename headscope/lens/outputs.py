"""Head outputs of chosen layers at every real token of a batch, over the scales of the norms."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.lens.splitting import rows_of
from headscope.models.blocks import BlockStates
from headscope.models.protocol import HeadModel, LayerView
from headscope.probes.probe import Probe


@dataclass
class HeadStreams:
    """Observer that keeps them.

    Attributes:
        z: by layer, divided by the scales of a norm after attention and of the final norm.
        final: last residual stream.
        example: of each token.
    """

    model: HeadModel
    layers: tuple[int, ...]
    example: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    z: dict[int, Float[Tensor, "token head d_head"]] = field(default_factory=dict)
    final: Float[Tensor, "token d_model"] = field(default_factory=lambda: torch.empty(0, 0))
    wants_final: bool = True

    def on_layer(self, view: LayerView) -> None:
        """Keep the outputs of a chosen layer."""
        if view.layer in self.layers:
            self.z[view.layer] = view.z[self.example, self.position].float()

    def on_block(self, states: BlockStates) -> None:
        """Divide by the scale of a norm after attention."""
        if states.layer in self.z and states.head_sum is not None:
            write = self.model.parts.attention_write(states.layer)
            scale = write.scale(states.head_sum[self.example, self.position])
            self.z[states.layer] = self.z[states.layer] / scale[:, None, None]

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Divide by the scale of the final norm."""
        self.final = residual[self.example, self.position].float()
        scale = self.model.readout.scale(self.final)
        self.z = {layer: z / scale[:, None, None] for layer, z in self.z.items()}


@torch.no_grad()
def head_streams(model: HeadModel, batch: Probe, layers: tuple[int, ...]) -> HeadStreams:
    """Run a batch once."""
    example, position = (one.to(model.device) for one in rows_of(batch.real))
    seen = HeadStreams(model, layers, example, position)
    with model.parts.blocks_shown(seen):
        model.forward(
            batch.tokens,
            real=batch.real,
            observers=[seen],
            logits_at=torch.empty(0, dtype=torch.long),
        )
    return seen
