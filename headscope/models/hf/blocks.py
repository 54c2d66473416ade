"""Which modules of a block add to the residual stream, and with which multipliers: measured.

No family is known by name. On one tiny pass, what a block adds to its input is written as a
number times what attention wrote (after the norm that follows it, if there is one) plus a number
times what some other module wrote. Parallel and sequential blocks, multipliers and norms after
sublayers are all of this form.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.inputs import InputNorm
from headscope.models.blocks import AttentionWrite
from headscope.models.hf.readout import measure_norm
from headscope.models.hf.watch import Watch
from headscope.models.loading.agreement import Gap

_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2  # share of a write that may be missing
_LEAST = 1e-3  # a smaller multiplier is none
_GUESSED = 2.0  # added to the error where a part wrote nothing


@dataclass(frozen=True)
class Writers:
    """Modules of one block that write, by their names inside it.

    Attributes:
        attention: whose output is attention's write; the projection's or that of a norm after it.
        mlp: whose output is the other write.
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
        seen: of one pass.
        blocks: block and output projection by layer.

    Raises:
        UnsupportedModelError: if no block is a sum of two writes.
    """
    found = {layer: _fit(seen, *modules) for layer, modules in blocks.items()}
    known = [one for one in found.values() if one is not None]
    if not known:
        raise UnsupportedModelError(
            "what its blocks add is not attention's write and one other, so a logit cannot be "
            "split exactly."
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
    norm: InputNorm = measure_norm(getattr(module, "original_component", module), len(bias), device)
    norm = replace(norm, gain=norm.gain * scale, bias=norm.bias * scale)
    return AttentionWrite(bias.float(), norm)
