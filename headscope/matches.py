"""What a scorer sees before the softmax: queries and keys of one layer."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.inputs import Rotation


@dataclass(frozen=True, eq=False)
class Matches:
    """Queries at some positions and all keys that any of them sees. Never written to.

    Attributes:
        layer: the model's layer number.
        query_pos: positions of the queries.
        query, key: in fp32, as attention used them: rotated, normalised.
        scaling: multiplier of the products.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)`` where it is given.
        visible: which keys each query sees: order, window and padding together.
        rotation: how positions turned them; only for scorers that need ``rotary``.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    scaling: float
    soft_cap: float | None
    visible: Bool[Tensor, "batch query key"]
    rotation: Rotation | None = None

    @cached_property
    def scores(self) -> Float[Tensor, "batch head query key"]:
        """Scores before mask and softmax, soft cap included."""
        scores = self.products(torch.arange(self.query.shape[-1], device=self.key.device))
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        return scores

    def products(self, dimensions: Int[Tensor, " some"]) -> Float[Tensor, "batch head query key"]:
        """What some dimensions of head space add to the scores, before any soft cap."""
        batch, kv_heads, keys, _ = self.key.shape
        query = self.query[..., dimensions] * self.scaling
        grouped = query.reshape(batch, kv_heads, -1, len(dimensions))
        part = torch.matmul(grouped, self.key[..., dimensions].mT)
        return part.view(batch, -1, len(self.query_pos), keys)
