"""What claims have in common: texts that a model can read, its skill, heads chosen and controls."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from headscope import metrics
from headscope.ablation import ablate_groups
from headscope.base.statistics import mean_interval
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.metrics import Metric
from headscope.models import bundled
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, text
from headscope.probes.vocabulary import ordinary_tokens
from headscope.scoring.score import score
from headscope.studies.study import LEVEL, Evidence, StudySetting, paired
from headscope.table import HeadScores

_RANDOM_SETS = 5
_OTHERS = 2  # times as many heads as are ablated: fewer leave nothing to draw


def prose(model: HeadModel, setting: StudySetting, *, seed: int, length: int = 128) -> Probe:
    """Texts of the kind that the model was trained on: prose, or stories for a bundled model."""
    count = setting.size(24, 8)
    room = model.shape.n_ctx or length
    texts = None
    if model.name in bundled.READERS:
        texts = bundled.stories(count, seed=seed)
    return text(model, texts, length=min(length, room), batch=count, seed=seed)


def metric_of(
    model: HeadModel, probe: Probe, metric: Metric = metrics.loss
) -> Float[np.ndarray, " example"]:
    """A metric of the whole model, per example."""
    return ablate_groups(model, probe, metric, {"none": []}, progress=False).unedited


def need_skill(model: HeadModel, probe: Probe) -> Float[np.ndarray, " example"]:
    """Loss per example of a model that predicts these texts better than chance.

    Raises:
        UnsupportedModelError: if it does not, so that nothing said of how it predicts means
            anything.
    """
    losses, chance = metric_of(model, probe), math.log(len(ordinary_tokens(model)))
    high = float(mean_interval(losses[None], LEVEL)[1][0])
    if not high < chance:
        raise UnsupportedModelError(
            f"it predicts these texts no better than chance (loss {float(np.nanmean(losses)):.2f} "
            f"nats, chance {chance:.2f})."
        )
    return losses


def best_head(
    model: HeadModel, scorer: str, chosen_on: Probe, measured_on: Probe
) -> tuple[HeadIndex, Evidence]:
    """The head with the highest score, chosen on one probe and measured on another.

    The control is the scorer's own on the same examples where it is paired, else the mean of all
    other heads on them.
    """
    first = score(model, chosen_on, [scorer], progress=False)[scorer]
    if not np.isfinite(first.mean).any():
        raise UnsupportedModelError(f"no head has a value of {scorer}.")
    head = first.top(1)[0][0]
    scores = score(model, measured_on, [scorer], progress=False)[scorer]
    found = paired(
        scores.per_example[head.layer, head.head],
        control_of(scores, head),
        note=str(head),
        results={scorer: scores},
    )
    return head, found


def control_of(scores: HeadScores, head: HeadIndex) -> Float[np.ndarray, " example"]:
    """What a head's score is held against, example by example."""
    own, control = scores.per_example, scores.control_per_example
    if control is not None and control.shape == own.shape:
        paired_control: Float[np.ndarray, " example"] = control[head.layer, head.head]
        return paired_control
    others = own.copy()
    others[head.layer, head.head] = np.nan
    flat = others.reshape(-1, others.shape[-1])
    mean: Float[np.ndarray, " example"] = np.nanmean(flat[~np.isnan(flat).all(1)], axis=0)
    return mean


def against_random_sets(
    model: HeadModel,
    probe: Probe,
    metric: Metric,
    heads: Sequence[HeadIndex],
    *,
    scale: float,
    sign: float,
    seed: int,
) -> Evidence:
    """What ablating these heads does to a metric, and what as many random other heads do.

    Args:
        model: the model.
        probe: what it is measured on.
        metric: of :mod:`headscope.metrics`.
        heads: ablated together, by their mean.
        scale: effects are divided by it.
        sign: 1 where harm raises the metric, -1 where it lowers it.
        seed: of the random sets.
    """
    others = [one for one in model.shape.heads if one not in set(heads)]
    if not heads or len(others) < _OTHERS * len(heads):
        raise UnsupportedModelError(
            f"{len(heads)} of its heads are to be ablated and {len(others)} others are left: "
            f"random sets as a control take at least {_OTHERS * max(1, len(heads))}."
        )
    rng = np.random.default_rng(seed)
    groups: dict[str, list[HeadIndex]] = {"chosen": list(heads)}
    for number in range(_RANDOM_SETS):
        drawn = rng.choice(len(others), len(heads), replace=False)
        groups[f"random {number}"] = [others[index] for index in sorted(drawn)]
    effects = ablate_groups(model, probe, metric, groups, progress=False)
    harm = sign * effects.per_example / scale
    return paired(
        harm[0],
        harm[1:].mean(0),
        note=f"{', '.join(map(str, heads))}; {_RANDOM_SETS} random sets of as many others",
    )
