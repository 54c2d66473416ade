"""Effects of interventions on any grid: groups of heads, layers by positions, sites."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from headscope.base.glance import Glance, Grid, Shown, number, shaded, sizes
from headscope.base.saved import Saved
from headscope.base.statistics import Design, compare_means, mean_and_sem, mean_interval, top_order
from headscope.errors import InputError
from headscope.table.provenance import Provenance
from headscope.table.summary import frozen

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class EffectGrid(Saved, Shown):
    """What interventions do to a metric: edited run less unedited run, per cell and example.

    Attributes:
        name: of the intervention.
        axes: what the axes of the grid are, e.g. ``("layer", "position")``.
        labels: names of the cells along every axis.
        per_example: effects; NaN where there is no such cell.
        unedited: the metric on the run that was edited, before it was.
        pair: the metric on the clean and on the corrupt run of a pair; None where there is none.
        unit: of the metric.
        description: what a positive effect means.
        provenance: where it came from.
        clusters: label per example; those with one label count as one observation in errors,
            intervals and tests. None: every example stands for itself.
    """

    name: str
    axes: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    per_example: Float[np.ndarray, "*cell example"]
    unedited: Float[np.ndarray, " example"]
    pair: Float[np.ndarray, "2 example"] | None = None
    unit: str = ""
    description: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    clusters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the shape; freeze the arrays."""
        shape = (*(len(names) for names in self.labels), len(self.unedited))
        if self.per_example.shape != shape or len(self.axes) != len(self.labels):
            raise InputError(
                f"{self.name!r}: effects of shape {self.per_example.shape} do not fit the labels "
                f"and examples {shape}."
            )
        for name in ("per_example", "unedited", "pair"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, frozen(values, np.float64))

    @cached_property
    def mean(self) -> Float[np.ndarray, "*cell"]:
        """Mean effect over examples."""
        return mean_and_sem(self.per_example).mean

    @cached_property
    def sem(self) -> Float[np.ndarray, "*cell"]:
        """Standard error of the mean; NaN with fewer than two examples."""
        return mean_and_sem(self.per_example, self.clusters).sem

    @cached_property
    def p_value(self) -> Float[np.ndarray, "*cell"]:
        """Two-sided test of no effect, one cell at a time; NaN where examples are too few.

        Which test: :func:`headscope.base.statistics.compare_means`.
        """
        none = np.zeros((*self.per_example.shape[:-1], 1))
        design = Design(clusters=self.clusters)
        return compare_means(self.per_example, none, "two-sided", design).p

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
        """Confidence interval of the mean, lower and upper end.

        Student's t, widened for skewness; see :func:`headscope.base.statistics.mean_interval`.
        """
        return mean_interval(self.per_example, level, self.clusters)

    def normalised(self, tolerance: float = 1e-6) -> Float[np.ndarray, "*cell"]:
        """Where the edited run stands: 1 as in the clean run, 0 as in the corrupt one.

        ``(edited - corrupt) / (clean - corrupt)``, each a mean over examples; NaN where clean and
        corrupt are less than ``tolerance`` apart.

        Raises:
            InputError: if there is no pair.
        """
        if self.pair is None:
            raise InputError(f"{self.name!r} has no paired run to normalise by.")
        clean, corrupt = (float(np.nanmean(run)) for run in self.pair)
        if abs(clean - corrupt) < tolerance:
            return np.full(self.mean.shape, np.nan)
        edited = self.mean + float(np.nanmean(self.unedited))
        return np.asarray((edited - corrupt) / (clean - corrupt))

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k cells with the largest absolute mean, largest first, by their labels."""
        cells = np.unravel_index(top_order(np.abs(self.mean), k), self.mean.shape)
        places = zip(*(axis.tolist() for axis in cells), strict=True)
        return [(" ".join(self._names(at)), float(self.mean[at])) for at in places]

    def glance(self) -> Glance:
        """Mean effects: a picture where there are one or two axes, else the largest cells."""
        scale = f"{self.unit or 'metric'}, mean of {len(self.unedited)} examples"
        return Glance(
            self.name,
            [sizes(self.axes, self.mean.shape), scale, self.provenance.model],
            (" ".join(self.axes), "effect"),
            [(cell, number(value)) for cell, value in self.top(6)],
            self._grid(),
            hint="hs.plots.heatmap(effects), effects.top(10), effects.to_pandas()",
        )

    def _grid(self) -> Grid | None:
        if self.mean.ndim == 1:
            return shaded([self.axes[0]], self.labels[0], [self.mean.tolist()])
        if self.mean.ndim != 2:
            return None
        rows, columns = self.labels
        return shaded(rows, columns, self.mean.tolist())

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per cell: a column per axis, then mean, sem and p_value."""
        import pandas

        places = list(np.ndindex(self.mean.shape))
        columns: dict[str, object] = {
            axis: [self.labels[i][at[i]] for at in places] for i, axis in enumerate(self.axes)
        }
        for name in ("mean", "sem", "p_value"):
            columns[name] = getattr(self, name).ravel()
        return pandas.DataFrame(columns)

    def _names(self, at: Sequence[int]) -> list[str]:
        return [names[i] for names, i in zip(self.labels, at, strict=True)]
