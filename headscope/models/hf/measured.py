"""Parts of a model that readings of weights and streams need, measured on tiny passes.

Also which modules of a block add to the residual stream, and with which multipliers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.blocks import AttentionWrite
from headscope.models.hf.hooks import Hook, after, hooked
from headscope.models.hf.readout import measure_norm
from headscope.models.hf.watch import Watch
from headscope.models.loading.agreement import Gap
from headscope.models.offload import parameter
from headscope.models.running import pass_over
from headscope.models.taps import Tap
from headscope.views.qk import InputNorm, QueryKey, Rotation

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


# Rows of the embedding that pass the first block at a time.
_BATCH = 1024
TURNS_BY_LENGTH = (
    "turns its queries and keys by other angles in longer texts (longrope or dynamic scaling), so "
    "that an offset does not give one product: read queries and keys of the text itself, e.g. with "
    "scorers of matches"
)


class MeasuredParts(ABC):
    """What the two paths have in common; see :class:`headscope.models.protocol.ModelParts`."""

    def __init__(self, model: Any) -> None:
        """Measure nothing yet."""
        self.model = model

    @abstractmethod
    def input_norm(self, layer: int) -> InputNorm:
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
    def run(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Run the model's body."""

    @abstractmethod
    def query_key(self, layer: int) -> QueryKey:
        """What follows a layer's query and key matrices: norms, rotation, multipliers."""

    @abstractmethod
    def need_values(self, layer: int) -> None:
        """Refuse where the values of a layer are not what its weights give."""

    @abstractmethod
    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured once."""

    @property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding as it enters the first block, the family's multiplier included."""
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
        ids = torch.arange(10) * 7 % max(self.model.shape.d_vocab - 1, 1)
        self.watch(ids.view(2, 5), hooks)
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

    def watch(self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook]) -> None:
        """Run the model's body with these hooks in place; scopes of edits leave it alone."""
        with pass_over(self.model.module), hooked(hooks):
            self.run(tokens.to(self.model.device))
