"""Activation patching, path patching, and patching of the residual stream between two runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import edits
from headscope.ablation.engine import Engine, ForwardSource, RecordedBatch, Source
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
from headscope.base.arguments import checked
from headscope.base.options import RunOptions
from headscope.base.specs import effect_spec
from headscope.capture import on_grid_of, passes
from headscope.edits import AnyEdit, HeadEdit, Heads, HeadSite, Span, Variant, head_list
from headscope.errors import InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex
from headscope.interventions import head_values
from headscope.metrics import answer_log_prob, answer_probability, as_metric
from headscope.models.hf.sublayers import MIXER_SITES, MixerModel
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap, TapView, Write
from headscope.probes.probe import Probe
from headscope.table import BackPatch, EffectGrid, HeadScores, Provenance

Axis = Literal["layer", "head", "position"]
PatchDirection = Literal["noise", "denoise"]
GridCell = tuple[tuple[HeadIndex, ...], Bool[Tensor, "batch pos"] | None]


@checked
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
    """Patch heads with values from the paired run, and measure the metric.

    ``noise`` runs the clean probe and patches in corrupt values: which heads are necessary.
    ``denoise`` runs the corrupt probe and patches in clean values: which heads are sufficient. The
    metric always reads the clean probe's targets. ``.normalised()`` puts 1 at clean and 0 at
    corrupt.

    Args:
        model: the model.
        probe: with a ``corrupt`` pair.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        axes: axes of the grid: ``("layer", "head")``; ``("layer", "position")``, all heads of a
            layer at once; or all three. Without ``position``, every position is patched, or those
            that ``positions`` marks.
        site: ``z``, ``query``, ``key``, ``value`` or ``pattern``; at ``key`` and ``value`` the
            heads are key/value heads.
        direction: ``noise`` or ``denoise``, as above.
        positions: with a ``position`` axis, the marks along it (default: every position).
        batch_size: examples per recorded pass.
        memory: what a stack of variants may take.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: if the probe has no aligned pair.

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
        spec=effect_spec(
            f"{direction}_{site}", measurement.metric, "with the patch minus that without."
        ),
        axes=tuple("kv_head" if a == "head" and site in ("key", "value") else a for a in axes),
        labels=labels,
        per_example=(edited - unedited).reshape(shape),
        unedited=unedited,
        pair=both_runs(measurement, donor, unedited, direction),
        provenance=measurement.provenance(site=site, direction=direction),
        clusters=measurement.probe.cluster_labels,
    )


def both_runs(
    measurement: Measurement, donor: Probe, unedited: Float[np.ndarray, " example"], direction: str
) -> Float[np.ndarray, "2 example"]:
    """The metric on the clean and on the corrupt run; one of the two was measured already."""
    other, _ = replace(measurement, probe=donor).measure(
        lambda _slice, _batch: [()], 1, "paired run"
    )
    return np.stack((unedited, other[0]) if direction == "noise" else (other[0], unedited))


def aligned_pair(probe: Probe, direction: str = "noise") -> tuple[Probe, Probe]:
    """The clean probe, and the corrupt tokens with the clean probe's answers.

    Raises:
        InputError: if they are not aligned, or the direction is unknown.
    """
    if direction not in ("noise", "denoise"):
        raise InputError(f"direction={direction!r}: give 'noise' or 'denoise'.")
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
    """Axis labels of the grid, and what to patch in each cell."""
    if len(set(axes)) != len(axes) or not set(axes) <= {"layer", "head", "position"}:
        raise InputError(f"axes={tuple(axes)}: choose among 'layer', 'head' and 'position'.")
    if "layer" not in axes:
        raise InputError("axes= must contain 'layer'.")
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
    """Label positions, each with its token if all examples share it: ``3 ' the'``."""
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
    """Sets of positions to patch, by label."""
    if not split:
        if positions is not None and not isinstance(positions, str | Tensor):
            raise InputError("positions= has several marks: add 'position' to axes.")
        return [""], [marked(probe, positions)]
    if positions is None:
        single = torch.eye(probe.length, dtype=torch.bool)[:, None].expand(-1, len(probe), -1)
        return position_names(model, probe), list(single)
    if isinstance(positions, Tensor):
        raise InputError(
            "with the axis 'position', positions= takes names of marks (default: every position)."
        )
    listed = [positions] if isinstance(positions, str) else list(positions)
    return listed, [marked(probe, name) for name in listed]


Entry = Literal["query", "key", "value"]


@checked
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
    """Effect of a sender's corrupt output on the metric, only along the paths to some receivers.

    Wang et al. 2022 (arXiv 2211.00593), appendix B. The first run is the clean one with the
    sender's output taken from the corrupt run, all other heads frozen to their clean outputs and
    MLPs recomputed; it gives the receivers' queries (or keys, or values). The second is the clean
    run with those inputs; it gives the metric. Without receivers the first run's own logits are
    read: the direct effect. This is not the direct-edge patch that freezes MLPs too.

    Args:
        model: the model.
        probe: with a ``corrupt`` pair.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        receivers: receiving heads; None: the logits.
        entry: input of the receivers: ``"query"``, ``"key"`` or ``"value"``. Keys and values belong
            to the whole key/value head.
        senders: default: all heads below the highest receiver.
        batch_size: examples per recorded pass.
        memory: what a stack of variants may take.
        progress: show a progress bar.

    Returns:
        Effect per sender; NaN where no path leads from it to a receiver.

    Raises:
        InputError: if the probe has no aligned ``corrupt`` pair, ``entry`` is unknown, or no sender
            is below the receivers.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> effect = hs.path_patch(model, names, hs.metrics.logit_difference, receivers="L2H1")
        >>> bool(np.isnan(effect.mean[2]).all())  # no path from heads of the receiver's own layer
        True
    """
    options = RunOptions(batch_size, memory, progress=progress)
    if entry not in ("query", "key", "value"):
        raise InputError(f"entry={entry!r}: give 'query', 'key' or 'value'.")
    clean, corrupt = aligned_pair(probe)
    listening = () if receivers is None else present(model, receivers)
    top = max((head.layer for head in listening), default=model.shape.n_layers)
    chosen = [head for head in present(model, senders) if head.layer < top]
    if not chosen:
        raise InputError(
            "no path leads from the senders to the receivers: choose senders in lower layers."
        )
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
    """Edits of the first run: the sender's corrupt output, and clean outputs of all later heads."""
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
    """The metric with the receivers' inputs taken from each first run."""
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
        # In a layer with a receiver, the other receivers below are clean, since heads are frozen.
        found = batch.source.values_at(some, [Tap(entry, layer) for layer in layers])
        by_layer = {tap.layer or 0: value for tap, value in found.items()}
        second = [
            (edits.patch(heads, {n: value[i] for n, value in by_layer.items()}, site=entry),)
            for i in range(len(some))
        ]
        done.append(batch.values(second))
    return torch.cat(done)


STREAM_SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")


@checked
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
    """Patch the residual stream, or an attention or MLP output, by layer and position.

    The value at a site in one layer and at one position (or at the positions of one mark) is
    replaced by that of the paired run; everything after it is recomputed. ``noise`` runs the clean
    probe and patches in corrupt values: what is necessary. ``denoise`` runs the corrupt probe and
    patches in clean values: what is sufficient. The metric always reads the clean probe's targets,
    and an effect is the metric with the patch minus that without, in the metric's unit;
    ``.normalised()`` puts 1 at clean and 0 at corrupt. Every cell takes a whole pass; as many as
    fit are stacked.

    Args:
        model: the model.
        probe: with a ``corrupt`` pair, aligned with it token by token.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        site: ``resid_pre`` and ``resid_post``, the stream before and after a block; ``attn_out``
            and ``mlp_out``, what its attention and its MLP add.
        layers: layers to use. Default: all that have the site.
        positions: marks along the axis of positions; default: every position of the batch.
        direction: ``noise`` or ``denoise``, as above.
        batch_size: examples per pass.
        memory: what a stack of passes may take.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

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
        spec=effect_spec(
            f"{direction}_{site}", measurement.metric, "with the patch minus that without."
        ),
        axes=("layer", "position"),
        labels=(tuple(f"L{layer}" for layer in chosen), tuple(names)),
        per_example=effects,
        unedited=unedited,
        pair=both_runs(plain, donor, unedited, direction),
        provenance=measurement.provenance(site=site, direction=direction),
        clusters=measurement.probe.cluster_labels,
    )


def _layers(model: HeadModel, site: str, layers: Sequence[int] | None) -> list[int]:
    """Validate the site and the layers to patch.

    Raises:
        InputError: if the site is unknown, no layer is named, or one is named twice.
    """
    if site not in STREAM_SITES:
        raise InputError(nearest(str(site), STREAM_SITES, kind="site of the residual stream"))
    shape = model.shape
    own = site.startswith("resid")
    chosen = list(range(shape.n_layers) if own else shape.attention_layers)
    if layers is not None:
        chosen = [int(layer) for layer in layers]
        if not chosen or len(set(chosen)) < len(chosen):
            raise InputError(f"layers={list(layers)}: name each layer once, at least one.")
    return chosen


def _values(model: HeadModel, probe: Probe, taps: Sequence[Tap]) -> dict[Tap, Tensor]:
    """Values of some taps in the paired run."""
    found: dict[Tap, Tensor] = {}

    def keep(view: TapView) -> None:
        found[view.tap] = view.value.clone()

    model.run(probe, reads=dict.fromkeys(taps, keep), logits_at=torch.empty(0, dtype=torch.long))
    return found


@dataclass(frozen=True, eq=False)
class Patched:
    """Replace a tap's value with another run's at some positions."""

    tap: Tap
    values: Float[Tensor, "batch pos d_model"]
    where: Bool[Tensor, "batch pos"]
    site: Any = field(init=False)
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Tap that is edited."""
        object.__setattr__(self, "site", self.tap.site)
        object.__setattr__(self, "layers", frozenset({self.tap.layer or 0}))

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the value with the other run's inserted."""
        where = self.where.to(value.device)[..., None]
        return torch.where(where, self.values.to(value), value)


@dataclass(frozen=True, eq=False)
class _StreamSource(ForwardSource):
    """Whole passes with a patched residual stream, many stacked in one."""

    def writes(self, variants: Sequence[Variant]) -> Mapping[Tap, Write]:
        """Patches by tap, each for its own share of the batch."""
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
    """Engine of whole passes, since a replay can edit only heads."""

    def source(
        self,
        model: HeadModel,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        read: Bool[Tensor, "batch pos"],
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Source:
        """Prepare a batch."""
        return _StreamSource(model, tokens, real, read, inputs=inputs)


@checked
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
    """Copy a position's residual stream from one layer back into an earlier one, and rerun.

    The residual stream after layer s (``source``) at one position replaces that after layer d
    (``destination``) at the same position of the same prompt. If a computation finishes too late
    for the layer that would use it, this repairs it. The best of many pairs is an oracle, so the
    pair is chosen on the even examples, and ``held_out`` is its effect on the odd ones. The null
    copies the states of another prompt.

    Args:
        model: the model.
        probe: with targets; one position of each example is marked ``at``.
        metric: metric from :mod:`headscope.metrics`; higher must be better.
        at: name of the mark.
        layers: sources and destinations; default: all.
        heads: copy only outputs ``z`` of these heads, for every pair of layers.
        forward: allow destinations above the source, too.
        batch_size: examples per pass.
        memory: limit for a stack of passes.
        progress: show a progress bar.

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
        raise InputError("back-patching needs at least two layers.")
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
    grids = [_stream_grid(measurement, chosen, cells, one, clean, site) for one in effects]
    return BackPatch.of(grids[0], grids[1], cells)


def _put(
    layer: int,
    values: Tensor,
    where: Bool[Tensor, "batch pos"],
    heads: Sequence[int] | None,
) -> AnyEdit:
    """Edit that inserts states into a layer at one position of each example."""
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
    """States of each tap at every example's marked position."""
    at = where.int().argmax(1)

    def run(batch: Probe, _: int) -> dict[Tap, Tensor]:
        return _values(model, batch, taps)

    parts: dict[int, list[Tensor]] = {}
    for examples, found in passes(model, probe, run, batch_size=batch_size):
        for tap, value in found.items():
            rows = torch.arange(len(value), device=value.device)
            parts.setdefault(tap.layer or 0, []).append(value[rows, at[examples].to(value.device)])
    return {layer: torch.cat(some) for layer, some in parts.items()}


def _stream_grid(
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
        spec=effect_spec(
            f"back_patch_{site}", measurement.metric, "with the state put back minus that without."
        ),
        axes=("source", "destination"),
        labels=(names, names),
        per_example=values,
        unedited=clean,
        provenance=measurement.provenance(site=site),
        clusters=measurement.probe.cluster_labels,
    )


_TOKENS_PER_PASS = 4096


@checked
@own_types()
@torch.no_grad()
def restore(
    model: HeadModel | Any,
    probe: Probe,
    metric: Metricish = answer_probability,
    *,
    positions: tuple[str, ...] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> EffectGrid:
    """Restore one component of a corrupt run to its clean value, and measure what recovers.

    The corrupt run is repeated with one component's clean value in one layer, at the positions of
    one mark. Components are ``resid_pre`` and ``resid_post`` (before and after the block),
    ``mixer_out`` (output of attention or of the state-space part) and ``mlp_out``. An effect is the
    metric with minus that without; ratios are avoided, as they are unstable where nothing was lost.

    With a corrupted key of :func:`headscope.probes.recall`, a model that stores pairs in place
    (induction) recovers the answer from ``mixer_out`` at the value; a model that looks the pair up
    when asked (a pointer, or a short convolution of Mamba at its last state) recovers it only from
    the query.

    Args:
        model: model from :func:`headscope.load`, or a language model of transformers, with or
            without attention (Mamba, hybrids).
        probe: with a ``corrupt`` pair; without padding.
        metric: default: probability of the answer.
        positions: marks; default: all that the probe has.
        batch_size: texts per pass; default: about 4,096 tokens.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Axes ``component``, ``layer`` and ``position``; NaN where a block has no such component.

    Raises:
        InputError: if the probe has no aligned pair, or has padding.
        UnsupportedModelError: if the model is not a sequence of blocks.

    Source:
        Meng et al. 2022 (arXiv 2202.05262), restoring; by component and position of associative
        recall as in mechanistic evaluations of state-space models.

    Example:
        >>> made = hs.compiled.from_library("recall")
        >>> probe = hs.probes.recall(range(1, 4), range(4, 7), pairs=2, batch=4)
        >>> grid = hs.ablation.restore(made.model, probe)
        >>> at = dict(zip(grid.labels[2], grid.mean[1, 0].tolist(), strict=True))  # L0, mixer_out
        >>> round(at["value"], 2), round(at["query"], 2)
        (1.0, 0.0)
    """
    options = RunOptions(batch_size, progress=progress)
    mixers = _mixers(model)
    clean, corrupt = aligned_pair(probe, "denoise")
    if not bool(clean.real.all()):
        raise InputError("the probe has padding: restore needs texts of one length.")
    names = positions or tuple(clean.marks)
    if not names:
        raise InputError("the probe has no marks: name the positions to restore with positions=.")
    where = [clean.mark(name) for name in names]
    chosen = as_metric(metric)
    places = mixers.places()
    shape = (len(MIXER_SITES), len(mixers.blocks), len(names), len(probe))
    effects, plain = np.full(shape, np.nan), np.empty((2, len(probe)))
    size = options.per_pass(probe.length, _TOKENS_PER_PASS)
    with options.track(len(places) * len(probe), "restoring") as advance:
        for start in range(0, len(probe), size):
            part = slice(start, start + size)
            batch, tokens = clean.examples(part), corrupt.tokens[part]
            values: dict[tuple[str, int], Tensor] = {}
            reads = {place: _keeper(values, place) for place in places}
            plain[0, part] = _measured(chosen, mixers.run(clean.tokens[part], reads=reads), batch)
            plain[1, part] = _measured(chosen, mixers.run(tokens), batch)
            for site, layer in places:
                for at, mark in enumerate(where):
                    write = {(site, layer): _patch(values[site, layer], mark[part])}
                    found = _measured(chosen, mixers.run(tokens, writes=write), batch)
                    effects[MIXER_SITES.index(site), layer, at, part] = found - plain[1, part]
                advance(float(len(batch)))
    return EffectGrid(
        spec=effect_spec("restore", chosen, "with the clean value restored minus that without."),
        axes=("component", "layer", "position"),
        labels=(MIXER_SITES, tuple(f"L{n}" for n in range(len(mixers.blocks))), names),
        per_example=effects,
        unedited=plain[1],
        pair=plain,
        provenance=Provenance(
            model=mixers.name,
            probe={"kind": probe.name, "examples": len(probe), **probe.settings},
            seed=probe.seed,
        ),
        clusters=probe.cluster_labels,
    )


def _mixers(model: Any) -> MixerModel:
    """Wrap the model as a sequence of blocks."""
    if isinstance(model, torch.nn.Module):
        return MixerModel.of(model)
    if isinstance(model, HeadModel) and model.path == "hf":
        return MixerModel.of(getattr(model, "module", None), model.name)
    raise UnsupportedModelError(
        f"{getattr(model, 'name', model)!r}: restore takes a model of headscope.load that "
        "transformers runs, or a model of transformers itself."
    )


def _keeper(values: dict[tuple[str, int], Tensor], place: tuple[str, int]) -> Any:
    def keep(value: Tensor) -> None:
        values[place] = value.clone()

    return keep


def _patch(values: Tensor, where: Bool[Tensor, "batch pos"]) -> Any:
    def write(value: Tensor) -> Tensor:
        return torch.where(where.to(value.device)[..., None], values, value)

    return write


def _measured(metric: Any, logits: Tensor, probe: Probe) -> Float[np.ndarray, " example"]:
    found: np.ndarray = metric(logits.cpu(), probe).double().numpy()
    return found
