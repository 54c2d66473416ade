"""The metrics that headscope ships: answers, losses, distance from the clean run, recovery."""

from jaxtyping import Float
from torch import Tensor

from headscope.errors import InputError
from headscope.metrics.base import LogitRows, Metric


def log_prob(rows: LogitRows) -> Float[Tensor, " row"]:
    """Log-probability of each row's target."""
    return rows.of(rows.targets) - rows.logits.logsumexp(1)


def _logit_difference(rows: LogitRows) -> Float[Tensor, " row"]:
    foils = rows.targets if rows.foils is None else rows.foils  # reads() saw to it that there are
    return rows.of(rows.targets) - rows.of(foils)


def _rank(rows: LogitRows) -> Float[Tensor, " row"]:
    return (rows.logits > rows.of(rows.targets)[:, None]).sum(1).to(rows.logits.dtype)


def _correct(rows: LogitRows) -> Float[Tensor, " row"]:
    best = (rows.logits == rows.logits.amax(1, keepdim=True)).int().argmax(1)
    return (best == rows.targets).to(rows.logits.dtype)


logit_difference = Metric(
    "logit_difference",
    _logit_difference,
    unit="logits",
    description="Logit of the target less that of the foil.",
    needs=frozenset({"target", "foil"}),
)
answer_log_prob = Metric(
    "answer_log_prob",
    log_prob,
    unit="nats",
    bounds=(None, 0.0),
    description="Log-probability of the target.",
)
answer_probability = Metric(
    "answer_probability",
    lambda rows: log_prob(rows).exp(),
    unit="probability",
    bounds=(0.0, 1.0),
    description="Probability of the target.",
)
answer_rank = Metric(
    "answer_rank",
    _rank,
    unit="rank",
    bounds=(0.0, None),
    description="Number of tokens with a larger logit than the target; 0 is best.",
)
accuracy = Metric(
    "accuracy",
    _correct,
    unit="share",
    bounds=(0.0, 1.0),
    description="Share of targets with the largest logit; of equals the lowest token wins.",
)


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


def normalised_effect(
    value: Float[Tensor, "*any"],
    clean: Float[Tensor, "*any"],
    baseline: Float[Tensor, "*any"],
    tolerance: float = 1e-6,
) -> Float[Tensor, "*any"]:
    """``(value - baseline) / (clean - baseline)``: 1 as in the clean run, 0 as in the baseline.

    NaN where clean and baseline are less than ``tolerance`` apart.

    Example:
        >>> float(normalised_effect(*torch.tensor([3.0, 4.0, 2.0])))
        0.5
    """
    span = clean - baseline
    ratio = (value - baseline) / span
    return ratio.masked_fill(span.abs() < tolerance, float("nan"))
