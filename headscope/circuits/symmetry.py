"""How much of a head's square matrix is symmetric."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.circuits.factors import HeadFactors


def symmetric_share(factors: HeadFactors) -> Float[Tensor, "layer head"]:
    """Share of the squared norm in the symmetric part of every head's matrix.

    ``|(W + W.T) / 2|^2 / |W|^2 = (1 + tr(W W) / |W|^2) / 2``, from d_head x d_head pieces. Range
    [0, 1]: 1 symmetric (a QK circuit that matches like with like, or unlike with unlike), 0
    antisymmetric (each looks for what does not look for it), 1/2 on average by chance. NaN for
    a zero matrix. Known weakness: says nothing of the sign; see :func:`eigenvalue_ratio`.

    Example:
        >>> share = hs.circuits.symmetric_share(hs.circuits.ov(model))
        >>> bool(((share >= 0) & (share <= 1)).all())
        True
    """
    core = factors.core()
    trace = (core * core.mT).sum((-2, -1))
    return (1 + trace / factors.norm().square()) / 2


def eigenvalue_ratio(
    core: Float[Tensor, "layer head d_head d_head"],
) -> Float[Tensor, "layer head"]:
    """``sum(Re(lambda)) / sum(|lambda|)`` of the eigenvalues of a small matrix, in [-1, 1].

    1 where all eigenvalues are positive (what goes in comes out), -1 where all are negative;
    NaN for a zero matrix.

    Example:
        >>> float(hs.circuits.eigenvalue_ratio(torch.eye(3)[None, None]))
        1.0
    """
    values = torch.linalg.eigvals(core.cpu().double())
    ratio: Tensor = values.real.sum(-1) / values.abs().sum(-1)
    return ratio
