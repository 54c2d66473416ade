"""Letting a rotary model read more tokens than its config says it was made for."""

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
        UnsupportedModelError: if positions are looked up in a table, which ends.
    """
    if model.shape.n_ctx is None:
        return
    if not is_rotary(config):
        raise UnsupportedModelError(
            f"{model.name} ({config.model_type}) looks its positions up in a table of "
            f"{model.shape.n_ctx}, so there are none beyond: leave extrapolate=True out."
        )
    model.shape = replace(model.shape, n_ctx=None, trained_ctx=model.shape.n_ctx)
