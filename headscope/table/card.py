"""Everything that weights say of one head, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HeadCard:
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

    def to_json(self) -> dict[str, Any]:
        """Return the card as a JSON object."""
        return asdict(self)
