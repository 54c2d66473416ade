"""What a kind of head is: what is measured, when a head is named, and what confirms it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from headscope import probes
from headscope.errors import HeadscopeError, InputError
from headscope.metrics import Metric
from headscope.models.protocol import HeadModel, lacks
from headscope.probes.probe import Probe
from headscope.scorer import DefaultProbe, Scorer
from headscope.scorers import CATALOGUE, between
from headscope.scoring.score import score
from headscope.table import HeadScores, HeadTable

Heads = Float[np.ndarray, "layer head"]


class Criterion(NamedTuple):
    """One condition of a kind.

    Attributes:
        what: is measured, in a few words.
        value: of every head, so that more is more of the kind.
        least: from which value on it counts.
        p: one-sided p-value of every head; None where the condition is a threshold alone.
    """

    what: str
    value: Heads
    least: float
    p: Heads | None = None


def above(scores: HeadScores, least: float | None = None) -> Criterion:
    """A score that is larger than its null, and at least as large as its threshold.

    Args:
        scores: with a null.
        least: default: the threshold of the score's declaration, else 0.

    Example:
        >>> hs.kinds.above(table["induction"]).least
        0.4
    """
    threshold = scores.threshold if least is None else least
    return Criterion(scores.name, scores.mean, threshold or 0.0, one_sided(scores, 1))


def below(scores: HeadScores, least: float = 0.0) -> Criterion:
    """A score with a sign that is below its null, by ``least`` at least below 0.

    Args:
        scores: with a null.
        least: how far below 0.

    Example:
        >>> effects = hs.ablate_heads(model, probe, hs.metrics.loss, "zero")
        >>> hs.kinds.below(effects).what
        'negative zero_ablation'
    """
    return Criterion(f"negative {scores.name}", -scores.mean, least, one_sided(scores, -1))


def one_sided(scores: HeadScores, sign: int) -> Heads:
    """p-value of a mean above (1) or below (-1) its null, from the one that the score has.

    Example:
        >>> p = hs.kinds.one_sided(table["induction"], 1)
        >>> bool((p == table["induction"].p_value)[np.isfinite(p)].all())
        True
    """
    p = scores.p_value
    if scores.alternative == "greater":
        return p if sign > 0 else 1 - p
    ahead = (scores.mean - scores.null) * sign > 0
    return np.where(ahead, p / 2, 1 - p / 2)


@dataclass(frozen=True, eq=False)
class Confirm:
    """What ablating a head of a kind should do.

    Attributes:
        probe: that is run, of what was asked.
        metric: whose change is measured; the ablation is to the head's mean.
        sign: 1 where the metric should rise, -1 where it should fall.
        said: the same in words.
    """

    probe: Callable[["AskedModel"], Probe]
    metric: Metric
    sign: int
    said: str


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of attention head, as a value.

    A head is named if every criterion holds. The p-value of a kind is the largest of its criteria's
    (an intersection-union test, which needs no correction for how many there are).

    Attributes:
        name: of the kind.
        said: what such a head does.
        probe, control: what is run, and what values are compared with, in words.
        measure: gives the criteria; raises an error of headscope, with a reason, where this model
            cannot be asked.
        source: of the definition.
        weakness: what else can look like it.
        confirm: None where no number depends on such a head alone.
        needs: capabilities of the model, as a scorer names them, and ``tokenizer``.
    """

    name: str
    said: str
    probe: str
    control: str
    measure: Callable[["AskedModel"], Sequence[Criterion]]
    source: str
    weakness: str
    confirm: Confirm | None = None
    needs: tuple[str, ...] = ()

    def lacking(self, model: HeadModel) -> str:
        """Why a model cannot be asked, before anything is run; empty where it may."""
        for need in self.needs:
            if need == "tokenizer":
                if model.tokenizer is None:
                    return f"{model.name} has no tokenizer, and it is asked with texts."
            elif (reason := lacks(model, need)) is not None:
                return reason
        return ""


@dataclass(frozen=True)
class Unasked:
    """A kind of the survey that no probe of ours can ask for.

    Attributes:
        name: of the kind.
        reason: what it would take.
        source: where it is described.
    """

    name: str
    reason: str
    source: str


class CannotAskError(InputError):
    """A kind cannot be asked of this model or tokenizer; the message is the reason."""


@dataclass(eq=False)
class AskedModel:
    """A model that is being asked, with the probes and scores that several kinds share.

    Attributes:
        model: that is asked.
        seed: of all probes.
        batch_size: examples per pass.
    """

    model: HeadModel
    seed: int = 0
    batch_size: int | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made under this key, or raised: once for all kinds."""
        if key not in self._kept:
            try:
                self._kept[key] = make(), None
            except HeadscopeError as error:
                self._kept[key] = None, error
        value, wrong = self._kept[key]
        if wrong is not None:
            raise wrong
        return value

    def probe(self, kind: DefaultProbe) -> Probe:
        """A scorer's default probe; of needles a shorter one, which one pass can afford."""
        suited = kind.suited(self.model)
        if not suited.possible(self.model):
            raise CannotAskError(f"{self.model.name} has no tokenizer for the probe {kind.name!r}.")
        make = _SHORTER.get(suited.name, suited.make)
        # By how it is made: texts and words have one probe under two declarations.
        made: Probe = self.keep(("probe", make), lambda: make(self.model, self.seed))
        return made

    def pairs(self, task: str) -> Probe:
        """Prompts of a known task: 16, or 8 where the tokenizer reads no more."""

        def make() -> Probe:
            try:
                return probes.pairs(self.model, task, batch=16, seed=self.seed)
            except InputError:
                return probes.pairs(self.model, task, batch=8, seed=self.seed)

        made: Probe = self.keep(("pairs", task), make)
        return made

    def scores(self, scorer: Scorer, beside: Sequence[Scorer] = ()) -> HeadScores:
        """A score on its scorer's default probe.

        Args:
            scorer: that is asked for.
            beside: scorers of the same probe that other kinds will ask for: one pass serves all
                that this model can be asked. The same for all of them, so that it is kept.

        Raises:
            CannotAskError: if the model lacks what the scorer needs.
        """
        for need in scorer.needs:
            if (reason := lacks(self.model, need)) is not None:
                raise CannotAskError(reason)
        if scorer.probe is None:
            raise CannotAskError(f"the scorer {scorer.name!r} has no probe of its own.")
        probe = self.probe(scorer.probe)
        suited = scorer.probe.suited(self.model).name
        others = [
            one
            for one in beside
            if one.probe is not None
            and one.probe.suited(self.model).name == suited
            and not self._lacks(one)
        ]
        asked = others if any(one is scorer for one in others) else [scorer]
        return self.table(probe, asked)[scorer.name]

    def _lacks(self, scorer: Scorer) -> bool:
        return any(lacks(self.model, need) is not None for need in scorer.needs)

    def table(self, probe: Probe, scorers: Sequence[Scorer]) -> HeadTable:
        """Scores of a probe in one pass, kept for whoever asks for the same again."""
        key = (_Same(probe), *(one.name for one in scorers))
        found: HeadTable = self.keep(
            key,
            lambda: score(
                self.model, probe, list(scorers), batch_size=self.batch_size, progress=False
            ),
        )
        return found

    def attention(self, probe: Probe, mark: str, query: str = "end") -> HeadScores:
        """Attention from one mark of a probe to another, against attention spread evenly.

        The first time, attention to all marks of the probe and direct effects on its answer are
        measured in the same pass.
        """
        return self._of_marks(probe, query)[_ATTENTION.format(mark=mark)]

    def effect(self, probe: Probe) -> HeadScores:
        """Direct effect on the logit of the target less that of the foil, against none.

        Raises:
            CannotAskError: if the model's logits are not a sum of what its heads write.
        """
        own = CATALOGUE[_EFFECT]
        for need in own.needs:
            if (reason := lacks(self.model, need)) is not None:
                raise CannotAskError(reason)
        found = self._of_marks(probe, "end")[own.name]
        return HeadScores.from_effects(
            found.spec, found.per_example, kv_heads=found.kv_heads, provenance=found.provenance
        )

    def _of_marks(self, probe: Probe, query: str) -> HeadTable:
        scorers = [
            between(query, mark, name=_ATTENTION.format(mark=mark))
            for mark in probe.marks
            if mark != query
        ]
        own = CATALOGUE[_EFFECT]
        answered = probe.foils is not None and query == "end"
        if answered and not self._lacks(own):
            scorers.append(own)
        return self.table(probe, scorers)


@dataclass(frozen=True)
class _Same:
    """A key that stands for a probe itself, and keeps it alive as long as it is known."""

    probe: Probe

    def __hash__(self) -> int:
        """By identity."""
        return id(self.probe)

    def __eq__(self, other: object) -> bool:
        """By identity."""
        return isinstance(other, _Same) and other.probe is self.probe


def _short_needle(model: HeadModel, seed: int) -> Probe:
    """Fifteen needles in texts of 256 tokens, or of what the model reads."""
    length = min(256, model.shape.n_ctx or 256)
    return probes.needle(model, lengths=length, depths=5, per_cell=3, seed=seed)


_SHORTER: Mapping[str, Callable[[Any, int], Probe]] = {"needle": _short_needle}
_EFFECT = "direct_logit_difference"
_ATTENTION = "attention to {mark}"
