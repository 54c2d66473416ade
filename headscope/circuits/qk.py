"""Where heads look, given what is there: ``W_QK = W_Q W_K^T``, with rotary positions."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.circuits.factors import HeadFactors
from headscope.circuits.reading import chosen_layers
from headscope.errors import UnsupportedModelError
from headscope.inputs import QueryKey
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

    Where a norm stands on queries and keys (qwen3, gemma3, olmo2), its gain and centring are in
    the product, and its scale is not: that is another positive number of each position and head
    (of each position in olmo2), which weights do not know and
    :func:`~headscope.circuits.score_parts` takes from a run. So the sign of a score, which key a
    query prefers but for the keys' scales, ranks, ratios and composition are those of the
    product; its size says nothing.

    Args:
        model: any model.
        fold_norm: False leaves out the norm before attention; without an offset the product is
            then bare, without the norms on queries and keys either.
        offset: how far the key lies before the query; None: no rotation.
        layers: layer numbers; None means all that have attention.

    Raises:
        UnsupportedModelError: where queries and keys are changed by more than a rotation and a
            norm without biases, unless ``fold_norm=False`` and no offset ask for the bare weights.

    Source: Elhage et al. 2021; Su et al. 2021, "RoFormer", equation 16.

    Example:
        >>> hs.circuits.qk(hs.load("tiny-llama"), offset=1).svd().S.shape[2]
        32
    """
    bare = not fold_norm and offset is None
    factors, between = _unrotated(model, fold_norm, layers, bare=bare)
    return factors if offset is None else _turned(factors, between, offset)


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
        model: any model whose scores a product gives; see :func:`qk`.
        distances: the distances that count alike, e.g. ``range(1, 512)``.
        fold_norm: fold the norm before attention.
        layers: layer numbers; None means all that have attention.

    Example:
        >>> hs.circuits.qk_content(hs.load("tiny-llama"), range(1, 9)).svd().S.ndim
        3
    """
    factors, between = _unrotated(model, fold_norm, layers, bare=False)
    return _turned(factors, between, torch.tensor(list(distances), dtype=torch.float64))


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
        UnsupportedModelError: where no product gives the scores; see :func:`qk`.

    Example:
        >>> bands = hs.circuits.qk_bands(hs.load("tiny-llama"))
        >>> len(bands)  # rotary planes of a head of 32
        16
    """
    factors, between = _unrotated(model, fold_norm, layers, bare=False)
    whole, rotation = _turned(factors, between, offset), between[0].rotation
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
    factors: HeadFactors, between: list[QueryKey], distance: int | Float[Tensor, " distance"]
) -> HeadFactors:
    turned = [
        (one.rotation.turned(left, distance), one.rotation.turned(bias, distance))
        for one, left, bias in zip(between, factors.left, factors.left_bias, strict=True)
    ]
    left, bias = (torch.stack(parts) for parts in zip(*turned, strict=True))
    return replace(factors, left=left, left_bias=bias)


@own_types()
def qk_of_run(
    model: HeadModel,
    layer: int,
    query: Float[Tensor, " d_model"],
    key: Float[Tensor, " d_model"],
    offset: int,
) -> HeadFactors:
    """QK circuits of one layer for one pair of positions: exact, the scales of its norms included.

    Scores are ``x @ left @ right @ y`` with x and y over the scale of the norm before attention,
    biases apart, as of :func:`qk`; what norms on queries and keys divide by at these positions is
    in the factors, and what they add behind the division in the biases.

    Args:
        model: any model.
        layer: the model's layer number.
        query: residual stream that enters the layer at the query's position.
        key: the same at the key's position.
        offset: how far the key lies before the query.

    Raises:
        UnsupportedModelError: where queries and keys are changed by more than norms and a rotation.
    """
    factors, between = _unrotated(model, True, [layer], bare=False, biases=True)
    norm, weights = model.parts.input_norm(layer), model.weights(layer)
    left, left_bias, right, right_bias = (
        *(factors.left, factors.left_bias),
        *(factors.right, factors.right_bias),
    )
    if (after := between[0].query_norm) is not None:
        scale = after.scale(_made(norm(query), weights.W_Q, weights.b_Q))[:, None]
        left, left_bias = left / scale[:, None], left_bias / scale + after.bias
    if (after := between[0].key_norm) is not None:
        scale = after.scale(_made(norm(key), weights.W_K, weights.b_K))[:, None]
        right, right_bias = right / scale[:, None], right_bias / scale + after.bias
    exact = replace(factors, left=left, left_bias=left_bias, right=right, right_bias=right_bias)
    return _turned(exact, between, offset)


def _made(
    x: Float[Tensor, " d_model"],
    weight: Float[Tensor, "head d_model d_head"],
    bias: Float[Tensor, "head d_head"],
) -> Float[Tensor, "head d_head"]:
    return torch.einsum("d,hde->he", x, weight.float()) + bias.float()


def _unrotated(
    model: HeadModel,
    fold_norm: bool,
    layers: Sequence[int] | None,
    *,
    bare: bool,
    biases: bool = False,
) -> tuple[HeadFactors, list[QueryKey]]:
    """Factors without rotation, and what follows them in each layer (not asked for where bare)."""
    numbers = chosen_layers(model, layers)
    between = [] if bare else _between(model, numbers, biases)
    sides: dict[str, list[Tensor]] = {name: [] for name in ("Q", "K", "b_Q", "b_K")}
    for place, layer in enumerate(numbers):
        weights = model.weights(layer)
        norm = model.parts.input_norm(layer) if fold_norm else None
        norms = (None, None) if bare else (between[place].query_norm, between[place].key_norm)
        for side, after in zip("QK", norms, strict=True):
            weight = getattr(weights, f"W_{side}").float()
            bias = getattr(weights, f"b_{side}").float()
            if norm is not None:
                bias = bias + torch.einsum("d,hde->he", norm.bias.float(), weight)
                weight = norm.folded(weight)
            if after is not None:
                weight = after.folded(weight.transpose(0, 1)).transpose(0, 1)
                bias = after.folded(bias)
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
    return factors, between


def _between(model: HeadModel, layers: Sequence[int], biases: bool) -> list[QueryKey]:
    """What follows the matrices of some layers; where that is no product, say what still works.

    Raises:
        UnsupportedModelError: if it is more than norms and a rotation, or a norm adds a bias and
            that is not asked for.
    """
    try:
        found = [model.parts.query_key(layer) for layer in layers]
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error} fold_norm=False without an offset shows the bare weights."
        ) from error
    for one in found:
        for norm in (one.query_norm, one.key_norm):
            if norm is not None and not biases and bool(norm.bias.any()):
                raise UnsupportedModelError(
                    f"{model.name} norms its queries and keys and adds a bias behind the division, "
                    "so that no one matrix gives its attention scores: hs.circuits.score_parts "
                    "splits those of a run, and fold_norm=False without an offset shows the bare "
                    "weights."
                )
    return found
