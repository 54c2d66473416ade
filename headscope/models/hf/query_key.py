"""What stands between a layer's matrices and its scores: norms, rotation, multipliers; measured.

One pass of a few tokens shows what attention read, what the modules inside it made of that, and
the queries, keys and values of its call. Weights are proved on it: what they make of attention's
input is what the matrices returned; and so is what follows: queries and keys are that, normed,
turned and multiplied, and values are that itself.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.base.batches import Batch
from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.hooks import Call, Hook, after, before
from headscope.models.hf.interface import routed
from headscope.models.hf.measured import named_epsilon, unhooked
from headscope.models.hf.weights import Sources, inside, only_tensor
from headscope.models.loading.proof import gap, rounding
from headscope.models.parameters import at_hand
from headscope.models.rotary import find_rotation, turns
from headscope.models.taps import Texts
from headscope.views import HeadNorm, HeadWeights, QueryKey, Rotation

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel

# How a module of a family lays out queries or keys: axes in the order that it holds them.
Layout = Literal["position first", "head first", "flat"]
_LAYOUTS: tuple[Layout, ...] = ("position first", "head first", "flat")


@dataclass(eq=False)
class SeenLayer:
    """One attention layer of a short pass, at some positions.

    Attributes:
        read: what attention read.
        query, key, value: of its call.
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
        model: that runs.
        batch: of a text, its length differs from the number of heads, to tell axes apart.
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
    """Why weights are not what the layer's matrices do with its input; None where they are."""
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
    """Why values are not what weights give; None where they are."""
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
    """What weights make of attention's input, in fp32."""
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
    layout: Layout
    first: bool


@dataclass(frozen=True, eq=False)
class Turning:
    """What was found of one layer that no training changes; see :class:`QueryKey`."""

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
        model: whose layer it is.
        layer: its number.
        seen: of a short pass at the first positions of :data:`headscope.models.rotary.POSITIONS`.
        weights: of this layer.
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


def _by_head(value: Tensor, layout: Layout, shape: torch.Size) -> Tensor | None:
    """Queries or keys as ``[batch head pos d_head]``; None where this layout does not fit."""
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
    """A layer's norms, as they are now, with its rotation.

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
    """Refuse a norm that follows rotation and tells the two numbers of a plane apart.

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
        norm = copy.deepcopy(unhooked(module)).float().eval()
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
