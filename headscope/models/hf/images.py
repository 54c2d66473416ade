"""Box of each image token in its picture, for families of vision-language models.

What a processor and a model do to a picture (stretching, cutting out, padding, tiles, merging of
patches) is not written in its inputs; here it is undone from their sizes and the model's config.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.batches import GRID, PIXELS
from headscope.base.stacks import ImageKeys
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.taps import Texts

Boxes = Float[Tensor, "token 4"]
ImageSize = tuple[int, int]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class _Placed:
    """How a model's image lies in the picture: ``picture = scale * (pixel - shift)``, by axis."""

    scale: tuple[int | float, int | float] = (1.0, 1.0)
    shift: tuple[int | float, int | float] = (0.0, 0.0)

    @classmethod
    def stretched(cls, size: ImageSize, read: ImageSize) -> "_Placed":
        """A picture of one height and width, stretched to another."""
        return cls((size[0] / read[0], size[1] / read[1]))

    def boxes(self, rows: int, columns: int, cell: ImageSize, size: ImageSize) -> Boxes:
        """Boxes of cells, row by row, cut off at the picture's edges; NaN where nothing is left.

        Args:
            rows: of cells.
            columns: of cells.
            cell: height and width of each, in pixels that the model reads.
            size: height and width of the picture.
        """
        edges = []
        for count, side, scale, shift, end in zip(
            (rows, columns), cell, self.scale, self.shift, size, strict=True
        ):
            at = (torch.arange(count + 1, dtype=torch.float64) * side - shift) * scale
            edges.append(at.clamp(0, end).float())
        top, left = edges
        found = torch.stack(
            [
                left[:-1].expand(rows, -1),
                top[:-1, None].expand(-1, columns),
                left[1:].expand(rows, -1),
                top[1:, None].expand(-1, columns),
            ],
            -1,
        ).flatten(0, 1)
        empty = (found[:, 2] <= found[:, 0]) | (found[:, 3] <= found[:, 1])
        return found.masked_fill(empty[:, None], torch.nan)


@dataclass(frozen=True, eq=False)
class _Picture:
    """What is known of one picture in a text.

    Attributes:
        config: of the model.
        inputs: that belong to it: pixels, and what its processor gave beside them.
        tokens: how many stand for it.
        size: height and width, as the user gave them; None: as the model reads it.
        tiles: rows and columns of tiles, as the user gave them.
        processor: entries of the image processor's config; empty where it is not known.
    """

    config: Any
    inputs: Mapping[str, Tensor]
    tokens: int
    size: ImageSize | None
    tiles: ImageSize | None
    processor: Mapping[str, Any]

    @property
    def side(self) -> ImageSize:
        """Height and width that the vision tower reads."""
        return _pair(self.config.vision_config.image_size)

    @property
    def patch(self) -> ImageSize:
        """Height and width of a patch of the vision tower."""
        return _pair(self.config.vision_config.patch_size)


def _pair(size: Any) -> ImageSize:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


_NO_BOX = torch.full((1, 4), torch.nan)
Located = tuple[Boxes, ImageSize]


def _of_square(picture: _Picture) -> Located:
    """One image of fixed size, whose patches may be merged (llava, paligemma, gemma3)."""
    side, patch = picture.side, picture.patch
    rows, columns = side[0] // patch[0], side[1] // patch[1]
    first = getattr(picture.config, "vision_feature_select_strategy", "default") == "full"
    shown = picture.tokens - first
    merged = rows // max(1, isqrt(max(shown, 1)))
    if merged < 1 or (rows // merged) * (columns // merged) != shown:
        raise _unlike(picture, rows * columns)
    size = picture.size or side
    placed = _prepared(picture, size)
    cell = (patch[0] * merged, patch[1] * merged)
    boxes = placed.boxes(rows // merged, columns // merged, cell, size)
    return torch.cat([_NO_BOX, boxes]) if first else boxes, size


def _prepared(picture: _Picture, size: ImageSize) -> _Placed:
    """How a processor laid a picture into the square that the model reads."""
    known, side = picture.processor, picture.side
    if known.get("do_pan_and_scan"):
        raise UnsupportedModelError(
            "its processor adds cut-outs of the picture (do_pan_and_scan), whose places are not "
            "in its inputs: make them with do_pan_and_scan=False."
        )
    stretches = picture.config.model_type != "llava" or size[0] == size[1]
    if not known and not stretches:
        raise InputError(
            f"a picture of {size[1]} x {size[0]} pixels was padded or cut to a square of "
            f"{side[1]} x {side[0]}: give processor=, the model's image processor or its config."
        )
    if known.get("do_pad"):  # to a square, on both sides, and then resized
        whole = max(size)
        scale = (whole / side[0], whole / side[1])
        before = tuple(((whole - size[axis]) // 2) / scale[axis] for axis in (0, 1))
        return _Placed(scale, (before[0], before[1]))
    edge = (known.get("size") or _NOTHING).get("shortest_edge")
    if edge is None:
        return _Placed.stretched(size, side)
    short = min(size)  # the shorter side gets so many pixels, and the middle is cut out
    wide = tuple(int(edge) if one == short else int(edge * one / short) for one in size)
    cut = known.get("do_center_crop", True)
    if not cut and wide != side:
        return _Placed.stretched(size, side)
    before = tuple(-int((wide[axis] - side[axis]) / 2.0) for axis in (0, 1))
    return _Placed((size[0] / wide[0], size[1] / wide[1]), (before[0], before[1]))


def _of_resolution(picture: _Picture) -> Located:
    """An image of any size in patches, merged by squares of patches (qwen2-vl)."""
    frames, high, wide = (int(one) for one in picture.inputs[GRID].tolist())
    if frames != 1:
        raise UnsupportedModelError(
            f"its inputs hold a film of {frames} pairs of frames, whose tokens lie in no picture."
        )
    merge = int(picture.config.vision_config.spatial_merge_size)
    patch = picture.patch
    if picture.tokens != high * wide // merge**2:
        raise _unlike(picture, high * wide // merge**2)
    read = (high * patch[0], wide * patch[1])
    size = picture.size or read
    placed = _Placed.stretched(size, read)
    cell = (patch[0] * merge, patch[1] * merge)
    return placed.boxes(high // merge, wide // merge, cell, size), size


def _of_tiles(picture: _Picture) -> Located:
    """Tiles row by row, and the whole image behind them, patches merged (smolvlm, idefics3)."""
    side, patch = picture.side, picture.patch
    merge = int(picture.config.scale_factor)
    rows, columns = (side[axis] // patch[axis] // merge for axis in (0, 1))
    cell = (patch[0] * merge, patch[1] * merge)
    count, left = divmod(picture.tokens, rows * columns)
    if left or not count:
        raise _unlike(picture, rows * columns)
    down, across = _tiles(picture, count - 1) if count > 1 else (0, 0)
    size = picture.size or (side[0] * max(down, 1), side[1] * max(across, 1))
    placed = _Placed.stretched(size, (down * side[0], across * side[1])) if count > 1 else None
    parts = []
    for at in range(down * across):
        assert placed is not None  # noqa: S101  # there are tiles
        row, column = divmod(at, across)
        shift = (-row * side[0], -column * side[1])
        parts.append(_Placed(placed.scale, shift).boxes(rows, columns, cell, size))
    parts.append(_Placed.stretched(size, side).boxes(rows, columns, cell, size))
    return torch.cat(parts), size


def _tiles(picture: _Picture, count: int) -> ImageSize:
    """Rows and columns of so many tiles.

    Raises:
        InputError: if they cannot be told.
    """
    told = picture.tiles
    if told is None and picture.size is not None:
        told = _tiles_of(picture.size, picture.side[0], count)
    if told is None:
        told = (1, 1) if count == 1 else None
    if told is None or told[0] * told[1] != count:
        given = "" if told is None else f", not {told[0]} rows of {told[1]}"
        raise InputError(
            f"a picture was cut into {count} tiles{given}: give tiles=, their rows and columns "
            "(return_row_col_info=True asks the processor for them), or sizes=."
        )
    return told


def _tiles_of(size: ImageSize, side: int, count: int) -> ImageSize | None:
    """Rows and columns of tiles that a picture is cut into when there are so many; None: never.

    The longer side is resized to so many tiles, the other as the shape of the picture wants, to an
    even number of pixels, and both up to whole tiles.
    """
    high, wide = size
    shape = wide / high
    for along in range(1, count + 1):
        other = int(along * side / shape) if wide >= high else int(along * side * shape)
        other = max(1, math.ceil((other + other % 2) / side))
        if along * other == count:
            return (other, along) if wide >= high else (along, other)
    return None


def _of_pinpoints(picture: _Picture) -> Located:
    """The whole image, and behind it tiles in rows that end in a separator (llava-next)."""
    from transformers.image_processing_utils import select_best_resolution

    side, patch = picture.side, picture.patch
    size = picture.size or _pair(picture.inputs["image_sizes"].tolist())
    rows, columns = side[0] // patch[0], side[1] // patch[1]
    first = getattr(picture.config, "vision_feature_select_strategy", "default") == "full"
    if first:
        raise UnsupportedModelError("its class tokens stand among the pieces of its tiles.")
    base = _Placed.stretched(size, side).boxes(rows, columns, patch, size)
    best = select_best_resolution(size, [list(one) for one in picture.config.image_grid_pinpoints])
    high, wide = (best[axis] // side[axis] * (rows, columns)[axis] for axis in (0, 1))
    scales = [best[axis] / size[axis] for axis in (0, 1)]
    if scales[1] < scales[0]:
        new = (min(math.ceil(size[0] * scales[1]), best[0]), best[1])
    else:
        new = (best[0], min(math.ceil(size[1] * scales[0]), best[1]))
    pasted = tuple((best[axis] - new[axis]) // 2 for axis in (0, 1))
    placed = _Placed((size[0] / new[0], size[1] / new[1]), (pasted[0], pasted[1]))
    boxes = placed.boxes(high, wide, patch, size).unflatten(0, (high, wide))
    boxes = _unpadded(boxes, size)
    ends = torch.full((len(boxes), 1, 4), torch.nan)
    found = torch.cat([base, torch.cat([boxes, ends], 1).flatten(0, 1)])
    if len(found) != picture.tokens:
        raise _unlike(picture, len(found))
    return found, size


def _unpadded(boxes: Float[Tensor, "row column 4"], size: ImageSize) -> Float[Tensor, "_ _ 4"]:
    """Without the rows or columns of features that the model drops as padding."""
    high, wide = boxes.shape[:2]
    if size[1] / size[0] > wide / high:
        kept = int(round(size[0] * (wide / size[1]), 7))
        drop = (high - kept) // 2
        return boxes[drop : high - drop]
    kept = int(round(size[1] * (high / size[0]), 7))
    drop = (wide - kept) // 2
    return boxes[:, drop : wide - drop]


def _unlike(picture: _Picture, expected: int) -> InputError:
    return InputError(
        f"{picture.tokens} tokens stand for a picture whose pieces are {expected}: make the inputs "
        "with the model's own processor."
    )


_FAMILIES: Mapping[str, Callable[[_Picture], Located]] = {
    "llava": _of_square,
    "paligemma": _of_square,
    "gemma3": _of_square,
    "qwen2_vl": _of_resolution,
    "qwen2_5_vl": _of_resolution,
    "smolvlm": _of_tiles,
    "idefics3": _of_tiles,
    "llava_next": _of_pinpoints,
}


def image_keys(
    config: Any,
    texts: Texts,
    token: int,
    sizes: Any = None,
    tiles: Any = None,
    processor: Any = None,
) -> ImageKeys:
    """Box of every image token in its picture.

    Args:
        config: of the model.
        texts: with images, as the model's processor gives them.
        token: that stands for a piece of an image.
        sizes: height and width of the pictures before the processor; None: as the model reads them.
        tiles: rows and columns of tiles, where a family cuts pictures and sizes do not tell.
        processor: the image processor, or its config.

    Raises:
        InputError: if the inputs do not fit the model.
        UnsupportedModelError: if the family's order of pieces is not known.
    """
    family = str(config.model_type)
    if family not in _FAMILIES or (
        family == "llava" and config.vision_config.model_type == "pixtral"
    ):
        raise UnsupportedModelError(
            f"the places of image tokens are not known for the family {family}; they are for "
            f"{', '.join(sorted(_FAMILIES))}."
        )
    known = processor.to_dict() if hasattr(processor, "to_dict") else (processor or _NOTHING)
    count = _pictures(family, texts)
    shape = (len(texts.tokens), count)
    heights, parts = _numbers("sizes", sizes, shape), _numbers("tiles", tiles, shape)
    at = texts.tokens.cpu() == token
    if texts.real is not None:
        at = at & texts.real.cpu()
    boxes = torch.full((*at.shape, 4), torch.nan)
    image = torch.full(at.shape, -1)
    read = torch.zeros(*shape, 2, dtype=torch.long)
    for row in range(len(at)):
        places = at[row].nonzero()[:, 0]
        for number, own in enumerate(_shared_out(family, config, texts, row, places, count)):
            picture = _Picture(
                config,
                _inputs_of(texts, row, number, count),
                len(own),
                None if heights is None else _pair(heights[row, number].tolist()),
                None if parts is None else _pair(parts[row, number].tolist()),
                known,
            )
            found, size = _FAMILIES[family](picture)
            boxes[row, own] = found
            image[row, own] = torch.where(found[:, 0].isnan(), -1, number)
            read[row, number] = torch.tensor(size)
    return ImageKeys(boxes, image, read)


def _pictures(family: str, texts: Texts) -> int:
    """Pictures in every text."""
    if PIXELS not in texts.inputs:
        raise InputError("the probe holds no images: make it with the model's own processor.")
    if GRID in texts.inputs:
        return int(texts.inputs[GRID].shape[1])
    if family in ("smolvlm", "idefics3"):
        return 1
    dimensions = 6 if family == "llava_next" else 5
    pixels = texts.inputs[PIXELS]
    return int(pixels.shape[1]) if pixels.ndim == dimensions else 1


def _shared_out(
    family: str, config: Any, texts: Texts, row: int, places: Int[Tensor, " token"], count: int
) -> Sequence[Tensor]:
    """Positions of image tokens, by picture."""
    if GRID in texts.inputs:
        merge = int(config.vision_config.spatial_merge_size)
        sizes = (texts.inputs[GRID][row].prod(-1) // merge**2).tolist()
        if sum(sizes) != len(places):
            raise InputError(
                f"text {row} has {len(places)} tokens for pictures of {sum(sizes)} pieces: make "
                "the inputs with the model's own processor."
            )
        return list(places.split(sizes))
    if count > 1 and (family == "llava_next" or len(places) % count):
        runs = places.tensor_split((places.diff() > 1).nonzero()[:, 0] + 1)
        if len(runs) != count:
            raise InputError(
                f"text {row} has {count} pictures whose tokens stand in {len(runs)} places: put "
                "words between them."
            )
        return list(runs)
    return list(places.split(len(places) // count))


def _inputs_of(texts: Texts, row: int, number: int, count: int) -> Mapping[str, Tensor]:
    """What belongs to one picture, but its pixels."""
    found = {}
    for name in (GRID, "image_sizes"):
        if name in texts.inputs:
            own = texts.inputs[name][row]
            found[name] = own[number] if own.ndim > 1 else own
    return found


def _numbers(name: str, given: Any, shape: tuple[int, int]) -> Int[Tensor, "text picture 2"] | None:
    """Two whole numbers of every picture, from those of all, of each text or of each picture."""
    if given is None:
        return None
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError):
        found = torch.zeros(0)
    by_text = found.ndim == 2 and shape[1] == 1
    if by_text:
        found = found[:, None]
    try:
        found = found.expand(*shape, 2)
    except RuntimeError:
        found = torch.zeros(0)
    if found.is_floating_point() or found.ndim != 3 or bool((found < 1).any()):
        raise InputError(
            f"{name}={given!r}: give two whole numbers from 1 on (height and width, or rows and "
            f"columns) for all pictures, for each of {shape[0]} texts, or for each of "
            f"{shape[1]} pictures in them."
        )
    return found.long()
