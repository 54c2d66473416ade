"""Results on disk: one row per cell, with its values per example and where they came from."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from headscope.base.statistics import Design, compare_means, mean_and_sem
from headscope.sweeps.plan import Chunk, PlannedModel, Study, heads_text

if TYPE_CHECKING:
    import pyarrow

# Columns that name a cell; together they are unique in a sweep.
KEYS = ("model", "checkpoint", "probe", "edit", "seed", "metric", "set", "draw", "heads")


def row_schema() -> "pyarrow.Schema":
    """Columns of a part and of the whole table.

    ``model checkpoint probe edit seed metric set draw`` name what was run; ``heads`` were edited
    at once, ``count`` of them; ``layer`` and ``head`` are filled where that was one. ``effect`` is
    metric(edited) - metric(clean), a mean over ``n`` examples with its standard error ``sem`` and
    the two-sided ``p_value`` of no effect; ``clean`` the mean metric of the unedited run.
    ``effects`` and ``clean_values`` hold them per example, ``provenance`` is JSON.
    """
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    numbers = pa.list_(pa.float64())
    columns = {
        **dict.fromkeys(("model", "checkpoint", "probe", "edit"), word),
        "seed": pa.int64(),
        **dict.fromkeys(("metric", "unit", "set"), word),
        "draw": pa.int32(),
        "heads": pa.string(),
        **dict.fromkeys(("count", "layer", "head", "n"), pa.int32()),
        **dict.fromkeys(("effect", "sem", "p_value", "clean"), pa.float64()),
        "effects": numbers,
        "clean_values": numbers,
        "provenance": word,
    }
    return pa.schema(list(columns.items()))


def rows_table(
    model: PlannedModel,
    study: Study,
    chunk: Chunk,
    metric: str,
    effects: Float[np.ndarray, "cell example"],
    clean: Float[np.ndarray, " example"],
    provenance: str,
    unit: str,
    clusters: tuple[int, ...] | None = None,
) -> "pyarrow.Table":
    """Rows of one chunk and metric."""
    import pyarrow as pa

    size = len(chunk.cells)
    mean, sem, n = mean_and_sem(effects, clusters)
    none = np.zeros((size, 1))
    p = compare_means(effects, none, "two-sided", Design(clusters=clusters)).p
    alone = [cell.heads[0] if len(cell.heads) == 1 else None for cell in chunk.cells]
    columns = {
        "model": [model.name] * size,
        "checkpoint": [model.checkpoint] * size,
        "probe": [study.probe] * size,
        "edit": [study.edit.label] * size,
        "seed": [study.seed] * size,
        "metric": [metric] * size,
        "unit": [unit] * size,
        "set": [cell.set for cell in chunk.cells],
        "draw": [cell.draw for cell in chunk.cells],
        "heads": [heads_text(cell.heads) for cell in chunk.cells],
        "count": [len(cell.heads) for cell in chunk.cells],
        "layer": [None if head is None else head.layer for head in alone],
        "head": [None if head is None else head.head for head in alone],
        "n": n,
        "effect": mean,
        "sem": sem,
        "p_value": p,
        "clean": [mean_and_sem(clean[None]).mean[0]] * size,
        "effects": list(effects),
        "clean_values": [clean] * size,
        "provenance": [provenance] * size,
    }
    schema = row_schema()
    arrays = [pa.array(columns[f.name], f.type, from_pandas=True) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
