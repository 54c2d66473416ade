"""Which heads a sweep edits together: the sets of a config, ranked and resolved for one model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from headscope import pruning
from headscope.ablation.heads import estimate_heads
from headscope.base.options import RunOptions
from headscope.base.statistics import top_order
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.metrics import Metric
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.scoring import score
from headscope.sweeps.config import METRICS, OWN_SCORES, HeadSet, MetricConfig
from headscope.table import HeadTable

Ranking = Callable[[HeadSet], Float[np.ndarray, "layer head"]]


@dataclass(frozen=True, eq=False)
class Rankings:
    """Rankings of one model's heads; each is measured once for what it depends on."""

    model: HeadModel
    probes: Mapping[str, Probe]
    options: RunOptions = RunOptions()
    known: dict[tuple[str, ...], Float[np.ndarray, "layer head"]] = field(default_factory=dict)

    def of(self, probe: str, metric: MetricConfig) -> Ranking:
        """Value of every head in the ranking of a set, for one probe and metric of the sweep."""
        return partial(self._values, probe, metric)

    def _values(
        self, probe: str, metric: MetricConfig, one: HeadSet
    ) -> Float[np.ndarray, "layer head"]:
        assert one.score is not None  # noqa: S101  # only ranked sets ask
        said = {"probe": probe, "metric": metric.label}
        if one.table is not None:
            key: tuple[str, ...] = (one.score, "table", str(one.table))
        else:
            key = (one.score, *(said[need] for need in OWN_SCORES.get(one.score, ())))
        if key not in self.known:
            if one.table is not None:
                self.known[key] = _from_table(one.table, one.score, self.model)
            else:
                self.known[key] = self._measured(one.score, self.probes[probe], metric_of(metric))
        return self.known[key]

    def _measured(self, name: str, probe: Probe, metric: Metric) -> Float[np.ndarray, "layer head"]:
        model, size = self.model, self.options.batch_size
        if name == "attribution":
            estimate = estimate_heads(
                model, probe, metric, batch_size=size, memory=self.options.memory, progress=False
            )
            return np.asarray(np.abs(estimate.mean))
        if name == "gradient_importance":
            return pruning.gradient_importance(
                model, probe, metric, batch_size=size, progress=False
            ).mean
        if name == "confidence":
            return pruning.confidence(model, probe, batch_size=size).mean
        if name == "output_norm":
            return pruning.output_norm(model, probe, batch_size=size).mean
        if name == "weight_norm":
            return pruning.weight_norm(model).mean
        return score(model, None, [name], progress=False)[name].mean


def metric_of(metric: MetricConfig) -> Metric:
    """The metric that a config names."""
    chosen = METRICS[metric.metric]
    return chosen if metric.at is None else chosen.at(metric.at)


def _from_table(table: Path, score: str, model: HeadModel) -> Float[np.ndarray, "layer head"]:
    """A score as a scan saved it."""
    values = HeadTable.load(table)[score].mean
    expected = (model.shape.n_layers, model.shape.n_heads)
    if values.shape != expected:
        raise InputError(
            f"{table} ranks heads of a model with {values.shape[0]} layers of "
            f"{values.shape[1]} heads; {model.name} has {expected[0]} of {expected[1]}."
        )
    return values


@dataclass(frozen=True)
class Cell:
    """Heads that are edited at once.

    Attributes:
        set: name of the set that they belong to.
        draw: which draw of a random set; 0 otherwise.
        heads: in the order of the set; none in the first point of a curve.
    """

    set: str
    draw: int
    heads: tuple[HeadIndex, ...]


def cells(model: HeadModel, sets: tuple[HeadSet, ...], ranking: Ranking) -> tuple[Cell, ...]:
    """Cells of all sets, in their order.

    Raises:
        InputError: if the model lacks a head, or a set has none.
    """
    by_name: dict[str, list[tuple[HeadIndex, ...]]] = {}
    # Sets that others exclude come first, whatever the order in the file.
    for one in sorted(sets, key=lambda one: one.not_in is not None):
        by_name[one.name] = _draws(model, one, ranking, by_name)
    return tuple(
        Cell(one.name, draw, heads)
        for one in sets
        for draw, drawn in enumerate(by_name[one.name])
        for heads in _arranged(one, drawn)
    )


def _draws(
    model: HeadModel,
    one: HeadSet,
    ranking: Ranking,
    earlier: Mapping[str, list[tuple[HeadIndex, ...]]],
) -> list[tuple[HeadIndex, ...]]:
    """The heads of a set, once per draw."""
    among = _among(model, one)
    if one.score is not None:
        values = ranking(one)
        signed = values if one.order == "largest" else -values
        width = values.shape[1]
        ranked = [HeadIndex(*divmod(int(i), width)) for i in top_order(signed, values.size)]
        allowed = set(among)
        among = [head for head in ranked if head in allowed]
        if one.top is not None and one.top > len(among):
            raise InputError(
                f"the set {one.name!r} takes the top {one.top} heads, and {model.name} has "
                f"{len(among)} with a score."
            )
        among = among[: one.top]
    if not among:
        raise InputError(f"the set {one.name!r} has no heads in {model.name}.")
    if one.random is None:
        return [tuple(among)]
    if one.not_in is not None:
        if one.not_in not in earlier:
            raise InputError(f"the set {one.name!r} excludes {one.not_in!r}, which excludes too.")
        taken = {head for draw in earlier[one.not_in] for head in draw}
        among = [head for head in among if head not in taken]
    wanted = len(among) if one.random == "all" else one.random
    if not 0 < wanted <= len(among):
        raise InputError(
            f"the set {one.name!r} draws {one.random} heads, and {model.name} has {len(among)} to "
            "draw from."
        )
    streams = (np.random.default_rng([one.seed, draw]) for draw in range(one.draws))
    return [tuple(among[i] for i in stream.permutation(len(among))[:wanted]) for stream in streams]


def _among(model: HeadModel, one: HeadSet) -> list[HeadIndex]:
    """Heads that a set may hold."""
    heads = list(model.shape.heads)
    if one.heads is not None:
        heads = [model.shape.check(HeadIndex.parse(head)) for head in one.heads]
        heads = list(dict.fromkeys(heads))
    if one.layers is not None:
        for layer in one.layers:
            if layer not in model.shape.attention_layers:
                raise InputError(
                    f"the set {one.name!r} asks for layer {layer}, and {model.name} has no heads "
                    f"in layer {layer}."
                )
        heads = [head for head in heads if head.layer in one.layers]
    return heads


def _arranged(one: HeadSet, heads: tuple[HeadIndex, ...]) -> list[tuple[HeadIndex, ...]]:
    """The sets that are edited at once."""
    if one.arrange == "each":
        return [(head,) for head in heads]
    if one.arrange == "together":
        # In layer order: what is edited does not depend on the order of a draw.
        return [tuple(sorted(heads))]
    steps = len(heads) if one.steps is None else min(one.steps, len(heads))
    counts = sorted({round(len(heads) * step / steps) for step in range(steps + 1)})
    return [heads[:count] for count in counts]
