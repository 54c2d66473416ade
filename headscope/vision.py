"""Heads of vision models: importance, attention range, classes, text descriptions, OCR, cues.

An image model gives its answer at its first position, the class token; queries and keys are patches
of a grid. Most functions need an image model: :func:`headscope.load` of ViT, DeiT, DINOv2 or the
vision half of CLIP and SigLIP. For vision-language models: where each image token is in its
picture, which heads read written text there (OCR heads), and the effect of steering heads to a
region.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom
from torch import Tensor

from headscope import capture, metrics
from headscope.ablation.groups import ablate_groups
from headscope.ablation.heads import ablate_heads
from headscope.ablation.run import InterventionLike, Measurement, Placer, by_head, present
from headscope.base.arguments import checked
from headscope.base.batches import SEGMENTS, TURNS
from headscope.base.files import Saved, Stored
from headscope.base.options import RunOptions
from headscope.base.result import Composed, Glance, Shown, Tabular, number, sizes
from headscope.base.specs import Direction, Provenance, ScoreSpec
from headscope.base.stacks import ImageKeys, PatchGrid, grid_of
from headscope.base.statistics import Design
from headscope.edits import Heads, Variant, head_list
from headscope.errors import InputError, UnsupportedModelError, whole
from headscope.heads import HeadIndex, ModelShape
from headscope.interventions import Redistribute
from headscope.models.decoding import end_tokens
from headscope.models.loading import load_halves
from headscope.models.protocol import HeadModel, need_model
from headscope.models.running import own_types
from headscope.models.taps import Reads, Tap, TapView, Texts, at_layers
from headscope.origin import origin
from headscope.probes.encoding import from_tokens
from headscope.probes.probe import Probe
from headscope.table import AttentionMaps, HeadScores, HeadTable
from headscope.views import Unembedding

if TYPE_CHECKING:
    import pandas

_LI = "Li et al. 2023 (arXiv 2303.13731), How Does Attention Work in Vision Transformers?"
_VILAS = "Vilas et al. 2023 (arXiv 2310.18969), Analyzing Vision Transformers in Class Embedding"
_DROP = ScoreSpec(
    "probability_drop",
    unit="probability",
    bounds=(-1.0, 1.0),
    alternative="two-sided",
    source=_LI,
    description="Probability of the true class minus that with the head's output replaced.",
)
_ACCURACY = ScoreSpec(
    "accuracy_change",
    unit="share",
    bounds=(-1.0, 1.0),
    alternative="two-sided",
    source=_LI,
    description="Accuracy with the head's output replaced minus that of the clean run.",
)
_DIVERGENCE = ScoreSpec(
    "output_divergence",
    unit="nats",
    bounds=(0.0, float(np.log(2))),
    alternative="two-sided",
    source=_LI,
    description="Jensen-Shannon divergence of the class probabilities of both runs.",
)
_RANGE = ScoreSpec(
    "attention_range",
    unit="patches",
    bounds=(0.0, None),
    alternative="two-sided",
    source=_LI,
    description="Mean Chebyshev distance between a patch and the patches that it attends to.",
)
_IDENTIFIABILITY = ScoreSpec(
    "identifiability",
    unit="share",
    bounds=(0.0, 1.0),
    alternative="two-sided",
    source=_VILAS,
    description="1 - (rank of the true class in the head's write) / (number of classes).",
)
_CUE = ScoreSpec(
    "cue_effect",
    unit="nats",
    alternative="two-sided",
    source="Gandelsman et al. 2024 (arXiv 2310.05916), heads of spurious cues",
    description="Effect of mean ablation on images with a misleading cue, minus that on others.",
)
# Bytes of rows held at once, and tokens per pass.
_ROWS_BYTES = 1 << 27
_TOKENS_PER_PASS = 8192


def _need_grid(model: HeadModel) -> PatchGrid:
    need_model(model)
    grid = grid_of(model.stacks)
    if grid is None:
        raise UnsupportedModelError(
            f"{model.name} reads texts, and this analysis needs an image model: load one, such as "
            "a ViT or the vision half of CLIP."
        )
    return grid


def _need_classes(model: HeadModel, probe: Probe) -> Int[Tensor, " batch"]:
    """Validate the class of every image.

    Raises:
        InputError: if an image has no class.
        UnsupportedModelError: if the model has no class logits.
    """
    if (reason := model.limits.get("logits")) is not None:
        raise UnsupportedModelError(reason)
    classes = probe.targets[:, 0]
    if bool((classes < 0).any()) or bool((classes >= model.shape.n_logits).any()):
        raise InputError(
            f"every image needs its class, 0 to {model.shape.n_logits - 1}: give "
            "hs.probes.images(model, pictures, labels=...)."
        )
    return classes


# Importance.


@checked
def importance(
    model: HeadModel,
    probe: Probe,
    method: InterventionLike = "zero",
    heads: Heads | None = None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
) -> HeadTable:
    """Importance of every head of an image classifier: effect of masking it on the class.

    ``probability_drop``: probability of the true class, clean minus masked, positive for heads that
    help; ``accuracy_change``: accuracy, masked minus clean; ``output_divergence``: Jensen-Shannon
    divergence between the two class distributions, in nats. All are means over images, from the
    same passes.

    Args:
        model: image classifier.
        probe: images with their classes.
        method: intervention on the head's output; see :func:`headscope.ablate_heads`. The source
            uses zero.
        heads: heads to use. Default: all.
        batch_size: images per pass.
        seed: seed for methods that sample.

    Raises:
        InputError: if an image has no class.
        UnsupportedModelError: if the model does not read images, or has no class logits.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
        >>> vit = hs.load(ViTForImageClassification(ViTConfig(**small)).eval())
        >>> probe = hs.probes.images(vit, torch.rand(3, 3, 8, 8), labels=[0, 1, 1])
        >>> list(hs.vision.importance(vit, probe))
        ['probability_drop', 'accuracy_change', 'output_divergence']
    """
    _need_grid(model)
    probe = capture.on_grid_of(model, probe)
    _need_classes(model, probe)
    chosen = present(model, heads)
    options = RunOptions(batch_size, None, seed)
    measurement = Measurement.of(
        model,
        probe,
        metrics.answer_probability,
        options,
        others=(metrics.accuracy, metrics.js_divergence),
    )
    placer = Placer(measurement, method)

    def variants(part: slice, batch: Any) -> list[Variant]:
        place = placer.place(part, batch)
        return [(place([head]),) for head in chosen]

    edited, clean = measurement.measure_all(variants, len(chosen), f"masking {len(chosen)} heads")
    change = edited - clean[:, None]
    about = measurement.provenance(seed, method=str(getattr(method, "name", method)))
    values = {_DROP: -change[0], _ACCURACY: change[1], _DIVERGENCE: edited[2]}
    return HeadTable(
        [
            HeadScores.from_effects(
                spec,
                by_head(model, chosen, one),
                kv_heads=model.shape.n_kv_heads,
                design=Design(clusters=probe.cluster_labels),
                provenance=about,
            ).of_stack(model.shape.stack)
            for spec, one in values.items()
        ]
    )


@checked
def ranks(
    scores: HeadScores,
) -> tuple[Int[np.ndarray, "layer head"], Int[np.ndarray, "layer head"]]:
    """Rank of every head, from 1: within its layer, and overall.

    Ties are broken by head number; heads without a value come last.

    Args:
        scores: scores to rank; rank 1 is the highest, or the lowest if lower is better.

    Example:
        >>> within, overall = hs.vision.ranks(table["induction"])
        >>> int(overall.min()), int(within.max()) == table["induction"].mean.shape[1]
        (1, True)
    """
    sign = 1.0 if scores.spec.direction == "lower" else -1.0
    values = np.nan_to_num(sign * scores.mean, nan=np.inf)

    def ranked(some: Float[np.ndarray, "*any"]) -> Int[np.ndarray, "*any"]:
        flat = some.ravel()
        found = np.empty(flat.size, dtype=int)
        found[np.argsort(flat, kind="stable")] = np.arange(1, flat.size + 1)
        return found.reshape(some.shape)

    return np.stack([ranked(layer) for layer in values]), ranked(values)


def _frame(
    stack: str, shape: Sequence[int], axis: str = "", **values: Float[np.ndarray, "*any"]
) -> "pandas.DataFrame":
    """Data frame of values by layer and head, and by one more axis."""
    import pandas

    places = np.indices(tuple(shape)).reshape(len(shape), -1)
    heads = [str(HeadIndex(layer, head, stack)) for layer, head in places[:2].T.tolist()]
    more = {axis: places[2]} if axis else {}
    flat = {name: np.asarray(value).ravel() for name, value in values.items()}
    return pandas.DataFrame({"head": heads} | more | flat)


def _size(shape: ModelShape) -> tuple[int, int]:
    return shape.n_layers, shape.n_heads


# Range, hops and mean maps.


@dataclass(frozen=True, eq=False, repr=False)
class HopProfile(Composed, Saved, Shown, Tabular):
    """Attention between patches as a function of their distance.

    Attributes:
        strength: mean of ``A[i, j]`` over pairs of patches at each Chebyshev distance.
        mass: total attention of a patch to all patches at each distance, mean over patches and
            images.
        range: attention-weighted distance between query and key, per image.
        class_row: attention of the class token to patches, registers and itself, in this order.
        class_column: attention of patches to the class token; NaN without one.
    """

    strength: Float[np.ndarray, "layer head hop"]
    mass: Float[np.ndarray, "layer head hop"]
    range: HeadScores
    class_row: Float[np.ndarray, "layer head 3"]
    class_column: Float[np.ndarray, "layer head"]

    def inside(self) -> Mapping[str, Any]:
        """Range of every head."""
        return {"": self.range}

    def glance(self) -> Glance:
        """Show the heads of shortest and of longest range."""
        ranked = self.range.top(self.range.mean.size)
        ends = [*ranked[:3], *ranked[-3:]] if len(ranked) > 6 else ranked
        return Glance(
            "Attention between patches by distance",
            [
                self.range.provenance.model or "",
                sizes(("layer", "head"), self.mass.shape[:2]),
                f"distances 0 to {self.mass.shape[2] - 1}",
            ],
            ("head", "mean distance", "own patch", "distance 1"),
            [(str(head), number(value), *map(number, self._near(head))) for head, value in ends],
            hint="hs.plots.heatmap(found.range)",
        )

    def _near(self, head: HeadIndex) -> list[float]:
        """Mass at distance 0 and 1."""
        near: list[float] = self.mass[head.layer, head.head, :2].tolist()
        return [*near, *[0.0] * (2 - len(near))]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head and distance."""
        return _frame(
            self.range.stack, self.mass.shape, "distance", strength=self.strength, mass=self.mass
        )


@checked
@torch.no_grad()
def hops(model: HeadModel, probe: Probe, *, batch_size: int | None = None) -> HopProfile:
    """Attention between patches by their distance in rows or columns, per head.

    Queries and keys are patches; the class token's row and column are reported separately. The
    distance between two patches is ``max(|row - row'|, |column - column'|)``.

    Args:
        model: image model.
        probe: images.
        batch_size: images per pass.

    Raises:
        UnsupportedModelError: if the model does not read images.

    Source:
        Li et al. 2023 (arXiv 2303.13731), attention strength by k-hop neighbourhood.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 12, "patch_size": 4}
        >>> vit = hs.load(ViTModel(ViTConfig(**small)).eval())
        >>> hs.vision.hops(vit, hs.probes.random_images(vit, 2)).mass.shape
        (1, 2, 3)
    """
    grid = _need_grid(model)
    probe = capture.on_grid_of(model, probe)
    parts = [
        reader
        for _, reader in capture.stream(model, probe, lambda *_: _Hops(grid), batch_size=batch_size)
    ]
    shape, farthest = model.shape, max(grid.rows, grid.columns)
    mass = np.full((*_size(shape), len(probe), farthest), np.nan)
    row, column = (np.full((*_size(shape), *more), np.nan) for more in ((3,), ()))
    for layer in shape.attention_layers:
        mass[layer] = torch.cat([part.mass[layer] for part in parts], 0).transpose(0, 1).numpy()
        if "class" in grid.specials:
            row[layer] = torch.cat([part.row[layer] for part in parts]).mean(0).numpy()
            column[layer] = torch.cat([part.column[layer] for part in parts]).mean(0).numpy()
    far = np.arange(farthest)
    with np.errstate(invalid="ignore"):
        reach = (mass * far).sum(-1) / mass.sum(-1)
    apart = grid.offsets(torch.arange(grid.first, grid.length))[:, grid.first :].abs().amax(-1)
    pairs = torch.bincount(apart.flatten(), minlength=farthest).numpy() / len(apart)
    scores = HeadScores.from_examples(
        _RANGE,
        reach,
        kv_heads=shape.n_kv_heads,
        design=Design(clusters=probe.cluster_labels),
        provenance=origin(model, probe),
    ).of_stack(shape.stack)
    mean = mass.mean(2)
    with np.errstate(invalid="ignore", divide="ignore"):
        strength = mean / pairs
    return HopProfile(strength, mean, scores, row, column)


@dataclass
class _Hops:
    """Reader that sums attention between patches by distance, layer by layer."""

    grid: PatchGrid
    mass: dict[int, Tensor] = field(default_factory=dict)
    row: dict[int, Tensor] = field(default_factory=dict)
    column: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        return at_layers(shape, self._read)

    def _read(self, view: TapView) -> None:
        grid, first = self.grid, self.grid.first
        total: Tensor | None = None
        batch, heads = view.z.shape[0], view.z.shape[2]
        patches = torch.arange(first, grid.length)
        column = torch.zeros(batch, heads, device=view.z.device)
        for part in capture.chunks(patches, 4 * batch * heads * grid.length, _ROWS_BYTES):
            rows = view.rows(part).pattern.float()
            hop = grid.offsets(part)[:, first:].abs().amax(-1)
            at = torch.nn.functional.one_hot(hop, max(grid.rows, grid.columns)).to(rows)
            found = torch.einsum("bhqk,qkd->bhd", rows[..., first:], at)
            total = found if total is None else total + found
            if "class" in grid.specials:
                column += rows[..., 0].sum(-1)
        assert total is not None  # noqa: S101  # an image has patches
        self.mass[view.layer] = (total / len(patches)).cpu().double()
        if "class" in grid.specials:
            own = view.rows(torch.tensor([0])).pattern[:, :, 0].cpu().double()
            kinds = (own[..., first:].sum(-1), own[..., 1:first].sum(-1), own[..., 0])
            self.row[view.layer] = torch.stack(kinds, -1)
            self.column[view.layer] = (column / len(patches)).cpu().double()


@checked
@torch.no_grad()
def maps(
    model: HeadModel,
    probe: Probe,
    query: str = "class",
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> AttentionMaps:
    """Attention maps of images: from some positions to every patch, per head.

    Args:
        model: image model.
        probe: images.
        query: mark whose rows are averaged: ``class``, ``register``, ``patch``, or a mark of the
            probe.
        layers: layers to use. Default: all.
        batch_size: images per pass.

    Returns:
        Maps by image, layer and head, for :func:`headscope.plots.head_maps` and
        :func:`headscope.plots.image_overlay`.

    Raises:
        InputError: if the mark or a layer does not exist.
        UnsupportedModelError: if the model does not read images.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 12, "patch_size": 4}
        >>> vit = hs.load(ViTModel(ViTConfig(**small)).eval())
        >>> hs.vision.maps(vit, hs.probes.random_images(vit, 2)).weights.shape
        (2, 1, 2, 3, 3)
    """
    grid = _need_grid(model)
    probe = capture.on_grid_of(model, probe)
    mark = probe.mark(query)
    if not bool(mark.any(1).all()):
        raise InputError(f"an image has no position marked {query!r}.")
    chosen = tuple(model.shape.attention_layers if layers is None else layers)
    if not chosen:
        raise InputError("layers= names no layer: give one or more, or leave it out for all.")
    if missing := [one for one in chosen if one not in model.shape.attention_layers]:
        raise InputError(f"{model.name} has no attention in layer {missing[0]}.")
    parts = [
        torch.stack([reader.found[layer] for layer in chosen], 1)
        for _, reader in capture.stream(
            model,
            probe,
            lambda batch, _: _Maps(batch.mark(query), frozenset(chosen)),
            batch_size=batch_size,
        )
    ]
    found = torch.cat(parts)[..., grid.first :].unflatten(-1, (grid.rows, grid.columns))
    return AttentionMaps(found.numpy(), chosen, query, model.shape.stack, origin(model, probe))


@dataclass
class _Maps:
    """Mean rows of marked positions in one batch."""

    mark: Bool[Tensor, "batch pos"]
    layers: frozenset[int]
    found: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        reads = at_layers(shape, self._read)
        return {tap: read for tap, read in reads.items() if tap.layer in self.layers}

    def _read(self, view: TapView) -> None:
        queries = self.mark.any(0).nonzero().flatten().cpu()
        batch, heads, length = view.z.shape[0], view.z.shape[2], self.mark.shape[1]
        total = torch.zeros(batch, heads, length, device=view.z.device)
        for part in capture.chunks(queries, 4 * batch * heads * length, _ROWS_BYTES):
            rows = view.rows(part).pattern.float()
            own = self.mark[:, part.to(self.mark.device)].to(rows)
            total += torch.einsum("bhqk,bq->bhk", rows, own)
        self.found[view.layer] = total.cpu() / self.mark.sum(1).cpu()[:, None, None]


# Head writes in the space of classes or image embeddings.


@dataclass(frozen=True, eq=False, repr=False)
class ClassReading(Composed, Saved, Shown, Tabular):
    """Rank of the true class in the output of a model's parts.

    Attributes:
        heads: ``identifiability`` of each head's write at the chosen positions.
        residual: identifiability of each block's output, by place, with ``embed`` first.
        attention, mlp: identifiability of their contributions.
        change_rate: share of images whose probability of the true class rises through a block.
        attention_match, mlp_match: share of images where the top class in the contribution of
            attention, or of the MLP, is also the top class in the block's output.
    """

    heads: HeadScores
    residual: Float[np.ndarray, " place"]
    attention: Float[np.ndarray, " layer"]
    mlp: Float[np.ndarray, " layer"]
    change_rate: Float[np.ndarray, " layer"]
    attention_match: Float[np.ndarray, " layer"]
    mlp_match: Float[np.ndarray, " layer"]

    def inside(self) -> Mapping[str, Any]:
        """Identifiability of every head."""
        return {"": self.heads}

    def glance(self) -> Glance:
        """Show how the true class rises through the blocks."""
        frame = self.to_pandas()
        return Glance(
            "Classes in the residual stream",
            [self.heads.provenance.model or "", f"{len(self.attention)} layers"],
            [str(name).replace("_", " ") for name in frame],
            [(place, *map(number, values)) for place, *values in frame.to_numpy().tolist()],
            hint="hs.plots.heatmap(found.heads)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per place of the residual stream: ``embed``, then after each block."""
        import pandas

        layers = range(len(self.attention))
        named = {"place": ["embed", *map(str, layers)], "residual": self.residual}
        added = ("attention", "mlp", "change_rate", "attention_match", "mlp_match")
        return pandas.DataFrame(named | {name: [np.nan, *getattr(self, name)] for name in added})


@checked
@torch.no_grad()
def class_space(
    model: HeadModel, probe: Probe, at: str = "class", *, batch_size: int | None = None
) -> ClassReading:
    """Project residual stream, sublayers and heads of a classifier onto its classes.

    A vector ``x`` has class logits ``LN(x) W``, with the classifier's final norm and matrix;
    contributions are read without the norm's scale, which does not change ranks. ``identifiability
    = 1 - rank / n_classes``, with the rank of the true class from 0 and tied logits sharing their
    mean rank: 1 at best, ``1 / n_classes`` at worst, about 1/2 by chance. The null of ``heads`` is
    the exact value by chance.

    Args:
        model: image classifier with a plain norm and matrix before its logits.
        probe: images with their classes.
        at: mark of the positions to read, averaged over: ``class`` or ``patch``.
        batch_size: images per pass.

    Raises:
        InputError: if an image has no class, or no position with the mark.
        UnsupportedModelError: if the model has no plain norm and matrix before its logits, or heads
            do not write ``z @ W_O``.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
        >>> vit = hs.load(ViTForImageClassification(ViTConfig(**small)).eval())
        >>> probe = hs.probes.images(vit, torch.rand(3, 3, 8, 8), labels=[0, 1, 1])
        >>> found = hs.vision.class_space(vit, probe)
        >>> found.residual.shape, found.heads.mean.shape
        ((3,), (2, 2))
    """
    _need_grid(model)
    for need in ("unembedding", "linear_write"):
        if (reason := model.limits.get(need)) is not None:
            raise UnsupportedModelError(reason)
    probe = capture.on_grid_of(model, probe)
    _need_classes(model, probe)
    if not bool(probe.mark(at).any(1).all()):
        raise InputError(f"an image has no position marked {at!r}.")
    space = model.unembedding
    parts = [
        reader
        for _, reader in capture.stream(
            model,
            probe,
            lambda batch, _: _Classes(model, space, batch.targets[:, 0], batch.mark(at)),
            batch_size=batch_size,
        )
    ]
    shape = model.shape

    def joined(name: str, layer: int) -> Tensor:
        return torch.cat([part.found[name, layer] for part in parts])

    heads = np.full((*_size(shape), len(probe)), np.nan)
    for layer in shape.attention_layers:
        heads[layer] = joined("heads", layer).T.numpy()
    layers = range(shape.n_layers)
    count = model.shape.n_logits
    scores = HeadScores.from_examples(
        _IDENTIFIABILITY,
        heads,
        kv_heads=shape.n_kv_heads,
        control_per_example=np.full((*_size(shape), 1), (count + 1) / (2 * count)),
        design=Design(clusters=probe.cluster_labels),
        provenance=origin(model, probe, control="chance", at=at),
    ).of_stack(shape.stack)
    residual = [joined("entering", 0), *(joined("leaving", layer) for layer in layers)]

    def means(name: str) -> Float[np.ndarray, " layer"]:
        return np.array([float(joined(name, layer).mean()) for layer in layers])

    return ClassReading(
        scores,
        np.array([float(one.mean()) for one in residual]),
        means("attention"),
        means("mlp"),
        means("rises"),
        means("attention first"),
        means("mlp first"),
    )


@checked
def identifiability(
    logits: Float[Tensor, "*any n_classes"], classes: Int[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """Identifiability of the true class: ``1 - rank / n_classes``, with rank from 0.

    Tied logits share their mean rank, so a constant gives 1/2 plus half a class.

    Args:
        logits: logits of all classes.
        classes: true classes.

    Raises:
        InputError: if there is not a class of the model for each row.

    Example:
        >>> hs.vision.identifiability(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([2]))
        tensor([0.7500])
    """
    if classes.shape != logits.shape[:-1]:
        raise InputError(
            f"classes have shape {list(classes.shape)} and logits {list(logits.shape)}: give one "
            "class for each row of logits."
        )
    if bool(((classes < 0) | (classes >= logits.shape[-1])).any()):
        raise InputError(f"a class is none of 0 to {logits.shape[-1] - 1}.")
    own = logits.gather(-1, classes[..., None])
    above = (logits > own).sum(-1)
    equal = (logits == own).sum(-1) - 1
    return 1 - (above + equal / 2) / logits.shape[-1]


@dataclass
class _Classes:
    """Reader of blocks and heads of one batch, projected onto the classes."""

    model: HeadModel
    space: Unembedding
    classes: Int[Tensor, " batch"]
    mark: Bool[Tensor, "batch pos"]
    found: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    held: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        reads = at_layers(shape, self._heads)
        for layer in range(shape.n_layers):
            for site in ("resid_pre", "attn_out", "resid_post"):
                reads[Tap(site, layer)] = self._block
        return reads

    @property
    def _directions(self) -> Float[Tensor, "d_model n_classes"]:
        every = torch.arange(len(self.space.W_U), device=self.space.W_U.device)
        return self.space.directions(every).T

    def _mean(self, values: Float[Tensor, "batch pos ..."]) -> Tensor:
        """Mean over the marked positions."""
        shown = self.mark.to(values.device).float()
        shown = shown.view(*shown.shape, *[1] * (values.ndim - 2))
        return (values * shown).sum(1) / shown.sum(1)

    def _said(self, logits: Float[Tensor, "batch pos n_classes"]) -> Float[Tensor, " batch"]:
        every = self.classes.to(logits.device)[:, None].expand(logits.shape[:2])
        return self._mean(identifiability(logits, every)).cpu()

    def _heads(self, view: TapView) -> None:
        weight = self.model.output_weights(view.layer).float()
        read = torch.einsum("hdm,mc->hdc", weight, self._directions)
        logits = torch.einsum("bphd,hdc->bphc", view.z.float(), read)
        every = self.classes.to(logits.device)[:, None, None].expand(logits.shape[:3])
        self.found["heads", view.layer] = self._mean(identifiability(logits, every)).cpu()

    def _block(self, view: TapView) -> None:
        site, layer, x = view.tap.site, view.layer, view.value.float()
        self.held[site, layer] = x.clone()
        if site == "resid_pre" and layer == 0:
            self.found["entering", 0] = self._said(self.space.uncapped(x))
        if site != "resid_post":
            return
        before = self.held.pop(("resid_pre", layer))
        attention = self.held.pop(("attn_out", layer), torch.zeros_like(x))
        self.held.pop(("resid_post", layer))
        said, old = self.space.uncapped(x), self.space.uncapped(before)
        parts = {"attention": attention, "mlp": x - before - attention}
        self.found["leaving", layer] = self._said(said)
        rises = self._probability(said) > self._probability(old)
        self.found["rises", layer] = self._mean(rises.float()).cpu()
        for name, part in parts.items():
            logits = part @ self._directions
            self.found[name, layer] = self._said(logits)
            same = logits.argmax(-1) == said.argmax(-1)
            self.found[f"{name} first", layer] = self._mean(same.float()).cpu()

    def _probability(self, logits: Tensor) -> Float[Tensor, "batch pos"]:
        every = self.classes.to(logits.device)[:, None, None].expand(*logits.shape[:2], 1)
        return logits.log_softmax(-1).gather(-1, every)[..., 0]


@dataclass(frozen=True, eq=False, repr=False)
class Written(Saved, Shown, Tabular):
    """Contribution of every part to the embedding, or the logits, of each image.

    Attributes:
        heads: contributions by layer and head; NaN in layers without attention.
        rest: contribution of everything else: embedding, MLPs, biases of attention and of the final
            norm, so that the parts sum to ``whole``.
        whole: the model's own output.
        norm: norm of each ``whole``, by which the parts were divided; 1 if they were not divided.
        stack: name of the attention stack.
        provenance: where it came from.
    """

    heads: Float[np.ndarray, "image layer head d"]
    rest: Float[np.ndarray, "image d"]
    whole: Float[np.ndarray, "image d"]
    norm: Float[np.ndarray, " image"]
    stack: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def share(self) -> Float[np.ndarray, "layer head"]:
        """Share of the whole that a head writes: inner product with it over its squared length.

        Mean over images, without unit. Shares of all heads and of ``rest`` sum to 1.
        """
        size = (self.whole**2).sum(-1)
        found: Float[np.ndarray, "layer head"] = (
            np.einsum("ilhd,id->ilh", self.heads, self.whole) / size[:, None, None]
        ).mean(0)
        return found

    @property
    def length(self) -> Float[np.ndarray, "layer head"]:
        """Length of what a head writes, mean over images."""
        found: Float[np.ndarray, "layer head"] = np.linalg.norm(self.heads, axis=-1).mean(0)
        return found

    def glance(self) -> Glance:
        """Show the heads that write most of the whole."""
        frame = self.to_pandas().sort_values("share", ascending=False)
        return Glance(
            "Contributions of heads to the output",
            [
                self.provenance.model or "",
                f"{len(self.whole)} images",
                sizes(("layer", "head"), self.heads.shape[1:3]),
                f"{number(float(np.nansum(self.share)))} of the output by all heads",
            ],
            ("head", "share", "length"),
            [(head, number(share), number(size)) for head, share, size in frame.to_numpy()[:10]],
            hint="hs.vision.text_span(found.heads[:, layer, head], texts)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head."""
        return _frame(self.stack, self.share.shape, share=self.share, length=self.length)


@checked
@torch.no_grad()
def contributions(
    model: HeadModel, probe: Probe, *, unit: bool = True, batch_size: int | None = None
) -> Written:
    """Contribution of every head to an image's embedding, in the space shared with texts (CLIP).

    ``((r - mean(r)) * gain) P / sigma`` for a head's write at the class token, ``r = z W_O``, with
    the final norm's gain, its scale frozen at that of the full stream, and the projection ``P``.
    Biases are in ``rest``, so the parts sum exactly to the model's embedding. For a classifier, the
    sum is its logits.

    Args:
        model: vision tower with a projection, a tower that ends in a norm, or a classifier.
        probe: images.
        unit: divide by the norm of each image's embedding, as for cosines.
        batch_size: images per pass.

    Raises:
        UnsupportedModelError: if the embedding is not a plain norm of the class token and a matrix,
            or heads do not write ``z @ W_O``.

    Source:
        Gandelsman et al. 2024 (arXiv 2310.05916), decomposition of CLIP's image representation.

    Example:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        >>> small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
        >>> small |= {"projection_dim": 5}
        >>> clip = hs.load(CLIPVisionModelWithProjection(CLIPVisionConfig(**small)).eval())
        >>> found = hs.vision.contributions(clip, hs.probes.random_images(clip, 3))
        >>> parts = found.heads.sum((1, 2)) + found.rest
        >>> bool(np.allclose(parts, found.whole, atol=1e-5))
        True
    """
    _need_grid(model)
    if (reason := model.limits.get("linear_write")) is not None:
        raise UnsupportedModelError(reason)
    probe = capture.on_grid_of(model, probe)
    space = _image_space(model)
    parts = [
        reader
        for _, reader in capture.stream(
            model, probe, lambda *_: _Written(model, space), batch_size=batch_size
        )
    ]
    shape = model.shape
    heads = np.full((len(probe), *_size(shape), len(space.W_U)), np.nan)
    for layer in shape.attention_layers:
        heads[:, layer] = torch.cat([part.heads[layer] for part in parts]).numpy()
    total = torch.cat([part.whole for part in parts]).numpy()
    norm = np.linalg.norm(total, axis=1) if unit else np.ones(len(total))
    heads, total = heads / norm[:, None, None, None], total / norm[:, None]
    rest = total - np.nansum(heads, (1, 2))
    return Written(heads, rest, total, norm, shape.stack, origin(model, probe))


def _image_space(model: HeadModel) -> Unembedding:
    """Final norm and matrix that produce logits of classes, or the image embedding."""
    if "logits" not in model.limits:
        return model.unembedding
    found = getattr(model, "embedding_map", None)
    if found is None:
        raise UnsupportedModelError(
            f"{model.name} does not expose how its embedding is computed: load the transformers "
            "model."
        )
    space: Unembedding = found()
    return space


@dataclass
class _Written:
    """Reader of head outputs at the class token, through the final norm and projection."""

    model: HeadModel
    space: Unembedding
    heads: dict[int, Tensor] = field(default_factory=dict)
    whole: Tensor = field(default_factory=lambda: torch.zeros(()))

    def reads(self, shape: ModelShape) -> Reads:
        reads = at_layers(shape, self._read)
        reads[Tap("resid_post", shape.n_layers - 1)] = self._end
        return reads

    def _read(self, view: TapView) -> None:
        weight = self.model.output_weights(view.layer).float()
        every = torch.arange(len(self.space.W_U), device=self.space.W_U.device)
        read = torch.einsum("hdm,cm->hdc", weight, self.space.directions(every))
        self.heads[view.layer] = torch.einsum("bhd,hdc->bhc", view.z[:, 0].float(), read)

    def _end(self, view: TapView) -> None:
        stream = view.value[:, 0].float()
        scale = self.space.scale(stream)[:, None, None]
        self.heads = {layer: (one / scale).cpu().double() for layer, one in self.heads.items()}
        self.whole = self.space.uncapped(stream).cpu().double()


@dataclass(frozen=True, eq=False, repr=False)
class HeadTexts(Saved, Shown, Tabular):
    """Texts that describe a head's output, in the order in which they were found.

    Attributes:
        texts: indices of the chosen texts.
        deviation: standard deviation of the head's writes along each when it was chosen.
        explained: share of the variance explained by this text and those before it.
        reconstruction: writes projected onto the span of the texts, including the mean.
    """

    texts: tuple[int, ...]
    deviation: Float[np.ndarray, " text"]
    explained: Float[np.ndarray, " text"]
    reconstruction: Float[np.ndarray, "image d"]

    def glance(self) -> Glance:
        """Show the texts in the order in which they were found."""
        frame = self.to_pandas()
        most = float(self.explained[-1]) if len(self.explained) else 0.0
        return Glance(
            "Texts that describe a head",
            [f"{len(self.texts)} texts", f"{number(most)} of the variance"],
            ("text", "deviation", "adds", "explained"),
            [
                (str(int(text)), number(spread), number(gain), number(total))
                for text, spread, gain, total in frame.to_numpy().tolist()
            ],
            hint="found.named(names)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per text."""
        import pandas

        gains = np.diff(self.explained, prepend=0.0)
        return pandas.DataFrame(
            {
                "text": self.texts,
                "deviation": self.deviation,
                "adds": gains,
                "explained": self.explained,
            }
        )

    def named(self, names: Sequence[str]) -> list[tuple[str, float]]:
        """Chosen texts by name, with the share of variance that each adds.

        Args:
            names: names of the texts in the pool.

        Example:
            >>> writes = np.outer([1.0, -1.0, 2.0], [1.0, 0.0])
            >>> hs.vision.text_span(writes, np.eye(2), 1).named(["red", "blue"])
            [('red', 1.0)]
        """
        gains = np.diff(self.explained, prepend=0.0)
        return [
            (names[text], round(float(gain), 6))
            for text, gain in zip(self.texts, gains, strict=True)
        ]


def _numbers(values: np.ndarray | Tensor) -> np.ndarray:
    """Values in float64 on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("writes or texts hold something else than numbers.") from error


@checked
def text_span(
    writes: Float[np.ndarray, "image d"] | Float[Tensor, "image d"],
    texts: Float[np.ndarray, "text _"] | Float[Tensor, "text _"],
    count: int = 10,
    *,
    rank: int = 80,
) -> HeadTexts:
    """Describe the main directions of a head's output by texts, greedily (TextSpan).

    Texts are first projected onto the ``rank`` leading right singular vectors of the uncentred
    writes. Then, ``count`` times, on centred writes: choose the text along which they vary most,
    ``argmax std(C t)`` (the first on ties; texts are not normalised, so those with large norms
    weigh more), and project its direction out of the writes and all other texts.

    Args:
        writes: writes of one head, one row per image, e.g. ``contributions(model, probe).heads[:,
            11, 3]``.
        texts: embeddings of a pool of texts, or rows of an unembedding for language models.
        count: maximum number of texts; fewer if no variance is left.
        rank: number of singular vectors to project onto.

    Raises:
        InputError: if widths differ, or a value is not finite.

    Source:
        Gandelsman et al. 2024 (arXiv 2310.05916), Algorithm 1.

    Example:
        >>> text = np.array([[0.0, 1.0], [1.0, 0.0]])
        >>> hs.vision.text_span(np.outer([1.0, 2.0, 4.0], text[0]), text, 2).texts
        (0,)
    """
    given, pool = _numbers(writes), _numbers(texts)
    count, rank = whole(count, "count", 1), whole(rank, "rank", 1)
    if given.ndim != 2 or pool.ndim != 2 or given.shape[1] != pool.shape[1] or not len(pool):
        raise InputError(
            f"writes have shape {given.shape} and texts {pool.shape}: give [image d] and [text d]."
        )
    if len(given) < 2:
        raise InputError(f"the writes are of {len(given)} images: give those of two or more.")
    if not (np.isfinite(given).all() and np.isfinite(pool).all()):
        raise InputError("writes or texts contain values that are not finite.")
    _, _, right = np.linalg.svd(given, full_matrices=False)
    kept = right[:rank]
    pool = pool @ kept.T @ kept
    mean = given.mean(0)
    left = given - mean
    total = float((left**2).sum())
    rebuilt = np.zeros_like(left)
    small = 1e-9 * max(1.0, float(np.abs(given).max(initial=0.0)))
    chosen: list[int] = []
    deviations, explained = [], []
    lengths = np.linalg.norm(pool, axis=1)
    for _ in range(min(count, len(pool))):
        spread = (left @ pool.T).std(0)
        # The remainder of a text in the span of the others is only rounding.
        spread[np.linalg.norm(pool, axis=1) <= 1e-6 * lengths] = 0.0
        spread[chosen] = 0.0
        best = int(spread.argmax())
        if not spread[best] > small * max(1.0, float(np.linalg.norm(pool[best]))):
            break
        direction = pool[best] / np.linalg.norm(pool[best])
        part = np.outer(left @ direction, direction)
        rebuilt, left = rebuilt + part, left - part
        pool = pool - np.outer(pool @ direction, direction)
        chosen.append(best)
        deviations.append(float(spread[best]))
        explained.append(1.0 - float((left**2).sum()) / total)
    return HeadTexts(tuple(chosen), np.array(deviations), np.array(explained), rebuilt + mean)


# Images and texts.


@dataclass(frozen=True, eq=False)
class Clip:
    """Both halves of a model that embeds images and texts in one space (CLIP, SigLIP).

    Each half is a complete model for all other functions.

    Attributes:
        vision: image model; its embeddings are compared with those of texts.
        text: text model.
        scale, bias: parameters of the logits, ``scale * cosine + bias``.

    Example:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16}
        >>> text = {**small, "vocab_size": 20, "eos_token_id": 1}
        >>> sees = {**small, "image_size": 8, "patch_size": 4}
        >>> both = CLIPModel(CLIPConfig(vision_config=sees, text_config=text, projection_dim=6))
        >>> clip = hs.vision.clip(both.eval())
        >>> pool = clip.embed(hs.probes.from_tokens(torch.tensor([[5, 7, 1], [6, 9, 1]])))
        >>> classifier = clip.classifier(["a cat", "a dog"], pool)
        >>> probe = hs.probes.images(classifier, torch.rand(3, 3, 8, 8), labels=["a dog"] * 3)
        >>> hs.ablate_heads(classifier, probe, hs.metrics.answer_log_prob).mean.shape
        (1, 2)
    """

    vision: HeadModel
    text: HeadModel
    scale: float
    bias: float

    def embed(
        self, texts: Sequence[str] | Probe, *, batch_size: int | None = None
    ) -> Float[Tensor, "text width"]:
        """Embeddings of texts with norm 1: a pool for :func:`text_span`, or classes.

        Args:
            texts: texts, or a probe of tokens for the text half.
            batch_size: texts per pass.

        Raises:
            InputError: if there is no text, or no tokenizer for it.
        """
        probe = texts if isinstance(texts, Probe) else self._tokenized(texts)
        found = capture.embeddings(self.text, probe, "own", batch_size=batch_size)
        normal: Float[Tensor, "text width"] = torch.nn.functional.normalize(found, dim=-1)
        return normal

    def _tokenized(self, texts: Sequence[str]) -> Probe:
        """Tokenize texts as in training: siglip also reads padding."""
        if isinstance(texts, str) or not len(texts):
            raise InputError("texts=: give a list of one or more texts.")
        tokenizer: Any = self.text.tokenizer
        if tokenizer is None:
            raise InputError(f"{self.text.name} has no tokenizer: give a probe of tokens.")
        padded = self.bias != 0.0
        length = self.text.shape.n_ctx
        read = tokenizer(
            list(texts),
            padding="max_length" if padded else True,
            truncation=length is not None,
            max_length=length,
            return_tensors="pt",
        )
        shown = None if padded else read["attention_mask"].bool()
        return from_tokens(read["input_ids"], shown)

    def classifier(
        self,
        names: Sequence[str],
        texts: Float[Tensor, "text width"] | None = None,
        *,
        batch_size: int | None = None,
    ) -> HeadModel:
        """The vision half as a zero-shot classifier with texts as classes.

        Its logits are those of the full model, so importance, cue heads and all logit metrics apply
        to it.

        Args:
            names: names of the classes, e.g. ``a photo of a cat``.
            texts: embeddings of the classes. Default: those of the names.
            batch_size: texts per pass.

        Raises:
            InputError: if the numbers of names and embeddings differ, or two names are the same.
            UnsupportedModelError: if the vision half was not loaded by :func:`clip`.
        """
        found = self.embed(names, batch_size=batch_size) if texts is None else texts
        if not len(names) or len(names) != len(found) or len(set(names)) < len(names):
            raise InputError(
                f"there are {len(set(names))} different names for {len(found)} texts: give a name "
                "for each."
            )
        classifying: Any = getattr(self.vision, "classifying", None)
        if classifying is None:
            raise UnsupportedModelError(
                f"{self.vision.name} is not the vision half of a transformers model: load both "
                "halves with hs.vision.clip."
            )
        made: HeadModel = classifying(names, found, self.scale, self.bias)
        return made


@checked
def clip(
    source: Any,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: Any = None,
) -> Clip:
    """Load both halves of an image-text model, with their projections to embeddings.

    Args:
        source: Hugging Face name, folder, or transformers model such as ``CLIPModel`` or
            ``SiglipModel``, whose parameters the halves share.
        revision: branch, tag or commit.
        device: device of the weights.
        dtype: dtype of the weights. Default: as stored.
        tokenizer: tokenizer of a model that you pass.

    Raises:
        ModelLoadError: if the model is missing, unreadable or broken.
        UnsupportedModelError: if it does not consist of an image model and a text model.

    Example:
        >>> from transformers import SiglipConfig, SiglipModel
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16}
        >>> text, sees = {**small, "vocab_size": 20}, {**small, "image_size": 8, "patch_size": 4}
        >>> both = SiglipModel(SiglipConfig(vision_config=sees, text_config=text)).eval()
        >>> hs.vision.clip(both).text.shape.n_heads
        2
    """
    found = load_halves(source, revision=revision, device=device, dtype=dtype, tokenizer=tokenizer)
    return Clip(*found)


# Cue heads.


@checked
def cue_heads(
    model: HeadModel,
    probe: Probe,
    misleading: Sequence[bool] | Bool[Tensor, " batch"] | Bool[np.ndarray, " batch"],
    method: InterventionLike = "mean",
    heads: Heads | None = None,
    *,
    batch_size: int | None = None,
    seed: int = 0,
) -> HeadScores:
    """Find heads through which a spurious cue (such as the background) influences the class.

    Every head is mean-ablated. ``cue_effect`` is the change in the log-probability of the true
    class on images with a misleading cue, minus that on images whose cue agrees with the class. If
    it is positive, the head relies on the cue, and ablating it helps where the cue is wrong. The
    null is equal means for both kinds of images.

    Args:
        model: image classifier.
        probe: images with their classes, of both kinds.
        misleading: for each image, whether its cue suggests another class.
        method: intervention on the head's output; see :func:`headscope.ablate_heads`.
        heads: heads to use. Default: all.
        batch_size: images per pass.
        seed: seed for methods that sample.

    Raises:
        InputError: if there are fewer than two images of either kind, or an image has no class.
        UnsupportedModelError: if the model does not read images, or has no class logits.

    Source:
        Gandelsman et al. 2024 (arXiv 2310.05916), mean ablation of heads of spurious cues.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
        >>> vit = hs.load(ViTForImageClassification(ViTConfig(**small)).eval())
        >>> probe = hs.probes.images(vit, torch.rand(4, 3, 8, 8), labels=[0, 1, 1, 0])
        >>> hs.vision.cue_heads(vit, probe, [True, True, False, False]).mean.shape
        (1, 2)
    """
    _need_grid(model)
    probe = capture.on_grid_of(model, probe)
    _need_classes(model, probe)
    given = np.asarray(misleading)
    if not np.isin(given, (0, 1)).all():
        raise InputError("misleading= holds something else than True and False.")
    wrong = given.astype(bool)
    if wrong.shape != (len(probe),) or min(wrong.sum(), (~wrong).sum()) < 2:
        raise InputError(
            f"misleading= has shape {wrong.shape} and {int(wrong.sum())} images whose cue "
            f"misleads: give True or False for each of the {len(probe)} images, two or more of "
            "either kind."
        )
    scores = ablate_heads(
        model,
        probe,
        metrics.answer_log_prob,
        method,
        heads,
        batch_size=batch_size,
        seed=seed,
    )
    effects = scores.per_example
    agreeing = np.nanmean(effects[:, :, ~wrong], -1, keepdims=True)
    clusters = probe.cluster_labels
    design = Design(
        clusters=None if clusters is None else tuple(np.array(clusters)[wrong].tolist()),
        control_clusters=None if clusters is None else tuple(np.array(clusters)[~wrong].tolist()),
    )
    return HeadScores.from_examples(
        _CUE,
        effects[:, :, wrong] - agreeing,
        kv_heads=model.shape.n_kv_heads,
        control_per_example=effects[:, :, ~wrong] - agreeing,
        design=design,
        provenance=scores.provenance,
    ).of_stack(model.shape.stack)


# Texts with images.


@checked
def image_keys(
    model: HeadModel, probe: Probe, sizes: Any = None, *, tiles: Any = None, processor: Any = None
) -> ImageKeys:
    """Map positions in texts with images to pieces of their pictures, and back.

    Undoes tiling, merging of patches, padding and resizing from the model's inputs and config, for
    LLaVA, LLaVA-NeXT, PaliGemma, Gemma 3, Qwen2-VL, Qwen2.5-VL, SmolVLM and Idefics 3. Row ends,
    class tokens and padding map to no piece.

    Args:
        model: vision-language model.
        probe: texts with images, from :func:`headscope.probes.from_batch`.
        sizes: height and width of the pictures before the processor, for all, per text, or per
            picture of each text. Default: as the model reads them.
        tiles: rows and columns of tiles, in the same form, for families that cut pictures into
            tiles (SmolVLM, Idefics 3), if neither the processor's words between tiles nor the sizes
            determine them; 0 and 0 for an uncut picture.
        processor: image processor or its config, which determines whether pictures were stretched,
            padded or cut. Default: the one in the model's folder.

    Raises:
        InputError: if the inputs do not fit the model, or more information is needed.
        UnsupportedModelError: if the model does not read texts with images, or its family is not
            supported.

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
        >>> from transformers import LlavaForConditionalGeneration
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16}
        >>> tower = CLIPVisionConfig(**small, image_size=8, patch_size=4, projection_dim=4)
        >>> text = LlamaConfig(**small, vocab_size=20)
        >>> config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=9)
        >>> vlm = hs.load(LlavaForConditionalGeneration(config).eval())
        >>> read = {"input_ids": torch.tensor([[1, 9, 9, 9, 9, 2]])}
        >>> read["pixel_values"] = torch.rand(1, 3, 8, 8)
        >>> keys = hs.vision.image_keys(vlm, hs.probes.from_batch(read), sizes=(80, 80))
        >>> keys.at(0, 2)
        (0, (40.0, 0.0, 80.0, 40.0))
        >>> keys.keys(0, (0, 0, 50, 30))
        [1, 2]
    """
    need_model(model)
    capture.need_probe(probe)
    found = getattr(model, "image_boxes", None)
    if found is None:
        raise UnsupportedModelError(f"{model.name} does not read texts with images.")
    keys: ImageKeys = found(Texts.of(probe), sizes, tiles, processor)
    return keys


_IMAGE_MASS = ScoreSpec(
    "image_mass",
    unit="attention",
    bounds=(0.0, 1.0),
    alternative="two-sided",
    source="text-to-image attention by head",
    description="Attention from the chosen positions to all pieces of the pictures.",
)
_GAZE = ScoreSpec(
    "gaze",
    unit="share",
    bounds=(0.0, 1.0),
    source="attention to the region that a text refers to, as for gaze heads",
    description="Share of the attention to the pictures that falls on the region.",
)


def _known(example: int, head: str | tuple[int, int], scores: HeadScores, texts: int) -> HeadIndex:
    """Validate a head and the index of a text.

    Args:
        example: index of the text.
        head: such as ``L1H2``.
        scores: of all heads.
        texts: how many there are.

    Raises:
        InputError: if there is no such text or head.
    """
    chosen = HeadIndex.parse(head)
    layers, heads = scores.mean.shape
    there = chosen.stack in ("", scores.stack) and chosen.layer < layers and chosen.head < heads
    if not (there and 0 <= whole(example, "example") < texts):
        raise InputError(
            f"there is no {chosen} in text {example}: there are {texts} texts, layers 0 to "
            f"{layers - 1} and heads 0 to {heads - 1}."
        )
    return chosen


@dataclass(frozen=True, eq=False, repr=False)
class ImageAttention(Composed, Saved, Shown, Tabular):
    """Attention from positions of texts to the pictures in them, by layer, head and query.

    Attributes:
        mass: total attention to all pieces, mean over a text's queries. The null is uniform
            attention over all visible keys.
        weights: attention to every piece; 0 at positions without a piece, NaN beyond a text's
            queries and in layers without attention.
        queries: query positions, by text.
        keys: map from positions to pieces.
    """

    mass: HeadScores
    weights: Float[np.ndarray, "batch layer head query pos"]
    queries: tuple[tuple[int, ...], ...]
    keys: ImageKeys

    def inside(self) -> Mapping[str, Any]:
        """Attention on pictures by head."""
        return {"": self.mass}

    def glance(self) -> Glance:
        """Show the heads that attend to pictures most."""
        batch, _, _, most, length = self.weights.shape
        return Glance(
            "Attention to images",
            [
                self.mass.provenance.model or "",
                f"{batch} texts of {length} positions",
                f"at most {most} queries in each",
            ],
            ("head", "attention to images"),
            [(str(head), number(value)) for head, value in self.mass.top(10)],
            hint="found.of(0, 'L0H0'), found.gaze(region), hs.plots.heatmap(found.mass)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head: its attention to all pieces of the pictures."""
        return self.mass.to_pandas()

    def of(
        self,
        example: int,
        head: str | tuple[int, int],
        query: int | None = None,
        *,
        image: int = 0,
        rows: int = 24,
        columns: int = 24,
    ) -> Float[np.ndarray, "row column"]:
        """Attention map of one head on a picture.

        Args:
            example: index of the text.
            head: such as ``L1H2``.
            query: query position; None: mean over all of the text's queries.
            image: index of the picture in the text.
            rows: number of map rows, from top to bottom.
            columns: number of map columns, from left to right.

        Raises:
            InputError: if the text, head, query or picture does not exist.
        """
        chosen = _known(example, head, self.mass, len(self.queries))
        own = self.queries[example]
        if query is not None and query not in own:
            raise InputError(
                f"position {query} of text {example} is not a query; its queries are: "
                f"{', '.join(map(str, own))}."
            )
        at = slice(0, len(own)) if query is None else slice(own.index(query), own.index(query) + 1)
        weights = torch.from_numpy(self.weights[example, chosen.layer, chosen.head, at].mean(0))
        painted = self.keys.painted(weights, example, image, rows=rows, columns=columns)
        found: Float[np.ndarray, "row column"] = painted.numpy()
        return found

    def maps(self, *, image: int = 0, rows: int = 24, columns: int = 24) -> AttentionMaps:
        """Mean attention maps of all heads on the pictures, for grids of heads.

        Args:
            image: which of each text's pictures.
            rows: number of map rows, from top to bottom.
            columns: number of map columns, from left to right.
        """
        known = ~np.isnan(self.weights).all((0, 2, 3, 4))
        layers = tuple(int(one) for one in np.flatnonzero(known))
        painted = []
        for example, own in enumerate(self.queries):
            mean = self.weights[example, known, :, : len(own)].mean(2)
            painted.append(
                self.keys.painted(
                    torch.from_numpy(mean), example, image, rows=rows, columns=columns
                ).numpy()
            )
        about = self.mass.provenance
        return AttentionMaps(np.stack(painted), layers, "chosen", self.mass.stack, about)

    def gaze(self, region: Bool[Tensor, "batch pos"]) -> HeadScores:
        """Share of each head's attention to pictures that falls on a region of them.

        The null is the same attention on the regions of other texts in the batch whose pictures are
        at the same positions; a head that attends to fixed positions scores the same there.

        Args:
            region: mask of positions, from :meth:`ImageKeys.evidence`.

        Raises:
            InputError: if the region has the wrong shape, or is empty in a text.
        """
        marked = _evidence(region, self.keys)
        others = _peers(self.keys)
        by_query = np.moveaxis(self.weights, 0, 2)  # [layer head batch query pos]
        whole = by_query.sum(-1)
        with np.errstate(invalid="ignore"):
            inside = np.einsum("lhbqp,cp->lhbcq", by_query, marked) / whole[:, :, :, None]
            shares = np.nanmean(inside, -1) if inside.size else inside[..., 0]
        return HeadScores.from_examples(
            _GAZE,
            np.einsum("lhbb->lhb", shares),
            kv_heads=self.mass.kv_heads,
            control_per_example=_of_others(shares, others),
            design=Design(paired=True, clusters=self.mass.design.clusters),
            provenance=self.mass.provenance,
        ).of_stack(self.mass.stack)


def _evidence(region: Tensor, keys: ImageKeys) -> Bool[np.ndarray, "batch pos"]:
    """Validate that a region contains pieces of the pictures of every text."""
    if not isinstance(region, Tensor) or region.shape != keys.image.shape:
        raise InputError(
            f"the region is not a boolean mask {list(keys.image.shape)}: make it with "
            "ImageKeys.evidence(boxes)."
        )
    marked = region.bool().cpu()
    if bool((marked & (keys.image < 0)).any()) or not bool(marked.any(1).all()):
        raise InputError(
            "the region contains positions without a piece of a picture, or is empty in a text: "
            "make it with ImageKeys.evidence(boxes)."
        )
    found: Bool[np.ndarray, "batch pos"] = marked.numpy()
    return found


def _peers(keys: ImageKeys) -> Bool[np.ndarray, "batch other"]:
    """Other texts whose picture pieces are at the same positions."""
    image = keys.image.numpy()
    same = (image[:, None] == image[None]).all(-1)
    np.fill_diagonal(same, False)
    found: Bool[np.ndarray, "batch other"] = same
    return found


def _of_others(
    values: Float[np.ndarray, "layer head batch other"], peers: Bool[np.ndarray, "batch other"]
) -> Float[np.ndarray, "layer head batch"]:
    """Mean of each example's values under other examples' regions; NaN if there are none."""
    count = peers.sum(1)
    total = np.where(peers, values, 0.0).sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@checked
@torch.no_grad()
def image_attention(
    model: HeadModel,
    probe: Probe,
    keys: ImageKeys,
    queries: str | Bool[Tensor, "batch pos"] | None = None,
    *,
    batch_size: int | None = None,
) -> ImageAttention:
    """Attention from words to pictures, by layer, head and query; computes only those rows.

    Args:
        model: vision-language model.
        probe: texts with images.
        keys: image keys of the probe, from :func:`image_keys`.
        queries: query positions, as a mark or a boolean mask. Default: the last of each text. All
            their rows are kept, so choose few.
        batch_size: texts per pass.

    Raises:
        InputError: if keys or queries do not fit the probe.

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
        >>> from transformers import LlavaForConditionalGeneration
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16}
        >>> tower = CLIPVisionConfig(**small, image_size=8, patch_size=4, projection_dim=4)
        >>> text = LlamaConfig(**small, vocab_size=20)
        >>> config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=9)
        >>> vlm = hs.load(LlavaForConditionalGeneration(config).eval())
        >>> read = {"input_ids": torch.tensor([[1, 9, 9, 9, 9, 2]])}
        >>> read["pixel_values"] = torch.rand(1, 3, 8, 8)
        >>> probe = hs.probes.from_batch(read)
        >>> found = hs.vision.image_attention(vlm, probe, hs.vision.image_keys(vlm, probe))
        >>> found.of(0, "L0H1", rows=2, columns=2).shape
        (2, 2)
    """
    need_model(model)
    capture.need_probe(probe)
    _need_keys_of(probe, keys)
    mark = _looking(probe, queries)
    own = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in mark)
    most, shape = max(len(one) for one in own), model.shape
    seen = replace(
        probe, marks={"looking": mark, "pieces": keys.image >= 0}, control=None, corrupt=None
    )
    weights = np.full((len(probe), *_size(shape), most, probe.length), np.nan, np.float32)
    even = np.full((*_size(shape), len(probe)), np.nan)
    for chosen, reader in capture.stream(
        model, seen, lambda batch, _: _OnImages(batch, most), batch_size=batch_size
    ):
        for layer, found in reader.found.items():
            weights[chosen, layer, :, : found.shape[2]] = found.numpy()
            even[layer, :, chosen] = reader.even[layer].numpy()
    for row, one in enumerate(own):
        weights[row, :, :, len(one) :] = np.nan
    mass = np.full((*_size(shape), len(probe)), np.nan)
    for row, one in enumerate(own):
        mass[..., row] = weights[row, :, :, : len(one)].sum(-1).mean(-1)
    scores = HeadScores.from_examples(
        _IMAGE_MASS,
        mass,
        kv_heads=shape.n_kv_heads,
        control_per_example=even,
        design=Design(paired=True, clusters=probe.cluster_labels),
        provenance=origin(model, probe, control="even attention"),
    ).of_stack(shape.stack)
    return ImageAttention(scores, weights, own, keys)


def _need_keys_of(probe: Probe, keys: ImageKeys) -> None:
    """Refuse image keys of another probe.

    Raises:
        InputError: if they are.
    """
    if keys.image.shape != probe.tokens.shape:
        raise InputError(
            f"the image keys are of {list(keys.image.shape)} positions, the probe has "
            f"{list(probe.tokens.shape)}: make them of this probe."
        )


def _looking(
    probe: Probe, queries: str | Bool[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch pos"]:
    """Query positions, on the CPU.

    Raises:
        InputError: if a text has no query position.
    """
    if queries is None:
        last = torch.nn.functional.one_hot(probe.last, probe.length)
        return last.bool().cpu()
    mark = probe.mark(queries) if isinstance(queries, str) else queries
    if mark.shape != probe.tokens.shape:
        raise InputError(
            f"queries= has shape {list(mark.shape)}: give a mark of the probe, or a boolean mask "
            f"{list(probe.tokens.shape)}."
        )
    mark = (mark.bool() & probe.real.to(mark.device)).cpu()
    if not bool(mark.any(1).all()):
        raise InputError("a text has no query position: mark at least one in each.")
    return mark


@dataclass
class _OnImages:
    """Reader of the chosen queries' attention to pieces of pictures, in one batch."""

    batch: Probe
    most: int
    found: dict[int, Tensor] = field(default_factory=dict)
    even: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        return at_layers(shape, self._read)

    def _read(self, view: TapView) -> None:
        looking = self.batch.host.mark("looking")
        pieces = self.batch.mark("pieces").to(view.z.device)
        union = looking.any(0).nonzero()[:, 0]
        batch, heads, length = view.z.shape[0], view.z.shape[2], looking.shape[1]
        rows, even = [], []
        for part in capture.chunks(union, 4 * batch * heads * length, _ROWS_BYTES):
            some = view.rows(part)
            n_keys = some.pattern.shape[-1]
            rows.append(some.pattern.float() * pieces[:, None, None, :n_keys])
            visible = some.visible.expand(batch, -1, -1)
            shown = (visible & pieces[:, None, :n_keys]).sum(-1)
            even.append(shown / visible.sum(-1).clamp_min(1))
        widest = max(one.shape[-1] for one in rows)
        whole = torch.cat(
            [torch.nn.functional.pad(one, (0, widest - one.shape[-1])) for one in rows], 2
        )
        whole = torch.nn.functional.pad(whole, (0, length - widest)).cpu()
        own = looking[:, union]
        at = own.int().argsort(dim=1, descending=True, stable=True)[:, : self.most]
        index = at[:, None, :, None].expand(-1, heads, -1, length)
        self.found[view.layer] = whole.gather(2, index)
        share = torch.cat(even, 1).cpu().double()
        self.even[view.layer] = ((share * own).sum(1) / own.sum(1)).expand(heads, -1)


# OCR heads.

_OCR = ScoreSpec(
    "ocr",
    unit="share",
    bounds=(0.0, 1.0),
    threshold=0.1,
    source="Baek et al. 2025 (arXiv 2505.15865), OCR heads",
    description="Share of the answer's distinct tokens that the head reads from the evidence.",
)


@dataclass(frozen=True, eq=False)
class Read(Stored):
    """Answer to one picture, with each head's top piece at each step.

    Attributes:
        tokens: generated tokens, or those of the answer (``form="forced"``).
        looked: most attended position at each step; -1 in layers without attention.
        recall: share of the answer's tokens that were generated.
    """

    tokens: tuple[int, ...]
    looked: Int[np.ndarray, "step layer head"]
    recall: float


@dataclass(frozen=True, eq=False, repr=False)
class OcrHeads(Composed, Saved, Shown, Tabular):
    """Heads that attend to the written answer while it is generated.

    Attributes:
        score: ``ocr``, averaged over the counted texts; the null scores the same steps on the
            evidence of other texts whose pictures are at the same positions.
        frequency: share of counted texts in which a head scores above 0.1.
        reads: answer to every text.
        counted: mask of texts whose generated answer was good enough; all if the answer was given.
    """

    score: HeadScores
    frequency: Float[np.ndarray, "layer head"]
    reads: tuple[Read, ...]
    counted: Bool[np.ndarray, " batch"]

    def inside(self) -> Mapping[str, Any]:
        """Scores of every head."""
        return {"": self.score}

    def glance(self) -> Glance:
        """Show the heads that read most of the answers."""
        frequency = self.frequency
        return Glance(
            "Heads that read text in images",
            [
                self.score.provenance.model or "",
                f"{int(self.counted.sum())} of {len(self.reads)} texts count",
                f"{len(self.heads())} heads",
            ],
            ("head", "score", "active in"),
            [
                (str(head), number(value), number(float(frequency[head.layer, head.head])))
                for head, value in self.score.top(10)
            ],
            hint="found.heads(), hs.plots.heatmap(found.score)",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head."""
        stack, shape = self.score.stack, self.frequency.shape
        return _frame(stack, shape, score=self.score.mean, frequency=self.frequency)

    def heads(
        self, threshold: int | float = 0.1, often: int | float = 0.1
    ) -> tuple[HeadIndex, ...]:
        """Heads with a mean above a threshold that are active often enough, highest first.

        Args:
            threshold: smallest mean score.
            often: smallest share of texts in which a head scores above 0.1.
        """
        ranked = self.score.top(self.score.mean.size)
        return tuple(
            head
            for head, value in ranked
            if value > threshold and self.frequency[head.layer, head.head] >= often
        )

    def looked_at(
        self, example: int, head: str | tuple[int, int], keys: ImageKeys
    ) -> list[tuple[float, float, float, float] | None]:
        """Box that a head attends to most at each generated token; None if it is not on a picture.

        Args:
            example: index of the text.
            head: such as ``L1H2``.
            keys: image keys of the probe.

        Raises:
            InputError: if there is no such text or head.
        """
        chosen = _known(example, head, self.score, len(self.reads))
        found: list[tuple[float, float, float, float] | None] = []
        for at in self.reads[example].looked[:, chosen.layer, chosen.head].tolist():
            shown = 0 <= at < keys.image.shape[1] and int(keys.image[example, at]) >= 0
            found.append(keys.at(example, at)[1] if shown else None)
        return found


@checked
@own_types()
@torch.no_grad()
def ocr_heads(
    model: HeadModel,
    probe: Probe,
    evidence: Bool[Tensor, "batch pos"],
    answers: Sequence[str] | Sequence[Sequence[int]],
    keys: ImageKeys,
    *,
    form: str = "forced",
    new_tokens: int | None = None,
    recall: int | float = 0.5,
    batch_size: int | None = None,
) -> OcrHeads:
    """Find OCR heads: heads that attend to the written answer in a picture while it is generated.

    A head reads a token of the answer if the token is generated at a step at which the head's most
    attended position (the first on ties) is evidence. A text scores ``|tokens read and in the
    answer| / |tokens of the answer|``, counting each distinct token once.

    Args:
        model: vision-language model.
        probe: prompts with images; right padding is not read.
        evidence: mask of the positions whose pieces show the answer: ``keys.evidence(boxes)``.
        answers: answer to each text, as text or token ids.
        keys: image keys of the probe, from :func:`image_keys`.
        form: ``forced``: one pass with the answer appended, counting all texts; ``decoded``: greedy
            decoding as in the source, which reads the whole text again at each step.
        new_tokens: maximum number of decoding steps. Default: the length of the longest answer.
        recall: a decoded text counts if more than this share of the answer's tokens was generated.
        batch_size: texts per pass, of equal length.

    Raises:
        InputError: if answers or evidence do not fit the probe.
        UnsupportedModelError: if the model does not read texts with images.

    Source:
        Baek et al. 2025 (arXiv 2505.15865). A piece is evidence if the box covers more than a tenth
        of it, since the source's IoU would leave out pieces inside a large box
        (``keys.evidence(boxes, by="iou")``).

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
        >>> from transformers import LlavaForConditionalGeneration
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> small |= {"intermediate_size": 16}
        >>> tower = CLIPVisionConfig(**small, image_size=8, patch_size=4, projection_dim=4)
        >>> text = LlamaConfig(**small, vocab_size=20)
        >>> config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=9)
        >>> vlm = hs.load(LlavaForConditionalGeneration(config).eval())
        >>> read = {"input_ids": torch.tensor([[1, 9, 9, 9, 9, 2]] * 2)}
        >>> read["pixel_values"] = torch.rand(2, 3, 8, 8)
        >>> probe = hs.probes.from_batch(read)
        >>> keys = hs.vision.image_keys(vlm, probe)
        >>> seen = keys.evidence([(0, 0, 4, 4), (4, 4, 8, 8)])
        >>> hs.vision.ocr_heads(vlm, probe, seen, [[5, 6], [7]], keys).score.mean.shape
        (1, 2)
    """
    need_model(model)
    capture.check_fits(model, probe)
    grow = getattr(model, "continued", None)
    if grow is None or not probe.inputs:
        raise UnsupportedModelError(f"{model.name} does not read texts with images.")
    if form not in ("forced", "decoded"):
        raise InputError(f"form={form!r} is unknown: 'forced' or 'decoded'.")
    if isinstance(recall, bool) or not recall < 1:
        raise InputError(f"recall={recall!r}: no text has more; give a share below 1.")
    _need_keys_of(probe, keys)
    marked = _evidence(evidence, keys)
    wanted = _answers(model, answers, len(probe))
    steps = None if new_tokens is None else whole(new_tokens, "new_tokens", 1)
    if form == "forced":
        steps = None
    done: dict[int, Read] = {}
    for rows in _alike(probe, wanted, form, RunOptions(batch_size)):
        own = [wanted[row] for row in rows]
        longest = max(len(one) for one in own)
        texts = _prompts(probe, rows)
        if form == "forced":
            said, looked = _with_answers(model, texts, grow, torch.tensor(own))
        else:
            said, looked = _said(model, texts, grow, steps or longest)
        first = int(probe.first[rows[0]])
        for at, row in enumerate(rows):
            done[row] = _read(model, said[at], looked[:, at], wanted[row], form, first)
    reads = tuple(done[row] for row in range(len(probe)))
    counted = np.array([form == "forced" or one.recall > recall for one in reads])
    there = np.zeros(_size(model.shape), dtype=bool)
    there[tuple(np.transpose(model.shape.heads))] = True
    values = np.full((*there.shape, len(reads), len(reads)), np.nan)
    for at in np.flatnonzero(counted).tolist():
        values[:, :, at] = _shares(reads[at], wanted[at], marked)
    values[~there] = np.nan
    own_values = np.einsum("lhbb->lhb", values).copy()
    with np.errstate(invalid="ignore"):
        often = (own_values[..., counted] > 0.1).mean(-1) if counted.any() else there * np.nan
    control = _of_others(np.nan_to_num(values), _peers(keys))
    control[np.isnan(own_values)] = np.nan
    scores = HeadScores.from_examples(
        _OCR,
        own_values,
        kv_heads=model.shape.n_kv_heads,
        control_per_example=control,
        design=Design(paired=True, clusters=probe.cluster_labels),
        provenance=origin(model, probe, control="evidence of other texts", form=form),
    ).of_stack(model.shape.stack)
    return OcrHeads(scores, np.where(there, often, np.nan), reads, counted)


def _answers(
    model: HeadModel, answers: Sequence[str] | Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """Tokens of every answer."""
    if isinstance(answers, str) or len(answers) != count:
        raise InputError(f"there are {len(answers)} answers for {count} texts: give one each.")
    found = []
    for one in answers:
        if isinstance(one, str):
            if model.tokenizer is None:
                raise InputError(f"{model.name} has no tokenizer: give answers as token ids.")
            one = model.tokenizer(one, add_special_tokens=False)["input_ids"]
        ids = [whole(token, "token", 0) for token in one]
        if not ids or max(ids) >= model.shape.d_vocab:
            raise InputError(
                f"an answer has tokens {ids}: give one or more of 0 to {model.shape.d_vocab - 1}."
            )
        found.append(ids)
    return found


def _alike(
    probe: Probe, wanted: Sequence[Sequence[int]], form: str, options: RunOptions
) -> Iterator[list[int]]:
    """Groups of texts with prompts at the same positions, and equally long answers if read."""
    sizes = [
        (int(first), int(last), len(answer) if form == "forced" else 0)
        for first, last, answer in zip(probe.first, probe.last, wanted, strict=True)
    ]
    for size in dict.fromkeys(sizes):
        rows = [row for row, one in enumerate(sizes) if one == size]
        most = options.per_pass(size[1] + 1 - size[0] + size[2], _TOKENS_PER_PASS)
        yield from (rows[at : at + most] for at in range(0, len(rows), most))


def _prompts(probe: Probe, rows: list[int]) -> Texts:
    """Prompts of equal length, without their padding."""
    part = slice(int(probe.first[rows[0]]), int(probe.last[rows[0]]) + 1)
    inputs = {
        name: value[rows][:, part]
        if name in (SEGMENTS, TURNS) and value.shape[1:] == (probe.length,)
        else value[rows]
        for name, value in probe.inputs.items()
    }
    return Texts(probe.tokens[rows, part], None, inputs)


def _with_answers(
    model: HeadModel, texts: Texts, grow: Any, answers: Int[Tensor, "batch step"]
) -> tuple[Int[Tensor, "batch step"], Int[np.ndarray, "step batch layer head"]]:
    """Answers, with each head's top piece at the positions that predict their tokens."""
    start, steps = texts.tokens.shape[1], answers.shape[1]
    seen = _Most(torch.arange(start - 1, start - 1 + steps))
    nothing = torch.empty(0, dtype=torch.long)
    grown = grow(texts, answers[:, :-1]) if steps > 1 else texts
    model.run(grown, reads=seen.reads(model.shape), logits_at=nothing)
    return answers, seen.array(model.shape)


def _said(
    model: HeadModel, texts: Texts, grow: Any, steps: int
) -> tuple[Int[Tensor, "batch step"], Int[np.ndarray, "step batch layer head"]]:
    """Greedy answers, with each head's top piece at each step."""
    tokens, looked = [], []
    for _ in range(steps):
        last = torch.tensor([texts.tokens.shape[1] - 1])
        seen = _Most(last)
        logits = model.run(texts, reads=seen.reads(model.shape), logits_at=last)
        assert logits is not None  # noqa: S101  # they were asked for
        said = logits[:, -1].argmax(-1).cpu()
        tokens.append(said)
        looked.append(seen.array(model.shape))
        texts = grow(texts, said[:, None])
    return torch.stack(tokens, 1), np.concatenate(looked)


@dataclass
class _Most:
    """Reader of the most attended key of some queries, by layer."""

    queries: Int[Tensor, " query"]
    best: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        return at_layers(shape, self._read)

    def _read(self, view: TapView) -> None:
        batch, length, heads = view.z.shape[:3]
        parts = capture.chunks(self.queries, 4 * batch * heads * length, _ROWS_BYTES)
        self.best[view.layer] = torch.cat(
            [view.rows(part).pattern.argmax(-1) for part in parts], 2
        ).cpu()

    def array(self, shape: ModelShape) -> Int[np.ndarray, "step batch layer head"]:
        """The stored indices; -1 in layers without attention."""
        batch = len(next(iter(self.best.values())))
        found = np.full((len(self.queries), batch, *_size(shape)), -1)
        for layer, best in self.best.items():
            found[:, :, layer] = best.permute(2, 0, 1).numpy()
        return found


def _read(
    model: HeadModel,
    said: Int[Tensor, " step"],
    looked: Int[np.ndarray, "step layer head"],
    answer: Sequence[int],
    form: str,
    first: int,
) -> Read:
    """One text's steps up to its end, with positions of the probe."""
    tokens = said.tolist()
    if form == "decoded":
        ends = end_tokens(model) - set(answer)
        stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        tokens, looked = tokens[:stop], looked[:stop]
    shared = sum(min(tokens.count(one), answer.count(one)) for one in set(answer))
    places = np.where(looked >= 0, looked + first, -1)
    return Read(tuple(tokens), places, shared / len(answer))


def _shares(
    read: Read, answer: Sequence[int], marked: Bool[np.ndarray, "batch pos"]
) -> Float[np.ndarray, "layer head batch"]:
    """Score of one text's steps against every text's evidence."""
    different = sorted(set(answer))
    length = marked.shape[1]
    inside = (read.looked >= 0) & (read.looked < length)
    hit = marked[:, read.looked.clip(0, length - 1)] & inside  # [batch step layer head]
    found = np.zeros((len(marked), *read.looked.shape[1:]))
    for token in different:
        steps = [at for at, said in enumerate(read.tokens) if said == token]
        found += hit[:, steps].any(1)
    return np.moveaxis(found / len(different), 0, 2)


@dataclass(frozen=True, repr=False)
class HeadOverlap(Saved, Shown, Tabular):
    """Overlap of two sets of heads.

    Attributes:
        shared: heads in both.
        jaccard: number of shared heads over the number in either set; NaN for two empty sets.
        expected: number of shared heads expected by chance.
        p_value: probability of at least as many shared heads if one set were random
            (hypergeometric).
    """

    shared: tuple[HeadIndex, ...]
    jaccard: float
    expected: float
    p_value: float

    def glance(self) -> Glance:
        """Show how many heads are shared, and how many would be by chance."""
        return Glance(
            "Overlap of two sets of heads",
            [f"{len(self.shared)} shared", f"{number(self.expected)} expected by chance"],
            ("shared", "Jaccard", "p"),
            [(", ".join(map(str, self.shared)), number(self.jaccard), number(self.p_value))],
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per shared head; the other numbers are the same in each."""
        import pandas

        frame = pandas.DataFrame({"head": [str(head) for head in self.shared]})
        return frame.assign(jaccard=self.jaccard, expected=self.expected, p_value=self.p_value)


@checked
def head_overlap(first: Heads, second: Heads, among: int) -> HeadOverlap:
    """Compare two sets of heads, such as OCR heads with retrieval heads.

    Args:
        first: first set, which may be empty.
        second: second set.
        among: number of heads in the model.

    Raises:
        InputError: if the sets have more heads than the model.

    Example:
        >>> found = hs.vision.head_overlap(["L0H1", "L1H0"], ["L1H0", "L1H1"], among=4)
        >>> found.shared, round(found.jaccard, 3), found.expected
        ((L1H0,), 0.333, 1.0)
    """
    one, two = set(head_list(first)), set(head_list(second))
    count = whole(among, "among", 1)
    if len(one | two) > count:
        raise InputError(f"the sets have {len(one | two)} heads, more than among={count}.")
    both = tuple(sorted(one & two))
    either = len(one | two)
    p = float(hypergeom.sf(len(both) - 1, count, len(one), len(two)))
    return HeadOverlap(
        both, len(both) / either if either else float("nan"), len(one) * len(two) / count, p
    )


# Steering attention.


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Saved, Shown, Tabular):
    """Effect of steering some heads' attention to a region, with random heads as control.

    Attributes:
        effect: change in the metric, mean over texts.
        per_example: the same by text.
        random: change in the metric for each draw of as many random heads.
        p_value: share of draws, including the heads themselves, with an effect at least as good.
        heads: heads that were steered.
    """

    effect: float
    per_example: Float[np.ndarray, " example"]
    random: Float[np.ndarray, " draw"]
    p_value: float
    heads: tuple[HeadIndex, ...]

    def glance(self) -> Glance:
        """Show the effect beside that of random heads."""
        return Glance(
            "Steering of heads",
            [", ".join(map(str, self.heads)), f"p = {number(self.p_value)}"],
            ("heads", "change of the metric"),
            [
                ("steered", number(self.effect)),
                ("random, mean", number(float(self.random.mean()))),
                ("random, largest", number(float(self.random.max()))),
                ("random, smallest", number(float(self.random.min()))),
            ],
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for the heads, and one for each draw of random heads."""
        import pandas

        names = ["steered", *(f"random {draw}" for draw in range(len(self.random)))]
        return pandas.DataFrame({"heads": names, "effect": [self.effect, *self.random]})

    def __str__(self) -> str:
        """One sentence."""
        return (
            f"steering {len(self.heads)} heads changes the metric by {self.effect:.4g}, as many "
            f"random heads by {self.random.mean():.4g} (sd {self.random.std():.4g}); "
            f"p = {self.p_value:.3g} of {len(self.random)} draws."
        )


@checked
def steer(
    model: HeadModel,
    probe: Probe,
    metric: Any,
    heads: Heads,
    region: str | Bool[Tensor, "batch pos"],
    *,
    share: int | float = 0.5,
    better: Direction | None = None,
    draws: int = 19,
    positions: Any = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Steering:
    """Steer heads to a region, and compare the effect on the answer with that of random heads.

    A share of the heads' attention to all other keys is moved to the region
    (:class:`headscope.interventions.Redistribute`). The same is done to as many random other heads
    of the same layers; if a layer has too few, the rest is drawn from all others.

    Args:
        model: vision-language model.
        probe: examples with targets.
        metric: metric of the answer that the region supports.
        heads: heads to steer, e.g. gaze heads (:meth:`ImageAttention.gaze`).
        region: keys to attend to: ``keys.evidence(boxes)``, or a mark.
        share: share of the attention elsewhere that is moved, 0 to 1.
        better: direction of the metric, ``higher`` or ``lower``, if the metric does not declare it.
        draws: number of draws of random heads; the p-value is at least ``1 / (1 + draws)``.
        positions: query positions to steer. Default: all.
        batch_size: texts per pass.
        seed: seed for the draws.

    Raises:
        InputError: if there are too few other heads to draw from, or an argument does not fit.

    Example:
        >>> metric = hs.metrics.answer_log_prob
        >>> found = hs.vision.steer(model, probe, metric, ["L1H0"], "second_copy", draws=3)
        >>> len(found.random), found.p_value >= 0.25
        (3, True)
    """
    chosen = present(model, heads)
    sign = -metrics.cost_sign(metrics.as_metric(metric), better)
    others = [head for head in model.shape.heads if head not in chosen]
    if len(others) < len(chosen):
        raise InputError(
            f"{len(chosen)} heads leave {len(others)} others, too few for random sets: steer fewer "
            "heads."
        )
    generator = np.random.default_rng(whole(seed, "seed", 0))
    groups: dict[str, Heads] = {"heads": chosen}
    for draw in range(whole(draws, "draws", 1)):
        groups[f"draw {draw}"] = _drawn(chosen, others, generator)
    found = ablate_groups(
        model,
        probe,
        metric,
        groups,
        Redistribute(region, "rest", share),
        positions=positions,
        batch_size=batch_size,
    )
    means = np.asarray(found.mean)
    effect, random = float(means[0]), means[1:]
    larger = int((sign * random >= sign * effect).sum())
    values = np.asarray(found.per_example)[0]
    return Steering(effect, values, random, (1 + larger) / (1 + len(random)), tuple(chosen))


def _drawn(
    chosen: Sequence[HeadIndex], others: Sequence[HeadIndex], generator: np.random.Generator
) -> tuple[HeadIndex, ...]:
    """Random other heads, as many, from the same layers if possible."""
    found: list[HeadIndex] = []
    for layer in sorted({head.layer for head in chosen}):
        pool = [head for head in others if head.layer == layer]
        count = min(len(pool), sum(head.layer == layer for head in chosen))
        found += [pool[at] for at in generator.permutation(len(pool))[:count]]
    rest = [head for head in others if head not in found]
    missing = len(chosen) - len(found)
    found += [rest[at] for at in generator.permutation(len(rest))[:missing]]
    return tuple(sorted(found))
