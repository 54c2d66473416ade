"""Scores of key/value heads, and heads by how often they act."""

from typing import Literal

import numpy as np

from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.table import HeadScores

Activity = Literal["always", "sometimes", "never"]


def by_kv_head(scores: HeadScores, how: Literal["mean", "max"] = "mean") -> HeadScores:
    """The same score per key/value head: mean or largest over the query heads that share it.

    Taken example by example, so that errors and nulls stay honest; what decides about keeping
    keys and values (DuoAttention, HeadKV) is per key/value head.

    Args:
        scores: with values per example.
        how: ``mean``, or ``max`` where one query head is enough to need it.

    Returns:
        A score whose head axis counts key/value heads, named ``<name>_kv``.

    Raises:
        InputError: if the values per example were not kept.

    Example:
        >>> model = hs.load("tiny-llama")
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> scores = hs.score(model, probe, "induction")["induction"]
        >>> by_kv_head(scores).mean.shape == (model.shape.n_layers, model.shape.n_kv_heads)
        True
    """
    if how not in ("mean", "max"):
        raise InputError(f"how={how!r} is unknown: 'mean' or 'max'.")

    def grouped(values: np.ndarray) -> np.ndarray:
        layers, heads, examples = values.shape
        apart = values.reshape(layers, scores.kv_heads, heads // scores.kv_heads, examples)
        if how == "max":
            known = np.where(np.isnan(apart), -np.inf, apart).max(2)
            return np.where(np.isinf(known), np.nan, known)
        count = (~np.isnan(apart)).sum(2)
        total = np.nansum(apart, 2)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    control = scores.control_per_example
    layers, heads = scores.mean.shape
    missing = scores.missing.reshape(layers, scores.kv_heads, heads // scores.kv_heads)
    return HeadScores.from_examples(
        f"{scores.name}_kv",
        grouped(scores.per_example),
        kv_heads=scores.kv_heads,
        control_per_example=None if control is None else grouped(control),
        design=scores.design,
        alternative=scores.alternative,
        missing=missing.max(2),
        unit=scores.unit,
        bounds=scores.bounds,
        description=f"{scores.description.rstrip('.')}, {how} over a key/value head's queries.",
        source=scores.source,
        threshold=scores.threshold,
        provenance=scores.provenance,
    )


def activity(scores: HeadScores, at_least: int | float = 0.0) -> dict[HeadIndex, Activity]:
    """Which heads act in every context, in some, in none (Wu et al. 2024, section 3).

    Args:
        scores: with values per example, e.g. ``Retrieval.activation`` or ``Retrieval.by_set``.
        at_least: a head acts in an example whose value is above this.

    Returns:
        Every head with a value; the source calls those that act sometimes dynamically activated.

    Example:
        >>> found = activity(table["induction"], at_least=1.0)
        >>> len(found), set(found.values())
        (12, {'never'})
    """
    known = ~np.isnan(scores.per_example)
    acts = np.where(known, scores.per_example, -np.inf) > at_least
    found: dict[HeadIndex, Activity] = {}
    for layer, head in zip(*np.nonzero(known.any(-1)), strict=True):
        times, of = int(acts[layer, head].sum()), int(known[layer, head].sum())
        word: Activity = "never" if times == 0 else "always" if times == of else "sometimes"
        found[HeadIndex(int(layer), int(head))] = word
    return found
