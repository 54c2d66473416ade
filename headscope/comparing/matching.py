"""Which head of one model does what which head of the other does."""

import numpy as np
import torch
from jaxtyping import Float

from headscope.circuits import HeadFactors, ov, qk
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.table import HeadTable

Pairs = list[tuple[HeadIndex, HeadIndex]]


def by_address(first: HeadTable, second: HeadTable) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    """The same address in both; closeness is the distance of their profiles."""
    if first.shape != second.shape:
        raise InputError(
            f"heads of one address cannot be compared between {first.shape} and {second.shape} "
            "heads: match them by profile."
        )
    distance = profile_distances(first, second)
    pairs = [(head, head) for head in _heads(first) if head in set(_heads(second))]
    heads = first.shape[1]
    at = [layer * heads + head for (layer, head), _ in pairs]
    return pairs, distance[at, at]


def by_profile(first: HeadTable, second: HeadTable) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    """The pairing with the smallest sum of squared distances; each head is used once."""
    rows, columns = _heads(first), _heads(second)
    distance = profile_distances(first, second)
    wide = [second.shape[1] * b.layer + b.head for b in columns]
    some = distance[np.ix_([first.shape[1] * a.layer + a.head for a in rows], wide)]
    return _assigned(rows, columns, some**2, some)


def by_weights(first: HeadModel, second: HeadModel) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    """Within each layer, the pairing with the largest sum of similarities.

    Raises:
        InputError: if the models are not of one architecture.
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
    """Root mean square difference over the shared scores, in standard deviations of each score.

    Deviations are those over the heads of both models together. A score that either head lacks is
    left out of that pair's mean; a pair that shares none is infinitely far.
    """
    names = shared(first, second)
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


def shared(first: HeadTable, second: HeadTable) -> tuple[str, ...]:
    """Names of the scores that both tables have.

    Raises:
        InputError: if there are none.
    """
    names = tuple(name for name in first if name in second)
    if not names:
        raise InputError("the two tables share no score: score both models with the same scorers.")
    return names


def weight_similarity(
    first: HeadModel, second: HeadModel
) -> dict[int, Float[np.ndarray, "first_head second_head"]]:
    """Cosine of the heads' OV matrices, averaged with that of their QK matrices, per layer.

    In [-1, 1]; 1 for equal matrices up to scale. Both models must share the basis of their
    residual stream, as checkpoints of one training run do: for models that were trained apart
    the numbers are near 0 and say nothing.

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
        raise reason or UnsupportedModelError("there are no matrices to compare.")
    return {layer: np.mean([one[layer] for one in found], axis=0) for layer in found[0]}


def _cosines(first: HeadFactors, second: HeadFactors) -> dict[int, np.ndarray]:
    """``<A1 B1, A2 B2> = trace((A1' A2) (B2 B1'))`` from thin factors, one head at a time."""
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
    """Heads that any score has."""
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
