"""Weights, norms, positions and embedding of a transformers model, measured and verified."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.base.batches import TOKENS, Batch
from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.hooks import Call, Hook, after, before
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import arguments, body_of, tiny_batch, tiny_tokens
from headscope.models.hf.measured import (
    TURNS_BY_LENGTH,
    MeasuredParts,
    measure_norm,
    named_epsilon,
    unhooked_copy,
)
from headscope.models.hf.weights import (
    Sources,
    bias,
    find_sources,
    inside,
    not_by_head,
    only_tensor,
    read_weights,
)
from headscope.models.proof import gap, rounding
from headscope.models.protocol import AttentionWrite
from headscope.models.rotary import POSITIONS, find_rotation, turns
from headscope.models.running import accepted, at_hand, pass_over
from headscope.models.taps import Texts
from headscope.views import HeadNorm, HeadWeights, Norm, QueryKey, Rotation

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel


# How a module of a family lays out queries or keys: axes in the order that it holds them.
AxisOrder = Literal["position first", "head first", "flat"]
_LAYOUTS: tuple[AxisOrder, ...] = ("position first", "head first", "flat")


@dataclass(eq=False)
class SeenLayer:
    """One attention layer in a short pass, at some positions.

    Attributes:
        read: what attention read.
        query, key, value: queries, keys and values of its attention call.
        modules: input and output of every module inside that was given one tensor and made one,
            whatever their axes mean.
    """

    read: Float[Tensor, "batch pos d_model"]
    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head pos d_head"]
    value: Float[Tensor, "batch kv_head pos d_head"]
    modules: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


def short_pass(model: "HFModel", batch: Batch, at: list[int]) -> dict[int, SeenLayer]:
    """Run a short batch; keep what every attention layer shows at some positions.

    Args:
        model: model to run.
        batch: batch to run; a text's length must differ from the number of heads, to distinguish
            the axes.
        at: positions.
    """
    parts, length = model.layout.by_attention(), model.n_queries(Texts.of(batch))
    read: dict[int, Tensor] = {}
    modules: dict[int, dict[nn.Module, tuple[Tensor, Tensor]]] = {
        n: {} for n in model.layout.layers
    }
    seen: dict[int, SeenLayer] = {}

    def enter(module: nn.Module, call: Call) -> None:
        read[parts[module].layer] = call.stream[:, at]

    def note(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, call: Call, output: Any) -> None:
            given = only_tensor(call)
            if given is not None and isinstance(output, Tensor):
                entered, made = _at(given, at, length), _at(output, at, length)
                if entered is not None and made is not None:
                    modules[layer][module] = (entered, made)

        return hook

    def attend(module: nn.Module, call: AttentionCall) -> Tensor:
        layer = parts[module].layer
        query, key, value = (one[:, :, at].detach() for one in (call.query, call.key, call.value))
        seen[layer] = SeenLayer(read[layer], query, key, value, modules[layer])
        return fused(call)

    hooks: list[Hook] = []
    for layer, one in model.layout.layers.items():
        hooks.append(before(one.attention, enter))
        hooks += [after(module, note(layer)) for _, module in inside(one)]
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(routed(model.layout.configs, attend, parts))
        model.parts.watch(batch, hooks)
    return seen


def _at(value: Tensor, at: list[int], length: int) -> Tensor | None:
    """Some positions of a tensor, on the first axis that is as long as the text."""
    for axis in range(1, value.ndim):
        if value.shape[axis] == length:
            index = torch.tensor(at, device=value.device)
            return value.detach().index_select(axis, index).clone()
    return None


def proved_linear(
    model: "HFModel", layer: int, seen: SeenLayer, sources: Sources, weights: HeadWeights
) -> str | None:
    """Reason why weights do not match the layer's matrices; None if they do."""
    attention = model.layout.layers[layer].attention
    for site, weight, constant in _sides(weights):
        made = seen.modules.get(attention.get_submodule(sources[site].name))
        if made is None:
            return f"what makes the {site} of layer {layer} is not called with one tensor"
        content = _content(seen.read, weight, constant)
        returned = sources[site].of_heads(made[1]).reshape(content.shape)
        allowed = rounding(model.dtype, weight.shape[1])
        if not gap(content, returned, allowed).closed:
            return (
                f"what makes the {site} of layer {layer} does more than its matrix (an adapter, "
                "quantised inputs, or a hook)"
            )
    return None


def proved_values(
    model: "HFModel", layer: int, seen: SeenLayer, weights: HeadWeights
) -> str | None:
    """Reason why values do not match the weights; None if they do."""
    content = _content(seen.read, weights.W_V, weights.b_V).transpose(1, 2)
    allowed = rounding(model.dtype, weights.W_V.shape[1])
    if gap(content, seen.value, allowed).closed:
        return None
    if gap(
        content.clamp(float(seen.value.min()), float(seen.value.max())), seen.value, allowed
    ).closed:
        return f"clips the values of layer {layer} (clip_qkv)"
    return f"changes the values of layer {layer} behind their matrix (e.g. by a norm)"


def _sides(weights: HeadWeights) -> Iterator[tuple[Any, Tensor, Tensor]]:
    yield "query", weights.W_Q, weights.b_Q
    yield "key", weights.W_K, weights.b_K
    yield "value", weights.W_V, weights.b_V


def _content(
    read: Float[Tensor, "batch pos d_model"],
    weight: Float[Tensor, "head d_model d_head"],
    constant: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Product of attention's input with the weights, in fp32."""
    made = torch.einsum("bpd,hde->bphe", read.float(), weight.float())
    return made + constant.float()


@dataclass(frozen=True, eq=False)
class SideNorm:
    """A module that norms queries or keys.

    Attributes:
        name: inside the attention module.
        layout: in which order it is given their axes.
        first: whether positions turn what it makes; else it norms what was turned.
    """

    name: str
    layout: AxisOrder
    first: bool


@dataclass(frozen=True, eq=False)
class Turning:
    """Training-independent facts on one layer's queries and keys; see :class:`QueryKey`."""

    rotation: Rotation
    query_norm: SideNorm | None
    key_norm: SideNorm | None
    query_scale: float
    key_scale: float


@dataclass(frozen=True, eq=False)
class _Side:
    """Queries or keys on their way: from the matrix, before and after positions turn them."""

    content: Float[Tensor, "batch head pos d_head"]
    before: Float[Tensor, "batch head pos d_head"]
    after: Float[Tensor, "batch head pos d_head"]
    norm: SideNorm | None

    @property
    def scale(self) -> float:
        """Constant multiplier, from position 0, which nothing turns."""
        before, after = self.before[:, :, 0], self.after[:, :, 0]
        return float((before * after).sum() / before.square().sum().clamp_min(1e-30))

    def confirms(self, norm: HeadNorm, allowed: float) -> bool:
        """Whether a norm does what its module did."""
        given = self.content if self.norm is None or self.norm.first else self.after
        made = norm(given.transpose(1, 2)).transpose(1, 2)
        return self.norm is None or not self.norm.first or gap(made, self.before, allowed).closed


def find_turning(
    model: "HFModel",
    layer: int,
    seen: SeenLayer,
    weights: HeadWeights,
    known: Sequence[Rotation] = (),
) -> Turning | str:
    """Find what takes a layer's queries and keys from their matrices to the scores; or say why not.

    Args:
        model: model of the layer.
        layer: its number.
        seen: record of a short pass, at the first positions of
            :data:`headscope.models.rotary.POSITIONS`.
        weights: weights of the layer.
        known: rotations of other layers, tried first.
    """
    exact = model.dtype in (torch.float32, torch.float64)
    attention = model.layout.layers[layer].attention
    names = {module: name for name, module in attention.named_modules()}
    sides = []
    for weight, constant, used in (
        (weights.W_Q, weights.b_Q, seen.query),
        (weights.W_K, weights.b_K, seen.key),
    ):
        content = _content(seen.read, weight, constant).transpose(1, 2)
        side = _side(seen, names, content, used.float(), rounding(model.dtype, weight.shape[1]))
        if side.norm is not None:
            heads, d_head = content.shape[1], content.shape[3]
            norm = measure_head_norm(attention, side.norm, heads, d_head, content.device)
            if norm is None or not side.confirms(norm, rounding(model.dtype, content.shape[3])):
                return f"norms the queries and keys of layer {layer} in a way of its own"
        sides.append(side)
    scales = (1.0, 1.0)
    rotation = _rotation(sides, scales, known, exact)
    if rotation is None:
        scales = (sides[0].scale, sides[1].scale)
        rotation = _rotation(sides, scales, known, exact)
    if rotation is None:
        return (
            f"changes the queries and keys of layer {layer} by more than a norm, a rotation and a "
            "constant multiplier (e.g. by clipping, a convolution, or by what grows with position)"
        )
    return Turning(rotation, sides[0].norm, sides[1].norm, *scales)


def _side(
    seen: SeenLayer,
    names: dict[nn.Module, str],
    content: Float[Tensor, "batch head pos d_head"],
    used: Float[Tensor, "batch head pos d_head"],
    allowed: float,
) -> _Side:
    """Follow queries or keys through the modules that were given just them, or made just them."""
    for module, (given, made) in seen.modules.items():
        if given.shape != made.shape or torch.equal(given, made) or module not in names:
            continue
        if given.shape == seen.read.shape and torch.equal(given, seen.read):
            continue  # a matrix, or what stands before it
        for layout in _LAYOUTS:
            before, after = (_by_head(one, layout, content.shape) for one in (given, made))
            if before is None or after is None:
                continue
            if gap(before, content, allowed).closed:
                return _Side(content, after, used, SideNorm(names[module], layout, True))
            if gap(after, used, allowed).closed:
                return _Side(content, content, before, SideNorm(names[module], layout, False))
    return _Side(content, content, used, None)


def _by_head(value: Tensor, layout: AxisOrder, shape: torch.Size) -> Tensor | None:
    """Queries or keys as ``[batch head pos d_head]``; None if this layout does not fit."""
    batch, heads, positions, d_head = shape
    held = {
        "position first": (batch, positions, heads, d_head),
        "head first": (batch, heads, positions, d_head),
        "flat": (batch, positions, heads * d_head),
    }[layout]
    if value.shape != held:
        return None
    if layout == "flat":
        value = value.unflatten(-1, (heads, d_head))
    return (value if layout == "head first" else value.transpose(1, 2)).float()


def _rotation(
    sides: Sequence[_Side], scales: tuple[float, float], known: Sequence[Rotation], exact: bool
) -> Rotation | None:
    pairs = zip(sides, scales, strict=True)
    before = torch.cat([(side.before * scale).flatten(0, 1) for side, scale in pairs]).cpu()
    after = torch.cat([side.after.flatten(0, 1) for side in sides]).cpu()
    for one in known:
        if turns(one, before, after, 1e-9 if exact else 3e-5):
            return one
    return find_rotation(before, after, 1e-6 if exact else 1e-3)


def query_key_now(model: "HFModel", layer: int, turning: Turning) -> QueryKey:
    """A layer's current norms, with its rotation.

    Raises:
        UnsupportedModelError: if a norm that follows rotation does not commute with it.
    """
    shape, attention = model.shape, model.layout.layers[layer].attention
    found: list[HeadNorm | None] = []
    for one, heads in ((turning.query_norm, shape.n_heads), (turning.key_norm, shape.n_kv_heads)):
        norm = None
        if one is not None:
            norm = measure_head_norm(attention, one, heads, shape.d_head, model.device)
            if norm is None:
                raise UnsupportedModelError(
                    f"{model.name} norms the queries and keys of layer {layer} in a way of its own."
                )
            if not one.first:
                _need_commuting(model, norm, turning.rotation)
        found.append(norm)
    query, key = found
    return QueryKey(turning.rotation, query, key, turning.query_scale, turning.key_scale)


def _need_commuting(model: "HFModel", norm: HeadNorm, rotation: Rotation) -> None:
    """Refuse a norm after rotation that treats the two coordinates of a plane differently.

    Raises:
        UnsupportedModelError: naming what works.
    """
    first, second = list(rotation.first), list(rotation.second)
    one, other = norm.gain[:, first], norm.gain[:, second]
    plain = not norm.centred and not bool(norm.bias.any()) and rotation.gain == 1
    if not first or (plain and gap(one, other, 1e-5).closed):
        return
    raise UnsupportedModelError(
        f"{model.name} norms its queries and keys after positions turned them, with a gain for "
        "every number, so that a score depends on both positions and not on their distance: a "
        "qk_scorer reads the scores of a run."
    )


@torch.no_grad()
def measure_head_norm(
    attention: nn.Module, place: SideNorm, heads: int, d_head: int, device: torch.device
) -> HeadNorm | None:
    """Measure a norm of queries or keys by what it makes of known numbers; None for anything else.

    It is applied to numbers and their negatives: half the difference is the gain times the
    normalised numbers, half the sum is the bias.
    """
    module = attention.get_submodule(place.name)
    with at_hand(module):
        norm = copy.deepcopy(unhooked_copy(module)).float().eval()
    draw = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 2, heads, d_head, generator=draw, dtype=torch.float32) + 0.5
    held = next((one.device for one in (*norm.parameters(), *norm.buffers())), device)
    probe = probe.to(held)

    def made(x: Tensor) -> Tensor:
        if place.layout == "flat":
            flat: Tensor = norm(x.flatten(2)).reshape(x.shape)
            return flat
        turned: Tensor = (
            norm(x.transpose(1, 2)).transpose(1, 2) if place.layout == "head first" else norm(x)
        )
        return turned

    longer = probe * torch.where(torch.arange(heads, device=held) == 0, 3.0, 1.0)[:, None]
    there, back, moved, mixed = made(probe), made(-probe), made(probe + 3), made(longer)
    centred = gap(moved, there, 1e-3).closed
    together = heads > 1 and not gap(mixed[:, :, 1:], there[:, :, 1:], 1e-3).closed
    ones = torch.ones(heads, d_head, device=held, dtype=torch.float32)
    epsilon = named_epsilon(module)
    bare = HeadNorm(ones, 0 * ones, centred, 0.0, together)
    if epsilon is None:
        epsilon = _epsilon(made, bare.folded(probe), bare)
    unit = replace(bare, epsilon=epsilon)(probe)
    odd = (there - back) / 2
    gain = (odd * unit).sum((0, 1)) / unit.square().sum((0, 1)).clamp_min(1e-30)
    if not gap(gain * unit, odd, 1e-3).closed:
        return None
    bias = (there + back)[0, 0] / 2
    bias = torch.zeros_like(bias) if float(bias.abs().max()) < 1e-6 else bias
    return HeadNorm(gain.to(device), bias.to(device), centred, epsilon, together)


def _epsilon(made: Callable[[Tensor], Tensor], x: Tensor, bare: HeadNorm) -> float:
    """From how much less than its share a small vector comes out, all vectors being as long.

    With ``m`` the mean square of x and ``r`` the size of ``norm(t x)`` over that of ``norm(x)``,
    ``r^2 (t^2 m + epsilon) = t^2 (m + epsilon)``.
    """
    t, x = 1e-3, x / bare.scale(x).unsqueeze(-1)
    small, large = (((made(s * x) - made(-s * x)) / 2).double() for s in (t, 1.0))
    r2 = float((small * large).sum() / large.square().sum().clamp_min(1e-30)) ** 2
    return max(0.0, t**2 * (1 - r2) / max(r2 - t**2, 1e-12))


@dataclass(frozen=True, eq=False)
class WeightLayout:
    """Training-independent layout of one layer's weights, and what follows them.

    Attributes:
        sources: module outputs that queries, keys and values are made from.
        values: why values are not what weights give; None if they are.
        turning: what follows the weights of queries and keys; or why that cannot be told.
    """

    sources: Sources
    values: str | None
    turning: Turning | str


def find_readings(model: "HFModel") -> dict[int, WeightLayout | str]:
    """Measure every layer of a model with a tiny pass and a short one.

    Returns:
        By layer, its reading; or why it has no weights per head.
    """
    with pass_over(model.module):
        sources = find_sources(model)
        if all(isinstance(one, str) for one in sources.values()):
            return {layer: str(one) for layer, one in sources.items()}
        seen = _seen(model)
        found: dict[int, WeightLayout | str] = {}
        known: list[Rotation] = []
        for layer, one in sources.items():
            found[layer] = (
                one if isinstance(one, str) else _read(model, layer, seen[layer], one, known)
            )
        return found


@torch.no_grad()
def _read(
    model: "HFModel", layer: int, seen: SeenLayer, sources: Sources, known: list[Rotation]
) -> WeightLayout | str:
    """Read and prove one layer; rotations that are new are added to those that are known."""
    width = model.shape.d_model
    if seen.read.shape[-1] != width:
        return (
            f"attention of layer {layer} reads {seen.read.shape[-1]} numbers a position and the "
            f"residual stream has {width}, so its circuits are not maps of the stream"
        )
    weights = read_weights(model, layer, sources, width)
    reason = proved_linear(model, layer, seen, sources, weights)
    if reason is not None:
        return reason
    turning = find_turning(model, layer, seen, weights, known)
    if isinstance(turning, Turning) and not any(turning.rotation is one for one in known):
        known.append(turning.rotation)
    return WeightLayout(sources, proved_values(model, layer, seen, weights), turning)


def _seen(model: "HFModel") -> dict[int, SeenLayer]:
    """A short pass, over a text whose length differs from every other size of its activations."""
    shape = model.shape
    limit = shape.n_ctx or POSITIONS[-1] + 2
    sizes = {shape.n_heads, shape.n_kv_heads, shape.d_head}
    if model.grid is not None:
        at = [position for position in POSITIONS if position < model.grid.length]
        return short_pass(model, tiny_batch(model.module), at)
    length = next(n for n in range(min(limit, POSITIONS[-1] + 2), 0, -1) if n not in sizes)
    at = [position for position in POSITIONS if position < length]
    ids = torch.arange(2 * length) * 7 % max(shape.d_vocab - 1, 1)
    return short_pass(model, Batch({TOKENS: ids.view(2, -1)}, {}), at)


# Tokens of the pass that is run at two lengths, and a length beyond any where none is said.
_FEW, _FAR = 8, 1 << 20


class HFParts(MeasuredParts):
    """Parts of an :class:`headscope.models.hf.model.HFModel`."""

    def __init__(self, model: Any) -> None:
        """Measure nothing yet."""
        super().__init__(model)
        self._measured: tuple[object, dict[int, WeightLayout | str]] | None = None

    def input_norm(self, layer: int) -> Norm:
        """Norm between the residual stream and one layer's attention."""
        width, device = self.model.shape.d_model, self.model.device
        parts = self.model.layout.layers[layer]
        if parts.reads_residual:
            ones = torch.ones(width, dtype=torch.float32, device=device)
            return Norm(ones, torch.zeros_like(ones), False, 0.0, divides=False)
        if parts.input_norm is None:
            raise UnsupportedModelError(
                f"{self.model.name}: what attention of layer {layer} reads is not a plain norm of "
                "the residual stream."
            )
        return measure_norm(parts.input_norm, width, device)

    def block(self, layer: int) -> nn.Module:
        """Module that is one layer, attention and MLP."""
        block: nn.Module = self.model.layout.blocks[layer]
        return block

    def projection(self, layer: int) -> nn.Module:
        """Output projection of one layer's attention."""
        if layer not in self.model.layout.layers:
            raise UnsupportedModelError(f"{self.model.name} has no attention in layer {layer}.")
        projection: nn.Module = self.model.layout.layers[layer].projection
        return projection

    def attention_write(self, layer: int) -> AttentionWrite:
        """How head outputs of one layer reach the residual stream, with the weights of now."""
        channels = self.model.layout.channel_scale(layer)
        if channels is None:
            return super().attention_write(layer)
        bias = self.projection_bias(layer).float()
        return AttentionWrite(bias * channels.to(bias.device).float(), None)

    def projection_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Bias of that projection; zeros where it has none."""
        shape = self.model.shape
        found = bias(self.projection(layer), shape.n_heads * shape.d_head)
        return torch.zeros(shape.d_model, device=self.model.device) if found is None else found

    def run(self, batch: Batch) -> None:
        """Run the model's body."""
        inputs = arguments(self.model.module, batch)
        if TOKENS in inputs:  # or some families warn of padding
            inputs["attention_mask"] = torch.ones_like(inputs[TOKENS])
        body_of(self.model.module)(**inputs)

    def tiny(self) -> Batch:
        """Two small examples of what the model reads."""
        return tiny_batch(self.model.module)

    def weights(self, layer: int) -> HeadWeights:
        """Current attention weights of one layer.

        Raises:
            UnsupportedModelError: if they cannot be told apart by heads, or activations say that
                something else happens.
        """
        reading = self._readings[layer]
        if isinstance(reading, str):
            raise not_by_head(self.model, reading)
        return read_weights(self.model, layer, reading.sources, self.model.shape.d_model)

    def need_values(self, layer: int) -> None:
        """Raise if a layer's values are not given by its weights.

        Raises:
            UnsupportedModelError: with the reason.
        """
        reading = self._readings[layer]
        if not isinstance(reading, str) and reading.values is not None:
            raise UnsupportedModelError(
                f"{self.model.name} {reading.values}, so weights do not say what a head writes."
            )

    def query_key(self, layer: int) -> QueryKey:
        """Current norms and rotation of one layer."""
        if self.turns_by_length:
            raise UnsupportedModelError(f"{self.model.name} {TURNS_BY_LENGTH}.")
        reading = self._readings[layer]
        if isinstance(reading, str):
            raise not_by_head(self.model, reading)
        if isinstance(reading.turning, str):
            raise UnsupportedModelError(
                f"{self.model.name} {reading.turning}, so no one matrix gives its attention "
                "scores: a qk_scorer reads those of a run."
            )
        return query_key_now(self.model, layer, reading.turning)

    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured."""
        return self.query_key(layer).rotation

    @property
    def _readings(self) -> "dict[int, WeightLayout | str]":
        """What was measured and proved of every layer, again where the model got other modules."""
        kind = tuple((n, w.shape, w.dtype) for n, w in self.model.module.named_parameters())
        if self._measured is None or self._measured[0] != kind:
            self._measured = kind, find_readings(self.model)
        return self._measured[1]

    @cached_property
    @torch.no_grad()
    def turns_by_length(self) -> bool:
        """Whether the rotation of queries and keys depends on the length of the text, measured.

        The same few tokens at the same positions, followed by one that stands next to them or at
        the end of the context: what comes before must not see the difference.
        """
        shape = self.model.shape
        far = shape.n_ctx or 4 * (shape.trained_ctx or _FAR)
        if "position_ids" not in accepted(self.model.module) or far <= _FEW:
            return False
        ids = tiny_tokens(self.model.module).flatten()[None, :_FEW]
        near = torch.arange(ids.shape[1], device=ids.device)[None]
        last = near.clone()
        last[0, -1] = far - 1
        first, second = self._queries(ids, near), self._queries(ids, last)
        return not all(
            gap(query[:, :, :-1], first[layer][:, :, :-1], rounding(query.dtype, 64)).closed
            for layer, query in second.items()
        )

    def _queries(self, ids: Tensor, position_ids: Tensor) -> dict[int, Tensor]:
        """Queries of every layer as attention uses them, at some positions."""
        parts, seen = self.model.layout.by_attention(), {}

        def attend(module: nn.Module, call: AttentionCall) -> Tensor:
            seen[parts[module].layer] = call.query
            z = fused(call)
            # Where every position sees the last one, nothing may come from it but by its place.
            return z if call.mask.causal else torch.zeros_like(z)

        with routed(self.model.layout.configs, attend):
            self.model.module.base_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=position_ids,
                use_cache=False,
            )
        return seen
