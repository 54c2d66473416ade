"""Effects of interventions: on any grid, as curves over orders of heads, and per token."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from headscope.base.files import Saved, read_only, read_parquet, whole_file
from headscope.base.result import (
    Drawn,
    Glance,
    Grid,
    Section,
    Shown,
    Tabular,
    Words,
    counted,
    number,
    shaded,
    sizes,
)
from headscope.base.specs import Provenance, ScoreSpec, Specified, specified
from headscope.base.statistics import Design, compare_means, mean_and_sem, mean_interval, top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class EffectGrid(Specified, Saved, Shown, Tabular):
    """Effect of interventions on a metric, per cell of a grid and example.

    Attributes:
        spec: name of the intervention, unit of the metric, and what a positive effect means.
        axes: axes of the grid, e.g. ``("layer", "position")``.
        labels: labels of the cells along every axis.
        per_example: effects, edited minus unedited run; NaN where there is no such cell.
        unedited: the metric before the edit.
        pair: the metric on the clean and on the corrupt run of a pair; None without a pair.
        provenance: where it came from.
        clusters: label per example; examples with the same label count as one observation in
            errors, intervals and tests. None: all examples are independent.
    """

    spec: ScoreSpec
    axes: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    per_example: Float[np.ndarray, "*cell example"]
    unedited: Float[np.ndarray, " example"]
    pair: Float[np.ndarray, "2 example"] | None = None
    provenance: Provenance = field(default_factory=Provenance)
    clusters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the shape and freeze the arrays."""
        shape = (*(len(names) for names in self.labels), len(self.unedited))
        if self.per_example.shape != shape or len(self.axes) != len(self.labels):
            raise InputError(
                f"{self.name!r}: effects of shape {self.per_example.shape} do not fit the labels "
                f"and examples {shape}."
            )
        for name in ("per_example", "unedited", "pair"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, read_only(values, np.float64))

    @classmethod
    def _of_parts(cls, parts: dict[str, Any]) -> "EffectGrid":
        return cls(**specified(parts))

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
        """Two-sided p-value of no effect, per cell; NaN with too few examples.

        The test is chosen by :func:`headscope.base.statistics.compare_means`.
        """
        none = np.zeros((*self.per_example.shape[:-1], 1))
        design = Design(clusters=self.clusters)
        return compare_means(self.per_example, none, "two-sided", design).p

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "*cell"], Float[np.ndarray, "*cell"]]:
        """Confidence interval of the mean: lower and upper end.

        Student's t, widened for skewness; see :func:`headscope.base.statistics.mean_interval`.
        """
        return mean_interval(self.per_example, level, self.clusters)

    def normalised(self, tolerance: float = 1e-6) -> Float[np.ndarray, "*cell"]:
        """Position of the edited run between the corrupt (0) and the clean run (1).

        ``(edited - corrupt) / (clean - corrupt)``, each a mean over examples; NaN if clean and
        corrupt differ by less than ``tolerance``.

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
        """Show mean effects: as a picture for one or two axes, otherwise the largest cells."""
        scale = f"{self.unit or 'metric'}, mean of {counted(len(self.unedited))}"
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


@dataclass(frozen=True, eq=False, repr=False)
class BackPatch(Saved, Shown, Tabular):
    """Effects of copying a layer's states back to earlier layers, with the best pair held out.

    Attributes:
        effects: change of the metric, by source and destination.
        null: the same with states of another prompt.
        pair: source and destination with the largest mean effect on the even examples.
        held_out: effects of that pair on the odd examples.
        null_held_out: the same for the null.
    """

    effects: EffectGrid
    null: EffectGrid
    pair: tuple[int, int]
    held_out: Float[np.ndarray, " example"]
    null_held_out: Float[np.ndarray, " example"]

    @classmethod
    def of(
        cls, effects: EffectGrid, null: EffectGrid, cells: Sequence[tuple[int, int]]
    ) -> "BackPatch":
        """Choose the pair on the even examples; on ties the first."""
        names = effects.labels[0]
        places = [(names.index(f"L{s}"), names.index(f"L{d}")) for s, d in cells]
        means = [float(effects.per_example[at][0::2].mean()) for at in places]
        best = places[int(np.argmax(means))]
        return cls(
            effects,
            null,
            cells[places.index(best)],
            effects.per_example[best][1::2],
            null.per_example[best][1::2],
        )

    def glance(self) -> Glance:
        """Show the chosen pair and its effect on the held-out examples."""
        both = mean_and_sem(np.stack([self.held_out, self.null_held_out]))
        names = ("on the examples held out", "states of another prompt")
        rows = [
            (name, number(float(mean)), number(float(sem)))
            for name, mean, sem in zip(names, both.mean, both.sem, strict=True)
        ]
        return Glance(
            f"back-patching from L{self.pair[0]} to L{self.pair[1]}",
            [f"chosen on half of {len(self.effects.unedited)} examples", self.effects.unit],
            ("effect", "mean", "error"),
            rows,
            hint="hs.plots.heatmap(found.effects), found.held_out",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per pair of layers: effect and null."""
        frame = self.effects.to_pandas()
        return frame.assign(null=self.null.mean.ravel())


_SUFFIXES = (".parquet", ".csv")
Curve = TypeVar("Curve", bound="OrderCurve")


@dataclass(frozen=True, eq=False, repr=False)
class OrderCurve(Shown, Tabular):
    """A metric against the number of edited heads, for several orders of heads.

    Draw it with ``hs.plots.curves(curve.effects, ...)``.

    Attributes:
        effects: edited minus clean run; axes ``arm`` and number of heads, named after what is done
            to them, e.g. ``masked``; NaN beyond the end of an order.
        orders: heads of every arm, in the order in which they are edited.
        controls: names of the arms in random order.
    """

    effects: EffectGrid
    orders: Mapping[str, tuple[HeadIndex, ...]]
    controls: tuple[str, ...]

    def glance(self) -> Glance:
        """Show the metric of every arm at a few numbers of heads."""
        counts, grid = self.counts, self.effects
        chosen = sorted({round(at) for at in np.linspace(0, len(counts) - 1, 5)})
        return Glance(
            f"{grid.name} along {len(grid.labels[0])} orders",
            [
                f"up to {counts[-1]} heads {grid.axes[1]}",
                f"mean of {counted(grid.per_example.shape[-1])}",
                grid.unit,
                grid.provenance.model,
            ],
            (f"heads {grid.axes[1]}", *(str(counts[at]) for at in chosen)),
            [
                (
                    f"{arm} (control)" if arm in self.controls else arm,
                    *(number(float(values[at])) for at in chosen),
                )
                for arm, values in zip(grid.labels[0], self.mean, strict=True)
            ],
            hint="hs.plots.curves(curve.effects), curve.to_pandas()",
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of edited heads."""
        return tuple(int(label) for label in self.effects.labels[1])

    @property
    def per_example(self) -> Float[np.ndarray, "arm point example"]:
        """Values of the metric per example."""
        return np.asarray(self.effects.per_example + self.effects.unedited)

    @property
    def mean(self) -> Float[np.ndarray, "arm point"]:
        """Mean of the metric over examples."""
        return mean_and_sem(self.per_example).mean

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "arm point"], Float[np.ndarray, "arm point"]]:
        """Confidence interval of the mean over examples: lower and upper end.

        Student's t, widened for skewness; see :func:`headscope.base.statistics.mean_interval`.
        """
        return mean_interval(self.per_example, level, self.effects.clusters)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per arm and number of heads.

        Columns: arm, control, the number (named after the second axis), head (the last one edited),
        mean, sem, low and high (95% interval), effect.
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

        Parquet also stores the values per example and everything else that :meth:`load` needs.

        Raises:
            InputError: for another file name extension.
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
        """Load a curve that :meth:`save` wrote as Parquet.

        Raises:
            InputError: if the file holds no curve, or another kind of curve.
        """
        effects, facts = read_curve(Path(path), cls.__name__)
        try:
            return cls(effects=effects, **cls._read(facts))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{str(path)!r} is a damaged curve: {error!r}.") from None

    def _facts(self) -> dict[str, Any]:
        """Everything but the effects, as JSON values."""
        return {
            "kind": type(self).__name__,
            "orders": {arm: [str(head) for head in order] for arm, order in self.orders.items()},
            "controls": list(self.controls),
        }

    @classmethod
    def _read(cls, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments from what :meth:`_facts` wrote."""
        orders = facts["orders"].items()
        return {
            "orders": {arm: tuple(HeadIndex.parse(one) for one in order) for arm, order in orders},
            "controls": tuple(facts["controls"]),
        }


_KEY = b"headscope"
_FORMAT = 1
_EXAMPLES = "effect_per_example"
_MAX_CELLS = 50_000_000  # a file from elsewhere must not make us allocate what it likes


def write_curve(
    effects: EffectGrid, frame: "pandas.DataFrame", facts: Mapping[str, Any], file: IO[bytes]
) -> None:
    """Write the rows of a curve, its effects per example, and its metadata.

    Args:
        effects: effects of the curve; axes arm and number.
        frame: a row for every measured arm and number.
        facts: JSON values, with the ``kind`` of curve.
        file: path to write to.
    """
    import pyarrow
    from pyarrow import parquet

    arms, counts = effects.labels
    at = [
        (arms.index(arm), counts.index(str(count)))
        for arm, count in zip(frame.arm, frame[effects.axes[1]], strict=True)
    ]
    kept = np.stack([effects.per_example[place] for place in at])
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    lists = pyarrow.array([[_plain(one) for one in row] for row in kept.tolist()])
    table = table.append_column(_EXAMPLES, lists)
    head = {
        "format": _FORMAT,
        **facts,
        **effects.spec.to_json(),
        "axes": list(effects.axes),
        "labels": [list(names) for names in effects.labels],
        "unedited": [_plain(one) for one in effects.unedited.tolist()],
        "provenance": effects.provenance.to_json(),
        "clusters": effects.clusters,
    }
    known = {_KEY: json.dumps(head, allow_nan=False).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **known})
    parquet.write_table(table, file, compression="zstd")


def read_curve(path: Path, kind: str) -> tuple[EffectGrid, dict[str, Any]]:
    """Read effects and facts written by :func:`write_curve`.

    Raises:
        InputError: if the file is not a curve, is damaged, or holds another kind of curve.
    """
    import pyarrow

    rows = read_parquet(path)
    if _KEY not in (rows.schema.metadata or {}):
        raise InputError(f"{str(path)!r} is parquet, but not a curve that headscope saved.")
    try:
        facts: dict[str, Any] = json.loads(rows.schema.metadata[_KEY])
        if facts["format"] != _FORMAT or facts.get("kind") != kind:
            raise InputError(
                f"{str(path)!r} holds {facts.get('kind') or 'a table'} of format "
                f"{facts['format']}; here {kind} of format {_FORMAT} is read."
            )
        arms, counts = (tuple(str(one) for one in names) for names in facts["labels"])
        unedited = np.array(facts["unedited"], dtype=float)
        if len(arms) * len(counts) * len(unedited) > _MAX_CELLS:
            raise InputError(f"{str(path)!r} claims {len(arms)} arms of {len(counts)} points.")
        grid = np.full((len(arms), len(counts), len(unedited)), np.nan)
        axes = tuple(str(one) for one in facts["axes"])
        columns = (rows[name].to_pylist() for name in ("arm", axes[1], _EXAMPLES))
        for arm, count, values in zip(*columns, strict=True):
            grid[arms.index(arm), counts.index(str(count))] = np.array(values, dtype=float)
        effects = EffectGrid(
            spec=specified(facts)["spec"],
            axes=axes,
            labels=(arms, counts),
            per_example=grid,
            unedited=unedited,
            provenance=Provenance.from_json(facts["provenance"]),
            clusters=_labels(facts.get("clusters")),
        )
    except InputError:
        raise
    except (
        *(KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError),
        *(RecursionError, MemoryError, pyarrow.ArrowException),
    ) as error:
        raise InputError(f"{str(path)!r} is a damaged curve: {error!r}.") from None
    return effects, facts


def _labels(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(one) for one in values)


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value


@dataclass(frozen=True, eq=False, repr=False)
class TokenLosses(Saved, Shown):
    """Cross-entropy of each token given the ones before it, in nats.

    Attributes:
        arms: names of the arms; the first is the whole model.
        losses: NaN for a text's first token and beyond its end.
        model: its name.
    """

    arms: tuple[str, ...]
    losses: Float[np.ndarray, "arm example token"]
    model: str = ""

    def glance(self) -> Glance:
        """Show the mean loss of each arm."""
        return Glance(
            "loss by token",
            [sizes(("arm", "text", "token"), self.losses.shape), "nats", self.model],
            ("arm", "mean loss"),
            [
                (name, number(float(np.nanmean(one))) if np.isfinite(one).any() else "-")
                for name, one in zip(self.arms, self.losses, strict=True)
            ],
            hint="hs.plots.token_losses(losses), losses.score(early=50, late=500)",
        )

    @property
    def mean(self) -> Float[np.ndarray, "arm token"]:
        """Mean over texts; NaN if no text has a value."""
        return mean_and_sem(self.losses.swapaxes(1, 2)).mean

    @property
    def sem(self) -> Float[np.ndarray, "arm token"]:
        """Standard error of the mean."""
        return mean_and_sem(self.losses.swapaxes(1, 2)).sem

    def score(self, early: int = 50, late: int = 500) -> Float[np.ndarray, "arm example"]:
        """In-context-learning score: loss of a late token minus that of an early one.

        Raises:
            InputError: if the texts are too short for that.
        """
        most = self.losses.shape[2] - 1
        if not 1 <= early < late <= most:
            raise InputError(f"early={early}, late={late}: tokens 1 to {most} have a loss.")
        return np.asarray(self.losses[..., late] - self.losses[..., early])


@dataclass(frozen=True, eq=False, repr=False)
class RecallGrid(Saved, Shown, Tabular):
    """Share of correct answers by text length and needle depth.

    Attributes:
        lengths: maximum number of tokens of a text, as requested.
        depths: share of the text before the needle.
        share: share of answers whose recall is above ``threshold``; NaN where there were none.
        count: number of answers.
        threshold: threshold of the recall.
        provenance: where it came from.
    """

    lengths: Float[np.ndarray, " length"]
    depths: Float[np.ndarray, " depth"]
    share: Float[np.ndarray, "length depth"]
    count: Int[np.ndarray, "length depth"]
    threshold: float
    provenance: Provenance = field(default_factory=Provenance)

    def sections(self) -> list[Section]:
        """Report how many answers were correct, and where."""
        beyond = self.provenance.probe.get("extrapolated_from")
        counted = (
            f"{int(self.count.sum())} texts, {float(np.nanmean(self.share)):.0%} answered right."
        )
        if beyond is not None:
            counted += (
                f" The model was trained on at most {beyond} tokens; positions were extrapolated."
            )
        drawn = Drawn("recall", "Answers by length and depth.")
        return [Section("Where needles are found", [Words(counted), drawn])]

    def glance(self) -> Glance:
        """Show the share of correct answers by length and depth."""
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
