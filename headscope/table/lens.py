"""Readings of the residual stream by layer: lenses, logit attribution, measures of layers."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from headscope.base.files import Saved, read_only, read_parquet, whole_file
from headscope.base.result import (
    Drawn,
    Glance,
    Grid,
    Rows,
    Section,
    Shown,
    Tabular,
    Words,
    number,
    readable,
    sizes,
)
from headscope.base.specs import Provenance, ScoreSpec, Specified, specified
from headscope.base.statistics import mean_interval, top_order
from headscope.errors import HeadscopeError, InputError, nearest
from headscope.heads import HeadIndex
from headscope.table.scores import HeadScores
from headscope.table.table import UnknownScoreError

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class LensGrid(Saved, Shown, Tabular):
    """Lens readings of one prompt at every row (place in the stack) and position.

    Attributes:
        name: name of the lens and of what it read, e.g. ``logit lens, residual``.
        rows: places from the bottom up: ``embedding`` (the input of block 0) and ``L0``, ``L1``,
            ...: the stream after these blocks, or the output of their attention or MLP.
        positions: positions in the prompt.
        tokens: text of the prompt at these positions.
        ids: most likely tokens, in descending order; on ties the lowest id.
        texts: texts of these tokens.
        logits: logits of these tokens, soft cap included.
        probabilities: probabilities of these tokens.
        entropy: entropy of the whole distribution, in nats.
        kl: ``KL(model || lens)`` in nats: the information lost by stopping here, at least 0.
        targets: id of the token that is tracked at each position.
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
            object.__setattr__(self, name, read_only(getattr(self, name), dtype))

    @property
    def target_probability(self) -> Float[np.ndarray, "row pos"]:
        """Probability of the tracked token."""
        return np.asarray(np.exp(self.target_log_prob))

    def settled(self) -> list[str | None]:
        """First row from which the target stays on top, per position; None: never."""
        found: list[str | None] = []
        for ranks in self.target_rank.T:
            wrong = np.flatnonzero(ranks > 0)
            start = 0 if wrong.size == 0 else int(wrong[-1]) + 1
            found.append(self.rows[start] if start < len(self.rows) else None)
        return found

    def sections(self) -> list[Section]:
        """Report the grid and what it is."""
        return [
            Section(
                "Layer by layer",
                [
                    Words(
                        "What the model would say next if it stopped here: each state through the "
                        "model's own final norm and unembedding. The top row of the residual "
                        "stream is the model itself."
                    ),
                    Drawn("lens", self.name),
                ],
            )
        ]

    def glance(self) -> Glance:
        """Show each cell's most likely token, coloured by probability, the last layer on top."""
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
        """One row per place, position and rank of token, with the cell's facts."""
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
class HeadWords(Saved, Shown, Tabular):
    """Tokens that every head's output on one token promotes and suppresses most.

    Attributes:
        token: text of the token at which the heads are read.
        position: position of that token.
        layers: layer number of each entry of the layer axis.
        ids: along ``sign`` first the promoted tokens, then the suppressed ones.
        texts: texts of these tokens.
        values: logits that the head adds, minus their mean over the vocabulary; NaN for pruned
            heads.
        removed: heads that were pruned from the model.
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
            object.__setattr__(self, name, read_only(getattr(self, name), dtype))

    def promoted(self, head: "str | tuple[int, int]") -> list[tuple[str, float]]:
        """Tokens that a head promotes most, largest first."""
        return self._of(head, 0)

    def suppressed(self, head: "str | tuple[int, int]") -> list[tuple[str, float]]:
        """Tokens that a head suppresses most, lowest first."""
        return self._of(head, 1)

    def _of(self, head: "str | tuple[int, int]", sign: int) -> list[tuple[str, float]]:
        index = HeadIndex.parse(head)
        if index in self.removed:
            raise InputError(f"head {index} was pruned out of the model: it says nothing.")
        if index.layer not in self.layers or not 0 <= index.head < self.ids.shape[1]:
            raise InputError(f"there is no head {index} here: layers {self.layers}.")
        at = (self.layers.index(index.layer), index.head, sign)
        return list(zip(self.texts[at].tolist(), self.values[at].tolist(), strict=True))

    def sections(self, heads: Sequence[str] | None = None) -> list[Section]:
        """Report what single heads promote and suppress; by default the heads of :meth:`glance`."""
        rows = []
        for head in heads if heads is not None else [row[0] for row in self.glance().rows]:
            promoted = tuple(text for text, _ in self.promoted(head))
            suppressed = tuple(text for text, _ in self.suppressed(head))
            rows.append((head, promoted, suppressed))
        grid = Rows(("head", "promotes", "suppresses"), rows, "Heads with the largest parts")
        return [Section("What single heads say", [grid])]

    def glance(self) -> Glance:
        """Show the heads with the largest contributions, with their tokens."""
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
        """One row per head, sign and token; pruned heads are left out."""
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


Tolerance = tuple[float, float]


class Part(NamedTuple):
    """One summand of an attribution: kind, layer, head, and value in logits."""

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
    """Raise HeadscopeError if parts do not sum to the whole.

    Args:
        total: sum of the parts.
        whole: what they should sum to.
        largest: size of the largest part.
        tolerance: allowed gap: an absolute value, and a share of the largest part; the larger
            counts.
        what: what is decomposed, for the message.
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
class Attribution(Saved, Shown, Tabular):
    """A logit, or a difference of two, as an exact sum of parts, with the norms' scales frozen.

    All values are logits before a soft cap. The parts sum to ``whole``, which is computed from the
    last residual stream and equals the model's own logit; both are checked on construction.

    Attributes:
        target, foil: texts; the foil is None if a single logit is decomposed.
        position: position that is read.
        tokens: text of the prompt up to there.
        embedding: contributions of token and position embedding; one part if they cannot be
            separated.
        heads: contribution of every head; NaN if there is none, or it was pruned.
        biases: contribution of each layer's attention outside heads; NaN if there is none.
        mlps: contribution of every MLP (or block without attention).
        constant: biases of the final norm and of the unembedding.
        whole: the logit (difference).
        sources: contribution of each head from each token: its attention there times the value's
            share of the logit; sums over tokens to ``heads``. None if not requested.
        tolerance: largest gap: an absolute value, and a share of the largest part; the larger
            counts.
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
        """Freeze the arrays and check the sums."""
        for name in ("heads", "biases", "mlps", "sources"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, read_only(values, np.float64))
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
        """Name of the decomposed logit."""
        return repr(self.target) if self.foil is None else f"{self.target!r} less {self.foil!r}"

    @property
    def gap(self) -> float:
        """Sum of the parts minus the whole: the rounding error."""
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
        """The k parts of largest magnitude, largest first."""
        return sorted(self, key=lambda part: -abs(part.value))[:k]

    def top_sources(self, k: int = 10) -> list[tuple[str, int, float]]:
        """The k largest ``(head, position of the token, logits)``."""
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
        """Contribution of each token through all heads; empty if not requested."""
        if self.sources is None:
            return np.zeros(0)
        return np.asarray(np.nansum(self.sources, axis=(0, 1)))

    def strongest(self, k: int = 8) -> list[str]:
        """Heads with the largest contributions."""
        return [part.name for part in self.top(len(list(self))) if part.kind == "head"][:k]

    def sections(self) -> list[Section]:
        """Report the logit's largest parts, by head and by source token."""
        blocks: list[Any] = [
            Words(
                f"The logit of {self.name} at position {self.position} is {self.whole:.4g}; its "
                f"parts sum to it up to {abs(self.gap):.1e}. The scales of norms are held fixed."
            ),
            Drawn("attribution", "Largest parts of the logit."),
            Drawn("attribution_by_head", "What each head adds."),
        ]
        if self.sources is not None:
            blocks.append(Drawn("attribution_by_source", "Which token's value was moved."))
            rows = [
                (head, f"{at} {self.tokens[at]}", value) for head, at, value in self.top_sources(12)
            ]
            blocks.append(Rows(("head", "token", "logits"), rows, caption="Strongest moves"))
        largest = [(part.name, part.value) for part in self.top(12)]
        blocks.append(Rows(("part", "logits"), largest, caption="Largest parts"))
        return [Section("What makes the logit", blocks)]

    def glance(self) -> Glance:
        """Show the parts with the largest contributions of either sign."""
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
        """Contribution of every head, as a score."""
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


_KEY = b"headscope"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerMeasure(Specified):
    """One measure at every place of the residual stream.

    Attributes:
        spec: declaration of the measure.
        per_text: value for every text; NaN is missing. A measure of all texts together has a single
            column.
    """

    spec: ScoreSpec
    per_text: Float[np.ndarray, "place text"]

    @property
    def mean(self) -> Float[np.ndarray, " place"]:
        """Mean over texts; NaN where no text has a value."""
        known = ~np.isnan(self.per_text)
        total = np.where(known, self.per_text, 0.0).sum(1)
        with np.errstate(invalid="ignore"):
            mean: Float[np.ndarray, " place"] = total / np.where(known.any(1), known.sum(1), np.nan)
        return mean

    def interval(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, " place"], Float[np.ndarray, " place"]]:
        """Confidence interval of the mean over texts; NaN with fewer than two."""
        return mean_interval(self.per_text, level, bounds=self.bounds)


@dataclass(frozen=True, eq=False, repr=False)
class LayerTable(Shown, Tabular, Mapping[str, LayerMeasure]):
    """Measures by name, over the places of one model's residual stream.

    Attributes:
        places: names of the places: ``embed``, then ``L0`` and so on for the output of each block.
        measures: measures, in order.
        provenance: where it came from.

    Example:
        >>> texts = ["The cat sat on the mat. The dog ran.", "A bird sang. The sun came out."]
        >>> table = hs.geometry.layers(model, texts)
        >>> table.places[0], table["curvature"].mean.shape == (model.shape.n_layers + 1,)
        ('embed', True)
    """

    places: tuple[str, ...]
    measures: tuple[LayerMeasure, ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check that every measure has a value at every place.

        Raises:
            InputError: if not, or if two share a name.
        """
        names = [measure.name for measure in self.measures]
        if len(set(names)) < len(names):
            raise InputError(f"two measures share a name: {', '.join(names)}.")
        for measure in self.measures:
            if len(measure.per_text) != len(self.places):
                raise InputError(
                    f"{measure.name!r} has {len(measure.per_text)} values for "
                    f"{len(self.places)} places."
                )

    def __getitem__(self, name: str) -> LayerMeasure:
        """Return one measure; an unknown name raises InputError with the nearest one."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise UnknownScoreError(nearest(name, list(self), kind="measure"))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in order."""
        return iter(measure.name for measure in self.measures)

    def __len__(self) -> int:
        """Return the number of measures."""
        return len(self.measures)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per place and measure: mean, ends of the 95% interval, number of texts."""
        import pandas

        frames = []
        for measure in self.measures:
            low, high = measure.interval()
            columns = {
                "place": list(self.places),
                "measure": measure.name,
                "mean": measure.mean,
                "low": low,
                "high": high,
                "n": (~np.isnan(measure.per_text)).sum(1),
                "unit": measure.unit,
            }
            frames.append(pandas.DataFrame(columns))
        return pandas.concat(frames, ignore_index=True)

    def save(self, path: "str | PathLike[str]") -> None:
        """Save as one Parquet file: a row per measure and place, with the value of every text."""
        import pyarrow
        from pyarrow import parquet

        rows = pyarrow.table(
            {
                "measure": [m.name for m in self.measures for _ in self.places],
                "place": [place for _ in self.measures for place in self.places],
                "per_text": pyarrow.array(
                    [row for m in self.measures for row in m.per_text.tolist()],
                    pyarrow.list_(pyarrow.float64()),
                ),
            }
        )
        facts = {
            "format": _FORMAT,
            "kind": "layers",
            "places": list(self.places),
            "measures": [m.spec.to_json() for m in self.measures],
            "provenance": self.provenance.to_json(),
        }
        rows = rows.replace_schema_metadata({_KEY: json.dumps(facts, allow_nan=False)})
        with whole_file(Path(path)) as file:
            parquet.write_table(rows, file, compression="zstd")

    @staticmethod
    def load(path: "str | PathLike[str]") -> "LayerTable":
        """Load a file written by :meth:`save`.

        Raises:
            InputError: if the file is missing or damaged, or holds something else.
        """
        shown = repr(str(path))
        rows = read_parquet(Path(path))
        try:
            facts: dict[str, Any] = json.loads((rows.schema.metadata or {})[_KEY])
            if facts["format"] != _FORMAT or facts["kind"] != "layers":
                raise InputError(f"{shown} does not hold measures of layers of format {_FORMAT}.")
            places = tuple(str(place) for place in facts["places"])
            values = np.array(rows["per_text"].to_pylist(), dtype=object)
            return LayerTable(
                places,
                tuple(
                    _measure(said, values[n * len(places) : (n + 1) * len(places)])
                    for n, said in enumerate(facts["measures"])
                ),
                Provenance.from_json(facts["provenance"]),
            )
        except InputError:
            raise
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise InputError(f"{shown} is a damaged table of layers: {error!r}.") from None

    def glance(self) -> Glance:
        """Show the mean of every measure at the first, middle and last place."""
        chosen = sorted({0, len(self.places) // 2, len(self.places) - 1})
        return Glance(
            "Measures of layers",
            [self.provenance.model or "", f"{len(self.places)} places"],
            ["measure", *(self.places[at] for at in chosen), "unit"],
            [
                [m.name, *(number(float(m.mean[at])) for at in chosen), m.unit]
                for m in self.measures
            ],
            hint="hs.plots.layers(table); table.to_pandas()",
            whole=True,
        )


def _measure(said: Mapping[str, Any], rows: Iterable[Any]) -> LayerMeasure:
    per_text = np.array([np.array(row, dtype=float) for row in rows])
    return LayerMeasure(specified(said)["spec"], per_text)


@dataclass(frozen=True, eq=False, repr=False)
class DecoderLens(Saved, Shown, Tabular):
    """What a decoder generates when it reads an intermediate layer of its encoder.

    Attributes:
        layers: encoder layers that were read; 0 is the input of the first.
        texts: greedy output of the decoder, by layer and example.
        loss: mean teacher-forced cross-entropy of each target, in nats.
        right: share of each target's tokens that are the most likely ones, teacher-forced.
        normed: whether the encoder's final norm was applied.
        provenance: where it came from.
    """

    layers: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...]
    loss: Float[np.ndarray, "layer batch"]
    right: Float[np.ndarray, "layer batch"]
    normed: bool
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the arrays."""
        for name in ("loss", "right"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.float64))

    def glance(self) -> Glance:
        """Show loss, share of correct tokens, and the first text, layer by layer."""
        return Glance(
            "decoder lens",
            [self.provenance.model, "through the final norm" if self.normed else "without a norm"],
            ("encoder layer", "loss", "right", "first text"),
            [
                (
                    str(layer),
                    number(float(self.loss[at].mean())),
                    number(float(self.right[at].mean())),
                    self.texts[at][0] if self.texts[at] else "",
                )
                for at, layer in enumerate(self.layers)
            ],
            hint="lens.texts, lens.loss",
            whole=True,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per layer and example."""
        import pandas

        layer, example = np.indices(self.loss.shape).reshape(2, -1)
        return pandas.DataFrame(
            {
                "layer": np.array(self.layers)[layer],
                "example": example,
                "loss": self.loss.ravel(),
                "right": self.right.ravel(),
                "text": [
                    self.texts[i][j] if self.texts[i] else ""
                    for i, j in zip(layer.tolist(), example.tolist(), strict=True)
                ],
            }
        )
