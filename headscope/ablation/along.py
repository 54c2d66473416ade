"""Heads edited one after the other, along several orders at once."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from headscope.ablation.groups import joint
from headscope.ablation.run import Placer, Study
from headscope.heads import HeadIndex


def along(
    study: Study,
    placer: Placer,
    orders: Mapping[str, Sequence[HeadIndex]],
    counts: Sequence[int],
) -> tuple[Float[np.ndarray, "order count example"], Float[np.ndarray, " example"]]:
    """Effects of the first so many heads of each order, and the metric on the clean run.

    A set that several orders reach is run once; NaN where an order has fewer heads.
    """
    sets = {
        (row, column): tuple(sorted(order[:count]))
        for row, order in enumerate(orders.values())
        for column, count in enumerate(counts)
        if count <= len(order)
    }
    distinct = {heads: place for place, heads in enumerate(dict.fromkeys(sets.values()))}
    found, clean = joint(study, placer, list(distinct))
    effects = np.full((len(orders), len(counts), len(clean)), np.nan)
    for cell, heads in sets.items():
        effects[cell] = found[distinct[heads]]
    return effects, clean
