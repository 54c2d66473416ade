"""``HeadTable``: all scores of one model, and its Parquet file."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Shaped

from headscope.base.files import MAX_VALUES as _MAX_VALUES
from headscope.base.files import Stored, read_parquet, whole_file
from headscope.base.result import Glance, Rows, Section, Shown, Words
from headscope.base.specs import Provenance, ScoreSpec
from headscope.base.statistics import Design, rank_correlation, top_k_overlap
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.table.kinds import RoleFinding, best_lines, find_roles, roles_by_head, table_glance
from headscope.table.scores import FLOATS, HeadScores

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow
    from rich.console import Console, ConsoleOptions, RenderResult


_KEY = b"headscope"
_FORMAT = 1
_MAX_CELLS = 4_000_000  # a file from elsewhere must not make us allocate what it likes
_NUMBERS = (*FLOATS, "n", "missing")
_EXAMPLES = {"per_example": "examples", "control_per_example": "control_examples"}


Made = TypeVar("Made")


def write_scores(
    scores: Sequence[HeadScores], path: "str | PathLike[str]", *, examples: bool = False
) -> None:
    """Write scores of one model to a Parquet file, atomically.

    Args:
        scores: one or more scores.
        path: path of the file.
        examples: also store the values per example.
    """
    import pyarrow
    from pyarrow import parquet

    rows = pyarrow.concat_tables([_rows(one, examples=examples) for one in scores])
    layers, heads = (max(one.mean.shape[axis] for one in scores) for axis in (0, 1))
    facts = {
        "format": _FORMAT,
        "layers": layers,
        "heads": heads,
        "scores": [_facts(one, examples=examples) for one in scores],
    }
    rows = rows.replace_schema_metadata({_KEY: json.dumps(facts, allow_nan=False)})
    with whole_file(Path(path)) as file:
        parquet.write_table(rows, file, compression="zstd")


def read_scores(path: "str | PathLike[str]", make: Callable[[list[HeadScores]], Made]) -> Made:
    """Read scores written by :func:`write_scores`.

    Args:
        path: path of the file.
        make: what to build from the scores, such as a table; an InputError from it means a damaged
            file.

    Raises:
        InputError: if the file is missing or damaged, or holds something else.
    """
    import pyarrow

    rows = read_parquet(path)
    if _KEY not in (rows.schema.metadata or {}):
        raise InputError(f"{str(path)!r} is parquet, but not a table that headscope saved.")
    try:
        facts = json.loads(rows.schema.metadata[_KEY])
        if facts["format"] != _FORMAT:
            raise InputError(
                f"{str(path)!r} has format {facts['format']}; this version reads {_FORMAT}."
            )
        shape = (int(facts["layers"]), int(facts["heads"]))
        if min(shape) < 1 or shape[0] * shape[1] > _MAX_CELLS:
            raise InputError(f"{str(path)!r} claims {shape[0]} layers of {shape[1]} heads.")
        _check_facts(facts["scores"], shape)
        return make([_score(one, rows, _own_shape(one, shape)) for one in facts["scores"]])
    except (
        *(KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError),
        *(RecursionError, MemoryError, pyarrow.ArrowException),
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} is a damaged table: {error!r}.") from None


def _own_shape(facts: Mapping[str, Any], largest: tuple[int, int]) -> tuple[int, int]:
    """Layers and heads of a score; in files with a single stack, those of the file.

    Raises:
        ValueError: if they are below 1, or larger than the file's.
    """
    layers, heads = (int(one) for one in facts.get("shape", largest))
    if not (1 <= layers <= largest[0] and 1 <= heads <= largest[1]):
        raise ValueError(f"{facts['name']} claims {layers} layers of {heads} heads")
    return layers, heads


_TYPES: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "kv_heads": (int,),
    "unit": (str,),
    "bounds": (list,),
    "description": (str,),
    "source": (str,),
    "threshold": (int, float, NoneType),
    "alternative": (str, NoneType),
    "provenance": (dict,),
    "examples": (dict,),
}


def _check_facts(scores: Any, shape: tuple[int, int]) -> None:
    """Refuse facts with wrong types or impossible sizes.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(scores, list) or len(scores) * shape[0] * shape[1] > _MAX_CELLS:
        raise ValueError("the scores are not a list, or too many")
    for one in scores:
        for name, kinds in _TYPES.items():
            if not isinstance(one[name], kinds) or isinstance(one[name], bool):
                raise ValueError(f"{name} of a score is {one[name]!r}"[:200])
        low, high = one["bounds"]
        if not all(isinstance(end, int | float | NoneType) for end in (low, high)):
            raise ValueError(f"bounds of {one['name']} are {one['bounds']!r}"[:200])
        for length in one["examples"].values():
            if not 0 <= int(length) * shape[0] * shape[1] <= _MAX_VALUES:
                raise ValueError(f"{one['name']} claims {length} examples")


def _rows(scores: HeadScores, *, examples: bool) -> "pyarrow.Table":
    """Rows of one score; NaN becomes null, as other readers expect."""
    import pyarrow

    columns: dict[str, Any] = {
        name: pyarrow.array(column, from_pandas=True)
        for name, column in scores.columns().items()
        if name not in ("label", "unit")
    }
    columns["score"] = pyarrow.array([scores.name] * len(columns["layer"]), pyarrow.string())
    columns["score"] = columns["score"].dictionary_encode()
    stacks = pyarrow.array([scores.stack] * len(columns["layer"]), pyarrow.string())
    columns["stack"] = stacks.dictionary_encode()
    if examples:
        for name, attribute in _EXAMPLES.items():
            columns[name] = _lists(getattr(scores, attribute), scores)
    return pyarrow.table(columns)


def _lists(
    values: Shaped[np.ndarray, "layer head example"] | None, scores: HeadScores
) -> "pyarrow.Array":
    """One list per row; null if there are no values."""
    import pyarrow

    count = int(scores.present.sum())
    kind = pyarrow.list_(pyarrow.float64())
    if values is None:
        return pyarrow.nulls(count, kind)
    kept = values[scores.present]
    offsets = np.arange(count + 1, dtype=np.int32) * kept.shape[1]
    flat = pyarrow.array(kept.ravel(), from_pandas=True)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), flat)


def _facts(scores: HeadScores, *, examples: bool) -> dict[str, object]:
    """Declaration and facts of a score, as JSON."""
    return {
        **scores.spec.to_json(),
        "kv_heads": scores.kv_heads,
        "stack": scores.stack,
        "shape": list(scores.mean.shape),
        "design": scores.design.to_json(),
        "provenance": scores.provenance.to_json(),
        "examples": {
            name: getattr(scores, attribute).shape[2]
            for name, attribute in _EXAMPLES.items()
            if examples and getattr(scores, attribute) is not None
        },
    }


def _score(facts: Mapping[str, Any], rows: "pyarrow.Table", shape: tuple[int, int]) -> HeadScores:
    """Rebuild one score from the rows of all."""
    import pyarrow.compute as pc

    mine = rows.filter(pc.equal(rows["score"].cast("string"), facts["name"]))
    if "stack" in mine.column_names:  # files of before 0.2 have none
        mine = mine.filter(pc.equal(mine["stack"].cast("string"), str(facts.get("stack", ""))))
    at = (mine["layer"].to_numpy(), mine["head"].to_numpy())
    if mine.num_rows and min(axis.min() for axis in at) < 0:
        raise InputError("a row names a negative layer or head.")

    def cells(column: str) -> Shaped[np.ndarray, "layer head"]:
        whole = np.full(shape, 0 if column in ("n", "missing") else np.nan)
        if column == "p_floor" and column not in mine.column_names:  # written before 0.2
            return whole
        whole[at] = mine[column].to_numpy()
        return whole.astype(int) if column in ("n", "missing") else whole

    def lists(column: str) -> Shaped[np.ndarray, "layer head example"]:
        length = int(facts["examples"][column])
        whole = np.full((*shape, length), np.nan)
        flat = mine[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        whole[at] = flat.reshape(mine.num_rows, length)
        return whole

    spec, kv_heads = ScoreSpec.from_json(facts), facts["kv_heads"]
    provenance = Provenance.from_json(facts["provenance"])
    stack = str(facts.get("stack", ""))  # files of before 0.2 are of models with a single one
    if "per_example" not in facts["examples"]:
        known = {column: cells(column) for column in _NUMBERS}
        mean, n = known.pop("mean"), known.pop("n")
        return HeadScores.from_summary(
            spec, mean, kv_heads=kv_heads, n=n, known=known, provenance=provenance
        ).of_stack(stack)
    has_control = "control_per_example" in facts["examples"]
    found = HeadScores.from_examples(
        spec,
        lists("per_example"),
        kv_heads=kv_heads,
        control_per_example=lists("control_per_example") if has_control else None,
        design=Design.from_json(facts["design"]) if "design" in facts else Design(),
        missing=cells("missing"),
        provenance=provenance,
    )
    return found.of_stack(stack)


class UnknownScoreError(InputError, KeyError):
    """Unknown score name (also a KeyError)."""

    __str__ = Exception.__str__  # KeyError would print the quoted repr


class HeadTable(Shown, Mapping[str, HeadScores], Stored):
    """Layers x heads x scores of one model: a read-only mapping from name to score.

    Scores of several attention stacks are named ``stack:name``; :meth:`stack` returns the table of
    a single stack.
    """

    def __init__(self, scores: Iterable[HeadScores]) -> None:
        """Collect scores of one model.

        Raises:
            InputError: if there are none, two share a name, or they belong to different models.
        """
        given = list(scores)
        several = len({one.stack for one in given}) > 1
        self._scores: dict[str, HeadScores] = {}
        for one in given:
            name = f"{one.stack}:{one.name}" if several else one.name
            if name in self._scores:
                raise InputError(f"two scores are called {name!r}; rename one of them.")
            self._scores[name] = one
        if not self._scores:
            raise InputError("a table needs at least one score.")
        for stack in {one.stack for one in given}:
            _check_one_model([one for one in given if one.stack == stack])

    def __getitem__(self, name: str) -> HeadScores:
        """Return one score; an unknown name raises InputError with the nearest one."""
        if name not in self._scores:
            raise UnknownScoreError(nearest(name, self._scores, kind="score"))
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in order."""
        return iter(self._scores)

    def __len__(self) -> int:
        """Return the number of scores."""
        return len(self._scores)

    @property
    def stacks(self) -> "Mapping[str, HeadTable]":
        """Tables of the attention stacks by name; empty in a model with a single stack."""
        names = dict.fromkeys(one.stack for one in self.values())
        if len(names) == 1:
            return MappingProxyType({next(iter(names)): self})
        return MappingProxyType({name: self.stack(name) for name in names})

    def stack(self, name: str) -> "HeadTable":
        """Table of one attention stack.

        Args:
            name: name of the stack; empty in a model with a single stack.

        Raises:
            InputError: if the table has no such stack.

        Example:
            >>> table.stack("") is table, list(table.stacks)
            (True, [''])
        """
        found = [one for one in self.values() if one.stack == name]
        if not found:
            known = ", ".join(dict.fromkeys(repr(one.stack) for one in self.values()))
            raise InputError(f"the table has no stack {name!r}: it has {known}.")
        return self if len(found) == len(self) else HeadTable(found)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers and of heads in a layer.

        Raises:
            InputError: if the table has several attention stacks.
        """
        if len(names := dict.fromkeys(one.stack for one in self.values())) > 1:
            raise InputError(
                f"the table has the stacks {', '.join(names)}: choose one, table.stack(...)."
            )
        layers, heads = next(iter(self.values())).mean.shape
        return layers, heads

    def top(self, score: str, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """The k heads with the largest mean of one score."""
        return self[score].top(k)

    def filter(
        self,
        score: str,
        minimum: float | None = None,
        maximum: float | None = None,
        heads: "Iterable[str | tuple[int, int]] | None" = None,
    ) -> list[HeadIndex]:
        """Heads whose mean lies in a range, largest first.

        Returns heads and not a smaller table: p-values are adjusted over all heads of the model,
        and a table of selected heads would adjust them over the selection only.

        Args:
            score: name of the score.
            minimum: smallest mean that is kept, itself included.
            maximum: largest mean that is kept, itself included.
            heads: look only among these.
        """
        among = None if heads is None else {HeadIndex.parse(head) for head in heads}
        return [
            head
            for head, mean in self[score].top(self[score].mean.size)
            if (minimum is None or mean >= minimum)
            and (maximum is None or mean <= maximum)
            and (among is None or head in among)
        ]

    def join(self, other: "HeadTable") -> "HeadTable":
        """Join the scores of two tables; duplicate names or different models are an error."""
        return HeadTable([*self.values(), *other.values()])

    def rank_correlation(self) -> "pandas.DataFrame":
        """Spearman correlation over heads between all pairs of scores."""
        import pandas

        rows = [[rank_correlation(a.mean, b.mean) for b in self.values()] for a in self.values()]
        return pandas.DataFrame(rows, index=list(self), columns=list(self))

    def overlap(self, other: "HeadTable", score: str, k: int = 10) -> float:
        """Jaccard index of a score's k best heads in this and another table."""
        if self.shape != other.shape:
            raise InputError(f"the tables have heads {self.shape} and {other.shape}.")
        return top_k_overlap(self[score].mean, other[score].mean, k)

    def roles(self, alpha: float = 0.05) -> dict[HeadIndex, list[tuple[str, float]]]:
        """Roles of each head that has at least one: (score, mean), strongest first.

        A head has the role of a score if the score has a threshold, the head's mean reaches it, and
        the head is significantly above the control at false discovery rate ``alpha`` over all
        heads.
        """
        return roles_by_head(find_roles(self.values(), alpha))

    def role_summary(self, alpha: float = 0.05) -> list[RoleFinding]:
        """For each role the heads that have it, possibly none; made to be printed."""
        return find_roles(self.values(), alpha)

    def columns(self) -> dict[str, Any]:
        """Columns of :meth:`to_pandas`: one entry per head and score that was computed."""
        parts = [one.columns() for one in self.values()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head and score, with all statistics."""
        import pandas

        return pandas.DataFrame(self.columns())

    def to_pandas_wide(self) -> "pandas.DataFrame":
        """One row per head, one column of means per score, indexed by ``L5H1``."""
        import pandas

        first = next(iter(self.values()))
        shown = np.any([one.present for one in self.values()], axis=0)
        layer, head = np.nonzero(shown)
        columns: dict[str, Any] = {
            "layer": layer,
            "head": head,
            "kv_head": head // (first.mean.shape[1] // first.kv_heads),
        }
        columns |= {one.name: one.mean[shown] for one in self.values()}
        return pandas.DataFrame(columns, index=pandas.Index(first.labels[shown], name="label"))

    def to_polars(self) -> "polars.DataFrame":
        """The rows of :meth:`to_pandas` as a polars frame (extra ``polars``).

        Raises:
            InputError: if polars is not installed.
        """
        try:
            import polars
        except ImportError:
            raise InputError("polars is not installed: pip install 'headscope[polars]'.") from None
        return polars.DataFrame(self.columns())

    def save(self, path: "str | PathLike[str]", *, examples: bool = False) -> None:
        """Save as one Parquet file, atomically.

        Args:
            path: path of the file.
            examples: also store the values per example, for intervals later.
        """
        write_scores(list(self.values()), path, examples=examples)

    @staticmethod
    def load(path: "str | PathLike[str]") -> "HeadTable":
        """Load a file written by :meth:`save`.

        Raises:
            InputError: if the file is missing or damaged, or holds something else.
        """
        return read_scores(path, HeadTable)

    def _parts(self) -> dict[str, object]:
        """Parts that a saved result stores if it contains a table."""
        return {"scores": tuple(self.values())}

    def glance(self) -> Glance:
        """Show the three most notable heads of each score, and the roles."""
        return table_glance(list(self.values()))

    def summary(self) -> str:
        """Describe size, and per score the three most notable heads, one line each."""
        lines = [f"  {line.text}{line.strong}" for line in best_lines(list(self.values()))]
        return "\n".join([repr(self), *lines])

    def sections(self) -> list[Section]:
        """Report notes and the three most notable heads of each score."""
        rows = [(one.text.rstrip(": "), one.strong) for one in best_lines(list(self.values()))]
        notes = [Words(note) for note in self.glance().notes]
        return [Section("Heads", [*notes, Rows(("score", "most notable heads"), rows)])]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Render best heads, other scores and roles in the console's width."""
        yield from table_glance(list(self.values()), options.max_width).terminal()

    def __repr__(self) -> str:
        """Size and names."""
        if len(self.stacks) > 1:
            return f"HeadTable(stacks {', '.join(self.stacks)}: {', '.join(self)})"
        layers, heads = self.shape
        return f"HeadTable({layers} layers x {heads} heads: {', '.join(self)})"


def _check_one_model(scores: list[HeadScores]) -> None:
    """Raise InputError unless the scores can belong to one model."""
    first = scores[0]
    for one in scores[1:]:
        for what, here, there in (
            ("heads", first.mean.shape, one.mean.shape),
            ("key/value heads", first.kv_heads, one.kv_heads),
            ("weights", first.provenance.weight_digest, one.provenance.weight_digest),
        ):
            if here != there and here and there:
                raise InputError(
                    f"{first.name!r} and {one.name!r} are not of one model: "
                    f"their {what} are {here} and {there}."
                )
