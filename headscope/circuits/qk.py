"""Where heads look, given what is there: ``W_QK = W_Q W_K^T``, with rotary positions."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.circuits.factors import HeadFactors
from headscope.circuits.reading import chosen_layers
from headscope.errors import UnsupportedModelError
from headscope.inputs import Rotation
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types


@own_types()
def qk(
    model: HeadModel,
    fold_norm: bool = True,
    offset: int | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> HeadFactors:
    """QK circuit of every head: the score of query x on key y is ``x @ W_Q @ W_K.T @ y``.

    The score is the one before scaling (``1 / sqrt(d_head)``), soft cap and mask. With
    ``fold_norm`` the norm before attention is folded into both sides, as in
    :func:`~headscope.circuits.ov`, and the product acts on ``x / scale(x)``; biases are apart.

    What is exact under rotary positions: at distance ``offset = i - j`` between query i and key
    j the score is ``x @ W_Q @ R(offset) @ W_K.T @ y``, for that distance and no other. Without
    an offset this is the circuit at distance 0, which no head uses for anything but its own
    token; it says what a head looks for only as far as its planes turn slowly. For an average
    over distances, see :func:`qk_content`; for single planes, :func:`qk_bands`. Positions that
    are added to the embedding (GPT-2) are part of x, and scores are exact at any offset.

    Args:
        model: any model.
        fold_norm: False gives the bare product, also where the model norms its queries.
        offset: how far the key lies before the query; None: no rotation.
        layers: layer numbers; None means all that have attention.

    Raises:
        UnsupportedModelError: where queries and keys are normalised, so that scores are not
            bilinear, unless ``fold_norm=False`` and no offset ask for the bare weights.

    Source: Elhage et al. 2021; Su et al. 2021, "RoFormer", equation 16.

    Example:
        >>> hs.circuits.qk(hs.load("tiny-llama"), offset=1).svd().S.shape[2]
        32
    """
    bare = not fold_norm and offset is None
    factors, rotations = _unrotated(model, fold_norm, layers, bare=bare)
    return factors if offset is None else _turned(factors, rotations, offset)


@own_types()
def qk_content(
    model: HeadModel,
    distances: range,
    fold_norm: bool = True,
    *,
    layers: Sequence[int] | None = None,
) -> HeadFactors:
    """QK circuit averaged over distances: what a head looks for wherever it is.

    An average, exact at no single distance: planes that turn much within ``distances`` cancel,
    slow ones and those that do not turn stay. Equal to :func:`qk` without rotary positions.

    Args:
        model: any model with bilinear scores.
        distances: the distances that count alike, e.g. ``range(1, 512)``.
        fold_norm: fold the norm before attention.
        layers: layer numbers; None means all that have attention.

    Example:
        >>> hs.circuits.qk_content(hs.load("tiny-llama"), range(1, 9)).svd().S.ndim
        3
    """
    factors, rotations = _unrotated(model, fold_norm, layers, bare=False)
    return _turned(factors, rotations, torch.tensor(list(distances), dtype=torch.float64))


@own_types()
def qk_bands(
    model: HeadModel,
    offset: int = 0,
    fold_norm: bool = True,
    *,
    layers: Sequence[int] | None = None,
) -> list[HeadFactors]:
    """QK circuit at one distance, as a sum over rotary planes, fastest first.

    Each plane is a product of rank 2; the coordinates that do not turn come last, together.
    The parts sum to ``qk(model, offset=offset)`` exactly, biases included.

    Raises:
        UnsupportedModelError: where scores are not bilinear.

    Example:
        >>> bands = hs.circuits.qk_bands(hs.load("tiny-llama"))
        >>> len(bands)  # rotary planes of a head of 32
        16
    """
    factors, rotations = _unrotated(model, fold_norm, layers, bare=False)
    whole, rotation = _turned(factors, rotations, offset), rotations[0]
    planes = list(zip(rotation.first, rotation.second, strict=True))
    order = torch.argsort(rotation.frequency.abs(), descending=True).tolist()
    chosen = [list(planes[place]) for place in order]
    turning = {coordinate for plane in planes for coordinate in plane}
    still = [place for place in range(whole.left.shape[-1]) if place not in turning]
    return [_coordinates(whole, places) for places in (*chosen, still) if places]


def _coordinates(factors: HeadFactors, places: list[int]) -> HeadFactors:
    return replace(
        factors,
        left=factors.left[..., places],
        right=factors.right[..., places, :],
        left_bias=factors.left_bias[..., places],
        right_bias=factors.right_bias[..., places],
    )


def _turned(
    factors: HeadFactors, rotations: list[Rotation], distance: int | Float[Tensor, " distance"]
) -> HeadFactors:
    turned = [
        (rotation.turned(left, distance), rotation.turned(bias, distance))
        for rotation, left, bias in zip(rotations, factors.left, factors.left_bias, strict=True)
    ]
    left, bias = (torch.stack(parts) for parts in zip(*turned, strict=True))
    return replace(factors, left=left, left_bias=bias)


def _unrotated(
    model: HeadModel, fold_norm: bool, layers: Sequence[int] | None, *, bare: bool
) -> tuple[HeadFactors, list[Rotation]]:
    """Factors without rotation, and each layer's rotation (none asked for where bare)."""
    numbers = chosen_layers(model, layers)
    rotations = [] if bare else _rotations(model, numbers)
    sides: dict[str, list[Tensor]] = {name: [] for name in ("Q", "K", "b_Q", "b_K")}
    for layer in numbers:
        weights = model.weights(layer)
        norm = model.parts.input_norm(layer) if fold_norm else None
        for side in ("Q", "K"):
            weight = getattr(weights, f"W_{side}").float()
            bias = getattr(weights, f"b_{side}").float()
            if norm is not None:
                bias = bias + torch.einsum("d,hde->he", norm.bias.float(), weight)
                weight = norm.folded(weight)
            sides[side].append(weight)
            sides[f"b_{side}"].append(bias)
    stacked = {name: torch.stack(parts) for name, parts in sides.items()}
    factors = HeadFactors(
        left=stacked["Q"],
        right=stacked["K"].mT,
        left_bias=stacked["b_Q"],
        right_bias=stacked["b_K"],
        layers=numbers,
        n_heads=model.shape.n_heads,
        name="QK",
    )
    return factors, rotations


def _rotations(model: HeadModel, layers: Sequence[int]) -> list[Rotation]:
    """Rotations of some layers; where there are none to measure, say what still works."""
    try:
        return [model.parts.rotation(layer) for layer in layers]
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error} fold_norm=False without an offset shows the bare weights."
        ) from error
