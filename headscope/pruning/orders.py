"""In which order heads go: each function gives heads, the first to go first.

A table's column, an importance score, anything with a mean per head makes a one-shot order. The
others measure as they go, and keep an order that takes long on the disk, head by head.
"""

import json
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from headscope import metrics
from headscope.ablation.groups import joint
from headscope.ablation.run import Maker, Measurement, Metricish, Placer, facts_of
from headscope.base.files import check_same, whole_file, writable_folder
from headscope.base.options import RunOptions, track
from headscope.base.specs import Direction
from headscope.edits import Heads
from headscope.errors import HeadscopeError, InputError
from headscope.heads import HeadIndex
from headscope.metrics import cost_sign
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe, probe_digest
from headscope.pruning.importance import gradient_importance
from headscope.table import HeadScores, Provenance


class KeptOrder:
    """The heads that are gone so far, and what they were chosen by.

    Args:
        file: JSON, replaced whole after every head.
        facts: JSON values that decide the order: a file of others is refused.
    """

    def __init__(self, file: Path, facts: Mapping[str, Any]) -> None:
        """Write nothing yet."""
        writable_folder(file.parent)
        self._file, self._facts = file, json.loads(json.dumps(facts))

    def read(self) -> tuple[HeadIndex, ...]:
        """Heads of an earlier run; none if there is no file.

        Raises:
            InputError: if the file is another order's, or none at all.
        """
        if not self._file.exists():
            return ()
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            facts, heads = dict(found["facts"]), tuple(map(HeadIndex.parse, found["heads"]))
        except (OSError, KeyError, TypeError, ValueError, HeadscopeError) as error:
            raise InputError(
                f"{self._file} is not a kept order: give another name, or delete it."
            ) from error
        check_same(self._file, facts, self._facts, "order")
        return heads

    def write(self, heads: tuple[HeadIndex, ...]) -> None:
        """Keep the heads so far."""
        text = json.dumps({"facts": self._facts, "heads": [str(head) for head in heads]})
        with whole_file(self._file) as file:
            file.write(text.encode() + b"\n")


Order = tuple[HeadIndex, ...]


@runtime_checkable
class Importance(Protocol):
    """Scores the heads that are left, e.g. :func:`gradient_importance`."""

    def __call__(
        self, model: HeadModel, probe: Probe, metric: Metricish, *, removed: Heads
    ) -> HeadScores:
        """Score all heads but the removed ones."""


def one_shot(scores: HeadScores, *, keep: int = 0) -> Order:
    """Heads by a score, the smallest mean first; ties by lowest head; those without one never.

    Args:
        scores: any column of a table, e.g. of :func:`gradient_importance`.
        keep: how many heads of each layer never go: its best ones (Michel et al. 2019).

    Example:
        >>> order = hs.pruning.one_shot(table["induction"], keep=1)
        >>> len(order) == len(model.shape.heads) - model.shape.n_layers
        True
    """
    order = [head for head, _ in scores.bottom(scores.mean.size)]
    return _kept(order, keep)


def random_order(model: HeadModel, seed: int) -> Order:
    """All heads in a random order: the control that every other order is compared with.

    Example:
        >>> sorted(hs.pruning.random_order(model, seed=0)) == list(model.shape.heads)
        True
    """
    heads = model.shape.heads
    return tuple(heads[i] for i in np.random.default_rng(seed).permutation(len(heads)))


def iterative(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    *,
    step: float = 0.1,
    count: int | None = None,
    keep: int = 0,
    importance: Importance = gradient_importance,
    progress: bool | None = None,
) -> Order:
    """The least important heads, scored again after every step with those before taken out.

    Args:
        model: from :func:`headscope.load`.
        probe: what importance is measured on.
        metric: what heads are important to.
        step: share of all heads that goes between two scorings (Michel et al. 2019 take .05 or
            .1); at least one head.
        count: how many heads go in all; default: all but those that are kept.
        keep: how many heads of each layer never go: the best ones of the first scoring.
        importance: scores the heads that are left.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Example:
        >>> len(hs.pruning.iterative(model, probe, step=0.25, count=4))
        4
    """
    if not 0 < step <= 1:
        raise InputError(f"a step is a share of all heads, above 0 and at most 1; got {step}.")
    size = max(1, round(step * len(model.shape.heads)))
    gone: Order = ()
    may_go: Order | None = None
    wanted = 1
    with track(float(len(model.shape.heads)), "pruning in steps", show=progress) as advance:
        while len(gone) < wanted:
            order = one_shot(importance(model, probe, metric, removed=gone))
            if may_go is None:
                may_go = _kept(list(order), keep)
                wanted = _wanted(count, len(may_go))
            nearest = [head for head in order if head in may_go]
            if not nearest:
                raise InputError(
                    f"after {len(gone)} heads the importance has no value for any other that may "
                    f"go: ask for count={len(gone)}, or for another importance."
                )
            gone = (*gone, *nearest[: min(size, wanted - len(gone))])
            advance(float(size))
    return gone


def greedy(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = metrics.loss,
    method: Maker = "zero",
    *,
    count: int | None = None,
    keep: int = 0,
    better: Direction | None = None,
    reference: Probe | None = None,
    batch_size: int | None = None,
    checkpoint: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> Order:
    """At every step the head whose removal leaves the metric best, by exact ablation.

    All candidates of a step are measured together with the heads that went before, by suffix
    replay. That is ``n + (n-1) + ...`` ablations for all n heads.

    Args:
        model: from :func:`headscope.load`.
        probe: what the metric is measured on.
        metric: what shall stay good.
        method: of :func:`headscope.ablate_heads`; ``zero`` is what pruning does.
        count: how many heads go; default: all that may.
        keep: how many heads of each layer stay at the least.
        better: ``higher`` or ``lower``; needed for a metric without a direction.
        reference: where replacement values come from.
        batch_size: examples per recorded pass.
        checkpoint: JSON file in which the order is kept head by head, and from which the same
            call, or one for more heads, goes on after a kill; default: none.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if an argument does not fit, or the checkpoint is of another order.

    Example:
        >>> len(hs.pruning.greedy(model, probe, count=2))
        2
    """
    options = RunOptions(batch_size, progress=progress)
    measurement = Measurement.of(model, probe, metric, options.quiet)
    placer = Placer(measurement, method, reference=reference)
    sign = cost_sign(measurement.metric, better)
    left = Counter(head.layer for head in model.shape.heads)
    heads = model.shape.heads
    wanted = _wanted(count, sum(max(0, number - keep) for number in left.values()))
    kept = None
    if checkpoint is not None:
        facts = measurement.provenance(
            **facts_of(method, reference, None), keep=keep, better=better
        )
        kept = KeptOrder(Path(checkpoint), _deciding(facts, probe, reference))
    gone: Order = () if kept is None else kept.read()[:wanted]
    left.subtract(head.layer for head in gone)
    total = float(sum(len(heads) - i for i in range(len(gone), wanted)))
    with options.track(total, "greedy pruning") as advance:
        while len(gone) < wanted:
            candidates = [h for h in heads if h not in gone and left[h.layer] > keep]
            effects, _ = joint(measurement, placer, [(*gone, head) for head in candidates])
            cost = sign * np.nanmean(effects, axis=1)
            best = candidates[int(np.argmin(cost))]
            gone = (*gone, best)
            left[best.layer] -= 1
            if kept is not None:
                kept.write(gone)
            advance(float(len(candidates)))
    return gone


def _deciding(facts: Provenance, probe: Probe, reference: Probe | None) -> dict[str, Any]:
    """What an order depends on: the weights, the data, the metric, the method."""
    data = probe_digest(probe, reference)
    return {"weights": facts.weight_digest, "dtype": facts.dtype, "data": data, **facts.probe}


def _kept(order: list[HeadIndex], keep: int) -> Order:
    """The order without the last ``keep`` heads of each layer."""
    if keep < 0:
        raise InputError(f"keep={keep}: a layer keeps 0 or more heads.")
    seen: Counter[int] = Counter()
    stays = set()
    for head in reversed(order):
        if seen[head.layer] < keep:
            stays.add(head)
        seen[head.layer] += 1
    return tuple(head for head in order if head not in stays)


def _wanted(count: int | None, most: int) -> int:
    if count is not None and not 1 <= count <= most:
        raise InputError(f"count={count}: 1 to {most} heads can go.")
    return most if count is None else count
