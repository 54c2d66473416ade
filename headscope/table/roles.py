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
    """

    score: str
    heads: tuple[tuple[HeadIndex, float], ...]
    tested: bool

    def __str__(self) -> str:
        """One line; says it in words where there is none."""
        role = self.score.replace("_", " ")
        if not self.tested:
            return f"{role}: not tested (needs a control and at least two examples)"
        if not self.heads:
            return f"no {role} heads"
        shown = ", ".join(f"{head} {mean:.2f}" for head, mean in self.heads[:8])
        more = len(self.heads) - 8
        return f"{role}: {shown}" + (f" and {more} more" if more > 0 else "")


def find_roles(scores: Iterable[HeadScores], alpha: float) -> list[RoleFinding]:
    """Look at every score with a threshold; heads significant at false discovery rate alpha."""
    findings = []
    for one in scores:
        if one.threshold is None:
            continue
        significant = one.significant(alpha)
        heads = tuple(pair for pair in one.top(one.mean.size) if significant[pair[0]])
        tested = bool(np.isfinite(one.p_value).any())
        findings.append(RoleFinding(one.name, heads, tested))
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
