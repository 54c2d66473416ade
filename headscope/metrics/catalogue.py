"""The metrics that headscope ships: answers, losses, distance from the clean run, recovery."""

from jaxtyping import Float
from torch import Tensor

from headscope.base.specs import ScoreSpec
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
    ScoreSpec(
        "logit_difference",
        unit="logits",
        direction="higher",
        description="Logit of the target less that of the foil.",
    ),
    _logit_difference,
    needs=frozenset({"target", "foil"}),
)
answer_log_prob = Metric(
    ScoreSpec(
        "answer_log_prob",
        unit="nats",
        bounds=(None, 0.0),
        direction="higher",
        description="Log-probability of the target.",
    ),
    log_prob,
)
answer_probability = Metric(
    ScoreSpec(
        "answer_probability",
        unit="probability",
        bounds=(0.0, 1.0),
        direction="higher",
        description="Probability of the target.",
    ),
    lambda rows: log_prob(rows).exp(),
)
answer_rank = Metric(
    ScoreSpec(
        "answer_rank",
        unit="rank",
        bounds=(0.0, None),
        direction="lower",
        description="Number of tokens with a larger logit than the target; 0 is best.",
    ),
    _rank,
)
accuracy = Metric(
    ScoreSpec(
        "accuracy",
        unit="share",
        bounds=(0.0, 1.0),
        direction="higher",
        description="Share of targets with the largest logit; of equals the lowest token wins.",
    ),
    _correct,
)


def _kl(rows: LogitRows) -> Float[Tensor, " row"]:
    if rows.clean is None:
        raise InputError("kl_divergence compares with the clean run: give its logits as clean=.")
    clean, here = rows.clean.log_softmax(1), rows.logits.log_softmax(1)
    return (clean.exp() * (clean - here)).sum(1).clamp_min(0)


loss = Metric(
    ScoreSpec(
        "loss",
        unit="nats",
        bounds=(0.0, None),
        direction="lower",
        description="Mean cross-entropy per target; loss.by_position gives it token by token.",
    ),
    lambda rows: -log_prob(rows),
)
kl_divergence = Metric(
    ScoreSpec(
        "kl_divergence",
        unit="nats",
        bounds=(0.0, None),
        direction="lower",
        description="KL(clean || edited) of the next-token distribution, mean over positions.",
    ),
    _kl,
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
