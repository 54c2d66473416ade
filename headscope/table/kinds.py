"""What heads are: roles by their scores, the best of a table, kinds and what confirms them."""

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
    """What was found for one role.

    Attributes:
        score: name of the role-bearing score.
        heads: those that have the role, with their means, strongest first.
        tested: False where no head has a p-value (no control, or fewer than two examples).
        above: heads above the threshold, whether or not beyond chance.
        threshold: of the score.
        n: examples of the head that has most.
        needed: examples that it takes for one head to be significant by itself; None where
            there are enough.
    """

    score: str
    heads: tuple[tuple[HeadIndex, float], ...]
    tested: bool
    above: int = 0
    threshold: float = 0.0
    n: int = 0
    needed: int | None = None

    def __str__(self) -> str:
        """One line; says it in words where there is none."""
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
    """Look at every score with a threshold; heads significant at false discovery rate alpha."""
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
    """Turn findings round: roles of each head that has any, strongest first, in head order."""
    roles: dict[HeadIndex, list[tuple[str, float]]] = {}
    for finding in findings:
        for head, mean in finding.heads:
            roles.setdefault(head, []).append((finding.score, mean))
    return {head: sorted(roles[head], key=lambda role: -role[1]) for head in sorted(roles)}


def copying(scores: HeadScores) -> str:
    """How many heads of a retrieval score are above its threshold, and how many beyond chance.

    The one sentence that the terminal, the page and the result itself say.

    Example:
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> "retrieval heads of" in copying(hs.retrieval.forced(model, probe))
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
    return f"{said}, {beyond} of them beyond chance (n = {n}, control: {against(scores)})"


def against(scores: HeadScores) -> str:
    """What the control of a needle score is, in two words."""
    kind = str(scores.provenance.control)
    names = {"removed": "needle removed", "other_question": "other question"}
    return names.get(kind, kind)


def by_interest(scores: Iterable[HeadScores]) -> list[HeadScores]:
    """Scores with a role first, else in their order."""
    return sorted(scores, key=lambda one: one.threshold is None)


def best_heads(scores: Iterable[HeadScores], k: int = 3) -> list[HeadIndex]:
    """Union of the k most notable heads of each score, in head order."""
    return sorted({head for one in scores for head, _ in one.notable(k)})


def unreached(scores: HeadScores) -> str | None:
    """Why a score has no value at all, in a sentence; None if it has one."""
    if bool((scores.n > 0).any()) or not bool((scores.missing > 0).any()):
        return None
    return (
        f"{scores.name} has no value: what it looks for was out of reach of every query (a text "
        "too short for it, or a window)."
    )


def measured_on(scores: Iterable[HeadScores]) -> list[str]:
    """What each score was measured on, a line per probe; none where that is not known."""
    by_probe: dict[str, list[str]] = {}
    for one in scores:
        probe = one.provenance.probe
        kind = str(probe.get("name") or probe.get("kind") or "").replace("_", " ")
        if kind:
            by_probe.setdefault(kind, []).append(one.name.replace("_", " "))
    return [f"Measured on {probe}: {', '.join(names)}." for probe, names in by_probe.items()]


def table_glance(table: Sequence[HeadScores], width: int | None = None) -> Glance:
    """The three most notable heads of each score, the other scores, and the roles.

    Args:
        table: scores of one model.
        width: of the terminal, for the scores that fit into it; None: all scores.
    """
    scores = by_interest(table)
    if len({one.stack for one in scores}) > 1:
        return _glance_of_stacks(table)
    shown = scores if width is None else _fitting(scores, width)
    heads = best_heads(shown)
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
    """The three most notable heads of each score, stack by stack."""
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
    """The three most notable heads of each score, a line each."""
    return [_line(one) for one in scores]


def _fitting(scores: Sequence[HeadScores], width: int) -> list[HeadScores]:
    """As many leading scores as fit beside the head column, at least one."""
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
    """What a kind of head is and how it is asked for.

    Attributes:
        name: of the kind.
        said: what such a head does.
        probe: what is run.
        control: what its values are compared with.
        rule: from which values a head is named.
        source: of the definition.
        weakness: what else can look like it.
        confirmed_by: what ablating such a head should do; empty where nothing is tried.
        reason: why it could not be asked of this model; empty where it was.
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
    """A head that is of a kind.

    Attributes:
        kind: name of the kind.
        head: which.
        value: of the kind's first measure.
        p_adjusted: after correction over all heads and kinds.
        effect: of ablating the head, on the kind's metric; NaN where nothing was tried.
        effect_p: one-sided, after correction over all heads that were ablated.
        confirmed: whether the effect is as it should be and its p-value below alpha; None where
            nothing was tried.
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
    """Kinds of head that were looked for, and heads that were named.

    Attributes:
        kinds: all kinds, also those that could not be asked.
        findings: heads by kind, the largest value first.
        values: first measure of every kind that was asked.
        p_adjusted: of every kind and head, corrected over both.
        alpha: below which a p-value counts.
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
        """Kinds that could be asked of this model."""
        return tuple(kind for kind in self.kinds if not kind.reason)

    @property
    def left_out(self) -> Mapping[str, str]:
        """Kinds that could not be asked, with the reason."""
        return {kind.name: kind.reason for kind in self.kinds if kind.reason}

    def named(self, kind: str) -> tuple[HeadIndex, ...]:
        """Heads of a kind, the clearest first."""
        return tuple(one.head for one in self.findings if one.kind == kind)

    def of(self, head: "str | tuple[int, int]") -> tuple[str, ...]:
        """Kinds of a head."""
        which = HeadIndex.parse(head)
        return tuple(one.kind for one in self.findings if one.head == which)

    @property
    def share_named(self) -> float:
        """Share of all pairs of a head and an asked kind that were named."""
        return len(self.findings) / max(1, self.heads * len(self.asked))

    def scores(self) -> list[HeadScores]:
        """The first measure of every kind that some head is of, or of all asked kinds if none is.

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
        """One row per kind with heads; what was not found and not asked below."""
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
        """Findings; how each kind was asked; what was not."""
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
    """Heads of a kind, their values, and what ablating them did."""
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
