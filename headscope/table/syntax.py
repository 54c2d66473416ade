"""Heads that find a word's head in a treebank, and what a probe on all of them finds."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from headscope.base.files import Saved, Stored, frozen
from headscope.base.result import Glance, Shown, Tabular, number
from headscope.base.specs import Provenance
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.table.table import HeadTable

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class RelationHead(Stored):
    """The attention head that best finds one relation of a treebank.

    Attributes:
        relation: its name; ``all``: every word but punctuation.
        head: the best on all sentences.
        direction: ``to_head``: a word attends to its head; ``from_head``: the head to its word.
        accuracy: share of words whose head it names, chosen on one half and measured on the other.
        baseline: the same of the best fixed offset.
        offset: the best one on all sentences.
        words: how many were asked.
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
class SyntaxHeads(Shown, Tabular):
    """The best attention head of every relation, and the accuracy of all of them.

    Attributes:
        best: by relation, those of most words first.
        table: accuracy of every head by relation (``nsubj``: a word attends to its head;
            ``nsubj_from_head``: the head to the word), a value for each sentence, with the best
            fixed offset as control.
        provenance: where it came from.
    """

    best: tuple[RelationHead, ...]
    table: HeadTable
    provenance: Provenance = field(default_factory=Provenance)

    def __getitem__(self, relation: str) -> RelationHead:
        """The best head of one relation.

        Raises:
            InputError: if it was not asked for.
        """
        for one in self.best:
            if one.relation == relation:
                return one
        raise InputError(nearest(relation, [one.relation for one in self.best], kind="relation"))

    def glance(self) -> Glance:
        """The best heads, against fixed offsets."""
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
class AttentionProbe(Saved, Shown):
    """How well a probe on the attention of all heads names the head of every word.

    Attributes:
        uas: unlabelled attachment score on sentences that it did not learn from, from 0 to 1.
        control: its score on the control task, whose answers depend on the word alone.
        baseline: score of the best fixed offset.
        offset: that offset.
        words: how many words were asked.
        weights: of each head, for ``[to_head, from_head]``; without word vectors.
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
        object.__setattr__(self, "weights", frozen(self.weights, np.float64))

    @property
    def selectivity(self) -> float:
        """Score above that of the control task (Hewitt & Liang 2019)."""
        return self.uas - self.control

    def glance(self) -> Glance:
        """The three scores."""
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
