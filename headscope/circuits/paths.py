"""Chains of heads that feed each other, strongest first."""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from headscope.base.saved import Stored
from headscope.circuits.composition import composition, random_composition
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.table import PairScores


@dataclass(frozen=True)
class Path(Stored):
    """A chain of heads, each of which reads what the one before it writes.

    Attributes:
        heads: from the lowest layer up.
        modes: how each of them but the first reads: ``Q``, ``K`` or ``V``.
        strength: geometric mean of the composition scores along it, in units of chance.
    """

    heads: tuple[HeadIndex, ...]
    modes: tuple[str, ...]
    strength: float

    def __str__(self) -> str:
        """Form for print: ``L1H3 -K-> L2H0 (4.2)``."""
        parts = [str(self.heads[0])]
        parts += [f"-{m}-> {h}" for m, h in zip(self.modes, self.heads[1:], strict=True)]
        return f"{' '.join(parts)} ({self.strength:.1f})"


@own_types()
def strongest_paths(
    model: HeadModel,
    k: int = 10,
    modes: Sequence[str] = ("Q", "K", "V"),
    length: int = 2,
    fold_norm: bool = True,
) -> list[Path]:
    """Strongest chains of heads by composition, from weights alone.

    Args:
        model: any model whose heads write linearly.
        k: how many chains.
        modes: kinds of composition to follow; ``["K"]`` shows previous-token -> induction.
        length: heads in a chain, 2 or more.
        fold_norm: fold the norms.

    Known weakness: high composition is not proof of use (see :func:`composition`); ablate.

    Example:
        >>> paths = hs.circuits.strongest_paths(model, k=3, modes=["K"])
        >>> len(paths)
        3
    """
    chance = random_composition(model, fold_norm)
    return chains([composition(model, mode, fold_norm) for mode in modes], chance, k, length)


def chains(scores: Iterable[PairScores], chance: float, k: int, length: int) -> list[Path]:
    """K strongest chains over given pair scores; exact, ties by lowest heads.

    The logarithm of a chain's strength is a sum over its links, so that the k best chains that
    end in a head come from the k best that end in the heads below it.

    Example:
        >>> pairs = hs.circuits.composition(model, "K")
        >>> len(hs.circuits.chains([pairs], hs.circuits.random_composition(model), k=2, length=2))
        2
    """
    if length < 2:
        raise InputError("a chain has at least two heads: length=2 or more.")
    best: dict[tuple[HeadIndex, HeadIndex], tuple[float, str]] = {}  # best mode of each pair
    for one in scores:
        for i, j, m, n in np.argwhere(one.present & (one.values > 0)).tolist():
            pair = (HeadIndex(i, j), HeadIndex(m, n))
            link = (float(one.values[i, j, m, n]), one.name.partition("_")[0])
            if pair not in best or link[0] > best[pair][0]:
                best[pair] = link
    ending: dict[HeadIndex, list[tuple[float, tuple[HeadIndex, ...], tuple[str, ...]]]]
    ending = {head: [(0.0, (head,), ())] for pair in best for head in pair}
    for _ in range(length - 1):
        longer: dict[HeadIndex, list[tuple[float, tuple[HeadIndex, ...], tuple[str, ...]]]] = {}
        for (first, second), (value, mode) in best.items():
            step = math.log(value / chance)
            longer.setdefault(second, []).extend(
                (total + step, (*heads, second), (*links, mode))
                for total, heads, links in ending.get(first, [])
            )
        ending = {head: heapq.nsmallest(k, found, key=_order) for head, found in longer.items()}
    found = heapq.nsmallest(k, (one for many in ending.values() for one in many), key=_order)
    return [Path(heads, links, math.exp(total / (length - 1))) for total, heads, links in found]


def _order(
    chain: tuple[float, tuple[HeadIndex, ...], tuple[str, ...]],
) -> tuple[float, tuple[HeadIndex, ...]]:
    return -chain[0], chain[1]
