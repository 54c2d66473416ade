"""Ask a model for every kind of head, correct over heads and kinds, and confirm by ablation."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float

from headscope.ablation.heads import ablate_heads
from headscope.base.files import writable_folder
from headscope.base.options import RunOptions, track
from headscope.base.saved import Saved
from headscope.base.statistics import benjamini_hochberg
from headscope.errors import HeadscopeError, InputError, nearest
from headscope.heads import HeadIndex
from headscope.kinds.catalogue import KINDS, UNASKED
from headscope.kinds.kind import AskedModel, Criterion, Kind, one_sided
from headscope.metrics import Metric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.probes.probe import Probe
from headscope.table import HeadScores, versions
from headscope.table.kinds import Finding, KindFacts, KindTable

_Part = TypeVar("_Part", bound=Saved)
_MOST_ABLATED = 16  # heads of a kind, the clearest first


@dataclass(frozen=True, eq=False)
class KindAnswer(Saved):
    """What a kind's criteria say of every head, or why it could not be asked.

    Attributes:
        reason: empty where it was asked.
        value: of the first criterion; NaN where there is no head.
        holds: whether all criteria are at their thresholds.
        p: the largest of the criteria's p-values.
        rule: thresholds, in words.
    """

    reason: str
    value: Float[np.ndarray, "layer head"]
    holds: Bool[np.ndarray, "layer head"]
    p: Float[np.ndarray, "layer head"]
    rule: str = ""


@dataclass(frozen=True, eq=False)
class KindEffects(Saved):
    """What ablating the heads of a kind does to the kind's metric.

    Attributes:
        mean: change of the metric, by head.
        p: one-sided p-value of the change that the kind foretells.
        reason: why nothing was ablated; empty where heads were.
    """

    mean: Float[np.ndarray, " head"]
    p: Float[np.ndarray, " head"]
    reason: str = ""


@own_types()
def survey(
    model: HeadModel,
    kinds: Iterable[str | Kind] | str | Kind | None = None,
    *,
    confirm: bool = True,
    alpha: float = 0.05,
    seed: int = 0,
    batch_size: int | None = None,
    folder: "str | Path | None" = None,
    progress: bool | None = None,
) -> KindTable:
    """Ask which heads are of which kind, how sure that is, and what ablation says of it.

    A head is named if all criteria of a kind hold and the kind's p-value, corrected over all heads
    and kinds that were asked together (Benjamini and Hochberg 1995), is below alpha. Named heads
    are then ablated one by one to their means, on what the kind was asked with: ``confirmed`` says
    whether the metric moves as it should, corrected over all heads that were ablated. A head may
    be of a kind and not be needed, since others may do the same.

    Kinds that share a probe share its pass. With a folder every kind is kept there as soon as it
    has been asked: the same survey, started again after it was stopped, goes on from there.

    Args:
        model: from :func:`headscope.load`.
        kinds: names of :data:`headscope.kinds.KINDS`, or kinds of yours; default: all.
        confirm: also ablate.
        alpha: share of false names that is accepted.
        seed: of all probes.
        batch_size: examples per pass.
        folder: where finished kinds are kept; those of the catalogue only, since another kind's
            name does not tell what it measures.
        progress: show a bar.

    Returns:
        ``.findings``, ``.named(kind)``, ``.of(head)``, ``.left_out`` (kind -> reason).

    Raises:
        InputError: for an unknown kind, one without a p-value, an alpha that is not a share, or a
            folder that cannot be written.

    Source: Zheng et al. 2024 (arXiv 2409.03752), survey of attention heads.

    Example:
        >>> found = hs.kinds.survey(model, ["induction", "previous_token"], confirm=False)
        >>> len(found.asked)
        2
    """
    if not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise InputError(f"alpha={alpha!r} is a share between 0 and 1.")
    RunOptions(batch_size, seed=seed, progress=progress)
    wanted = _wanted(kinds)
    asked = AskedModel(model, seed, batch_size)
    parts = _Parts.of(model, seed, folder)
    answers: dict[str, KindAnswer] = {}
    facts: list[KindFacts] = []
    with track(len(wanted), f"kinds of heads of {model.name}", show=progress) as advance:
        for kind in wanted:
            answer = parts.kept(KindAnswer, kind, [], partial(_ask, asked, kind))
            if not answer.reason:
                answers[kind.name] = answer
            facts.append(_facts_of(kind, answer))
            advance()
    adjusted = _adjusted(answers)
    findings = [
        Finding(kind.name, head, float(answers[kind.name].value[head]),
                float(adjusted[kind.name][head]))
        for kind in wanted
        if kind.name in answers
        for head in _named(answers[kind.name], adjusted[kind.name], alpha)
    ]  # fmt: skip
    if confirm:
        by_name = {kind.name: kind for kind in wanted}
        findings = _confirmed(asked, by_name, findings, alpha, parts, progress)
    if kinds is None:
        facts += [
            KindFacts(one.name, "", "", "", "", one.source, "", reason=one.reason)
            for one in UNASKED
        ]
    return KindTable(
        kinds=tuple(facts),
        findings=tuple(findings),
        values={name: answer.value for name, answer in answers.items()},
        p_adjusted=adjusted,
        alpha=float(alpha),
        heads=len(model.shape.heads),
        provenance=origin(model, seed=seed),
    )


def _wanted(kinds: Iterable[str | Kind] | str | Kind | None) -> list[Kind]:
    if kinds is None:
        return list(KINDS.values())
    listed = [kinds] if isinstance(kinds, str | Kind) else list(kinds)
    left_out = {one.name: one.reason for one in UNASKED}
    found = []
    for one in listed:
        if isinstance(one, str) and one in left_out:
            raise InputError(f"the kind {one!r} cannot be asked of a model alone: {left_out[one]}")
        if isinstance(one, str) and one not in KINDS:
            raise InputError(nearest(one, KINDS, kind="kind of head"))
        found.append(KINDS[one] if isinstance(one, str) else one)
    if not found:
        raise InputError("no kinds given: name one at least, or leave them out for all.")
    return found


@dataclass(frozen=True)
class _Parts:
    """Files of finished kinds; each is whole or absent."""

    folder: Path | None
    facts: tuple[str, ...]

    @classmethod
    def of(cls, model: HeadModel, seed: int, folder: "str | Path | None") -> "_Parts":
        """Make the folder before anything runs.

        Raises:
            InputError: if nothing can be written there.
        """
        if folder is None:
            return cls(None, ())
        place = writable_folder(Path(folder))
        said = (model.digest(), str(model.dtype), str(seed), versions().get("headscope", ""))
        return cls(place, said)

    def kept(
        self, kept: type[_Part], kind: Kind, heads: Sequence[HeadIndex], make: Callable[[], _Part]
    ) -> _Part:
        """What an earlier run found, or what this one does, which is then kept."""
        if self.folder is None or KINDS.get(kind.name) is not kind:
            return make()
        words = (*self.facts, kept.__name__, kind.name, *map(str, heads))
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        what = "effects" if heads else "heads"
        file = self.folder / f"{kind.name}-{what}-{digest}.safetensors"
        if file.exists():
            with suppress(InputError):  # a damaged one is made again
                return kept.load(file)
        made = make()
        made.save(file)
        return made


def _ask(asked: AskedModel, kind: Kind) -> KindAnswer:
    """What a kind's criteria say, or why it could not be asked."""
    reason = kind.lacking(asked.model)
    if not reason:
        try:
            return _answer(kind, kind.measure(asked), asked.model)
        except CannotTestError:
            raise
        except HeadscopeError as error:
            reason = str(error)
    nothing = np.full((asked.model.shape.n_layers, asked.model.shape.n_heads), np.nan)
    return KindAnswer(reason, nothing, np.isfinite(nothing), nothing)


class CannotTestError(InputError):
    """A kind's criteria give no p-value, so that nothing says how sure a name is."""


def _answer(kind: Kind, criteria: Sequence[Criterion], model: HeadModel) -> KindAnswer:
    """Join the criteria.

    Raises:
        CannotTestError: if none has a p-value.
    """
    if all(one.p is None for one in criteria):
        raise CannotTestError(
            f"the kind {kind.name!r} has no criterion with a p-value: without one every head "
            "counts as certain, and the correction of all other kinds would be too lenient."
        )
    first = criteria[0]
    there = np.zeros(first.value.shape, dtype=bool)
    there[tuple(np.transpose(model.shape.heads))] = True
    holds = there.copy()
    p = np.zeros(first.value.shape)
    for one in criteria:
        holds &= np.nan_to_num(one.value, nan=-np.inf) >= one.least
        if one.p is not None:
            p = np.maximum(p, np.nan_to_num(one.p, nan=1.0))
    said = ", ".join(f"{one.what} >= {one.least:g}" for one in criteria)
    value = np.where(there, first.value, np.nan)
    return KindAnswer("", value, holds, np.where(there, p, np.nan), said)


def _facts_of(kind: Kind, answer: KindAnswer) -> KindFacts:
    return KindFacts(
        kind.name, kind.said, kind.probe, kind.control, answer.rule, kind.source, kind.weakness,
        "" if kind.confirm is None else kind.confirm.said, answer.reason,
    )  # fmt: skip


def _adjusted(answers: Mapping[str, KindAnswer]) -> dict[str, Float[np.ndarray, "layer head"]]:
    """p-values corrected over all heads and kinds together."""
    if not answers:
        return {}
    together = benjamini_hochberg(np.stack([answer.p for answer in answers.values()]))
    return dict(zip(answers, together, strict=True))


def _named(
    answer: KindAnswer, adjusted: Float[np.ndarray, "layer head"], alpha: float
) -> list[HeadIndex]:
    chosen = answer.holds & (np.nan_to_num(adjusted, nan=1.0) < alpha)
    heads = [HeadIndex(int(layer), int(head)) for layer, head in np.argwhere(chosen)]
    return sorted(heads, key=lambda head: (-answer.value[head], head))


def _confirmed(
    asked: AskedModel,
    kinds: Mapping[str, Kind],
    findings: Sequence[Finding],
    alpha: float,
    parts: _Parts,
    progress: bool | None,
) -> list[Finding]:
    """Findings with the effects of ablating them."""
    effects: dict[tuple[str, HeadIndex], tuple[float, float]] = {}
    ablated = _Ablated(asked, {})
    plans = {
        name: [one.head for one in findings if one.kind == name][:_MOST_ABLATED]
        for name in dict.fromkeys(one.kind for one in findings)
        if kinds[name].confirm is not None
    }
    with track(sum(map(len, plans.values())), "ablating heads", show=progress) as advance:
        for name, heads in plans.items():
            kind = kinds[name]
            found = parts.kept(KindEffects, kind, heads, partial(ablated.of, kind, heads))
            if not found.reason:
                pairs = zip(found.mean.tolist(), found.p.tolist(), strict=True)
                effects |= zip([(name, head) for head in heads], pairs, strict=True)
            advance(len(heads))
    adjusted = benjamini_hochberg(np.array([p for _, p in effects.values()]))
    corrected = dict(zip(effects, adjusted.tolist(), strict=True))
    return [
        one
        if (one.kind, one.head) not in effects
        else replace(
            one,
            effect=effects[one.kind, one.head][0],
            effect_p=corrected[one.kind, one.head],
            confirmed=bool(corrected[one.kind, one.head] < alpha),
        )
        for one in findings
    ]


@dataclass(frozen=True)
class _Ablated:
    """Effects of ablating heads, so that kinds with the same probe and metric share them."""

    asked: AskedModel
    known: dict[tuple[Probe, Metric], dict[HeadIndex, HeadScores]]

    def of(self, kind: Kind, heads: Sequence[HeadIndex]) -> KindEffects:
        """Mean-ablate heads one by one on what their kind was asked with."""
        plan, nothing = kind.confirm, np.empty(0)
        assert plan is not None  # noqa: S101  # those without were left out
        try:
            probe = plan.probe(self.asked)
            known = self.known.setdefault((probe, plan.metric), {})
            missing = [head for head in heads if head not in known]
            if missing:
                scores = ablate_heads(
                    self.asked.model, probe, plan.metric, heads=missing,
                    batch_size=self.asked.batch_size, progress=False,
                )  # fmt: skip
                known |= dict.fromkeys(missing, scores)
        except HeadscopeError as error:
            return KindEffects(nothing, nothing, str(error))
        return KindEffects(
            np.array([known[head].mean[head] for head in heads]),
            np.array([one_sided(known[head], plan.sign)[head] for head in heads]),
        )
