"""Curves as parquet: one row per arm and number of heads, with the effect on every example."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from headscope.errors import InputError
from headscope.parquet_files import read_parquet
from headscope.table.effects import EffectGrid
from headscope.table.provenance import Provenance

if TYPE_CHECKING:
    import pandas

_KEY = b"headscope"
_FORMAT = 1
_EXAMPLES = "effect_per_example"
_MAX_CELLS = 50_000_000  # a file from elsewhere must not make us allocate what it likes


def write_curve(
    effects: EffectGrid, frame: "pandas.DataFrame", facts: Mapping[str, Any], file: IO[bytes]
) -> None:
    """Write the rows of a curve, effects per example, and what else there is to know.

    Args:
        effects: of the curve, axes arm and number.
        frame: a row for every arm and number that was measured.
        facts: JSON values, with the ``kind`` of curve.
        file: to write to.
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
        "name": effects.name,
        "axes": list(effects.axes),
        "labels": [list(names) for names in effects.labels],
        "unedited": [_plain(one) for one in effects.unedited.tolist()],
        "unit": effects.unit,
        "description": effects.description,
        "provenance": effects.provenance.to_json(),
        "clusters": effects.clusters,
    }
    known = {_KEY: json.dumps(head, allow_nan=False).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **known})
    parquet.write_table(table, file, compression="zstd")


def read_curve(path: Path, kind: str) -> tuple[EffectGrid, dict[str, Any]]:
    """Effects and facts that :func:`write_curve` wrote.

    Raises:
        InputError: if the file is none, is damaged, or holds another kind of curve.
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
            name=str(facts["name"]),
            axes=axes,
            labels=(arms, counts),
            per_example=grid,
            unedited=unedited,
            unit=str(facts["unit"]),
            description=str(facts["description"]),
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
