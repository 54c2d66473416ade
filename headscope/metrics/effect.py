"""How much of a difference between two runs an edit makes up for."""

from jaxtyping import Float
from torch import Tensor


def normalised_effect(
    value: Float[Tensor, "*any"],
    clean: Float[Tensor, "*any"],
    baseline: Float[Tensor, "*any"],
    tolerance: float = 1e-6,
) -> Float[Tensor, "*any"]:
    """``(value - baseline) / (clean - baseline)``: 1 as in the clean run, 0 as in the baseline.

    NaN where clean and baseline are less than ``tolerance`` apart.

    Example:
        >>> float(normalised_effect(*torch.tensor([3.0, 4.0, 2.0])))
        0.5
    """
    span = clean - baseline
    ratio = (value - baseline) / span
    return ratio.masked_fill(span.abs() < tolerance, float("nan"))
