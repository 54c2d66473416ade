"""What kinds of head a model has: which heads are what, how sure, and what confirms it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from headscope.base.glance import Glance, Shown, number
from headscope.base.result import Tabular
from headscope.base.saved import Saved, Stored
from headscope.base.sections import Rows, Section, Words
from headscope.base.specs import Provenance
from headscope.heads import HeadIndex

if TYPE_CHECKING:
    import pandas


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
