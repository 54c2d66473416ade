"""What a lens reads: likely tokens at every layer and position, and tokens that heads write."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from headscope.base.glance import Glance, Grid, Shown, number, readable, sizes
from headscope.base.saved import Saved
from headscope.base.statistics import top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table.provenance import Provenance
from headscope.table.summary import frozen

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class LensGrid(Saved, Shown):
    """What a lens reads at every row (a place in the stack) and position of one prompt.

    Attributes:
        name: of the lens and of what it read, e.g. ``logit lens, residual``.
        rows: places from the bottom up: ``embedding`` (what enters block 0) and ``L0``, ``L1``,
            ...: the stream after these blocks, or what their attention or MLP wrote.
        positions: in the prompt.
        tokens: text of the prompt at these positions.
        ids: most likely tokens, the likeliest first; of equals the lowest id.
        texts: of these tokens.
        logits: of these tokens, soft cap included.
        probabilities: of these tokens.
        entropy: of the whole distribution, in nats.
        kl: ``KL(model || lens)`` in nats: what is lost by stopping here, at least 0.
        targets: id of the token that is followed at each position.
        target_rank: number of tokens above it; 0 is best.
        target_log_prob: its log-probability in nats.
        provenance: where it came from.
    """

    name: str
    rows: tuple[str, ...]
    positions: Int[np.ndarray, " pos"]
    tokens: tuple[str, ...]
    ids: Int[np.ndarray, "row pos k"]
    texts: Shaped[np.ndarray, "row pos k"]
    logits: Float[np.ndarray, "row pos k"]
    probabilities: Float[np.ndarray, "row pos k"]
    entropy: Float[np.ndarray, "row pos"]
    kl: Float[np.ndarray, "row pos"]
    targets: Int[np.ndarray, " pos"]
    target_texts: tuple[str, ...]
    target_rank: Int[np.ndarray, "row pos"]
    target_log_prob: Float[np.ndarray, "row pos"]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape; freeze the arrays."""
        shape = (len(self.rows), len(self.positions))
        if self.ids.shape[:2] != shape or self.kl.shape != shape:
            raise InputError(f"{self.name!r} has cells {self.ids.shape[:2]}, not {shape}.")
        for name, dtype in _DTYPES.items():
            object.__setattr__(self, name, frozen(getattr(self, name), dtype))

    @property
    def target_probability(self) -> Float[np.ndarray, "row pos"]:
        """Probability of the token that is followed."""
        return np.asarray(np.exp(self.target_log_prob))

    def settled(self) -> list[str | None]:
        """First row from which the target stays on top, for each position; None: never."""
        found: list[str | None] = []
        for ranks in self.target_rank.T:
            wrong = np.flatnonzero(ranks > 0)
            start = 0 if wrong.size == 0 else int(wrong[-1]) + 1
            found.append(self.rows[start] if start < len(self.rows) else None)
        return found

    def glance(self) -> Glance:
        """Most likely token of every cell, coloured by its probability, the model's on top."""
        top = self.texts[::-1, :, 0]
        tokens = [
            (str(at), token, str(best), number(float(chance)))
            for at, token, best, chance in zip(
                self.positions, self.tokens, top[0], self.probabilities[-1, :, 0], strict=True
            )
        ]
        return Glance(
            self.name,
            [sizes(("row", "position"), self.kl.shape), self.provenance.model],
            ("position", "token", f"read at {self.rows[-1]}", "probability"),
            tokens[-6:],
            Grid(
                self.rows[::-1],
                [f"{at} {token}" for at, token in zip(self.positions, self.tokens, strict=True)],
                [[str(one) for one in row] for row in top],
                self.probabilities[::-1, :, 0].tolist(),
            ),
            hint="hs.plots.lens_grid(grid), grid.settled(), grid.to_pandas()",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per place, position and rank of token, with what is known of the cell."""
        import pandas

        n_rows, n_pos, k = self.ids.shape
        row, pos, rank = (axis.ravel() for axis in np.indices((n_rows, n_pos, k)))
        at = (row, pos)
        return pandas.DataFrame(
            {
                "row": np.array(self.rows)[row],
                "position": self.positions[pos],
                "token": np.array(self.tokens, dtype=object)[pos],
                "rank": rank,
                "id": self.ids.ravel(),
                "text": self.texts.ravel(),
                "logit": self.logits.ravel(),
                "probability": self.probabilities.ravel(),
                "entropy": self.entropy[at],
                "kl": self.kl[at],
                "target": np.array(self.target_texts, dtype=object)[pos],
                "target_id": self.targets[pos],
                "target_rank": self.target_rank[at],
                "target_probability": self.target_probability[at],
            }
        )


_DTYPES: dict[str, Any] = {
    "positions": np.int64,
    "ids": np.int64,
    "texts": object,
    "logits": np.float64,
    "probabilities": np.float64,
    "entropy": np.float64,
    "kl": np.float64,
    "targets": np.int64,
    "target_rank": np.int64,
    "target_log_prob": np.float64,
}


def _listed(words: list[tuple[str, float]]) -> str:
    return ", ".join(f"{readable(text, 12)!r} {value:+.2f}" for text, value in words)


@dataclass(frozen=True, eq=False, repr=False)
class HeadWords(Saved, Shown):
    """Tokens whose logits every head's output on one token raises and lowers most.

    Attributes:
        token: text of the token that the heads stand on.
        position: of that token.
        layers: layer number of each entry of the layer axis.
        ids: along ``sign`` first the promoted tokens, then the suppressed ones.
        texts: of these tokens.
        values: logits that the head adds above its mean over the vocabulary; NaN for heads that
            were pruned.
        removed: heads that were pruned out of the model: they say nothing.
        provenance: where it came from.
    """

    token: str
    position: int
    layers: tuple[int, ...]
    ids: Int[np.ndarray, "layer head sign k"]
    texts: Shaped[np.ndarray, "layer head sign k"]
    values: Float[np.ndarray, "layer head sign k"]
    removed: frozenset[HeadIndex] = frozenset()
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        values = np.array(self.values, dtype=np.float64)
        for head in self.removed:
            if head.layer in self.layers:
                values[self.layers.index(head.layer), head.head] = np.nan
        object.__setattr__(self, "values", values)
        for name, dtype in (("ids", np.int64), ("texts", object), ("values", np.float64)):
            object.__setattr__(self, name, frozen(getattr(self, name), dtype))

    def promoted(self, head: "str | tuple[int, int]") -> list[tuple[str, float]]:
        """Tokens that a head raises most, largest first."""
        return self._of(head, 0)

    def suppressed(self, head: "str | tuple[int, int]") -> list[tuple[str, float]]:
        """Tokens that a head lowers most, lowest first."""
        return self._of(head, 1)

    def _of(self, head: "str | tuple[int, int]", sign: int) -> list[tuple[str, float]]:
        index = HeadIndex.parse(head)
        if index in self.removed:
            raise InputError(f"head {index} was pruned out of the model: it says nothing.")
        if index.layer not in self.layers or not 0 <= index.head < self.ids.shape[1]:
            raise InputError(f"there is no head {index} here: layers {self.layers}.")
        at = (self.layers.index(index.layer), index.head, sign)
        return list(zip(self.texts[at].tolist(), self.values[at].tolist(), strict=True))

    def glance(self) -> Glance:
        """Heads that raise a token most, with their tokens."""
        best = self.values[:, :, 0, 0]
        order = top_order(best, 10)
        layers, heads = np.unravel_index(order, best.shape)
        rows = []
        for place, head in zip(layers.tolist(), heads.tolist(), strict=True):
            index = HeadIndex(self.layers[place], head)
            sides = (self.promoted(index)[:3], self.suppressed(index)[:2])
            rows.append((str(index), *(_listed(side) for side in sides)))
        where = f"at position {self.position} {readable(self.token, 20)!r}"
        return Glance(
            "tokens that heads write",
            [sizes(("layer", "head"), self.ids.shape[:2]), where, "logits", self.provenance.model],
            ("head", "raises", "lowers"),
            rows,
            hint="words.promoted('L5H1'), words.to_pandas()",
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head that is there, sign and token."""
        import pandas

        layer, head, sign, rank = (axis.ravel() for axis in np.indices(self.ids.shape))
        frame = pandas.DataFrame(
            {
                "layer": np.array(self.layers)[layer],
                "head": head,
                "sign": np.array(["promoted", "suppressed"])[sign],
                "rank": rank,
                "id": self.ids.ravel(),
                "text": self.texts.ravel(),
                "value": self.values.ravel(),
            }
        )
        return frame[frame.value.notna()].reset_index(drop=True)
