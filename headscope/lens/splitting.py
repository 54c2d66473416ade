"""The observer behind direct attribution: what each part adds along chosen directions.

Every part is read where the model computes it, at a few positions, and forgotten: no vector of a
part is kept, only its product with the direction.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.models.blocks import AttentionWrite, BlockStates
from headscope.models.protocol import HeadModel, LayerView


@dataclass
class Split:
    """Products of parts with one direction per row, over the final norm's scale.

    A row is one position of one example. Until :meth:`on_final` nothing is divided.

    Attributes:
        example, position: of each row.
        direction: residual direction that is read, per row.
        with_sources: also split every head by source token.
        heads: by layer.
        biases: by layer, of attention.
        mlps: by layer.
        sources: by layer; keys beyond the query's reach are 0.
        embedding: what entered the first block.
        scale: of the final norm.
        residual: what entered the final norm.
    """

    model: HeadModel
    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    direction: Float[Tensor, "row d_model"]
    with_sources: bool = False
    heads: dict[int, Float[Tensor, "row head"]] = field(default_factory=dict)
    biases: dict[int, Float[Tensor, " row"]] = field(default_factory=dict)
    mlps: dict[int, Float[Tensor, " row"]] = field(default_factory=dict)
    sources: dict[int, Float[Tensor, "row head key"]] = field(default_factory=dict)
    embedding: Float[Tensor, " row"] = field(default_factory=lambda: torch.empty(0))
    scale: Float[Tensor, " row"] = field(default_factory=lambda: torch.empty(0))
    residual: Float[Tensor, "row d_model"] = field(default_factory=lambda: torch.empty(0, 0))
    wants_final: bool = True

    def on_layer(self, view: LayerView) -> None:
        """Read every head, before a norm that may follow attention."""
        layer = view.layer
        read = self._write(layer).read_by(self.direction)
        per_head = torch.einsum("hem,rm->rhe", self.model.output_weights(layer).float(), read)
        z = view.z[self.example, self.position].float()
        self.heads[layer] = (z * per_head).sum(-1)
        if self.with_sources:
            self.sources[layer] = self._moved(view, per_head)

    def _moved(
        self, view: LayerView, per_head: Float[Tensor, "row head d_head"]
    ) -> Float[Tensor, "row head key"]:
        """``pattern[i, j] * (v_j W_O) . direction``, one value product per key/value head."""
        positions, place = self.position.unique(return_inverse=True)
        pattern = view.rows(positions).pattern[self.example, :, place]
        values = view.values()[self.example][:, :, : pattern.shape[-1]].float()
        grouped = per_head.unflatten(1, (values.shape[1], -1))
        return torch.einsum("rgke,rgje->rgjk", values, grouped).flatten(1, 2) * pattern

    def on_block(self, states: BlockStates) -> None:
        """Read the MLP and attention's biases; divide by the scale of a norm after attention."""
        if states.layer == 0:
            self.embedding = self._along(states.entering)
        self.mlps[states.layer] = self._along(states.mlp)
        if states.head_sum is None:
            return
        write = self._write(states.layer)
        scale = write.scale(states.head_sum[self.example, self.position])
        self.heads[states.layer] /= scale[:, None]
        self.biases[states.layer] = write.constant(self.direction, scale)
        if self.with_sources:
            self.sources[states.layer] /= scale[:, None, None]

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Divide everything by the final norm's scale."""
        self.residual = residual[self.example, self.position].float()
        self.scale = self.model.readout.scale(self.residual)
        self.embedding = self.embedding / self.scale
        for parts in (self.heads, self.biases, self.mlps, self.sources):
            for layer, values in parts.items():
                parts[layer] = values / self.scale.view(-1, *[1] * (values.ndim - 1))

    def _along(self, states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " row"]:
        return (states[self.example, self.position] * self.direction).sum(-1)

    def _write(self, layer: int) -> AttentionWrite:
        return self.model.parts.attention_write(layer)

    @property
    def whole(self) -> Float[Tensor, " row"]:
        """What all parts must sum to: the last residual stream along the direction."""
        return (self.residual * self.direction).sum(-1) / self.scale

    @property
    def total(self) -> Float[Tensor, " row"]:
        """Sum of all parts, in double precision."""
        return self._stacked().sum(0)

    @property
    def largest(self) -> Float[Tensor, " row"]:
        """Size of the largest part."""
        return self._stacked().abs().amax(0)

    def _stacked(self) -> Float[Tensor, "part row"]:
        heads = [one for values in self.heads.values() for one in values.T]
        parts = [self.embedding, *heads, *self.biases.values(), *self.mlps.values()]
        return torch.stack(parts).cpu().double()


def rows_of(read: Bool[Tensor, "batch pos"]) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Example and position of every position read."""
    example, position = read.nonzero(as_tuple=True)
    return example, position
