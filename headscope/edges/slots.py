"""Slopes at the inputs of heads, by the heads' own weights: a product each, not a backward pass."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import UnsupportedModelError
from headscope.models.protocol import HeadModel
from headscope.models.taps import Site
from headscope.views import Norm, Rotation

_MATRIX = {"query": "W_Q", "key": "W_K", "value": "W_V"}


@dataclass(frozen=True, eq=False)
class Slot:
    """Gradient of a metric at the queries, keys or values of a layer, told apart by query head.

    Attributes:
        site: ``query``, ``key`` or ``value``.
        layer: the model's layer number.
        slope: of every query head, as attention uses it: behind norms, rotation and multiplier.
    """

    site: Site
    layer: int
    slope: Float[Tensor, "batch head pos d_head"]

    def through_weights(
        self,
        model: HeadModel,
        stream: Float[Tensor, "batch pos d_model"],
        real: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch head pos d_model"] | None:
        """Gradient at the residual stream that enters each head's slot, in fp32.

        Args:
            model: whose weights are taken.
            stream: what enters the layer.
            real: False at padding, which takes no position.

        Returns:
            None where the weights do not say it: no weights per head, or norms on queries and keys.
        """
        try:
            weights, norm = model.weights(self.layer), model.parts.input_norm(self.layer)
            slope = self._before_rotation(model, real)
        except UnsupportedModelError:
            return None
        if slope is None:
            return None
        matrix = getattr(weights, _MATRIX[self.site]).float()
        matrix = matrix.repeat_interleave(slope.shape[1] // len(matrix), 0)
        read = torch.einsum("bhpe,hde->bhpd", slope, matrix.to(slope.device))
        return behind_norm(norm, stream.detach(), read)

    def _before_rotation(
        self, model: HeadModel, real: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch head pos d_head"] | None:
        """Slope at what the matrix gives; None where a norm follows it."""
        slope = self.slope.float()
        if self.site == "value":
            return slope
        between = model.parts.query_key(self.layer)
        if (between.query_norm, between.key_norm) != (None, None):
            return None
        scale = between.query_scale if self.site == "query" else between.key_scale
        place = (real.long().cumsum(1) - 1).clamp_min(0).to(slope.device)
        return scale * unturned(between.rotation, slope, place[:, None])


def unturned(
    rotation: Rotation, slope: Float[Tensor, "*any pos d_head"], place: Tensor
) -> Float[Tensor, "*any pos d_head"]:
    """Slope at a vector, of the slope at what rotation makes of it at a position.

    Args:
        rotation: of a layer.
        slope: at rotated vectors.
        place: position of each vector.
    """
    if not rotation.first:
        return slope
    angle = place.double()[..., None] * rotation.frequency.double().to(slope.device)
    cos, sin = (rotation.gain * part.to(slope) for part in (angle.cos(), angle.sin()))
    first, second = list(rotation.first), list(rotation.second)
    a, b = slope[..., first], slope[..., second]
    found = slope.clone()
    found[..., first] = a * cos + b * sin
    found[..., second] = b * cos - a * sin
    return found


def behind_norm(
    norm: Norm,
    x: Float[Tensor, "batch pos d_model"],
    slope: Float[Tensor, "batch head pos d_model"],
) -> Float[Tensor, "batch head pos d_model"]:
    """Slope at the input of a norm, of the slope at its output.

    Args:
        norm: any.
        x: its input.
        slope: at its output, of every head.

    Example:
        >>> norm = Norm(torch.ones(2), torch.zeros(2), centred=False, epsilon=0.0)
        >>> x = torch.tensor([[[3.0, 4.0]]])  # along its input, a norm that divides has no slope
        >>> float(behind_norm(norm, x, x[:, None]).abs().max()) < 1e-6
        True
    """
    x = x.float()[:, None]
    found = slope * norm.gain.float().to(slope.device)
    if norm.divides:
        scale = norm.scale(x)[..., None]
        content = x - x.mean(-1, keepdim=True) if norm.centred else x
        along = (found * content).mean(-1, keepdim=True) / scale.square()
        found = (found - along * content) / scale
    return found - found.mean(-1, keepdim=True) if norm.centred else found
