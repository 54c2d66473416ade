"""Norms, positions and embedding of a transformers model, see :mod:`.hf_measured`."""

from contextlib import AbstractContextManager
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.inputs import InputNorm
from headscope.models.attention import AttentionCall, fused
from headscope.models.blocks import BlockObserver
from headscope.models.hf.hooks import Call, before
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import tiny_tokens
from headscope.models.hf.measured import MeasuredParts
from headscope.models.hf.projection import bias
from headscope.models.hf.readout import measure_norm
from headscope.models.loading.agreement import gap, rounding
from headscope.models.loading.calls import accepted

# Tokens of the pass that is run at two lengths, and a length beyond any where none is said.
_FEW, _FAR = 8, 1 << 20


class HFParts(MeasuredParts):
    """Parts of an :class:`headscope.models.hf.model.HFModel`."""

    def blocks_shown(self, observer: BlockObserver) -> AbstractContextManager[None]:
        """Scope in which an observer sees every block of every pass as it completes."""
        self.model.learn_all_padding()
        return super().blocks_shown(observer)

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

        def enter(module: nn.Module, call: Call) -> None:
            read[parts[module].layer] = call.stream[:, at]

        def attend(module: nn.Module, call: AttentionCall) -> Tensor:
            layer = parts[module].layer
            seen[layer] = (read[layer], call.query[:, :, at], call.key[:, :, at])
            return fused(call)

        with routed(self.model.layout.configs, attend, parts):
            self.watch(tokens, [before(module, enter) for module in parts])
        return seen

    @cached_property
    @torch.no_grad()
    def turns_by_length(self) -> bool:
        """Whether the length of a text changes how positions turn queries and keys, measured.

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
