"""Metrics: one number per example from the logits, as frozen values.

A metric says which positions it reads, so that logits are computed only there. By default these are
the positions that have a target; ``metric.at("end")`` reads a mark of the probe instead. An example
with several such positions gets their mean, and one with none gets NaN. A metric is also a plain
function of whole logits: ``hs.metrics.loss(model.forward(probe.tokens), probe)``. Conversely a
function ``f(logits [batch pos d_vocab], probe) -> [batch]`` can be used as a metric.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.specs import Direction, ScoreSpec, Specified
from headscope.errors import InputError, nearest


@runtime_checkable
class Answered(Protocol):
    """What a metric reads from a probe (or from one batch of it)."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """False at padding."""

    @property
    def targets(self) -> Int[Tensor, "batch pos"]:
        """Target token at each position; -1 for none."""

    @property
    def foils(self) -> Int[Tensor, "batch pos"] | None:
        """Foil (wrong alternative) for each target."""

    @property
    def marks(self) -> Mapping[str, Bool[Tensor, "batch pos"]]:
        """Named sets of positions."""

    def mark(self, name: str) -> Bool[Tensor, "batch pos"]:
        """Positions with one mark."""


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Logits at the positions that a metric reads, one row each, in fp32.

    Attributes:
        targets: -1 if there is none.
        foils: None if the probe has none.
        clean: logits of the unedited run; None if the metric does not ask for them.
    """

    logits: Float[Tensor, "row d_vocab"]
    targets: Int[Tensor, " row"]
    foils: Int[Tensor, " row"] | None = None
    clean: Float[Tensor, "row d_vocab"] | None = None

    def of(self, tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Logit of one given token per row."""
        return self.logits.gather(1, tokens[:, None]).squeeze(1)


@dataclass(frozen=True, eq=False)
class Metric(Specified):
    """Metric of the logits: one value per position, averaged over each example's positions.

    Attributes:
        spec: name, unit, bounds, direction and other facts.
        value: function from rows to values.
        needs: which of ``target``, ``foil`` and ``clean`` the logits are compared with;
            ``embedding`` for a metric of embeddings instead of logits, ``pair`` for one that
            compares an example with its partner.
        mark: mark of the positions that it reads; None: those with a target (and a foil, if it
            needs one).
    """

    spec: ScoreSpec
    value: Callable[[LogitRows], Float[Tensor, " row"]]
    needs: frozenset[str] = frozenset({"target"})
    mark: str | None = None

    def at(self, mark: str) -> "Metric":
        """Return the same metric read only at positions with this mark (that have a target)."""
        return replace(self, mark=mark)

    def reads(self, probe: Answered) -> Bool[Tensor, "batch pos"]:
        """Mask of the positions whose logits it reads.

        Raises:
            InputError: if there are none.
        """
        # Each image is represented by a single position.
        speaking: Bool[Tensor, "batch pos"] = getattr(probe, "answering", probe.real)
        answered = speaking & (probe.targets >= 0)
        if "foil" in self.needs:
            if probe.foils is None:
                raise InputError(
                    f"{self.name} compares the target with a foil, and this probe has no foils: "
                    "use a probe of pairs, or another metric."
                )
            answered = answered & (probe.foils >= 0)
        if self.mark is None:
            any_target = "target" in self.needs or bool(answered.any())
            read = answered if any_target else speaking
        else:
            read = probe.mark(self.mark) & (answered if "target" in self.needs else speaking)
        if not bool(read.any()):
            what = f"mark {self.mark!r}" if self.mark is not None else "target"
            raise InputError(
                f"{self.name} has nothing to read: no position of the probe has a {what}"
                f"{' and a target' if self.mark is not None and 'target' in self.needs else ''}; "
                "for an encoder, hs.probes.masked hides tokens and asks for them."
            )
        return read

    def by_position(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        probe: Answered,
        clean: Float[Tensor, "batch pos d_vocab"] | None = None,
    ) -> Float[Tensor, "batch pos"]:
        """Value at every position read; NaN elsewhere."""
        read = self.reads(probe).to(logits.device)
        rows = rows_of(logits[read], probe, read, None if clean is None else clean[read])
        values = torch.full(read.shape, float("nan"), dtype=torch.float32, device=logits.device)
        values[read] = self.value(rows)
        return values

    def __call__(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        probe: Answered,
        clean: Float[Tensor, "batch pos d_vocab"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Value of each example: the mean over the positions read."""
        return self.by_position(logits, probe, clean).nanmean(1)


@dataclass(frozen=True, eq=False)
class WholeMetric(Specified):
    """Metric made from a user's function of all logits and the batch's probe."""

    function: Callable[..., Tensor]
    spec: ScoreSpec
    needs: frozenset[str] = frozenset()

    def reads(self, probe: Answered) -> Bool[Tensor, "batch pos"]:
        """Mask of the positions it reads: all."""
        return torch.ones_like(probe.real)

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"], probe: Answered
    ) -> Float[Tensor, " batch"]:
        """Call the function and check that it returns one number per example."""
        values = self.function(logits, probe)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            raise InputError(
                f"the metric {self.name!r} must give one number per example, a tensor of shape "
                f"[{len(logits)}]; it gave {getattr(values, 'shape', type(values).__name__)}."
            )
        return values


AnyMetric = Metric | WholeMetric


@checked
def as_metric(metric: Metric | WholeMetric | Callable[..., Tensor]) -> AnyMetric:
    """Return a metric unchanged, and wrap a plain function in a :class:`WholeMetric`.

    Args:
        metric: metric, or a function ``f(logits, probe) -> [batch]``.

    Returns:
        The metric.

    Raises:
        InputError: if it is neither.

    Example:
        >>> as_metric(lambda logits, probe: logits.amax((1, 2))).name
        'lambda'
    """
    if isinstance(metric, Metric | WholeMetric):
        return metric
    if not callable(metric):
        raise InputError(f"a metric is a value of headscope.metrics or a function; got {metric!r}.")
    return WholeMetric(metric, ScoreSpec(getattr(metric, "__name__", "metric").strip("<>")))


@checked
def cost_sign(metric: AnyMetric, better: Direction | None = None) -> int:
    """Sign of damage: 1 if a higher metric is worse, -1 if a lower one is.

    Args:
        metric: one of :mod:`headscope.metrics`, or a user's.
        better: ``"higher"`` or ``"lower"``; needed if the metric does not declare it.

    Raises:
        InputError: if the direction is unknown.

    Example:
        >>> cost_sign(hs.metrics.loss), cost_sign(hs.metrics.accuracy)
        (1, -1)
    """
    known = better or metric.spec.direction
    if known not in ("higher", "lower"):
        raise InputError(
            f"metric {metric.name!r} has no direction: pass better='higher' or better='lower'."
        )
    return 1 if known == "lower" else -1


@checked
def rows_of(
    logits: Float[Tensor, "row d_vocab"],
    probe: Answered,
    read: Bool[Tensor, "batch pos"],
    clean: Float[Tensor, "row d_vocab"] | None = None,
) -> LogitRows:
    """Build the rows of a batch with their targets, foils and clean logits.

    Args:
        logits: logits at the positions that are read, ``[row d_vocab]``.
        probe: examples with targets.
        read: mask of those positions, ``[batch pos]``.
        clean: logits of the clean run at the same positions.

    Returns:
        Rows for a metric's function.

    Example:
        >>> len(rows_of(torch.zeros(40, 9), probe, probe.targets >= 0).targets)
        40
    """
    device = logits.device
    where = read.to(probe.targets.device)
    return LogitRows(
        logits.float(),
        probe.targets[where].to(device),
        None if probe.foils is None else probe.foils[where].to(device),
        None if clean is None else clean.float(),
    )


POOLINGS = ("own", "first", "mean")


def _log_prob(rows: LogitRows) -> Float[Tensor, " row"]:
    """Log-probability of each row's target."""
    return rows.of(rows.targets) - rows.logits.logsumexp(1)


def _logit_difference(rows: LogitRows) -> Float[Tensor, " row"]:
    foils = rows.targets if rows.foils is None else rows.foils  # reads() checks that they exist
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
        description="Logit of the target minus that of the foil.",
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
    _log_prob,
)
answer_probability = Metric(
    ScoreSpec(
        "answer_probability",
        unit="probability",
        bounds=(0.0, 1.0),
        direction="higher",
        description="Probability of the target.",
    ),
    lambda rows: _log_prob(rows).exp(),
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
        description="Share of targets with the largest logit; on ties the lowest token wins.",
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
    lambda rows: -_log_prob(rows),
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
    """Metric of one embedding per example, without logits.

    Attributes:
        pooling: how the vector is pooled: ``own``, the one that the model itself returns
            (``image_embeds``, ``text_embeds``, ``pooler_output``); ``first``, the first position of
            the last hidden states (a class token); ``mean``, their mean over real positions; None:
            ``own`` for image models and causal text models that return one, otherwise ``first`` for
            an image and ``mean`` for a text.
    """

    pooling: str | None = None

    def pooled(self, pooling: str) -> "EmbeddingMetric":
        """Return the same metric with another pooling.

        Args:
            pooling: see :class:`EmbeddingMetric`.

        Raises:
            InputError: if the pooling is unknown.

        Example:
            >>> hs.metrics.embedding_cosine.pooled("mean").name
            'embedding_cosine_mean'
        """
        if pooling not in POOLINGS:
            raise InputError(nearest(pooling, POOLINGS, kind="pooling"))
        spec = replace(self.spec, name=f"{self.name.removesuffix(f'_{self.pooling}')}_{pooling}")
        return replace(self, spec=spec, pooling=pooling)

    def reads(self, probe: Answered) -> Bool[Tensor, "batch pos"]:
        """Mask of each example's first real position, where its embedding is stored.

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
        raise InputError(
            "this metric compares embeddings with other embeddings: pass those as clean=."
        )
    cosine: Tensor = torch.nn.functional.cosine_similarity(rows.logits, rows.clean, dim=1)
    return cosine.clamp(-1, 1)


def _distance(rows: LogitRows) -> Float[Tensor, " row"]:
    if rows.clean is None:
        raise InputError(
            "embedding_distance compares with the clean run: pass its embeddings as clean=."
        )
    distance: Tensor = (rows.logits - rows.clean).norm(dim=1)
    return distance


embedding_cosine = EmbeddingMetric(
    ScoreSpec(
        "embedding_cosine",
        unit="cosine",
        bounds=(-1.0, 1.0),
        direction="higher",
        description="Cosine similarity of an example's embedding to that of the clean run.",
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
        description="Euclidean distance of an example's embedding from that of the clean run.",
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
        description="Cosine similarity of an example's embedding to its partner's clean one.",
    ),
    _cosine,
    needs=frozenset({"pair", "embedding"}),
)


@checked
def normalised_effect(
    value: Float[Tensor, "*any"],
    clean: Float[Tensor, "*any"],
    baseline: Float[Tensor, "*any"],
    tolerance: float = 1e-6,
) -> Float[Tensor, "*any"]:
    """``(value - baseline) / (clean - baseline)``: 1 as in the clean run, 0 as in the baseline.

    NaN where clean and baseline are less than ``tolerance`` apart.

    Args:
        value: metric of the run to rate.
        clean: metric of the clean run.
        baseline: metric of the corrupted run.
        tolerance: smallest gap between clean and baseline.

    Returns:
        Normalised effect, without a unit.

    Example:
        >>> float(normalised_effect(*torch.tensor([3.0, 4.0, 2.0])))
        0.5
    """
    span = clean - baseline
    ratio = (value - baseline) / span
    return ratio.masked_fill(span.abs() < tolerance, float("nan"))
