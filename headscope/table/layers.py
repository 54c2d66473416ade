"""Measures of layers: one curve per measure over the places of the residual stream."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from headscope.base.files import whole_file
from headscope.base.glance import Glance, Shown, number
from headscope.base.parquet_files import read_parquet
from headscope.base.result import Tabular
from headscope.base.specs import Provenance
from headscope.base.statistics import Bounds, mean_interval
from headscope.errors import InputError, nearest
from headscope.table.table import UnknownScoreError

if TYPE_CHECKING:
    import pandas

_KEY = b"headscope"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerMeasure:
    """One measure at every place of the residual stream.

    Attributes:
        name: of the measure.
        per_text: its value for every text; NaN is missing. A measure of all texts together has a
            single column.
        unit: of the values.
        bounds: smallest and largest possible value; None where there is none.
        description: what a high value means, in one sentence.
        source: paper and definition.
    """

    name: str
    per_text: Float[np.ndarray, "place text"]
    unit: str = ""
    bounds: Bounds = (None, None)
    description: str = ""
    source: str = ""

    @property
    def mean(self) -> Float[np.ndarray, " place"]:
        """Mean over texts; NaN where no text has a value."""
        known = ~np.isnan(self.per_text)
        total = np.where(known, self.per_text, 0.0).sum(1)
        with np.errstate(invalid="ignore"):
            mean: Float[np.ndarray, " place"] = total / np.where(known.any(1), known.sum(1), np.nan)
        return mean

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, " place"], Float[np.ndarray, " place"]]:
        """Confidence interval of the mean over texts; NaN with fewer than two."""
        return mean_interval(self.per_text, level, bounds=self.bounds)


@dataclass(frozen=True, eq=False, repr=False)
class LayerTable(Shown, Tabular, Mapping[str, LayerMeasure]):
    """Measures by name, over the places of one model's residual stream.

    Attributes:
        places: names of the places: ``embed``, then ``L0`` and so on for what leaves a block.
        measures: in order.
        provenance: where it came from.

    Example:
        >>> table = hs.geometry.layers(model, ["The cat sat on the mat. The dog ran."] * 2)
        >>> table.places[0], table["curvature"].mean.shape == (model.shape.n_layers + 1,)
        ('embed', True)
    """

    places: tuple[str, ...]
    measures: tuple[LayerMeasure, ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check that every measure has a value at every place.

        Raises:
            InputError: if not, or if two share a name.
        """
        names = [measure.name for measure in self.measures]
        if len(set(names)) < len(names):
            raise InputError(f"two measures share a name: {', '.join(names)}.")
        for measure in self.measures:
            if len(measure.per_text) != len(self.places):
                raise InputError(
                    f"{measure.name!r} has {len(measure.per_text)} values for "
                    f"{len(self.places)} places."
                )

    def __getitem__(self, name: str) -> LayerMeasure:
        """Return one measure; an unknown name raises InputError with the nearest one."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise UnknownScoreError(nearest(name, list(self), kind="measure"))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in order."""
        return iter(measure.name for measure in self.measures)

    def __len__(self) -> int:
        """Return the number of measures."""
        return len(self.measures)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per place and measure: mean, ends of the 95% interval, number of texts."""
        import pandas

        frames = []
        for measure in self.measures:
            low, high = measure.interval()
            columns = {
                "place": list(self.places),
                "measure": measure.name,
                "mean": measure.mean,
                "low": low,
                "high": high,
                "n": (~np.isnan(measure.per_text)).sum(1),
                "unit": measure.unit,
            }
            frames.append(pandas.DataFrame(columns))
        return pandas.concat(frames, ignore_index=True)

    def save(self, path: "str | PathLike[str]") -> None:
        """Write one parquet file: a row per measure and place, with the value of every text."""
        import pyarrow
        from pyarrow import parquet

        rows = pyarrow.table(
            {
                "measure": [m.name for m in self.measures for _ in self.places],
                "place": [place for _ in self.measures for place in self.places],
                "per_text": pyarrow.array(
                    [row for m in self.measures for row in m.per_text.tolist()],
                    pyarrow.list_(pyarrow.float64()),
                ),
            }
        )
        facts = {
            "format": _FORMAT,
            "kind": "layers",
            "places": list(self.places),
            "measures": [
                {
                    "name": m.name,
                    "unit": m.unit,
                    "bounds": list(m.bounds),
                    "description": m.description,
                    "source": m.source,
                }
                for m in self.measures
            ],
            "provenance": self.provenance.to_json(),
        }
        rows = rows.replace_schema_metadata({_KEY: json.dumps(facts, allow_nan=False)})
        with whole_file(Path(path)) as file:
            parquet.write_table(rows, file, compression="zstd")

    @staticmethod
    def load(path: "str | PathLike[str]") -> "LayerTable":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: if the file is missing, is not such a table, or is damaged.
        """
        shown = repr(str(path))
        rows = read_parquet(Path(path))
        try:
            facts: dict[str, Any] = json.loads((rows.schema.metadata or {})[_KEY])
            if facts["format"] != _FORMAT or facts["kind"] != "layers":
                raise InputError(f"{shown} does not hold measures of layers of format {_FORMAT}.")
            places = tuple(str(place) for place in facts["places"])
            values = np.array(rows["per_text"].to_pylist(), dtype=object)
            return LayerTable(
                places,
                tuple(
                    _measure(said, values[n * len(places) : (n + 1) * len(places)])
                    for n, said in enumerate(facts["measures"])
                ),
                Provenance.from_json(facts["provenance"]),
            )
        except InputError:
            raise
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise InputError(f"{shown} is a damaged table of layers: {error!r}.") from None

    def glance(self) -> Glance:
        """Mean of every measure at the first, middle and last place."""
        chosen = sorted({0, len(self.places) // 2, len(self.places) - 1})
        return Glance(
            "Measures of layers",
            [self.provenance.model or "", f"{len(self.places)} places"],
            ["measure", *(self.places[at] for at in chosen), "unit"],
            [
                [m.name, *(number(float(m.mean[at])) for at in chosen), m.unit]
                for m in self.measures
            ],
            hint="hs.plots.layers(table); table.to_pandas()",
            whole=True,
        )


def _measure(said: Mapping[str, Any], rows: Iterable[Any]) -> LayerMeasure:
    low, high = said["bounds"]
    return LayerMeasure(
        name=str(said["name"]),
        per_text=np.array([np.array(row, dtype=float) for row in rows]),
        unit=str(said["unit"]),
        bounds=(low, high),
        description=str(said["description"]),
        source=str(said["source"]),
    )
