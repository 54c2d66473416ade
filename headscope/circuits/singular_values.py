"""What singular values say of a head, and what chance alone would say."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def effective_rank(S: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """Exponential of the entropy of the singular values' shares: ``exp(H(S / sum(S)))``.

    Range: 1 (one direction) to d_head (all alike); 0 for a zero matrix.
    Source: Roy and Vetterli 2007, "The effective rank".

    Example:
        >>> round(float(hs.circuits.effective_rank(torch.tensor([1.0, 1.0, 0.0]))), 4)
        2.0
    """
    share = S / S.sum(-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(S.sum(-1) > 0, rank, torch.zeros_like(rank))


def stable_rank(S: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """Squared Frobenius norm over squared spectral norm: ``sum(S^2) / S[0]^2``.

    Range: 1 to d_head; 0 for a zero matrix. Hardly sees small directions.
    Source: Rudelson and Vershynin 2007.

    Example:
        >>> float(hs.circuits.stable_rank(torch.tensor([2.0, 2.0, 0.0])))
        2.0
    """
    energy = S.square()
    return energy.sum(-1) / energy[..., 0].clamp_min(torch.finfo(S.dtype).tiny)


def participation_ratio(S: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """How many directions share the energy: ``(sum S^2)^2 / sum S^4``.

    Range: 1 to d_head; 0 for a zero matrix.

    Example:
        >>> float(hs.circuits.participation_ratio(torch.tensor([3.0, 3.0, 0.0])))
        2.0
    """
    scaled = S / S[..., :1].clamp_min(torch.finfo(S.dtype).tiny)  # fourth powers underflow early
    energy = scaled.square()
    return energy.sum(-1).square() / energy.square().sum(-1).clamp_min(torch.finfo(S.dtype).tiny)


def top_share(S: Float[Tensor, "*head rank"], k: int = 1) -> Float[Tensor, "*head"]:
    """Share of the energy in the k largest directions: ``sum(S[:k]^2) / sum(S^2)``, in [0, 1].

    Example:
        >>> float(hs.circuits.top_share(torch.tensor([1.0, 1.0, 1.0, 1.0])))
        0.25
    """
    energy = S.square()
    total = energy.sum(-1).clamp_min(torch.finfo(S.dtype).tiny)
    return energy[..., :k].sum(-1) / total


def marchenko_pastur_edge(rows: int, columns: int, variance: float = 1.0) -> float:
    """Largest singular value of a large matrix of independent entries of this variance.

    ``sqrt(variance) * (sqrt(rows) + sqrt(columns))``. For one factor, such as ``W_Q``; a product
    of two such matrices follows another law: see :func:`product_edge`.
    Source: Marchenko and Pastur 1967.

    Example:
        >>> hs.circuits.marchenko_pastur_edge(400, 100)  # sqrt(400) + sqrt(100)
        30.0
    """
    return math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns))


def product_edge(
    rows: int, inner: int, columns: int, draws: int = 64, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the largest singular value of ``A @ B``, by drawing.

    As :func:`product_spectra`, of the largest alone.

    Example:
        >>> mean, spread = hs.circuits.product_edge(64, 8, 64, draws=4)
        >>> mean > spread
        True
    """
    largest = product_spectra(rows, inner, columns, draws, seed)[:, 0]
    return float(largest.mean()), float(largest.std())


def product_spectra(
    rows: int, inner: int, columns: int, draws: int = 64, seed: int = 0
) -> Float[Tensor, "draw inner"]:
    """Singular values of products ``A @ B`` of random factors, largest first.

    A is ``[rows inner]`` and B is ``[inner columns]``, entries independent, mean 0, variance 1.
    Only the small triangular factors are drawn (Bartlett's decomposition), so that the cost does
    not grow with the outer sizes.

    Example:
        >>> tuple(hs.circuits.product_spectra(64, 8, 64, draws=4).shape)
        (4, 8)
    """
    generator = torch.Generator().manual_seed(seed)
    left = _triangle(rows, inner, draws, generator)
    right = _triangle(columns, inner, draws, generator)
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def outliers(
    S: Float[Tensor, "*head rank"], edge: Float[Tensor, "*head"] | float
) -> Int[Tensor, "*head"]:
    """How many singular values lie above the edge of the random spectrum.

    Example:
        >>> int(hs.circuits.outliers(torch.tensor([5.0, 3.0, 1.0]), 2.0))
        2
    """
    return (torch.as_tensor(edge, dtype=S.dtype, device=S.device).unsqueeze(-1) < S).sum(-1)


def _triangle(size: int, inner: int, draws: int, generator: torch.Generator) -> Tensor:
    """R of the QR decomposition of Gaussian ``[size inner]`` matrices."""
    upper = torch.randn(draws, inner, inner, generator=generator, dtype=torch.float64).triu(1)
    freedom = size - torch.arange(inner, dtype=torch.float64)
    # chi with n degrees of freedom: the root of a sum of n squares, drawn as a gamma variable
    shape = (freedom / 2).expand(draws, inner)
    diagonal = (2 * torch._standard_gamma(shape, generator=generator)).sqrt()
    return upper + torch.diag_embed(diagonal)
