"""OV and QK circuits of every head as thin factors: what it writes, and where it looks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.result import Glance, Shown, number, sizes
from headscope.errors import InputError, UnsupportedModelError, whole
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel, need_model
from headscope.models.running import own_types
from headscope.views import QueryKey

# Largest |Q.T Q - 1| after the first pass from which the second one reaches rounding error.
_NEAR = 0.1
# Condition up to which one pass is enough: its error is the condition squared times rounding. The
# measure used lies between 1 and the condition; at 1.5 no 64 columns are conditioned above 9.
_EVEN = 1.5


def thin_qr(
    matrices: Float[Tensor, "*batch rows columns"],
) -> tuple[Float[Tensor, "*batch rows rank"], Float[Tensor, "*batch rank columns"]]:
    """QR decomposition with orthonormal columns of Q and an upper triangular R.

    A wide matrix (heads wider than the model) has as many columns of Q, and rows of R, as it has
    rows.

    Uses CholeskyQR2: Q is as orthogonal and the product as exact as with Householder reflections,
    while nearly all work is in matrix products. Matrices for which the first pass is too inaccurate
    (badly conditioned for their precision, or rank deficient) use Householder reflections.

    Source: Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        wide = torch.linalg.qr(matrices)  # a singular Gram matrix has no Cholesky factor
        return wide.Q, wide.R
    first, info = torch.linalg.cholesky_ex(matrices.mT @ matrices, upper=True)
    Q = torch.linalg.solve_triangular(first, matrices, upper=True, left=False)
    gram = Q.mT @ Q
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    far = (gram - identity).square().sum((-2, -1)).sqrt()
    good = (info == 0) & (far < _NEAR)  # False for NaN
    second, _ = torch.linalg.cholesky_ex(gram, upper=True)
    # `second` is near the identity, so that its inverse is exact and a product does the rest.
    Q = Q @ torch.linalg.solve_triangular(
        second, identity.expand_as(second), upper=True, left=False
    )
    R = second @ first
    if not bool(good.all()):
        Q[~good], R[~good] = torch.linalg.qr(matrices[~good])
    return Q, R


def column_space(
    matrices: Float[Tensor, "*batch rows columns"],
) -> tuple[Float[Tensor, "*batch rows rank"], Float[Tensor, "*batch"]]:
    """Orthonormal basis of the column space, and its dimension.

    A rank-deficient matrix gets a zero column per missing direction: a QR decomposition would fill
    them with directions that the matrix does not have. Singular values below rounding (the largest
    times size times epsilon) count as 0.
    """
    Q, R = thin_qr(matrices)
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    rounding = max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps
    there = S.amax(-1, keepdim=True) * rounding < S
    return (Q @ U) * there.unsqueeze(-2), there.sum(-1).to(matrices.dtype)


def orthonormal(
    matrices: Float[Tensor, "*batch rows columns"],
) -> tuple[
    Float[Tensor, "*batch rows rank"],
    Float[Tensor, "*batch rank rank"],
    Float[Tensor, "*batch rank columns"],
]:
    """QR decomposition with ``Q = span @ mix`` left as a product: ``span, mix, R``.

    For well conditioned matrices (such as random weights) ``span`` is ``matrices`` itself, ``mix``
    the inverse of R, and multiplying by Q costs one product instead of four. If any of them is not,
    all use ``thin_qr``.
    """
    R, info = torch.linalg.cholesky_ex(matrices.mT @ matrices, upper=True)
    columns = R.shape[-1]
    identity = torch.eye(columns, dtype=R.dtype, device=R.device).expand_as(R)
    mix = torch.linalg.solve_triangular(R, identity, upper=True)
    uneven = torch.linalg.matrix_norm(R) * torch.linalg.matrix_norm(mix) / max(columns, 1)
    if bool(((info == 0) & (uneven < _EVEN)).all()):
        return matrices, mix, R
    Q, R = thin_qr(matrices)
    identity = torch.eye(R.shape[-2], dtype=R.dtype, device=R.device)
    return Q, identity.expand(*R.shape[:-1], R.shape[-2]), R


@dataclass(frozen=True, eq=False, repr=False)
class HeadSVD(Saved, Shown):
    """Singular value decomposition of every head's matrix: ``U @ diag(S) @ Vh``.

    Singular values are sorted in descending order. Signs are fixed: the largest entry by magnitude
    of each row of ``Vh`` is positive (the sign of a singular vector pair is arbitrary).

    Attributes:
        U: unit input directions (for QK, of the query side), one per column.
        S: singular values.
        Vh: unit output directions (for QK, of the key side), one per row.
        layers: layer number of each entry of the layer axis.
    """

    U: Float[Tensor, "layer head d_model rank"]
    S: Float[Tensor, "layer head rank"]
    Vh: Float[Tensor, "layer head rank d_model"]
    layers: tuple[int, ...]

    def glance(self) -> Glance:
        """Show shapes, and the heads with the largest singular values."""
        largest = self.S[..., 0]
        order = largest.flatten().argsort(descending=True, stable=True)[:6].tolist()
        heads = [divmod(place, largest.shape[1]) for place in order]
        spectra = [(" ".join(number(one) for one in self.S[at][:4].tolist()), at) for at in heads]
        return Glance(
            "singular value decomposition",
            [
                sizes(("layer", "head"), largest.shape),
                f"U {list(self.U.shape)}, S {list(self.S.shape)}, Vh {list(self.Vh.shape)}",
            ],
            ("head", "largest singular values"),
            [(str(HeadIndex(self.layers[at[0]], at[1])), values) for values, at in spectra],
            hint="svd.S[layer, head], hs.plots.spectra(hs.circuits.spectra(model), ['L5H1'])",
        )


@dataclass(frozen=True, eq=False, repr=False)
class HeadFactors(Shown):
    """``left @ right`` for every head, as its two thin factors.

    An axis of heads has either all query heads or the key/value heads that they share; the latter
    are not repeated. Affine parts are kept apart: the bilinear form (or map) of ``x`` is that of
    ``x @ left + left_bias`` and ``y @ right.mT + right_bias``.

    Attributes:
        left: input side, ``W_V`` (OV) or ``W_Q`` (QK).
        right: output side, ``W_O`` (OV) or ``W_K.mT`` (QK).
        left_bias: bias of the left side in head space, from weights and norm together.
        right_bias: the same for the right side of QK; zero for OV.
        layers: layer number of each entry of the layer axis.
        n_heads: query heads in a layer.
        name: name of the circuit, for messages.
    """

    left: Float[Tensor, "layer left_head d_model d_head"]
    right: Float[Tensor, "layer right_head d_head d_model"]
    left_bias: Float[Tensor, "layer left_head d_head"]
    right_bias: Float[Tensor, "layer right_head d_head"]
    layers: tuple[int, ...]
    n_heads: int
    name: str = "product"

    def glance(self) -> Glance:
        """Show which circuit, of how many heads, and the factors' shapes."""
        return Glance(
            f"{self.name} circuits",
            [
                sizes(("layer", "head"), (len(self.layers), self.n_heads)),
                f"left {list(self.left.shape)} @ right {list(self.right.shape)}",
                "with biases apart" if bool(self.left_bias.any()) else "",
            ],
            hint="factors.svd(), factors.norm(), factors.explicit('L5H1')",
        )

    @cached_property
    def triangles(
        self,
    ) -> tuple[Float[Tensor, "layer head left d_head"], Float[Tensor, "layer head d_head right"]]:
        """Small factors with the same singular values: the R of each side's QR decomposition."""
        left, right = thin_qr(self.left)[1], thin_qr(self.right.mT)[1]
        return self.per_head(left), self.per_head(right).mT

    @property
    def few(self) -> bool:
        """Whether there are too few heads for a shared d_model x d_model matrix to pay off."""
        layers, heads, width, rank = self.left.shape
        return 2 * layers * heads * rank < width

    def per_head(self, values: Float[Tensor, "layer some_head *any"]) -> Tensor:
        """Repeat an axis of key/value heads to query heads; use it only on small tensors."""
        group = self.n_heads // values.shape[1]
        return values if group == 1 else values.repeat_interleave(group, dim=1)

    @own_types()
    def svd(self) -> HeadSVD:
        """Decompose every head through the QR of its thin factors: O(d_model d_head^2) per head."""
        left, left_mix, left_r = orthonormal(self.left)
        right, right_mix, right_r = orthonormal(self.right.mT)
        small = self.per_head(left_r) @ self.per_head(right_r).mT
        u, s, vh = torch.linalg.svd(small, full_matrices=False)
        Vh = lengthened(vh @ self.per_head(right_mix).mT, right.mT)
        upright = Vh.amax(-1, keepdim=True) >= -Vh.amin(-1, keepdim=True)
        sign = torch.where(upright, 1.0, -1.0).to(Vh)
        U = widened(left, self.per_head(left_mix) @ (u * sign.mT))
        return HeadSVD(U, s, Vh.mul_(sign), self.layers)

    @own_types()
    def singular_values(self) -> Float[Tensor, "layer head rank"]:
        """Singular values, largest first, without vectors."""
        left, right = self.triangles
        values: Tensor = torch.linalg.svdvals(left @ right)
        return values

    @own_types()
    def norm(self) -> Float[Tensor, "layer head"]:
        """Frobenius norm of every head's product."""
        left, right = self.triangles
        size: Tensor = torch.linalg.matrix_norm(left @ right)
        return size

    def core(self) -> Float[Tensor, "layer head d_head d_head"]:
        """``right @ left``: the small matrix with the product's nonzero eigenvalues."""
        shared = min(self.left.shape[1], self.right.shape[1])
        left, right = (side.unflatten(1, (shared, -1)) for side in (self.left, self.right))
        group = max(left.shape[2], right.shape[2])
        parts = [
            right[:, :, i % right.shape[2]] @ left[:, :, i % left.shape[2]] for i in range(group)
        ]
        return torch.stack(parts, dim=2).flatten(1, 2)

    def transposed(self) -> "HeadFactors":
        """Transposed product, with the two sides swapped."""
        return replace(
            self,
            left=self.right.mT,
            right=self.left.mT,
            left_bias=self.right_bias,
            right_bias=self.left_bias,
        )

    def at(self, places: slice) -> "HeadFactors":
        """Select layers by index on the layer axis."""
        parts = {name: getattr(self, name)[places] for name in _TENSORS}
        return replace(self, layers=self.layers[places], **parts)

    def only(self, head: "str | tuple[int, int]") -> "HeadFactors":
        """Select a single head: one layer of one head.

        Raises:
            InputError: if these factors have no such head.
        """
        index = HeadIndex.parse(head)
        if index.layer not in self.layers or not 0 <= index.head < self.n_heads:
            raise InputError(f"these {self.name} factors have no head {index}.")
        layer = self.layers.index(index.layer)
        parts: dict[str, Any] = {}
        for name in _TENSORS:
            values: Tensor = getattr(self, name)
            place = index.head * values.shape[1] // self.n_heads
            parts[name] = values[layer : layer + 1, place : place + 1]
        return replace(self, layers=(index.layer,), n_heads=1, **parts)

    @own_types()
    def explicit(self, head: "str | tuple[int, int]") -> Float[Tensor, "d_model d_model"]:
        """Product matrix of one head, for inspection and tests."""
        one = self.only(head)
        return one.left[0, 0] @ one.right[0, 0]


_TENSORS = ("left", "right", "left_bias", "right_bias")


@checked
def with_bias(factors: HeadFactors) -> HeadFactors:
    """The same factors with the biases as a last coordinate of d_model that is always 1.

    Args:
        factors: OV or QK circuits with biases.

    Returns:
        Factors whose d_model axis is one longer and whose biases are 0.

    Example:
        >>> wider = hs.circuits.with_bias(hs.circuits.qk(model))
        >>> wider.left.shape[-2] == model.shape.d_model + 1
        True
    """
    left = torch.cat([factors.left, factors.left_bias.unsqueeze(-2)], -2)
    right = torch.cat([factors.right, factors.right_bias.unsqueeze(-1)], -1)
    return replace(
        factors,
        left=left,
        right=right,
        left_bias=torch.zeros_like(factors.left_bias),
        right_bias=torch.zeros_like(factors.right_bias),
    )


def widened(
    basis: Float[Tensor, "layer some_head d_model rank"],
    small: Float[Tensor, "layer head rank component"],
) -> Float[Tensor, "layer head d_model component"]:
    """``basis @ small`` per query head, with one product for heads that share a basis."""
    group = small.shape[1] // basis.shape[1]
    if group == 1:
        plain: Tensor = basis @ small
        return plain
    side_by_side = rearrange(
        small, "layer (shared group) rank component -> layer shared rank (group component)",
        group=group,
    )  # fmt: skip
    per_head: Tensor = rearrange(
        basis @ side_by_side,
        "layer shared d_model (group component) -> layer (shared group) d_model component",
        group=group,
    )
    return per_head


def lengthened(
    small: Float[Tensor, "layer head component rank"],
    rows: Float[Tensor, "layer some_head rank d_model"],
) -> Float[Tensor, "layer head component d_model"]:
    """``small @ rows`` per query head, with one product for heads that share rows."""
    group = small.shape[1] // rows.shape[1]
    below = rearrange(
        small, "layer (shared group) component rank -> layer shared (group component) rank",
        group=group,
    )  # fmt: skip
    long: Tensor = rearrange(
        below @ rows,
        "layer shared (group component) d_model -> layer (shared group) component d_model",
        group=group,
    )
    return long


def chosen_layers(model: HeadModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Validate layer numbers; default: all layers with attention.

    Raises:
        InputError: if one of them has no attention.
    """
    need_model(model)
    known = model.shape.attention_layers
    if layers is None:
        return known
    for layer in layers:
        if layer not in known:
            raise InputError(f"layer {layer} of {model.name} has no attention; {known} have.")
    return tuple(layers)


def need_write(model: HeadModel, what: str) -> None:
    """Refuse models in which ``value @ W_O``, up to a foldable norm, is not a head's output.

    Raises:
        UnsupportedModelError: with the model's own reason.
    """
    need_model(model)
    reason = model.limits.get("attention_write", model.limits.get("ov"))
    if reason is not None:
        raise UnsupportedModelError(f"{reason} The weights alone do not give {what}.")


def over_all_layers(
    model: HeadModel, values: Float[Tensor, "layer head"], layers: Sequence[int]
) -> Float[np.ndarray, "layer head"]:
    """Scatter values of some layers over the model's layer numbers; NaN elsewhere."""
    result = np.full((model.shape.n_layers, model.shape.n_heads), np.nan)
    result[list(layers)] = values.detach().cpu().double().numpy()
    return result


def over_all_pairs(
    model: HeadModel, values: Float[Tensor, "layer head layer head"], layers: Sequence[int]
) -> Float[np.ndarray, "layer head layer head"]:
    """Scatter values of pairs over the model's layer numbers; NaN elsewhere."""
    n_layers, n_heads = model.shape.n_layers, model.shape.n_heads
    result = np.full((n_layers, n_heads, n_layers, n_heads), np.nan)
    numbers = np.array(layers)
    place = np.ix_(numbers, np.arange(n_heads), numbers, np.arange(n_heads))
    result[place] = values.detach().cpu().double().numpy()
    return result


def upward(layers: Sequence[int]) -> Bool[Tensor, "layer 1 layer 1"]:
    """Mask of pairs whose first layer is below the second."""
    number = torch.tensor(layers)
    return (number[:, None] < number)[:, None, :, None]


@checked
@own_types()
def ov(
    model: HeadModel, fold_norm: bool = True, *, layers: Sequence[int] | None = None
) -> HeadFactors:
    """OV circuit of every head: attending to a token with input x adds ``x @ W_V @ W_O``.

    With ``fold_norm`` the gain of the norm before attention multiplies the rows of ``W_V``, and
    under LayerNorm both sides are centred (neither this norm nor a later one sees the mean over
    d_model), so that the product acts on ``x / scale(x)``. Kept apart are the scale of each
    position, and, in ``left_bias``, the value bias and the norm's bias: ``left_bias @ W_O`` is
    written whatever is attended to, since rows sum to 1; weight folding elsewhere moves it into the
    output bias.

    Exact as a map of normalised inputs; only the scale is not determined by the weights. ``W_O`` is
    the map to the residual stream: if a family multiplies the output of attention (granite), that
    factor is included, folded or not, so spectra describe what heads add. So is the gain of a norm
    after attention (gemma2, gemma3, olmo2), with its centring; that norm's scale is another
    positive factor per position that weights do not determine, so sizes compare only within a
    layer, while ranks, ratios and composition scores are exact.

    Args:
        model: any model whose heads write linearly.
        fold_norm: False returns the bare ``W_V W_O``, with the value bias still apart.
        layers: layer numbers; None means all that have attention.

    Raises:
        UnsupportedModelError: if attention is followed by more than a plain norm, or values are not
            a linear function of the input.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Example:
        >>> factors = hs.circuits.ov(model)
        >>> factors.svd().S.shape == (model.shape.n_layers, model.shape.n_heads, model.shape.d_head)
        True
    """
    need_write(model, "its OV circuit")
    numbers = chosen_layers(model, layers)
    left, right, bias = [], [], []
    for layer in numbers:
        weights = model.weights(layer)
        model.parts.need_values(layer)
        W_V, b_V = weights.W_V.float(), weights.b_V.float()
        W_O = model.output_weights(layer).float()
        if "linear_write" in model.limits:
            W_O = model.parts.attention_write(layer).folded(W_O)
        if fold_norm:
            norm = model.parts.input_norm(layer)
            b_V = b_V + einsum(norm.bias.float(), W_V, "d, head d d_head -> head d_head")
            W_V = norm.folded(W_V)
            W_O = W_O - W_O.mean(-1, keepdim=True) if norm.centred else W_O
        left.append(W_V)
        right.append(W_O)
        bias.append(b_V)
    out = torch.stack(right)
    return HeadFactors(
        left=torch.stack(left),
        right=out,
        left_bias=torch.stack(bias),
        right_bias=torch.zeros_like(out[..., 0]),
        layers=numbers,
        n_heads=model.shape.n_heads,
        name="OV",
    )


def _check_offset(model: HeadModel, offset: int | None) -> None:
    """Refuse offsets that are not integers, or at which no query of the model attends."""
    if offset is None:
        return
    need_model(model)
    if whole(offset, "offset") < 0 and "causal" not in model.limits:
        raise InputError(
            f"offset={offset}: queries of {model.name} see no later keys; give 0 or more."
        )


@checked
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
    :func:`~headscope.circuits.ov`, and the product acts on ``x / scale(x)``; biases are kept apart.

    Under rotary positions: at distance ``offset = i - j`` between query i and key j the score is
    exactly ``x @ W_Q @ R(offset) @ W_K.T @ y``, for that distance only. Without an offset this is
    the circuit at distance 0, which is exact only for a token's attention to itself; elsewhere it
    describes what a head looks for only as far as its planes rotate slowly. For an average over
    distances, see :func:`qk_content`; for single planes, :func:`qk_bands`. Positions that are added
    to the embedding (GPT-2) are part of x, and scores are exact at any offset.

    Under a norm on queries and keys (qwen3, gemma3, olmo2), its gain and centring are in the
    product, and its scale is not: that is another positive factor per position and head (per
    position in olmo2), which weights do not determine and :func:`~headscope.circuits.score_parts`
    takes from a run. So the product gives the sign of a score, the preference among keys up to the
    keys' scales, ranks, ratios and composition; its size is meaningless.

    Args:
        model: any model.
        fold_norm: False leaves out the norm before attention; without an offset the product is then
            bare, without the norms on queries and keys either.
        offset: distance from the key to the query in tokens; None: no rotation.
        layers: layer numbers; None means all that have attention.

    Raises:
        UnsupportedModelError: if queries and keys are changed by more than a rotation and a norm
            without biases, unless ``fold_norm=False`` and no offset request the bare weights.

    Source: Elhage et al. 2021; Su et al. 2021, "RoFormer", equation 16.

    Example:
        >>> hs.circuits.qk(hs.load("tiny-llama"), offset=1).svd().S.shape[2]
        32
    """
    _check_offset(model, offset)
    bare = not fold_norm and offset is None
    factors, between = _unrotated(model, fold_norm, layers, bare=bare)
    return factors if offset is None else _turned(factors, between, offset)


@checked
@own_types()
def qk_content(
    model: HeadModel,
    distances: range,
    fold_norm: bool = True,
    *,
    layers: Sequence[int] | None = None,
) -> HeadFactors:
    """QK circuit averaged over distances: what a head looks for irrespective of position.

    An average, exact at no single distance: planes that rotate much within ``distances`` cancel,
    slow ones and unrotated dimensions stay. Equal to :func:`qk` without rotary positions.

    Args:
        model: any model whose attention scores are a bilinear form; see :func:`qk`.
        distances: distances to average over, e.g. ``range(1, 512)``.
        fold_norm: fold the norm before attention.
        layers: layer numbers; None means all that have attention.

    Example:
        >>> hs.circuits.qk_content(hs.load("tiny-llama"), range(1, 9)).svd().S.ndim
        3
    """
    factors, between = _unrotated(model, fold_norm, layers, bare=False)
    return _turned(factors, between, torch.tensor(list(distances), dtype=torch.float64))


@checked
@own_types()
def qk_bands(
    model: HeadModel,
    offset: int = 0,
    fold_norm: bool = True,
    *,
    layers: Sequence[int] | None = None,
) -> list[HeadFactors]:
    """QK circuit at one distance as a sum over rotary planes, fastest first.

    Each plane is a product of rank 2; the unrotated coordinates come last, together. The parts sum
    to ``qk(model, offset=offset)`` exactly, biases included.

    Args:
        model: model with rotary positions.
        offset: distance from query to key, in positions.
        fold_norm: fold in the gains of norms and centre.
        layers: layers to include. Default: all with attention.

    Returns:
        One set of factors per rotary plane, fastest first, then one for unrotated coordinates.

    Raises:
        UnsupportedModelError: if no matrix product gives the scores; see :func:`qk`.

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
    """QK circuits of one layer for one pair of positions in a run, with the norms' scales: exact.

    Scores are ``x @ left @ right @ y`` with x and y over the scale of the norm before attention,
    biases apart, as for :func:`qk`; the scales of norms on queries and keys at these positions are
    in the factors, and biases that those norms add after the division in the biases.

    Args:
        model: any model.
        layer: the model's layer number.
        query: input of the layer at the query's position.
        key: the same at the key's position.
        offset: distance from the key to the query in tokens.

    Raises:
        UnsupportedModelError: if queries and keys are changed by more than norms and a rotation.
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
    return einsum(x, weight.float(), "d, head d d_head -> head d_head") + bias.float()


def _unrotated(
    model: HeadModel,
    fold_norm: bool,
    layers: Sequence[int] | None,
    *,
    bare: bool,
    biases: bool = False,
) -> tuple[HeadFactors, list[QueryKey]]:
    """Factors without rotation, and what follows them in each layer (unless bare)."""
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
                bias = bias + einsum(norm.bias.float(), weight, "d, head d d_head -> head d_head")
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
    """What follows the matrices of some layers; if that is not linear, raise with what still works.

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
                    f"{model.name} normalises its queries and keys and then adds a bias, so that "
                    "no single matrix gives its attention scores: hs.circuits.score_parts "
                    "decomposes those of a run, and fold_norm=False without an offset gives the "
                    "bare weights."
                )
    return found
