"""Rotary positions: measurement, and extrapolation beyond the trained length.

The measured rotation is the one between projected queries and those used by attention.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from headscope.errors import UnsupportedModelError
from headscope.models.proof import Gap
from headscope.views import Rotation

if TYPE_CHECKING:
    from headscope.models.protocol import HeadModel


# Measured positions. From each, the phase at the next is known to well within half a turn: short
# distances make the frequency unique, and long ones make it precise.
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

# A pairing is as good as the best one if its residual is at most this multiple of the best
# residual, or this share of the squared norm (fp32 rounding).
_AS_GOOD, _ROUNDED = 2.0, 1e-12

Planes = tuple[tuple[int, ...], tuple[int, ...]]


def find_rotation(
    content: Float[Tensor, "vector position d_head"],
    actual: Float[Tensor, "vector position d_head"],
    tolerance: float,
) -> Rotation | None:
    """Find the rotation with ``actual = turn(content)`` at every position.

    Args:
        content: projected queries and keys, at the first of :data:`POSITIONS`.
        actual: the same vectors as used by attention.
        tolerance: largest share of the squared norm that may stay unexplained.

    Returns:
        The rotation (without planes if there are no rotary positions), or None if no rotation fits,
        e.g. because queries and keys are normed in between.
    """
    content, actual = content.double(), actual.double()
    if not bool((content.isfinite() & actual.isfinite()).all()):
        return None  # all pairings fit equally
    if Gap(_unexplained(content, actual, actual), tolerance).closed:
        return Rotation((), (), torch.zeros(0, dtype=torch.float64))
    best = _smallest(content, actual)
    factors = _factors(best, content, actual)
    gain = float(factors[0].abs().mean())
    rotation = Rotation(*best, _frequencies(factors), gain)
    turned = _rotated(rotation, content)
    return rotation if Gap(_unexplained(content, actual, turned), tolerance).closed else None


def turns(
    rotation: Rotation,
    content: Float[Tensor, "vector position d_head"],
    actual: Float[Tensor, "vector position d_head"],
    tolerance: float,
) -> bool:
    """Whether a known rotation maps content to actual; arguments as in :func:`find_rotation`."""
    content, actual = content.double(), actual.double()
    turned = _rotated(rotation, content)
    return Gap(_unexplained(content, actual, turned), tolerance).closed


def _smallest(content: Tensor, actual: Tensor) -> Planes:
    """Pairing with the fewest coordinates among those that fit best, up to rounding.

    A pairing of more coordinates than are rotated fits as well, or slightly better through
    rounding, with a factor of 1 in every extra plane.
    """
    misfits = [(_misfit(p, content, actual), p) for p in _candidates(content.shape[-1])]
    floor = _ROUNDED * float(actual.square().sum())
    enough = _AS_GOOD * min(misfit for misfit, _ in misfits) + floor
    return min((p for misfit, p in misfits if misfit <= enough), key=lambda p: len(p[0]))


def _candidates(d_head: int) -> list[Planes]:
    """Ways of pairing coordinates: halves (GPT-NeoX, Llama) or neighbours (GPT-J, GLM)."""
    found = []
    for size, neighbours in product(range(d_head - d_head % 2, 0, -2), (False, True)):
        if neighbours:
            found.append((tuple(range(0, size, 2)), tuple(range(1, size, 2))))
        else:
            found.append((tuple(range(size // 2)), tuple(range(size // 2, size))))
    return found


def _planes(planes: Planes, x: Tensor) -> Complex[Tensor, "vector position plane"]:
    first, second = planes
    return torch.complex(x[..., list(first)], x[..., list(second)])


def _factors(planes: Planes, content: Tensor, actual: Tensor) -> Complex[Tensor, "position plane"]:
    """Least-squares complex factor per position and plane that maps content to actual."""
    c, a = _planes(planes, content), _planes(planes, actual)
    return (c.conj() * a).sum(0) / c.abs().square().sum(0).clamp_min(1e-30)


def _misfit(planes: Planes, content: Tensor, actual: Tensor) -> float:
    """Squared norm that a pairing leaves unexplained."""
    c, a = _planes(planes, content), _planes(planes, actual)
    left = (a - c * _factors(planes, content, actual)).abs().square().sum()
    size = 2 * len(planes[0])
    return float(left + (actual - content)[..., size:].square().sum())


def _frequencies(factors: Complex[Tensor, "position plane"]) -> Float[Tensor, " plane"]:
    """Angle per position, refined at each doubling."""
    frequency = factors[1].angle()
    for position, factor in zip(POSITIONS[2:], factors[2:], strict=False):
        expected = torch.polar(torch.ones_like(frequency), -frequency * position)
        frequency = frequency + (factor * expected).angle() / position
    return frequency


def _rotated(rotation: Rotation, content: Tensor) -> Float[Tensor, "vector position d_head"]:
    first, second = list(rotation.first), list(rotation.second)
    at = torch.tensor(POSITIONS[: content.shape[1]], dtype=torch.float64)
    angle = at[:, None] * rotation.frequency
    turn = torch.polar(torch.full_like(angle, rotation.gain), angle)
    planes = _planes((rotation.first, rotation.second), content) * turn
    result = content.clone()
    result[..., first], result[..., second] = planes.real, planes.imag
    return result


def _unexplained(content: Tensor, actual: Tensor, model: Tensor) -> float:
    """Relative squared residual of ``model`` (of ``content`` if it is ``actual`` itself)."""
    against = content if model is actual else model
    return float((actual - against).square().sum() / actual.square().sum().clamp_min(1e-30))


def is_rotary(config: Any) -> bool:
    """Whether a transformers config has rotary positions."""
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return False
    return any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta"))


def _rotations(config: Any) -> list[Mapping[str, Any]]:
    """Rotary settings of a config; some have one set per kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [one for one in given.values() if isinstance(one, Mapping)]
    return [one for one in (given, *nested) if "rope_type" in one]


def turning_length(config: Any) -> int | None:
    """Longest text that a model with two sets of rotations (longrope) reads with the first set.

    Args:
        config: transformers config of the text model.
    """
    longest = getattr(config, "max_position_embeddings", None)
    own = getattr(config, "original_max_position_embeddings", None) or longest
    lengths = [
        one.get("original_max_position_embeddings") or own
        for one in _rotations(config)
        if one["rope_type"] == "longrope"
    ]
    return min((int(length) for length in lengths if length is not None), default=None)


def no_rotation(name: str, config: Any) -> dict[str, str]:
    """Limit entry for a model without rotary positions; empty for other models."""
    if is_rotary(config):
        return {}
    if getattr(config, "rotary_value", None) is not None:  # roformer
        reason = "turns its queries and keys by a table, and its config does not say how far"
        return {"rotary": f"{name} ({config.model_type}) {reason}."}
    return {"rotary": f"{name} ({config.model_type}) has no rotary positions."}


def extrapolate(model: "HeadModel", config: Any) -> None:
    """Lift the limit on text length; ``shape.trained_ctx`` keeps the original limit.

    Rotary positions are computed, so there is no hard limit; how a model behaves at positions that
    it was not trained on is another question. Results that use such positions are marked.

    Args:
        model: model to extend; unchanged if it has no limit.
        config: transformers config of the model.

    Raises:
        UnsupportedModelError: if positions come from a table of fixed size, or if rotations depend
            on the longest text that the model has read so far.
    """
    if model.shape.n_ctx is None:
        return
    if not is_rotary(config):
        raise UnsupportedModelError(
            f"{model.name} ({config.model_type}) has a table of {model.shape.n_ctx} positions, so "
            "there are none beyond: leave out extrapolate=True."
        )
    if any(one["rope_type"] == "dynamic" for one in _rotations(config.get_text_config())):
        raise UnsupportedModelError(
            f"{model.name} ({config.model_type}) adapts its rotations to the longest text read so "
            f"far (rope_type='dynamic'), so beyond {model.shape.n_ctx} tokens results would depend "
            "on earlier calls: leave out extrapolate=True."
        )
    model.shape = replace(model.shape, n_ctx=None, trained_ctx=model.shape.n_ctx)
