"""Roles and kinds of heads: found by their scores, and confirmed by ablation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from headscope.base.files import Saved, Stored
from headscope.base.result import (
    Glance,
    Grid,
    Line,
    Lines,
    Rows,
    Section,
    Shown,
    Tabular,
    Words,
    number,
    short,
)
from headscope.base.specs import Provenance
from headscope.heads import HeadIndex
from headscope.table.scores import HeadScores

if TYPE_CHECKING:
    import pandas


# Most rows of a table in a notebook.
_MOST_ROWS = 40


@dataclass(frozen=True)
class RoleFinding:
    """Outcome of the search for heads with one role.

    Attributes:
        score: name of the role-bearing score.
        heads: heads that have the role, with their means, strongest first.
        tested: False if no head has a p-value (no control, or fewer than two examples).
        above: number of heads above the threshold, whether or not significant.
        threshold: threshold of the score.
        n: largest number of examples of any head.
        needed: number of examples that one head alone needs to be significant; None if there are
            enough.
    """

    score: str
    heads: tuple[tuple[HeadIndex, float], ...]
    tested: bool
    above: int = 0
    threshold: float = 0.0
    n: int = 0
    needed: int | None = None

    def __str__(self) -> str:
        """Format the outcome in one line, also if there is no such head."""
        role = self.score.replace("_", " ")
        if not self.tested:
            asks = f" and {self.needed} examples" if self.needed else " and at least two examples"
            return f"{role}: not tested (needs a control{asks})"
        if not self.heads and self.above:
            return (
                f"no {role} heads beyond chance: {self.above} above {self.threshold:g}, none of "
                f"them significant with n = {self.n}{self._asks()}"
            )
        if not self.heads:
            return f"no {role} heads{self._asks()}"
        most = 3 if self.score.startswith("first_token") else 8  # sinks: half of the heads, often
        shown = ", ".join(f"{head} {mean:.2f}" for head, mean in self.heads[:most])
        more = len(self.heads) - most
        return f"{role}: {shown}" + (f" and {more} more" if more > 0 else "")

    def _asks(self) -> str:
        return f" (one head alone takes {self.needed} examples)" if self.needed else ""


def find_roles(scores: Iterable[HeadScores], alpha: float) -> list[RoleFinding]:
    """Find the heads of every score with a threshold, at false discovery rate alpha."""
    findings = []
    for one in scores:
        if one.threshold is None:
            continue
        significant = one.significant(alpha)
        heads = tuple(pair for pair in one.top(one.mean.size) if significant[pair[0]])
        tested = bool(np.isfinite(one.p_value).any())
        above = int((one.mean > one.threshold).sum())
        findings.append(
            RoleFinding(
                one.name,
                heads,
                tested,
                above,
                one.threshold,
                int(one.n.max()),
                one.examples_needed(alpha),
            )
        )
    return findings


def roles_by_head(
    findings: Iterable[RoleFinding],
) -> dict[HeadIndex, list[tuple[str, float]]]:
    """Invert findings: the roles of each head, strongest first, in head order."""
    roles: dict[HeadIndex, list[tuple[str, float]]] = {}
    for finding in findings:
        for head, mean in finding.heads:
            roles.setdefault(head, []).append((finding.score, mean))
    return {head: sorted(roles[head], key=lambda role: -role[1]) for head in sorted(roles)}


def copying_summary(scores: HeadScores) -> str:
    """Count a retrieval score's heads above its threshold, and those significant.

    The terminal, the page and the result print this same sentence.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> "retrieval heads of" in copying_summary(hs.retrieval.forced(model, probe))
        True
    """
    limit = scores.threshold or 0.0
    above = scores.mean > limit
    said = (
        f"{int(above.sum())} retrieval heads of {int(np.isfinite(scores.mean).sum())} "
        f"(copying more than {limit:g} of the needle)"
    )
    if not above.any():
        return said
    n = int(scores.n.max())
    if not np.isfinite(scores.p_value).any():
        return f"{said}, not tested against a control (n = {n})"
    beyond = int((above & scores.significant()).sum())
    return f"{said}, {beyond} of them beyond chance (n = {n}, control: {control_words(scores)})"


def control_words(scores: HeadScores) -> str:
    """Name of a needle score's control, in two words."""
    kind = str(scores.provenance.control)
    names = {"removed": "needle removed", "other_question": "other question"}
    return names.get(kind, kind)


def by_interest(scores: Iterable[HeadScores]) -> list[HeadScores]:
    """Sort scores: those with a role first, otherwise in their order."""
    return sorted(scores, key=lambda one: one.threshold is None)


def notable_heads(scores: Iterable[HeadScores], k: int = 3) -> list[HeadIndex]:
    """Union of the k most notable heads of each score, in head order."""
    return sorted({head for one in scores for head, _ in one.notable(k)})


def unreached(scores: HeadScores) -> str | None:
    """Explain why a score has no value at all; None if it has one."""
    if bool((scores.n > 0).any()) or not bool((scores.missing > 0).any()):
        return None
    return (
        f"{scores.name} has no value: what it looks for was out of reach of every query (a text "
        "too short for it, or a window)."
    )


def probe_of(scores: HeadScores) -> str:
    """Name of the probe that a score was measured on, as words; empty if unknown."""
    probe = scores.provenance.probe
    return str(probe.get("name") or probe.get("kind") or "").replace("_", " ")


def measured_on(scores: Iterable[HeadScores]) -> list[str]:
    """List the probes with the scores measured on each, a line per probe."""
    by_probe: dict[str, list[str]] = {}
    for one in scores:
        if kind := probe_of(one):
            by_probe.setdefault(kind, []).append(one.name.replace("_", " "))
    return [f"Measured on {probe}: {', '.join(names)}." for probe, names in by_probe.items()]


def table_glance(table: Sequence[HeadScores], width: int | None = None) -> Glance:
    """Show the three most notable heads of each score, further scores, and the roles.

    Args:
        table: scores of one model.
        width: width of the terminal, which limits the scores shown; None: all scores.
    """
    scores = by_interest(table)
    if len({one.stack for one in scores}) > 1:
        return _glance_of_stacks(table)
    shown = scores if width is None else _fitting(scores, width)
    heads = notable_heads(shown)
    if width is None:
        heads = heads[:_MOST_ROWS]
    layers, across = scores[0].mean.shape
    model = scores[0].provenance.model
    said = (
        f"{len(heads)} of {layers * across} heads{f' of {model}' if model else ''} "
        f"({layers} layers x {across}): the 3 best of each score. Bold: significant "
        "(Benjamini-Hochberg, 5%)."
    )
    lists = []
    if len(shown) < len(scores):
        lists.append(Lines("Other scores, 3 best heads", best_lines(scores[len(shown) :])))
    findings = find_roles(scores, 0.05)
    if findings:
        roles = [Line(str(finding), faint=not finding.heads) for finding in findings]
        lists.append(Lines("Roles", roles))
    unseen = [text for text in map(unreached, scores) if text]
    return Glance(
        "",
        grid=_grid(shown, heads),
        notes=[said, *unseen, *measured_on(scores)],
        lists=lists,
    )


def _glance_of_stacks(table: Sequence[HeadScores]) -> Glance:
    """Show the three most notable heads of each score, stack by stack."""
    by_stack: dict[str, list[HeadScores]] = {}
    for one in table:
        by_stack.setdefault(one.stack, []).append(one)
    lists = []
    for stack, scores in by_stack.items():
        layers, heads = scores[0].mean.shape
        lists.append(Lines(f"{stack}: {layers} layers x {heads}, 3 best heads", best_lines(scores)))
    model = table[0].provenance.model
    return Glance("", notes=[f"{len(by_stack)} stacks of {model}."] if model else [], lists=lists)


def best_lines(scores: Sequence[HeadScores]) -> list[Line]:
    """Format the three most notable heads of each score, one line per score."""
    return [_line(one) for one in scores]


def _fitting(scores: Sequence[HeadScores], width: int) -> list[HeadScores]:
    """Leading scores that fit beside the head column, at least one."""
    used = 10
    shown: list[HeadScores] = []
    for one in scores:
        used += max(7, *map(len, one.name.split("_"))) + 3
        if shown and used > width:
            break
        shown.append(one)
    return shown


def _grid(scores: Sequence[HeadScores], heads: Sequence[HeadIndex]) -> Grid:
    marks = [one.significant() for one in scores]
    return Grid(
        [str(head) for head in heads],
        [one.name for one in scores],
        [[short(one[head]) for one in scores] for head in heads],
        [[one.fraction(one[head]) for one in scores] for head in heads],
        [
            [_weight(one, bool(mark[head])) for one, mark in zip(scores, marks, strict=True)]
            for head in heads
        ],
        [one.description for one in scores],
        whole=True,
    )


def _weight(scores: HeadScores, significant: bool) -> str:
    if scores.threshold is not None:
        return "role" if significant else "faint"
    return "strong" if significant else ""


def _line(scores: HeadScores) -> Line:
    unit = f" ({scores.unit})" if scores.unit else ""
    heads = ", ".join(f"{head} {short(mean)}" for head, mean in scores.notable())
    return Line(f"{scores.name}{unit}: ", heads or "no values")


@dataclass(frozen=True)
class KindFacts(Stored):
    """Definition of a kind of head, and how this model was tested for it.

    Attributes:
        name: name of the kind.
        said: what such a head does.
        probe: probe that was run.
        control: what its values are compared with.
        rule: rule by which a head is named.
        source: source of the definition.
        weakness: what else can look like it.
        confirmed_by: what ablating such a head should do; empty if nothing is tried.
        reason: why this model could not be tested; empty if it was.
    """

    name: str
    said: str
    probe: str
    control: str
    rule: str
    source: str
    weakness: str
    confirmed_by: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Finding(Stored):
    """A head that was found to be of a kind.

    Attributes:
        kind: name of the kind.
        head: address of the head.
        value: value of the kind's first measure.
        p_adjusted: p-value, corrected over all heads and kinds.
        effect: effect of ablating the head on the kind's metric; NaN if not tried.
        effect_p: one-sided p-value, corrected over all ablated heads.
        confirmed: whether the effect has the right sign and its p-value is below alpha; None if not
            tried.
    """

    kind: str
    head: HeadIndex
    value: float
    p_adjusted: float
    effect: float = float("nan")
    effect_p: float = float("nan")
    confirmed: bool | None = None


@dataclass(frozen=True, eq=False, repr=False)
class KindTable(Saved, Shown, Tabular):
    """Kinds of heads that were tested for, and the heads that were found.

    Attributes:
        kinds: all kinds, including those that could not be tested.
        findings: heads by kind, the largest value first.
        values: first measure of every tested kind.
        p_adjusted: p-value of every kind and head, corrected over both.
        alpha: significance level.
        heads: number of heads of the model.
        provenance: where it came from.
    """

    kinds: tuple[KindFacts, ...]
    findings: tuple[Finding, ...]
    values: Mapping[str, Float[np.ndarray, "layer head"]]
    p_adjusted: Mapping[str, Float[np.ndarray, "layer head"]]
    alpha: float = 0.05
    heads: int = 0
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def asked(self) -> tuple[KindFacts, ...]:
        """Kinds that this model was tested for."""
        return tuple(kind for kind in self.kinds if not kind.reason)

    @property
    def left_out(self) -> Mapping[str, str]:
        """Kinds that could not be tested, with the reason."""
        return {kind.name: kind.reason for kind in self.kinds if kind.reason}

    def named(self, kind: str) -> tuple[HeadIndex, ...]:
        """Heads of a kind, the largest value first."""
        return tuple(one.head for one in self.findings if one.kind == kind)

    def of(self, head: "str | tuple[int, int]") -> tuple[str, ...]:
        """Kinds of a head."""
        which = HeadIndex.parse(head)
        return tuple(one.kind for one in self.findings if one.head == which)

    @property
    def share_named(self) -> float:
        """Share of all (head, tested kind) pairs that were found."""
        return len(self.findings) / max(1, self.heads * len(self.asked))

    def scores(self) -> list[HeadScores]:
        """First measure of every kind with a head, or of all tested kinds if none has one.

        Example:
            >>> found = hs.kinds.survey(model, ["induction", "previous_token"], confirm=False)
            >>> [one.name for one in found.scores()]
            ['induction', 'previous_token']
        """
        known = {kind.name: kind for kind in self.asked}
        shown = [name for name in known if self.named(name)] or list(known)
        return [
            HeadScores.from_summary(
                name, np.asarray(self.values[name]), kv_heads=1, unit="first measure",
                description=known[name].said, source=known[name].source,
                provenance=self.provenance,
            )
            for name in shown
        ]  # fmt: skip

    def glance(self) -> Glance:
        """Show one row per kind with heads, then what was not found and not tested."""
        rows = [
            (kind.name, *_shown([one for one in self.findings if one.kind == kind.name]))
            for kind in self.asked
            if self.named(kind.name)
        ]
        none = [kind.name for kind in self.asked if not self.named(kind.name)]
        notes = [f"no head: {', '.join(none)}."] if none else []
        notes += [f"not asked, {name}: {reason}" for name, reason in self.left_out.items()]
        return Glance(
            "kinds of heads",
            [
                f"{len(self.findings)} names for {self.heads} heads from {len(self.asked)} kinds",
                f"{len(self.left_out)} kinds not asked",
                self.provenance.model,
            ],
            ("kind", "heads", "value", "ablation"),
            rows,
            notes=notes,
            hint="found.named('induction'), found.of('L1H2'), found.to_pandas()",
            whole=True,
        )

    def summary(self) -> str:
        """The same as one page of text."""
        seen = self.glance()
        return "\n".join([seen.text(), *(f"  {note}" for note in seen.notes)])

    def sections(self) -> list[Section]:
        """Report the findings, how each kind was tested, and what was not."""
        found = self.glance()
        blocks = [Words(", ".join(fact for fact in found.facts if fact))]
        asked = [
            (kind.name, kind.said, kind.probe, kind.control, kind.rule, kind.weakness, kind.source)
            for kind in self.asked
        ]
        columns = ("kind", "what it does", "probe", "control", "rule", "weakness", "source")
        return [
            Section("which heads are what", [*blocks, Rows(found.columns, found.rows)]),
            Section("how they were asked", [Rows(columns, asked)]),
            Section("not asked", [Rows(("kind", "reason"), list(self.left_out.items()))]),
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per finding."""
        import pandas

        names = (
            "kind", "layer", "head", "value", "p_adjusted", "effect", "effect_p", "confirmed"
        )  # fmt: skip
        rows = [
            (f.kind, f.head.layer, f.head.head, f.value, f.p_adjusted, f.effect, f.effect_p,
             f.confirmed)
            for f in self.findings
        ]  # fmt: skip
        return pandas.DataFrame(rows, columns=list(names))


def _shown(findings: Sequence[Finding], most: int = 6) -> tuple[str, str, str]:
    """Format the heads of a kind, their values, and the effects of ablating them."""
    first = findings[:most]
    more = "" if len(findings) <= most else f" +{len(findings) - most}"
    said = {True: "confirmed", False: "no effect", None: "-"}
    told = [said[one.confirmed] for one in first]
    counts = {one: told.count(one) for one in dict.fromkeys(told)}
    return (
        " ".join(str(one.head) for one in first) + more,
        " ".join(number(one.value) for one in first),
        ", ".join(one if one == "-" else f"{count} {one}" for one, count in counts.items()),
    )
