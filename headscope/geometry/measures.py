"""Measures of point clouds: entropy, curvature, dimension, neighbourhoods, linearity.

Each takes points as rows, ``[*any point d_model]``, and returns a number per cloud in fp32 or
better. They are invariant to rotation and scale of the space unless the docstring says otherwise.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError

Cloud = Float[Tensor, "*any point d_model"]


@checked
def matrix_entropy(x: Cloud, alpha: float = 1.0, *, normalise: bool = False) -> Tensor:
    """Entropy of the spectrum of the points' Gram matrix, in nats.

    The points are centred and scaled to unit norm; with ``K = X X^T / trace`` and its eigenvalues
    ``p``, order 1 is ``-sum p ln p`` and another order is ``ln(sum p^alpha) / (1 - alpha)``. It is
    0 for points on a line and ``ln(points)`` for orthogonal ones.

    Args:
        x: points, at least two per cloud.
        alpha: order of the entropy (Renyi); 1 is Shannon's.
        normalise: divide by ``ln(min(points - 1, d_model))``, the largest value possible for
            centred points.

    Returns:
        A number per cloud, 0 to ``ln(min(points - 1, d_model))``; NaN if all points are equal.

    Raises:
        InputError: if alpha is not positive, or there are fewer than two points.

    Source:
        Skean et al. 2025, "Layer by Layer", definition 1; Giraldo et al. 2014. Their code clamps
        negative entries of the Gram matrix to 0, which changes the spectrum; this does not.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> round(matrix_entropy(points).item(), 4) == round(math.log(2), 4)
        True
    """
    _at_least(x, 2, "matrix entropy")
    if alpha <= 0:
        raise InputError(f"alpha={alpha}: give a positive order.")
    wide = _wide(x)
    centred = wide - wide.mean(-2, keepdim=True)
    norms = centred.norm(dim=-1, keepdim=True)
    at_mean = norms <= 1e-6 * wide.norm(dim=-1, keepdim=True)  # a zero vector has no direction
    unit = (centred / norms).masked_fill(at_mean, 0)
    total = (~at_mean).double().sum((-2, -1))
    narrow = x.shape[-2] <= x.shape[-1]
    gram = unit @ unit.mT if narrow else unit.mT @ unit
    if alpha == 2:
        entropy = -(gram.square().sum((-2, -1)) / total.square()).log()
    else:
        p = torch.linalg.eigvalsh(gram).clamp_min(0) / total[..., None]
        if alpha == 1:
            entropy = torch.special.entr(p).sum(-1)
        else:
            entropy = (p.pow(alpha).sum(-1)).log() / (1 - alpha)
    largest = math.log(max(2, min(x.shape[-2] - 1, x.shape[-1]))) if normalise else 1.0
    found: Tensor = entropy.masked_fill(total == 0, float("nan")) / largest
    return found


@checked
def curvature(x: Cloud) -> Tensor:
    """Mean angle between successive steps of the path through the points, in radians.

    Steps are ``x[i + 1] - x[i]``. A straight path has curvature 0; a path that reverses at every
    step has pi.

    Args:
        x: points in order, at least three per cloud.

    Returns:
        A number per cloud in radians, 0 to pi; NaN if a step is zero.

    Source:
        Hosseini and Fedorenko 2023, "Large language models implicitly learn to straighten neural
        sentence trajectories". Skean et al. 2025 use this name for :func:`token_angle`.

    Example:
        >>> curvature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])).item()
        0.0
    """
    _at_least(x, 3, "curvature")
    steps = _wide(x).diff(dim=-2)
    return _mean_angle(steps[..., :-1, :], steps[..., 1:, :])


@checked
def token_angle(x: Cloud, apart: int = 1) -> Tensor:
    """Mean angle between the vectors of points at a fixed distance in order, in radians.

    Args:
        x: points in order.
        apart: distance in order between the two points, 1 or more.

    Returns:
        A number per cloud in radians, 0 to pi. Not invariant to shifting the cloud.

    Raises:
        InputError: if ``apart`` is below 1, or there are too few points.

    Source:
        The code of Skean et al. 2025, "Layer by Layer", where it is called curvature.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> round(token_angle(points).item(), 4) == round(math.pi / 2, 4)
        True
    """
    if apart < 1:
        raise InputError(f"apart={apart}: give a distance of 1 or more.")
    _at_least(x, apart + 1, "the angle between tokens")
    x = _wide(x)
    return _mean_angle(x[..., :-apart, :], x[..., apart:, :])


def _mean_angle(a: Tensor, b: Tensor) -> Tensor:
    """Mean angle by ``atan2``, which keeps small angles that a cosine would round away."""
    a, b = (v / v.norm(dim=-1, keepdim=True) for v in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)).nanmean(-1)


@checked
def anisotropy(x: Cloud) -> Tensor:
    """Share of the centred cloud's variance along its first principal direction.

    Args:
        x: points, at least two per cloud.

    Returns:
        A number per cloud, ``1 / min(points - 1, d_model)`` to 1; NaN if all points are equal.

    Source:
        Razzhigaev et al. 2024, "The Shape of Learning".

    Example:
        >>> anisotropy(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])).item()
        1.0
    """
    _at_least(x, 2, "anisotropy")
    centred = _wide(x) - _wide(x).mean(-2, keepdim=True)
    gram = centred @ centred.mT if x.shape[-2] <= x.shape[-1] else centred.mT @ centred
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    share: Tensor = values[..., -1] / values.sum(-1)
    return share


@checked
def mean_cosine(x: Cloud) -> Tensor:
    """Mean cosine between different points, without centring.

    Args:
        x: points, at least two per cloud.

    Returns:
        A number per cloud, -1 / (points - 1) to 1. Not invariant to shifting the cloud.

    Source:
        Ethayarajh 2019, "How Contextual are Contextualized Word Representations?".

    Example:
        >>> mean_cosine(torch.eye(3)).item()
        0.0
    """
    _at_least(x, 2, "the mean cosine")
    unit = torch.nn.functional.normalize(_wide(x), dim=-1)
    n = x.shape[-2]
    return (unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))) / (n * (n - 1))


@checked
def self_similarity(
    x: Float[Tensor, "*any point d_model"], tokens: Int[Tensor, " point"]
) -> Tensor:
    """Mean cosine between hidden states of equal tokens, minus that between all points.

    Averaged over tokens that occur at least twice, each with the mean over its pairs. It is low if
    context shapes a token's state; subtracting the mean cosine corrects for anisotropy.

    Args:
        x: one point per token.
        tokens: token ids.

    Returns:
        A number per cloud, -2 to 2: 1 minus the mean cosine if equal tokens have equal states,
        about 0 for unrelated points, and NaN if no token occurs twice.

    Source:
        Ethayarajh 2019, "How Contextual are Contextualized Word Representations?",
        anisotropy-adjusted self-similarity.

    Example:
        >>> self_similarity(torch.eye(2)[[0, 1, 0, 1]], torch.tensor([5, 7, 5, 7])).item() > 0.6
        True
    """
    _at_least(x, 2, "self-similarity")
    unit = torch.nn.functional.normalize(_wide(x), dim=-1)
    _, kind, count = tokens.to(unit.device).unique(return_inverse=True, return_counts=True)
    often, n = count > 1, count.double().to(unit.device)
    if not bool(often.any()):
        return torch.full(x.shape[:-2], float("nan"), dtype=torch.float64)
    total = unit.new_zeros(*x.shape[:-2], len(count), x.shape[-1]).index_add(-2, kind, unit)
    own = unit.square().sum(-1)
    own = own.new_zeros(*x.shape[:-2], len(count)).index_add(-1, kind, own)
    cosines = (total.square().sum(-1) - own)[..., often] / (n * (n - 1))[often]
    similarity: Tensor = cosines.mean(-1) - mean_cosine(x)
    return similarity


@checked
def two_nn(x: Float[Tensor, "*any point d_model"]) -> Tensor:
    """Intrinsic dimension from the ratio of each point's two nearest distances.

    The maximum-likelihood estimate ``(N - 1) / sum ln(r2 / r1)``. It underestimates high dimensions
    (2,000 points in a 5-dimensional cube give 4.6).

    Args:
        x: points, at least ten per cloud and all distinct.

    Returns:
        A number per cloud, above 0; NaN if two points coincide.

    Source:
        Facco et al. 2017, "Estimating the intrinsic dimension of datasets by a minimal
        neighborhood information".

    Example:
        >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
        >>> 0.9 < two_nn(line @ torch.ones(1, 8)).item() < 1.1
        True
    """
    _at_least(x, 10, "TwoNN")
    return two_nn_of(_nearest(x, 2))


def two_nn_of(near: Float[Tensor, "*any point k"]) -> Tensor:
    """:func:`two_nn` from the distances to each point's nearest neighbours, nearest first."""
    ratio = (near[..., 1] / near[..., 0]).log()
    dimension = (near.shape[-2] - 1) / ratio.sum(-1)
    return dimension.masked_fill((near[..., 0] == 0).any(-1), float("nan"))


@checked
def gride(x: Float[Tensor, "point d_model"], scale: int = 2) -> float:
    """Intrinsic dimension from neighbours of ranks ``scale`` and ``2 * scale``.

    Larger scales are less sensitive to noise in the nearest neighbours; scale 1 is :func:`two_nn`.
    The likelihood of the ratios ``mu = r(2 scale) / r(scale)`` is maximised by bisection.

    Args:
        x: points of one cloud, more than ``2 * scale`` and at least ten.
        scale: rank of the nearer neighbour.

    Returns:
        The dimension, above 0; NaN if points coincide.

    Raises:
        InputError: if ``scale`` is below 1, or there are too few points.

    Source:
        Denti et al. 2022, "The generalized ratios intrinsic dimension estimator".

    Example:
        >>> square = torch.rand(800, 2, generator=torch.Generator().manual_seed(0))
        >>> 1.8 < gride(square, scale=4) < 2.2
        True
    """
    if scale < 1:
        raise InputError(f"scale={scale}: give a neighbour rank of 1 or more.")
    _at_least(x, max(10, 2 * scale + 1), f"GRIDE at scale {scale}")
    return gride_of(_nearest(x, 2 * scale).numpy(), scale)


def gride_of(near: Float[np.ndarray, "point k"], scale: int) -> float:
    """:func:`gride` from the distances to each point's nearest neighbours, nearest first."""
    if (near[:, scale - 1] == 0).any():
        return float("nan")
    log_mu = np.log(near[:, 2 * scale - 1] / near[:, scale - 1])
    log_mu = log_mu[log_mu > 0]

    def slope(d: float) -> float:
        """Derivative of the mean log-likelihood with respect to the dimension."""
        pulled = log_mu / -np.expm1(-d * log_mu) if scale > 1 else 0.0
        return float(1 / d + np.mean((scale - 1) * pulled - (2 * scale - 1) * log_mu))

    return float(brentq(slope, 1e-3, 1e4))


@checked
def neighbourhood_overlap(
    x: Float[Tensor, "*any point d_model"], y: Float[Tensor, "*any point d_other"], k: int = 10
) -> Tensor:
    """Share of k nearest neighbours that points have in common in two clouds.

    Args:
        x: points.
        y: the same points in another space, e.g. one layer later.
        k: number of neighbours, not counting the point itself.

    Returns:
        A number per cloud, 0 to 1; independent clouds give about ``k / (points - 1)``.

    Source:
        Valeriani et al. 2023, "The geometry of hidden representations of large transformer models".

    Example:
        >>> points = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
        >>> neighbourhood_overlap(points, 3 * points).item()
        1.0
    """
    _at_least(x, k + 2, f"the overlap of {k} neighbours")
    a, b = (_neighbours(cloud, k) for cloud in (x, y))
    shared = (a[..., :, None] == b[..., None, :]).any(-1).double()
    return shared.mean((-2, -1))


@checked
def linearity(
    x: Float[Tensor, "point d_model"], y: Float[Tensor, "point d_model"], *, adjusted: bool = True
) -> float:
    """Linear predictability of one cloud from another: 1 minus the residual share.

    Both clouds are centred and scaled to unit Frobenius norm; the value is ``v = 1 - min_A |X A -
    Y|^2``. Unrelated clouds already give about ``d / (N - 1)``, so the adjusted value is ``(v - d /
    (N - 1)) / (1 - d / (N - 1))``.

    Args:
        x: points before, at least ten times as many as dimensions.
        y: the same points after.
        adjusted: correct for the value that a fit to noise would reach.

    Returns:
        A number up to 1; about 0 for unrelated clouds if adjusted.

    Raises:
        InputError: if there are too few points for the dimensions.

    Source:
        Razzhigaev et al. 2024, "Your Transformer is Secretly Linear".

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> points, weights = torch.rand(60, 4, generator=g), torch.rand(4, 4, generator=g)
        >>> round(linearity(points, points @ weights), 6)
        1.0
    """
    moments = LinearMoments.of(x, y)
    return moments.linearity(adjusted=adjusted)


class LinearMoments:
    """Running sums for the linearity between two layers, without storing points.

    Attributes:
        n: number of points so far.
    """

    def __init__(self, d_model: int) -> None:
        """Start with no points.

        Args:
            d_model: dimension of both clouds.
        """
        self.n = 0
        self._sums = torch.zeros(2, d_model, dtype=torch.float64)
        self._products = torch.zeros(2, d_model, d_model, dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    @classmethod
    def of(
        cls, x: Float[Tensor, "point d_model"], y: Float[Tensor, "point d_model"]
    ) -> "LinearMoments":
        """Sums for one pair of clouds."""
        moments = cls(x.shape[-1])
        moments.add(x, y)
        return moments

    def add(self, x: Float[Tensor, "point d_model"], y: Float[Tensor, "point d_model"]) -> None:
        """Add points."""
        a, b = (v.detach().cpu().double() for v in (x, y))
        self.n += len(a)
        self._sums += torch.stack([a.sum(0), b.sum(0)])
        self._products[0].addmm_(a.T, a)
        self._products[1].addmm_(a.T, b)
        self._squares += b.square().sum()

    def linearity(self, *, adjusted: bool = True) -> float:
        """Return the linearity of the points so far; see :func:`linearity`."""
        d = self._sums.shape[1]
        if self.n < 10 * d:
            raise InputError(
                f"linearity of {self.n} points in {d} dimensions: a linear map would fit noise "
                f"too; give at least {10 * d} points."
            )
        mean_x, mean_y = self._sums / self.n
        xx = self._products[0] - self.n * torch.outer(mean_x, mean_x)
        xy = self._products[1] - self.n * torch.outer(mean_x, mean_y)
        total = float(self._squares - self.n * mean_y.square().sum())
        if not total > 0:
            return float("nan")
        explained = float((torch.linalg.pinv(xx, hermitian=True) @ xy * xy).sum()) / total
        chance = d / (self.n - 1)
        return (explained - chance) / (1 - chance) if adjusted else explained


@checked
def info_nce(
    a: Float[Tensor, "text d_model"], b: Float[Tensor, "text d_model"], temperature: float = 0.1
) -> float:
    """Contrastive loss (InfoNCE) of two views of each text, in nats.

    Vectors are scaled to unit norm; each view must be matched to its partner against the ``2N - 2``
    views of other texts.

    Args:
        a: one vector per text, for the first view.
        b: one vector per text, for the second view.
        temperature: divisor of the cosines.

    Returns:
        A loss of at least 0, in nats; ``ln(2N - 1)`` if all vectors are equal.

    Source:
        van den Oord et al. 2018; Skean et al. 2025, "Layer by Layer". Their code does not
        re-normalise averaged tokens, so it does not compare cosines.

    Example:
        >>> round(info_nce(torch.ones(4, 3), torch.ones(4, 3)), 4) == round(math.log(7), 4)
        True
    """
    return float(info_nce_by_text(a, b, temperature).mean())


def info_nce_by_text(
    a: Float[Tensor, "text d_model"], b: Float[Tensor, "text d_model"], temperature: float = 0.1
) -> Float[Tensor, " text"]:
    """:func:`info_nce` per text, averaged over its two views.

    Example:
        >>> info_nce_by_text(torch.ones(4, 3), torch.ones(4, 3)).shape
        torch.Size([4])
    """
    _at_least(a, 2, "InfoNCE")
    views = torch.nn.functional.normalize(_wide(torch.cat([a, b])), dim=-1)
    scores = views @ views.T / temperature
    scores.fill_diagonal_(float("-inf"))
    partner = torch.arange(2 * len(a)).roll(len(a))
    losses = torch.nn.functional.cross_entropy(scores, partner.to(scores.device), reduction="none")
    return losses.view(2, -1).mean(0)


@checked
def lidar(views: Float[Tensor, "text view d_model"], delta: float = 1e-4) -> float:
    """Effective rank of between-text relative to within-text variation of views (LiDAR).

    The exponentiated entropy of the spectrum of ``W^(-1/2) B W^(-1/2)``, with ``B`` the covariance
    of the texts' means and ``W`` that of views around them.

    Args:
        views: vectors of several views of each text.
        delta: constant added to the diagonal of ``W``.

    Returns:
        An effective number of dimensions, 1 to ``min(texts - 1, d_model)``.

    Raises:
        InputError: if there are fewer than 3 texts or 2 views.

    Source:
        Thilak et al. 2023, "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL
        Architectures".

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> centres = torch.randn(50, 1, 3, generator=g)
        >>> views = centres + 0.1 * torch.randn(50, 4, 3, generator=g)
        >>> 2.5 < lidar(views) <= 3
        True
    """
    texts, n_views, d = views.shape
    if texts < 3 or n_views < 2:
        raise InputError(
            f"LiDAR of {texts} texts of {n_views} views: give at least 3 texts and 2 views."
        )
    x = _wide(views)
    means = x.mean(1)
    between = torch.cov(means.T, correction=0).reshape(d, d)
    around = (x - means[:, None]).flatten(0, 1)
    within = around.T @ around / (texts * (n_views - 1)) + delta * torch.eye(d).to(x)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors * values.rsqrt() @ vectors.T
    spectrum = torch.linalg.eigvalsh(whiten @ between @ whiten).clamp_min(0)
    p = spectrum / spectrum.sum()
    return float(torch.special.entr(p).sum().exp())


@checked
def dime(
    a: Float[Tensor, "text d_model"],
    b: Float[Tensor, "text d_model"],
    permutations: int = 10,
    seed: int = 0,
) -> float:
    """Difference of matrix entropies (DiME): mutual information of two views, in nats.

    ``mean over permutations of H(Ka * P Kb P^T)`` minus ``H(Ka * Kb)``, with ``*`` the entry-wise
    product of Gram matrices of unit vectors over the texts.

    Args:
        a: one vector per text, for the first view.
        b: one vector per text, for the second view.
        permutations: number of random permutations of the second view's texts.
        seed: seed for the permutations.

    Returns:
        A number in nats: about 0 for unrelated views, larger for views that share more.

    Source:
        Skean et al. 2023, "DiME: Maximizing Mutual Information by a Difference of Matrix-Based
        Entropies". Always over texts, since the entry-wise product is meaningless for covariances
        of dimensions.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 40, 8, generator=g)
        >>> dime(x, x) > dime(x, y) + 0.1
        True
    """
    _at_least(a, 3, "DiME")
    first, second = (
        (unit := torch.nn.functional.normalize(_wide(view), dim=-1)) @ unit.T for view in (a, b)
    )
    generator = torch.Generator().manual_seed(seed)
    shuffled = []
    for _ in range(permutations):
        order = torch.randperm(len(a), generator=generator).to(a.device)
        shuffled.append(_gram_entropy(first * second[order][:, order]))
    return float(torch.stack(shuffled).mean() - _gram_entropy(first * second))


def _gram_entropy(gram: Float[Tensor, "text text"]) -> Tensor:
    p = torch.linalg.eigvalsh(gram).clamp_min(0) / gram.diagonal().sum()
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy


def _wide(x: Tensor) -> Tensor:
    """fp64 values, on the CPU if the device does not support fp64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _distances(x: Float[Tensor, "*any point d_model"]) -> Float[Tensor, "*any point point"]:
    """Euclidean distances, exactly 0 on the diagonal, without cancellation for close points."""
    return torch.cdist(_wide(x), _wide(x), compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(x: Float[Tensor, "*any point d_model"], k: int) -> Float[Tensor, "*any point k"]:
    """Distances to the k nearest other points, nearest first."""
    far = _distances(x)
    far.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    return far.topk(k, largest=False).values.cpu()


def _neighbours(x: Float[Tensor, "*any point d_model"], k: int) -> Int[Tensor, "*any point k"]:
    """Indices of the nearest points; on ties, the earlier one first."""
    far = _distances(x)
    far.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    return far.sort(dim=-1, stable=True).indices[..., :k]


def _at_least(x: Tensor, least: int, what: str) -> None:
    if x.shape[-2] < least:
        raise InputError(f"{what} of {x.shape[-2]} points: give {least} or more.")
