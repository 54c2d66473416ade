"""Norms, unembedding and write scales of a model, measured on tiny passes.

What a watched pass leaves behind, norms, what reads the last residual stream, how attention reaches
the stream, and which modules of a block add to it, with which multipliers.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import curve_fit
from torch import Tensor, nn

from headscope.base.batches import Batch
from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall
from headscope.models.hf.hooks import Call, Hook, after, entering, hooked, stream_of
from headscope.models.proof import Gap, gap
from headscope.models.protocol import AttentionWrite
from headscope.models.running import at_hand, parameter, pass_over, runs_on, submodules
from headscope.models.taps import Tap
from headscope.views import Norm, QueryKey, Rotation, Unembedding


def is_pointwise(head: nn.Module, speak: Callable[[], Tensor], whole: Tensor) -> bool:
    """Whether a module makes the logits of each position from that position alone.

    Args:
        head: module that is given what the body returns.
        speak: runs a tiny pass, and returns its logits.
        whole: what it returned before.
    """
    try:
        with hooked([entering(head, lambda stream: stream[:, 1:2])]):
            cut = speak()
    except (RuntimeError, IndexError, ValueError):
        return False
    return cut.shape == whole[:, 1:2].shape and torch.allclose(
        cut, whole[:, 1:2], rtol=1e-4, atol=1e-5 * float(whole.abs().max())
    )


@dataclass(frozen=True)
class LogitMap:
    """Map from the unembedding's outputs ``u`` to logits, elementwise.

    ``logits = scale * u``, or ``cap * tanh(scale * u / cap)`` where there is a soft cap.
    """

    scale: float
    soft_cap: float | None

    def __call__(self, u: Tensor) -> Tensor:
        """Logits in fp64."""
        scaled = u.double() * self.scale
        return scaled if self.soft_cap is None else self.soft_cap * (scaled / self.soft_cap).tanh()


# Outputs of the unembedding that are sent to the logits: from where a cap does nothing to where
# it does everything.
_SMALLEST, _LARGEST = 1e-3, 300.0


def ramp(output: Tensor) -> Tensor:
    """Numbers of both signs and all sizes, in the shape of an unembedding's outputs."""
    count = output.numel()
    sizes = torch.logspace(math.log10(_SMALLEST), math.log10(_LARGEST), count, dtype=torch.float64)
    signs = 1.0 - 2.0 * (torch.arange(count) % 2)
    return (sizes * signs).reshape(output.shape).to(output)


def measure_logit_map(u: Tensor, logits: Tensor) -> LogitMap | None:
    """Find scale and soft cap that take outputs of an unembedding to logits; None if none do.

    Args:
        u: outputs that span many sizes, see :func:`ramp`.
        logits: what the model made of them.
    """
    if u.shape != logits.shape:
        return None
    given, made = (one.detach().flatten().cpu().double() for one in (u, logits))
    near = given.abs() < 100 * _SMALLEST
    scale = float((given * made)[near].sum() / given[near].square().sum())
    allowed = 8 * torch.finfo(logits.dtype).eps + 8 * torch.finfo(u.dtype).eps
    linear = LogitMap(_short(float((given * made).sum() / given.square().sum())), None)
    if gap(linear(given), made, allowed).closed:
        return linear
    bound = float(made.abs().max())
    if not 0 < scale < math.inf or not 0 < bound < math.inf:
        return None
    found, _ = curve_fit(
        lambda x, s, c: c * np.tanh(s * x / c), given.numpy(), made.numpy(), p0=(scale, bound)
    )
    capped = LogitMap(_short(float(found[0])), _short(float(found[1])))
    return capped if gap(capped(given), made, allowed).closed else None


def _short(value: float) -> float:
    """The number with few digits that a config would hold, where it is as good."""
    rounded = float(f"{value:.4g}")
    return rounded if abs(rounded - value) <= 1e-5 * abs(value) else value


def find_unembedding(
    head: Any, final_norm: nn.Module, d_model: int, logit_map: LogitMap
) -> Unembedding:
    """Measure the final norm, and join it to the unembedding and what follows it.

    Raises:
        UnsupportedModelError: if the module does not act like LayerNorm or RMSNorm.
    """
    return measure_unembedding(
        head,
        final_norm,
        d_model,
        logit_scale=logit_map.scale,
        soft_cap=logit_map.soft_cap,
    )


def measure_unembedding(
    head: Any, final_norm: nn.Module, d_model: int, *, logit_scale: float, soft_cap: float | None
) -> Unembedding:
    """Measure a norm that is followed by an unembedding.

    Raises:
        UnsupportedModelError: if the module does not act like LayerNorm or RMSNorm.
    """
    norm = measure_norm(final_norm, d_model, runs_on(head, head.weight))
    return Unembedding(
        W_U=parameter(head, "weight"),
        b_U=None if getattr(head, "bias", None) is None else parameter(head, "bias"),
        gain=norm.gain,
        bias=norm.bias,
        centred=norm.centred,
        epsilon=norm.epsilon,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
    )


def measure_norm(module: Any, d_model: int, device: torch.device) -> Norm:
    """Measure gain, bias, centring and epsilon of a norm.

    The norm is applied to a known vector and its negative: half the difference is the gain
    times the normalised vector, half the sum is the bias. So ``weight``, ``1 + weight`` and
    whatever comes next are the same to us. A norm that still holds the same numbers is not
    measured again.

    Raises:
        UnsupportedModelError: if the module does not act like LayerNorm or RMSNorm.
    """
    state = (_norm_state(module), d_model, device)
    known = _NORMS.get(module)
    if known is None or known[0] != state:
        known = _NORMS[module] = (state, _measured_norm(module, d_model, device))
    return known[1]


# Norms of this process by module, with all that the module held when it was measured.
_NORMS: "WeakKeyDictionary[nn.Module, tuple[object, Norm]]" = WeakKeyDictionary()


@torch.no_grad()
def _norm_state(module: nn.Module) -> object:
    """Every number that a norm holds: its weights byte by byte, and its settings."""
    found: list[object] = []
    with at_hand(module):
        for part in submodules(module):
            held = vars(part)
            settings = [(k, v) for k, v in held.items() if isinstance(v, (bool, int, float, str))]
            found += [type(part), settings]
            named = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
            loose = [(k, v) for k, v in held.items() if isinstance(v, Tensor)]
            for name, value in (*named, *loose):
                data = value.detach().contiguous().flatten().view(torch.uint8).cpu()
                found.append((name, value.dtype, value.shape, data.numpy().tobytes()))
    return found


def _measured_norm(module: nn.Module, d_model: int, device: torch.device) -> Norm:
    with at_hand(module):
        norm = copy.deepcopy(unhooked_copy(module)).float().eval()  # a few thousand numbers; exact
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 2, d_model, generator=generator, dtype=torch.float32) + 0.5
    given = probe.to(device)
    with torch.no_grad():  # fetched together: the host waits for the device once
        there, back, moved = torch.stack([norm(given), norm(-given), norm(given + 3.0)]).cpu()
    centred = gap(moved, there, 1e-3).closed
    epsilon = named_epsilon(module)
    if epsilon is None:
        epsilon = _measured_epsilon(norm, given, centred)
    x = probe.float()
    x = x - x.mean(-1, keepdim=True) if centred else x
    unit = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    bias = (there + back)[0, 0] / 2
    odd = (there - back) / 2
    gain = (odd * unit).sum((0, 1)) / unit.square().sum((0, 1))
    if not gap(gain * unit, odd, 1e-3).closed:
        raise UnsupportedModelError("one of its norms is neither LayerNorm nor RMSNorm.")
    bias = torch.zeros_like(bias) if float(bias.abs().max()) < 1e-6 else bias
    return Norm(gain.to(device), bias.to(device), centred, epsilon)


def unhooked_copy(module: Any) -> Any:
    """Copy of a module with the same weights and without hooks."""
    bare = copy.copy(module)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    bare.__dict__.pop("forward", None)  # accelerate's, which would unload it again
    bare.__dict__.pop("_hf_hook", None)
    return bare


def named_epsilon(norm: nn.Module) -> float | None:
    """Epsilon of a norm, by the attribute names that families use; None if it has none."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


@torch.no_grad()
def _measured_epsilon(norm: nn.Module, probe: Tensor, centred: bool) -> float:
    """From how much less than its share a small vector comes out (olmo names no epsilon).

    With ``m`` the mean square of x and ``r`` the size of ``norm(t x)`` over that of ``norm(x)``,
    ``r^2 (t^2 m + epsilon) = t^2 (m + epsilon)``.
    """
    x = probe - probe.mean(-1, keepdim=True) if centred else probe
    square, t = float(x.square().mean()), 1e-3
    x = x * (square / x.square().mean(-1, keepdim=True)).sqrt()  # all rows alike
    small, large = (((norm(s * x) - norm(-s * x)) / 2).cpu().double() for s in (t, 1.0))
    r2 = float((small * large).sum() / large.square().sum()) ** 2
    return max(0.0, t**2 * square * (1 - r2) / max(r2 - t**2, 1e-12))


def logit_scale(config: Any) -> float:
    """Multiplier of the logits: cohere multiplies, granite divides."""
    multiplier = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return float(multiplier or 1.0) / float(divisor or 1.0)


# Share of a write that may be missing where nothing was rounded away. Half precision rounds the
# parts of a sum before they are compared.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2
# Rounding of the residual stream, relative to the write, above which a layer tells nothing.
_BLURRED = 0.05


@dataclass
class Watch:
    """Record of one watched forward pass.

    Attributes:
        calls: attention modules with their calls, in order.
        projections: output projection by attention module; ``writes`` what it returned.
        inputs, outputs: inputs and outputs of each module's last call.
        looked_up: rows of every table that were asked for last.
        uses: how often each module was called.
        single: modules that were given one tensor and nothing else.
        inside: matrices that acted after the attention call and inside its module, in order.
        copies: keep copies of inputs and outputs: some families write over them.
    """

    calls: list[tuple[nn.Module, AttentionCall]] = field(default_factory=list)
    projections: dict[nn.Module, nn.Module] = field(default_factory=dict)
    writes: dict[nn.Module, Tensor] = field(default_factory=dict)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    looked_up: dict[nn.Embedding, Tensor] = field(default_factory=dict)
    uses: dict[nn.Module, int] = field(default_factory=dict)
    single: set[nn.Module] = field(default_factory=set)
    inside: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    copies: bool = False

    def note(self, module: nn.Module, call: Call, output: Any) -> None:
        """Record inputs and outputs of a module."""
        self.uses[module] = self.uses.get(module, 0) + 1
        given, made = call.stream, stream_of(output)
        arguments = (*call.args, *call.kwargs.values())
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if len(tensors) == 1 and tensors[0] is given:
            self.single.add(module)
        if isinstance(given, Tensor) and given.is_floating_point():
            self.inputs[module] = given.detach().clone() if self.copies else given
        elif isinstance(given, Tensor) and isinstance(module, nn.Embedding):
            self.looked_up[module] = given
        if isinstance(made, Tensor):
            self.outputs[module] = made.detach().clone() if self.copies else made

    def detached(self) -> "Watch":
        """The same without gradients: an owner may have asked for those of embeddings."""
        return replace(
            self,
            writes={module: value.detach() for module, value in self.writes.items()},
            inputs={module: value.detach() for module, value in self.inputs.items()},
            outputs={module: value.detach() for module, value in self.outputs.items()},
        )


def write_scales(
    watch: Watch, layers: Mapping[int, tuple[nn.Module, nn.Module]]
) -> dict[int, float | None]:
    """Multipliers m with which blocks add ``m * (z @ W_O)`` to their input; None if they do not.

    Deep residual streams are so much longer than one layer's write that rounding hides it, in
    half precision above all; such layers are taken to do as the clearest layer does.

    Args:
        watch: inputs and outputs of modules, and what every attention module wrote.
        layers: block and attention module of every attention layer.
    """
    watch = watch.detached()
    found = {n: _write_scale(watch, *modules) for n, modules in layers.items()}
    blur = {n: _blur(watch, *modules) for n, modules in layers.items()}
    clearest = min(blur, key=lambda n: blur[n])
    return {n: found[clearest if blur[n] > _BLURRED else n] for n in layers}


def channel_scales(
    watch: Watch, layers: Mapping[int, tuple[nn.Module, nn.Module]]
) -> dict[int, str | None]:
    """Names of vectors v with which blocks add ``v * (z @ W_O)`` to their input (layer scale).

    None for a block that has no such vector among its parameters.

    Args:
        watch: inputs and outputs of modules, and what every attention module wrote.
        layers: block and attention module of every attention layer.
    """
    watch = watch.detached()
    return {number: _channel_scale(watch, *modules) for number, modules in layers.items()}


def _channel_scale(watch: Watch, block: nn.Module, attention: nn.Module) -> str | None:
    write = watch.writes.get(attention)
    for name, vector in block.named_parameters():
        if write is None or vector.ndim != 1 or len(vector) != write.shape[-1]:
            continue
        scaled = replace(watch, writes={attention: write * vector.detach().to(write.device)})
        if _write_scale(scaled, block, attention) == 1.0:
            return name
    return None


def added_scales(
    watch: Watch, layers: Mapping[int, tuple[nn.Module, nn.Module]]
) -> dict[int, float | None]:
    """What :func:`write_scales` gives, of attention that is not the first write of its block.

    Some module is given the stream before the write and some other the stream behind it, and the
    block's output is the latter plus what other modules wrote.

    Args:
        watch: inputs and outputs of modules, and what every attention module wrote.
        layers: block and attention module of every attention layer.
    """
    watch = watch.detached()
    return {number: _added_scale(watch, *modules) for number, modules in layers.items()}


def _added_scale(watch: Watch, block: nn.Module, attention: nn.Module) -> float | None:
    if block not in watch.outputs or attention not in watch.writes:
        return None
    write, out = watch.writes[attention].float(), watch.outputs[block].float()
    dtype = watch.outputs[block].dtype
    tolerance = _TOLERANCE if dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    states = list(_same_size(watch.inputs, block.modules(), out))
    outputs = list(_same_size(watch.outputs, block.modules(), out))
    behind = [state for state in states if _adds_one(out - state, iter(outputs), tolerance)]
    for state in behind:
        for earlier in states:
            scale, error = _multiple(state - earlier, write.reshape(out.shape))
            if scale > 1e-3 and Gap(error, tolerance).closed:
                return 1.0 if Gap(abs(scale - 1), tolerance).closed else scale
    return None


def _blur(watch: Watch, block: nn.Module, attention: nn.Module) -> float:
    """Rounding of the block's input, relative to what attention wrote."""
    if block not in watch.inputs or attention not in watch.writes:
        return math.inf
    x = watch.inputs[block]
    blur = _rounding(x, watch.writes[attention], x.dtype)
    return blur if math.isfinite(blur) else math.inf  # NaN tells nothing


def _write_scale(watch: Watch, block: nn.Module, attention: nn.Module) -> float | None:
    """Multiplier of one block.

    Sequential blocks: the input of some norm inside is ``x + m * write``, and the block's output is
    that plus what another module wrote. Parallel blocks: the block's output minus the write of one
    of its children is ``x + m * write``.
    """
    if not {block} <= watch.inputs.keys() & watch.outputs.keys() or attention not in watch.writes:
        return None
    x, write = watch.inputs[block].float(), watch.writes[attention].float()
    if x.numel() != write.numel() or x.numel() != watch.outputs[block].numel():
        return None  # what was taken for the write goes somewhere else
    write = write.reshape(x.shape)
    out = watch.outputs[block].float().reshape(x.shape)
    dtype = watch.outputs[block].dtype
    least = _TOLERANCE if dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    tolerance = least + _blur(watch, block, attention)
    for state in _same_size(watch.inputs, block.modules(), x):
        scale = _scale(state - x, write, tolerance)
        # The cheap question first: the other one tries all pairs of modules.
        if scale is not None and _adds_one(
            out - state,
            _same_size(watch.outputs, block.modules(), x),
            least + _rounding(out, out - state, dtype),
        ):
            return scale
    for state in (out, *(out - child for child in _same_size(watch.outputs, block.children(), x))):
        scale = _scale(state - x, write, tolerance)
        if scale is not None:
            return scale
    return None


def _scale(added: Tensor, write: Tensor, tolerance: float) -> float | None:
    """Multiplier with which a write was added; None if something else was, or too little."""
    scale, error = _multiple(added, write)
    if abs(scale) <= 1e-3 or not Gap(error, tolerance).closed:
        return None
    return 1.0 if Gap(abs(scale - 1), tolerance).closed else scale


def _same_size(
    seen: Mapping[nn.Module, Tensor], modules: Iterator[nn.Module], like: Tensor
) -> Iterator[Tensor]:
    """What modules saw, where it has as many numbers; some families flatten batch and position."""
    for module in modules:
        value = seen.get(module)
        if value is not None and value.numel() == like.numel():
            yield value.float().reshape(like.shape)


def _adds_one(rest: Tensor, written: Iterator[Tensor], tolerance: float) -> bool:
    """Whether a remainder is what some module wrote, or two together, times a number."""
    if not rest.any():
        return True
    writes = list(written)
    if any(Gap(_multiple(rest, write)[1], tolerance).closed for write in writes):
        return True
    pairs = combinations(writes, 2)  # experts and a shared MLP beside them
    return any(Gap(_multiple(rest, one + other)[1], tolerance).closed for one, other in pairs)


def _rounding(whole: Tensor, part: Tensor, dtype: torch.dtype) -> float:
    """Rounding of a sum, relative to one of its parts."""
    return float(torch.finfo(dtype).eps * whole.float().norm() / part.float().norm())


def _multiple(value: Tensor, of: Tensor) -> tuple[float, float]:
    """Number that makes ``of`` most like ``value``, and the share of ``value`` that it leaves."""
    number = (value * of).sum() / of.square().sum().clamp_min(1e-30)
    left = (value - number * of).norm() / value.norm().clamp_min(1e-30)
    both: list[float] = torch.stack([number, left]).tolist()  # the host waits once
    return both[0], both[1]


# share of a write that may be missing
_LEAST = 1e-3  # a smaller multiplier is none
_GUESSED = 2.0  # added to the error where a part wrote nothing


@dataclass(frozen=True)
class Writers:
    """Modules of one block that write to the stream, by name.

    Attributes:
        attention: module whose output is attention's write; the projection's or that of a norm
            after it.
        mlp: module whose output is the other write.
        attention_scale, mlp_scale: multipliers on the way into the stream.
        normed: whether a norm stands behind the projection.
        error: share of the block's write that this leaves unexplained; above 1 where one of the
            two wrote nothing, so that its place was only guessed.
    """

    attention: str
    mlp: str
    attention_scale: float
    mlp_scale: float
    normed: bool
    error: float


def find_writers(
    seen: Watch, blocks: Mapping[int, tuple[nn.Module, nn.Module]]
) -> dict[int, Writers]:
    """Writers of every block with attention; deep blocks, whose writes rounding hides, as others.

    Args:
        seen: record of one pass.
        blocks: block and output projection by layer.

    Raises:
        UnsupportedModelError: if no block is a sum of two writes.
    """
    found = {layer: _fit(seen, *modules) for layer, modules in blocks.items()}
    known = [one for one in found.values() if one is not None]
    if not known:
        raise UnsupportedModelError(
            "its blocks do more than add attention's write and one other to the residual stream, "
            "so a logit cannot be split exactly."
        )
    best = min(known, key=lambda one: one.error)
    return {
        layer: best if one is None or one.error > 1 > best.error else one
        for layer, one in found.items()
    }


def _fit(seen: Watch, block: nn.Module, projection: nn.Module) -> Writers | None:
    if block not in seen.inputs or block not in seen.outputs:
        return None
    x, out = seen.inputs[block].cpu().double(), seen.outputs[block]
    if out.numel() != x.numel() or seen.outputs[projection].numel() != x.numel():
        return None  # several residual streams
    added = out.cpu().double().reshape(x.shape) - x
    dtype = out.dtype
    least = _TOLERANCE if dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    tolerance = least + float(torch.finfo(dtype).eps * x.norm() / added.norm().clamp_min(1e-30))
    best: Writers | None = None
    names = {module: name for name, module in block.named_modules()}
    others = [
        (name, seen.outputs[module].cpu().double().reshape(x.shape))
        for module, name in names.items()
        if module in seen.outputs
        and seen.outputs[module].numel() == x.numel()
        and not _around(name, names[projection])
    ]
    for attention, normed in _attention_writes(seen, block, projection):
        if seen.outputs[attention].numel() != x.numel():  # several residual streams (gemma3n)
            continue
        write = seen.outputs[attention].cpu().double().reshape(x.shape)
        for name, other in others:
            if name == names[attention]:
                continue
            a, b, error = _two_scales(added, write, other)
            left = Gap(error % _GUESSED, tolerance)
            real = min(abs(a), abs(b)) > _LEAST and left.closed
            if real and (best is None or error < 0.5 * best.error):
                a, b = (1.0 if Gap(abs(one - 1), tolerance).closed else one for one in (a, b))
                best = Writers(names[attention], name, a, b, normed, error)
    return best


def _around(name: str, projection: str) -> bool:
    """Whether a module is attention's own: around the projection, or beside it in its parent."""
    parent = projection.rpartition(".")[0]
    own = bool(parent) and name.startswith(f"{parent}.")
    return own or name in ("", projection) or projection.startswith(f"{name}.")


def _attention_writes(
    seen: Watch, block: nn.Module, projection: nn.Module
) -> Iterator[tuple[nn.Module, bool]]:
    """The projection, and every module that makes something else of its output."""
    yield projection, False
    written = seen.outputs[projection]
    for module in block.modules():
        given, made = seen.inputs.get(module), seen.outputs.get(module)
        if module is projection or given is None or made is None or made.shape != written.shape:
            continue
        if torch.equal(given, written) and not torch.equal(made, written):
            yield module, True


def _two_scales(added: Tensor, a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Numbers with which two writes make up a third, and the share that they leave.

    Where one of them is nothing, its number is taken to be the other's, and the error is marked.
    """
    aa, ab, bb = (a * a).sum(), (a * b).sum(), (b * b).sum()
    if not (aa and bb):
        whole = a + b
        scale = float((added * whole).sum() / (aa + bb)) if aa or bb else 1.0
        error = (added - scale * whole).norm() / added.norm().clamp_min(1e-30)
        return scale, scale, float(error) + _GUESSED
    determinant = aa * bb - ab * ab
    if not float(determinant) > 1e-12 * float(aa * bb):  # NaN too
        return 0.0, 0.0, float("inf")
    ya, yb = (added * a).sum(), (added * b).sum()
    first, second = (bb * ya - ab * yb) / determinant, (aa * yb - ab * ya) / determinant
    rest = added - first * a - second * b
    return float(first), float(second), float(rest.norm() / added.norm().clamp_min(1e-30))


def attention_write(
    block: nn.Module, writers: Writers, bias: Float[Tensor, " d_model"], device: torch.device
) -> AttentionWrite:
    """Bias and norm between one layer's head outputs and the residual stream.

    Raises:
        UnsupportedModelError: if what follows attention is neither LayerNorm nor RMSNorm.
    """
    scale = writers.attention_scale
    if not writers.normed:
        return AttentionWrite(bias.float() * scale, None)
    module = block.get_submodule(writers.attention)
    norm: Norm = measure_norm(getattr(module, "original_component", module), len(bias), device)
    norm = replace(norm, gain=norm.gain * scale, bias=norm.bias * scale)
    return AttentionWrite(bias.float(), norm)


# Rows of the embedding that pass the first block at a time.
_BATCH = 1024
TURNS_BY_LENGTH = (
    "turns its queries and keys by other angles in longer texts (longrope or dynamic scaling), so "
    "that an offset does not give one product: read queries and keys of the text itself, e.g. with "
    "scorers of queries and keys"
)


class MeasuredParts(ABC):
    """Parts that both paths share; see :class:`headscope.models.protocol.ModelParts`."""

    def __init__(self, model: Any) -> None:
        """Measure nothing yet."""
        self.model = model

    @abstractmethod
    def input_norm(self, layer: int) -> Norm:
        """Norm between the residual stream and one layer's attention."""

    @abstractmethod
    def block(self, layer: int) -> nn.Module:
        """Module that is one layer, attention and MLP."""

    @abstractmethod
    def projection(self, layer: int) -> nn.Module:
        """Output projection of one layer's attention."""

    @abstractmethod
    def projection_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Its bias; zeros where it has none."""

    @abstractmethod
    def run(self, batch: Batch) -> None:
        """Run the model's body."""

    @abstractmethod
    def tiny(self) -> Batch:
        """Two small examples of what the model reads."""

    @abstractmethod
    def query_key(self, layer: int) -> QueryKey:
        """What follows a layer's query and key matrices: norms, rotation, multipliers."""

    @abstractmethod
    def need_values(self, layer: int) -> None:
        """Raise if a layer's values are not given by its weights."""

    @abstractmethod
    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured once."""

    @property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding as it enters the first block, the family's multiplier included."""
        if (reason := self.model.limits.get("embedding")) is not None:
            raise UnsupportedModelError(reason)
        module = self.model.module
        weight = parameter(module.get_input_embeddings(), "weight")
        ids = torch.arange(8, device=weight.device) * 7 % len(weight)
        seen = self.layer_inputs(ids[:, None], [0])[0][:, 0].float()
        given = weight[ids].float()
        if seen.shape == given.shape:
            change, source = seen[1:] - seen[:1], given[1:] - given[:1]
            scale = float((change * source).sum() / source.square().sum())
            left = (change - scale * source).norm() / change.norm()
            if Gap(float(left), 1e-2).closed:
                return weight if Gap(abs(scale - 1), 1e-3).closed else weight * scale
        raise UnsupportedModelError(
            f"{self.model.name} applies a norm or a projection to its embedding, so a token does "
            "not enter the first block as a row of it."
        )

    @torch.no_grad()
    def first_mlp(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the first block adds to each row when its attention writes nothing."""
        return torch.cat([self._first_mlp(rows) for rows in residual.split(_BATCH)])

    def _first_mlp(self, rows: Float[Tensor, "row d_model"]) -> Tensor:
        result: list[Tensor] = []
        given = rows[:, None].to(self.model.dtype)
        end = Tap("resid_post", 0)
        self.model.run(
            torch.zeros(len(rows), 1, dtype=torch.long),
            writes={
                Tap("resid_pre", 0): lambda _stream, _span: given,
                Tap("head_sum", 0): lambda write, _span: torch.zeros_like(write),
            },
            reads={end: lambda view: result.append(view.value)},
            until=end,
        )
        added: Tensor = result[0].reshape(rows.shape).float() - rows.float()
        return added

    @torch.no_grad()
    def layer_inputs(
        self, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """Residual stream that enters each of these layers."""
        seen: dict[int, Tensor] = {}
        taps = [Tap("resid_pre", layer) for layer in layers]
        self.model.run(
            tokens,
            reads=dict.fromkeys(taps, lambda view: seen.update({view.layer: view.value.detach()})),
            until=max(taps, key=lambda tap: tap.layer or 0),
        )
        return seen

    def attention_write(self, layer: int) -> AttentionWrite:
        """How head outputs of one layer reach the residual stream, with the weights of now."""
        return attention_write(
            self.block(layer),
            self._writers[layer],
            self.projection_bias(layer),
            self.model.device,
        )

    @cached_property
    @torch.no_grad()
    def _writers(self) -> dict[int, Writers]:
        layers = self.model.shape.attention_layers
        blocks = {layer: (self.block(layer), self.projection(layer)) for layer in layers}
        seen = Watch(copies=True)
        modules = {module for block, _ in blocks.values() for module in block.modules()}
        hooks = [after(module, seen.note) for module in modules]
        self.watch(self.tiny(), hooks)
        try:
            return find_writers(seen, blocks)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.model.name}: {error}") from error

    def writer(self, layer: int, site: Literal["attn_out", "mlp_out"]) -> tuple[nn.Module, float]:
        """Module of a block whose output is attention's or the MLP's write, and its multiplier.

        Raises:
            UnsupportedModelError: if the block adds something else.
        """
        writers = self._writers.get(layer)
        if writers is None:
            raise UnsupportedModelError(
                f"layer {layer} of {self.model.name} has no attention, so what it adds is not "
                "split into attention and MLP: read resid_post."
            )
        block = self.block(layer)
        if site == "attn_out":
            return block.get_submodule(writers.attention), writers.attention_scale
        return block.get_submodule(writers.mlp), writers.mlp_scale

    def watch(self, batch: Batch, hooks: Sequence[Hook]) -> None:
        """Run the model's body with these hooks; edits of open scopes are suspended."""
        with pass_over(self.model.module), hooked(hooks):
            self.run(batch)
