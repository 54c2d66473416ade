"""What sets are ranked by: scorers, saved tables, and measures of the sweep's own probe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from headscope import pruning
from headscope.ablation.heads import estimate_heads
from headscope.errors import InputError
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
    batch_size: int | None = None
    memory: str | int | None = None
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
        model, size = self.model, self.batch_size
        if name == "attribution":
            estimate = estimate_heads(
                model, probe, metric, batch_size=size, memory=self.memory, progress=False
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
