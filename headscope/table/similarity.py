"""Similarity of heads, and syntactic relations that heads find."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.base.files import Saved, Stored, read_only
from headscope.base.result import Drawn, Glance, Section, Shown, Tabular, number, sizes
from headscope.base.specs import Provenance, ScoreSpec, Specified, portable
from headscope.errors import InputError, nearest, whole
from headscope.heads import HeadIndex
from headscope.table.table import HeadTable

if TYPE_CHECKING:
    import pandas


_SHOWN = 10


@dataclass(frozen=True, eq=False, repr=False)
class HeadSimilarity(Specified, Saved, Shown, Tabular):
    """One similarity measure for every pair of heads of ``first`` and ``second``.

    Attributes:
        spec: declaration of the measure; its ``direction`` says whether more (``higher``) or less
            (``lower``) means more alike.
        values: value of each pair.
        null: the same with the rows of the second head shuffled, one matrix per draw.
        first: heads of the rows.
        second: heads of the columns.
        models: names of the two models.
        provenance: where it came from.
        within: whether rows and columns are the heads of one model on one probe; two models may
            share their name.

    Example:
        >>> likeness = hs.similarity.heads(model, probe, "cka")
        >>> one, other, value = likeness.top(1)[0]
        >>> one != other
        True
    """

    spec: ScoreSpec
    values: Float[np.ndarray, "first second"]
    null: Float[np.ndarray, "draw first second"]
    first: tuple[HeadIndex, ...]
    second: tuple[HeadIndex, ...]
    models: tuple[str, str]
    provenance: Provenance = field(default_factory=Provenance)
    within: bool = False

    def __post_init__(self) -> None:
        """Check the shapes and freeze the arrays.

        Raises:
            InputError: if a matrix does not fit the heads.
        """
        shape = (len(self.first), len(self.second))
        if self.values.shape != shape or self.null.shape[1:] != shape or self.null.ndim != 3:
            raise InputError(
                f"{self.spec.name!r} of {shape[0]} and {shape[1]} heads has values of shape "
                f"{self.values.shape} and a null of shape {self.null.shape}."
            )
        for name in ("values", "null"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.float64))
        object.__setattr__(self, "models", tuple(map(portable, self.models)))
        if self.within and self.first != self.second:
            raise InputError("heads of one model are the same in rows and columns.")

    @classmethod
    def _of_parts(cls, parts: dict[str, Any]) -> "HeadSimilarity":
        """Make it again of what was saved; older files do not say ``within``."""
        alike = parts["first"] == parts["second"] and len(set(parts["models"])) == 1
        parts.setdefault("within", alike)
        return cls(**parts)

    @property
    def pairs(self) -> Bool[np.ndarray, "first second"]:
        """Mask of pairs with a value; within a model each pair counts once."""
        known: np.ndarray = ~np.isnan(self.values)
        if self.within:
            known = np.triu(known, 1)
        return known

    @property
    def distance(self) -> Float[np.ndarray, "first second"]:
        """Distance of each pair, from 0 up.

        The square root of a divergence, which makes it a metric, or 1 minus a correlation. Pairs
        without a value get the largest distance of any pair.
        """
        far = np.sqrt(self.values) if self.direction == "lower" else 1 - self.values
        most = float(np.nanmax(far)) if np.isfinite(far).any() else 1.0
        filled: np.ndarray = np.where(np.isnan(far), most, np.clip(far, 0.0, None))
        if self.within:
            filled = (filled + filled.T) / 2
            np.fill_diagonal(filled, 0.0)
        return filled

    @property
    def p_value(self) -> Float[np.ndarray, "first second"]:
        """P-value of each pair: how often the shuffled data have any pair this similar.

        ``(1 + draws whose most similar pair is at least as similar) / (1 + draws)``: corrected for
        all pairs (Westfall & Young 1993, max statistic), and no smaller than ``1 / (1 + draws)``.
        NaN where there is no pair.
        """
        sign = -1.0 if self.direction == "lower" else 1.0
        drawn = np.where(self.pairs, sign * self.null, -np.inf).max((1, 2))
        as_alike = (drawn[:, None, None] >= sign * self.values).sum(0)
        found: np.ndarray = (1 + as_alike) / (1 + len(drawn))
        return np.where(self.pairs, found, np.nan)

    def top(self, k: int = 10) -> list[tuple[HeadIndex, HeadIndex, float]]:
        """The k most similar pairs, most similar first; on ties the first ones.

        Args:
            k: number of pairs.
        """
        whole(k, "k", 0)
        sign = 1.0 if self.direction == "lower" else -1.0
        keyed = np.where(self.pairs, sign * self.values, np.inf).ravel()
        order = np.argsort(keyed, kind="stable")[: min(k, int(self.pairs.sum()))]
        at = [divmod(int(one), len(self.second)) for one in order]
        return [(self.first[i], self.second[j], float(self.values[i, j])) for i, j in at]

    def matches(self) -> list[tuple[HeadIndex, HeadIndex, float]]:
        """Match the heads of two models one to one, minimising the sum of distances.

        Raises:
            InputError: within a single model, where every head would match itself.
        """
        from scipy.optimize import linear_sum_assignment

        if self.within:
            raise InputError("within one model every head matches itself: give other=.")
        rows, columns = linear_sum_assignment(self.distance)
        return [
            (self.first[i], self.second[j], float(self.values[i, j]))
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        ]

    def linkage(self, method: str = "average", *, columns: bool = False) -> np.ndarray:
        """Hierarchical clustering of the heads, in scipy's format ``[merge 4]``.

        Within a model heads are clustered by their distances; between models heads of one side by
        how their distances to all heads of the other side differ (Euclidean).

        Args:
            method: linkage method of ``scipy.cluster.hierarchy.linkage``.
            columns: cluster the heads of the second model.

        Raises:
            InputError: if there are fewer than two heads, or no such method.
        """
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        far = self.distance.T if columns else self.distance
        if len(far) < 2:
            raise InputError("one head cannot be clustered: give a model with two or more.")
        given = squareform(far, checks=False) if self.within else far
        try:
            made: np.ndarray = linkage(given, method, optimal_ordering=len(far) <= 512)
        except ValueError as error:
            raise InputError(f"method={method!r}: {error}") from None
        return made

    def order(self, method: str = "average", *, columns: bool = False) -> Int[np.ndarray, " head"]:
        """Leaf order of :meth:`linkage`, in which similar heads are adjacent."""
        from scipy.cluster.hierarchy import leaves_list

        if len(self.second if columns else self.first) < 2:
            return np.zeros(1, dtype=int)
        return np.asarray(leaves_list(self.linkage(method, columns=columns)), dtype=int)

    def clusters(
        self, count: int, method: str = "average", *, columns: bool = False
    ) -> list[list[HeadIndex]]:
        """Cluster the heads into at most ``count`` groups, largest first.

        Args:
            count: maximum number of clusters.
            method: as in :meth:`linkage`.
            columns: cluster the heads of the second model.
        """
        from scipy.cluster.hierarchy import fcluster

        whole(count, "count", 1)
        heads = self.second if columns else self.first
        label = fcluster(self.linkage(method, columns=columns), count, "maxclust")
        made = [
            [head for head, one in zip(heads, label.tolist(), strict=True) if one == number]
            for number in sorted(set(label.tolist()))
        ]
        return sorted(made, key=lambda some: (-len(some), some[0]))

    def embed(self, dimensions: int = 2) -> Float[np.ndarray, "head dimension"]:
        """Embed heads as points that approximate their distances: classical MDS (Torgerson 1952).

        Args:
            dimensions: number of dimensions.

        Raises:
            InputError: between two models, where distances within one are not known.
        """
        if not self.within:
            raise InputError("a map needs distances within one model: leave other= out.")
        values, vectors = self._scaled()
        kept = min(whole(dimensions, "dimensions", 1), len(values))
        points = vectors[:, :kept] * np.sqrt(np.clip(values[:kept], 0.0, None))
        points *= np.where(points.sum(0) < 0, -1.0, 1.0)  # the sign is nobody's: fix it
        return np.pad(points, ((0, 0), (0, dimensions - kept)))

    def explained(self, dimensions: int = 2) -> float:
        """Share of the squared distances that :meth:`embed` preserves, up to 1."""
        values, _ = self._scaled()
        positive = np.clip(values, 0.0, None)
        return float(positive[:dimensions].sum() / positive.sum()) if positive.any() else 1.0

    def _scaled(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, largest first, and eigenvectors of the doubly centred squared distances."""
        square = self.distance**2
        centred = square - square.mean(0) - square.mean(1)[:, None] + square.mean()
        values, vectors = np.linalg.eigh(-centred / 2)
        return values[::-1], vectors[:, ::-1]

    def glance(self) -> Glance:
        """Show the most similar pairs, with their null."""
        expected = {
            (one, other): float(self.null[:, i, j].mean())
            for i, one in enumerate(self.first)
            for j, other in enumerate(self.second)
        }
        return Glance(
            self.name.replace("_", " "),
            [
                sizes(("head",), (len(self.first),))
                if self.within
                else f"{len(self.first)} x {len(self.second)} heads",
                self.unit,
                self.models[0] if self.within else " and ".join(self.models),
            ],
            ("head", "most alike", "value", "out of order"),
            [
                (str(one), str(other), number(value), number(expected[one, other]))
                for one, other, value in self.top(_SHOWN)
            ],
            hint="hs.plots.head_similarity(likeness), likeness.clusters(5)",
        )

    def sections(self) -> list[Section]:
        """Report the glance and the pictures."""
        (seen,) = super().sections()
        drawn = Drawn("", f"{self.spec.description} Heads stand in the order of their clusters.")
        return [Section(seen.title, [*seen.blocks, drawn])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per pair: its heads, value, mean of the null, p-value."""
        import pandas

        rows, columns = np.nonzero(self.pairs)
        return pandas.DataFrame(
            {
                "first": _names(self.first, rows),
                "second": _names(self.second, columns),
                self.name: self.values[rows, columns],
                "null": self.null.mean(0)[rows, columns],
                "p_value": self.p_value[rows, columns],
            }
        )


def _names(heads: Sequence[HeadIndex], at: Int[np.ndarray, " pair"]) -> list[str]:
    return [str(heads[one]) for one in at.tolist()]


@dataclass(frozen=True, eq=False, repr=False)
class ConceptHeads(Saved, Tabular, Shown):
    """Which heads answer to which concept: votes of every head among words for the concepts.

    Attributes:
        concepts: their names.
        heads: heads of the columns.
        shares: share of each head's votes per concept; they sum to 1 over concepts.
        null: the same with words dealt to the concepts at random, for each deal.
        votes: number of votes that each head cast.
        provenance: where it came from.

    Example:
        >>> from headscope.table import ConceptHeads
        >>> shares, null = np.array([[0.75, 0.25], [0.25, 0.75]]), np.full((9, 2, 2), 0.5)
        >>> heads = hs.HeadIndex(0, 0), hs.HeadIndex(0, 1)
        >>> found = ConceptHeads(("fruit", "colour"), heads, shares, null, votes=8)
        >>> found.relevance.tolist(), found.top("fruit", 1)
        ([[1.5, 0.5], [0.5, 1.5]], [(L0H0, 1.5)])
    """

    concepts: tuple[str, ...]
    heads: tuple[HeadIndex, ...]
    shares: Float[np.ndarray, "concept head"]
    null: Float[np.ndarray, "deal concept head"]
    votes: int
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shapes and freeze the arrays.

        Raises:
            InputError: if a matrix does not fit concepts and heads.
        """
        shape = (len(self.concepts), len(self.heads))
        if self.shares.shape != shape or self.null.shape[1:] != shape or self.null.ndim != 3:
            raise InputError(
                f"{shape[0]} concepts and {shape[1]} heads have shares of shape "
                f"{self.shares.shape} and a null of shape {self.null.shape}."
            )
        for name in ("shares", "null"):
            object.__setattr__(self, name, read_only(getattr(self, name), np.float64))

    @property
    def relevance(self) -> Float[np.ndarray, "concept head"]:
        """Head relevance vectors: each concept's votes by head, scaled to a mean of 1 over heads.

        NaN for a concept without a vote.
        """
        mean = self.shares.mean(1, keepdims=True)
        found = np.full(self.shares.shape, np.nan)
        np.divide(self.shares, mean, out=found, where=mean > 0)
        return found

    @property
    def p_value(self) -> Float[np.ndarray, "concept head"]:
        """Chance of a share as large for any concept and head, were words dealt at random.

        ``(1 + deals whose largest share is as large) / (1 + deals)``: corrected for all concepts
        and heads (Westfall & Young 1993, max statistic).
        """
        largest = self.null.max((1, 2))
        as_large = (largest[:, None, None] >= self.shares).sum(0)
        found: np.ndarray = (1 + as_large) / (1 + len(largest))
        return found

    def top(self, concept: str, k: int = 10) -> list[tuple[HeadIndex, float]]:
        """The k heads with the largest relevance for a concept, largest first.

        Args:
            concept: its name.
            k: number of entries.

        Raises:
            InputError: if there is no such concept.
        """
        whole(k, "k", 0)
        own = self.relevance[self._row(concept)]
        order = np.argsort(-np.nan_to_num(own), kind="stable")[:k]
        return [(self.heads[one], float(own[one])) for one in order.tolist()]

    def factors(self, concept: str, most: float = 10.0) -> dict[HeadIndex, float]:
        """Relevance of every head for a concept, as a factor of its attention to the concept.

        Args:
            concept: its name.
            most: larger ones become this: in a model of many heads single entries get too large.

        Raises:
            InputError: if there is no such concept, or no head voted for it.
        """
        own = self.relevance[self._row(concept)]
        if np.isnan(own).any():
            raise InputError(f"no head voted for {concept!r}: give other words for it.")
        return {head: min(float(one), most) for head, one in zip(self.heads, own, strict=True)}

    def _row(self, concept: str) -> int:
        if concept not in self.concepts:
            raise InputError(nearest(concept, self.concepts, kind="concept"))
        return self.concepts.index(concept)

    def glance(self) -> Glance:
        """The best heads of each concept."""
        p = self.p_value
        rows = []
        for number_, concept in enumerate(self.concepts):
            best = self.top(concept, 3)
            first = self.heads.index(best[0][0])
            rows.append(
                (
                    concept,
                    ", ".join(f"{head} {number(value)}" for head, value in best),
                    number(float(self.shares[number_, first])),
                    number(float(p[number_, first])),
                )
            )
        return Glance(
            "Heads of concepts",
            [self.provenance.model or "", f"{self.votes} votes a head"],
            ("concept", "relevance (mean 1)", "share of votes", "p"),
            rows,
            hint=f"found.factors({self.concepts[0]!r}), hs.interventions.ScaleKeys(...)",
            whole=True,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per concept and head."""
        import pandas

        rows, columns = np.indices(self.shares.shape).reshape(2, -1)
        return pandas.DataFrame(
            {
                "concept": [self.concepts[one] for one in rows.tolist()],
                "head": _names(self.heads, columns),
                "share": self.shares.ravel(),
                "relevance": self.relevance.ravel(),
                "null": self.null.mean(0).ravel(),
                "p_value": self.p_value.ravel(),
            }
        )


@dataclass(frozen=True)
class RelationHead(Stored):
    """The attention head that best predicts one relation of a treebank.

    Attributes:
        relation: name of the relation; ``all``: every word but punctuation.
        head: the best head on all sentences.
        direction: ``to_head``: a word attends to its syntactic head; ``from_head``: the syntactic
            head attends to the word.
        accuracy: share of words whose syntactic head it predicts, chosen on one half and measured
            on the other.
        baseline: accuracy of the best fixed offset.
        offset: the best offset on all sentences.
        words: number of words tested.
        stable: whether both halves chose this head and direction.
    """

    relation: str
    head: HeadIndex
    direction: str
    accuracy: float
    baseline: float
    offset: int
    words: int
    stable: bool


@dataclass(frozen=True, eq=False, repr=False)
class SyntaxHeads(Saved, Tabular, Shown):
    """The best attention head for every syntactic relation, and the accuracies of all heads.

    Attributes:
        best: by relation, the most frequent first.
        table: accuracy of every head by relation (``nsubj``: a word attends to its head;
            ``nsubj_from_head``: the head to the word), a value for each sentence, with the best
            fixed offset as control.
        provenance: where it came from.
    """

    best: tuple[RelationHead, ...]
    table: HeadTable
    provenance: Provenance = field(default_factory=Provenance)

    def __getitem__(self, relation: str) -> RelationHead:
        """Best head for one relation.

        Raises:
            InputError: if the relation was not tested.
        """
        for one in self.best:
            if one.relation == relation:
                return one
        raise InputError(nearest(relation, [one.relation for one in self.best], kind="relation"))

    def glance(self) -> Glance:
        """Show the best heads, against fixed offsets."""
        return Glance(
            "Heads of relations",
            [self.provenance.model or "", f"{len(self.best)} relations"],
            ("relation", "head", "direction", "accuracy", "fixed offset", "words"),
            [
                (
                    one.relation,
                    str(one.head) + ("" if one.stable else " (not in both halves)"),
                    one.direction.replace("_", " "),
                    number(one.accuracy),
                    f"{number(one.baseline)} ({one.offset:+d})",
                    str(one.words),
                )
                for one in self.best
            ],
            hint="hs.plots.heatmap(found.table['nsubj'])",
            whole=True,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per relation."""
        import pandas

        return pandas.DataFrame([{**vars(one), "head": str(one.head)} for one in self.best])


@dataclass(frozen=True, eq=False, repr=False)
class AttentionProbe(Saved, Tabular, Shown):
    """How well a probe on the attention of all heads predicts every word's syntactic head.

    Attributes:
        uas: unlabelled attachment score on held-out sentences, from 0 to 1.
        control: its score on the control task, whose answers depend on the word alone.
        baseline: score of the best fixed offset.
        offset: the fixed offset.
        words: number of words tested.
        weights: weight of each head, for ``[to_head, from_head]``; without word vectors.
        provenance: where it came from.
    """

    uas: float
    control: float
    baseline: float
    offset: int
    words: int
    weights: Float[np.ndarray, "direction layer head"]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Freeze the weights."""
        object.__setattr__(self, "weights", read_only(self.weights, np.float64))

    @property
    def selectivity(self) -> float:
        """Score minus that of the control task (Hewitt & Liang 2019)."""
        return self.uas - self.control

    def glance(self) -> Glance:
        """Show the three scores."""
        rows = [
            ("attachment score", number(self.uas)),
            ("control task", number(self.control)),
            ("selectivity", number(self.selectivity)),
            (f"fixed offset {self.offset:+d}", number(self.baseline)),
        ]
        return Glance(
            "Attention probe",
            [self.provenance.model or "", f"{self.words} words"],
            ("what", ""),
            rows,
            whole=True,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per head: the weight of its attention in both directions, and the scores."""
        import pandas

        layers, heads = np.indices(self.weights.shape[1:]).reshape(2, -1)
        return pandas.DataFrame(
            {
                "layer": layers,
                "head": heads,
                "to_head": self.weights[0].ravel(),
                "from_head": self.weights[1].ravel(),
                "uas": self.uas,
                "control": self.control,
                "baseline": self.baseline,
            }
        )
