"""Norms, positions and embedding of a transformers model, see :mod:`.hf_measured`."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.inputs import InputNorm
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.interface import routed
from headscope.models.hf.measured import MeasuredParts
from headscope.models.hf.projection import bias
from headscope.models.hf.readout import measure_norm


class HFParts(MeasuredParts):
    """Parts of an :class:`headscope.models.hf.model.HFModel`."""

    def input_norm(self, layer: int) -> InputNorm:
        """Norm between the residual stream and one layer's attention."""
        width, device = self.model.shape.d_model, self.model.device
        parts = self.model.layout.layers[layer]
        if parts.reads_residual:
            ones = torch.ones(width, dtype=torch.float32, device=device)
            return InputNorm(ones, torch.zeros_like(ones), False, 0.0, divides=False)
        if parts.input_norm is None:
            raise UnsupportedModelError(
                f"{self.model.name}: what attention of layer {layer} reads is no plain norm of "
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

    def projection_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Bias of that projection; zeros where it has none."""
        shape = self.model.shape
        found = bias(self.projection(layer), shape.n_heads * shape.d_head)
        return torch.zeros(shape.d_model, device=self.model.device) if found is None else found

    def run(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Run the model's body."""
        mask = torch.ones_like(tokens)  # or some families warn of padding
        self.model.module.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)

    def short_pass(
        self, tokens: Int[Tensor, "batch pos"], at: list[int]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Attention's input, queries and keys per layer at some positions of one pass."""
        parts = self.model.layout.by_attention()
        read: dict[int, Tensor] = {}
        seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            read[parts[module].layer] = (args[0] if args else kwargs["hidden_states"])[:, at]

        def attend(module: nn.Module, call: AttentionCall) -> Tensor:
            layer = parts[module].layer
            seen[layer] = (read[layer], call.query[:, :, at], call.key[:, :, at])
            return fused(call)

        hooks = [
            partial(module.register_forward_pre_hook, enter, with_kwargs=True) for module in parts
        ]
        with routed(self.model.layout.configs, attend, parts):
            self.watch(tokens, hooks)
        return seen
