"""Patching of the residual stream, and of what attention and MLPs add to it, cell by cell.

From a paired run, or from another layer of the same run (back-patching).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.ablation.engine import RecordedBatch
from headscope.ablation.patching import aligned_pair, both_runs, places
from headscope.ablation.run import Measurement, Metricish, marked, present
from headscope.ablation.sources import Engine, ForwardSource, Source
from headscope.base.options import RunOptions
from headscope.capture import on_grid_of, passes
from headscope.edits import AnyEdit, HeadEdit, Span, Variant
from headscope.errors import InputError, nearest
from headscope.metrics import answer_log_prob
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView, Write
from headscope.probes.probe import Probe
from headscope.table import BackPatch, EffectGrid

STREAM_SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")


@own_types()
@torch.no_grad()
def patch_stream(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    site: str = "resid_pre",
    *,
    layers: Sequence[int] | None = None,
    positions: str | Sequence[str] | None = None,
    direction: str = "noise",
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> EffectGrid:
    """Patch the residual stream, or what attention or an MLP adds to it, by layer and position.

    The value at a site in one layer and at one position (or at the positions of one mark) becomes
    that of the paired run; everything behind it is computed anew. ``noise`` runs the clean probe
    and patches in values of the corrupt one: what is needed. ``denoise`` runs the corrupt one and
    patches in clean values: what is enough. The metric always reads the clean probe's targets, and
    an effect is the metric with the patch less that without, in the metric's unit;
    ``.normalised()`` puts 1 at clean and 0 at corrupt. Every cell is a whole pass; as many as fit
    are stacked in one.

    Args:
        model: the model.
        probe: with a ``corrupt`` pair, aligned with it token by token.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        site: ``resid_pre`` and ``resid_post``, the stream before and after a block; ``attn_out``
            and ``mlp_out``, what its attention and its MLP add.
        layers: which; default: all that have the site.
        positions: marks along the axis of positions; default: every position of the batch.
        direction: see above.
        batch_size: examples per pass.
        memory: what a stack of passes may take.
        progress: show a bar.

    Returns:
        Axes ``layer`` and ``position``; NaN for examples that have only padding there.

    Raises:
        InputError: if the probe has no aligned pair, or the model no such site or layer.
        UnsupportedModelError: if what a block adds is not attention and one other part.

    Source: Meng et al. 2022 (arXiv 2202.05262), causal tracing; Heimersheim and Nanda 2024 (arXiv
    2404.15255), on reading it.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> grid = hs.patch_stream(model, names, hs.metrics.logit_difference, "mlp_out")
        >>> grid.axes, grid.mean.shape == (model.shape.n_layers, names.length)
        (('layer', 'position'), True)
    """
    options = RunOptions(batch_size, memory, progress=progress)
    clean, corrupt = aligned_pair(on_grid_of(model, probe), direction)
    run, donor = (clean, corrupt) if direction == "noise" else (corrupt, clean)
    chosen = _layers(model, site, layers)
    names, masks = places(model, run, positions, split=True)
    taps = [Tap(site, layer).check(model.name, model.shape) for layer in chosen]
    plain = Measurement.of(model, run, metric, options)
    measurement = replace(plain, engine=_StreamEngine(False, False, plain.engine.noop_error))
    where = [(torch.ones_like(run.real) if one is None else one) & run.real for one in masks]

    def variants(examples: slice, _batch: RecordedBatch) -> list[Variant]:
        values = _values(model, donor.examples(examples), taps)
        return [(Patched(tap, values[tap], one[examples]),) for tap in taps for one in where]

    count = len(taps) * len(where)
    edited, unedited = measurement.measure(variants, count, f"patching {count} cells")
    shape = (len(taps), len(where), len(run))
    missing = torch.stack([~one.any(1) for one in where]).numpy()
    effects = np.where(missing[None], np.nan, (edited - unedited).reshape(shape))
    return EffectGrid(
        name=f"{direction}_{site}",
        axes=("layer", "position"),
        labels=(tuple(f"L{layer}" for layer in chosen), tuple(names)),
        per_example=effects,
        unedited=unedited,
        pair=both_runs(plain, donor, unedited, direction),
        unit=measurement.metric.unit,
        description=f"{measurement.metric.name} with the patch less that without.",
        provenance=measurement.provenance(site=site, direction=direction),
        clusters=measurement.probe.cluster_labels,
    )


def _layers(model: HeadModel, site: str, layers: Sequence[int] | None) -> list[int]:
    """Layers to patch.

    Raises:
        InputError: for another site, or if no layer is named or one twice.
    """
    if site not in STREAM_SITES:
        raise InputError(nearest(str(site), STREAM_SITES, kind="site of the residual stream"))
    shape = model.shape
    own = site.startswith("resid")
    chosen = list(range(shape.n_layers) if own else shape.attention_layers)
    if layers is not None:
        chosen = [int(layer) for layer in layers]
        if not chosen or len(set(chosen)) < len(chosen):
            raise InputError(f"layers={list(layers)}: name each layer once, one at least.")
    return chosen


def _values(model: HeadModel, probe: Probe, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
    """What some taps hold in the paired run."""
    found: dict[Tap, Tensor] = {}

    def keep(view: TapView) -> None:
        found[view.tap] = view.value.clone()

    model.run(probe, reads=dict.fromkeys(taps, keep), logits_at=torch.empty(0, dtype=torch.long))
    return found


@dataclass(frozen=True, eq=False)
class Patched:
    """At some positions of one tap, another run's values."""

    tap: Tap
    values: Float[Tensor, "batch pos d_model"]
    where: Bool[Tensor, "batch pos"]
    site: Any = field(init=False)
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Say what is edited."""
        object.__setattr__(self, "site", self.tap.site)
        object.__setattr__(self, "layers", frozenset({self.tap.layer or 0}))

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the value with the other run's in its place."""
        where = self.where.to(value.device)[..., None]
        return torch.where(where, self.values.to(value), value)


@dataclass(frozen=True, eq=False)
class _StreamSource(ForwardSource):
    """Whole passes whose residual stream is patched, many stacked in one."""

    def writes(self, variants: Sequence[Variant]) -> Mapping[Tap, Write]:
        """Patches by the taps that they write, each at its own share of the batch."""
        by_tap: dict[Tap, dict[int, AnyEdit]] = {}
        for number, variant in enumerate(variants):
            for patch in variant:
                layer = min(patch.layers)
                by_tap.setdefault(Tap(patch.site, layer), {})[number] = patch
        return {tap: _shares(tap, mine, len(variants)) for tap, mine in by_tap.items()}


def _shares(
    tap: Tap, patches: Mapping[int, AnyEdit], copies: int
) -> Callable[[Tensor, Span], Tensor]:
    def write(value: Tensor, _span: Span) -> Tensor:
        parts = list(value.chunk(copies))
        for number, patch in patches.items():
            parts[number] = patch(tap.layer or 0, parts[number])
        return torch.cat(parts)

    return write


@dataclass(frozen=True)
class _StreamEngine(Engine):
    """Whole passes: a replay edits heads alone."""

    def source(
        self,
        model: HeadModel,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        read: Bool[Tensor, "batch pos"],
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Source:
        """Make a batch ready."""
        return _StreamSource(model, tokens, real, read, inputs=inputs)


@own_types()
@torch.no_grad()
def back_patch(
    model: HeadModel,
    probe: Probe,
    metric: Metricish = answer_log_prob,
    *,
    at: str = "end",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    forward: bool = False,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> BackPatch:
    """Put what a layer makes of a position back into an earlier layer, and let the model go on.

    The residual stream after layer s (``source``) at one position replaces that after layer d
    (``destination``) at the same position of the same prompt. Where a step of a computation comes
    too late for a layer that would use it, going back mends that. The best of many pairs is an
    oracle: the pair is chosen on the even examples, and ``held_out`` is its effect on the odd ones.
    The null puts back the states of another prompt.

    Args:
        model: the model.
        probe: with targets; one position of each example is marked ``at``.
        metric: of :mod:`headscope.metrics`; higher is better.
        at: the mark.
        layers: sources and destinations; default: all.
        heads: put back outputs ``z`` of these heads alone, of every pair of layers.
        forward: also destinations above the source.
        batch_size: examples per pass.
        memory: what a stack of passes may take.
        progress: show a bar.

    Raises:
        InputError: if a mark or layer does not fit, or there are fewer than four examples.

    Source: Biran et al. 2024 (arXiv 2406.12775), hopping too late.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=4)
        >>> found = hs.ablation.back_patch(model, names, layers=[0, 1, 2])
        >>> found.effects.axes
        ('source', 'destination')
    """
    where = marked(probe, at)
    if where is None or not bool((where.sum(1) == 1).all()):
        raise InputError(f"back-patching needs one position marked {at!r} in every example.")
    if len(probe) < 4:
        raise InputError(
            f"{len(probe)} examples are too few to choose a pair of layers on some and try it on "
            "others: give four or more."
        )
    site = "resid_post" if heads is None else "z"
    chosen = _layers(model, "resid_post", layers)
    if heads is not None:
        chosen = [layer for layer in chosen if layer in model.shape.attention_layers]
        present(model, [(layer, head) for layer in chosen for head in heads])
    taps = [Tap(site, layer).check(model.name, model.shape) for layer in chosen]
    measurement = Measurement.of(
        model, probe, metric, RunOptions(batch_size, memory, progress=progress)
    )
    if heads is None:
        measurement = replace(
            measurement, engine=_StreamEngine(False, False, measurement.engine.noop_error)
        )
    cells = [(s, d) for s in chosen for d in chosen if d < s or (forward and d > s)]
    if not cells:
        raise InputError("back-patching needs two layers at least.")
    states = _states(model, probe, taps, where, batch_size)
    count = len(cells)

    def variants(examples: slice, _batch: RecordedBatch) -> list[Variant]:
        made: list[Variant] = []
        for order in (torch.arange(len(probe)), torch.arange(len(probe)).roll(1)):
            for s, d in cells:
                values = states[s][order[examples]][:, None]
                made.append((_put(d, values, where[examples], heads),))
        return made

    edited, clean = measurement.measure(variants, 2 * count, f"back-patching {count} pairs")
    effects = (edited - clean).reshape(2, count, len(probe))
    grids = [_grid(measurement, chosen, cells, one, clean, site) for one in effects]
    return BackPatch.of(grids[0], grids[1], cells)


def _put(
    layer: int,
    values: Tensor,
    where: Bool[Tensor, "batch pos"],
    heads: Sequence[int] | None,
) -> AnyEdit:
    """The edit that puts states into a layer at one position of each example."""
    if heads is None:
        return Patched(Tap("resid_post", layer), values.expand(-1, where.shape[1], -1), where)
    names = [(layer, head) for head in heads]
    return HeadEdit.at("back_patch", names, donors={layer: values}, positions=where)


def _states(
    model: HeadModel,
    probe: Probe,
    taps: Sequence[Tap],
    where: Bool[Tensor, "batch pos"],
    batch_size: int | None,
) -> dict[int, Tensor]:
    """What each tap holds at every example's one position."""
    at = where.int().argmax(1)

    def run(batch: Probe, _: int) -> dict[Tap, Tensor]:
        return _values(model, batch, taps)

    parts: dict[int, list[Tensor]] = {}
    for examples, found in passes(model, probe, run, batch_size=batch_size):
        for tap, value in found.items():
            rows = torch.arange(len(value), device=value.device)
            parts.setdefault(tap.layer or 0, []).append(value[rows, at[examples].to(value.device)])
    return {layer: torch.cat(some) for layer, some in parts.items()}


def _grid(
    measurement: Measurement,
    layers: Sequence[int],
    cells: Sequence[tuple[int, int]],
    effects: Float[np.ndarray, "cell example"],
    clean: Float[np.ndarray, " example"],
    site: str,
) -> EffectGrid:
    values = np.full((len(layers), len(layers), len(clean)), np.nan)
    for (s, d), row in zip(cells, effects, strict=True):
        values[layers.index(s), layers.index(d)] = row
    names = tuple(f"L{layer}" for layer in layers)
    return EffectGrid(
        name=f"back_patch_{site}",
        axes=("source", "destination"),
        labels=(names, names),
        per_example=values,
        unedited=clean,
        unit=measurement.metric.unit,
        description=f"{measurement.metric.name} with the state put back less that without.",
        provenance=measurement.provenance(site=site),
        clusters=measurement.probe.cluster_labels,
    )
