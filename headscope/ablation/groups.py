"""Ablating several heads at once: named groups, growing sets, and pairs."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float

from headscope.ablation.arguments import (
    Maker,
    Metricish,
    Positions,
    facts_of,
    present,
    without_rounding,
)
from headscope.ablation.engine import Batch
from headscope.ablation.run import Placer, Study
from headscope.edits import Heads, Variant
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table import EffectGrid, PairScores

Sets = Sequence[tuple[HeadIndex, ...]]


def ablate_groups(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    groups: Mapping[str, Heads],
    method: Maker = "mean",
    *,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> EffectGrid:
    """Ablate named sets of heads, each set at once; an empty set has effect 0.

    Arguments are those of :func:`headscope.ablate_heads`; ``groups`` gives the sets by name.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> probe = hs.probes.repeated_tokens(model, length=10, batch=2)
        >>> groups = {"none": [], "layer 0": ["L0H0", "L0H1"]}
        >>> hs.ablate_groups(model, probe, hs.metrics.loss, groups).mean[0]
        np.float64(0.0)
    """
    study = Study.of(model, probe, metric, batch_size=batch_size, memory=memory, progress=progress)
    placer = Placer(study, method, positions=positions, reference=reference, seed=seed)
    if not groups:
        raise InputError("no groups given: name at least one set of heads.")
    sets = [() if not heads else present(model, heads) for heads in groups.values()]
    effects, clean = joint(study, placer, sets)
    facts = facts_of(method, reference, positions)
    return EffectGrid(
        name=f"{facts['method']}_ablation",
        axes=("group",),
        labels=(tuple(groups),),
        per_example=effects,
        unedited=clean,
        unit=study.metric.unit,
        description=f"{study.metric.name} with the group ablated less that without.",
        provenance=study.provenance(seed, checks=placer.checks, **facts),
    )


def ablate_cumulatively(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    order: Heads,
    method: Maker = "mean",
    *,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> EffectGrid:
    """Ablate the first, the first two, ... of some heads: a curve that starts at none.

    Arguments are those of :func:`headscope.ablate_heads`; ``order`` says which heads go first.
    """
    heads = present(model, order)
    growing: dict[str, Heads] = {str(n): heads[:n] for n in range(len(heads) + 1)}
    return ablate_groups(
        model,
        probe,
        metric,
        growing,
        method,
        positions=positions,
        reference=reference,
        seed=seed,
        batch_size=batch_size,
        memory=memory,
        progress=progress,
    )


def interactions(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    heads: Heads,
    method: Maker = "mean",
    *,
    positions: Positions = None,
    reference: Probe | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> PairScores:
    """How far two heads together do more or less than each by itself, for chosen heads.

    ``effect(a, b) - effect(a) - effect(b)``, a mean over examples, the same for (b, a): 0 where
    heads act independently; backup heads show with the sign of the effects of the pair. Pairs that
    were not asked for, and of a head with itself, are NaN. Arguments are those of
    :func:`headscope.ablate_heads`.
    """
    chosen = present(model, heads)
    if len(chosen) < 2:
        raise InputError("interactions are between heads: give at least two.")
    study = Study.of(model, probe, metric, batch_size=batch_size, memory=memory, progress=progress)
    placer = Placer(study, method, positions=positions, reference=reference, seed=seed)
    both = list(combinations(chosen, 2))
    effects, _ = joint(study, placer, [*((head,) for head in chosen), *both])
    mean = np.nanmean(effects, axis=1)
    alone = dict(zip(chosen, mean, strict=False))
    shape = (model.shape.n_layers, model.shape.n_heads)
    values = np.full((*shape, *shape), np.nan)
    for (a, b), together in zip(both, mean[len(chosen) :], strict=True):
        values[(*a, *b)] = values[(*b, *a)] = together - alone[a] - alone[b]
    facts = facts_of(method, reference, positions)
    return PairScores(
        f"{facts['method']}_interaction",
        values,
        unit=study.metric.unit,
        upward=False,
        description="Effect of ablating both heads less the effects of each by itself.",
        provenance=study.provenance(seed, checks=placer.checks, **facts),
    )


def joint(
    study: Study, placer: Placer, sets: Sets
) -> tuple[Float[np.ndarray, "set example"], Float[np.ndarray, " example"]]:
    """Effects of sets of heads, each set at once, and the metric on the clean run."""
    named = list(dict.fromkeys(head for heads in sets for head in heads))

    def variants(chosen: slice, batch: Batch) -> list[Variant]:
        place = placer.place(chosen, batch)
        if named:
            placer.prove(batch, place, named)
        return [(place(heads),) if heads else () for heads in sets]

    edited, clean = study.measure(variants, len(sets), f"ablating {len(sets)} sets of heads")
    effects = without_rounding(edited - clean, clean)
    return effects, clean
