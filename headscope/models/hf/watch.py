"""What one watched pass left behind, and how attention reaches the residual stream in it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from headscope.models.attention import AttentionCall
from headscope.models.hf.hooks import Call, stream_of
from headscope.models.loading.agreement import Gap

# Share of a write that may be missing where nothing was rounded away. Half precision rounds the
# parts of a sum before they are compared.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2
# Rounding of the residual stream, relative to the write, above which a layer tells nothing.
_BLURRED = 0.05


@dataclass
class Watch:
    """What one watched forward pass left behind.

    Attributes:
        calls: attention modules with their calls, in order.
        projections: output projection by attention module; ``writes`` what it returned.
        inputs, outputs: of the last call of each module.
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
        """Keep what a module was given and what it made."""
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
    """Multipliers m with which blocks add ``m * (z @ W_O)`` to their input; None where they do not.

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


def _blur(watch: Watch, block: nn.Module, attention: nn.Module) -> float:
    """Rounding of the block's input, relative to what attention wrote."""
    if block not in watch.inputs or attention not in watch.writes:
        return math.inf
    x = watch.inputs[block]
    blur = _rounding(x, watch.writes[attention], x.dtype)
    return blur if math.isfinite(blur) else math.inf  # NaN tells nothing


def _write_scale(watch: Watch, block: nn.Module, attention: nn.Module) -> float | None:
    """Multiplier of one block.

    Sequential blocks: the input of some norm inside is ``x + m * write``, and the block's output
    is that plus what another module wrote. Parallel blocks: the block's output less what a child
    of the block wrote is ``x + m * write``.
    """
    if not {block} <= watch.inputs.keys() & watch.outputs.keys() or attention not in watch.writes:
        return None
    x, write = watch.inputs[block].float(), watch.writes[attention].float()
    if x.numel() != write.numel() or x.numel() != watch.outputs[block].numel():
        return None  # what was taken for the write goes somewhere else
    out = watch.outputs[block].float().reshape(x.shape)
    dtype = watch.outputs[block].dtype
    least = _TOLERANCE if dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    tolerance = least + _blur(watch, block, attention)
    parallel = [out, *(out - child for child in _same_size(watch.outputs, block.children(), x))]
    sequential = [
        state
        for state in _same_size(watch.inputs, block.modules(), x)
        if _adds_one(
            out - state,
            _same_size(watch.outputs, block.modules(), x),
            least + _rounding(out, out - state, dtype),
        )
    ]
    for state in (*sequential, *parallel):
        scale, error = _multiple(state - x, write.reshape(x.shape))
        if abs(scale) > 1e-3 and Gap(error, tolerance).closed:
            return 1.0 if Gap(abs(scale - 1), tolerance).closed else scale
    return None


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
    number = float((value * of).sum() / of.square().sum().clamp_min(1e-30))
    return number, float((value - number * of).norm() / value.norm().clamp_min(1e-30))
