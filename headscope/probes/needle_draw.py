"""Which needle, distractors and other question each example of a needle probe gets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.errors import InputError
from headscope.probes.needle_sets import DRAWN, Needle, fixed_needles


class Drawn(NamedTuple):
    """What one example hides and asks; its control hides, or asks about, ``other`` instead."""

    needle: Needle
    distractors: tuple[Needle, ...]
    other: Needle | None


@dataclass(frozen=True)
class Drawer:
    """Draws needles of one set.

    Attributes:
        source: as ``probes.needle`` takes it.
        distractors: how many are wanted; of a fixed list, as many as there are.
        control: what another needle, which is not in the text, is for: to be put in the
            needle's place (``removed``), or to be asked about; None: for nothing.
        seed: of random content.
    """

    source: str | Path | Sequence[Needle]
    distractors: int
    control: Literal["removed", "other_question"] | None
    seed: int
    fixed: tuple[Needle, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        """Read the list, if it is one."""
        object.__setattr__(self, "fixed", fixed_needles(self.source))
        if self.fixed is not None and self.control == "other_question" and len(self.fixed) < 2:
            raise InputError("control='other_question' needs two needles at least; there is one.")

    @property
    def name(self) -> str:
        """What provenance calls the set."""
        return Path(self.source).name if isinstance(self.source, str | Path) else "given"

    @property
    def per_cell(self) -> int:
        """Examples of a cell unless the caller says otherwise."""
        return 2 if self.fixed is None else len(self.fixed)

    def __call__(self, cell: tuple[int, float], number: int) -> Drawn:
        """What example ``number`` of a cell (length, depth) hides."""
        if self.fixed is None:
            rng = Random(f"needle {self.seed} {cell} {number}")  # noqa: S311 - words, not secrets
            drawn = DRAWN[str(self.source)](rng)
            count = 1 + self.distractors + (self.control is not None)
            needles = tuple(islice(drawn, count))
            if len(needles) < count:
                raise InputError(f"the set {self.name!r} has no {self.distractors} distractors.")
        else:
            start = number % len(self.fixed)
            needles = self.fixed[start:] + self.fixed[:start]
        asks = self.control == "other_question"
        distractors = needles[1 : len(needles) - asks][: self.distractors]
        return Drawn(needles[0], distractors, self._other(needles, 1 + len(distractors)))

    def _other(self, needles: tuple[Needle, ...], start: int) -> Needle | None:
        """A needle that is not in the text; to stand in the first one's place, of as many parts."""
        if self.control is None:
            return None
        if self.control == "other_question":
            return needles[-1]
        alike = (one for one in needles[start:] if len(one.texts) == len(needles[0].texts))
        return next(alike, None)

    def clusters(self, numbers: Sequence[int]) -> Int[Tensor, " batch"] | None:
        """Which needle each example has, where some share one; drawn needles are all different."""
        if self.fixed is None:
            return None
        which = [number % len(self.fixed) for number in numbers]
        return torch.tensor(which) if len(set(which)) < len(which) else None
