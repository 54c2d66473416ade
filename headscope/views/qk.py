"""What a scorer sees before the softmax: queries and keys of one layer.

And what stands between the residual stream and these: norms, biases and rotations.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the residual stream: ``(x - mean(x)) / scale(x) * gain + bias``.

    There is no subtraction of the mean where ``centred`` is False (RMSNorm), and no division
    where ``divides`` is False (attention reads the residual stream as it is).

    Attributes:
        gain: effective multiplier (``1 + weight`` where a family uses that).
        bias: additive part.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    epsilon: float
    divides: bool = True

    def scale(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """Denominator: standard deviation or root mean square, per position."""
        x = residual.float()
        if not self.divides:
            return torch.ones_like(x[..., 0])
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.square().mean(-1) + self.epsilon).sqrt()

    def __call__(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """What is read of a residual stream behind the norm, in fp32."""
        x = residual.float()
        scale = self.scale(residual).unsqueeze(-1)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / scale * self.gain.float() + self.bias.float()

    def folded(
        self, weight: Float[Tensor, "*head d_model d_head"]
    ) -> Float[Tensor, "*head d_model d_head"]:
        """Weights that read ``x / scale(x)`` as ``weight`` reads the norm's output, bias apart."""
        read = weight * self.gain.to(weight).unsqueeze(-1)
        return read - read.mean(-2, keepdim=True) if self.centred else read


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embedding of one layer: a turn in each of some planes of head space.

    A query at position i is ``content @ turn(i)``, a key at j likewise, so that their product
    depends on ``i - j`` alone. Without rotary positions there are no planes.

    Attributes:
        first, second: coordinates of head space that span each plane.
        frequency: angle in radians by which one position turns each plane.
        gain: length of a rotated vector over its length before (YaRN changes it).
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    frequency: Float[Tensor, " plane"]
    gain: float = 1.0

    def phases(self, distance: int | Float[Tensor, " distance"]) -> Complex[Tensor, " plane"]:
        """Complex factor by which query and key at a distance meet in each plane.

        Many distances give the mean of their factors.
        """
        at = torch.as_tensor(distance, dtype=torch.float64).reshape(-1, 1)
        angle = at * self.frequency.double().cpu()
        return self.gain**2 * torch.polar(torch.ones_like(angle), angle).mean(0)

    def turned(
        self,
        weight: Float[Tensor, "*any d_head"],
        distance: int | Float[Tensor, " distance"],
    ) -> Float[Tensor, "*any d_head"]:
        """Query weights (or vectors) that meet unrotated keys as at this distance.

        ``turned(q, i - j) @ k`` is the product of the rotated ``q`` at i and ``k`` at j.
        """
        if not self.first:
            return weight
        phase = self.phases(distance)
        cos, sin = (part.to(weight.dtype).to(weight.device) for part in (phase.real, phase.imag))
        a, b = weight[..., list(self.first)], weight[..., list(self.second)]
        turned = weight.clone()
        turned[..., list(self.first)] = a * cos - b * sin
        turned[..., list(self.second)] = a * sin + b * cos
        return turned


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """Norm of a layer's queries (or keys): ``(c - mean(c)) / scale(c) * gain + bias``.

    Attributes:
        gain, bias: multiplier and additive part of every number of every head.
        centred: whether the mean is subtracted (LayerNorm).
        epsilon: added to the mean square under the root.
        together: whether the heads of a position share one scale (olmo2); else each has its own.
    """

    gain: Float[Tensor, "head d_head"]
    bias: Float[Tensor, "head d_head"]
    centred: bool
    epsilon: float
    together: bool

    def scale(self, content: Float[Tensor, "*any head d_head"]) -> Float[Tensor, "*any head"]:
        """Denominator: standard deviation or root mean square, per position and head."""
        square = (content - self._mean(content)).square()
        over = (-2, -1) if self.together else (-1,)
        found = (square.mean(over, keepdim=True) + self.epsilon).sqrt()
        return found.expand(*content.shape[:-1], 1).squeeze(-1)

    def __call__(
        self, content: Float[Tensor, "*any head d_head"]
    ) -> Float[Tensor, "*any head d_head"]:
        """What the norm makes of queries (or keys)."""
        x = (content - self._mean(content)) / self.scale(content).unsqueeze(-1)
        return x * self.gain.to(x) + self.bias.to(x)

    def folded(
        self, content: Float[Tensor, "*any head d_head"]
    ) -> Float[Tensor, "*any head d_head"]:
        """The norm without its division and its bias: what weights alone know of it, linear."""
        return (content - self._mean(content)) * self.gain.to(content)

    def _mean(self, content: Tensor) -> Tensor:
        if not self.centred:
            return content.new_zeros(())
        return content.mean((-2, -1) if self.together else (-1,), keepdim=True)


@dataclass(frozen=True, eq=False)
class QueryKey:
    """What turns ``x W_Q + b_Q`` and ``x W_K + b_K`` into the queries and keys of the scores.

    First a norm, where there is one, then rotation, then a constant multiplier.

    Attributes:
        rotation: of positions; no planes where there are none.
        query_norm, key_norm: None where there is none.
        query_scale, key_scale: constant multipliers that the model puts on queries and keys (opt
            scales its queries before they meet keys); 1 nearly everywhere.
    """

    rotation: Rotation
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None
    query_scale: float = 1.0
    key_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class QueryKeys:
    """Queries at some positions and all keys that any of them sees. Never written to.

    Attributes:
        layer: the model's layer number.
        query_pos: positions of the queries.
        query, key: in fp32, as attention used them: rotated, normalised.
        scaling: multiplier of the products.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)`` where it is given.
        visible: which keys each query sees: order, window and padding together.
        rotation: how positions turned them; only for scorers that need ``rotary``.
        bias: what is added to the products, e.g. by relative position.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    scaling: float
    soft_cap: float | None
    visible: Bool[Tensor, "batch query key"]
    rotation: Rotation | None = None
    bias: Float[Tensor, "_ head query key"] | None = None

    @cached_property
    def scores(self) -> Float[Tensor, "batch head query key"]:
        """Scores before mask and softmax, bias and soft cap included."""
        scores = self.products(torch.arange(self.query.shape[-1], device=self.key.device))
        if self.bias is not None:
            scores = scores + self.bias
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        return scores

    def products(self, dimensions: Int[Tensor, " some"]) -> Float[Tensor, "batch head query key"]:
        """What some dimensions of head space add to the scores, before any soft cap."""
        batch, kv_heads, keys, _ = self.key.shape
        query = self.query[..., dimensions] * self.scaling
        grouped = query.reshape(batch, kv_heads, -1, len(dimensions))
        part = torch.matmul(grouped, self.key[..., dimensions].mT)
        return part.view(batch, -1, len(self.query_pos), keys)
