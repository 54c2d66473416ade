"""One logit as a sum: what the embedding, every head, every MLP and the biases add to it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from headscope.base.glance import Glance, Shown, sizes
from headscope.base.saved import Saved
from headscope.errors import HeadscopeError
from headscope.heads import HeadIndex
from headscope.table.provenance import Provenance
from headscope.table.scores import HeadScores
from headscope.table.summary import frozen

if TYPE_CHECKING:
    import pandas


Tolerance = tuple[float, float]


class Part(NamedTuple):
    """One summand: what it is, where it is, and what it adds, in logits."""

    kind: str
    layer: int | None
    head: int | None
    value: float

    @property
    def name(self) -> str:
        """Short form: ``L5H1``, ``L5 mlp``, ``token embedding``."""
        if self.head is not None:
            return str(HeadIndex(int(self.layer or 0), self.head))
        return self.kind if self.layer is None else f"L{self.layer} {self.kind}"


def check_sum(
    total: Float[np.ndarray, " row"],
    whole: Float[np.ndarray, " row"],
    largest: Float[np.ndarray, " row"],
    tolerance: Tolerance,
    what: str,
) -> None:
    """Raise HeadscopeError where parts do not sum to the whole.

    Args:
        total: sum of the parts.
        whole: what they should sum to.
        largest: size of the largest part.
        tolerance: allowed gap: a number, and a share of the largest part; the larger one counts.
        what: is split, for the sentence.
    """
    absolute, share = tolerance
    allowed = np.maximum(absolute, share * np.maximum(np.abs(whole), largest))
    excess = np.abs(total - whole) / allowed
    if not bool((excess <= 1).all()):
        worst = int(np.nan_to_num(excess, nan=np.inf).argmax())
        raise HeadscopeError(
            f"{what}: the parts sum to {total[worst]:.7g} and not to {whole[worst]:.7g} (allowed "
            f"difference {allowed[worst]:.2g}), so this split is not to be trusted; please report "
            "the model."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Saved, Shown):
    """A logit, or a difference of two, as an exact sum of parts, with the norms' scales held.

    All values are logits before a soft cap. The parts sum to ``whole``, which is computed from
    the last residual stream and equals the model's own logit; both are checked on making, with
    an error if they fail.

    Attributes:
        target, foil: texts; the foil is None where one logit is split.
        position: that is read.
        tokens: text of the prompt up to there.
        embedding: what token embedding and position embedding add; one part where they cannot
            be told apart.
        heads: what every head adds; NaN where there is none, or it was removed.
        biases: what attention of each layer adds that belongs to no head; NaN where there is none.
        mlps: what every MLP (or block without attention) adds.
        constant: biases of the final norm and of the unembedding.
        whole: the logit (difference).
        sources: what each head moved from each token: its attention there times the value's
            share of the logit; sums over tokens to ``heads``. None where not asked for.
        tolerance: largest gap: a number, and a share of the largest part; the larger one counts.
        kv_heads: number of key/value heads.
        provenance: where it came from.
    """

    target: str
    foil: str | None
    position: int
    tokens: tuple[str, ...]
    embedding: dict[str, float]
    heads: Float[np.ndarray, "layer head"]
    biases: Float[np.ndarray, " layer"]
    mlps: Float[np.ndarray, " layer"]
    constant: float
    whole: float
    sources: Float[np.ndarray, "layer head source"] | None = None
    tolerance: Tolerance = (1e-4, 1e-5)
    kv_heads: int = 1
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the arrays; check the sums."""
        for name in ("heads", "biases", "mlps", "sources"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, frozen(values, np.float64))
        parts = np.array([part.value for part in self])
        check_sum(
            parts.sum(keepdims=True),
            np.array([self.whole]),
            np.abs(parts).max(keepdims=True),
            self.tolerance,
            f"attribution of {self.name}",
        )
        if self.sources is not None:
            seen = np.isfinite(self.heads)
            moved = self.sources.sum(-1)[seen]
            check_sum(
                moved,
                self.heads[seen],
                np.abs(self.sources).max(-1)[seen],
                self.tolerance,
                f"attribution of {self.name} by source token",
            )

    @property
    def name(self) -> str:
        """What is split."""
        return repr(self.target) if self.foil is None else f"{self.target!r} less {self.foil!r}"

    @property
    def gap(self) -> float:
        """Sum of the parts less the whole: rounding."""
        return sum(part.value for part in self) - self.whole

    def __iter__(self) -> Iterator[Part]:
        """Every part, from the bottom of the model up."""
        for kind, value in self.embedding.items():
            yield Part(kind, None, None, value)
        for layer, heads in enumerate(self.heads):
            for head in np.flatnonzero(np.isfinite(heads)).tolist():
                yield Part("head", layer, head, float(heads[head]))
            if np.isfinite(self.biases[layer]):
                yield Part("attention bias", layer, None, float(self.biases[layer]))
            yield Part("mlp", layer, None, float(self.mlps[layer]))
        yield Part("output bias", None, None, self.constant)

    def top(self, k: int = 10) -> list[Part]:
        """The k parts that are farthest from 0, largest first."""
        return sorted(self, key=lambda part: -abs(part.value))[:k]

    def top_sources(self, k: int = 10) -> list[tuple[str, int, float]]:
        """The k strongest moves as ``(head, position of the token, logits)``."""
        if self.sources is None:
            return []
        values = np.nan_to_num(self.sources)
        order = np.argsort(-np.abs(values), axis=None, kind="stable")[:k]
        places = zip(*np.unravel_index(order, values.shape), strict=True)
        return [
            (str(HeadIndex(int(layer), int(head))), int(at), float(values[layer, head, at]))
            for layer, head, at in places
        ]

    @cached_property
    def by_source(self) -> Float[np.ndarray, " source"]:
        """What all heads together moved from each token; empty where not asked for."""
        if self.sources is None:
            return np.zeros(0)
        return np.asarray(np.nansum(self.sources, axis=(0, 1)))

    def glance(self) -> Glance:
        """The parts that add most, of either sign."""
        most = max((abs(part.value) for part in self.top(1)), default=0.0) or 1.0
        return Glance(
            f"direct attribution of {self.name}",
            [
                sizes(("layer", "head"), self.heads.shape),
                f"parts sum to {self.whole:.3f} logits",
                self.provenance.model,
            ],
            ("part", "logits", ""),
            [
                (part.name, f"{part.value:+.3f}", "█" * round(20 * abs(part.value) / most))
                for part in self.top(12)
            ],
            hint="hs.plots.waterfall(attribution), attribution.top(10), attribution.to_pandas()",
        )

    def head_scores(self) -> HeadScores:
        """What every head adds, as a score for heatmaps and rankings."""
        return HeadScores.from_summary(
            "direct_attribution",
            self.heads,
            kv_heads=self.kv_heads,
            unit="logits",
            alternative="two-sided",
            description=f"What each head adds directly to the logit of {self.name}.",
            source="Elhage et al. 2021, direct path; Wang et al. 2022, direct effect",
            provenance=self.provenance,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per part: name, kind, layer, head, value in logits."""
        import pandas

        parts = list(self)
        frame = pandas.DataFrame(parts, columns=["kind", "layer", "head", "value"])
        frame = frame.astype({"layer": "Int64", "head": "Int64"})
        frame.insert(0, "name", [part.name for part in parts])
        return frame
