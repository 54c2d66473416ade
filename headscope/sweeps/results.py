"""Results of a sweep as scores, effects and curves, and export to other formats.

Scores of single heads, effects of groups, curves.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from headscope.base.arguments import checked
from headscope.base.files import whole_path, writable_folder
from headscope.base.specs import ScoreSpec
from headscope.base.statistics import Design, mean_interval
from headscope.errors import InputError, WriteError, nearest
from headscope.sweeps.config import EDGES, circuit_set
from headscope.sweeps.plan import Plan, PlannedModel
from headscope.sweeps.store import Store
from headscope.table import EffectGrid, HeadScores, HeadTable, Provenance
from headscope.table.edges import Checks, Circuit, EdgeGraph, Wiring

if TYPE_CHECKING:
    import pandas
    import pyarrow


_STUDY = ("model", "probe", "edit", "seed", "metric")


@checked
def read(folder: str | Path) -> "Results":
    """Load what a sweep has computed so far.

    Args:
        folder: folder of the sweep.

    Returns:
        Results of all finished chunks.

    Raises:
        InputError: if the folder holds no sweep.

    Example:
        >>> import headscope as hs
        >>> results = hs.sweeps.read("runs/ioi-all-heads")  # doctest: +SKIP
        >>> hs.plots.heatmap(results.scores(metric="logit_difference"))  # doctest: +SKIP
    """
    store = Store.open(Path(folder))
    plan = store.plan()
    config = store.manifest()["config"]
    sets = config["sets"] if config.get("edits") else []
    arranged = {one["name"]: one.get("arrange", "each") for one in sets}
    return Results(plan, store.rows(plan), arranged)


@dataclass(frozen=True, eq=False)
class Results:
    """Rows of a sweep, with methods to select from them.

    In every method a name can be omitted if the sweep has only one: ``model`` (with ``@checkpoint``
    if there are several), ``probe``, ``edit``, ``seed``, ``metric``, ``set``.

    Attributes:
        plan: what the sweep computes.
        rows: one per finished cell; see :func:`headscope.sweeps.store.row_schema`.
        arranged: set -> ``each``, ``together`` or ``cumulative``.
    """

    plan: Plan
    rows: "pyarrow.Table"
    arranged: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether every cell is finished."""
        return bool(self.rows.num_rows == self.plan.n_cells)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per cell: names, effect, sem, n, p_value, 95% interval; no values per example."""
        frame = self._frame.drop(columns=["effects", "clean_values", "provenance"])
        low, high = intervals(self._frame)
        return frame.assign(low=low, high=high)

    def scores(self, set: str | None = None, **names: str | int) -> HeadScores:
        """Effects of single heads, with their values per example, intervals and p-values.

        Args:
            set: name of a set arranged as ``each``.
            names: which model, probe and so on, as above.

        Raises:
            InputError: if a name is unknown, or omitted where there are several.
        """
        chosen = self._set(set, "each")
        study, rows = self._rows(chosen, names)
        return self._scores(str(study["edit"]) + "_ablation", study, rows)

    def table(self, set: str | None = None, **names: str | int) -> HeadTable:
        """All results of one model and probe as a table; scores are named ``edit:metric``.

        Edits with several seeds are called ``edit#seed:metric``.
        """
        _check_names(names)
        chosen = self._set(set, "each")
        frame = self._of_set(chosen)
        for name in ("model", "probe"):
            frame = frame[frame[name] == self._pick(frame, name, names.pop(name, None))]
        for name, value in names.items():
            frame = frame[frame[name] == self._pick(frame, name, value)]
        seeds = frame.groupby("edit", observed=True)["seed"].nunique()
        several, found = {*seeds.index[seeds > 1]}, []
        for key, rows in frame.groupby(list(_STUDY), sort=False, observed=True):
            study = dict(zip(_STUDY, key, strict=True))
            mark = f"#{study['seed']}" if study["edit"] in several else ""
            found.append(self._scores(f"{study['edit']}{mark}:{study['metric']}", study, rows))
        return HeadTable(found)

    def effects(self, set: str, **names: str | int) -> EffectGrid:
        """Effects of a set that is edited jointly, or along its curve.

        The axes are ``draw`` and ``heads``: the number of edited heads, a single column for a
        group. Contains values per example for intervals and tests.
        """
        self._set(set, "together", "cumulative")
        study, rows = self._rows(set, names)
        counts = sorted(rows["count"].unique())
        draws = sorted(rows["draw"].unique())
        size = int(rows["effects"].map(len).max())
        values = np.full((len(draws), len(counts), size), np.nan)
        for row in rows.itertuples():
            values[draws.index(row.draw), counts.index(row.count)] = _floats(row.effects)
        return EffectGrid(
            spec=ScoreSpec(
                f"{study['edit']}_ablation",
                unit=str(rows["unit"].iloc[0]),
                description=f"{study['metric']} with heads of {set!r} edited minus that without.",
            ),
            axes=("draw", "heads"),
            labels=(tuple(map(str, draws)), tuple(map(str, counts))),
            per_example=values,
            unedited=_floats(rows["clean_values"].iloc[0]),
            provenance=_origin(rows),
            clusters=_clusters(_origin(rows)),
        )

    def edges(self, **names: str | int) -> EdgeGraph:
        """Scores of all edges by one method, as from :func:`headscope.edges.attribute`.

        Args:
            names: names of the study, as above; ``edit`` is the method.

        Raises:
            InputError: if a name is unknown, or omitted where there are several.
        """
        study, rows = self._rows(EDGES, names)
        model, about = self._planned(study), _origin(rows)
        return EdgeGraph(
            Wiring(model.heads, tuple(about.probe["parallel"])),
            about.probe["method"],
            about.probe["ablation"],
            np.stack([_floats(one) for one in rows["effects"]]),
            model.kv_heads,
            about.probe["steps"],
            str(rows["unit"].iloc[0]),
            about,
            _clusters(about),
        )

    def circuit(self, size: int, **names: str | int) -> Circuit:
        """A circuit that was grown from scores, with its checks.

        Args:
            size: requested number of edges, as in the config.
            names: which model, probe and so on, as above; ``edit`` is the method.

        Raises:
            InputError: if a name is unknown, or omitted where there are several.
        """
        return self.circuit_of(circuit_set(size), **names)

    def circuit_of(self, set: str, **names: str | int) -> Circuit:
        """A circuit by the name of its set, such as ``circuit100``."""
        study, rows = self._rows(set, names)
        model, about = self._planned(study), _origin(rows)
        wiring = Wiring(model.heads, tuple(about.probe["parallel"]))
        kept = np.isin([str(edge) for edge in wiring.edges], rows["heads"].iloc[0].split(", "))
        scored = self._frame[self._frame["set"] == EDGES]
        for name in _STUDY:
            scored = scored[scored[name] == study[name]]
        changes = np.full(len(wiring), np.nan)
        if len(scored) == len(wiring):
            changes[:] = scored["effect"]
        full = float(rows["clean"].iloc[0])
        return Circuit(
            wiring,
            kept,
            changes,
            full + float(rows["effect"].iloc[0]),
            full,
            about.probe["empty"],
            f"{about.probe['method']}, grown",
            ablation=about.probe["ablation"],
            unit=str(rows["unit"].iloc[0]),
            provenance=about,
            checks=Checks.from_json(about.probe["checks"]),
        )

    def _planned(self, study: Mapping[str, Any]) -> PlannedModel:
        return next(one for one in self.plan.models if one.label == study["model"])

    @cached_property
    def _frame(self) -> "pandas.DataFrame":
        frame = self.rows.to_pandas()
        checkpoint = frame["checkpoint"].astype(object)
        name = frame["model"].astype(object)
        frame["model"] = name.where(
            checkpoint.isna(), name + "@" + checkpoint.fillna("").astype(str)
        )
        return frame

    def _scores(self, name: str, study: dict[str, Any], rows: "pandas.DataFrame") -> HeadScores:
        """Scores of single heads of one group; unfinished ones are NaN."""
        model = self._planned(study)
        values = np.full((model.layers, model.heads, len(rows["effects"].iloc[0])), np.nan)
        for row in rows.itertuples():
            values[int(row.layer), int(row.head)] = _floats(row.effects)
        return HeadScores.from_effects(
            name,
            values,
            kv_heads=model.kv_heads,
            design=Design(clusters=_clusters(_origin(rows))),
            unit=str(rows["unit"].iloc[0]),
            description=f"{study['metric']} with the head edited ({study['edit']}) minus that "
            "without.",
            source="Michel et al. 2019, arXiv 1905.10650 (ablation)",
            provenance=_origin(rows),
        )

    def _set(self, name: str | None, *arrange: str) -> str:
        """Set by name, or the only one of its kind."""
        fitting = [one for one, kind in self.arranged.items() if kind in arrange]
        if name is None and len(fitting) == 1:
            return fitting[0]
        if name is None:
            raise InputError(
                f"the sweep has {len(fitting)} sets arranged {arrange[0]!r}: say which set, of "
                f"{', '.join(self.arranged)}."
            )
        if name not in self.arranged:
            raise InputError(nearest(name, self.arranged, kind="set"))
        kind = self.arranged[name]
        if kind not in arrange:
            method = "scores" if kind == "each" else "effects"
            raise InputError(f"the set {name!r} is arranged {kind!r}: use {method}().")
        return name

    def _of_set(self, name: str) -> "pandas.DataFrame":
        frame = self._frame[self._frame["set"] == name]
        if frame.empty:
            raise InputError(f"no cell of the set {name!r} is done yet.")
        return frame

    def _rows(
        self, chosen: str, names: dict[str, str | int]
    ) -> tuple[dict[str, Any], "pandas.DataFrame"]:
        """Rows of one group and set."""
        _check_names(names)
        frame, study = self._of_set(chosen), {}
        for name in _STUDY:
            study[name] = self._pick(frame, name, names.get(name))
            frame = frame[frame[name] == study[name]]
        return study, frame

    def _pick(self, frame: "pandas.DataFrame", name: str, value: str | int | None) -> Any:
        """The requested value of a column, or the only one."""
        known = list(dict.fromkeys(frame[name].tolist()))
        if value is None and len(known) == 1:
            return known[0]
        if value is None:
            listed = ", ".join(map(str, known))
            raise InputError(f"the sweep has several of {name}: say which of {listed}.")
        if value not in known:
            raise InputError(nearest(str(value), map(str, known), kind=name))
        return value


def _check_names(names: Iterable[str]) -> None:
    """Refuse names that do not belong to any column."""
    for name in names:
        if name not in _STUDY:
            raise InputError(nearest(name, [*_STUDY, "set"], kind="argument"))


def intervals(
    frame: "pandas.DataFrame",
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """95% intervals of the effects, as :meth:`HeadScores.interval` gives them."""
    low, high = np.full((2, len(frame)), np.nan)
    for (_, origin), at in frame.groupby(
        [frame["effects"].map(len), frame["provenance"].astype(str)], sort=False
    ).indices.items():
        values = np.stack([_floats(frame["effects"].iloc[i]) for i in at])
        clusters = _clusters(Provenance.from_json(json.loads(origin)))
        low[at], high[at] = mean_interval(values, clusters=clusters)
    return low, high


def _floats(values: Any) -> Float[np.ndarray, " example"]:
    """Values of a list; missing ones become NaN."""
    return np.asarray(values, dtype=np.float64)


def _clusters(origin: Provenance) -> tuple[int, ...] | None:
    """Cluster labels of the probe's examples, if there are any."""
    labels = origin.probe.get("clusters")
    return None if labels is None else tuple(int(one) for one in labels)


def _origin(rows: "pandas.DataFrame") -> Provenance:
    """Provenance of one group's rows."""
    return Provenance.from_json(json.loads(rows["provenance"].iloc[0]))


@checked
def export(folder: str | Path, kind: str, target: str | Path | None = None) -> Path:
    """Export a sweep's results for other programs.

    ``csv``: one row per cell. ``sqlite`` and ``duckdb``: table ``cells`` (the same) and table
    ``examples`` (``cell``, ``example``, ``effect``, ``clean``), joined by ``cells.cell``.

    Args:
        folder: folder of the sweep.
        kind: ``csv``, ``sqlite`` or ``duckdb``.
        target: path of the file; default: ``export.csv``, ``.sqlite`` or ``.duckdb`` in the folder.

    Returns:
        Path of the file.

    Raises:
        InputError: if the kind is unknown, its library missing, or the file cannot be written.

    Example:
        >>> hs.sweeps.export("runs/ioi-all-heads", "sqlite")  # doctest: +SKIP
        PosixPath('runs/ioi-all-heads/export.sqlite')
    """
    if kind not in WRITERS:
        raise InputError(nearest(kind, WRITERS, kind="format"))
    results = read(folder)
    file = Path(folder) / f"export.{kind}" if target is None else Path(target)
    writable_folder(file.parent)
    try:
        with whole_path(file) as beside:
            WRITERS[kind](results, beside)
    except WriteError:
        raise
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {file}: {reason}.") from error
    return file


def _cells(results: Results) -> "pandas.DataFrame":
    """One row per cell, numbered, with text as plain strings."""
    frame = results.to_pandas()
    words = frame.select_dtypes("category").columns
    frame = frame.astype(dict.fromkeys(words, object))
    frame.insert(0, "cell", range(len(frame)))
    return frame


def _examples(results: Results) -> "pandas.DataFrame":
    """One row per cell and example."""
    import pandas

    rows = results.rows.select(["effects", "clean_values"]).to_pandas()
    rows = rows.rename(columns={"effects": "effect", "clean_values": "clean"})
    rows.insert(0, "cell", range(len(rows)))
    long = rows.explode(["effect", "clean"], ignore_index=True)
    long.insert(1, "example", long.groupby("cell").cumcount())
    long[["effect", "clean"]] = long[["effect", "clean"]].astype(float)
    assert isinstance(long, pandas.DataFrame)  # noqa: S101  # pandas has no types
    return long


def _csv(results: Results, file: Path) -> None:
    _cells(results).to_csv(file, index=False)


def _sqlite(results: Results, file: Path) -> None:
    with closing(sqlite3.connect(file)) as base:
        _cells(results).to_sql("cells", base, index=False)
        _examples(results).to_sql("examples", base, index=False)
        base.commit()


def _duckdb(results: Results, file: Path) -> None:
    try:
        import duckdb
    except ImportError:
        raise InputError("duckdb is not installed: pip install 'headscope[duckdb]'.") from None
    import pyarrow

    with closing(duckdb.connect(str(file))) as base:
        for name, frame in (("cells", _cells(results)), ("examples", _examples(results))):
            base.register("given", pyarrow.Table.from_pandas(frame, preserve_index=False))
            base.execute(f"create table {name} as select * from given")  # noqa: S608
            base.unregister("given")


WRITERS: dict[str, Callable[[Results, Path], None]] = {
    "csv": _csv,
    "sqlite": _sqlite,
    "duckdb": _duckdb,
}
