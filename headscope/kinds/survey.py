"""Ask a model for every kind of head, correct over heads and kinds, and confirm by ablation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from headscope.ablation.heads import ablate_heads
from headscope.base.options import RunOptions
from headscope.base.progress import track
from headscope.base.statistics import benjamini_hochberg
from headscope.errors import HeadscopeError, InputError, nearest
from headscope.heads import HeadIndex
from headscope.kinds.catalogue import KINDS, UNASKED
from headscope.kinds.kind import AskedModel, Criterion, Kind
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.table.kinds import Finding, KindFacts, KindTable

_MOST_ABLATED = 16  # heads of a kind, the clearest first


class _Answer(NamedTuple):
    """What a kind's criteria say of every head."""

    value: Float[np.ndarray, "layer head"]
    holds: np.ndarray
    p: Float[np.ndarray, "layer head"]
    rule: str


@own_types()
def survey(
    model: HeadModel,
    kinds: Iterable[str | Kind] | str | Kind | None = None,
    *,
    confirm: bool = True,
    alpha: float = 0.05,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> KindTable:
    """Ask which heads are of which kind, how sure that is, and what ablation says of it.

    A head is named if all criteria of a kind hold and the kind's p-value, corrected over all heads
    and kinds that were asked together (Benjamini and Hochberg 1995), is below alpha. Named heads
    are then ablated one by one to their means, on what the kind was asked with: ``confirmed`` says
    whether the metric moves as it should, corrected over all heads that were ablated. Ablation
    needs more than one effect per head to be wrong, so that a head may be of a kind and not be
    needed: others may do the same.

    Args:
        model: from :func:`headscope.load`.
        kinds: names of :data:`headscope.kinds.KINDS`, or kinds of yours; default: all.
        confirm: also ablate.
        alpha: share of false names that is accepted.
        seed: of all probes.
        batch_size: examples per pass.
        progress: show a bar.

    Returns:
        ``.findings``, ``.named(kind)``, ``.of(head)``, ``.left_out`` (kind -> reason).

    Raises:
        InputError: for an unknown kind, or an alpha that is not a share.

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
    answers: dict[str, _Answer] = {}
    facts: list[KindFacts] = []
    with track(len(wanted), f"kinds of heads of {model.name}", show=progress) as advance:
        for kind in wanted:
            reason, answer = _ask(asked, kind)
            if answer is not None:
                answers[kind.name] = answer
            facts.append(_facts_of(kind, reason, answer))
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
        findings = _confirmed(asked, {kind.name: kind for kind in wanted}, findings, alpha)
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


def _ask(asked: AskedModel, kind: Kind) -> tuple[str, _Answer | None]:
    """Why a kind could not be asked, or what its criteria say."""
    reason = kind.lacking(asked.model)
    if reason:
        return reason, None
    try:
        criteria = kind.measure(asked)
    except HeadscopeError as error:
        return str(error), None
    return "", _answer(criteria, asked.model)


def _answer(criteria: Sequence[Criterion], model: HeadModel) -> _Answer:
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
    return _Answer(first.value, holds, np.where(there, p, np.nan), said)


def _facts_of(kind: Kind, reason: str, answer: _Answer | None) -> KindFacts:
    return KindFacts(
        kind.name, kind.said, kind.probe, kind.control, "" if answer is None else answer.rule,
        kind.source, kind.weakness, "" if kind.confirm is None else kind.confirm.said, reason,
    )  # fmt: skip


def _adjusted(answers: Mapping[str, _Answer]) -> dict[str, Float[np.ndarray, "layer head"]]:
    """p-values corrected over all heads and kinds together."""
    if not answers:
        return {}
    together = benjamini_hochberg(np.stack([answer.p for answer in answers.values()]))
    return dict(zip(answers, together, strict=True))


def _named(
    answer: _Answer, adjusted: Float[np.ndarray, "layer head"], alpha: float
) -> list[HeadIndex]:
    chosen = answer.holds & (np.nan_to_num(adjusted, nan=1.0) < alpha)
    heads = [HeadIndex(int(layer), int(head)) for layer, head in np.argwhere(chosen)]
    return sorted(heads, key=lambda head: (-answer.value[head], head))


def _confirmed(
    asked: AskedModel, kinds: Mapping[str, Kind], findings: Sequence[Finding], alpha: float
) -> list[Finding]:
    """Findings with the effects of ablating them."""
    effects: dict[tuple[str, HeadIndex], tuple[float, float]] = {}
    known: dict[Any, Any] = {}
    for name in dict.fromkeys(one.kind for one in findings):
        plan = kinds[name].confirm
        if plan is None:
            continue
        heads = [one.head for one in findings if one.kind == name][:_MOST_ABLATED]
        try:
            probe = plan.probe(asked)
            missing = [head for head in heads if (id(probe), plan.metric, head) not in known]
            if missing:
                scores = ablate_heads(
                    asked.model, probe, plan.metric, heads=missing,
                    batch_size=asked.batch_size, progress=False,
                )  # fmt: skip
                known |= {(id(probe), plan.metric, head): scores for head in missing}
        except HeadscopeError:
            continue
        for head in heads:
            scores = known[id(probe), plan.metric, head]
            p, ahead = float(scores.p_value[head]), float(scores.mean[head]) * plan.sign > 0
            effects[name, head] = float(scores.mean[head]), p / 2 if ahead else 1 - p / 2
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
