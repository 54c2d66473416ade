"""QR decomposition of many thin matrices at once, by matrix products where these are accurate."""

import torch
from jaxtyping import Float
from torch import Tensor

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
