"""Interventions as values: what a head becomes, for any heads of any model.

    hs.ablate_heads(model, probe, metric, hs.interventions.Mean(reference=other))
    hs.ablate_heads(model, probe, metric, "mean")        # the same, with the probe as reference

An intervention says what happens; heads, positions and batches are the caller's. The same object
serves single heads, groups, cumulative ablations, estimates and pruning curves.
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
from headscope.edits import AnyEdit, Heads, HeadSite
from headscope.errors import InputError, UnsupportedModelError, nearest, whole
from headscope.heads import HeadIndex, ModelShape
from headscope.models.protocol import HeadModel
from headscope.models.taps import Reads, Tap, TapView, Texts, at_layers
from headscope.probes.probe import Probe


@dataclass
class _Sums:
    """Sums of head outputs over real positions, per layer."""

    real: Bool[Tensor, "batch pos"]
    per_position: bool
    sums: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Every layer's outputs."""
        return at_layers(shape, self._add)

    def _add(self, view: TapView) -> None:
        self.sums[view.layer] = _summed(view.z, self.real, self.per_position)


def _summed(z: Tensor, real: Tensor, per_position: bool) -> Tensor:
    """Sum of ``z [batch pos head d_head]`` over real positions, or over examples at each."""
    weights = real.to(z.device)[:, :, None, None]
    return (z.float() * weights).sum(0 if per_position else (0, 1))


def _averaged(
    sums: Mapping[int, Tensor], real: Tensor, per_position: bool
) -> dict[int, Float[Tensor, "*pos head d_head"]]:
    """Sums divided by how many real positions they hold; 0 where there is none."""
    counts = real.sum(0)[:, None, None] if per_position else real.sum()
    return {layer: s / counts.to(s.device).clamp_min(1) for layer, s in sums.items()}


def head_means(
    model: HeadModel, probe: Probe, *, per_position: bool = False, batch_size: int | None = None
) -> dict[int, Float[Tensor, "*pos head d_head"]]:
    """Mean output of every head over a probe's real positions, before the output projection.

    Args:
        model: the model.
        probe: the reference.
        per_position: average over examples only, at each position of the batch.
        batch_size: examples per pass.

    Returns:
        By layer ``[head d_head]``, or ``[pos head d_head]``.

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
    """What all heads of some layers have at a site, for :func:`headscope.edits.patch`.

    Args:
        model: the model.
        tokens: one batch; all of it is kept.
        real: False at padding.
        site: see :class:`headscope.edits.HeadEdit`.
        layers: which; default: all with attention.
        inputs: what the model reads beside tokens.

    Returns:
        By layer, in the layout of the site.

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
# Makes edits of one batch: of these examples, with the recorded outputs of its clean run by layer.
BatchPlace = Callable[[slice, Mapping[int, Tensor] | None], Place]


@dataclass(frozen=True, eq=False)
class Setting:
    """What an intervention is applied to.

    Attributes:
        model: that is edited.
        probe: that is run.
        positions: where to edit; None: everywhere.
        batch_size: examples of a recorded batch.
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
    """What heads become. Subclass it, with ``name`` and :meth:`prepare`, for an own one.

    Example:
        >>> zero = hs.interventions.Zero()
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, zero, heads="L0H1")
        >>> scores.name
        'zero_ablation'
    """

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, setting: Setting) -> BatchPlace:
        """Check the setting, compute what all batches share, and return what edits a batch.

        Args:
            setting: model, probe and positions.

        Raises:
            InputError: if the intervention does not fit the probe.
        """

    def reference_for(self, probe: Probe) -> Probe | None:
        """Probe that replacement values come from; None where there is none."""
        return None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name and numbers of the intervention, for provenance (JSON values)."""
        numbers = {
            one.name: value
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), str | int | float | bool)
        }
        return {"method": self.name, **numbers}


def _need_same_length(probe: Probe, reference: Probe, name: str) -> None:
    """Refuse a reference that has other positions than the probe.

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
    """The head's output ``z`` becomes 0; what a value bias adds goes too.

    Example:
        >>> hs.interventions.Zero().name
        'zero'
    """

    name: ClassVar[str] = "zero"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Zero the heads at the positions asked for."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.zero, positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """The head's output ``z`` is multiplied by a factor.

    Attributes:
        factor: 0 is zero ablation, 1 changes nothing.

    Example:
        >>> hs.interventions.Scale(0.5).facts
        {'method': 'scale', 'factor': 0.5}
    """

    factor: int | float
    name: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        """Refuse what is not a number.

        Raises:
            InputError: if the factor is NaN, infinite or not a number.
        """
        if not isinstance(self.factor, int | float) or not abs(self.factor) < float("inf"):
            raise InputError(f"Scale takes a finite number, not {self.factor!r}.")

    def prepare(self, setting: Setting) -> BatchPlace:
        """Scale the heads at the positions asked for."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.scale, factor=float(self.factor), positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Uniform(Intervention):
    """The query becomes 0: attention is flat over the visible keys (Wu et al. 2024).

    Position biases (ALiBi) and the share of a learned sink remain.

    Example:
        >>> hs.interventions.Uniform().name
        'uniform'
    """

    name: ClassVar[str] = "uniform"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Flatten the heads' attention at the positions asked for."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.uniform, positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class AttendToFirst(Intervention):
    """All attention goes to each text's first token.

    Example:
        >>> hs.interventions.AttendToFirst().name
        'attend_to_first'
    """

    name: ClassVar[str] = "attend_to_first"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Send the heads' attention to the first real token."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            real = setting.probe.real[chosen]
            where = setting.where(chosen)
            return lambda heads: edits.attend_to_first(heads, real, positions=where)

        return batch


@dataclass(frozen=True, eq=False)
class _Sparse(Intervention):
    """Base of interventions that make attention rows with exact zeros of a model's own rows."""

    @abstractmethod
    def edit(self, heads: Heads, positions: Bool[Tensor, "batch pos"] | None = None) -> AnyEdit:
        """The edit of some heads."""

    def prepare(self, setting: Setting) -> BatchPlace:
        """Change the heads' attention at the positions asked for."""

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            return lambda heads: self.edit(heads, setting.where(chosen))

        return batch

    def on(self, model: HeadModel, heads: Heads | None = None) -> AbstractContextManager[None]:
        """Scope in which a model attends that way: scores, passes and generation see it.

        Args:
            model: whose attention becomes sparse.
            heads: which; None: all.

        Example:
            >>> with hs.interventions.TopK(1).on(model):
            ...     table = hs.score(model, probe, ["max_attention"])
            >>> bool((table["max_attention"].mean > 0.999).all())
            True
        """
        return model.edited([self.edit(model.shape.heads if heads is None else heads)])


@dataclass(frozen=True, eq=False)
class Entmax(_Sparse):
    """Attention is alpha-entmax of the scores: keys that are far behind get exactly 0.

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
        """Refuse what is not an alpha.

        Raises:
            InputError: if it is not 1, or 1.01 and more.
        """
        if not isinstance(self.alpha, int | float):
            raise InputError(f"Entmax takes a number, not {self.alpha!r}.")
        edits.entmax((0, 0), float(self.alpha))

    def edit(self, heads: Heads, positions: Bool[Tensor, "batch pos"] | None = None) -> AnyEdit:
        """The edit of some heads."""
        return edits.entmax(heads, float(self.alpha), positions=positions)


@dataclass(frozen=True, eq=False)
class TopK(_Sparse):
    """Attention goes to each query's k highest-scoring keys alone (Gupta et al. 2021).

    Attributes:
        k: keys that a query keeps.

    Example:
        >>> hs.interventions.TopK(4).facts
        {'method': 'top_k', 'k': 4}
    """

    k: int
    name: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        """Refuse what is not a number of keys.

        Raises:
            InputError: if it is not a whole number from 1 on.
        """
        edits.top_k((0, 0), self.k)

    def edit(self, heads: Heads, positions: Bool[Tensor, "batch pos"] | None = None) -> AnyEdit:
        """The edit of some heads."""
        return edits.top_k(heads, self.k, positions=positions)


@dataclass(frozen=True, eq=False)
class Denoise(Intervention):
    """Rotary bands of some heads' queries are taken out, or replaced by noise (DoPE).

    Without noise the two coordinates of each plane become 0 in the query, so that the plane adds
    nothing to any score (truncation). With noise they become Gaussian numbers, drawn for every
    head and position in the text and the same in every text, times the root mean square of the
    query's own coordinates. Heads without planes stay as they are. Which planes: those that nearly
    all tokens share, ``hs.geometry.rotary_bands(model).below(entropy)``; all planes of a head
    denoise it as a whole.

    Attributes:
        planes: by head, which planes, counted from the fastest to the slowest.
        noise: standard deviation of the noise, as a multiple of the query's root mean square;
            0 truncates.
        seed: of the noise.

    Source:
        Xiong et al. 2025, "DoPE: Denoising Rotary Position Embedding" (arXiv 2511.09146): by
        parts, by all and by Gaussian. The size of the noise relative to the query is ours.

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
        """Check the planes, the noise and the seed.

        Raises:
            InputError: if the planes are not given by head, or the noise or the seed is negative or
                not a number.
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
            InputError: if a head or a plane is not there.
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
        """Noise of one layer; longer texts begin with that of shorter ones."""
        if self.noise == 0:
            return torch.zeros(1, 1, 1)
        size = (length, model.shape.n_heads, model.shape.d_head)
        noise = np.random.default_rng((self.seed, layer)).standard_normal(size, np.float32)
        return torch.from_numpy(noise).transpose(0, 1)

    def _taken(self, model: HeadModel) -> dict[int, Tensor]:
        """Coordinates that are taken out, by layer ``[head 1 d_head]``."""
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
    """Put new coordinates, in units of the vector's root mean square, where they are not NaN."""
    if new is None:
        return value
    size = value.float().square().mean(-1, keepdim=True).sqrt().to(value.dtype)
    return torch.where(new.isnan(), value, new.nan_to_num() * size)


@dataclass(frozen=True, eq=False)
class _FromReference(Intervention):
    """Base of interventions whose values come from a probe: by default the one that is run."""

    reference: Probe | None = None

    def __post_init__(self) -> None:
        """Refuse a reference that is not a probe.

        Raises:
            InputError: with what was given.
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
    """The head's output becomes its mean over all real positions of a reference.

    Attributes:
        reference: None: the probe that is run.

    Example:
        >>> other = hs.probes.repeated_tokens(model, length=10, batch=2, seed=1)
        >>> mean = hs.interventions.Mean(reference=other)
        >>> scores = hs.ablate_heads(model, probe, hs.metrics.loss, mean, heads="L0H1")
        >>> scores.provenance.probe["reference"]
        'repeated_tokens'
    """

    name: ClassVar[str] = "mean"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Take the means once, of the recorded run itself where that is the reference."""
        means = _Means(setting, self.reference_for(setting.probe), per_position=False)

        def batch(chosen: slice, clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.mean, means=means.of(clean), positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class MeanPos(_FromReference):
    """The head's output becomes its mean over a reference's examples, position by position.

    Attributes:
        reference: of the probe's length; None: the probe that is run.

    Example:
        >>> hs.interventions.MeanPos().name
        'mean_pos'
    """

    name: ClassVar[str] = "mean_pos"

    def prepare(self, setting: Setting) -> BatchPlace:
        """Take the means once, of the recorded run itself where that is the reference."""
        reference = self.reference_for(setting.probe)
        _need_same_length(setting.probe, reference, self.name)
        means = _Means(setting, reference, per_position=True)

        def batch(chosen: slice, clean: Mapping[int, Tensor] | None) -> Place:
            return partial(edits.mean_pos, means=means.of(clean), positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Resample(_FromReference):
    """The head's output becomes that of another example at the same position.

    Attributes:
        reference: where the other examples are; None: the probe that is run, and then no example
            is its own partner.
        seed: of the draw of partners.

    Example:
        >>> hs.interventions.Resample(seed=3).facts
        {'method': 'resample', 'seed': 3}
    """

    seed: int = 0
    name: ClassVar[str] = "resample"

    def __post_init__(self) -> None:
        """Refuse a seed that is not a number.

        Raises:
            InputError: with what was given.
        """
        super().__post_init__()
        whole(self.seed, "seed")

    def prepare(self, setting: Setting) -> BatchPlace:
        """Draw every example's partner."""
        probe, reference = setting.probe, self.reference_for(setting.probe)
        own = reference is probe
        _need_aligned(probe, reference)
        if own and len(probe) < 2:
            raise InputError("resample needs another example: give two or more, or a reference.")
        partners = partners_of(len(probe), len(reference), self.seed, own)

        def batch(chosen: slice, _clean: Mapping[int, Tensor] | None) -> Place:
            at = partners[chosen]
            others = reference.examples(at)
            donors = head_values(setting.model, others.tokens, others.real, inputs=others.inputs)
            return partial(edits.resample, donors=donors, positions=setting.where(chosen))

        return batch


@dataclass(frozen=True, eq=False)
class Patch(_FromReference):
    """A value of the head becomes that of a paired run, position by position.

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
            InputError: for another site.
        """
        super().__post_init__()
        if self.site not in ("z", "query", "pattern"):
            raise InputError(
                f"Patch takes the site z, query or pattern, not {self.site!r}; keys and values "
                "belong to key/value heads: use hs.patch_activations."
            )

    def reference_for(self, probe: Probe) -> Probe:
        """The pair of the probe, or the one given."""
        if self.reference is not None:
            return super().reference_for(probe)
        if probe.corrupt is None:
            raise InputError(
                f"{self.name} takes values from a paired run, and this probe has no corrupt pair: "
                "use a probe of pairs, or give reference=."
            )
        return probe.corrupt

    def prepare(self, setting: Setting) -> BatchPlace:
        """Check that the pair is aligned, example by example."""
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
    """Attention stays what it is in a paired run, whatever queries and keys become.

    Attributes:
        reference: example i is the pair of the probe's example i; None: the probe's corrupt pair.

    Example:
        >>> hs.interventions.FreezePattern().facts
        {'method': 'freeze_pattern', 'site': 'pattern'}
    """

    site: HeadSite = "pattern"
    name: ClassVar[str] = "freeze_pattern"


class _Means:
    """Means of head outputs over a reference, taken once."""

    def __init__(self, setting: Setting, reference: Probe, *, per_position: bool) -> None:
        self._setting, self._reference, self._per_position = setting, reference, per_position
        self._means: Mapping[int, Tensor] | None = None

    def of(self, clean: Mapping[int, Tensor] | None) -> Mapping[int, Tensor]:
        """Means by layer; of the recorded run itself where that is the whole reference."""
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
# Interventions that a name alone describes.
NAMED: Mapping[str, type[Intervention]] = {one.name: one for one in _SHIPPED}

# Interventions that a name alone does not describe: what they need, and how it is given.
_MEASURED = {
    "scale": ("a factor", "Scale(factor)"),
    "entmax": ("an alpha", "Entmax(alpha)"),
    "top_k": ("a number of keys", "TopK(k)"),
    "denoise": ("planes", "Denoise(planes)"),
}

# What was once a method, and the function that it has become.
_MOVED = {
    "attribution": "hs.estimate_heads(model, probe, metric, baseline=..., steps=...)",
    "screened": "hs.screen_heads(model, probe, metric, top=..., sample=...)",
}


def named(
    name: str, reference: Probe | None = None, seed: int = 0, kind: str = "method"
) -> Intervention:
    """Return the intervention of a name.

    Args:
        name: one of ``NAMED``.
        reference: where values come from, for those that take them from elsewhere.
        seed: of what is drawn.
        kind: what the name is called in errors.

    Raises:
        InputError: if there is no such name, or it takes no reference.

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


def partners_of(n: int, n_reference: int, seed: int, own: bool) -> Int[Tensor, " example"]:
    """Draw another example for each: within one probe never itself, by a random cycle.

    Args:
        n: examples.
        n_reference: examples to draw from.
        seed: of the draw.
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
            "resample and patch take another example's output at the same position: all examples "
            "must have their padding in the same places."
        )
