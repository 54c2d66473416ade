"""How often a model answered, by the length of the text and the depth of the needle."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from headscope.base.glance import Glance, Shown, number, shaded, sizes
from headscope.base.saved import Saved
from headscope.table.provenance import Provenance

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class RecallGrid(Saved, Shown):
    """Share of right answers in every cell.

    Attributes:
        lengths: tokens of a text at most, as asked for.
        depths: shares of the text before the needle.
        share: of answers whose recall is above ``threshold``; NaN where there were none.
        count: answers.
        threshold: of the recall.
        provenance: where it came from.
    """

    lengths: Float[np.ndarray, " length"]
    depths: Float[np.ndarray, " depth"]
    share: Float[np.ndarray, "length depth"]
    count: Int[np.ndarray, "length depth"]
    threshold: float
    provenance: Provenance = field(default_factory=Provenance)

    def glance(self) -> Glance:
        """Share of right answers by length and depth."""
        lengths = [f"{int(one)} tokens" for one in self.lengths]
        depths = [f"{one:.0%}" for one in self.depths.tolist()]
        rows = [
            (name, *(number(one) for one in row))
            for name, row in zip(lengths, self.share.tolist(), strict=True)
        ]
        return Glance(
            "needle recall",
            [sizes(("length", "depth"), self.share.shape), self.provenance.model],
            ("", *depths),
            rows,
            shaded(lengths, depths, self.share.tolist()),
            hint="hs.plots.recall_grid(grid), grid.to_pandas()",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per cell: length, depth, share, count."""
        import pandas

        at = [(i, j) for i in range(len(self.lengths)) for j in range(len(self.depths))]
        return pandas.DataFrame(
            {
                "length": [int(self.lengths[i]) for i, _ in at],
                "depth": [float(self.depths[j]) for _, j in at],
                "share": self.share.ravel(),
                "count": self.count.ravel(),
            }
        )
