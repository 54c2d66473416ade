"""Everything that weights say of one head, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headscope.base.glance import Glance, Shown, number
from headscope.base.saved import Saved

# What a card without ranks says of them.
NO_RANKS = (
    "No ranks by weights: that takes scores of all heads; "
    "hs.explain(head, model, ranks=True) or headscope head --ranks has them."
)
_TOLD = ("copying_eigenvalues", "copying_top5", "matching_eigenvalues", "ov_effective_rank")


@dataclass(frozen=True, repr=False)
class HeadCard(Saved, Shown):
    """What weights say of one head. JSON values only.

    Attributes:
        head: ``L5H1``.
        kv_head: key/value head that it reads.
        model: name.
        scores: value of every weight score.
        ranks: place of the head among all heads by each score, 1 the largest; empty where no
            other head was scored.
        ov: largest directions of the OV circuit with tokens read and written.
        qk: the same of the QK circuit: tokens of the query and of the key.
        fed_by: per kind of composition, the earlier heads that feed it most.
        feeds: per kind, the later heads that it feeds most.
        missing: what the family does not allow, with the reason.
    """

    head: str
    kv_head: int
    model: str
    scores: Mapping[str, float]
    ranks: Mapping[str, int]
    ov: list[dict[str, Any]]
    qk: list[dict[str, Any]]
    fed_by: Mapping[str, list[tuple[str, float]]]
    feeds: Mapping[str, list[tuple[str, float]]]
    missing: Mapping[str, str]

    def glance(self) -> Glance:
        """Scores of copying, what the head reads and writes, and its partners."""
        rows = [(name, number(self.scores[name])) for name in _TOLD if name in self.scores]
        for circuit, between, views in (
            ("OV", "reads → writes", self.ov),
            ("QK", "asks → finds", self.qk),
        ):
            for view in views[:2]:
                sides = (" ".join(view[side][0][:4]) for side in ("reads", "writes"))
                rows.append((f"{circuit} {between}", " → ".join(sides)))
        for title, partners in (("fed by", self.fed_by), ("feeds", self.feeds)):
            for mode, found in partners.items():
                if found:
                    heads = ", ".join(f"{one} {value:.2f}" for one, value in found[:3])
                    rows.append((f"{title} ({mode})", heads))
        rows += [(f"no {name}", why) for name, why in self.missing.items()]
        return Glance(
            f"head {self.head}",
            [f"key/value head {self.kv_head}", f"{len(self.scores)} weight scores", self.model],
            ("what", ""),
            rows,
            hint=f"card.to_json(), hs.explain({self.head!r}, model)",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the card as a JSON object."""
        return asdict(self)
