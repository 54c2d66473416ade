"""What a gradient scorer sees: head outputs, and the gradient of a metric by them."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadGradients:
    """Head outputs of one layer and the gradient of a metric by them. Never write to them.

    Attributes:
        layer: its number.
        query_pos: positions, ascending.
        z: what each head gives before the output projection, in fp32.
        gradient: derivative of the example's metric by ``z``, all later layers included.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    z: Float[Tensor, "batch query head d_head"]
    gradient: Float[Tensor, "batch query head d_head"]
