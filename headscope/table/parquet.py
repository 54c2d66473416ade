"""Tables as parquet: one row per layer, head and score; what the scores are in the metadata."""

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Shaped

from headscope.base.files import whole_file
from headscope.base.parquet_files import MAX_VALUES as _MAX_VALUES
from headscope.base.parquet_files import read_parquet
from headscope.base.specs import Provenance, ScoreSpec
from headscope.base.statistics import Design
from headscope.errors import InputError
from headscope.table.scores import FLOATS, HeadScores

if TYPE_CHECKING:
    import pyarrow

_KEY = b"headscope"
_FORMAT = 1
_MAX_CELLS = 4_000_000  # a file from elsewhere must not make us allocate what it likes
_NUMBERS = (*FLOATS, "n", "missing")
_EXAMPLES = {"per_example": "examples", "control_per_example": "control_examples"}


Made = TypeVar("Made")


def write_scores(
    scores: Sequence[HeadScores], path: "str | PathLike[str]", *, examples: bool = False
) -> None:
    """Write scores of one model atomically.

    Args:
        scores: one or more.
        path: of the file.
        examples: also keep the values per example.
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
    """Read what :func:`write_scores` wrote.

    Args:
        path: of the file.
        make: what to make of the scores, such as a table; what it refuses is a damaged file.

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
    """Layers and heads of a score; of files with one stack, those of all.

    Raises:
        ValueError: if they are below 1, or larger than the file's own.
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
    """Refuse facts of other types or of sizes that no table has.

    Raises:
        ValueError: saying which.
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
    """Rows of one score; NaN becomes null, which is what other readers expect."""
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
    """One list per row; null where there are no values."""
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
    """What a score says about itself, as JSON."""
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
    """One score out of the rows of all."""
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
