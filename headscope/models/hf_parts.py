"""Parts of a transformers model that weight-level readings need, measured on tiny passes."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.inputs import InputNorm, Rotation
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf_interface import routed
from headscope.models.hf_readout import measure_norm
from headscope.models.rotary import POSITIONS, find_rotation
from headscope.outputs import HeadWeights

if TYPE_CHECKING:
    from headscope.models.hf import HFModel

# Rows of the embedding that pass the first block at a time.
_BATCH = 1024


class _Finished(Exception):
    """Raised inside a pass that has shown all it had to."""


class HFParts:
    """Parts of one model; see :class:`headscope.models.protocol.ModelParts`."""

    def __init__(self, model: "HFModel") -> None:
        """Measure nothing yet."""
        self.model = model
        self._rotations: dict[int, Rotation] = {}

    def input_norm(self, layer: int) -> InputNorm:
        """Norm between the residual stream and one layer's attention."""
        model, width = self.model, self.model.shape.d_model
        parts = model.layout.layers[layer]
        if parts.reads_residual:
            ones = torch.ones(width, device=model.device)
            return InputNorm(ones, torch.zeros_like(ones), False, 0.0, divides=False)
        if parts.input_norm is None:
            raise UnsupportedModelError(
                f"{model.name}: what attention of layer {layer} reads is no plain norm of the "
                "residual stream."
            )
        return measure_norm(parts.input_norm, width, model.device)

    @cached_property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding as it enters the first block, the family's multiplier included."""
        module = self.model.module
        weight: Tensor = module.get_input_embeddings().weight.detach()
        ids = torch.arange(8, device=weight.device) * 7 % len(weight)
        seen = self.layer_inputs(ids[:, None], [0])[0][:, 0].float()
        given = weight[ids].float()
        if seen.shape == given.shape:
            change, source = seen[1:] - seen[:1], given[1:] - given[:1]
            scale = float((change * source).sum() / source.square().sum())
            if (change - scale * source).norm() < 1e-2 * change.norm():
                return weight if abs(scale - 1) < 1e-3 else weight * scale
        raise UnsupportedModelError(
            f"{self.model.name} ({module.config.model_type}) applies a norm or a projection to "
            "its embedding, so a token does not enter the first block as a row of it."
        )

    def first_mlp(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the first block adds to each row when its attention writes nothing."""
        return torch.cat([_first_mlp(self.model, part) for part in residual.split(_BATCH)])

    @torch.no_grad()
    def layer_inputs(
        self, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """Residual stream that enters each of these layers."""
        seen: dict[int, Tensor] = {}
        last = max(layers)

        def hook(layer: int) -> Any:
            def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                seen[layer] = (args[0] if args else kwargs["hidden_states"]).detach()
                if layer == last:
                    raise _Finished

            return enter

        blocks = self.model.layout.blocks
        hooks = [
            partial(blocks[n].register_forward_pre_hook, hook(n), with_kwargs=True) for n in layers
        ]
        _run(self.model, tokens.to(self.model.device), hooks)
        return seen

    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured once."""
        if layer not in self._rotations:
            weights = self.model.weights(layer)
            self._rotations[layer] = _rotation(self.model, *self._short_pass[layer], weights)
        return self._rotations[layer]

    @cached_property
    def _short_pass(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        return _short_pass(self.model)


@torch.no_grad()
def _first_mlp(model: "HFModel", rows: Float[Tensor, "row d_model"]) -> Tensor:
    block, projection = model.layout.blocks[0], model.layout.layers[0].projection
    dtype, result = model.dtype, []

    def enter(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = rows[:, None].to(dtype)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    def silence(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        result.append(output[0] if isinstance(output, tuple) else output)
        raise _Finished

    hooks = [
        partial(block.register_forward_pre_hook, enter, with_kwargs=True),
        partial(projection.register_forward_hook, silence),
        partial(block.register_forward_hook, leave),
    ]
    _run(model, torch.zeros(len(rows), 1, dtype=torch.long, device=model.device), hooks)
    added: Tensor = result[0].reshape(rows.shape).float() - rows.float()
    return added


@torch.no_grad()
def _short_pass(model: "HFModel") -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """What attention read, its queries and its keys per layer, at the measured positions."""
    limit = model.shape.n_ctx or POSITIONS[-1] + 1
    at = [position for position in POSITIONS if position < limit]
    ids = torch.arange(2 * (at[-1] + 1), device=model.device) * 7 % max(model.shape.d_vocab - 1, 1)
    parts = model.layout.by_attention()
    read: dict[int, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        read[parts[module].layer] = (args[0] if args else kwargs["hidden_states"])[:, at]

    def attend(module: nn.Module, call: AttentionCall) -> Tensor:
        layer = parts[module].layer
        seen[layer] = (read[layer], call.query[:, :, at], call.key[:, :, at])
        return fused(call)

    hooks = [partial(module.register_forward_pre_hook, enter, with_kwargs=True) for module in parts]
    with routed(model.layout.configs, attend):
        _run(model, ids.view(2, -1), hooks)
    return seen


def _rotation(
    model: "HFModel", read: Tensor, query: Tensor, key: Tensor, weights: HeadWeights
) -> Rotation:
    vectors = []
    for used, weight, bias in (
        (query, weights.W_Q, weights.b_Q),
        (key, weights.W_K, weights.b_K),
    ):
        content = torch.einsum("bpd,hde->bhpe", read.float(), weight.float())
        content = content + bias.float()[:, None]
        vectors.append((content.flatten(0, 1), used.float().flatten(0, 1)))
    content, actual = (torch.cat(pair) for pair in zip(*vectors, strict=True))
    tolerance = 1e-6 if model.dtype in (torch.float32, torch.float64) else 1e-3
    found = find_rotation(content.cpu(), actual.cpu(), tolerance)
    if found is None:
        raise UnsupportedModelError(
            f"{model.name} ({model.module.config.model_type}) changes its queries and keys by more "
            "than a rotation (a norm on them, as in qwen3 or gemma3), so its attention scores are "
            "not bilinear and no matrix gives them; fold_norm=False shows the bare weights."
        )
    return found


def _run(model: "HFModel", tokens: Tensor, hooks: Sequence[Callable[[], Any]]) -> None:
    """Run the model's body with these hooks in place, up to the one that ends it."""
    with ExitStack() as stack:
        for register in hooks:
            stack.callback(register().remove)
        with suppress(_Finished):
            model.module.base_model(input_ids=tokens, use_cache=False)
