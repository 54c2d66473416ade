"""How the outputs of heads reach the residual stream."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from headscope.errors import UnsupportedModelError
from headscope.heads import ModelShape
from headscope.views.qk import InputNorm


@dataclass(frozen=True, eq=False)
class AttentionWrite:
    """How head outputs of one layer reach the residual stream.

    ``sum over heads of z @ W_O + bias``, with ``W_O`` of ``model.output_weights``; where a norm
    follows attention (gemma2, gemma3, olmo2), that norm of it.

    Attributes:
        bias: of the output projection, the family's multiplier included.
        norm: norm after attention, the multiplier in its gain and bias; None where there is none.
    """

    bias: Float[Tensor, " d_model"]
    norm: InputNorm | None

    def read_by(self, direction: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Direction that reads ``z @ W_O`` as ``direction`` reads the stream, norm's scale at 1."""
        if self.norm is None:
            return direction
        read = direction * self.norm.gain.float()
        return read - read.mean(-1, keepdim=True) if self.norm.centred else read

    def scale(self, head_sum: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """Denominator of the norm after attention; 1 where there is none."""
        if self.norm is None:
            return torch.ones_like(head_sum[..., 0], dtype=torch.float32)
        return self.norm.scale(head_sum)

    def constant(
        self,
        direction: Float[Tensor, "*any d_model"],
        scale: Float[Tensor, "*any"],
    ) -> Float[Tensor, "*any"]:
        """What belongs to no head, along a direction: biases of projection and norm."""
        constant = self.read_by(direction) @ self.bias.float() / scale
        if self.norm is not None:
            constant = constant + direction @ self.norm.bias.float()
        return constant

    def folded(
        self, W_O: Float[Tensor, "head d_head d_model"]
    ) -> Float[Tensor, "head d_head d_model"]:
        """Output weights as they reach the stream with the scale of a norm at 1."""
        return self.vectors(W_O, torch.ones_like(W_O[..., 0]))

    def vectors(
        self, writes: Float[Tensor, "*any d_model"], scale: Float[Tensor, "*any"]
    ) -> Float[Tensor, "*any d_model"]:
        """What ``z @ W_O`` of single heads adds to the stream, with the norm's scale held."""
        if self.norm is None:
            return writes
        centred = writes - writes.mean(-1, keepdim=True) if self.norm.centred else writes
        return centred * self.norm.gain.float() / scale.unsqueeze(-1)


@runtime_checkable
class HasWrites(Protocol):
    """The part of a model that knows how heads reach the residual stream."""

    @property
    def shape(self) -> ModelShape:
        """Gives the layers that have attention."""

    @property
    def parts(self) -> Any:
        """Gives ``attention_write``."""


def unmeasured_write(model: HasWrites) -> dict[str, str]:
    """Limit of a model with a norm after attention that cannot be held fixed; else none."""
    try:
        for layer in model.shape.attention_layers:
            model.parts.attention_write(layer)
    except UnsupportedModelError as error:
        return {"attention_write": str(error)}
    return {}
