"""Which heads earn a name, and which names no head earns."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from headscope.heads import HeadIndex
from headscope.table.scores import HeadScores


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
