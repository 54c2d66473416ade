"""How surprised the model is, and how far from its own clean run."""

from jaxtyping import Float
from torch import Tensor

from headscope.errors import InputError
from headscope.metrics.answers import log_prob
from headscope.metrics.rows import LogitRows, Metric


def _kl(rows: LogitRows) -> Float[Tensor, " row"]:
    if rows.clean is None:
        raise InputError("kl_divergence compares with the clean run: give its logits as clean=.")
    clean, here = rows.clean.log_softmax(1), rows.logits.log_softmax(1)
    return (clean.exp() * (clean - here)).sum(1).clamp_min(0)


loss = Metric(
    "loss",
    lambda rows: -log_prob(rows),
    unit="nats",
    bounds=(0.0, None),
    description="Mean cross-entropy per target; loss.by_position gives it token by token.",
)
kl_divergence = Metric(
    "kl_divergence",
    _kl,
    unit="nats",
    bounds=(0.0, None),
    description="KL(clean || edited) of the next-token distribution, mean over positions.",
    needs=frozenset({"clean"}),
)
