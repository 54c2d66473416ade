"""Large matrices made small enough to look at."""

import numpy as np
from jaxtyping import Float


def block_max(
    cells: Float[np.ndarray, "row column"], block: int
) -> Float[np.ndarray, "down across"]:
    """Largest value of every block x block square; the last ones may be smaller."""
    if block == 1:
        return cells
    for axis in (0, 1):
        cells = np.maximum.reduceat(cells, np.arange(0, cells.shape[axis], block), axis)
    return cells
