"""Letting a rotary model read more tokens than its config says it was made for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headscope.errors import UnsupportedModelError

if TYPE_CHECKING:
    from headscope.models.protocol import HeadModel


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
