"""Compare heads across models, and across the training checkpoints of one model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.statistics import (
    Design,
    MeanTest,
    benjamini_hochberg,
    compare_means,
    mean_interval,
    welch_interval,
)
from headscope.capture import check_fits, losses_by_position
from headscope.circuits import HeadFactors, ov, qk
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex
from headscope.models import bundled
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.probes import Probe, repeated_tokens, text
from headscope.probes.encoding import next_tokens
from headscope.scorers import Scorer
from headscope.scoring import score
from headscope.table import Comparison, Emergence, HeadScores, HeadTable
from headscope.table.comparing import joined_curves

Pairs = list[tuple[HeadIndex, HeadIndex]]
# Two values are the same up to this share of the larger: scores are fp32.
_ROUNDING = 1e-5


def by_address(first: HeadTable, second: HeadTable) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    """Match heads by address; closeness is the distance of their score profiles."""
    if first.shape != second.shape:
        raise InputError(
            f"heads cannot be matched by address between {first.shape} and {second.shape} heads: "
            "use by='profile'."
        )
    distance = profile_distances(first, second)
    pairs = [(head, head) for head in _heads(first) if head in set(_heads(second))]
    heads = first.shape[1]
    at = [layer * heads + head for (layer, head), _ in pairs]
    return pairs, distance[at, at]


def by_profile(first: HeadTable, second: HeadTable) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    """Match heads one to one with the smallest sum of squared profile distances."""
    rows, columns = _heads(first), _heads(second)
    distance = profile_distances(first, second)
    wide = [second.shape[1] * b.layer + b.head for b in columns]
    some = distance[np.ix_([first.shape[1] * a.layer + a.head for a in rows], wide)]
    return _assigned(rows, columns, some**2, some)


def by_weights(first: HeadModel, second: HeadModel) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    """Match heads within each layer with the largest sum of weight similarities.

    Raises:
        InputError: if the models have different architectures.
    """
    if (first.shape.n_layers, first.shape.n_heads, first.shape.d_model) != (
        second.shape.n_layers,
        second.shape.n_heads,
        second.shape.d_model,
    ):
        raise InputError(
            f"{first.name} and {second.name} are not of one shape: weights cannot be compared, "
            "match heads by profile."
        )
    similarity = weight_similarity(first, second)
    pairs: Pairs = []
    closeness: list[float] = []
    for layer in first.shape.attention_layers:
        rows = [head for head in first.shape.heads if head.layer == layer]
        columns = [head for head in second.shape.heads if head.layer == layer]
        some = similarity[layer][np.ix_([a.head for a in rows], [b.head for b in columns])]
        found, close = _assigned(rows, columns, -some, some)
        pairs += found
        closeness += close.tolist()
    return pairs, np.array(closeness)


def profile_distances(
    first: HeadTable, second: HeadTable
) -> Float[np.ndarray, "first_head second_head"]:
    """Root mean square difference of shared scores, in standard deviations of each score.

    Deviations are taken over the heads of both models together. A score that either head lacks is
    left out of that pair's mean; pairs without a shared score are infinitely far apart.
    """
    names = shared_scores(first, second)
    total = np.zeros((first.shape[0] * first.shape[1], second.shape[0] * second.shape[1]))
    count = np.zeros_like(total)
    for name in names:
        a, b = first[name].mean.ravel(), second[name].mean.ravel()
        pooled = np.concatenate([a, b])
        scale = np.nanstd(pooled) if np.isfinite(pooled).any() else 0.0
        if not scale > 0:
            continue
        square = ((a[:, None] - b) / scale) ** 2
        known = np.isfinite(square)
        total += np.where(known, square, 0.0)
        count += known
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(count > 0, np.sqrt(total / count), np.inf))


def shared_scores(first: HeadTable, second: HeadTable) -> tuple[str, ...]:
    """Names of the scores that both tables have.

    Raises:
        InputError: if they share none.
    """
    names = tuple(name for name in first if name in second)
    if not names:
        raise InputError("the two tables share no scores: score both models with the same scorers.")
    return names


@own_types()
def weight_similarity(
    first: HeadModel, second: HeadModel
) -> dict[int, Float[np.ndarray, "first_head second_head"]]:
    """Cosine similarity of OV matrices, averaged with that of QK matrices, per layer.

    In [-1, 1]; 1 for equal matrices up to scale. Both models must share the basis of their residual
    stream, as checkpoints of one training run do; for independently trained models the numbers are
    near 0 and meaningless.

    Raises:
        UnsupportedModelError: if the family has neither matrix.
    """
    found: list[dict[int, np.ndarray]] = []
    reason: UnsupportedModelError | None = None
    for circuit in (ov, qk):
        try:
            found.append(_cosines(circuit(first), circuit(second)))
        except UnsupportedModelError as error:
            reason = error
    if not found:
        raise reason or UnsupportedModelError(
            "neither OV nor QK matrices can be read from these models: use by='profile'."
        )
    return {layer: np.mean([one[layer] for one in found], axis=0) for layer in found[0]}


def _cosines(first: HeadFactors, second: HeadFactors) -> dict[int, np.ndarray]:
    """Cosines from ``<A1 B1, A2 B2> = trace((A1' A2) (B2 B1'))`` of thin factors, head by head."""
    norms = first.norm(), second.norm()
    found = {}
    for place, layer in enumerate(first.layers):
        left = [one.per_head(one.left[place : place + 1])[0] for one in (first, second)]
        right = [one.per_head(one.right[place : place + 1])[0] for one in (first, second)]
        rows = []
        for a_left, a_right in zip(left[0], right[0], strict=True):
            inner = (a_left.mT @ left[1]) * (right[1] @ a_right.mT).mT
            rows.append(inner.sum((-1, -2)))
        size = norms[0][place][:, None] * norms[1][place][None]
        cosine = torch.stack(rows) / torch.where(size > 0, size, torch.nan)
        found[layer] = cosine.nan_to_num().cpu().double().numpy()
    return found


def _heads(table: HeadTable) -> list[HeadIndex]:
    """Mask of heads that any score has."""
    present = np.any([one.present for one in table.values()], axis=0)
    return [HeadIndex(int(i), int(j)) for i, j in zip(*np.nonzero(present), strict=True)]


def _assigned(
    rows: list[HeadIndex],
    columns: list[HeadIndex],
    cost: Float[np.ndarray, "row column"],
    closeness: Float[np.ndarray, "row column"],
) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    from scipy.optimize import linear_sum_assignment

    most = cost[np.isfinite(cost)].max(initial=0.0)
    finite = np.where(np.isfinite(cost), cost, 10 * (abs(most) + 1))
    at = linear_sum_assignment(finite)
    pairs = [(rows[i], columns[j]) for i, j in zip(*at, strict=True)]
    return pairs, closeness[at]


By = Literal["profile", "weights", "address"]
_MEASURES: dict[By, str] = {
    "profile": "distance of score profiles, in standard deviations (0: alike)",
    "weights": "cosine of weights, mean of OV and QK (1: alike)",
    "address": "distance of score profiles, in standard deviations (0: alike)",
}


def way_to_match(name: str) -> By:
    """Look up a way of matching heads by name.

    Raises:
        InputError: if the name is unknown.
    """
    for way in _MEASURES:
        if way == name:
            return way
    raise InputError(nearest(name, _MEASURES, kind="way to match"))


@checked
@own_types()
def compare(
    first: "HeadModel | HeadTable | str",
    second: "HeadModel | HeadTable | str",
    *,
    by: By = "profile",
    scorers: "Iterable[str | Scorer] | None" = None,
    seed: int = 0,
) -> Comparison:
    """Match the heads of two models and test how their scores differ.

    Each head is matched with at most one: by ``profile``, minimising the sum of squared distances
    over all shared scores (any two models); by ``weights`` within each layer, by the cosine of OV
    and QK matrices (checkpoints of one run; independently trained models share no basis); by
    ``address``, each with the same address. Differences are second minus first, with 95% intervals,
    two-sided p-values and effect sizes: paired by example if both saw the same examples, otherwise
    of independent means (Welch's). P-values are adjusted over all pairs and scores of the
    comparison (Benjamini and Hochberg 1995); :func:`headscope.base.statistics.compare_means` says
    which test is used.

    A match by profile is descriptive: heads that do nothing in particular are also similar, and
    matched heads differ less than unmatched ones by construction. The p-values of such pairs are
    therefore conservative.

    Args:
        first: a model, what :func:`headscope.load` takes, or a table.
        second: the same.
        by: how heads are matched.
        scorers: names or custom scorers, for models; default: the default ones.
        seed: seed of the probes.

    Returns:
        The pairs, most unusual first, not the closest. A head is unusual by its largest distance,
        over the shared scores, from the median of its model's heads, in standard deviations over
        them (four decimals); a pair by the smaller distance of its two heads. Ties keep the order
        of their first heads.

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
    names = shared_scores(one, two)
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
    tests = [_test(one[name], two[name], at) for name in names]
    p = np.stack([test.p for test in tests], 1)
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
        p=p,
        p_adjusted=benjamini_hochberg(p),
        effect_size=np.stack([test.effect for test in tests], 1),
    )


def _distinctive(
    one: HeadTable, two: HeadTable, names: Sequence[str], pairs: Sequence[tuple[HeadIndex, ...]]
) -> Float[np.ndarray, " pair"]:
    """How unusual both heads of a pair are, compared with the heads of their model.

    The largest distance of any score from the median over heads, in standard deviations over heads;
    the smaller one of the two heads counts, so that both must stand out.
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
    """95% interval of second minus first, pair by pair."""
    a, b = tuple(at[0]), tuple(at[1])
    if _paired(first, second):
        values = second.per_example[b] - first.per_example[a]
        return mean_interval(values, clusters=first.design.clusters)
    mine, other = ((s.mean[at], s.sem[at], s.n[at]) for s, at in ((second, b), (first, a)))
    return welch_interval(mine, other)


def _test(first: HeadScores, second: HeadScores, at: "tuple[np.ndarray, ...]") -> MeanTest:
    """Two-sided test of second against first, pair by pair.

    Without per-example values this is Welch's test of means and errors, without an effect size.
    """
    if first.examples is None or second.examples is None:
        return _welch(first, second, at)
    paired = _paired(first, second)
    mine, other = second.design.clusters, first.design.clusters
    return compare_means(
        second.per_example[tuple(at[1])],
        first.per_example[tuple(at[0])],
        "two-sided",
        Design(paired, mine, other),
        resolution=_ROUNDING,
    )


def _welch(first: HeadScores, second: HeadScores, at: "tuple[np.ndarray, ...]") -> MeanTest:
    """Welch's test of two means with their standard errors."""
    from scipy import special

    (mean, sem, n), (null, null_sem, null_n) = (
        (side.mean[tuple(place)], side.sem[tuple(place)], side.n[tuple(place)])
        for side, place in ((second, at[1]), (first, at[0]))
    )
    error = sem**2 + null_sem**2
    with np.errstate(divide="ignore", invalid="ignore"):
        df = error**2 / (sem**4 / (n - 1.0) + null_sem**4 / (null_n - 1.0))
        p = 2 * special.stdtr(df, -np.abs((mean - null) / np.sqrt(error)))
    none = np.full(p.shape, np.nan)
    return MeanTest(np.where(error > 0, p, np.nan), none, none)


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


UNITS = {
    "loss": "nats",
    "in-context score": "nats",
    "first copy": "nats",
    "second copy": "nats",
}
# Parts of a text whose mean losses the in-context score compares.
_EARLY, _LATE = (0.05, 0.15), (0.9, 1.0)


@own_types()
def losses_of_tokens(model: HeadModel, probe: Probe) -> Float[np.ndarray, "example token"]:
    """Cross-entropy of each token given the ones before it, in nats.

    NaN for the first token of an example, at padding, and at the first token after padding.
    """
    check_fits(model, probe, answers=True)
    found = np.full(tuple(probe.tokens.shape), np.nan)
    for row in range(len(probe)):
        part = probe.examples(slice(row, row + 1))
        asked = replace(part, targets=next_tokens(part.tokens, part.real), control=None)
        found[row, 1:] = losses_by_position(model, asked)[0, :-1].double().numpy()
    return found


@own_types()
def text_curves(
    losses: Float[np.ndarray, "example token"],
) -> dict[str, Float[np.ndarray, " example"]]:
    """Mean loss, and the in-context score: late loss minus early loss.

    Early is the mean from 5% to 15% of each text's tokens, late that of its last tenth. Negative if
    context helps. The source takes the 500th token minus the 50th, averaged over many more texts.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    scores = []
    for row in losses:
        known = row[np.isfinite(row)]
        parts = [
            known[int(start * len(known)) : max(int(end * len(known)), 1)]
            for start, end in (_EARLY, _LATE)
        ]
        enough = len(known) >= 20
        scores.append(parts[1].mean() - parts[0].mean() if enough else np.nan)
    count = np.isfinite(losses).sum(1)
    mean = np.nansum(losses, 1) / np.where(count, count, np.nan)
    return {"loss": mean, "in-context score": np.array(scores)}


@own_types()
def copy_curves(
    losses: Float[np.ndarray, "example token"], half: int
) -> dict[str, Float[np.ndarray, " example"]]:
    """Mean loss on the first and on the second copy of a repeated text.

    The second copy's first token is left out, as nothing predicts it.

    Args:
        losses: losses of every token.
        half: length of a copy; the copies end where the rows end.
    """
    first, second = losses[:, -2 * half : -half], losses[:, -half + 1 :]
    known = np.isfinite(first)
    return {
        "first copy": np.where(known, first, 0.0).sum(1) / known.sum(1),
        "second copy": second.mean(1),
    }


_SCORES = ("previous_token", "induction", "duplicate_token", "first_token")


@checked
@own_types()
def emergence(
    source: str | None = None,
    checkpoints: Sequence[str] | None = None,
    scorers: "Iterable[str | Scorer] | None" = None,
    *,
    texts: "Sequence[str] | None" = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Emergence:
    """Score every head at every checkpoint, together with the model's losses.

    One checkpoint is in memory at a time; all see the same probes. Curves: ``loss`` and
    ``in-context score`` (late loss minus early loss; negative if context helps) on text, and the
    losses on the ``first copy`` and the ``second copy`` of repeated random tokens.

    Args:
        source: as for :func:`headscope.load`; default: the bundled model.
        checkpoints: revisions, earliest first; default: all those of a bundled model.
        scorers: names or scorers; default: previous token, induction, duplicate token and first
            token.
        texts: texts for the loss; default: for a bundled model stories like those of its training,
            otherwise bundled passages of prose.
        device: device of the models.
        dtype: dtype of the weights.
        seed: seed of the probes.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if no checkpoints are named and the model does not come with any.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads" (the phase change).

    Example:
        >>> story = hs.emergence(checkpoints=["step-000000", "step-005000"], scorers=["induction"])
        >>> story.scores
        ('induction',)
    """
    options = RunOptions(seed=seed, progress=progress)
    name = source or bundled.DEFAULT
    wanted = _revisions(name, checkpoints)
    chosen = _SCORES if scorers is None else tuple(scorers)
    if not chosen:
        raise InputError("scorers= is empty: give at least one.")
    if texts is None and name in bundled.READERS:
        texts = bundled.stories(seed=seed)
    tables, parts, labels = [], [], []
    with options.track(float(len(wanted)), "scoring checkpoints") as advance:
        for revision in wanted:
            model = load(source, revision=revision, device=device, dtype=dtype)
            tables.append(_labelled(score(model, scorers=chosen, seed=seed, progress=False)))
            parts.append(_curves(model, texts, seed))
            labels.append(revision)
            del model
            advance(1.0)
    origin = next(iter(tables[-1].values())).provenance
    return Emergence(
        origin.model or name, tuple(labels), tuple(tables), joined_curves(parts), UNITS
    )


def _revisions(name: str, checkpoints: Sequence[str] | None) -> list[str]:
    if checkpoints is not None:
        if len(set(checkpoints)) < max(2, len(checkpoints)):
            raise InputError(
                "checkpoints= needs at least two different checkpoints, earliest first."
            )
        return list(checkpoints)
    known = bundled.checkpoints(name) if name in bundled.names() else ()
    if not known:
        raise InputError(
            f"{name!r} does not come with checkpoints: name its revisions, earliest first."
        )
    return list(known)


def _labelled(table: HeadTable) -> HeadTable:
    """Drop values per example: only means, errors and p-values are kept along training."""
    slim = [replace(one, examples=None, control_examples=None) for one in table.values()]
    return HeadTable(slim)


def _curves(
    model: HeadModel, texts: "Sequence[str] | None", seed: int
) -> dict[str, Float[np.ndarray, " example"]]:
    """Losses of one checkpoint; without a tokenizer, on random tokens only."""
    room = model.shape.n_ctx or 512
    half = min(50, (room - 1) // 2)
    twice = repeated_tokens(model, length=half, batch=8, seed=seed)
    found = copy_curves(losses_of_tokens(model, twice), half)
    try:
        passages = text(
            model, None if texts is None else list(texts), length=model.shape.n_ctx, seed=seed
        )
    except HeadscopeError:
        if texts is not None:
            raise
        return found
    return {**text_curves(losses_of_tokens(model, passages)), **found}
