"""Which needle, distractors and other question each example of a needle probe gets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

from headscope.errors import InputError
from headscope.probes.needle_sets import DRAWN, Needle, fixed_needles


class Drawn(NamedTuple):
    """What one example hides and asks; ``other`` is asked about in its place, and not hidden."""

    needle: Needle
    distractors: tuple[Needle, ...]
    other: Needle | None


@dataclass(frozen=True)
class Drawer:
    """Draws needles of one set.

    Attributes:
        source: as ``probes.needle`` takes it.
        distractors: how many are wanted; of a fixed list, as many as there are.
        asks_other: whether every example needs a question about something that is not hidden.
        seed: of random content.
    """

    source: str | Path | Sequence[Needle]
    distractors: int
    asks_other: bool
    seed: int
    fixed: tuple[Needle, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        """Read the list, if it is one."""
        object.__setattr__(self, "fixed", fixed_needles(self.source))
        if self.fixed is not None and self.asks_other and len(self.fixed) < 2:
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
            needles = tuple(islice(drawn, 1 + self.distractors + self.asks_other))
            if len(needles) < 1 + self.distractors + self.asks_other:
                raise InputError(f"the set {self.name!r} has no {self.distractors} distractors.")
        else:
            start = number % len(self.fixed)
            needles = self.fixed[start:] + self.fixed[:start]
        last = len(needles) - self.asks_other
        distractors = needles[1:last][: self.distractors]
        return Drawn(needles[0], distractors, needles[-1] if self.asks_other else None)
