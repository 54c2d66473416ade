"""Interventions: what replaces a head's output, as values that apply to any heads of any model.

    hs.ablate_heads(model, probe, metric, hs.interventions.Mean(reference=other))
    hs.ablate_heads(model, probe, metric, "mean")        # the same, with the probe as reference

An intervention defines the replacement only; the caller chooses heads, positions and batches. The
same object serves single heads, groups, cumulative ablations, estimates and pruning curves.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture, edits
from headscope.base.arguments import checked
from headscope.edits import AnyEdit, Heads, HeadSite
from headscope.errors import InputError, UnsupportedModelError, nearest, whole
from headscope.heads import HeadIndex, ModelShape
from headscope.models.protocol import HeadModel
from headscope.models.taps import Reads, Tap, TapView, Texts, at_layers
from headscope.probes.probe import Probe


@dataclass
class _Sums:
    """Running sums of head outputs over real positions, per layer."""

    real: Bool[Tensor, "batch pos"]
    per_position: bool
    sums: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every layer's outputs."""
        return at_layers(shape, self._add)

    def _add(self, view: TapView) -> None:
        self.sums[view.layer] = _summed(view.z, self.real, self.per_position)


def _summed(z: Tensor, real: Tensor, per_position: bool) -> Tensor:
    """Sum of ``z [batch pos head d_head]`` over real positions, or over examples per position."""
    weights = real.to(z.device)[:, :, None, None]
    return (z.float() * weights).sum(0 if per_position else (0, 1))


def _averaged(
    sums: Mapping[int, Tensor], real: Tensor, per_position: bool
) -> dict[int, Float[Tensor, "*pos head d_head"]]:
    """Divide sums by the number of real positions; 0 if there are none."""
    counts = real.sum(0)[:, None, None] if per_position else real.sum()
    return {layer: s / counts.to(s.device).clamp_min(1) for layer, s in sums.items()}


@checked
def head_means(
    model: HeadModel, probe: Probe, *, per_position: bool = False, batch_size: int | None = None
) -> dict[int, Float[Tensor, "*pos head d_head"]]:
    """Mean output of every head over a probe's real positions, before the output projection.

    Args:
        model: the model.
        probe: the reference.
        per_position: average over examples only, at each position.
        batch_size: examples per pass.

    Returns:
        ``{layer: [head d_head]}``, or ``[pos head d_head]`` with ``per_position``.

    Example:
        >>> means = hs.ablation.head_means(model, probe)
        >>> means[0].shape == (model.shape.n_heads, model.shape.d_head)
        True
    """
    probe = capture.seen_by(model, probe)
    total: dict[int, Tensor] = {}
    for _, part in capture.stream(
        model, probe, lambda batch, _: _Sums(batch.real, per_position), batch_size=batch_size
    ):
        for layer, s in part.sums.items():
            total[layer] = total[layer] + s if layer in total else s
    return _averaged(total, probe.real, per_position)


@checked
@torch.no_grad()
def head_values(
    model: HeadModel,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None = None,
    *,
    site: HeadSite = "z",
    layers: Sequence[int] | None = None,
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[int, Tensor]:
    """Record what some layers' heads hold at a site, for :func:`headscope.edits.patch`.

    Args:
        model: the model.
        tokens: one batch, kept whole.
        real: False at padding.
        site: see :class:`headscope.edits.HeadEdit`.
        layers: layers to use. Default: all with attention.
        inputs: model inputs other than tokens.

    Returns:
        ``{layer: values}`` in the layout of the site.

    Example:
        >>> z = hs.ablation.head_values(model, probe.tokens, layers=[1])[1]
        >>> z.shape == (*probe.tokens.shape, model.shape.n_heads, model.shape.d_head)
        True
    """
    chosen = model.shape.attention_layers if layers is None else layers
    found: dict[int, Tensor] = {}

    def keep(view: TapView) -> None:
        found[view.layer] = view.value.clone() if site == "z" else view.value

    reads = {Tap(site, layer): keep for layer in chosen}
    model.run(Texts(tokens, real, inputs), reads=reads, logits_at=torch.empty(0, dtype=torch.long))
    return found


Place = Callable[[Heads], AnyEdit]
# Builds the edit of one batch from its examples and the recorded clean outputs by layer.
BatchPlace = Callable[[slice, Mapping[int, Tensor] | None], Place]


@dataclass(frozen=True, eq=False)
class Setting:
    """Model, probe and positions that an intervention is applied to.

    Attributes:
        model: the model to edit.
        probe: the probe to run.
        positions: where to edit; None: everywhere.
        batch_size: examples per recorded batch.
    """

    model: HeadModel
    probe: Probe
    positions: Bool[Tensor, "batch pos"] | None
    batch_size: int

    def where(self, chosen: slice) -> Bool[Tensor, "batch pos"] | None:
        """Positions to edit in one batch."""
        return None if self.positions is None else self.positions[chosen]


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """Base class of interventions: subclasses set ``name`` and implement :meth:`prepare`.

    Example:
        >>> zero = hs.interventions.Zero()
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, zero, heads="L0H1")
        >>> scores.name
        'zero_ablation'
    """

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, setting: Setting) -> BatchPlace:
        """Validate the setting, compute what all batches share, and return a per-batch editor.

        Args:
            setting: model, probe and positions.

        Raises:
            InputError: if the intervention does not fit the probe.
        """

    def reference_for(self, probe: Probe) -> Probe | None:
        """Probe that replacement values come from; None if there is none."""
        return None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name and parameters of the intervention as JSON values, for provenance."""
        numbers = {
            one.name: value
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), str | int | float | bool)
        }
        return {"method": self.name, **numbers}


def _need_same_length(probe: Probe, reference: Probe, name: str) -> None:
    """Refuse a reference whose length differs from the probe's.

    Raises:
        InputError: if the lengths differ.
    """
    if reference.length != probe.length:
        raise InputError(
            f"{name} replaces position by position, but the reference has {reference.length} "
            f"positions and the probe {probe.length}."
        )


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """Set the head's output ``z`` to 0, including the contribution of a value bias.

    Example:
        >>> hs.interventions.Zero().name
        'zero'
    """

    name: ClassVar[str] = "zero"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Zero the heads at the requested positions."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.zero, positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """Multiply the head's output ``z`` by a factor.

    Attributes:
        factor: 0 is zero ablation, 1 changes nothing.

    Example:
        >>> hs.interventions.Scale(0.5).facts
        {'method': 'scale', 'factor': 0.5}
    """

    factor: int | float
    name: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        """Refuse a factor that is not a finite number.

        Raises:
            InputError: if the factor is NaN, infinite or not a number.
        """
        if not isinstance(self.factor, int | float) or not abs(self.factor) < float("inf"):
            raise InputError(f"factor={self.factor!r} of Scale: give a finite number.")

    def prepare(self, setting: Setting) -> BatchPlace:
        """Scale the heads at the requested positions."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.scale, factor=float(self.factor), positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Uniform(Intervention):
    """Zero the query, so that attention is flat over the visible keys (Wu et al. 2024).

    Position biases (ALiBi) and the share of a learned sink remain.

    Example:
        >>> hs.interventions.Uniform().name
        'uniform'
    """

    name: ClassVar[str] = "uniform"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Flatten the heads' attention at the requested positions."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.uniform, positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class AttendToFirst(Intervention):
    """Put all attention on each text's first token.

    Example:
        >>> hs.interventions.AttendToFirst().name
        'attend_to_first'
    """

    name: ClassVar[str] = "attend_to_first"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Move the heads' attention to the first real token."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            real = setting.probe.real[chosen]
            where = setting.where(chosen)
            return lambda heads: edits.attend_to_first(heads, real, positions=where)

        return batch


@dataclass(frozen=True, eq=False)
class ScaleKeys(Intervention):
    """Attention to some keys is multiplied, so that what they stand for weighs more or less.

    In cross-attention the keys are those of the source. Rows are not made to sum to 1 again.
    Ordered weakening takes ``factor=-2`` on more and more heads, those that answer most to a
    concept first (:func:`headscope.ablate_cumulatively`); strengthening takes a factor for every
    head, its relevance for the concept (:meth:`headscope.table.ConceptHeads.factors`).

    Attributes:
        keys: name of a mark of the text that is read (in an encoder-decoder: of the source), or
            booleans ``[batch key]``.
        factor: 1 changes nothing, 0 takes the keys out; a number, or one by head (others: 1).

    Source:
        Park et al. 2024, "Cross-Attention Head Position Patterns Can Align with Human Visual
        Concepts" (arXiv 2412.02237): ordered weakening, concept strengthening.

    Example:
        >>> first = torch.zeros_like(probe.real)
        >>> first[:, 0] = True
        >>> less = hs.interventions.ScaleKeys(first, 0.5)
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, less, heads="L0H1")
        >>> scores.name
        'scale_keys_ablation'
    """

    keys: str | Bool[Tensor, "batch key"]
    factor: float | Mapping[HeadIndex | str, float] = -2.0
    name: ClassVar[str] = "scale_keys"

    def __post_init__(self) -> None:
        """Refuse factors that are not numbers.

        Raises:
            InputError: if a factor is NaN, infinite or not a number.
        """
        given = self.factor.values() if isinstance(self.factor, Mapping) else [self.factor]
        for one in given:
            if not isinstance(one, int | float) or not abs(one) < float("inf"):
                raise InputError(f"ScaleKeys takes finite factors, not {one!r}.")

    def prepare(self, setting: Setting) -> BatchPlace:
        """Find the keys in the text that the heads read, and the factor of every head."""
        keys, factor = self._keys(setting), self._factors(setting.model.shape)

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            where, own = setting.where(chosen), keys[chosen]
            return lambda heads: edits.scale_keys(heads, own, factor, positions=where)

        return batch

    def _keys(self, setting: Setting) -> Bool[Tensor, "batch key"]:
        (stack,) = setting.model.stacks.values()
        crosses = stack.mask.kind == "cross"
        read = setting.probe.of_source if crosses else setting.probe
        keys = read.mark(self.keys) if isinstance(self.keys, str) else self.keys
        size = (len(read), read.length)
        if tuple(keys.shape) != size or keys.dtype != torch.bool:
            raise InputError(
                f"ScaleKeys takes booleans of shape {list(size)} (example, "
                f"{'source position' if crosses else 'position'}); got {keys.dtype} of shape "
                f"{list(keys.shape)}."
            )
        if not bool(keys.any()):
            raise InputError("ScaleKeys was given no key: mark at least one position.")
        return keys

    def _factors(self, shape: ModelShape) -> float | Float[Tensor, "layer head"]:
        if not isinstance(self.factor, Mapping):
            return float(self.factor)
        factors = torch.ones(shape.n_layers, shape.n_heads)
        for name, factor in self.factor.items():
            head = shape.check(HeadIndex.parse(name))
            factors[head.layer, head.head] = factor
        return factors


@dataclass(frozen=True, eq=False)
class _Sparse(Intervention):
    """Base of interventions that replace softmax with a sparse map with exact zeros."""

    @abstractmethod
    def edit(self, heads: Heads, positions: Bool[Tensor, "batch pos"] | None = None) -> AnyEdit:
        """Build the edit for some heads."""

    def prepare(self, setting: Setting) -> BatchPlace:
        """Sparsify the heads' attention at the requested positions."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return lambda heads: self.edit(heads, setting.where(chosen))

        return batch

    def on(self, model: HeadModel, heads: Heads | None = None) -> AbstractContextManager[None]:
        """Context manager in which a model attends sparsely: in scores, passes and generation.

        Args:
            model: the model to change.
            heads: which heads; None: all.

        Example:
            >>> with hs.interventions.TopK(1).on(model):
            ...     table = hs.score(model, probe, ["max_attention"])
            >>> bool((table["max_attention"].mean > 0.999).all())
            True
        """
        return model.edited([self.edit(model.shape.heads if heads is None else heads)])


@dataclass(frozen=True, eq=False)
class Entmax(_Sparse):
    """Replace softmax with alpha-entmax, which gives low-scoring keys exactly 0.

    Definition and source at :func:`headscope.edits.entmax`.

    Attributes:
        alpha: 1 is the softmax, 2 the sparsemax.

    Example:
        >>> with hs.interventions.Entmax(1.5).on(model):
        ...     table = hs.score(model, probe, ["density"])
        >>> bool((table["density"].mean < 0.9).any())
        True
    """

    alpha: int | float = 1.5
    name: ClassVar[str] = "entmax"

    def __post_init__(self) -> None:
        """Validate alpha.

        Raises:
            InputError: unless it is 1, or at least 1.01.
        """
        if not isinstance(self.alpha, int | float):
            raise InputError(f"Entmax takes a number, not {self.alpha!r}.")
        edits.entmax((0, 0), float(self.alpha))

    def edit(self, heads: Heads, positions: Bool[Tensor, "batch pos"] | None = None) -> AnyEdit:
        """Build the edit for some heads."""
        return edits.entmax(heads, float(self.alpha), positions=positions)


@dataclass(frozen=True, eq=False)
class TopK(_Sparse):
    """Keep only each query's k highest-scoring keys (Gupta et al. 2021).

    Attributes:
        k: number of keys that a query keeps.

    Example:
        >>> hs.interventions.TopK(4).facts
        {'method': 'top_k', 'k': 4}
    """

    k: int
    name: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        """Validate k.

        Raises:
            InputError: if k is not a positive integer.
        """
        edits.top_k((0, 0), self.k)

    def edit(self, heads: Heads, positions: Bool[Tensor, "batch pos"] | None = None) -> AnyEdit:
        """Build the edit for some heads."""
        return edits.top_k(heads, self.k, positions=positions)


@dataclass(frozen=True, eq=False)
class Denoise(Intervention):
    """Remove rotary planes from some heads' queries, or replace them with noise (DoPE).

    Without noise both coordinates of each plane become 0 in the query, so that the plane adds
    nothing to any score (truncation). With noise they become Gaussian numbers, drawn for every head
    and position and the same in every text, times the root mean square of the query's own
    coordinates. Heads without listed planes stay as they are. A good choice is the planes that
    nearly all tokens share, ``hs.geometry.rotary_bands(model).below(entropy)``; listing all planes
    of a head denoises it completely.

    Attributes:
        planes: planes per head, counted from the fastest to the slowest.
        noise: standard deviation of the noise, as a multiple of the query's root mean square; 0
            truncates.
        seed: seed of the noise.

    Source: Xiong et al. 2025, "DoPE: Denoising Rotary Position Embedding" (arXiv 2511.09146): by
    parts, by all and by Gaussian. Scaling the noise by the query's size is our choice.

    Example:
        >>> model = hs.load("tiny-llama")
        >>> bands = hs.geometry.rotary_bands(model).below(0.3)
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, hs.interventions.Denoise(bands))
        >>> scores.name
        'denoise_ablation'
    """

    planes: Mapping[HeadIndex | str, Sequence[int]]
    noise: float = 0.0
    seed: int = 0
    name: ClassVar[str] = "denoise"

    def __post_init__(self) -> None:
        """Validate planes, noise and seed.

        Raises:
            InputError: if the planes are not given per head, or the noise or the seed is negative
                or not a number.
        """
        if not isinstance(self.planes, Mapping):
            raise InputError(
                f"planes={self.planes!r} of Denoise: give planes by head, such as "
                "{'L0H1': [6, 7]} or hs.geometry.rotary_bands(model).below(0.3)."
            )
        if not (isinstance(self.noise, int | float) and 0 <= self.noise < float("inf")):
            raise InputError(f"noise={self.noise!r} of Denoise: give a finite number from 0 on.")
        if whole(self.seed, "seed") < 0:
            raise InputError(f"seed={self.seed} of Denoise: give a whole number from 0 on.")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, the planes of each head, and the noise."""
        planes = {str(head): list(some) for head, some in self.planes.items()}
        noisy = {"noise": self.noise, "seed": self.seed} if self.noise else {}
        return {"method": self.name, "planes": planes, **noisy}

    def prepare(self, setting: Setting) -> BatchPlace:
        """Find the coordinates of the planes, and draw the noise.

        Raises:
            InputError: if a head or plane does not exist.
            UnsupportedModelError: if the model has no rotary positions.
        """
        model, probe = setting.model, setting.probe
        taken = self._taken(model)
        drawn = {layer: self._drawn(model, probe.length, layer) for layer in taken}

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            new = drawn
            if self.noise and bool((probe.first[chosen] != 0).any()):  # padding on the left
                at = probe.position_in_text[chosen].clamp_min(0).cpu()
                new = {layer: noise[:, at].transpose(0, 1) for layer, noise in drawn.items()}
            donors = {
                layer: torch.where(taken[layer], self.noise * noise, torch.nan)
                for layer, noise in new.items()
            }
            where = setting.where(chosen)
            return lambda heads: edits.HeadEdit.at(
                self.name, heads, site="query", donors=donors, change=_denoised, positions=where
            )

        return batch

    def _drawn(
        self, model: HeadModel, length: int, layer: int
    ) -> Float[Tensor, "#head #pos #d_head"]:
        """Noise of one layer; a longer text starts with the noise of a shorter one."""
        if self.noise == 0:
            return torch.zeros(1, 1, 1)
        size = (length, model.shape.n_heads, model.shape.d_head)
        noise = np.random.default_rng((self.seed, layer)).standard_normal(size, np.float32)
        return torch.from_numpy(noise).transpose(0, 1)

    def _taken(self, model: HeadModel) -> dict[int, Tensor]:
        """Mask of the removed coordinates, by layer ``[head 1 d_head]``."""
        if "rotary" in model.limits:
            raise UnsupportedModelError(model.limits["rotary"])
        shape = model.shape
        taken = {
            layer: torch.zeros(shape.n_heads, 1, shape.d_head, dtype=torch.bool)
            for layer in shape.attention_layers
        }
        for name, planes in self.planes.items():
            (head,) = edits.head_list([name])
            if head not in shape.heads:
                raise InputError(f"{model.name} has no head {head}.")
            rotation = model.parts.rotation(head.layer)
            order = rotation.frequency.abs().argsort(descending=True).tolist()
            for plane in planes:
                if not 0 <= plane < len(order):
                    raise InputError(f"{head} has {len(order)} rotary planes, not plane {plane}.")
                at = order[plane]
                taken[head.layer][head.head, 0, [rotation.first[at], rotation.second[at]]] = True
        return taken


def _denoised(value: Tensor, new: Tensor | None) -> Tensor:
    """Overwrite coordinates with ``new`` times the vector's root mean square, except where NaN."""
    if new is None:
        return value
    size = value.float().square().mean(-1, keepdim=True).sqrt().to(value.dtype)
    return torch.where(new.isnan(), value, new.nan_to_num() * size)


@dataclass(frozen=True, eq=False)
class Redistribute(Intervention):
    """A share of the attention on some keys goes to others, as of sinks to pieces of an image.

    Definition and source at :func:`headscope.edits.redistribute`. With ``source="rest"`` heads are
    made to look at the targets; with the first token as source this is sink redistribution.

    Attributes:
        target: keys that gain attention: a mark of the probe, or positions of it.
        source: keys that lose it: ``first``, the first token of each text; ``rest``, all but the
            targets; a mark of the probe, or positions of it.
        share: share of the sources' attention that is moved, 0 to 1.

    Example:
        >>> moved = hs.interventions.Redistribute("second_copy", share=0.3)
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, moved, heads="L0H1")
        >>> scores.name
        'redistribute_ablation'
    """

    target: str | Tensor
    source: str | Tensor = "first"
    share: int | float = 0.5
    name: ClassVar[str] = "redistribute"

    def __post_init__(self) -> None:
        """Raise InputError for anything but a share.

        Raises:
            InputError: if it is not a number from 0 to 1.
        """
        if not (isinstance(self.share, int | float) and 0 <= self.share <= 1):
            raise InputError(f"share={self.share!r} of Redistribute: give a number from 0 to 1.")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name, share, and the keys where they have names."""
        named = {
            name: one if isinstance(one, str) else "positions"
            for name, one in (("source", self.source), ("target", self.target))
        }
        return {"method": self.name, **named, "share": float(self.share)}

    def prepare(self, setting: Setting) -> BatchPlace:
        """Find the keys in the probe.

        Raises:
            InputError: if there is no such mark, positions do not fit, or a text has no target.
        """
        probe = setting.probe
        target = self._keys(self.target, probe)
        if not bool(target.any(1).all()):
            raise InputError("a text has no target to give attention to: mark one in each.")
        sources = {"first": probe.position_in_text == 0, "rest": probe.real & ~target}
        named = isinstance(self.source, str) and self.source in sources
        source = sources[str(self.source)] if named else self._keys(self.source, probe)

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return partial(
                edits.redistribute,
                source=source[chosen],
                target=target[chosen],
                share=float(self.share),
                positions=setting.where(chosen),
            )

        return batch

    @staticmethod
    def _keys(given: str | Tensor, probe: Probe) -> Bool[Tensor, "batch pos"]:
        if isinstance(given, str):
            return probe.mark(given)
        if not isinstance(given, Tensor) or given.shape != probe.tokens.shape:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise InputError(
                f"the keys of Redistribute are {shape}: give a mark of the probe, or Booleans "
                f"{list(probe.tokens.shape)}, one for each of its positions."
            )
        return given.bool() & probe.real.to(given.device)


@dataclass(frozen=True, eq=False)
class _FromReference(Intervention):
    """Base of interventions that read a reference probe; default: the probe being run."""

    reference: Probe | None = None

    def __post_init__(self) -> None:
        """Refuse a reference that is not a probe.

        Raises:
            InputError: if it is something else.
        """
        if self.reference is not None and not isinstance(self.reference, Probe):
            raise InputError(
                f"reference={self.reference!r} of {type(self).__name__}: give a probe, or leave it "
                "out for the one that is run."
            )

    def reference_for(self, probe: Probe) -> Probe:
        """Probe that replacement values come from."""
        if self.reference is None:
            return probe
        read_by_encoder = "decoder_input_ids" in probe.inputs and self.reference.source is not None
        return self.reference.of_source if read_by_encoder else self.reference


@dataclass(frozen=True, eq=False)
class Mean(_FromReference):
    """Replace the head's output with its mean over all real positions of a reference.

    Attributes:
        reference: reference probe; None: the probe being run.

    Example:
        >>> other = hs.probes.repeated_tokens(model, length=10, batch=2, seed=1)
        >>> mean = hs.interventions.Mean(reference=other)
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, mean, heads="L0H1")
        >>> scores.provenance.probe["reference"]
        'repeated_tokens'
    """

    name: ClassVar[str] = "mean"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Compute the means once, from the recorded run if it is the reference."""
        means = _Means(setting, self.reference_for(setting.probe), per_position=False)

        def batch(chosen: slice, clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.mean, means=means.of(clean), positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class MeanPos(_FromReference):
    """Replace the head's output with its mean over a reference's examples, per position.

    Attributes:
        reference: reference probe of the same length; None: the probe being run.

    Example:
        >>> hs.interventions.MeanPos().name
        'mean_pos'
    """

    name: ClassVar[str] = "mean_pos"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Compute the means once, from the recorded run if it is the reference."""
        reference = self.reference_for(setting.probe)
        _need_same_length(setting.probe, reference, self.name)
        means = _Means(setting, reference, per_position=True)

        def batch(chosen: slice, clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.mean_pos, means=means.of(clean), positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Resample(_FromReference):
    """Replace the head's output with that of another example at the same position.

    Attributes:
        reference: probe that supplies the other examples; None: the probe being run, where no
            example is its own partner.
        seed: seed of the draw of partners.

    Example:
        >>> hs.interventions.Resample(seed=3).facts
        {'method': 'resample', 'seed': 3}
    """

    seed: int = 0
    name: ClassVar[str] = "resample"

    def __post_init__(self) -> None:
        """Validate the seed.

        Raises:
            InputError: if it is not an integer.
        """
        super().__post_init__()
        whole(self.seed, "seed")

    def prepare(self, setting: Setting) -> BatchPlace:
        """Draw a partner for every example."""
        probe, reference = setting.probe, self.reference_for(setting.probe)
        own = reference is probe
        _need_aligned(probe, reference)
        if own and len(probe) < 2:
            raise InputError("resample needs other examples: give two or more, or reference=.")
        partners = partners_of(len(probe), len(reference), self.seed, own)

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            at = partners[chosen]
            others = reference.examples(at)
            donors = head_values(setting.model, others.tokens, others.real, inputs=others.inputs)
            return partial(edits.resample, donors=donors, positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Patch(_FromReference):
    """Replace a head's value with that of a paired run, per position.

    Attributes:
        reference: example i is the pair of the probe's example i; None: the probe's corrupt pair.
        site: ``z``, ``query`` or ``pattern``.

    Example:
        >>> hs.interventions.Patch(site="query").facts
        {'method': 'patch', 'site': 'query'}
    """

    site: HeadSite = "z"
    name: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        """Refuse sites that belong to key/value heads or do not exist.

        Raises:
            InputError: for any other site.
        """
        super().__post_init__()
        if self.site not in ("z", "query", "pattern"):
            raise InputError(
                f"Patch takes the site z, query or pattern, not {self.site!r}; keys and values "
                "belong to key/value heads: use hs.patch_activations."
            )

    def reference_for(self, probe: Probe) -> Probe:
        """The reference, or the probe's corrupt pair."""
        if self.reference is not None:
            return super().reference_for(probe)
        if probe.corrupt is None:
            raise InputError(
                f"{self.name} takes values from a paired run, and this probe has no corrupt pair: "
                "use a probe of pairs, or give reference=."
            )
        return probe.corrupt

    def prepare(self, setting: Setting) -> BatchPlace:
        """Check that the pair is aligned example by example."""
        reference = self.reference_for(setting.probe)
        _need_aligned(setting.probe, reference)

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            pair = reference.examples(chosen)
            donors = head_values(
                setting.model, pair.tokens, pair.real, site=self.site, inputs=pair.inputs
            )
            where = setting.where(chosen)
            if self.site == "pattern":
                return partial(edits.freeze_pattern, patterns=donors, positions=where)
            return partial(edits.patch, donors=donors, site=self.site, positions=where)

        return batch


@dataclass(frozen=True, eq=False)
class FreezePattern(Patch):
    """Freeze the head's attention pattern to that of a paired run.

    Attributes:
        reference: example i is the pair of the probe's example i; None: the probe's corrupt pair.

    Example:
        >>> hs.interventions.FreezePattern().facts
        {'method': 'freeze_pattern', 'site': 'pattern'}
    """

    site: HeadSite = "pattern"
    name: ClassVar[str] = "freeze_pattern"


class _Means:
    """Mean head outputs over a reference, computed once."""

    def __init__(self, setting: Setting, reference: Probe, *, per_position: bool) -> None:
        self._setting, self._reference, self._per_position = setting, reference, per_position
        self._means: Mapping[int, Tensor] | None = None

    def of(self, clean: Mapping[int, Tensor] | None) -> Mapping[int, Tensor]:
        """Means by layer, taken from the recorded run if it is the whole reference."""
        s, probe = self._setting, self._setting.probe
        whole = self._reference is probe and s.batch_size >= len(probe)
        if self._means is None and whole and clean is not None:
            sums = {layer: _summed(z, probe.real, self._per_position) for layer, z in clean.items()}
            self._means = _averaged(sums, probe.real, self._per_position)
        if self._means is None:
            self._means = head_means(
                s.model,
                self._reference,
                per_position=self._per_position,
                batch_size=s.batch_size,
            )
        return self._means


_SHIPPED: tuple[type[Intervention], ...] = (
    Zero, Mean, MeanPos, Resample, Patch, Uniform, AttendToFirst,
)  # fmt: skip
# Interventions that need no arguments.
NAMED: Mapping[str, type[Intervention]] = {one.name: one for one in _SHIPPED}

# Interventions that need arguments: what they need, and how to pass it.
_MEASURED = {
    "scale": ("a factor", "Scale(factor)"),
    "scale_keys": ("keys and a factor", "ScaleKeys(keys, factor)"),
    "entmax": ("an alpha", "Entmax(alpha)"),
    "top_k": ("a number of keys", "TopK(k)"),
    "denoise": ("planes", "Denoise(planes)"),
    "redistribute": ("target keys", "Redistribute(target)"),
}

# Methods of earlier versions, and the functions that replace them.
_MOVED = {
    "attribution": "hs.estimate_heads(model, probe, metric, baseline=..., steps=...)",
    "screened": "hs.screen_heads(model, probe, metric, top=..., sample=...)",
}


@checked
def named(
    name: str, reference: Probe | None = None, seed: int = 0, kind: str = "method"
) -> Intervention:
    """Look up an intervention by name.

    Args:
        name: one of ``NAMED``.
        reference: probe that values come from, for interventions that need one.
        seed: seed of random draws.
        kind: what to call the name in messages.

    Raises:
        InputError: if the name is unknown, or the intervention takes no reference.

    Example:
        >>> hs.interventions.named("mean").name
        'mean'
    """
    if name in _MOVED:
        raise InputError(f"{kind}={name!r} is an estimate, not an ablation: call {_MOVED[name]}.")
    if name in _MEASURED:
        what, call = _MEASURED[name]
        raise InputError(f"{kind}={name!r} needs {what}: give hs.interventions.{call}.")
    if name not in NAMED:
        raise InputError(nearest(str(name), list(NAMED), kind=kind))
    made = NAMED[name]
    if made is Resample:
        return Resample(reference, seed)
    if issubclass(made, _FromReference):
        return made(reference)
    if reference is not None:
        raise InputError(
            f"{kind}={name!r} takes no values from elsewhere: leave reference out, or take "
            "mean, mean_pos, resample or patch."
        )
    return made()


@checked
def partners_of(n: int, n_reference: int, seed: int, own: bool) -> Int[Tensor, " example"]:
    """Draw a partner for each example: within one probe by a random cycle, so never itself.

    Args:
        n: number of examples.
        n_reference: number of examples to draw from.
        seed: seed of the draw.
        own: whether both are the same examples.

    Example:
        >>> partners = hs.interventions.partners_of(3, 3, seed=0, own=True)
        >>> bool((partners != torch.arange(3)).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    if not own:
        return torch.randint(n_reference, (n,), generator=generator)
    order = torch.randperm(n, generator=generator)
    partners = torch.empty_like(order)
    partners[order] = order.roll(1)
    return partners


def _need_aligned(probe: Probe, reference: Probe) -> None:
    _need_same_length(probe, reference, "it")
    both = torch.cat([probe.real, reference.real])
    if not bool((both == both[:1]).all()):
        raise InputError(
            "resample and patch take another example's output at the same position: the padding "
            "of all examples must be in the same places."
        )
