"""Image probes: pictures read, resized and normalised as the model expects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.batches import PIXELS, Batch
from headscope.base.stacks import PatchGrid, grid_of
from headscope.errors import InputError, UnsupportedModelError
from headscope.probes.encoding import HasVocabulary, marks_of, one_class_each
from headscope.probes.probe import Probe, of_images

FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_BILINEAR = 2
# Defaults for models without their own settings: [-1, 1], as in ViT's training.
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preparation:
    """Preprocessing of pictures; fields are named as in image processors.

    Attributes:
        mean, std: per channel, for values in [0, 1].
        resample: resizing filter, as numbered by PIL.
        shortest_edge: resize the shorter side to this many pixels and crop the centre; None: resize
            to the model's size, ignoring the aspect ratio.
        known: whether these are the model's own settings or defaults.
    """

    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF
    resample: int = _BILINEAR
    shortest_edge: int | None = None
    known: bool = False

    @classmethod
    def of(cls, processor: Mapping[str, Any] | None) -> "Preparation":
        """Read the settings from an image processor's config, with defaults for missing ones.

        Args:
            processor: entries of ``preprocessor_config.json``.
        """
        if not processor:
            return cls()
        shift = processor.get("do_normalize", True)
        mean = processor.get("image_mean") or _HALF if shift else (0.0, 0.0, 0.0)
        std = processor.get("image_std") or _HALF if shift else (1.0, 1.0, 1.0)
        size = processor.get("size") or {}
        edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
        cuts = processor.get("do_center_crop", False)
        return cls(
            tuple(float(one) for one in mean),
            tuple(float(one) for one in std),
            int(processor.get("resample", _BILINEAR)),
            None if edge is None or not cuts else int(edge),
            known=True,
        )

    def __call__(self, picture: Any, grid: PatchGrid) -> Float[Tensor, "channel height width"]:
        """Resize, crop and normalise one picture.

        Args:
            picture: a PIL image.
            grid: patch grid of the model that will read it.
        """
        channels, height, width = grid.size
        picture = picture.convert("L" if channels == 1 else "RGB")
        if self.shortest_edge is None:
            picture = picture.resize((width, height), self.resample)
        else:
            picture = _cut_out(picture, self.shortest_edge, height, width, self.resample)
        array = np.asarray(picture, dtype=np.float32) / 255
        values = torch.from_numpy(array.copy())
        values = values[None] if values.ndim == 2 else values.permute(2, 0, 1)
        mean, std = (torch.tensor(one[:channels])[:, None, None] for one in (self.mean, self.std))
        normal: Tensor = (values - mean) / std
        return normal


def _cut_out(picture: Any, edge: int, height: int, width: int, resample: int) -> Any:
    """Crop the centre of a resized picture."""
    wide, high = picture.size
    small = min(wide, high)
    picture = picture.resize((int(edge * wide / small), int(edge * high / small)), resample)
    wide, high = picture.size
    left, top = (wide - width) // 2, (high - height) // 2
    return picture.crop((left, top, left + width, top + height))


@checked
def images(
    model: HasVocabulary,
    source: str | Path | Sequence[Any] | Tensor | np.ndarray,
    labels: Sequence[int | str] | None = None,
    *,
    marks: Mapping[str, Any] | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> Probe:
    """Make a probe of images, resized to the model's input size.

    Pictures are resized and normalised as the model's image processor specifies; without one they
    are stretched to the model's size, with values from -1 to 1. Tensors of fractions are used
    unchanged and must have the model's size. What was done is recorded in ``probe.settings``.

    Positions are named by their token (``class``, ``register 1``) or by row and column of their
    patch (``r3 c5``), see ``probe.grid``; the marks ``class``, ``register`` and ``patch`` tell them
    apart. The class of an image is the target of its first position.

    Args:
        model: a vision model.
        source: a folder of pictures, with one subfolder per class if it has subfolders; PIL
            pictures, paths or arrays ``[height width channel]`` of integers up to 255; or a tensor
            ``[batch channel height width]`` of fractions, as the model reads them.
        labels: class of each image, by number or by the model's name for it; default: the name of
            its folder, if the model has a class of that name.
        marks: named sets of positions, as boxes of patches; see
            :func:`headscope.probes.from_batch`.
        batch: draw this many of the images; default: all.
        seed: seed of the draw.

    Raises:
        InputError: if there are no images, or they do not fit the model.
        UnsupportedModelError: if the model reads no images.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
        >>> vit = hs.load(ViTForImageClassification(ViTConfig(**small)).eval())
        >>> probe = hs.probes.images(vit, torch.rand(2, 3, 8, 8), labels=[0, 1])
        >>> probe.grid.labels
        ('class', 'r0 c0', 'r0 c1', 'r1 c0', 'r1 c1')
    """
    grid = _need_grid(model)
    own = getattr(model, "image_processor", None)
    pictures, folders = _gathered(source)
    number = torch.arange(len(pictures))
    if batch is not None:
        if not 1 <= batch <= len(pictures):
            raise InputError(f"batch={batch} of {len(pictures)} images: give 1 to that many.")
        draw = torch.Generator().manual_seed(seed)
        number = torch.randperm(len(pictures), generator=draw)[:batch].sort().values
    chosen = [pictures[at] for at in number.tolist()]
    asked = _classes(model, labels, folders, len(pictures))
    if isinstance(source, Tensor):
        pixels, settings = torch.stack(chosen), {"normalised": "as given"}
    else:
        pixels, settings = _prepared(Preparation.of(own), chosen, grid)
    given = Batch.of({PIXELS: pixels})
    misfit = given.misfit(model.name, None, 0, grid)
    if misfit is not None:
        raise InputError(misfit)
    return of_images(
        given.inputs[PIXELS],
        grid,
        None if asked is None else asked[number],
        marks=marks_of(grid, marks or {}, len(chosen)),
        seed=None if batch is None else seed,
        settings=settings,
    )


@checked
def random_images(model: HasVocabulary, batch: int = 16, *, seed: int = 0) -> Probe:
    """Make a probe of random blobs at all scales, for use without pictures.

    Each is a sum of standard normal noise drawn on grids of 2, 4, 8, ... cells a side and
    interpolated to the whole image, scaled to mean 0 and standard deviation 1.

    Args:
        model: a vision model.
        batch: number of images.
        seed: seed of the draw.

    Raises:
        InputError: if batch is below 1.
        UnsupportedModelError: if the model reads no images.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
        >>> vit = hs.load(ViTModel(ViTConfig(**small)).eval())
        >>> hs.probes.random_images(vit, 2).inputs["pixel_values"].shape
        torch.Size([2, 3, 8, 8])
    """
    grid = _need_grid(model)
    if batch < 1:
        raise InputError(f"batch={batch} draws nothing: give 1 or more.")
    channels, height, width = grid.size
    draw = torch.Generator().manual_seed(seed)
    pixels, cells = torch.zeros(batch, channels, height, width), 2
    while True:
        noise = torch.randn(batch, channels, min(cells, height), min(cells, width), generator=draw)
        pixels += torch.nn.functional.interpolate(noise, (height, width), mode="nearest")
        if cells >= max(height, width):
            break
        cells *= 2
    pixels = (pixels - pixels.mean()) / pixels.std()
    return of_images(pixels, grid, name="random_images", seed=seed)


def _need_grid(model: HasVocabulary) -> PatchGrid:
    grid = grid_of(getattr(model, "stacks", {}))
    if grid is None:
        raise UnsupportedModelError(
            f"{model.name} reads texts: images are for a vision model, and hs.probes.text for this."
        )
    return grid


def _prepared(
    prepare: Preparation, pictures: Sequence[Any], grid: PatchGrid
) -> tuple[Float[Tensor, "batch channel height width"], dict[str, str]]:
    """Preprocess pictures for a model, and record what was done."""
    opened = [_opened(picture) for picture in pictures]
    sizes = sorted({picture.size for picture in opened})
    pixels = torch.stack([prepare(picture, grid) for picture in opened])
    settings = {"normalised": "as the model's image processor" if prepare.known else "to [-1, 1]"}
    _, height, width = grid.size
    if sizes != [(width, height)]:
        told = f"{sizes[0][0]} x {sizes[0][1]}" if len(sizes) == 1 else f"{len(sizes)} sizes"
        settings["resized"] = f"to {width} x {height} pixels from {told}"
    return pixels, settings


def _gathered(source: Any) -> tuple[list[Any], list[str] | None]:
    """Collect pictures or their paths, and their folders if those are classes."""
    if isinstance(source, str | Path):
        return _files(Path(source))
    found = list(source)
    if not found:
        raise InputError("there are no images: give at least one.")
    return found, None


def _files(folder: Path) -> tuple[list[Any], list[str] | None]:
    if folder.is_file():
        return [folder], None
    if not folder.is_dir():
        raise InputError(f"there is no folder of images {str(folder)!r}.")
    named = sorted(one for one in folder.rglob("*") if one.suffix.lower() in FORMATS)
    if not named:
        raise InputError(f"the folder {str(folder)!r} holds no images ({', '.join(FORMATS)}).")
    parents = [one.parent.name for one in named]
    inside = all(one.parent != folder for one in named)
    return list(named), parents if inside else None


def _opened(picture: Any) -> Any:
    """Open a picture with PIL."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError(
            "reading pictures needs Pillow: install headscope[images], or give a tensor "
            "[batch channel height width]."
        ) from error
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, str | Path):
        try:
            with Image.open(picture) as file:
                return file.copy()
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{str(picture)!r} is not a picture that can be read.") from error
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    whole = np.issubdtype(array.dtype, np.integer) and array.size > 0
    if not (shaped and whole and array.min() >= 0 and array.max() <= 255):
        raise InputError(
            f"an image is an array of shape {array.shape} and type {array.dtype}: give [height "
            "width channel] of whole numbers from 0 to 255 with 1, 3 or 4 channels, or a tensor "
            "[batch channel height width] of fractions."
        )
    return Image.fromarray(array.astype(np.uint8))


def _classes(
    model: HasVocabulary, labels: Any, folders: list[str] | None, count: int
) -> Tensor | None:
    """Class numbers of all images; None if unknown."""
    known = dict(getattr(model, "classes", {}))
    if labels is None and folders is not None and set(folders) <= set(known):
        labels = folders
    if labels is None:
        return None
    given = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    for one in given:
        if isinstance(one, str) and one not in known:
            raise InputError(
                f"{model.name} has no class {one!r}; it has: {', '.join(list(known)[:8]) or 'none'}"
                f"{' and more' if len(known) > 8 else ''}."
            )
    return one_class_each([known[one] if isinstance(one, str) else one for one in given], count)
