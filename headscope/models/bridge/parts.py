"""Weights, norms, positions and embedding of a bridge, see :mod:`headscope.models.hf.measured`.

Per-head weights are read through transformer-lens, which knows every family's layout.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.base.batches import TOKENS, Batch
from headscope.errors import UnsupportedModelError
from headscope.models.hf.hooks import Hook, entering, leaving
from headscope.models.hf.measured import MeasuredParts, measure_norm
from headscope.models.rotary import POSITIONS, find_rotation
from headscope.views import HeadWeights, Norm, QueryKey, Rotation

_ROTARY = ("rotary", "rope")


class BridgeParts(MeasuredParts):
    """Parts of a :class:`headscope.models.bridge.model.BridgeModel`."""

    def __init__(self, model: Any) -> None:
        """Measure nothing yet."""
        super().__init__(model)
        self._rotations: dict[int, Rotation] = {}

    def input_norm(self, layer: int) -> Norm:
        """Norm between the residual stream and one layer's attention, checked on a tiny pass."""
        model = self.model
        norm = getattr(getattr(self.block(layer), "ln1", None), "original_component", None)
        if norm is not None:
            found = measure_norm(norm, model.shape.d_model, model.device)
            tokens = torch.arange(4)[None] % model.shape.d_vocab
            residual = self.layer_inputs(tokens, [layer])[layer].float()
            read = self._reads(tokens, [layer])[layer].float()
            if (found(residual) - read).norm() < 1e-2 * read.norm():
                return found
        raise UnsupportedModelError(
            f"{model.name}: what attention of layer {layer} reads is not a plain norm of the "
            "residual stream that transformer-lens shows."
        )

    def block(self, layer: int) -> nn.Module:
        """Module that is one layer, attention and MLP."""
        block: nn.Module = self.model.bridge.blocks[layer]
        return block

    def projection(self, layer: int) -> nn.Module:
        """Output projection of one layer's attention."""
        projection = getattr(getattr(self.block(layer), "attn", None), "o", None)
        if not isinstance(projection, nn.Module):
            raise UnsupportedModelError(
                f"transformer-lens does not show the output projection of layer {layer} of "
                f"{self.model.name}."
            )
        return projection

    def projection_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Bias of that projection; zeros where it has none."""
        bias: Tensor = self.model.weights(layer).b_O
        return bias

    def tiny(self) -> Batch:
        """Two small texts."""
        ids = torch.arange(10) * 7 % max(self.model.shape.d_vocab - 1, 1)
        return Batch({TOKENS: ids.view(2, 5)}, {})

    def run(self, batch: Batch) -> None:
        """Run the model."""
        self.model.bridge(batch.tokens.to(self.model.device), return_type="logits")

    def query_key(self, layer: int) -> QueryKey:
        """Rotation of one layer; families with norms in between are refused."""
        return QueryKey(self.rotation(layer))

    def need_values(self, layer: int) -> None:
        """Refuse nothing: limits say where values are not what weights give."""

    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured once."""
        if layer not in self._rotations:
            weights = self.model.weights(layer)
            self._rotations[layer] = self._rotation(*self._short_pass[layer], weights)
        return self._rotations[layer]

    @cached_property
    @torch.no_grad()
    def _short_pass(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        limit = self.model.shape.n_ctx or POSITIONS[-1] + 1
        at = [position for position in POSITIONS if position < limit]
        ids = torch.arange(2 * (at[-1] + 1)) * 7 % max(self.model.shape.d_vocab - 1, 1)
        return self.short_pass(ids.view(2, -1), at)

    def _rotation(self, read: Tensor, query: Tensor, key: Tensor, weights: HeadWeights) -> Rotation:
        vectors = []
        for used, weight, bias in (
            (query, weights.W_Q, weights.b_Q),
            (key, weights.W_K, weights.b_K),
        ):
            content = torch.einsum("bpd,hde->bhpe", read.float(), weight.float())
            content = content + bias.float()[:, None]
            vectors.append((content.flatten(0, 1), used.float().flatten(0, 1)))
        content, actual = (torch.cat(pair) for pair in zip(*vectors, strict=True))
        tolerance = 1e-6 if self.model.dtype in (torch.float32, torch.float64) else 1e-3
        found = find_rotation(content.cpu(), actual.cpu(), tolerance)
        if found is None:
            raise UnsupportedModelError(
                f"{self.model.name} changes its queries and keys by more than a rotation (a norm "
                "on them, as in qwen3 or gemma3), so how positions turn them cannot be measured, "
                "and no one matrix gives its attention scores: a qk_scorer reads the scores of "
                "a run, with their norms."
            )
        return found

    def short_pass(
        self, tokens: Int[Tensor, "batch pos"], at: list[int]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Attention's input, queries and keys per layer at some positions of one pass."""
        shape, rotary = self.model.shape, self._is_rotary()
        names = ("hook_rot_q", "hook_rot_k") if rotary else ("hook_q", "hook_k")
        heads = (shape.n_heads, shape.n_kv_heads)
        kept: dict[tuple[int, str], Tensor] = {}

        def keep(layer: int, name: str, count: int) -> Callable[[Tensor], None]:
            def kept_now(value: Tensor) -> None:
                whole = value if value.ndim == 4 else value.unflatten(-1, (count, -1))
                by_head = whole if whole.shape[1] == count and rotary else whole.transpose(1, 2)
                kept[layer, name] = by_head[:, :, at]

            return kept_now

        hooks = []
        for layer in shape.attention_layers:
            for name, count in zip(names, heads, strict=True):
                point = getattr(self.block(layer).attn, name, None)
                if isinstance(point, nn.Module):
                    hooks.append(leaving(point, keep(layer, name, count)))
        read = self._reads(tokens, shape.attention_layers, hooks)
        if any((layer, name) not in kept for layer in read for name in names):
            raise UnsupportedModelError(
                f"transformer-lens does not show the queries and keys of {self.model.name} as "
                "attention uses them."
            )
        return {
            layer: (x[:, at], kept[layer, names[0]], kept[layer, names[1]])
            for layer, x in read.items()
        }

    def _is_rotary(self) -> bool:
        kind = str(getattr(self.model.bridge.cfg, "positional_embedding_type", ""))
        return any(word in kind for word in _ROTARY)

    def _reads(self, tokens: Tensor, layers: Any, hooks: Sequence[Hook] = ()) -> dict[int, Tensor]:
        """What attention of these layers reads."""
        seen: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[Tensor], None]:
            def entered(stream: Tensor) -> None:
                seen[layer] = stream.detach()

            return entered

        own = [entering(self.block(n).get_submodule("attn"), keep(n)) for n in layers]
        with torch.no_grad():
            self.watch(Batch({TOKENS: tokens}, {}), [*own, *hooks])
        return seen


def bridge_weights(bridge: Any, layer: int) -> HeadWeights:
    """Attention weights of one layer.

    ``q = x W_Q + b_Q`` with ``x`` the block's normalised input: before rotation, and before the
    query and key norms of families that have them (qwen3, gemma3, olmo2). ``z W_O + b_O`` is the
    output projection as it stands: before a norm after attention (gemma2, gemma3, olmo2) and
    before a residual multiplier (granite).

    Args:
        bridge: a ``TransformerBridge``.
        layer: the model's layer number.

    Raises:
        UnsupportedModelError: if the layer's weights cannot be split by heads.
    """
    try:
        attention = bridge.blocks[layer].attn
        matrices = {name: getattr(attention, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        biases = {name: getattr(attention, name) for name in ("b_Q", "b_K", "b_V", "b_O")}
    except (AttributeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the attention weights of layer {layer} cannot be split by heads: {error}"
        ) from error
    if any(not isinstance(weight, Tensor) or weight.ndim != 3 for weight in matrices.values()):
        raise UnsupportedModelError(f"layer {layer} has no separate W_Q, W_K, W_V and W_O.")
    shapes = {
        "b_Q": matrices["W_Q"].shape[::2],
        "b_K": matrices["W_K"].shape[::2],
        "b_V": matrices["W_V"].shape[::2],
        "b_O": matrices["W_O"].shape[2:],
    }
    return HeadWeights(
        **{name: weight.detach() for name, weight in matrices.items()},
        **{name: _bias(biases[name], shape, matrices["W_O"]) for name, shape in shapes.items()},
    )


def _bias(bias: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return the bias, zeros where the family has none."""
    return like.new_zeros(shape) if bias is None else bias.detach().reshape(shape)
