"""Per-head attention weights, read through transformer-lens, which knows every family's layout."""

from typing import Any

import torch
from torch import Tensor

from headscope.errors import UnsupportedModelError
from headscope.outputs import HeadWeights


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
