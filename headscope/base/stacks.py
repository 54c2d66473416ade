"""Attention stacks: shapes, visibility rules, and positions of image patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.files import Saved, Stored
from headscope.errors import InputError, whole
from headscope.heads import STACK_LETTERS, HeadIndex


@dataclass(frozen=True)
class PatchGrid(Stored):
    """How a vision model cuts an image into patches, after special tokens (class, registers).

    Attributes:
        rows, columns: patches from top to bottom and from left to right.
        patch_height, patch_width: size of a patch, in pixels.
        channels: number of channels of an image.
        specials: names of the tokens in front: ``("class", "register 1")``.

    Example:
        >>> from headscope.base.stacks import PatchGrid
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
        """Label of each position: its special token, or row and column, from 0."""
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
            name: name of the mark, for messages.
            corners: first row and column, and those behind the last: ``(0, 0, 1, 2)`` holds the
                first two patches of the first row.

        Raises:
            InputError: if it holds no patch, or reaches out of the image.

        Example:
            >>> from headscope.base.stacks import PatchGrid
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
            >>> from headscope.base.stacks import PatchGrid
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
        """Mask of the positions that are patches."""
        return positions >= self.first


def _covered(index: Tensor, size: int, start: float, stop: float) -> Float[Tensor, " pos"]:
    """Share of intervals ``[index * size, (index + 1) * size]`` that lies between two numbers."""
    low = (index * size).float().clamp_min(start)
    high = ((index + 1) * size).float().clamp_max(stop)
    return (high - low).clamp_min(0) / size


@dataclass(frozen=True, eq=False)
class ImageKeys(Saved):
    """Picture piece that each position of a text with images represents.

    Attributes:
        boxes: left, top, right and bottom edge in pixels of the picture; NaN at positions that show
            no piece of one: words, class tokens, ends of rows, padding around a picture.
        image: number of the picture in its text; -1 where there is no box.
        sizes: height and width of every picture, in pixels.

    Example:
        >>> from headscope.base.stacks import ImageKeys
        >>> boxes = torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8]]])
        >>> keys = ImageKeys(boxes, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[[8, 16]]]))
        >>> keys.at(0, 1), keys.keys(0, (0, 0, 12, 8))
        ((0, (8.0, 0.0, 16.0, 8.0)), [0, 1])
    """

    boxes: Float[Tensor, "batch pos 4"]
    image: Int[Tensor, "batch pos"]
    sizes: Int[Tensor, "batch image 2"]

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.boxes)

    def at(self, example: int, position: int) -> tuple[int, tuple[float, float, float, float]]:
        """Picture and box that a position represents.

        Args:
            example: index of the text.
            position: in it.

        Raises:
            InputError: if there is no such position, or it shows no piece of a picture.
        """
        example, position = whole(example, "example"), whole(position, "position")
        batch, length = self.image.shape
        if not (0 <= example < batch and 0 <= position < length):
            raise InputError(
                f"there is no position {position} of text {example}: there are {batch} texts of "
                f"{length} positions, counted from 0."
            )
        if int(self.image[example, position]) < 0:
            raise InputError(f"position {position} of text {example} shows no piece of a picture.")
        left, top, right, bottom = self.boxes[example, position].tolist()
        return int(self.image[example, position]), (left, top, right, bottom)

    def overlap(
        self, example: int, box: Sequence[float | int], image: int = 0, by: str = "patch"
    ) -> Float[Tensor, " pos"]:
        """Overlap of every position's piece with a box, in [0, 1]; 0 without a piece.

        Args:
            example: index of the text.
            box: left, top, right and bottom edge, in pixels of the picture.
            image: index of the picture in the text.
            by: ``patch``, the shared area over that of the piece; ``iou``, over that of both
                together, which is small for pieces inside a large box.

        Raises:
            InputError: if there is no such picture, or the box is empty or reaches out of it.
        """
        if by not in ("patch", "iou"):
            raise InputError(f"by={by!r} is unknown: 'patch' or 'iou'.")
        left, top, right, bottom = self.inside(example, box, image)
        own = self.boxes[example].nan_to_num()
        wide = own[:, 2].clamp_max(right) - own[:, 0].clamp_min(left)
        high = own[:, 3].clamp_max(bottom) - own[:, 1].clamp_min(top)
        shared = wide.clamp_min(0) * high.clamp_min(0)
        area = (own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])
        if by == "iou":
            area = area + (right - left) * (bottom - top) - shared
        found = shared / area.clamp_min(torch.finfo(area.dtype).tiny)
        return found.masked_fill(self.image[example] != image, 0.0)

    def inside(
        self, example: int, box: Sequence[float | int], image: int = 0
    ) -> tuple[float, float, float, float]:
        """The box, validated to lie inside its picture.

        Args:
            example: index of the text.
            box: left, top, right and bottom edge, in pixels of the picture.
            image: index of the picture in the text.

        Raises:
            InputError: if there is no such picture, or the box is empty or reaches out of it.
        """
        example, image = whole(example, "example"), whole(image, "image")
        batch, images = self.sizes.shape[:2]
        if not (0 <= example < batch and 0 <= image < images):
            raise InputError(
                f"there is no picture {image} of text {example}: there are {batch} texts with "
                f"{images} pictures each, counted from 0."
            )
        try:
            left, top, right, bottom = (float(one) for one in box)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the box {box!r} is not left, top, right and bottom edge in pixels."
            ) from error
        height, width = self.sizes[example, image].tolist()
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InputError(
                f"the box of pixels from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) is not "
                f"inside the picture, which is {width} pixels wide and {height} high."
            )
        return left, top, right, bottom

    def keys(
        self,
        example: int,
        box: Sequence[float | int],
        image: int = 0,
        *,
        over: int | float = 0.1,
        by: str = "patch",
    ) -> list[int]:
        """Positions whose piece overlaps a box by more than a share.

        Args:
            example: index of the text.
            box: left, top, right and bottom edge, in pixels of the picture.
            image: index of the picture in the text.
            over: the share.
            by: length of a step; see :meth:`overlap`.

        Raises:
            InputError: if there is no such picture, or the box is empty or reaches out of it.
        """
        if isinstance(over, bool) or not 0 <= over < 1:
            raise InputError(f"over={over!r}: give a share from 0 to below 1.")
        found: list[int] = (self.overlap(example, box, image, by) > over).nonzero()[:, 0].tolist()
        return found

    def evidence(
        self,
        boxes: Sequence[Sequence[float | int]],
        images: Sequence[int] | None = None,
        *,
        over: int | float = 0.1,
        by: str = "patch",
    ) -> Bool[Tensor, "batch pos"]:
        """Mark of the positions that overlap one box per text, as found by :meth:`keys`.

        Args:
            boxes: for each text left, top, right and bottom edge, in pixels of its picture.
            images: indices of pictures in the text. Default: the first.
            over: share from which a piece counts.
            by: length of a step; see :meth:`overlap`.

        Raises:
            InputError: if there is not a box for each text, or one is outside of its picture or
                between all pieces.
        """
        if isinstance(over, bool) or not 0 <= over < 1:
            raise InputError(f"over={over!r}: give a share from 0 to below 1.")
        if len(boxes) != len(self) or (images is not None and len(images) != len(self)):
            raise InputError(f"there are {len(boxes)} boxes for {len(self)} texts: give one each.")
        rows = []
        for at, box in enumerate(boxes):
            row = self.overlap(at, box, 0 if images is None else images[at], by) > over
            if not bool(row.any()):
                raise InputError(
                    f"the box of text {at} covers no more than {over:g} of any piece: give a "
                    "larger box, or a smaller over=."
                )
            rows.append(row)
        return torch.stack(rows)

    def painted(
        self,
        weights: Float[Tensor, "*any pos"],
        example: int,
        image: int = 0,
        *,
        rows: int = 24,
        columns: int = 24,
    ) -> Float[Tensor, "*any row column"]:
        """Paint weights of positions onto a picture, each uniformly over its box.

        Pieces may overlap, as tiles and the whole picture do; what lies on the picture sums to the
        weight of its positions.

        Args:
            weights: weight of every position of the text.
            example: index of the text.
            image: index of the picture in the text.
            rows: cells from top to bottom into which the picture is cut.
            columns: cells from left to right.

        Raises:
            InputError: if there is no such picture.
        """
        rows, columns = whole(rows, "rows", 1), whole(columns, "columns", 1)
        self.inside(example, (0, 0, 1, 1), image)
        height, width = self.sizes[example, image].tolist()
        shown = self.image[example] == image
        own = self.boxes[example][shown].to(weights)
        down = _shares(own[:, 1], own[:, 3], rows, height)
        across = _shares(own[:, 0], own[:, 2], columns, width)
        return torch.einsum("...p,pr,pc->...rc", weights[..., shown], down, across)


def _shares(start: Tensor, stop: Tensor, cells: int, size: int) -> Float[Tensor, "pos cell"]:
    """Share of every interval that lies in each of equal cells of ``[0, size]``."""
    edge = torch.arange(cells, device=start.device) * (size / cells)
    low = torch.maximum(start[:, None], edge)
    high = torch.minimum(stop[:, None], edge + size / cells)
    return (high - low).clamp_min(0) / (stop - start)[:, None]


MaskKind = Literal["causal", "bidirectional", "cross"]


@dataclass(frozen=True)
class MaskRule:
    """Rule of which keys a query sees, padding aside: the only place that decides causality.

    Attributes:
        kind: ``causal`` (keys up to the query), ``bidirectional`` (all keys of the same
            sequence), ``cross`` (all keys of another sequence).
        window: distance at which keys go out of sight: a query sees keys less than ``window``
            positions away, itself included (on both sides where keys after it are visible);
            None: no limit.
        block: a query sees keys of its own block of this many positions only; None: no blocks.

    Example:
        >>> import numpy as np
        >>> MaskRule("causal", window=2).visible(np.array([2]), np.arange(4)).tolist()
        [[False, True, True, False]]
    """

    kind: MaskKind = "causal"
    window: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        """Validate the rule.

        Raises:
            InputError: if a size is below 1, or a cross rule has a window or blocks.
        """
        for name, size in (("window", self.window), ("block", self.block)):
            if size is not None and size < 1:
                raise InputError(f"{name}={size}: a query must see at least itself; use 1 or more.")
        if self.kind == "cross" and (self.window or self.block):
            raise InputError("cross-attention has no window and no blocks: leave them out.")

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key, so that an edit cannot change earlier positions."""
        return self.kind == "causal"

    @property
    def limited(self) -> bool:
        """Whether distance or blocks hide keys that the kind alone would show."""
        return self.window is not None or self.block is not None

    def visible(self, query_pos: Any, key_pos: Any) -> Any:
        """Mask of the keys that each query sees.

        Args:
            query_pos: positions ``[query]``, an integer tensor or array.
            key_pos: positions ``[key]`` of the same type.

        Returns:
            Booleans ``[query key]``.
        """
        query, key = query_pos[:, None], key_pos[None]
        # Bounds of positions, not distances: nothing but booleans is as large as the mask.
        seen = (query >= key) if self.causal else (query == query) & (key == key)
        if self.window is not None:
            seen = seen & (key > query - self.window)
            seen = seen if self.causal else seen & (key < query + self.window)
        if self.block is not None:
            seen = seen & (query // self.block == key // self.block)
        return seen

    def sees(self, n_keys: int) -> int:
        """Largest number of the first keys that any query sees."""
        most = n_keys
        if self.window is not None:
            most = min(most, self.window if self.causal else 2 * self.window - 1)
        return most if self.block is None else min(most, self.block)

    def span(self, first_query: int, last_query: int, n_keys: int) -> slice:
        """Smallest range of keys that contains all that a range of queries sees.

        Args:
            first_query: first position of the run.
            last_query: last position of the run, included.
            n_keys: number of keys.
        """
        start, stop = 0, min(n_keys, last_query + 1) if self.causal else n_keys
        if self.window is not None:
            start = max(start, first_query - self.window + 1)
            stop = min(stop, last_query + self.window)
        if self.block is not None:
            start = max(start, first_query // self.block * self.block)
            stop = min(stop, (last_query // self.block + 1) * self.block)
        return slice(start, stop)

    def __str__(self) -> str:
        """Describe the rule: ``bidirectional, window of 64 keys``."""
        sizes = {"window": self.window, "block": self.block}
        limits = [f"{name} of {size:,} keys" for name, size in sizes.items() if size is not None]
        return ", ".join([self.kind, *limits])


CAUSAL = MaskRule("causal")


def all_causal(stacks: Mapping[str, "Stack"]) -> bool:
    """Whether no query of any stack sees a later key.

    Args:
        stacks: attention stacks of a model, by name.
    """
    return all(stack.mask.causal for stack in stacks.values())


def grid_of(stacks: Mapping[str, "Stack"]) -> PatchGrid | None:
    """Patch grid of a model; None if it reads no images.

    Args:
        stacks: attention stacks of the model, by name.
    """
    return next((stack.grid for stack in stacks.values() if stack.grid is not None), None)


@dataclass(frozen=True)
class Stack:
    """One attention stack of a model: its heads and what it attends over.

    Attributes:
        name: empty in a text model with a single stack, decoder or encoder; else ``encoder``,
            ``decoder``, ``cross``, ``vision``, ``text``.
        n_layers: layers of the stack, those without attention included.
        n_heads, n_kv_heads: query heads, and key/value heads, of a layer.
        d_head: size of a head.
        mask: rule of all layers, but that windows of single layers are in ``windows``.
        queries, keys: names of the sequences that queries and keys run over.
        windows: by layer, how far back a query sees, itself included; None: no limit.
        grid: how images are cut into the positions of the stack; None if it reads no images.

    Example:
        >>> stack = Stack("cross", 2, 4, 4, 8, MaskRule("cross"), queries="decoder", keys="encoder")
        >>> stack.letter, str(stack.head(1, 3))
        ('X', 'X1H3')
    """

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    mask: MaskRule
    queries: str = "text"
    keys: str = "text"
    windows: tuple[int | None, ...] = ()
    grid: PatchGrid | None = None

    @property
    def letter(self) -> str:
        """Letter of its heads' addresses."""
        return STACK_LETTERS[self.name]

    def head(self, layer: int, head: int) -> HeadIndex:
        """Address of one of its heads.

        Raises:
            InputError: if the stack does not have that head.
        """
        if not (0 <= layer < self.n_layers and 0 <= head < self.n_heads):
            raise InputError(
                f"there is no head {HeadIndex(layer, head, self.name)}: the stack has layers "
                f"0-{self.n_layers - 1} of heads 0-{self.n_heads - 1}."
            )
        return HeadIndex(layer, head, self.name)
