"""Rotary positions: measured, and extended beyond what a model was made for.

What is measured is the turn between the queries that weights give and those in use.
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


# Positions that the measurement looks at: from each, the phase of the next is known to within
# far less than half a turn, so that long ones make the frequency exact and short ones unique.
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

# A pairing explains as much as the best one if it leaves no more than this many times what that
# leaves, or than this share of the squared length: rounding of fp32.
_AS_GOOD, _ROUNDED = 2.0, 1e-12

Planes = tuple[tuple[int, ...], tuple[int, ...]]


def find_rotation(
    content: Float[Tensor, "vector position d_head"],
    actual: Float[Tensor, "vector position d_head"],
    tolerance: float,
) -> Rotation | None:
    """Find the rotation with ``actual = turn(content)`` at every position.

    Args:
        content: queries and keys as the weights give them, at the first of :data:`POSITIONS`.
        actual: the same as attention used them.
        tolerance: largest share of the squared length that may stay unexplained.

    Returns:
        The rotation (no planes without rotary positions), or None if no rotation does it, e.g.
        because queries and keys are normalised in between.
    """
    content, actual = content.double(), actual.double()
    if not bool((content.isfinite() & actual.isfinite()).all()):
        return None  # there is no pairing to choose by
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
    """Whether a known rotation takes content to actual; arguments as of :func:`find_rotation`."""
    content, actual = content.double(), actual.double()
    turned = _rotated(rotation, content)
    return Gap(_unexplained(content, actual, turned), tolerance).closed


def _smallest(content: Tensor, actual: Tensor) -> Planes:
    """The pairing of fewest coordinates that explains as much as any, up to rounding.

    A pairing of more coordinates than turn explains as much, and by rounding a little more: it has
    a factor of 1 in every further plane.
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
    """Complex factor per position and plane that takes content to actual, least squares."""
    c, a = _planes(planes, content), _planes(planes, actual)
    return (c.conj() * a).sum(0) / c.abs().square().sum(0).clamp_min(1e-30)


def _misfit(planes: Planes, content: Tensor, actual: Tensor) -> float:
    """Squared length that this pairing leaves unexplained."""
    c, a = _planes(planes, content), _planes(planes, actual)
    left = (a - c * _factors(planes, content, actual)).abs().square().sum()
    size = 2 * len(planes[0])
    return float(left + (actual - content)[..., size:].square().sum())


def _frequencies(factors: Complex[Tensor, "position plane"]) -> Float[Tensor, " plane"]:
    """Angle per position, made more exact at each doubling."""
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
    """Share of the squared length of ``actual`` that ``model`` leaves; of content if the same."""
    against = content if model is actual else model
    return float((actual - against).square().sum() / actual.square().sum().clamp_min(1e-30))


def is_rotary(config: Any) -> bool:
    """Whether a transformers config asks for rotary positions."""
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return False
    return any(getattr(text, name, None) for name in ("rope_parameters", "rope_theta"))


def _rotations(config: Any) -> list[Mapping[str, Any]]:
    """Settings of a config's rotations; some have one set for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [one for one in given.values() if isinstance(one, Mapping)]
    return [one for one in (given, *nested) if "rope_type" in one]


def turning_length(config: Any) -> int | None:
    """Longest text that a model with two sets of rotations (longrope) reads with the first.

    Args:
        config: of the text model.
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
    """The limit of a model without rotary positions; nothing for one that has them."""
    if is_rotary(config):
        return {}
    if getattr(config, "rotary_value", None) is not None:  # roformer
        reason = "turns its queries and keys by a table, and its config does not say how far"
        return {"rotary": f"{name} ({config.model_type}) {reason}."}
    return {"rotary": f"{name} ({config.model_type}) has no rotary positions."}


def extrapolate(model: "HeadModel", config: Any) -> None:
    """Lift the limit on the length of texts; ``shape.trained_ctx`` keeps what it was.

    Rotary positions are computed, so any number of them exists; what a model makes of those
    that training never showed it is another question. Results that used them say so.

    Args:
        model: without a limit it stays as it is.
        config: of transformers.

    Raises:
        UnsupportedModelError: if positions are looked up in a table, which ends, or if rotations
            depend on the longest text that the model has read so far.
    """
    if model.shape.n_ctx is None:
        return
    if not is_rotary(config):
        raise UnsupportedModelError(
            f"{model.name} ({config.model_type}) looks its positions up in a table of "
            f"{model.shape.n_ctx}, so there are none beyond: leave extrapolate=True out."
        )
    if any(one["rope_type"] == "dynamic" for one in _rotations(config.get_text_config())):
        raise UnsupportedModelError(
            f"{model.name} ({config.model_type}) rotates by the longest text that it has ever read "
            f"(rope_type='dynamic'), so beyond {model.shape.n_ctx} tokens a result would depend on "
            "what ran before: leave extrapolate=True out."
        )
    model.shape = replace(model.shape, n_ctx=None, trained_ctx=model.shape.n_ctx)
