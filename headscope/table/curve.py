"""A metric against the number of heads that were taken, in several orders and random ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float

from headscope.base.statistics import mean_and_sem, mean_interval
from headscope.errors import InputError
from headscope.files import whole_file
from headscope.heads import HeadIndex
from headscope.table.curve_file import read_curve, write_curve
from headscope.table.effects import EffectGrid

if TYPE_CHECKING:
    import pandas

_SUFFIXES = (".parquet", ".csv")
Curve = TypeVar("Curve", bound="OrderCurve")


@dataclass(frozen=True, eq=False)
class OrderCurve:
    """A metric against heads taken. Draw it with ``hs.plots.curves(curve.effects, ...)``.

    Attributes:
        effects: edited run less clean run; axes ``arm`` and what was done to the heads, e.g.
            ``masked``; NaN where an order ends.
        orders: heads of every arm, the first to be taken first.
        controls: names of the arms in random order.
    """

    effects: EffectGrid
    orders: Mapping[str, tuple[HeadIndex, ...]]
    controls: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of heads taken."""
        return tuple(int(label) for label in self.effects.labels[1])

    @property
    def per_example(self) -> Float[np.ndarray, "arm point example"]:
        """The metric itself."""
        return np.asarray(self.effects.per_example + self.effects.unedited)

    @property
    def mean(self) -> Float[np.ndarray, "arm point"]:
        """Mean of the metric over examples."""
        return mean_and_sem(self.per_example).mean

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "arm point"], Float[np.ndarray, "arm point"]]:
        """Confidence interval of the mean over examples, lower and upper end.

        Student's t, widened for skewness; see :func:`headscope.base.statistics.mean_interval`.
        """
        return mean_interval(self.per_example, level, self.effects.clusters)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per arm and number of heads.

        Columns: arm, control, the number (named as the second axis), head (the last one that was
        taken), mean, sem, low and high (95% interval), effect.
        """
        import pandas

        low, high = self.interval()
        sem = mean_and_sem(self.per_example, self.effects.clusters).sem
        rows = []
        for i, arm in enumerate(self.effects.labels[0]):
            for j, count in enumerate(self.counts):
                if count > len(self.orders[arm]):
                    continue
                rows.append(
                    {
                        "arm": arm,
                        "control": arm in self.controls,
                        self.effects.axes[1]: count,
                        "head": str(self.orders[arm][count - 1]) if count else "",
                        "mean": self.mean[i, j],
                        "sem": sem[i, j],
                        "low": low[i, j],
                        "high": high[i, j],
                        "effect": self.effects.mean[i, j],
                    }
                )
        return pandas.DataFrame(rows)

    def save(self, path: "str | PathLike[str]") -> None:
        """Write :meth:`to_pandas` as ``.parquet`` or ``.csv``, atomically.

        Parquet also keeps the values per example and everything else that :meth:`load` needs.

        Raises:
            InputError: for another ending.
        """
        target = Path(path)
        if target.suffix not in _SUFFIXES:
            raise InputError(f"a curve is saved as {' or '.join(_SUFFIXES)}, not {target.name!r}.")
        frame = self.to_pandas()
        with whole_file(target) as file:
            if target.suffix == ".csv":
                frame.to_csv(file, index=False)
            else:
                write_curve(self.effects, frame, self._facts(), file)

    @classmethod
    def load(cls: type[Curve], path: "str | PathLike[str]") -> Curve:
        """Read a curve that :meth:`save` wrote as parquet.

        Raises:
            InputError: if the file is none, or a curve of another kind.
        """
        effects, facts = read_curve(Path(path), cls.__name__)
        try:
            return cls(effects=effects, **cls._read(facts))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{str(path)!r} is a damaged curve: {error!r}.") from None

    def _facts(self) -> dict[str, Any]:
        """What is not in the effects, as JSON values."""
        return {
            "kind": type(self).__name__,
            "orders": {arm: [str(head) for head in order] for arm, order in self.orders.items()},
            "controls": list(self.controls),
        }

    @classmethod
    def _read(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that :meth:`_facts` wrote down."""
        orders = facts["orders"].items()
        return {
            "orders": {arm: tuple(HeadIndex.parse(one) for one in order) for arm, order in orders},
            "controls": tuple(facts["controls"]),
        }
