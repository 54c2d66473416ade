"""The states of one text at every place, and their measures from one product of them all.

Each measure is that of :mod:`headscope.geometry.measures`. With fewer points than dimensions they
follow from the matrix of inner products, which is computed once for all of them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.geometry import measures as gm

NEIGHBOURS = 10
SCALE = 2  # of GRIDE: ranks 2 and 4
# Squared distances below this share of the points' own squares are computed again, term by term.
_CLOSE = 1e-6
# States shorter than this share of the longest lose digits where the mean is added back.
_TINY = 1e-3
_STILL = 1e-12  # share of the squares up to which a step is none


@dataclass(frozen=True, eq=False)
class Points:
    """Points in several places, with what their measures share.

    Attributes:
        x: states; the points are the same in every place.
        tokens: ids of the tokens that they are of.
    """

    x: Float[Tensor, "place point d_model"]
    tokens: Int[Tensor, " point"]

    @property
    def few(self) -> bool:
        """Whether inner products of points are the smaller matrix."""
        return self.x.shape[-2] <= self.x.shape[-1]

    @cached_property
    def wide(self) -> Float[Tensor, "place point d_model"]:
        """The states in fp64, on the CPU where the device has none."""
        return self.x.cpu().double() if self.x.device.type == "mps" else self.x.double()

    @cached_property
    def centred(self) -> Float[Tensor, "place point d_model"]:
        """The states less their mean."""
        return self.wide - self.wide.mean(-2, keepdim=True)

    @cached_property
    def products(self) -> Float[Tensor, "place point point"]:
        """Inner products of centred states."""
        return self.centred @ self.centred.mT

    @cached_property
    def squares(self) -> Float[Tensor, "place point"]:
        """Squared norms of centred states."""
        return self.products.diagonal(dim1=-2, dim2=-1)

    @cached_property
    def cosines(self) -> Float[Tensor, "place point point"]:
        """Cosines between states; 0 with a state that is 0."""
        norms = self.wide.norm(dim=-1)
        if bool((norms < _TINY * norms.amax(-1, keepdim=True)).any()):
            unit = torch.nn.functional.normalize(self.wide, dim=-1)
            return unit @ unit.mT
        mean = self.wide.mean(-2, keepdim=True)
        along = (self.centred @ mean.mT).squeeze(-1) + mean.square().sum(-1) / 2
        inner = self.products + along[..., None] + along[..., None, :]
        inverse: Tensor = 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return inner * inverse[..., None] * inverse[..., None, :]

    def matrix_entropy(self) -> Tensor:
        """See :func:`headscope.geometry.matrix_entropy`."""
        if not self.few:
            return gm.matrix_entropy(self.x)
        norms = self.squares.sqrt()
        at_mean = norms <= 1e-6 * self.wide.norm(dim=-1)
        inverse = (1 / norms).masked_fill(at_mean, 0)
        total = (~at_mean).double().sum(-1)
        gram = self.products * inverse[..., None] * inverse[..., None, :]
        p = torch.linalg.eigvalsh(gram).clamp_min(0) / total[..., None]
        entropy: Tensor = torch.special.entr(p).sum(-1).masked_fill(total == 0, float("nan"))
        return entropy

    def anisotropy(self) -> Tensor:
        """See :func:`headscope.geometry.anisotropy`."""
        if not self.few:
            return gm.anisotropy(self.x)
        values = torch.linalg.eigvalsh(self.products).clamp_min(0)
        share: Tensor = values[..., -1] / values.sum(-1)
        return share

    def curvature(self) -> Tensor:
        """See :func:`headscope.geometry.curvature`."""
        if not self.few:
            return gm.curvature(self.x)
        g = self.products
        next_ = g.diagonal(1, -2, -1)
        length = self.squares[..., 1:] + self.squares[..., :-1] - 2 * next_
        still = length <= _STILL * (self.squares[..., 1:] + self.squares[..., :-1])
        length = length.masked_fill(still, float("nan"))
        turn = next_[..., 1:] - self.squares[..., 1:-1] - g.diagonal(2, -2, -1) + next_[..., :-1]
        return _angle(turn / (length[..., 1:] * length[..., :-1]).sqrt())

    def token_angle(self) -> Tensor:
        """See :func:`headscope.geometry.token_angle`."""
        if not self.few:
            return gm.token_angle(self.x)
        there = self.cosines.diagonal(dim1=-2, dim2=-1) > 0.5  # 1, or 0 for a state that is 0
        both = there[..., 1:] & there[..., :-1]
        return _angle(self.cosines.diagonal(1, -2, -1).masked_fill(~both, float("nan")))

    def mean_cosine(self) -> Tensor:
        """See :func:`headscope.geometry.mean_cosine`."""
        if not self.few:
            return gm.mean_cosine(self.x)
        n, own = self.x.shape[-2], self.cosines.diagonal(dim1=-2, dim2=-1)
        return (self.cosines.sum((-2, -1)) - own.sum(-1)) / (n * (n - 1))

    def self_similarity(self) -> Tensor:
        """See :func:`headscope.geometry.self_similarity`."""
        if not self.few:
            return gm.self_similarity(self.x, self.tokens)
        _, kind, count = self.tokens.to(self.wide.device).unique(
            return_inverse=True, return_counts=True
        )
        often = count > 1
        if not bool(often.any()):
            return torch.full(self.x.shape[:-2], float("nan"), dtype=torch.float64)
        same = torch.nn.functional.one_hot(kind).double()
        own = self.cosines.diagonal(dim1=-2, dim2=-1) @ same
        total = (same * (self.cosines @ same)).sum(-2)
        pairs = (count * (count - 1)).double()
        found: Tensor = ((total - own)[..., often] / pairs[often]).mean(-1) - self.mean_cosine()
        return found

    @cached_property
    def near(self) -> tuple[Float[Tensor, "place point k"], Int[Tensor, "place point k"]]:
        """Distances to the nearest other points and which they are; of ties the earlier first."""
        if self.few:
            both = self.squares[..., None] + self.squares[..., None, :]
            square = both - 2 * self.products
            square.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
            close = (square < _CLOSE * both).nonzero()
            for part in close.split(1 << 12):
                place, a, b = part.T
                difference = self.centred[place, a] - self.centred[place, b]
                square[place, a, b] = difference.square().sum(-1)
            far = square.clamp_min(0).sqrt()
        else:
            far = torch.cdist(self.wide, self.wide, compute_mode="donot_use_mm_for_euclid_dist")
        far.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        k = min(max(NEIGHBOURS, 2 * SCALE), self.x.shape[-2] - 1)
        values, ids = far.topk(k + 1, largest=False)  # one more, to see whether the last is tied
        if bool((values.diff(dim=-1) == 0).any()):
            values, ids = far.sort(dim=-1, stable=True)
        return values[..., :k].cpu(), ids[..., :k]

    def intrinsic_dimension(self) -> Tensor:
        """See :func:`headscope.geometry.two_nn`."""
        return gm.two_nn_of(self.near[0])

    def gride(self) -> Tensor:
        """See :func:`headscope.geometry.gride`, of every place."""
        distances = self.near[0].numpy()
        return torch.from_numpy(np.array([gm.gride_of(one, SCALE) for one in distances]))

    def overlap(self) -> Tensor:
        """Overlap of neighbours with the place before; none at the first."""
        k = min(NEIGHBOURS, self.x.shape[-2] - 2)
        ids = self.near[1][..., :k]
        later = (ids[:-1, :, :, None] == ids[1:, :, None, :]).any(-1).double().mean((-2, -1))
        return torch.cat([torch.full((1,), float("nan")).to(later), later])


def _angle(cosines: Float[Tensor, "place pair"]) -> Tensor:
    return torch.acos(cosines.clamp(-1, 1)).nanmean(-1)
