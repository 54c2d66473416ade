"""Low-rank products of all heads at once, never multiplied out.

Thin matrices are decomposed many at once, by matrix products where these are accurate.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from headscope.base.result import Glance, Shown, number, sizes
from headscope.base.saved import Saved
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.running import own_types

# Largest |Q.T Q - 1| after the first pass from which the second one reaches rounding error.
_NEAR = 0.1
# Condition up to which one pass is enough: its error is the condition squared times rounding. The
# measure used lies between 1 and the condition; at 1.5 no 64 columns are conditioned above 9.
_EVEN = 1.5


def thin_qr(
    matrices: Float[Tensor, "*batch rows columns"],
) -> tuple[Float[Tensor, "*batch rows rank"], Float[Tensor, "*batch rank columns"]]:
    """``Q @ R`` with orthonormal columns of Q and an upper triangular R.

    A matrix that is wider than tall (heads wider than the model) has as many columns of Q, and
    rows of R, as it has rows.

    Cholesky QR done twice: Q is as orthogonal and the product as exact as by Householder's
    reflections, while nearly all work is in matrix products. A matrix whose first pass did not
    come close (too badly conditioned for its precision, rank deficient) is done by Householder.

    Source: Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        wide = torch.linalg.qr(matrices)  # the Gram matrix of dependent columns has no root
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
    """Orthonormal basis of what the columns span, and its dimension.

    A matrix of less than full rank has as many zero columns as directions are missing: a QR
    decomposition would fill them with directions that the matrix does not have. Singular values
    below rounding (the largest times size times epsilon) count as 0.
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
    """QR decomposition with ``Q = span @ mix`` not multiplied out: ``span, mix, R``.

    For well conditioned matrices (random weights, say) ``span`` is ``matrices`` itself, ``mix`` the
    inverse of R, and what is to be multiplied with Q costs one product instead of four. Where any
    of them is not, all are done by ``thin_qr``.
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

    Singular values fall. Signs are fixed: the entry of each row of ``Vh`` that is largest in
    magnitude is positive (the sign of a singular vector pair is arbitrary otherwise).

    Attributes:
        U: unit directions that are read (or, of QK, the query side's), one per column.
        S: singular values.
        Vh: unit directions that are written (or, of QK, the key side's), one per row.
        layers: layer number of each entry of the layer axis.
    """

    U: Float[Tensor, "layer head d_model rank"]
    S: Float[Tensor, "layer head rank"]
    Vh: Float[Tensor, "layer head rank d_model"]
    layers: tuple[int, ...]

    def glance(self) -> Glance:
        """Shapes, and the heads with the largest singular values."""
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

    An axis of heads is either all query heads or the key/value heads that they share; the latter
    are not repeated. Affine parts are apart: the bilinear form (or map) of ``x`` is that of
    ``x @ left + left_bias`` and ``y @ right.mT + right_bias``.

    Attributes:
        left: read side, ``W_V`` (OV) or ``W_Q`` (QK).
        right: write side, ``W_O`` (OV) or ``W_K.mT`` (QK).
        left_bias: what the left side adds in head space, biases of weights and norm together.
        right_bias: the same on the right side of QK; zero for OV.
        layers: layer number of each entry of the layer axis.
        n_heads: query heads in a layer.
        name: of the circuit, for messages.
    """

    left: Float[Tensor, "layer left_head d_model d_head"]
    right: Float[Tensor, "layer right_head d_head d_model"]
    left_bias: Float[Tensor, "layer left_head d_head"]
    right_bias: Float[Tensor, "layer right_head d_head"]
    layers: tuple[int, ...]
    n_heads: int
    name: str = "product"

    def glance(self) -> Glance:
        """Which circuit, of how many heads, as which factors."""
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
        """Whether all heads together are so few that no d_model x d_model matrix pays for them."""
        layers, heads, width, rank = self.left.shape
        return 2 * layers * heads * rank < width

    def per_head(self, values: Float[Tensor, "layer some_head *any"]) -> Tensor:
        """Repeat an axis of key/value heads to query heads; use it on small things only."""
        group = self.n_heads // values.shape[1]
        return values if group == 1 else values.repeat_interleave(group, dim=1)

    @own_types()
    def svd(self) -> HeadSVD:
        """Decompose every head through the QR of its thin factors: O(d_model d_head^2) a head."""
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
        """Singular values alone, largest first."""
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
        """The transposed product: the two sides change places."""
        return replace(
            self,
            left=self.right.mT,
            right=self.left.mT,
            left_bias=self.right_bias,
            right_bias=self.left_bias,
        )

    def at(self, places: slice) -> "HeadFactors":
        """Some of the layers, by their place on the layer axis."""
        parts = {name: getattr(self, name)[places] for name in _TENSORS}
        return replace(self, layers=self.layers[places], **parts)

    def only(self, head: "str | tuple[int, int]") -> "HeadFactors":
        """The same of one head alone: one layer of one head.

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
        """One head multiplied out: for looking and for tests."""
        one = self.only(head)
        return one.left[0, 0] @ one.right[0, 0]


_TENSORS = ("left", "right", "left_bias", "right_bias")


def with_bias(factors: HeadFactors) -> HeadFactors:
    """The same with the affine parts in a last coordinate of d_model that is always 1.

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
    """``basis @ small`` per query head, heads that share a basis in one product."""
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
    """``small @ rows`` per query head, heads that share rows in one product."""
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
