"""Small tables for tests of tables, plots and reports."""

import numpy as np
from numpy.typing import ArrayLike

from headscope.table import HeadScores, HeadTable, Provenance

NAN = float("nan")


def scores(
    name: str = "induction",
    means: ArrayLike = ((0.9, 0.1), (0.2, 0.8)),
    *,
    n: int = 4,
    jitter: float = 0.01,
    **facts: object,
) -> HeadScores:
    """A score with these means, tested against a null of 0.1."""
    mean = np.array(means, dtype=float)
    spread = jitter * (np.arange(n) - (n - 1) / 2)
    facts = {"unit": "attention", "bounds": (0.0, 1.0), "kv_heads": 1, **facts}
    facts.setdefault("control_per_example", np.full((*mean.shape, 1), 0.1))
    return HeadScores.from_examples(name, mean[..., None] + spread, **facts)


def model_table(layers: int = 4, heads: int = 4, seed: int = 0) -> HeadTable:
    """A role with heads, a role without, a signed score with a missing layer, a plain one."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0.02, 0.08, (3, layers, heads))
    noise[0, layers - 1, 1] = 0.95
    noise[0, 0, heads - 1] = 0.6
    signed = rng.normal(0, 1, (layers, heads))
    signed[1] = NAN
    facts = {"kv_heads": heads // 2, "provenance": Provenance(model="toy", weight_digest="abc")}
    return HeadTable(
        [
            scores("entropy", noise[2] * 20, unit="nats", bounds=(0.0, None), **facts),
            scores("induction", noise[0], threshold=0.4, **facts),
            scores("previous_token", noise[1], threshold=0.4, **facts),
            scores("effect", signed, unit="logits", bounds=(None, None), **facts),
        ]
    )
