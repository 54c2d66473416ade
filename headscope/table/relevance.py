"""Relevance of tokens, label words as anchors, and memorised spans."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.base.files import Saved, Stored, read_only
from headscope.base.result import (
    Drawn,
    Glance,
    Section,
    Shown,
    Tabular,
    number,
    readable,
    shaded,
    sizes,
)
from headscope.base.specs import Provenance, ScoreSpec
from headscope.base.statistics import top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table.effects import EffectGrid
from headscope.table.scores import HeadScores
from headscope.table.table import HeadTable

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class TokenRelevance(Saved, Shown, Tabular):
    """How much each token (or group of tokens) of a text supports the tokens that follow.

    Attributes:
        tokens: tokens of the text that was run, BOS included.
        units: what was suppressed in turn: a token or a group.
        targets: tokens whose loss was read.
        per_target: loss with the unit suppressed minus that without, in nats; positive if the unit
            supports the target.
        base: loss of every target without suppression, in nats.
        by_head: the same, summed over the targets, with the unit suppressed in one head alone; NaN
            where not measured. None if not requested.
        estimate: first-order estimate of ``by_head`` for every head.
        provenance: where it came from.
    """

    tokens: tuple[str, ...]
    units: tuple[str, ...]
    targets: tuple[str, ...]
    per_target: Float[np.ndarray, "unit target"]
    base: Float[np.ndarray, " target"]
    by_head: Float[np.ndarray, "layer head unit"] | None = None
    estimate: Float[np.ndarray, "layer head unit"] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check the shape and freeze the arrays."""
        if self.per_target.shape != (len(self.units), len(self.targets)):
            raise InputError(
                f"relevance of {len(self.units)} units for {len(self.targets)} targets has shape "
                f"{self.per_target.shape}."
            )
        for name in ("per_target", "base", "by_head", "estimate"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, read_only(values, np.float64))

    @property
    def relevance(self) -> Float[np.ndarray, " unit"]:
        """Relevance for all targets together, in nats."""
        return np.asarray(self.per_target.sum(1))

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k most relevant units, largest first."""
        return [(self.units[at], float(self.relevance[at])) for at in top_order(self.relevance, k)]

    @property
    def head_relevance(self) -> Float[np.ndarray, "layer head"]:
        """``sum over units of |by_head|`` in nats: total relevance through each head.

        Raises:
            InputError: if relevance by head was not measured.
        """
        if self.by_head is None:
            raise InputError(
                "this relevance is for all heads together: pass top= to measure single heads."
            )
        return np.asarray(np.abs(self.by_head).sum(2))

    def head_scores(self) -> HeadScores:
        """Turn :attr:`head_relevance` into a score; NaN for heads that were not measured."""
        return HeadScores.from_summary(
            "head_relevance",
            self.head_relevance,
            kv_heads=1,
            unit="nats",
            bounds=(0.0, None),
            description="suppressing tokens in this head alone changes the loss on the targets",
            source="Deiseroth et al. 2023 (arXiv 2301.08110), AtMan, one head at a time",
            provenance=self.provenance,
        )

    def grid(self) -> EffectGrid:
        """Relevance as a grid: one row per target, or per measured head."""
        if self.by_head is None:
            axes, rows = ("target", "token"), self.targets
            values = self.per_target.T
        else:
            measured = [HeadIndex(*at) for at in np.argwhere(~np.isnan(self.by_head).all(2))]
            axes, rows = ("head", "token"), tuple(str(head) for head in measured)
            values = np.stack([self.by_head[head.layer, head.head] for head in measured])
        return EffectGrid(
            spec=ScoreSpec(
                "token relevance",
                unit="nats",
                description="loss on the targets with the token suppressed, minus that without",
            ),
            axes=axes,
            labels=(rows, self.units),
            per_example=values[..., None],
            unedited=np.array([float(self.base.sum())]),
            provenance=self.provenance,
        )

    def glance(self) -> Glance:
        """Show the most relevant units."""
        about = "of all heads" if self.by_head is None else "and by head"
        return Glance(
            f"relevance for {readable(''.join(self.targets), 30)!r}",
            [
                f"{len(self.units)} units {about}",
                f"loss {number(float(self.base.sum()))} nats",
                self.provenance.model,
            ],
            ("unit", "relevance"),
            [(readable(unit, 30), number(value)) for unit, value in self.top(6)],
            shaded(["nats"], self.units, [self.relevance.tolist()]),
            hint="found.relevance, hs.plots.figures(found), found.to_pandas()",
        )

    def sections(self) -> list[Section]:
        """Report the numbers and a picture."""
        said = "Relevance of every token, by target or head: blue supports, orange counters."
        return [*super().sections(), Section("by token", [Drawn("", said)])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per unit and target, and per unit and measured head if there are any."""
        import pandas

        grid = self.grid()
        rows = [
            {grid.axes[0]: row, "unit": unit, "relevance": float(grid.mean[i, j])}
            for i, row in enumerate(grid.labels[0])
            for j, unit in enumerate(self.units)
        ]
        return pandas.DataFrame(rows)


@dataclass(frozen=True, eq=False, repr=False)
class Anchors(Saved, Shown, Tabular):
    """Label words as anchors: how they gather information and pass it to the prediction.

    Attributes:
        classes: texts of the label words.
        flows: saliency per layer, heads summed before the absolute value: means over examples of
            ``text_to_label``, ``label_to_final`` and ``other`` ``[layer example]``.
        heads: the same three per head (absolute value of each head alone), and ``anchor_auc``.
        layer_auc: AUC with which the layer's attention to the label words, heads summed, predicts
            the model's own prediction; 0.5 by chance, NaN if it always predicts one class.
        predicted: class that the model predicts on every example.
        right: correct class of every example.
        isolation: change of the correct class's loss, and share of predictions kept, with label
            words cut off from what precedes them: by name; None if not requested.
        provenance: where it came from.
    """

    classes: tuple[str, ...]
    flows: Mapping[str, Float[np.ndarray, "layer example"]]
    heads: HeadTable
    layer_auc: Float[np.ndarray, " layer"]
    predicted: Int[np.ndarray, " example"]
    right: Int[np.ndarray, " example"]
    isolation: Mapping[str, Float[np.ndarray, " example"]] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def accuracy(self) -> float:
        """Share of the examples on which the model predicts the correct class."""
        return float((self.predicted == self.right).mean())

    @property
    def reliance(self) -> Float[np.ndarray, " layer"]:
        """``R_l``: share of the predictive power of all layers that the layers up to l have.

        ``sum over i <= l of (AUC_i - 0.5) / sum over all of (AUC_i - 0.5)``; NaN if that sum is
        below 0.001 in absolute value, where the ratio is meaningless.
        """
        gains = np.nan_to_num(self.layer_auc - 0.5)
        total = gains.sum()
        if abs(total) < 1e-3:
            return np.full(len(gains), np.nan)
        return np.asarray(gains.cumsum() / total)

    def grid(self) -> EffectGrid:
        """Mean flows by layer."""
        names = tuple(self.flows)
        return EffectGrid(
            spec=ScoreSpec(
                "saliency flows",
                unit="nats",
                description="first-order change of the loss per attention weight",
            ),
            axes=("flow", "layer"),
            labels=(names, tuple(f"L{n}" for n in range(len(self.layer_auc)))),
            per_example=np.stack([self.flows[name] for name in names]),
            unedited=np.zeros(len(self.predicted)),
            provenance=self.provenance,
        )

    def glance(self) -> Glance:
        """Show flows and anchor prediction by layer."""
        means = {name: np.nanmean(values, 1) for name, values in self.flows.items()}
        rows = [
            (
                f"L{layer}",
                *(number(float(means[name][layer])) for name in means),
                number(float(auc)),
            )
            for layer, auc in enumerate(self.layer_auc)
        ]
        return Glance(
            f"anchors of {len(self.classes)} classes",
            [
                f"{len(self.right)} examples, {self.accuracy:.0%} right",
                sizes(("layer", "head"), self.heads.shape),
                self.provenance.model,
            ],
            ("layer", *means, "anchor AUC"),
            rows,
            hint="found.heads.top('anchor_auc'), found.reliance, found.to_pandas()",
            whole=True,
        )

    def sections(self) -> list[Section]:
        """Report the numbers and a picture."""
        return [*super().sections(), Section("by layer", [Drawn("", "Saliency flows by layer.")])]

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per layer: mean flows, AUC, reliance."""
        import pandas

        columns: dict[str, object] = {"layer": range(len(self.layer_auc))}
        columns |= {name: np.nanmean(values, 1) for name, values in self.flows.items()}
        return pandas.DataFrame(columns | {"auc": self.layer_auc, "reliance": self.reliance})


@dataclass(frozen=True)
class TextSpan(Stored):
    """A span of a text that a model was asked to continue.

    Attributes:
        text: index of the text.
        start: position of its first prefix token in the text's own tokens, BOS excluded.
        right: number of correct tokens after the prefix before the first error.
        loss: mean loss of the continuation, in nats.
    """

    text: int
    start: int
    right: int
    loss: float


@dataclass(frozen=True, eq=False, repr=False)
class Memorized(Saved, Shown, Tabular):
    """Memorised spans of a corpus, and the heads that hold them.

    Attributes:
        spans: every span that was tried.
        prefix, length: number of tokens of the prefix, and of the continuation.
        known: whether the whole continuation is correct.
        unknown: whether it is wrong within the first fifth; known spans are compared with these.
        heads: scores: ``rare_attention`` (Kendall's tau between attention and corpus frequency,
            with shuffled frequencies as the null), and for known spans ``grad_Q``, ``grad_K``,
            ``grad_V``, ``grad_O``: the largest gradient entry of each matrix.
        broken: per known span, how many tokens are still correct when one prefix token is replaced;
            NaN where there is no such position.
        provenance: where it came from.
    """

    spans: tuple[TextSpan, ...]
    prefix: int
    length: int
    known: Bool[np.ndarray, " span"]
    unknown: Bool[np.ndarray, " span"]
    heads: HeadTable
    broken: Float[np.ndarray, "known prefix"]
    provenance: Provenance = field(default_factory=Provenance)

    def glance(self) -> Glance:
        """Show the number of memorised spans, and the heads with the largest gradients."""
        rows = []
        for name in self.heads:
            best = self.heads[name].top(3) if name != "rare_attention" else []
            lowest = self.heads[name].bottom(3) if name == "rare_attention" else best
            rows.append((name, "  ".join(f"{head} {number(value)}" for head, value in lowest)))
        return Glance(
            f"{int(self.known.sum())} of {len(self.spans)} spans memorised",
            [f"{self.prefix} + {self.length} tokens", self.provenance.model],
            ("score", "heads"),
            rows,
            hint="found.to_pandas(), found.heads['rare_attention'], found.broken",
            whole=True,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per span."""
        import pandas

        rows = [
            {"text": s.text, "start": s.start, "right": s.right, "loss": s.loss, "known": bool(k)}
            for s, k in zip(self.spans, self.known, strict=True)
        ]
        return pandas.DataFrame(rows)
