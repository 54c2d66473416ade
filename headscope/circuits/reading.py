"""What circuits ask of a model before they compute: layers that exist, methods that apply."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import InputError, UnsupportedModelError
from headscope.models.protocol import HeadModel


def chosen_layers(model: HeadModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Layer numbers asked for, or all that have attention.

    Raises:
        InputError: if one of them has none.
    """
    known = model.shape.attention_layers
    if layers is None:
        return known
    for layer in layers:
        if layer not in known:
            raise InputError(f"layer {layer} of {model.name} has no attention; {known} have.")
    return tuple(layers)


def need_write(model: HeadModel, what: str) -> None:
    """Refuse where values times ``W_O`` and a norm that can be folded are not what a head adds.

    Raises:
        UnsupportedModelError: with the model's own reason.
    """
    reason = model.limits.get("attention_write", model.limits.get("ov"))
    if reason is not None:
        raise UnsupportedModelError(f"{reason} The weights alone do not give {what}.")


def over_all_layers(
    model: HeadModel, values: Float[Tensor, "layer head"], layers: Sequence[int]
) -> Float[np.ndarray, "layer head"]:
    """Values of some layers, in an array over the model's own layer numbers; NaN elsewhere."""
    result = np.full((model.shape.n_layers, model.shape.n_heads), np.nan)
    result[list(layers)] = values.detach().cpu().double().numpy()
    return result


def over_all_pairs(
    model: HeadModel, values: Float[Tensor, "layer head layer head"], layers: Sequence[int]
) -> Float[np.ndarray, "layer head layer head"]:
    """Values of pairs in some layers, over the model's own layer numbers; NaN elsewhere."""
    n_layers, n_heads = model.shape.n_layers, model.shape.n_heads
    result = np.full((n_layers, n_heads, n_layers, n_heads), np.nan)
    numbers = np.array(layers)
    place = np.ix_(numbers, np.arange(n_heads), numbers, np.arange(n_heads))
    result[place] = values.detach().cpu().double().numpy()
    return result


def upward(layers: Sequence[int]) -> Bool[Tensor, "layer 1 layer 1"]:
    """Pairs whose first layer lies below the second."""
    number = torch.tensor(layers)
    return (number[:, None] < number)[:, None, :, None]
