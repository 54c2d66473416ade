"""Two models or two checkpoints: matched heads, and differences with intervals."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from headscope.base.statistics import mean_interval, welch_interval
from headscope.comparing.matching import by_address, by_profile, by_weights, shared
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.models.loading.load import load
from headscope.models.protocol import HeadModel
from headscope.scorers import Scorer
from headscope.scoring import score
from headscope.table import Comparison, HeadScores, HeadTable

By = Literal["profile", "weights", "address"]
_MEASURES: dict[By, str] = {
    "profile": "distance of score profiles, in standard deviations (0: alike)",
    "weights": "cosine of weights, mean of OV and QK (1: alike)",
    "address": "distance of score profiles, in standard deviations (0: alike)",
}


def way_to_match(name: str) -> By:
    """``name`` as a way to match heads.

    Raises:
        InputError: if there is no such way.
    """
    for way in _MEASURES:
        if way == name:
            return way
    raise InputError(nearest(name, _MEASURES, kind="way to match"))


def compare(
    first: "HeadModel | HeadTable | str",
    second: "HeadModel | HeadTable | str",
    *,
    by: By = "profile",
    scorers: "Iterable[str | Scorer] | None" = None,
    seed: int = 0,
) -> Comparison:
    """Match the heads of two models and tell how their scores differ.

    Each head is matched with at most one: by ``profile`` so that the squared distances over all
    shared scores sum to the least (any two models); by ``weights`` within each layer, by the
    cosine of OV and QK matrices (checkpoints of one run; models trained apart share no basis);
    by ``address`` each with itself. Differences are second less first, with 95% intervals:
    of the differences example by example where both saw the same ones, else Welch's, of
    independent means.

    A match by profile is a description: heads that do nothing in particular are alike too, and
    what was matched differs less than what was not, by construction.

    Args:
        first: a model, what :func:`headscope.load` takes, or a table.
        second: the same.
        by: how heads are matched.
        scorers: names or your own scorers, for models; default: the default ones.
        seed: of the probes.

    Returns:
        The pairs, not in the order of closeness: first those whose heads both stand out. A head
        stands out by its largest distance, over the shared scores, from the median of its model's
        heads, in standard deviations over them (four decimals); a pair by the smaller distance
        of its two heads. Pairs that are equal in this stay in the order of their first heads.

    Raises:
        InputError: if the two share no score, or cannot be matched in that way.

    Example:
        >>> early = hs.load(revision="step-005000")
        >>> found = hs.compare(early, model, by="weights", scorers=["induction"])
        >>> len(found.pairs)
        12
    """
    way_to_match(by)
    if by == "weights" and (isinstance(first, HeadTable) or isinstance(second, HeadTable)):
        raise InputError("matching by weights needs two models, not tables.")
    wanted = None if scorers is None else list(scorers)
    models = [
        one if isinstance(one, HeadTable | HeadModel) else load(one) for one in (first, second)
    ]
    one, two = (
        model if isinstance(model, HeadTable) else score(model, scorers=wanted, seed=seed)
        for model in models
    )
    names = shared(one, two)
    if by == "weights":
        a, b = models
        if isinstance(a, HeadTable) or isinstance(b, HeadTable):
            raise InputError("matching by weights needs two models, not tables.")
        pairs, closeness = by_weights(a, b)
    else:
        pairs, closeness = (by_profile if by == "profile" else by_address)(one, two)
    # Heads that are equally distinctive up to rounding stay in their own order, on any device.
    distinctive = np.round(_distinctive(one, two, names, pairs), 4)
    order = np.argsort(-distinctive, kind="stable")
    pairs = [pairs[i] for i in order]
    at = tuple(np.array([[p[side] for p in pairs] for side in (0, 1)]).transpose(0, 2, 1))
    columns = [_difference(one[name], two[name], at) for name in names]
    low, high = (np.stack([column[i] for column in columns], 1) for i in (0, 1))
    return Comparison(
        names=(_called(one), _called(two)),
        pairs=tuple(pairs),
        closeness=closeness[order],
        measure=_MEASURES[by],
        scores=names,
        first=np.stack([one[name].mean[tuple(at[0])] for name in names], 1),
        second=np.stack([two[name].mean[tuple(at[1])] for name in names], 1),
        low=low,
        high=high,
        paired=tuple(_paired(one[name], two[name]) for name in names),
    )


def _distinctive(
    one: HeadTable, two: HeadTable, names: Sequence[str], pairs: Sequence[tuple[HeadIndex, ...]]
) -> Float[np.ndarray, " pair"]:
    """How far both heads of a pair are from the typical head of their model.

    The largest distance of any score from the median over heads, in standard deviations over
    heads; of the two heads the smaller one, so that both must stand out.
    """
    sides = []
    for side, table in enumerate((one, two)):
        at = tuple(np.array([pair[side] for pair in pairs]).T)
        far = [np.zeros(len(pairs))]
        for name in names:
            mean = table[name].mean
            spread = np.nanstd(mean)
            if np.isfinite(spread) and spread > 0:
                far.append(np.nan_to_num(np.abs(mean[at] - np.nanmedian(mean)) / spread))
        sides.append(np.max(far, axis=0))
    return np.asarray(np.minimum(*sides))


def _difference(
    first: HeadScores, second: HeadScores, at: "tuple[np.ndarray, ...]"
) -> tuple[Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
    """95% interval of second less first, pair by pair."""
    a, b = tuple(at[0]), tuple(at[1])
    if _paired(first, second):
        values = second.per_example[b] - first.per_example[a]
        return mean_interval(values, clusters=first.design.clusters)
    mine, other = ((s.mean[at], s.sem[at], s.n[at]) for s, at in ((second, b), (first, a)))
    return welch_interval(mine, other)


def _paired(first: HeadScores, second: HeadScores) -> bool:
    """Whether both were measured on the same examples."""
    if first.examples is None or second.examples is None:
        return False
    same_size = first.examples.shape[2] == second.examples.shape[2] > 1
    a, b = first.provenance, second.provenance
    return bool(same_size and a.seed == b.seed and a.probe and a.probe == b.probe)


def _called(table: HeadTable) -> str:
    origin = next(iter(table.values())).provenance
    return (origin.model or "model") + (f"@{origin.revision}" if origin.revision else "")
