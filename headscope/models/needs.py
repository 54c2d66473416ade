"""What a scorer or a study needs of a model, and why a model does not have it."""

from headscope.base.stacks import all_causal
from headscope.models.protocol import HeadModel


def lacks(model: HeadModel, need: str) -> str | None:
    """Return why a model cannot give what is needed; None where it can.

    Args:
        model: that is asked.
        need: a key of ``model.limits``, or ``bidirectional``: queries that see later keys.

    Example:
        >>> lacks(model, "causal") is None
        True
    """
    if need == "bidirectional" and all_causal(model.stacks):
        return f"{model.name} reads from left to right, so no token sees the ones after it."
    return model.limits.get(need)
