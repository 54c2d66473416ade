"""Studies: a paper's claims, how each is measured, and when a claim holds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from math import isfinite
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import stdtrit
from scipy.stats import norm, spearmanr, ttest_ind

from headscope import metrics
from headscope.ablation import ablate_groups
from headscope.ablation.run import Measurement
from headscope.base.arguments import checked
from headscope.base.files import Saved, Stored, paragraphs
from headscope.base.options import RunOptions
from headscope.base.result import (
    Facts,
    Glance,
    Line,
    Lines,
    Rows,
    Section,
    Shown,
    Tabular,
    Words,
    number,
)
from headscope.base.specs import Provenance
from headscope.base.statistics import mean_interval
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.metrics import Metric
from headscope.models import bundled
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, needle, pairs, repeated_tokens, text
from headscope.probes.encoding import ordinary_tokens
from headscope.scorer import Scorer
from headscope.scoring.score import score
from headscope.table import HeadScores

Verdict = Literal["holds", "does not hold", "cannot be asked"]
_T = TypeVar("_T")
LEVEL = 0.99  # of the intervals that decide: a study asks several claims at once


@dataclass(frozen=True)
class StudySetting:
    """Seed and size of a study's run, with a cache shared by its claims.

    Attributes:
        fast: use fewer and shorter examples, for a first look and for tests.
        seed: seed for all sampling; heads are chosen on probes with this seed and measured on
            probes with the next.
        given: what a study needs beside the model, by name, such as a processor.
        kept: values shared by the claims of one run on one model; see :meth:`share`.
    """

    fast: bool = False
    seed: int = 0
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    kept: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def size(self, whole: int, fast: int) -> int:
        """Pick the full or the fast size."""
        return fast if self.fast else whole

    def need(self, name: str, what: str) -> Any:
        """Look up what was given beside the model.

        Args:
            name: name in ``given``.
            what: description for the error message.

        Raises:
            UnsupportedModelError: if it was not given.

        Example:
            >>> StudySetting(given={"processor": 1}).need("processor", "the model's processor")
            1
        """
        if name not in self.given:
            raise UnsupportedModelError(f"it takes {what}: pass given={{{name!r}: ...}}.")
        return self.given[name]

    def share(self, key: tuple[Any, ...], make: Callable[[], _T]) -> _T:
        """Compute a value once for all claims of a run; an error is cached and raised again.

        Args:
            key: unique key of the value: a name and its arguments.
            make: computes the value on the first call.

        Example:
            >>> setting = StudySetting()
            >>> setting.share(("one",), lambda: 1), setting.share(("one",), lambda: 2)
            (1, 1)
        """
        if key not in self.kept:
            try:
                self.kept[key] = (make(), None)
            except HeadscopeError as error:
                self.kept[key] = (None, error)
        found, refused = self.kept[key]
        if refused is not None:
            raise refused
        made: _T = found
        return made


@dataclass(frozen=True)
class Evidence:
    """Measurement behind a claim's verdict.

    Attributes:
        value: the measured number.
        control: the same number for a baseline: other heads, random heads, chance.
        low, high: interval of ``value - control`` (of ``control - value`` if the claim is that the
            value is lower).
        n: number of observations behind the interval.
        note: short description of the heads or sets that were measured.
        results: results with figures, by name; they are plotted on the study's page.
    """

    value: float
    control: float
    low: float
    high: float
    n: int
    note: str = ""
    results: Mapping[str, object] = field(default_factory=dict)


@checked
def paired(
    values: Float[np.ndarray, " example"],
    control: Float[np.ndarray, " example"],
    *,
    note: str = "",
    results: Mapping[str, object] | None = None,
    less: bool = False,
    clusters: Sequence[int] | None = None,
) -> Evidence:
    """Build evidence from values and controls on the same examples.

    Args:
        values: one value per example; NaN is missing.
        control: baseline value per example, in the same order.
        note: short description of the heads or sets that were measured.
        results: results to plot on the study's page, by name.
        less: the claim is that the values are lower than the control.
        clusters: label per example; examples with the same label (a template, a document, a word)
            count as one observation.

    Returns:
        Means of values and control, with a 99 % interval of the mean difference, the level at which
        studies decide: exact if all values are 0 or 1, else from
        :func:`headscope.base.statistics.mean_interval`. NaN everywhere with fewer than two complete
        pairs.

    Example:
        >>> found = paired(np.array([0.8, 0.9, 0.7, 0.8]), np.zeros(4))
        >>> found.n, found.low > 0.4
        (4, True)
    """
    values, control = np.asarray(values, float), np.asarray(control, float)
    known = ~np.isnan(values) & ~np.isnan(control)
    difference = (values - control)[known]
    if difference.size < 2:
        return Evidence(np.nan, np.nan, np.nan, np.nan, int(difference.size), note, results or {})
    labels = None if clusters is None else tuple(np.asarray(clusters)[known].tolist())
    single = labels is None or len(set(labels)) == len(labels)
    exact = _exact(values[known], control[known]) if single else None
    if exact is None:
        ends = mean_interval(difference[None], LEVEL, labels)
        exact = float(ends[0][0]), float(ends[1][0])
    low, high = (-exact[1], -exact[0]) if less else exact
    return Evidence(
        float(values[known].mean()),
        float(control[known].mean()),
        low,
        high,
        int(difference.size) if labels is None else len(set(labels)),
        note,
        results or {},
    )


def over_heads(
    values: Float[np.ndarray, "*heads example"],
    control: Float[np.ndarray, " example"],
    *,
    note: str = "all heads",
    results: Mapping[str, object] | None = None,
    less: bool = False,
) -> Evidence:
    """Build evidence of a mean over all heads, with the wider of two intervals.

    Over examples alone, a few heads that differ by chance would count on every example; over heads
    alone, examples would count once for each head. ``n`` counts examples.

    Args:
        values: one value per head and example; NaN is missing.
        control: baseline value per example.
        note: short description of the heads.
        results: results to plot on the study's page, by name.
        less: the claim is that the values are lower than the control.
    """
    flat = values.reshape(-1, values.shape[-1])
    flat = flat[~np.isnan(flat).all(1)]
    if not len(flat):
        raise UnsupportedModelError("no head has a value.")
    examples = paired(nanmean(flat, 0), control, note=note, results=results, less=less)
    mean = nanmean(flat, 1)
    heads = paired(mean, np.full(mean.shape, float(np.nanmean(control))), less=less)
    return _wider(examples, heads.low, heads.high)


def _wider(found: Evidence, low: float, high: float) -> Evidence:
    """The same evidence with the union of its interval and another one; NaN if either is."""
    return replace(
        found, low=float(np.minimum(found.low, low)), high=float(np.maximum(found.high, high))
    )


def nanmean(values: Float[np.ndarray, "*any"], axis: int) -> Float[np.ndarray, "*rest"]:
    """Mean without NaN; NaN, without a warning, where nothing else is there."""
    count = (~np.isnan(values)).sum(axis)
    found: Float[np.ndarray, "*rest"] = np.nansum(values, axis) / np.where(count, count, np.nan)
    return found


def _exact(
    values: Float[np.ndarray, " example"], control: Float[np.ndarray, " example"]
) -> tuple[float, float] | None:
    """Exact interval of a mean difference of binary values; None for other values.

    Against a constant, this is the Clopper-Pearson interval. Against a binary control, it combines
    two of them, for the share of examples that changed to 1 and the share that changed to 0, each
    at half the error, so coverage is at least nominal.
    """
    if not np.isin(values, (0.0, 1.0)).all():
        return None
    if (control == control[0]).all():
        low, high = _share(int(values.sum()), len(values), (1 - LEVEL) / 2)
        return low - float(control[0]), high - float(control[0])
    if not np.isin(control, (0.0, 1.0)).all():
        return None
    up, down = (
        _share(int((values - control == sign).sum()), len(values), (1 - LEVEL) / 4)
        for sign in (1, -1)
    )
    return up[0] - down[1], up[1] - down[0]


def _share(count: int, total: int, tail: float) -> tuple[float, float]:
    """Clopper-Pearson interval of a proportion."""
    from scipy.special import betaincinv

    low = float(betaincinv(count, total - count + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, total - count, 1 - tail)) if count < total else 1.0
    return low, high


@dataclass(frozen=True)
class Claim:
    """One falsifiable claim of a paper.

    Attributes:
        name: short name, unique within the study.
        statement: the claim, as a sentence.
        value: description of the measured number.
        control: description of the baseline.
        ask: measures the claim on a model; raises a :class:`~headscope.errors.HeadscopeError` if
            the claim does not apply to that model.
        least: smallest difference from the control that counts; the claim holds if the whole
            interval lies above it.
        unit: unit of the number.
    """

    name: str
    statement: str
    value: str
    control: str
    ask: Callable[[Any, StudySetting], Evidence]
    least: float = 0.0
    unit: str = ""


@dataclass(frozen=True, repr=False)
class Study(Shown):
    """A paper as a list of claims that can be tested on a model.

    Attributes:
        name: name for ``headscope study run``.
        title: one-line description.
        paper: authors, year, title and arXiv number.
        claims: claims, in the order in which they are tested.
        about: what is measured, and how it differs from the paper.
        of: kind of model that it is asked of: ``model`` (from :func:`headscope.load`), ``clip``
            (:func:`headscope.vision.clip`) or ``diffusion`` (:func:`headscope.diffusion.load`).
    """

    name: str
    title: str
    paper: str
    claims: tuple[Claim, ...]
    about: str
    of: Literal["model", "clip", "diffusion"] = "model"

    def __post_init__(self) -> None:
        """Reject duplicate claim names, since their answers would overwrite each other.

        Raises:
            InputError: if there are no claims, or two share a name.
        """
        names = [one.name for one in self.claims]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"study {self.name!r} has the claims {names}: give at least one claim, and a "
                "unique name to each."
            )

    def glance(self) -> Glance:
        """Summarise the claims and what is measured for each."""
        return Glance(
            f"{self.name}: {self.title}",
            facts=(self.paper,),
            columns=("claim", "number", "control", "at least"),
            rows=[
                (one.name, f"{one.value} ({one.unit or 'no unit'})", one.control, number(one.least))
                for one in self.claims
            ],
            lists=[
                Lines("claims", [Line(f"{one.name}: {one.statement}") for one in self.claims]),
                Lines("how", [Line(self.about)]),
            ],
            hint=f'hs.studies.run("{self.name}", model)',
            whole=True,
        )


@dataclass(frozen=True)
class Answer(Stored):
    """Result of testing one claim on a model.

    Attributes:
        claim: name of the claim.
        statement: the claim, as a sentence.
        verdict: ``holds``, ``does not hold`` or ``cannot be asked``.
        because: why the claim could not be tested; otherwise which heads or sets were measured.
        value, control: see :class:`Evidence`.
        low, high: 99 % interval of their difference, in the claimed direction.
        least: smallest difference that counts.
        unit: unit of value, control and interval.
        n: number of observations.
        measured, against: descriptions of value and control.
    """

    claim: str
    statement: str
    verdict: str
    because: str = ""
    value: float = float("nan")
    control: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    least: float = 0.0
    unit: str = ""
    n: int = 0
    measured: str = ""
    against: str = ""


def answered(claim: Claim, found: Evidence) -> Answer:
    """Decide a claim: it holds if the whole interval is above the required effect.

    Example:
        >>> claim = Claim("x", "X is high.", "x", "chance", ask=lambda *_: None, least=0.1)
        >>> answered(claim, Evidence(0.5, 0.1, 0.3, 0.5, 8)).verdict
        'holds'
        >>> answered(claim, Evidence(0.5, 0.1, 0.05, 0.75, 8)).verdict
        'does not hold'
    """
    verdict: Verdict = "holds" if found.low > claim.least else "does not hold"
    because = found.note
    if not isfinite(found.low):
        verdict, because = (
            "cannot be asked",
            f"only {found.n} observations, too few for an interval.",
        )
    return Answer(
        claim.name,
        claim.statement,
        verdict,
        because,
        found.value,
        found.control,
        found.low,
        found.high,
        claim.least,
        claim.unit,
        found.n,
        claim.value,
        claim.control,
    )


def unasked(claim: Claim, reason: object) -> Answer:
    """Answer for a claim that cannot be tested on a model."""
    return Answer(claim.name, claim.statement, "cannot be asked", str(reason), least=claim.least)


@dataclass(frozen=True, repr=False)
class StudyResult(Saved, Shown, Tabular):
    """Results of all claims of a study on a model.

    Attributes:
        study: name of the study.
        title: one-line description.
        paper: source of the claims.
        answers: one answer per claim.
        provenance: model, revision, weight digest, seed, package versions.
        fast: whether fewer and shorter examples were used.
    """

    study: str
    title: str
    paper: str
    answers: tuple[Answer, ...]
    provenance: Provenance = field(default_factory=Provenance)
    fast: bool = False

    @property
    def verdicts(self) -> dict[str, str]:
        """Verdict by claim."""
        return {one.claim: one.verdict for one in self.answers}

    def __getitem__(self, claim: str) -> Answer:
        """Answer to one claim."""
        for one in self.answers:
            if one.claim == claim:
                return one
        raise InputError(f"study {self.study!r} has the claims {', '.join(self.verdicts)}.")

    def glance(self) -> Glance:
        """Show claims, verdicts and numbers."""
        return Glance(
            f"{self.study}: {self.title}",
            facts=(self.provenance.model, self.paper, "fast form" if self.fast else ""),
            columns=ANSWER_COLUMNS,
            rows=[row_of(one) for one in self.answers],
            lists=[
                Lines(
                    "measured on, or why not",
                    [Line(f"{one.claim}: {one.because}") for one in self.answers if one.because],
                )
            ],
            whole=True,
        )

    def sections(self) -> list[Section]:
        """Report the study, with a table of its claims and the measurements behind them."""
        rows = [(*row_of(one), number(one.least) if one.n else "-") for one in self.answers]
        columns = (*ANSWER_COLUMNS, "at least")
        return [
            Section(
                f"{self.title} ({self.study})",
                [
                    Words(self.paper),
                    Rows(
                        columns,
                        rows,
                        "A claim holds if its whole interval is above the smallest difference that "
                        "counts.",
                    ),
                    Facts([(one.claim, _told(one)) for one in self.answers]),
                    *([Words("Fast form: fewer and shorter examples.", quiet=True)] * self.fast),
                ],
            )
        ]

    def to_pandas(self) -> Any:
        """One row per claim."""
        import pandas

        return pandas.DataFrame([{"study": self.study, **one._parts()} for one in self.answers])


ANSWER_COLUMNS = ("claim", "verdict", "value", "control", "difference, 99 %", "n")


def row_of(one: Answer) -> tuple[str, ...]:
    """An answer's cells, by ``ANSWER_COLUMNS``."""
    interval = f"{number(one.low)} to {number(one.high)}" if one.n else "-"
    return (
        one.claim,
        one.verdict,
        f"{number(one.value)} {one.unit}".strip(),
        number(one.control),
        interval,
        str(one.n or "-"),
    )


def _told(one: Answer) -> str:
    parts = [one.statement]
    if one.measured:
        parts.append(f"Measured: {one.measured}; control: {one.against}.")
    if one.because:
        parts.append(f"Because: {one.because}" if one.verdict == "cannot be asked" else one.because)
    return " ".join(parts)


MATTERS = 0.1  # of an attention score or a share: less does not count as a role
# Random sets: more in small models, where most sets hold a head of the same circuit.
_FEW_SETS, _MANY_SETS, _SMALL = 10, 40, 100
_ANSWERED = 0.2  # probability of the needle's answer; below this the model does not find it
RIGHT = 0.8  # share of 32 prompts; guessing gives 0.5, and above 0.8 once in 5,000
_LEAST_HEADS = 8  # of a rank correlation
_OTHERS = 2  # multiple of the ablated heads that must be left to draw random sets from


def repeated(model: HeadModel, setting: StudySetting, seed: int) -> Probe:
    """Probe of repeated random tokens."""
    room = (model.shape.n_ctx or 128) - 2
    length = min(setting.size(24, 20), room // 2)
    batch = 12
    return setting.share(
        ("repeated", seed), lambda: repeated_tokens(model, length=length, batch=batch, seed=seed)
    )


def needles(model: HeadModel, setting: StudySetting, seed: int) -> Probe:
    """Needle probe with facts at several depths of short texts; its control asks for another."""
    length = min(128, model.shape.n_ctx or 128)
    depths, per_cell = setting.size(5, 3), setting.size(4, 8)
    return setting.share(
        ("needles", seed), lambda: needle(model, length, depths, per_cell=per_cell, seed=seed)
    )


def answers(model: HeadModel, setting: StudySetting, seed: int) -> Float[np.ndarray, " example"]:
    """Probability of the needle's answer, per example.

    Raises:
        UnsupportedModelError: if the model does not find the answers, so measuring how it does
            would be meaningless.
    """
    found = setting.share(
        ("answers", seed),
        lambda: metric_of(model, needles(model, setting, seed), metrics.answer_probability),
    )
    if not np.nanmean(found) > _ANSWERED:
        raise UnsupportedModelError(
            f"it gives the needles' answers a probability of only {float(np.nanmean(found)):.2f}."
        )
    return found


def pattern(scorer: str, model: HeadModel, setting: StudySetting) -> tuple[HeadIndex, Evidence]:
    """Head with the highest score on repeated tokens, and its score on fresh ones."""
    probes = [repeated(model, setting, setting.seed + k) for k in range(2)]
    return setting.share(("pattern", scorer), lambda: best_head(model, scorer, *probes))


def fetching(
    model: HeadModel, setting: StudySetting, scorer: str = "retrieval_first_token"
) -> tuple[HeadIndex, Evidence]:
    """Head with the highest retrieval score, and its score on fresh needles."""
    probes = [needles(model, setting, setting.seed + k) for k in range(2)]
    return setting.share(("fetching", scorer), lambda: best_head(model, scorer, *probes))


def role(scorer: str, model: HeadModel, setting: StudySetting) -> HeadIndex:
    """Head that plays a role on repeated tokens.

    Raises:
        UnsupportedModelError: if no head does.
    """
    head, found = pattern(scorer, model, setting)
    return _playing(scorer, head, found)


def retrieval_heads(model: HeadModel, setting: StudySetting) -> list[HeadIndex]:
    """The three heads with the highest retrieval scores, chosen on separate needles.

    Raises:
        UnsupportedModelError: if the best head's score does not hold up on fresh needles.
    """
    _playing("retrieval", *fetching(model, setting))
    probe = needles(model, setting, setting.seed)
    scores = setting.share(
        ("retrieval",),
        lambda: score(model, probe, ["retrieval_first_token"], progress=False),
    )
    return [head for head, value in scores["retrieval_first_token"].top(3) if value > MATTERS]


def _playing(name: str, head: HeadIndex, found: Evidence) -> HeadIndex:
    if not found.low > MATTERS:
        raise UnsupportedModelError(
            f"it has no {name.replace('_', ' ')} head (best: {head}, {found.value:.2f} against "
            f"{found.control:.2f})."
        )
    return head


def above_draws(
    value: float,
    draws: Float[np.ndarray, " draw"],
    *,
    note: str = "",
    results: Mapping[str, object] | None = None,
) -> Evidence:
    """Evidence of one number against the same number in draws of a control.

    The interval is from the value less the draws' quantiles: it lies above 0 where the value is
    above all but a two-hundredth of the draws, as in a permutation test.
    """
    low, high = value - np.quantile(draws, [0.5 + LEVEL / 2, 0.5 - LEVEL / 2], method="higher")
    return Evidence(
        float(value), float(draws.mean()), float(low), float(high), len(draws), note, results or {}
    )


def rank_correlation(
    first: Float[np.ndarray, " head"],
    second: Float[np.ndarray, " head"],
    *,
    of: str = "heads",
    by_text: Float[np.ndarray, "*heads text"] | None = None,
    note: str = "",
    results: Mapping[str, object] | None = None,
) -> Evidence:
    """Spearman's rank correlation over heads, with its interval, against zero.

    The interval uses Fisher's transform with the variance of Bonett and Wright 2000, and treats
    heads as independent. It is widened to that over texts, of 500 bootstrap draws, where one of the
    two scores is known by text.

    Args:
        first: one number per head.
        second: another one, in the same order.
        of: what is ranked, for messages.
        by_text: values by text whose mean over texts is ``second``.
        note: short description of the heads.
        results: results to plot on the study's page, by name.
    """
    known = np.isfinite(first) & np.isfinite(second)
    count = int(known.sum())
    if count < _LEAST_HEADS:
        raise UnsupportedModelError(f"{count} {of} are too few for a rank correlation.")
    found = float(spearmanr(first[known], second[known]).statistic)
    if not math.isfinite(found):
        raise UnsupportedModelError(f"all {of} have the same score.")
    half = float(norm.ppf(0.5 + LEVEL / 2)) * math.sqrt((1 + found**2 / 2) / (count - 3))
    centre = math.atanh(min(max(found, -0.999999), 0.999999))
    low, high = math.tanh(centre - half), math.tanh(centre + half)
    evidence = Evidence(found, 0.0, low, high, count, note, results or {})
    if by_text is None:
        return evidence
    flat = by_text.reshape(-1, by_text.shape[-1])[known]
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, flat.shape[1], flat.shape[1]) for _ in range(500)]
    means = [nanmean(flat[:, one], 1) for one in texts]
    drawn = [spearmanr(first[known], one).statistic for one in means if np.ptp(one) > 0]
    if not drawn:
        raise UnsupportedModelError(f"all {of} have the same score.")
    ends = np.nanquantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return _wider(evidence, float(ends[0]), float(ends[1]))


def random_heads(
    model: HeadModel, heads: Sequence[HeadIndex], sets: int, seed: int
) -> list[list[HeadIndex]]:
    """Sets of random other heads of the same size.

    Raises:
        UnsupportedModelError: if too few other heads are left.
    """
    others = [one for one in model.shape.heads if one not in set(heads)]
    if not heads or len(others) < _OTHERS * len(heads):
        raise UnsupportedModelError(
            f"{len(heads)} of its heads are ablated and {len(others)} are left: drawing random "
            f"sets as a control takes at least {_OTHERS * max(1, len(heads))}."
        )
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(len(others), len(heads), replace=False) for _ in range(sets)]
    return [[others[index] for index in sorted(one)] for one in drawn]


def known_pairs(model: HeadModel, setting: StudySetting, number: int) -> Probe:
    """Paired prompts of the first task that the model can do: agreement, names, capitals or years.

    Raises:
        UnsupportedModelError: if it can do none of them; the message gives its accuracy on each.
    """
    return setting.share(
        ("known pairs", number), lambda: _known_pairs(model, setting.size(16, 12), setting, number)
    )


def _known_pairs(model: HeadModel, batch: int, setting: StudySetting, number: int) -> Probe:
    said = []
    for task in ("agreement", "ioi", "capital_of", "greater_than"):
        try:
            first = pairs(model, task, 32, seed=setting.seed)
        except HeadscopeError as error:
            said.append(f"{task}: {error}")
            continue
        right = first.settings.get("accuracy")
        if isinstance(right, float) and right >= RIGHT:
            return pairs(model, task, batch, seed=setting.seed + number)
        said.append(f"{task}: {right:.0%} right" if isinstance(right, float) else task)
    raise UnsupportedModelError(f"it can do none of the tasks ({'; '.join(said)}).")


def unpaired(
    values: Float[np.ndarray, " example"],
    others: Float[np.ndarray, " other"],
    *,
    note: str = "",
    results: Mapping[str, object] | None = None,
    less: bool = False,
) -> Evidence:
    """Build evidence from two independent samples, with Welch's interval."""
    a, b = (one[~np.isnan(one)] for one in (np.asarray(values, float), np.asarray(others, float)))
    if min(a.size, b.size) < 2:
        return Evidence(np.nan, np.nan, np.nan, np.nan, int(a.size + b.size), note, results or {})
    found = ttest_ind(a, b, equal_var=False).confidence_interval(LEVEL)
    low, high = float(found.low), float(found.high)
    if a.var() + b.var() == 0:
        low = high = float(a.mean() - b.mean())
    low, high = (-high, -low) if less else (low, high)
    return Evidence(
        float(a.mean()), float(b.mean()), low, high, int(a.size + b.size), note, results or {}
    )


def prose(model: HeadModel, setting: StudySetting, *, seed: int, length: int = 128) -> Probe:
    """Text like the model's training data: passages, or stories for a bundled model.

    There are few passages: seeds at an even and at an odd distance from the setting's seed draw
    from two disjoint halves.
    """
    count = setting.size(24, 8)
    length = min(length, model.shape.n_ctx or length)
    if model.name in bundled.READERS:
        texts = bundled.stories(count, seed=seed)
    else:
        order = np.random.default_rng(setting.seed).permutation(len(_passages()))
        half = order[(seed - setting.seed) % 2 :: 2][:count]
        texts = [_passages()[index] for index in half]
    probe = text(model, texts, length=length, seed=seed)
    first = {int(label): row for row, label in reversed([*enumerate(probe.cluster_labels or ())])}
    return probe.examples(torch.tensor(sorted(first.values()))) if first else probe


@cache
def _passages() -> list[str]:
    """Short English passages, written for headscope."""
    return [
        one
        for package, name in (("studies", "passages.txt"), ("probes", "data/passages.txt"))
        for one in paragraphs(files(f"headscope.{package}").joinpath(name).read_text("utf-8"))
    ]


def metric_of(
    model: HeadModel, probe: Probe, metric: Metric = metrics.loss
) -> Float[np.ndarray, " example"]:
    """Metric of the intact model, per example."""
    measurement = Measurement.of(model, probe, metric, RunOptions(progress=False))
    return measurement.measure(lambda *_: (), 0, "reading a metric")[1]


def skilled(
    model: HeadModel, setting: StudySetting, number: int = 1, length: int = 64
) -> tuple[Probe, Float[np.ndarray, " example"]]:
    """Texts that the model predicts better than chance, and its loss on each."""
    seed = setting.seed + number
    probe = prose(model, setting, seed=seed, length=length)
    return probe, setting.share(("skill", seed, length), lambda: need_skill(model, probe))


def need_skill(model: HeadModel, probe: Probe) -> Float[np.ndarray, " example"]:
    """Loss per example of a model that predicts these texts better than chance.

    Raises:
        UnsupportedModelError: if it does not, so measuring how it predicts them would be
            meaningless.
    """
    losses, chance = metric_of(model, probe), math.log(len(ordinary_tokens(model)))
    high = float(mean_interval(losses[None], LEVEL)[1][0])
    if not high < chance:
        raise UnsupportedModelError(
            f"it predicts these texts no better than chance (loss {float(np.nanmean(losses)):.2f} "
            f"nats, chance {chance:.2f})."
        )
    return losses


def best_head(
    model: HeadModel, scorer: str | Scorer, chosen_on: Probe, measured_on: Probe
) -> tuple[HeadIndex, Evidence]:
    """Head with the highest score, chosen on one probe and measured on another.

    The control is the scorer's own if it is paired, else the mean of all other heads on the same
    examples.
    """
    name = scorer if isinstance(scorer, str) else scorer.name
    first = score(model, chosen_on, [scorer], progress=False)[name]
    if not np.isfinite(first.mean).any():
        raise UnsupportedModelError(f"no head has a {name} score.")
    head = first.top(1)[0][0]
    scores = score(model, measured_on, [scorer], progress=False)[name]
    found = paired(
        scores.per_example[head.layer, head.head],
        control_of(scores, head),
        note=str(head),
        results={name: scores},
        clusters=measured_on.cluster_labels,
    )
    return head, found


def control_of(scores: HeadScores, head: HeadIndex) -> Float[np.ndarray, " example"]:
    """Control values for a head's score, per example."""
    own, control = scores.per_example, scores.control_per_example
    if control is not None and control.shape == own.shape:
        paired_control: Float[np.ndarray, " example"] = control[head.layer, head.head]
        return paired_control
    return control_mean(scores, head)


def control_mean(scores: HeadScores, head: HeadIndex) -> Float[np.ndarray, " example"]:
    """Mean of all other heads, per example."""
    others = scores.per_example.copy()
    others[head.layer, head.head] = np.nan
    flat = others.reshape(-1, others.shape[-1])
    mean: Float[np.ndarray, " example"] = np.nanmean(flat[~np.isnan(flat).all(1)], axis=0)
    return mean


def against_random_sets(
    model: HeadModel,
    probe: Probe,
    metric: Metric,
    heads: Sequence[HeadIndex],
    *,
    scale: float,
    sign: float,
    seed: int,
) -> Evidence:
    """Effect of ablating heads on a metric, against random sets of other heads.

    The control is their mean. The interval has the errors of both: that of the mean difference over
    examples, and that of the mean over sets (Student's), half-widths added in squares.

    Args:
        model: model to ablate.
        probe: examples to measure on.
        metric: metric from :mod:`headscope.metrics`.
        heads: heads to mean-ablate together.
        scale: divisor of the effects.
        sign: 1 if damage raises the metric, -1 if it lowers it.
        seed: seed for the random sets.
    """
    groups: dict[str, list[HeadIndex]] = {"chosen": list(heads)}
    count = _MANY_SETS if len(model.shape.heads) < _SMALL else _FEW_SETS
    for draw, drawn in enumerate(random_heads(model, heads, count, seed)):
        groups[f"random {draw}"] = drawn
    effects = ablate_groups(model, probe, metric, groups, progress=False)
    harm = sign * effects.per_example / scale
    found = paired(
        harm[0],
        harm[1:].mean(0),
        note=f"{', '.join(map(str, heads))}; {count} random sets of as many others",
        clusters=probe.cluster_labels,
    )
    sets = nanmean(harm[1:], 1)
    error = float(stdtrit(len(sets) - 1, 0.5 + LEVEL / 2) * sets.std(ddof=1) / len(sets) ** 0.5)
    middle = found.value - found.control
    return replace(
        found,
        low=middle - math.hypot(middle - found.low, error),
        high=middle + math.hypot(found.high - middle, error),
    )


def beyond_sets(
    values: Float[np.ndarray, " example"],
    sets: Float[np.ndarray, "set example"],
    *,
    note: str = "",
    results: Mapping[str, object] | None = None,
    less: bool = False,
    clusters: Sequence[int] | None = None,
) -> Evidence:
    """Build evidence against several random sets on the same examples.

    The control is their mean, and the interval the union of that over examples and of the
    differences from each set's own mean: what one of a few sets does as well does not stand out.
    """
    found = paired(
        values, nanmean(sets, 0), note=note, results=results, less=less, clusters=clusters
    )
    each = (1 - 2 * less) * (np.nanmean(values) - nanmean(sets, 1))
    return _wider(found, float(each.min()), float(each.max()))
