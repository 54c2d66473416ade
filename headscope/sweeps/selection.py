"""Which heads a sweep edits together: the sets of a config, resolved for one model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headscope.base.statistics import top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.sweeps.config import HeadSet
from headscope.sweeps.rankings import Ranking


@dataclass(frozen=True)
class Cell:
    """Heads that are edited at once.

    Attributes:
        set: name of the set that they belong to.
        draw: which draw of a random set; 0 otherwise.
        heads: in the order of the set; none in the first point of a curve.
    """

    set: str
    draw: int
    heads: tuple[HeadIndex, ...]


def cells(model: HeadModel, sets: tuple[HeadSet, ...], ranking: Ranking) -> tuple[Cell, ...]:
    """Cells of all sets, in their order.

    Raises:
        InputError: if the model lacks a head, or a set has none.
    """
    by_name: dict[str, list[tuple[HeadIndex, ...]]] = {}
    # Sets that others exclude come first, whatever the order in the file.
    for one in sorted(sets, key=lambda one: one.not_in is not None):
        by_name[one.name] = _draws(model, one, ranking, by_name)
    return tuple(
        Cell(one.name, draw, heads)
        for one in sets
        for draw, drawn in enumerate(by_name[one.name])
        for heads in _arranged(one, drawn)
    )


def _draws(
    model: HeadModel,
    one: HeadSet,
    ranking: Ranking,
    earlier: Mapping[str, list[tuple[HeadIndex, ...]]],
) -> list[tuple[HeadIndex, ...]]:
    """The heads of a set, once per draw."""
    among = _among(model, one)
    if one.score is not None:
        values = ranking(one)
        signed = values if one.order == "largest" else -values
        width = values.shape[1]
        ranked = [HeadIndex(*divmod(int(i), width)) for i in top_order(signed, values.size)]
        allowed = set(among)
        among = [head for head in ranked if head in allowed]
        if one.top is not None and one.top > len(among):
            raise InputError(
                f"the set {one.name!r} takes the top {one.top} heads, and {model.name} has "
                f"{len(among)} with a score."
            )
        among = among[: one.top]
    if not among:
        raise InputError(f"the set {one.name!r} has no heads in {model.name}.")
    if one.random is None:
        return [tuple(among)]
    if one.not_in is not None:
        if one.not_in not in earlier:
            raise InputError(f"the set {one.name!r} excludes {one.not_in!r}, which excludes too.")
        taken = {head for draw in earlier[one.not_in] for head in draw}
        among = [head for head in among if head not in taken]
    wanted = len(among) if one.random == "all" else one.random
    if not 0 < wanted <= len(among):
        raise InputError(
            f"the set {one.name!r} draws {one.random} heads, and {model.name} has {len(among)} to "
            "draw from."
        )
    streams = (np.random.default_rng([one.seed, draw]) for draw in range(one.draws))
    return [tuple(among[i] for i in stream.permutation(len(among))[:wanted]) for stream in streams]


def _among(model: HeadModel, one: HeadSet) -> list[HeadIndex]:
    """Heads that a set may hold."""
    heads = list(model.shape.heads)
    if one.heads is not None:
        heads = [model.shape.check(HeadIndex.parse(head)) for head in one.heads]
        heads = list(dict.fromkeys(heads))
    if one.layers is not None:
        for layer in one.layers:
            if layer not in model.shape.attention_layers:
                raise InputError(
                    f"the set {one.name!r} asks for layer {layer}, and {model.name} has no heads "
                    f"in layer {layer}."
                )
        heads = [head for head in heads if head.layer in one.layers]
    return heads


def _arranged(one: HeadSet, heads: tuple[HeadIndex, ...]) -> list[tuple[HeadIndex, ...]]:
    """The sets that are edited at once."""
    if one.arrange == "each":
        return [(head,) for head in heads]
    if one.arrange == "together":
        # In layer order: what is edited does not depend on the order of a draw.
        return [tuple(sorted(heads))]
    steps = len(heads) if one.steps is None else min(one.steps, len(heads))
    counts = sorted({round(len(heads) * step / steps) for step in range(steps + 1)})
    return [heads[:count] for count in counts]
