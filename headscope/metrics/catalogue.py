"""The metrics that headscope ships: answers, losses, distance from the clean run, recovery."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.specs import ScoreSpec
from headscope.errors import InputError, nearest
from headscope.metrics.base import Answered, LogitRows, Metric

POOLINGS = ("own", "first", "mean")


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


def _js(rows: LogitRows) -> Float[Tensor, " row"]:
    if rows.clean is None:
        raise InputError("js_divergence compares with the clean run: give its logits as clean=.")
    clean, here = rows.clean.log_softmax(1), rows.logits.log_softmax(1)
    middle = torch.logaddexp(clean, here) - math.log(2)
    parts = clean.exp() * (clean - middle) + here.exp() * (here - middle)
    return (parts.sum(1) / 2).clamp(0, math.log(2))


js_divergence = Metric(
    ScoreSpec(
        "js_divergence",
        unit="nats",
        bounds=(0.0, math.log(2)),
        direction="lower",
        description="Jensen-Shannon divergence of the outputs of the clean and the edited run.",
    ),
    _js,
    needs=frozenset({"clean"}),
)


@dataclass(frozen=True, eq=False)
class EmbeddingMetric(Metric):
    """A number of what a model makes of a whole example, without logits.

    Attributes:
        pooling: which vector that is: ``own``, what the model itself returns for it
            (``image_embeds``, ``text_embeds``, ``pooler_output``); ``first``, the first position
            of the last hidden states (a class token); ``mean``, their mean over real positions;
            None: ``own`` of models of images and of causal ones of texts, where they return it,
            else ``first`` of an image and ``mean`` of a text.
    """

    pooling: str | None = None

    def pooled(self, pooling: str) -> "EmbeddingMetric":
        """The same metric of another vector.

        Args:
            pooling: see :class:`EmbeddingMetric`.

        Raises:
            InputError: if it is none of the three.

        Example:
            >>> hs.metrics.embedding_cosine.pooled("mean").name
            'embedding_cosine_mean'
        """
        if pooling not in POOLINGS:
            raise InputError(nearest(pooling, POOLINGS, kind="pooling"))
        spec = replace(self.spec, name=f"{self.name.removesuffix(f'_{self.pooling}')}_{pooling}")
        return replace(self, spec=spec, pooling=pooling)

    def reads(self, probe: Answered) -> Bool[Tensor, "batch pos"]:
        """First real position, at which the vector of an example stands.

        Raises:
            InputError: if the metric needs a pair and the probe has none.
        """
        if "pair" in self.needs and getattr(probe, "corrupt", None) is None:
            raise InputError(
                f"{self.name} compares every example with its partner, and this probe has none: "
                "make one with hs.probes.paired(first, second)."
            )
        first = probe.real.int().argmax(1)
        return torch.zeros_like(probe.real).scatter(1, first[:, None], True)


def _cosine(rows: LogitRows) -> Float[Tensor, " row"]:
    if rows.clean is None:
        raise InputError("this compares vectors with others: give those as clean=.")
    cosine: Tensor = torch.nn.functional.cosine_similarity(rows.logits, rows.clean, dim=1)
    return cosine.clamp(-1, 1)


def _distance(rows: LogitRows) -> Float[Tensor, " row"]:
    if rows.clean is None:
        raise InputError("embedding_distance compares with the clean run: give it as clean=.")
    distance: Tensor = (rows.logits - rows.clean).norm(dim=1)
    return distance


embedding_cosine = EmbeddingMetric(
    ScoreSpec(
        "embedding_cosine",
        unit="cosine",
        bounds=(-1.0, 1.0),
        direction="higher",
        description="Cosine of the embedding of an example to that of the clean run.",
    ),
    _cosine,
    needs=frozenset({"clean", "embedding"}),
)
embedding_distance = EmbeddingMetric(
    ScoreSpec(
        "embedding_distance",
        unit="norm",
        bounds=(0.0, None),
        direction="lower",
        description="Euclidean distance of the embedding of an example to that of the clean run.",
    ),
    _distance,
    needs=frozenset({"clean", "embedding"}),
)
similarity = EmbeddingMetric(
    ScoreSpec(
        "similarity",
        unit="cosine",
        bounds=(-1.0, 1.0),
        direction="higher",
        description="Cosine of the embedding of an example to its partner's in the clean run.",
    ),
    _cosine,
    needs=frozenset({"pair", "embedding"}),
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
