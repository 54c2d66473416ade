"""Patching: one run with values of its paired run, cell by cell or along one path between heads."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope import edits
from headscope.ablation.engine import RecordedBatch
from headscope.ablation.heads import as_scores
from headscope.ablation.run import (
    Measurement,
    Metricish,
    Positions,
    by_head,
    marked,
    present,
    without_rounding,
)
from headscope.base.options import RunOptions
from headscope.capture import on_grid_of
from headscope.edits import Heads, HeadSite, Variant, head_list
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.interventions import head_values
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.probes.probe import Probe
from headscope.table import EffectGrid, HeadScores

Axis = Literal["layer", "head", "position"]
PatchDirection = Literal["noise", "denoise"]
GridCell = tuple[tuple[HeadIndex, ...], Bool[Tensor, "batch pos"] | None]


@own_types()
def patch_activations(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    axes: Sequence[Axis] = ("layer", "head"),
    *,
    site: HeadSite = "z",
    direction: PatchDirection = "noise",
    positions: Positions | Sequence[str] = None,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> EffectGrid:
    """Patch what heads have at a site, from the paired run, and measure the metric.

    ``noise`` runs the clean probe and patches in values of the corrupt one: what is needed.
    ``denoise`` runs the corrupt one and patches in clean values: what is enough. The metric always
    reads the clean probe's targets. ``.normalised()`` puts 1 at clean and 0 at corrupt.

    Args:
        model: the model.
        probe: with a ``corrupt`` pair.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        axes: of the grid: ``("layer", "head")``; ``("layer", "position")``, all heads of a layer
            at once; or all three. Without ``position``, every position is patched, or those that
            ``positions`` marks.
        site: ``z``, ``query``, ``key``, ``value`` or ``pattern``; at ``key`` and ``value`` the
            heads are key/value heads.
        direction: see above.
        positions: with a ``position`` axis, the marks along it (default: every position).
        batch_size: examples per recorded pass.
        memory: what a stack of variants may take.
        progress: show a bar.

    Raises:
        InputError: if the probe has no pair that is aligned with it.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> hs.patch_activations(model, names, hs.metrics.logit_difference).axes
        ('layer', 'head')
    """
    options = RunOptions(batch_size, memory, progress=progress)
    clean, corrupt = aligned_pair(on_grid_of(model, probe), direction)
    run, donor = (clean, corrupt) if direction == "noise" else (corrupt, clean)
    measurement = Measurement.of(model, run, metric, options)
    labels, cells = _grid(model, run, axes, site, positions)

    def variants(chosen: slice, batch: RecordedBatch) -> list[Variant]:
        pair = donor.examples(chosen)
        donors = head_values(model, pair.tokens, pair.real, site=site, inputs=pair.inputs)
        made: list[Variant] = []
        for heads, where in cells:
            mask = None if where is None else where[chosen]
            made.append((edits.patch(heads, donors, site=site, positions=mask),))
        return made

    edited, unedited = measurement.measure(variants, len(cells), f"patching {len(cells)} cells")
    shape = (*(len(names) for names in labels), len(run))
    return EffectGrid(
        name=f"{direction}_{site}",
        axes=tuple("kv_head" if a == "head" and site in ("key", "value") else a for a in axes),
        labels=labels,
        per_example=(edited - unedited).reshape(shape),
        unedited=unedited,
        pair=both_runs(measurement, donor, unedited, direction),
        unit=measurement.metric.unit,
        description=f"{measurement.metric.name} with the patch less that without.",
        provenance=measurement.provenance(site=site, direction=direction),
        clusters=measurement.probe.cluster_labels,
    )


def both_runs(
    measurement: Measurement, donor: Probe, unedited: Float[np.ndarray, " example"], direction: str
) -> Float[np.ndarray, "2 example"]:
    """The metric on the clean and on the corrupt run, one of which was measured."""
    other, _ = replace(measurement, probe=donor).measure(
        lambda _slice, _batch: [()], 1, "paired run"
    )
    return np.stack((unedited, other[0]) if direction == "noise" else (other[0], unedited))


def aligned_pair(probe: Probe, direction: str = "noise") -> tuple[Probe, Probe]:
    """The clean probe, and the corrupt tokens with the clean probe's answers.

    Raises:
        InputError: if they are not aligned, or the direction is neither of the two.
    """
    if direction not in ("noise", "denoise"):
        raise InputError(f"direction is 'noise' or 'denoise'; got {direction!r}.")
    other = probe.corrupt
    if other is None:
        raise InputError("patching needs a pair: this probe has no corrupt probe.")
    if other.tokens.shape != probe.tokens.shape or not torch.equal(other.real, probe.real):
        raise InputError("the corrupt probe is not aligned with the clean one, token by token.")
    return probe, replace(
        probe, tokens=other.tokens, structure=other.structure, inputs=other.inputs
    )


def _grid(
    model: HeadModel,
    probe: Probe,
    axes: Sequence[Axis],
    site: HeadSite,
    positions: Positions | Sequence[str],
) -> tuple[tuple[tuple[str, ...], ...], list[GridCell]]:
    """Names along the axes, and what to patch in each cell."""
    if len(set(axes)) != len(axes) or not set(axes) <= {"layer", "head", "position"}:
        raise InputError(f"axes are some of layer, head and position; got {tuple(axes)}.")
    if "layer" not in axes:
        raise InputError("patching needs the axis 'layer'.")
    shape = model.shape
    n_heads = shape.n_kv_heads if site in ("key", "value") else shape.n_heads
    names, masks = places(model, probe, positions, "position" in axes)
    choices = {
        "layer": list(shape.attention_layers),
        "head": list(range(n_heads)) if "head" in axes else [None],
        "position": list(range(len(names))),
    }
    order: list[str] = list(axes)
    shown = {"layer": [f"L{i}" for i in choices["layer"] if i is not None]}
    shown |= {"head": [f"H{i}" for i in range(n_heads)], "position": names}
    rest = [axis for axis in choices if axis not in order]
    cells: list[GridCell] = []
    for at in product(*(choices[axis] for axis in (*order, *rest))):
        cell = dict(zip((*order, *rest), at, strict=True))
        chosen = range(n_heads) if cell["head"] is None else [cell["head"]]
        heads: Heads = [(int(cell["layer"] or 0), int(head or 0)) for head in chosen]
        cells.append((head_list(heads), masks[cell["position"] or 0]))
    return tuple(tuple(shown[axis]) for axis in order), cells


def position_names(model: HeadModel, probe: Probe) -> list[str]:
    """Positions, each with its token where all examples have the same one: ``3 ' the'``."""
    if probe.grid is not None:
        return list(probe.grid.labels)
    names = [str(at) for at in range(probe.length)]
    if model.tokenizer is None:
        return names
    for at, (column, real) in enumerate(zip(probe.tokens.T, probe.real.T, strict=True)):
        ids = set(column[real].tolist())
        if len(ids) == 1:
            names[at] += f" {model.tokenizer.batch_decode([list(ids)])[0]!r}"
    return names


def places(
    model: HeadModel, probe: Probe, positions: Positions | Sequence[str], split: bool
) -> tuple[list[str], list[Bool[Tensor, "batch pos"] | None]]:
    """Sets of positions to patch, by name."""
    if not split:
        if positions is not None and not isinstance(positions, str | Tensor):
            raise InputError("several marks need the axis 'position'.")
        return [""], [marked(probe, positions)]
    if positions is None:
        single = torch.eye(probe.length, dtype=torch.bool)[:, None].expand(-1, len(probe), -1)
        return position_names(model, probe), list(single)
    if isinstance(positions, Tensor):
        raise InputError("along the axis 'position' give names of marks, or nothing for all.")
    listed = [positions] if isinstance(positions, str) else list(positions)
    return listed, [marked(probe, name) for name in listed]


Entry = Literal["query", "key", "value"]


@own_types()
def path_patch(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    receivers: Heads | None = None,
    entry: Entry = "query",
    *,
    senders: Heads | None = None,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Effect on the metric of a sender's corrupt output, by the paths to some receivers alone.

    Wang et al. 2022 (arXiv 2211.00593), appendix B: the clean run with the sender's output taken
    from the corrupt run, all other heads frozen to their clean outputs and MLPs computed anew,
    gives the receivers' queries (or keys, or values); the clean run with those gives the metric.
    Without receivers the first run's own logits are read: the direct effect. This is not the
    direct-edge patch that freezes MLPs too.

    Args:
        model: the model.
        probe: with a ``corrupt`` pair.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        receivers: heads that listen; None: the logits.
        entry: where they listen. Keys and values belong to the whole key/value head.
        senders: default: all heads below the highest receiver.
        batch_size: examples per recorded pass.
        memory: what a stack of variants may take.
        progress: show a bar.

    Returns:
        Effect per sender; NaN where no path leads from it to a receiver.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> effect = hs.path_patch(model, names, hs.metrics.logit_difference, receivers="L2H1")
        >>> bool(np.isnan(effect.mean[2]).all())  # no path from heads of the receiver's own layer
        True
    """
    options = RunOptions(batch_size, memory, progress=progress)
    if entry not in ("query", "key", "value"):
        raise InputError(f"entry is 'query', 'key' or 'value'; got {entry!r}.")
    clean, corrupt = aligned_pair(probe)
    listening = () if receivers is None else present(model, receivers)
    top = max((head.layer for head in listening), default=model.shape.n_layers)
    chosen = [head for head in present(model, senders) if head.layer < top]
    if not chosen:
        raise InputError("no path leads from these senders to these receivers.")
    measurement = Measurement.of(model, clean, metric, options)
    parts, clean_parts = [], []
    total = float(len(chosen) * len(clean))
    with options.track(total, "path patching") as advance:
        for examples, batch in measurement.batches():
            pair, own = corrupt.examples(examples), batch.probe
            donors = head_values(model, pair.tokens, pair.real, inputs=pair.inputs)
            kept = batch.source.z or head_values(model, own.tokens, own.real, inputs=own.inputs)
            first = [_sent(model, sender, donors, kept, top) for sender in chosen]
            if listening:
                values = _received(model, batch, first, listening, entry)
            else:
                values = batch.values(first)
            advance(float(len(chosen) * len(batch.probe)))
            parts.append(values)
            clean_parts.append(batch.clean)
    unedited = torch.cat(clean_parts).numpy()
    effects = without_rounding(torch.cat(parts, 1).numpy() - unedited, unedited)
    name = "logits" if not listening else f"{entry} of {', '.join(map(str, listening))}"
    provenance = measurement.provenance(receivers=name)
    return as_scores(measurement, by_head(model, chosen, effects), "path", provenance)


def _sent(
    model: HeadModel,
    sender: HeadIndex,
    donors: dict[int, Tensor],
    kept: dict[int, Tensor],
    top: int,
) -> Variant:
    """The sender's corrupt output, and clean outputs of all heads above it up to the receivers."""
    above = [head for head in model.shape.heads if sender.layer < head.layer < top]
    frozen = (edits.patch(above, kept),) if above else ()
    return (edits.patch([sender], donors), *frozen)


def _received(
    model: HeadModel,
    batch: RecordedBatch,
    first: Sequence[Variant],
    listening: Sequence[HeadIndex],
    entry: Entry,
) -> Tensor:
    """The metric with the receivers' inputs of each first run."""
    shape = model.shape
    layers = sorted({head.layer for head in listening})
    heads = [
        head if entry == "query" else HeadIndex(head.layer, shape.kv_head(head.head))
        for head in listening
    ]
    size = max(1, batch.limit // (len(batch.probe) * batch.probe.length))
    done = []
    for start in range(0, len(first), size):
        some = first[start : start + size]
        # Receivers in a layer below another receiver are clean there: heads do not hear heads.
        found = batch.source.values_at(some, [Tap(entry, layer) for layer in layers])
        by_layer = {tap.layer or 0: value for tap, value in found.items()}
        second = [
            (edits.patch(heads, {n: value[i] for n, value in by_layer.items()}, site=entry),)
            for i in range(len(some))
        ]
        done.append(batch.values(second))
    return torch.cat(done)
