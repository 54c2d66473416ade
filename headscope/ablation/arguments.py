"""Arguments that all causal measurements share, and what becomes of their numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.edits import AnyEdit, Heads, head_list
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.interventions import Intervention, named
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe

Metricish = AnyMetric | Callable[..., Tensor]
Positions = str | Bool[Tensor, "batch pos"] | None
# What heads are ablated to: a value, its name, or a function from heads to an edit.
Maker = str | Intervention | Callable[[Heads], AnyEdit]


def intervention_of(
    method: Maker, reference: Probe | None = None, seed: int = 0, kind: str = "method"
) -> Intervention | None:
    """Return the intervention that was given or named; None for a function of the caller's.

    Raises:
        InputError: if there is no such name, or nothing would read the reference.
    """
    if isinstance(method, str):
        return named(method, reference, seed, kind)
    if reference is not None:
        raise InputError(
            f"reference= goes with the name of a {kind}: give it to the intervention itself, e.g. "
            "hs.interventions.Mean(reference=other), or set it in your edit function."
        )
    return method if isinstance(method, Intervention) else None


def marked(probe: Probe, positions: Positions) -> Bool[Tensor, "batch pos"] | None:
    """Positions named by a mark, or given as they are.

    Raises:
        InputError: if the probe has no such mark, or the shape is another.
    """
    where = probe.mark(positions) if isinstance(positions, str) else positions
    if where is not None and where.shape != probe.tokens.shape:
        raise InputError(
            f"positions have shape {tuple(where.shape)}, the probe {tuple(probe.tokens.shape)}."
        )
    if where is not None and not bool(where.any()):
        raise InputError("there are no positions to edit: none is marked.")
    return None if where is None else where.bool()


def present(model: HeadModel, heads: Heads | None) -> tuple[HeadIndex, ...]:
    """Heads that were asked for, all by default.

    Raises:
        InputError: if the model lacks one, or none was named.
    """
    if heads is None:
        return model.shape.heads
    chosen = tuple(model.shape.check(head) for head in head_list(heads))
    if not chosen:
        raise InputError("no heads given: name at least one, or leave them out for all.")
    return chosen


def by_head(
    model: HeadModel, heads: Sequence[HeadIndex], values: Float[np.ndarray, "variant example"]
) -> Float[np.ndarray, "layer head example"]:
    """Values of some heads in the place of each; NaN for the others."""
    shape = (model.shape.n_layers, model.shape.n_heads, values.shape[1])
    placed = np.full(shape, np.nan)
    for head, row in zip(heads, values, strict=True):
        placed[head.layer, head.head] = row
    return placed


def without_rounding(
    effects: Float[np.ndarray, "variant example"], clean: Float[np.ndarray, " example"]
) -> Float[np.ndarray, "variant example"]:
    """Effects with those that are rounding of fp32 set to 0 (a millionth of the clean metric)."""
    known = np.abs(clean[np.isfinite(clean)])
    floor = 1e-6 * float(known.max()) if known.size else 0.0
    return np.where(np.abs(effects) <= floor, 0.0, effects)


def seed_of(method: Maker, seed: int) -> int:
    """Seed of what is drawn: an intervention's own, or the one that goes with a name."""
    return int(getattr(method, "seed", seed))


def facts_of(method: Maker, reference: Probe | None, positions: Positions) -> Mapping[str, Any]:
    """What the settings were, for provenance."""
    where = positions if isinstance(positions, str) else "given" if positions is not None else "all"
    other = "own" if reference is None else reference.name
    facts: dict[str, Any] = {"method": method, "reference": other, "positions": where}
    if isinstance(method, Intervention):
        given = getattr(method, "reference", None)
        named_reference = {} if given is None else {"reference": given.name}
        own = {name: value for name, value in method.facts.items() if name != "seed"}
        return {**facts, **own, **named_reference}
    if not isinstance(method, str):
        facts["method"] = getattr(method, "__name__", "edit")
    return facts
