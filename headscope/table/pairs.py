"""A number for every ordered pair of heads, such as a composition score."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from headscope.base.glance import Glance, Shown, number, sizes
from headscope.base.saved import Saved
from headscope.base.statistics import Bounds, top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table.provenance import Provenance
from headscope.table.summary import frozen

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class PairScores(Saved, Shown):
    """One score for every ordered pair of heads.

    Attributes:
        name: of the score.
        values: of the pair (first layer, first head, second layer, second head).
        unit: of the values.
        bounds: smallest and largest possible value; None where there is none.
        upward: only pairs whose first head lies in a lower layer exist; other cells are 0.
        description: what a high value means, in one sentence.
        source: paper and definition.
        provenance: where it came from.
    """

    name: str
    values: Float[np.ndarray, "layer head layer head"]
    unit: str = ""
    bounds: Bounds = (None, None)
    upward: bool = True
    description: str = ""
    source: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape; freeze the array."""
        shape = self.values.shape
        if len(shape) != 4 or shape[:2] != shape[2:]:
            raise InputError(f"{self.name!r} is [layer head layer head]; got shape {shape}.")
        object.__setattr__(self, "values", frozen(self.values, np.float64))

    @property
    def present(self) -> Bool[np.ndarray, "layer head layer head"]:
        """Pairs that exist and have a value."""
        known: np.ndarray = ~np.isnan(self.values)
        if not self.upward:
            return known
        layers = np.arange(self.values.shape[0])
        below: np.ndarray = (layers[:, None] < layers)[:, None, :, None]
        known &= below
        return known

    def top(self, k: int = 10) -> list[tuple[HeadIndex, HeadIndex, float]]:
        """The k largest pairs, largest first; ties by lowest heads; pairs that exist only."""
        masked = np.where(self.present, self.values, np.nan)
        found = np.unravel_index(top_order(masked, k), masked.shape)
        return [
            (HeadIndex(i, j), HeadIndex(m, n), float(self.values[i, j, m, n]))
            for i, j, m, n in zip(*(axis.tolist() for axis in found), strict=True)
        ]

    def glance(self) -> Glance:
        """The largest pairs."""
        layers, heads = self.values.shape[:2]
        return Glance(
            self.name,
            [
                f"{int(self.present.sum()):,} pairs of heads",
                sizes(("layer", "head"), (layers, heads)),
                self.unit,
                self.provenance.model,
            ],
            ("first", "second", "value"),
            [(str(one), str(other), number(value)) for one, other, value in self.top(10)],
            hint="hs.plots.composition_matrix(pairs), hs.plots.composition_graph(pairs)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per existing pair: first, second (``L0H1``), their numbers, and the value."""
        import pandas

        axes = np.nonzero(self.present)
        names = ("first_layer", "first_head", "second_layer", "second_head")
        columns: dict[str, object] = dict(zip(names, axes, strict=True))
        for side, at in (("first", axes[:2]), ("second", axes[2:])):
            columns[side] = [f"L{layer}H{head}" for layer, head in zip(*at, strict=True)]
        return pandas.DataFrame({**columns, "score": self.name, "value": self.values[axes]})
