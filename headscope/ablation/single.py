"""Effects of heads one at a time: all of them, or those that an estimate points at."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from headscope.ablation.arguments import without_rounding
from headscope.ablation.engine import Batch
from headscope.ablation.gradients import attribution
from headscope.ablation.kept import KeptEffects
from headscope.ablation.run import Placer, Study
from headscope.base.statistics import Design, rank_correlation
from headscope.edits import Variant
from headscope.heads import HeadIndex
from headscope.table import HeadScores, Provenance

Keeper = Callable[[Sequence[HeadIndex]], KeptEffects]


def ablated(
    study: Study, placer: Placer, heads: Sequence[HeadIndex], keep: Keeper | None = None
) -> Float[np.ndarray, "head example"]:
    """Effect of every head by itself; ``keep`` says where those of some heads are kept."""
    kept = None if keep is None else keep(heads)

    def variants(chosen: slice, batch: Batch) -> list[Variant]:
        place = placer.place(chosen, batch)
        placer.prove(batch, place, heads)
        return [(place([head]),) for head in heads]

    edited, clean = study.measure(variants, len(heads), f"ablating {len(heads)} heads", kept)
    effects = without_rounding(edited - clean, clean)
    silent = [
        str(head) for head, row in zip(heads, effects, strict=True) if not np.nan_to_num(row).any()
    ]
    placer.checks["heads_without_effect"] = silent
    return effects


def screened(
    study: Study,
    placer: Placer,
    heads: Sequence[HeadIndex],
    steps: int,
    top: int,
    sample: int,
    seed: int,
    keep: Keeper | None = None,
) -> Float[np.ndarray, "head example"]:
    """Effects of the heads with the largest estimates and of a random sample; NaN for the rest.

    The rank correlation between estimate and effect, over the heads that have both, says what
    the shortcut cost.
    """
    estimate = attribution(study, placer, heads, steps)
    size = np.abs(np.nanmean(estimate, axis=1))
    order = np.argsort(-size, kind="stable")
    rest = np.random.default_rng(seed).permutation(order[top:])[:sample]
    measured = np.sort(np.concatenate([order[:top], rest]))
    effects = np.full_like(estimate, np.nan)
    effects[measured] = ablated(study, placer, [heads[i] for i in measured], keep)
    means = (np.nanmean(values[measured], axis=1) for values in (estimate, effects))
    placer.checks["rank_correlation"] = rank_correlation(*means)
    placer.checks["heads_sampled"] = [str(heads[i]) for i in np.sort(rest)]
    return effects


def as_scores(
    study: Study,
    effects: Float[np.ndarray, "layer head example"],
    method: str,
    provenance: Provenance,
) -> HeadScores:
    """Effects as a score, tested against no effect."""
    return HeadScores.from_effects(
        f"{method}_ablation",
        effects,
        kv_heads=study.model.shape.n_kv_heads,
        design=Design(clusters=study.probe.cluster_labels),
        unit=study.metric.unit,
        description=f"{study.metric.name} with the head ablated ({method}) less that without.",
        source="Michel et al. 2019, arXiv 1905.10650 (ablation); Nanda 2023 (attribution)",
        provenance=provenance,
    )
