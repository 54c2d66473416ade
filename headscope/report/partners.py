"""The strongest composition partners of every head, out of all pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from headscope.base.parquet_files import read_parquet
from headscope.errors import InputError

WIDTH = 5


@dataclass(frozen=True, eq=False)
class Side:
    """Partners on one side, strongest first; heads are numbered layer by layer.

    Attributes:
        which: number of the partner.
        value: composition score; 0 where there is no partner.
    """

    which: Int[np.ndarray, "head k"]
    value: Float[np.ndarray, "head k"]


@dataclass(frozen=True, eq=False)
class Partners:
    """Partners of every head.

    Attributes:
        modes: names of the scores, such as ``K_composition``.
        fed_by: per mode, earlier heads.
        feeds: per mode, later heads.
    """

    modes: tuple[str, ...]
    fed_by: Sequence[Side]
    feeds: Sequence[Side]


def read_partners(file: Path, shape: tuple[int, int]) -> Partners:
    """Read pairs of heads as ``headscope circuits`` writes them.

    Args:
        file: ``pairs.parquet``.
        shape: layers and heads of the model.

    Raises:
        InputError: if the file holds something else.
    """
    import pyarrow
    import pyarrow.compute as pc

    names = ["first_layer", "first_head", "second_layer", "second_head", "score", "value"]
    layers, heads = shape
    try:
        rows = read_parquet(file, names)
        modes = sorted(pc.unique(rows["score"].cast("string")).to_pylist())
        fed_by, feeds = [], []
        for mode in modes:
            mine = rows.filter(pc.equal(rows["score"].cast("string"), mode))
            ends = [mine[name].to_numpy() for name in names[:4]]
            values = np.zeros((layers, heads, layers, heads), np.float32)
            values[tuple(ends)] = mine["value"].to_numpy()
            square = np.nan_to_num(values.reshape(layers * heads, layers * heads))
            feeds.append(_strongest(square))
            fed_by.append(_strongest(square.T))
    except (pyarrow.ArrowException, OSError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(file)!r} holds no pairs of these heads: {error!r}.") from None
    return Partners(tuple(modes), fed_by, feeds)


def _strongest(values: Float[np.ndarray, "head other"]) -> Side:
    count = min(WIDTH, values.shape[1])
    some = np.argpartition(-values, count - 1, axis=1)[:, :count]
    of_them = np.take_along_axis(values, some, axis=1)
    order = np.lexsort((some, -of_them), axis=1)
    return Side(
        np.take_along_axis(some, order, axis=1),
        np.take_along_axis(of_them, order, axis=1).astype(np.float64),
    )
