"""Patches of an image: where each position of a vision model lies, and what it is called."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.saved import Stored
from headscope.errors import InputError


@dataclass(frozen=True)
class PatchGrid(Stored):
    """How a vision model cuts an image, row by row, behind special tokens (class, registers).

    Attributes:
        rows, columns: patches from top to bottom and from left to right.
        patch_height, patch_width: of one patch, in pixels.
        channels: of an image.
        specials: names of the tokens in front: ``("class", "register 1")``.

    Example:
        >>> from headscope.base.patches import PatchGrid
        >>> PatchGrid(2, 2, 8, 8, specials=("class",)).labels
        ('class', 'r0 c0', 'r0 c1', 'r1 c0', 'r1 c1')
    """

    rows: int
    columns: int
    patch_height: int
    patch_width: int
    channels: int = 3
    specials: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.rows * self.patch_height, self.columns * self.patch_width

    @property
    def first(self) -> int:
        """Position of the first patch."""
        return len(self.specials)

    @property
    def length(self) -> int:
        """Positions of an image, special tokens included."""
        return self.first + self.rows * self.columns

    @property
    def labels(self) -> tuple[str, ...]:
        """What each position is called: its special token, or row and column, counted from 0."""
        cells = [f"r{row} c{column}" for row in range(self.rows) for column in range(self.columns)]
        return (*self.specials, *cells)

    @property
    def places(self) -> Int[Tensor, "pos 2"]:
        """Row and column of every position; -1 at special tokens."""
        number = torch.arange(self.rows * self.columns)
        cells = torch.stack([number // self.columns, number % self.columns], 1)
        return torch.cat([torch.full((self.first, 2), -1), cells])

    def marks(self, batch: int) -> dict[str, Bool[Tensor, "batch pos"]]:
        """The marks ``patch``, and ``class`` and ``register`` where there are such tokens.

        Args:
            batch: number of images.
        """
        kinds = [name.split()[0] for name in self.specials]
        kinds += ["patch"] * (self.rows * self.columns)
        return {
            kind: torch.tensor([one == kind for one in kinds]).repeat(batch, 1)
            for kind in dict.fromkeys(kinds)
        }

    def box(self, name: str, corners: Sequence[int]) -> Bool[Tensor, " pos"]:
        """Positions of the patches in a box.

        Args:
            name: of the mark, for messages.
            corners: first row and column, and those behind the last: ``(0, 0, 1, 2)`` holds the
                first two patches of the first row.

        Raises:
            InputError: if it holds no patch, or reaches out of the image.

        Example:
            >>> from headscope.base.patches import PatchGrid
            >>> PatchGrid(2, 2, 8, 8).box("cue", (0, 1, 2, 2)).tolist()
            [False, True, False, True]
        """
        try:
            top, left, bottom, right = (int(one) for one in corners)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the box of {name!r} is {corners!r}: give the first row and column of patches and "
                "those behind the last, four whole numbers."
            ) from error
        if not (0 <= top < bottom <= self.rows and 0 <= left < right <= self.columns):
            raise InputError(
                f"the box of {name!r}, rows {top} to {bottom} and columns {left} to {right}, is "
                f"not inside the image, which has {self.rows} rows and {self.columns} columns of "
                "patches (give the first row and column, and those behind the last)."
            )
        row, column = self.places.unbind(1)
        return (row >= top) & (row < bottom) & (column >= left) & (column < right)

    def overlap(self, box: Sequence[float | int]) -> Float[Tensor, " pos"]:
        """Share of every patch's area that a box of pixels covers; 0 at special tokens.

        Args:
            box: left, top, right and bottom edge in pixels.

        Raises:
            InputError: if the box is empty or reaches out of the image.

        Example:
            >>> from headscope.base.patches import PatchGrid
            >>> PatchGrid(1, 2, 8, 8).overlap((0, 0, 12, 8)).tolist()
            [1.0, 0.5]
        """
        left, top, right, bottom = (float(one) for one in box)
        _, height, width = self.size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"the box of pixels from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) is not "
                f"inside the image, which is {width} pixels wide and {height} high."
            )
        row, column = self.places.unbind(1)
        share = _covered(column, self.patch_width, left, right)
        share = share * _covered(row, self.patch_height, top, bottom)
        return share.masked_fill(row < 0, 0.0)

    def offsets(self, query_pos: Int[Tensor, " query"]) -> Int[Tensor, "query key 2"]:
        """Rows and columns from each query to each key; meaningless at special tokens.

        Args:
            query_pos: positions of queries.
        """
        places = self.places.to(query_pos.device)
        return places[None] - places[query_pos][:, None]

    def is_patch(self, positions: Int[Tensor, "*some"]) -> Bool[Tensor, "*some"]:
        """Which positions are patches."""
        return positions >= self.first


def _covered(index: Tensor, size: int, start: float, stop: float) -> Float[Tensor, " pos"]:
    """Share of intervals ``[index * size, (index + 1) * size]`` that lies between two numbers."""
    low = (index * size).float().clamp_min(start)
    high = ((index + 1) * size).float().clamp_max(stop)
    return (high - low).clamp_min(0) / size
