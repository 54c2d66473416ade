"""Tables as data frames. Only what was scored has a row: a missing layer is absent, not 0."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.errors import InputError
from headscope.table.scores import HeadScores

if TYPE_CHECKING:
    import pandas
    import polars


def tidy_columns(scores: HeadScores) -> dict[str, Any]:
    """Columns of one score, one entry per head that was scored, in head order."""
    layer, head = np.nonzero(scores.present)
    at = (layer, head)
    return {
        "layer": layer.astype(np.int16),
        "head": head.astype(np.int16),
        "kv_head": (head // (scores.mean.shape[1] // scores.kv_heads)).astype(np.int16),
        "label": scores.labels[at],
        "score": np.full(layer.size, scores.name),
        "unit": np.full(layer.size, scores.unit),
        "mean": scores.mean[at],
        "sem": scores.sem[at],
        "n": scores.n[at].astype(np.int32),
        "missing": scores.missing[at].astype(np.int64),
        "null": scores.null[at],
        "effect_size": scores.effect_size[at],
        "p_value": scores.p_value[at],
        "p_floor": scores.p_floor[at],
        "p_adjusted": scores.p_adjusted[at],
    }


def tidy(scores: Sequence[HeadScores]) -> "pandas.DataFrame":
    """One row per head and score."""
    import pandas

    parts = [pandas.DataFrame(tidy_columns(one)) for one in scores]
    return pandas.concat(parts, ignore_index=True)


def wide(scores: Sequence[HeadScores]) -> "pandas.DataFrame":
    """One row per head, one column of means per score, indexed by ``L5H1``."""
    import pandas

    first = scores[0]
    shown = np.any([one.present for one in scores], axis=0)
    layer, head = np.nonzero(shown)
    columns: dict[str, Any] = {
        "layer": layer,
        "head": head,
        "kv_head": head // (first.mean.shape[1] // first.kv_heads),
    }
    columns |= {one.name: one.mean[shown] for one in scores}
    return pandas.DataFrame(columns, index=pandas.Index(first.labels[shown], name="label"))


def polars_frame(scores: Sequence[HeadScores]) -> "polars.DataFrame":
    """The tidy form as a polars frame."""
    try:
        import polars
    except ImportError:
        raise InputError("polars is not installed: pip install 'headscope[polars]'.") from None
    return polars.concat([polars.DataFrame(tidy_columns(one)) for one in scores])
