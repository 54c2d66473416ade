"""Whether more of a metric is better or worse: what losing a head costs."""

from typing import Literal

from headscope.errors import InputError
from headscope.metrics import AnyMetric

Better = Literal["higher", "lower"]

_BETTER: dict[str, Better] = {
    "logit_difference": "higher",
    "answer_log_prob": "higher",
    "answer_probability": "higher",
    "accuracy": "higher",
    "answer_rank": "lower",
    "loss": "lower",
    "kl_divergence": "lower",
}


def cost_sign(metric: AnyMetric, better: Better | None = None) -> int:
    """1 where a rise of the metric is damage, -1 where a fall is.

    Args:
        metric: one of :mod:`headscope.metrics`, or of your own.
        better: which way is better; needed for a metric of your own.

    Raises:
        InputError: if it cannot be told.
    """
    known = better or _BETTER.get(metric.name)
    if known not in ("higher", "lower"):
        raise InputError(
            f"is more of {metric.name!r} better or worse? Say better='higher' or better='lower'."
        )
    return 1 if known == "lower" else -1
