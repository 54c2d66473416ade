"""Box of each image token in its picture, for families of vision-language models.

What a processor and a model do to a picture (stretching, cutting out, padding, tiles, merging of
patches) is not written in its inputs; here it is undone from their sizes and the model's config.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import isqrt
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
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
            rows: number of rows of cells.
            columns: number of columns of cells.
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
        config: transformers config of the model.
        inputs: its inputs: pixels, and what the processor returned with them.
        tokens: number of tokens that represent it.
        size: height and width, as the user gave them; None: as the model reads it.
        tiles: rows and columns of tiles; None if the family cuts no pictures.
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
    merged = rows // isqrt(getattr(picture.config, "mm_tokens_per_image", rows**2))
    pieces = (rows // merged) * (columns // merged) + first
    if picture.tokens != pieces:
        raise _unlike(picture, pieces)
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
    down, across = picture.tiles or _WHOLE
    size = picture.size or (side[0] * max(down, 1), side[1] * max(across, 1))
    parts = []
    for at in range(down * across):
        row, column = divmod(at, across)
        scale = (size[0] / (down * side[0]), size[1] / (across * side[1]))
        shift = (-row * side[0], -column * side[1])
        parts.append(_Placed(scale, shift).boxes(rows, columns, cell, size))
    parts.append(_Placed.stretched(size, side).boxes(rows, columns, cell, size))
    return torch.cat(parts), size


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


_WHOLE = (0, 0)  # a picture that is not cut


def _pieces(cut: ImageSize) -> int:
    """Tiles of a picture, the whole image behind them included."""
    return cut[0] * cut[1] + 1


@dataclass(frozen=True, eq=False)
class _Tiled:
    """Text of a family that cuts pictures into tiles (smolvlm, idefics3).

    Attributes:
        tokens: tokens of the text.
        places: positions of the image tokens.
        each: tokens that stand for a tile.
        side: height and width of a tile, in pixels.
    """

    tokens: Int[Tensor, " pos"]
    places: Int[Tensor, " token"]
    each: int
    side: ImageSize

    @property
    def total(self) -> int:
        """Number of tiles."""
        return len(self.places) // self.each

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """First and last position of every run of image tokens."""
        found = self.places.tensor_split((self.places.diff() > 1).nonzero()[:, 0] + 1)
        return [(int(one[0]), int(one[-1])) for one in found]

    def made_of(self, cuts: Sequence[ImageSize]) -> bool:
        """Whether pictures with these rows and columns make up the text's image tokens."""
        if any((rows == 0) != (columns == 0) for rows, columns in cuts):
            return False
        ends = list(accumulate(self.each * _pieces(cut) for cut in cuts))
        lengths = [1 + stop - start for start, stop in self.runs]
        apart = any(length != self.each for length in lengths)  # words stand between pictures
        return ends[-1] == sum(lengths) and (not apart or set(accumulate(lengths)) <= set(ends))

    def framed(self) -> list[ImageSize] | None:
        """Rows and columns of every picture's tiles, as the words around them say.

        Processors write a mark and a place before each tile, a line break more before each row, a
        mark and one more word before each whole image, and the mark again behind it. So each whole
        image follows the word that the last run follows. None: the text is not written like this.
        """
        runs, tokens = self.runs, self.tokens.tolist()
        first, (begin, end) = runs[0][0], runs[-1]
        alike = all(1 + stop - start == self.each for start, stop in runs)
        if not alike or first < 2 or end + 1 == len(tokens):
            return None
        mark, whole = tokens[end + 1], tokens[begin - 1]
        if any(tokens[start - 2] != mark for start, _ in runs):
            return None
        found, own = list[ImageSize](), list[tuple[int, int]]()
        for run in runs:
            own.append(run)
            if tokens[run[0] - 1] == whole:
                cut = _rows_of(own)
                if cut is None:
                    return None
                found.append(cut)
                own = []
        return found

    def told(
        self, sizes: Tensor | None, tiles: Tensor | None, count: int
    ) -> list[ImageSize] | None:
        """Rows and columns of so many pictures' tiles, by what the user says of the pictures.

        None: the pictures together have another number of tiles. The longer side of every picture
        is resized to the same number of tiles.
        """
        if tiles is not None:
            given = [_pair(one) for one in tiles.tolist()]
            return given if self.made_of(given) else None
        if sizes is None:
            return [_WHOLE] if count == self.total == 1 else None
        for along in range(self.total + 1):
            cuts = [_cut_along(_pair(one), self.side[0], along) for one in sizes.tolist()]
            if self.made_of(cuts):
                return cuts
        return None


def _rows_of(runs: Sequence[tuple[int, int]]) -> ImageSize | None:
    """Rows and columns of tiles whose whole image is the last run; None: rows of unequal length."""
    ends = [
        at + 1
        for at, (own, following) in enumerate(pairwise(runs))
        if following[0] - own[1] - 1 > 2
    ]
    if len(runs) == 1:
        return _WHOLE
    columns = ends[0] if ends else 0
    if not columns or ends != list(range(columns, len(runs), columns)):
        return None
    return len(ends), columns


def _cut_along(size: ImageSize, side: int, along: int) -> ImageSize:
    """Rows and columns of tiles where the longer side of a picture becomes so many.

    The other is resized as the shape of the picture wants, to an even number of pixels, and both up
    to whole tiles. A picture of one tile is not cut.
    """
    if along < 2:
        return _WHOLE
    high, wide = size
    shape = wide / high
    other = int(along * side / shape) if wide >= high else int(along * side * shape)
    other = max(1, math.ceil((other + other % 2) / side))
    return (other, along) if wide >= high else (along, other)


def _nested(given: Any) -> int | None:
    """Pictures of a text, where something is said of each; None: it is said of all alike."""
    if given is None:
        return None
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return None
    return int(found.shape[1]) if found.ndim == 3 else None


def _cuts(texts: Sequence[_Tiled], sizes: Any, tiles: Any) -> list[list[ImageSize]]:
    """Rows and columns of the tiles of every text's pictures.

    Raises:
        InputError: if they cannot be told, or texts have different numbers of pictures.
    """
    known = [cut for text in texts if (cut := text.framed()) is not None]
    if len(known) == len(texts):
        if len({len(one) for one in known}) > 1:
            many = ", ".join(str(len(one)) for one in known)
            raise InputError(f"the texts have {many} pictures: give texts with equally many.")
        _need_alike(known, sizes, tiles)
        return known
    said = next((one for one in map(_nested, (sizes, tiles)) if one is not None), None)
    counts = range(1, max(text.total for text in texts) + 1) if said is None else (said,)
    # Pictures that are not cut fit any number of tiles, so they have to be spoken of one by one.
    fits = [
        cuts
        for cuts in _supposed(texts, sizes, tiles, counts)
        if said is not None or len(cuts[0]) == 1 or any(one != _WHOLE for one in cuts[0])
    ]
    if len(fits) == 1:
        return fits[0]
    hint = (
        "give sizes= or tiles= of each picture of each text ((0, 0) tiles where it is not cut), or "
        "texts of the model's own processor."
    )
    if fits:
        many = " or ".join(str(len(one[0])) for one in fits)
        raise InputError(f"the {texts[0].total} tiles of a text may show {many} pictures: {hint}")
    given = f", which tiles={tiles!r} do not make" if tiles is not None else ""
    given = f", which pictures of sizes={sizes!r} do not make" if sizes is not None else given
    raise InputError(f"the image tokens of a text are {texts[0].total} tiles{given}: {hint}")


def _told(
    texts: Sequence[_Tiled], sizes: Any, tiles: Any, count: int
) -> list[list[ImageSize]] | None:
    """What is said of so many pictures in every text; None if one is not made of such."""
    shape = (len(texts), count)
    heights, parts = _numbers("sizes", sizes, shape), _numbers("tiles", tiles, shape, 0)
    found = [
        text.told(
            None if heights is None else heights[row], None if parts is None else parts[row], count
        )
        for row, text in enumerate(texts)
    ]
    whole = [one for one in found if one is not None]
    return whole if len(whole) == len(found) else None


def _supposed(
    texts: Sequence[_Tiled], sizes: Any, tiles: Any, counts: Sequence[int]
) -> list[list[list[ImageSize]]]:
    """What is said of the pictures, for each number of them that it fits."""
    found, refused = [], []
    for count in counts:
        try:
            cuts = _told(texts, sizes, tiles, count)
        except InputError as error:
            refused.append(error)
            continue
        if cuts is not None:
            found.append(cuts)
    if len(refused) == len(counts):
        raise refused[0]
    return found


def _need_alike(cuts: list[list[ImageSize]], sizes: Any, tiles: Any) -> None:
    """Refuse sizes or tiles that the words between tiles contradict.

    Raises:
        InputError: if they do.
    """
    shape = (len(cuts), len(cuts[0]))
    heights, parts = _numbers("sizes", sizes, shape), _numbers("tiles", tiles, shape, 0)
    for row, number in ((row, number) for row in range(shape[0]) for number in range(shape[1])):
        own = cuts[row][number]
        if parts is not None and _pair(parts[row, number].tolist()) != own:
            raise InputError(
                f"picture {number} of text {row} was cut into {own[0]} rows of {own[1]} tiles, and "
                f"tiles= says {parts[row, number].tolist()}: leave tiles= out."
            )
        if heights is None or own == _WHOLE:
            continue
        size = _pair(heights[row, number].tolist())
        wanted = _cut_along(size, 1 << 12, max(own))
        off = sorted(abs(one - two) for one, two in zip(own, wanted, strict=True))
        if off[0] > 0 or off[1] > 1:  # rounding may make one tile more on the shorter side
            raise InputError(
                f"picture {number} of text {row} was cut into {own[0]} rows of {own[1]} tiles, "
                f"which {size[0]} pixels of height and {size[1]} of width are not: give sizes= as "
                "(height, width) before the processor."
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


def image_boxes(
    config: Any,
    texts: Texts,
    token: int,
    sizes: Any = None,
    tiles: Any = None,
    processor: Any = None,
) -> ImageKeys:
    """Box of every image token in its picture.

    Args:
        config: transformers config of the model.
        texts: with images, as the model's processor gives them.
        token: id of the token that represents a piece of an image.
        sizes: height and width of the pictures before the processor; None: as the model reads them.
        tiles: rows and columns of tiles, where a family cuts pictures and neither the words between
            them nor sizes tell.
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
    if PIXELS not in texts.inputs:
        raise InputError("the probe holds no images: make it with the model's own processor.")
    known = processor.to_dict() if hasattr(processor, "to_dict") else (processor or _NOTHING)
    at = texts.tokens.cpu() == token
    if texts.real is not None:
        at = at & texts.real.cpu()
    parts, cuts = _parts(family, config, texts, at, (sizes, tiles))
    count = len(parts[0])
    heights = _numbers("sizes", sizes, (len(at), count))
    boxes = torch.full((*at.shape, 4), torch.nan)
    image = torch.full(at.shape, -1)
    read = torch.zeros(len(at), count, 2, dtype=torch.long)
    for row, number in ((row, number) for row in range(len(at)) for number in range(count)):
        own = parts[row][number]
        picture = _Picture(
            config,
            _inputs_of(texts, row, number),
            len(own),
            None if heights is None else _pair(heights[row, number].tolist()),
            None if cuts is None else cuts[row][number],
            known,
        )
        found, size = _FAMILIES[family](picture)
        boxes[row, own] = found
        image[row, own] = torch.where(found[:, 0].isnan(), -1, number)
        read[row, number] = torch.tensor(size)
    return ImageKeys(boxes, image, read)


def _parts(
    family: str, config: Any, texts: Texts, at: Bool[Tensor, "batch pos"], told: tuple[Any, Any]
) -> tuple[list[list[Tensor]], list[list[ImageSize]] | None]:
    """Positions of image tokens by text and picture, and how pictures were cut into tiles."""
    places = [own.nonzero()[:, 0] for own in at]
    if _FAMILIES[family] is not _of_tiles:
        count = _pictures(family, texts)
        own = (_shared_out(config, texts, row, one, count) for row, one in enumerate(places))
        return [list(one) for one in own], None
    each = _tokens_of_tile(config)
    if odd := [len(one) for one in places if not len(one) or len(one) % each]:
        raise InputError(
            f"{odd[0]} tokens stand for pictures whose tiles are {each}: make the inputs with the "
            "model's own processor."
        )
    side = _pair(config.vision_config.image_size)
    rows = zip(texts.tokens.cpu(), places, strict=True)
    cuts = _cuts([_Tiled(row, one, each, side) for row, one in rows], *told)
    lengths = [[each * _pieces(one) for one in cut] for cut in cuts]
    return [list(one.split(own)) for one, own in zip(places, lengths, strict=True)], cuts


def _tokens_of_tile(config: Any) -> int:
    """Tokens that stand for a tile, or for the whole image (smolvlm, idefics3)."""
    side, patch = _pair(config.vision_config.image_size), _pair(config.vision_config.patch_size)
    rows, columns = (side[axis] // patch[axis] // int(config.scale_factor) for axis in (0, 1))
    return rows * columns


def _pictures(family: str, texts: Texts) -> int:
    """Pictures in every text."""
    if GRID in texts.inputs:
        return int(texts.inputs[GRID].shape[1])
    dimensions = 6 if family == "llava_next" else 5
    pixels = texts.inputs[PIXELS]
    return int(pixels.shape[1]) if pixels.ndim == dimensions else 1


def _shared_out(
    config: Any, texts: Texts, row: int, places: Int[Tensor, " token"], count: int
) -> Sequence[Tensor]:
    """Positions of image tokens, by picture."""
    if GRID in texts.inputs:
        merge = int(config.vision_config.spatial_merge_size)
        return list(places.split((texts.inputs[GRID][row].prod(-1) // merge**2).tolist()))
    if count > 1 and ("image_sizes" in texts.inputs or len(places) % count):
        runs = places.tensor_split((places.diff() > 1).nonzero()[:, 0] + 1)
        if len(runs) != count:
            raise InputError(
                f"text {row} has {count} pictures whose tokens stand in {len(runs)} places: put "
                "words between them."
            )
        return list(runs)
    return list(places.split(len(places) // count))


def need_own_images(config: Any, texts: Texts, token: int) -> None:
    """Refuse texts whose image tokens cannot be those of their own images.

    Images are handed out in order, as many to each text; a text with fewer or more would read those
    of another.

    Raises:
        InputError: if there are such.
    """
    counts = texts.tokens.eq(token).sum(1).tolist()
    if GRID in texts.inputs:
        merge = int(config.vision_config.spatial_merge_size)
        wanted = (texts.inputs[GRID].prod(-1).sum(-1) // merge**2).tolist()
        for row, (one, pieces) in enumerate(zip(counts, wanted, strict=True)):
            if one != pieces:
                raise InputError(
                    f"text {row} has {one} image tokens, and its images have {pieces} pieces: make "
                    "the inputs with the model's own processor."
                )
    elif _FAMILIES.get(str(config.model_type)) is _of_square and len(set(counts)) > 1:
        row = next(row for row, one in enumerate(counts) if one != counts[0])
        raise InputError(
            f"text 0 has {counts[0]} image tokens and text {row} has {counts[row]}, and every "
            "image takes as many: give every text as many images."
        )


def _inputs_of(texts: Texts, row: int, number: int) -> Mapping[str, Tensor]:
    """What belongs to one picture, but its pixels."""
    found = {}
    for name in (GRID, "image_sizes"):
        if name in texts.inputs:
            own = texts.inputs[name][row]
            found[name] = own[number] if own.ndim > 1 else own
    return found


def _numbers(
    name: str, given: Any, shape: tuple[int, int], least: int = 1
) -> Int[Tensor, "text picture 2"] | None:
    """Two whole numbers of every picture, from those of all, of each text or of each picture."""
    if given is None:
        return None
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(0)
    by_text = found.ndim == 2 and shape[1] == 1
    if by_text:
        found = found[:, None]
    try:
        found = found.expand(*shape, 2)
    except RuntimeError:
        found = torch.zeros(0)
    if found.is_floating_point() or found.ndim != 3 or bool((found < least).any()):
        raise InputError(
            f"{name}={given!r}: give two whole numbers from {least} on (height and width, or rows "
            f"and columns) for all pictures, for each of {shape[0]} texts, or for each of "
            f"{shape[1]} pictures in them."
        )
    return found.long()
