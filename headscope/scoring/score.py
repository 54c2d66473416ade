"""``hs.score``: run each probe once, feed every layer to all scorers, and return one table."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture
from headscope.ablation.engine import RecordedBatch
from headscope.ablation.heads import check_slope, total_metric, whole_batches
from headscope.ablation.run import Measurement
from headscope.base.arguments import checked
from headscope.base.options import Advance, RunOptions, chunk_bytes
from headscope.base.stacks import grid_of
from headscope.base.statistics import Design
from headscope.circuits.scores import score_weights
from headscope.edits import HeadSite
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import ModelShape
from headscope.metrics import AnyMetric
from headscope.models.protocol import AttentionWrite, HeadModel, lacks, need_model, views_of
from headscope.models.running import own_types
from headscope.models.taps import Reads, TapView, at_final, at_layers
from headscope.origin import held_norm, origin
from headscope.probes import copied_tokens
from headscope.probes.images import random_images
from headscope.probes.probe import Probe
from headscope.scorer import Control, DefaultProbe, Scorer
from headscope.scorers import DEFAULT, Relation, resolve
from headscope.table import HeadScores, HeadTable, Provenance
from headscope.views import (
    AttentionRows,
    HeadGradients,
    HeadOutputs,
    QueryKeys,
    Rotation,
    Unembedding,
)

# Queries under a window that are worth a chunk of their own, however short the window is.
_NARROW = 256
# Copies of a chunk alive at once: attention scores, probabilities, and one derived view.
_COPIES = 3


@dataclass(eq=False)
class Sums:
    """Sums and counts of one scorer's values for a batch: ``[example layer head]``."""

    total: Float[Tensor, "layer head batch"]
    count: Float[Tensor, "layer head batch"]
    missing: Float[Tensor, "layer head"]

    @property
    def mean(self) -> Float[Tensor, "layer head batch"]:
        """Mean over queries; NaN where no query had a value."""
        return self.total / self.count.where(self.count > 0, torch.nan)


class RunningSums:
    """Running sums of several scorers during one forward pass, kept on the layers' own devices.

    Nothing is read back before :meth:`moved`, which copies once per device: the host never waits
    for a layer. Off the CPU, sums are in fp32 (not every device knows float64) with Kahan's
    correction from chunk to chunk.
    """

    def __init__(self, names: Sequence[str], layers: int, heads: int, batch: int) -> None:
        """Start with nothing added."""
        self._row = {name: number for number, name in enumerate(names)}
        self._shape = (len(names), layers, heads, batch)
        self._by_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether this scorer has been added."""
        return name in self._row

    def add(
        self,
        name: str,
        layer: int,
        values: Float[Tensor, "batch head query"],
        chosen: Bool[Tensor, "batch query"],
    ) -> None:
        """Add a scorer's values at the selected queries; NaN counts as missing."""
        wanted = chosen[:, None].expand_as(values)
        known = wanted & ~values.isnan()
        total, lost, counts = self._on(values.device)
        at = (self._row[name], layer)
        filled = torch.where(known, values, 0.0).sum(-1, dtype=total.dtype).T - lost[at]
        sums = total[at] + filled
        lost[at] = ((sums - total[at]) - filled).nan_to_num(0.0, 0.0, 0.0)  # infinite values
        total[at] = sums
        counts[0][at] += known.sum(-1).T
        counts[1][at] += (wanted & ~known).sum(-1).T

    def moved(self) -> dict[str, Sums]:
        """Move the sums to the CPU in float64, by scorer."""
        total = torch.zeros(self._shape, dtype=torch.float64)
        counts = torch.zeros(2, *self._shape, dtype=torch.float64)
        for sums, _, counted in self._by_device.values():
            total += sums.cpu()
            counts += counted.cpu()
        return {
            name: Sums(total[row], counts[0, row], counts[1, row].sum(-1))
            for name, row in self._row.items()
        }

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._by_device:
            exact = torch.float64 if device.type == "cpu" else torch.float32
            total = torch.zeros(self._shape, dtype=exact, device=device)
            counts = torch.zeros(2, *self._shape, dtype=torch.int64, device=device)
            self._by_device[device] = (total, torch.zeros_like(total), counts)
        return self._by_device[device]


@dataclass(eq=False)
class Accumulator:
    """Score one batch during its forward pass.

    Args:
        model: the running model.
        batch: the examples of this pass.
        scorers: what to compute; all share each chunk of rows.
        flat: also score uniform attention, for scorers with that control.
        memory: bytes that a chunk may take; None: what suits the device.
        halvings: by how many powers of two to cut the chunks, after running out of memory.
        advance: called after each layer.
        tokens: queries that a chunk may hold, over all examples; None: as many as fit.
    """

    model: HeadModel
    batch: Probe
    scorers: tuple[Scorer, ...]
    flat: bool
    memory: int | None
    halvings: int
    advance: Advance
    tokens: int | None = None
    budget: int = field(init=False)
    _sums: RunningSums = field(init=False)
    _flat_sums: RunningSums = field(init=False)
    _rotations: dict[int, Rotation] = field(default_factory=dict)
    _writes: dict[int, AttentionWrite] = field(default_factory=dict)
    _held: list[tuple[Scorer, int, Tensor, Tensor]] = field(default_factory=list)
    # Whether all scorers of the last chunk under a window did with the keys of the window.
    _narrow: bool = False

    def __post_init__(self) -> None:
        """Allocate the sums, and precompute what cannot be measured during the pass."""
        if self.batch.tokens.device.type != "cpu":  # query selection runs on the CPU
            self.batch = self.batch.to("cpu")
        if any("rotary" in scorer.needs for scorer in self.scorers):
            rotation = self.model.parts.rotation
            self._rotations = {
                layer: rotation(layer) for layer in self.model.shape.attention_layers
            }
        if "linear_write" in self.model.limits and any(
            "attention_write" in scorer.needs for scorer in self.scorers
        ):
            write = self.model.parts.attention_write
            self._writes = {layer: write(layer) for layer in self.model.shape.attention_layers}
        size = (self.model.shape.n_layers, self.model.shape.n_heads, len(self.batch))
        self._sums = RunningSums([scorer.name for scorer in self.scorers], *size)
        flat = [s.name for s in self.scorers if s.kind == "row" and is_against(s, "even_rows")]
        other = [s.name for s in self.scorers if is_against(s, "same_rows")]
        self._flat_sums = RunningSums([*flat, *other] if self.flat else [], *size)
        self.budget = self._budget()

    @property
    def sums(self) -> dict[str, Sums]:
        """Sums of every scorer, available after the pass."""
        return self._sums.moved()

    @property
    def flat_sums(self) -> dict[str, Sums]:
        """Null sums, for scorers whose control is uniform attention or another example."""
        return self._flat_sums.moved()

    def reads(self, shape: ModelShape) -> Reads:
        """Taps to read: every attention layer, and the final norm if a scorer divides by it."""
        layers = at_layers(shape, self._on_layer)
        scaled = any(scorer.per_final_scale for scorer in self.scorers)
        return layers | at_final(self._on_final) if scaled else layers

    @cached_property
    def selected(self) -> dict[str, Bool[Tensor, "batch pos"]]:
        """Mask of the queries that count, per scorer."""
        return {s.name: s.queries(self.batch) & self.batch.real for s in self.scorers}

    @cached_property
    def _others(self) -> dict[str, Bool[Tensor, "batch pos"]]:
        """Mask of the queries that count in the paired example, per scorer with such a control."""
        other = self.batch.control
        asking = [s for s in self.scorers if is_against(s, "same_rows")]
        if other is None or not self.flat or not asking:
            return {}
        shown = self.batch.real & other.real
        if "alone" in other.facts:
            shown = shown & (other.facts["alone"] == 0)[:, None]
        return {s.name: s.queries(other) & shown for s in asking}

    @cached_property
    def positions(self) -> Int[Tensor, " query"]:
        """Positions that at least one scorer needs in at least one example."""
        masks = [*self.selected.values(), *self._others.values()]
        wanted = torch.stack([mask.any(0) for mask in masks]).any(0)
        return wanted.nonzero().squeeze(-1)

    @cached_property
    def _flat(self) -> dict[tuple[str, int | None, int, int], Tensor]:
        return {}

    @cached_property
    def _measured_unembedding(self) -> Unembedding:
        return self.model.unembedding

    def _unembedding(self) -> Unembedding:
        """Final norm and unembedding of this pass, built on first use."""
        return self._measured_unembedding

    @cached_property
    def _probes(self) -> dict[torch.device, Probe]:
        return {}

    def _on_layer(self, view: TapView) -> None:
        """Feed one layer to every scorer, chunk by chunk."""
        device = view.z.device
        if device not in self._probes:
            self._probes[device] = self.batch.to(device)
        rotation = self._rotations.get(view.layer)
        write = self._writes.get(view.layer)
        layer = _Layer(self.model, view, self._probes[device], rotation, self._unembedding, write)
        left = self.positions
        while len(left):
            size = self._chunk_size(left, self.model.shape.windows[view.layer])
            self._on_chunk(layer, left[:size])
            left = left[size:]
        self.advance()

    def _chunk_size(self, left: Int[Tensor, " query"], window: int | None) -> int:
        """Number of the next queries whose rows fit the budget.

        Args:
            left: queries that are left, in order.
            window: window of the layer; its rows take no more than the keys between the first
                query's and the last query's, unless a scorer has asked for whole patterns.
        """
        size = max(1, self.budget // self._row)
        if window is None or not self._narrow:
            return size
        most = left[: max(window, _NARROW)]
        most = most if self.tokens is None else most[: max(1, self._tokens)]
        held = (most - most[0] + 2 * window) * torch.arange(1, len(most) + 1)
        fits = int((held * (self._row // self.batch.length) <= self.budget).sum())
        return max(size, fits)

    @property
    def _tokens(self) -> int:
        """Queries of each example that a chunk may hold, where that is limited."""
        return (self.tokens or 0) // len(self.batch)

    @property
    def _row(self) -> int:
        """Bytes for one query's rows over all examples and heads."""
        return _COPIES * 4 * len(self.batch) * self.model.shape.n_heads * self.batch.length

    def _budget(self) -> int:
        """Byte budget of a chunk, fixed once per pass (free memory changes between layers)."""
        budget = chunk_bytes(self.model.device, self.memory)
        if self.tokens is not None:
            budget = min(budget, self._tokens * self._row)
        return budget >> self.halvings

    def _on_chunk(self, layer: "_Layer", positions: Int[Tensor, " query"]) -> None:
        chunk = _Chunk(layer, positions)
        self._feed(layer, chunk)
        made = chunk.made_rows
        if any(rows.first_key for rows in made):
            self._narrow = not any(rows.is_whole for rows in made)

    def _feed(self, layer: "_Layer", chunk: "_Chunk") -> None:
        positions = chunk.positions
        for scorer in self.scorers:
            self._on_other(scorer, layer, chunk)
            chosen = self.selected[scorer.name][:, positions]
            if not bool(chosen.any()):
                continue
            chosen = chosen.to(layer.device)
            values = scorer(chunk.seen(scorer), layer.probe)
            if scorer.per_final_scale:
                self._held.append((scorer, layer.number, values, positions))
            else:
                self._sums.add(scorer.name, layer.number, values, chosen)
            if scorer.name in self._flat_sums and is_against(scorer, "even_rows"):
                spread = self._flat_values(scorer, layer, chunk).to(layer.device)
                spread = spread.expand(-1, self.model.shape.n_heads, -1)
                self._flat_sums.add(scorer.name, layer.number, spread, chosen)

    def _on_other(self, scorer: Scorer, layer: "_Layer", chunk: "_Chunk") -> None:
        """Score these rows against the paired examples' targets (the ``same_rows`` control)."""
        if scorer.name not in self._others or layer.probe.control is None:
            return
        chosen = self._others[scorer.name][:, chunk.positions]
        if bool(chosen.any()):
            values = scorer(chunk.seen(scorer), layer.probe.control)
            self._flat_sums.add(scorer.name, layer.number, values, chosen.to(layer.device))

    def _flat_values(
        self, scorer: Scorer, layer: "_Layer", chunk: "_Chunk"
    ) -> Float[Tensor, "batch head_or_one query"]:
        """Score uniform attention; cached for layers with the same visibility."""
        if scorer.reads == "rows_value_weighted":
            return scorer(chunk.flat_rows(scorer), layer.probe)
        window = self.model.shape.windows[layer.number]
        key = (scorer.name, window, int(chunk.positions[0]), len(chunk.positions))
        if key not in self._flat:
            self._flat[key] = scorer(chunk.flat_rows(scorer), layer.probe)
        return self._flat[key]

    def _on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Divide the deferred sums by the final norm's scale."""
        scale = self._unembedding().scale(residual)
        for scorer, layer, values, positions in self._held:
            chosen = self.selected[scorer.name][:, positions].to(values.device)
            part = scale.to(values.device)[:, None, positions]
            self._sums.add(scorer.name, layer, values / part, chosen)
        self._held.clear()


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer, with everything that scorers can derive from it computed at most once."""

    model: HeadModel
    view: TapView
    probe: Probe
    rotation: Rotation | None
    unembedding: Callable[[], Unembedding]
    write: AttentionWrite | None = None

    @property
    def number(self) -> int:
        return self.view.layer

    @property
    def device(self) -> torch.device:
        return self.view.z.device

    @cached_property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        weights = self.model.output_weights(self.number).float()
        return weights if self.write is None else self.write.folded(weights)

    def write_scale(
        self, z: Float[Tensor, "batch query head d_head"]
    ) -> Float[Tensor, "batch query"] | None:
        """Scale of the norm after attention at these queries; None if there is no such norm."""
        if self.write is None or self.write.norm is None:
            return None
        weights = self.model.output_weights(self.number).float()
        together = torch.einsum("bqhd,hdm->bqm", z, weights) + self.write.bias
        return self.write.scale(together)

    @cached_property
    def value_norms(self) -> Float[Tensor, "batch head key"]:
        """``|v_j W_O|`` through the Gram matrix of ``W_O``."""
        values = self.view.values().float()
        gram = (self.W_O @ self.W_O.mT).unflatten(0, (values.shape[1], -1))
        squared = torch.einsum("bgkd,gjde,bgke->bgjk", values, gram, values)
        return squared.clamp_min(0).sqrt().flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """One chunk of queries of a layer; each derived view is computed at most once, on demand.

    Attributes:
        positions: query positions, on the CPU so that the number of visible keys is known without a
            device sync.
    """

    layer: _Layer
    positions: Int[Tensor, " query"]

    @cached_property
    def rows(self) -> AttentionRows:
        return self.layer.view.rows(self.positions)

    @cached_property
    def even(self) -> AttentionRows:
        return self.rows.uniform()

    @cached_property
    def no_sink(self) -> AttentionRows:
        return self.rows.without_first(self.layer.probe.first)

    @cached_property
    def value_weighted(self) -> AttentionRows:
        return self.rows.weighted(self.layer.value_norms)

    @cached_property
    def outputs(self) -> HeadOutputs:
        z = self.layer.view.z[:, self.positions].float()
        return HeadOutputs(
            layer=self.layer.number,
            query_pos=self.positions.to(self.layer.device),
            z=z,
            W_O=self.layer.W_O,
            unembedding=self.layer.unembedding(),
            make_rows=lambda: self.rows,
            make_values=self.layer.view.values,
            make_query_keys=lambda: self.query_keys,
            write_scale=self.layer.write_scale(z),
        )

    @cached_property
    def query_keys(self) -> QueryKeys:
        seen = self.layer.view.query_keys(self.positions)
        return replace(seen, rotation=self.layer.rotation)

    @property
    def made_rows(self) -> list[AttentionRows]:
        """Rows of all views that were asked for so far."""
        found = self.__dict__
        return [one for one in found.values() if isinstance(one, AttentionRows)]

    def seen(self, scorer: Scorer) -> AttentionRows | HeadOutputs | QueryKeys:
        """The view of this chunk that a scorer reads."""
        if scorer.reads == "qk":
            return self.query_keys
        if scorer.reads == "outputs":
            return self.outputs
        if scorer.reads == "rows_no_sink":
            return self.no_sink
        return self.value_weighted if scorer.reads == "rows_value_weighted" else self.rows

    def flat_rows(self, scorer: Scorer) -> AttentionRows:
        """Uniform attention in the view that this scorer reads."""
        even = self.even
        if scorer.reads == "rows_no_sink":
            return even.without_first(self.layer.probe.first)
        if scorer.reads == "rows_value_weighted":
            return even.weighted(self.layer.value_norms)
        return even


def is_against(scorer: Scorer, of: str) -> bool:
    """Whether a scorer's control is of this kind; see :class:`headscope.scorer.Control`."""
    return scorer.control is not None and scorer.control.of == of


def joined_sums(parts: Sequence[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Concatenate the sums of consecutive batches, per scorer."""
    return {
        name: Sums(
            torch.cat([part[name].total for part in parts], -1),
            torch.cat([part[name].count for part in parts], -1),
            torch.stack([part[name].missing for part in parts]).sum(0),
        )
        for name in parts[0]
    }


@dataclass(frozen=True, eq=False)
class _Added:
    """Add a zero leaf tensor to every head output; its gradient is that of the output."""

    leaves: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    seen: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    layers: frozenset[int] = frozenset()
    site: HeadSite = "z"

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        self.seen[layer] = value.detach()
        leaf = torch.zeros_like(value, dtype=torch.float32, requires_grad=True)
        self.leaves[layer] = leaf
        return value + leaf.to(value)


def gradient_sums(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric,
    scorers: Sequence[Scorer],
    options: RunOptions,
    advance: Advance,
) -> dict[str, Sums]:
    """Sums of gradient scorers over a probe; NaN for examples that the metric does not read.

    Args:
        model: the model to run.
        probe: the examples.
        metric: metric whose gradients the scorers read.
        scorers: gradient scorers.
        options: batch size, memory and progress.
        advance: callback that counts finished examples, layer by layer.

    Raises:
        InputError: if the metric has no gradient at the clean run.
    """
    check_slope(model, metric, None, 1)
    measurement = Measurement.of(model, probe, metric, options.quiet)
    layers = model.shape.attention_layers
    read = metric.reads(probe).any(1)
    names = [scorer.name for scorer in scorers]
    heads = (model.shape.n_layers, model.shape.n_heads)
    whole = RunningSums(names, *heads, len(probe)).moved()
    for chosen, batch in whole_batches(measurement):
        part, counted = batch.probe.to("cpu"), read[chosen].cpu()
        sums = RunningSums(names, *heads, len(part))
        for seen in _by_layer(model, batch, layers):
            for scorer in scorers:
                wanted = scorer.queries(part) & part.real & counted[:, None]
                values = scorer(seen, batch.probe.to(seen.z.device))
                sums.add(scorer.name, seen.layer, values, wanted.to(values.device))
            advance(float(len(part)))
        for name, found in sums.moved().items():
            whole[name].total[..., chosen] = found.total
            whole[name].count[..., chosen] = found.count
            whole[name].missing += found.missing
    return whole


def _by_layer(
    model: HeadModel, batch: RecordedBatch, layers: Sequence[int]
) -> Iterator[HeadGradients]:
    """Outputs and gradients of every layer, from one forward and one backward pass."""
    added = _Added(layers=frozenset(layers))
    with torch.enable_grad():
        total = total_metric(model, batch, (added,))
        found = torch.autograd.grad(total, [added.leaves[layer] for layer in layers])
    for layer, gradient in zip(layers, found, strict=True):
        z = added.seen[layer].float()
        yield HeadGradients(layer, torch.arange(z.shape[1], device=z.device), z, gradient)


Wanted = Iterable[str | Scorer | Relation] | str | Scorer | None


@checked
@own_types()
def score(
    model: HeadModel,
    probe: Probe | None = None,
    scorers: Wanted = None,
    *,
    batch_size: int | None = None,
    memory: str | int | None = None,
    max_tokens_per_chunk: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> HeadTable:
    """Score every attention head of a model.

    One forward pass per batch of a probe serves all scorers; a second one, on the probe's
    control, serves the nulls of those scorers that name it. Scorers of weights run nothing, and
    scorers of gradients take a forward and a backward pass for each metric.

    Args:
        model: from :func:`headscope.load`.
        probe: what to run; default: for each scorer the kind of probe that it is meant for.
        scorers: names from ``headscope.scorers.CATALOGUE``, scorers and relations, or a mixture;
            default: ``headscope.scorers.DEFAULT``, without those that do not apply to this family.
        batch_size: examples per pass; affects only time and memory.
        memory: what one chunk of attention rows may take, e.g. ``"2GB"``.
        max_tokens_per_chunk: queries whose rows are held at once, over all examples of a batch
            (at least one of each); with ``memory`` the smaller of both counts.
        seed: seed for the default probes.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Raises:
        InputError: for unknown scorers, or a probe that does not fit the model.
        UnsupportedModelError: if a scorer that you named does not apply to this family.

    Example:
        >>> import headscope as hs
        >>> table = hs.score(hs.load(), scorers=["previous_token", "induction"])
        >>> list(table)
        ['previous_token', 'induction']
    """
    need_model(model)
    if probe is not None:
        capture.need_probe(probe)
    options = RunOptions(batch_size, memory, seed, progress)
    if len(views := views_of(model)) > 1:
        return _by_stack(
            views,
            copied_tokens(model, seed=seed) if probe is None else probe,
            scorers,
            batch_size=batch_size,
            memory=memory,
            max_tokens_per_chunk=max_tokens_per_chunk,
            seed=seed,
            progress=progress,
        )
    probe = None if probe is None else capture.seen_by(model, probe)
    probe = None if probe is None else probe.on_grid(grid_of(model.stacks))
    chosen = _applicable(model, scorers, probe)
    groups = [_Group.of(*pair) for pair in _assign(model, chosen, probe, seed)]
    for group in groups:
        group.check(model)
    if max_tokens_per_chunk is not None and max_tokens_per_chunk < 1:
        raise InputError(f"max_tokens_per_chunk={max_tokens_per_chunk}: give 1 or more.")
    done: dict[str, HeadScores] = {}
    of_weights = [scorer for scorer in chosen if scorer.reads == "weights"]
    if of_weights:
        found = score_weights(model, of_weights, seed=seed)
        done |= {name: one.of_stack(model.shape.stack) for name, one in found.items()}
    total = sum(group.examples for group in groups) * len(model.shape.attention_layers)
    with options.track(total, f"scoring {model.name}") as advance:
        run = partial(_run, model, options=options, tokens=max_tokens_per_chunk, advance=advance)
        for group in groups:
            sums, null = _group_sums(model, group, run, options, advance)
            facts = origin(model, group.probe)  # digests all weights, so once for all scorers
            for scorer in group.scorers:
                of = sums[scorer.name], null.get(scorer.name)
                done[scorer.name] = _to_scores(model, scorer, group, *of, facts)
    return HeadTable(done[scorer.name] for scorer in chosen)


def _by_stack(
    views: Sequence[HeadModel], probe: Probe, scorers: Wanted, **options: Any
) -> HeadTable:
    """Score each attention stack with the scorers that apply to it, and join the tables.

    Raises:
        UnsupportedModelError: if a scorer that was named applies to no stack.
    """
    listed = resolve(DEFAULT) if scorers is None else _listed(scorers)
    for one in () if scorers is None else listed:
        if all(any(lacks(view, need) for need in one.needs) for view in views):
            _applicable(views[-1], one, None)  # raises with the reason
    found: list[HeadScores] = []
    for view in views:
        seen = capture.seen_by(view, probe)
        own = [one for one in listed if not any(lacks(view, need) for need in one.needs)]
        if scorers is None:
            own = [one for one in own if _can_read(one, view, seen)]
        found += score(view, seen, own, **options).values() if own else []
    return HeadTable(found)


@dataclass(frozen=True, eq=False)
class _Group:
    """A probe, the scorers that it serves, and the control examples they are compared with."""

    probe: Probe
    scorers: tuple[Scorer, ...]
    controls: Mapping[Control, Probe | None]

    @classmethod
    def of(cls, probe: Probe, scorers: tuple[Scorer, ...]) -> "_Group":
        """Build the group, with the examples of every control."""
        named = dict.fromkeys(s.control for s in scorers if s.control is not None)
        return cls(probe, scorers, {one: one.examples(probe) for one in named})

    @property
    def seen(self) -> tuple[Scorer, ...]:
        """Scorers that need a forward pass."""
        return tuple(one for one in self.scorers if one.reads != "gradients")

    @property
    def by_metric(self) -> dict[AnyMetric, list[Scorer]]:
        """Gradient scorers, grouped by metric."""
        found: dict[AnyMetric, list[Scorer]] = {}
        for one in self.scorers:
            if one.metric is not None:
                found.setdefault(one.metric, []).append(one)
        return found

    @property
    def passes(self) -> list[tuple[Probe, tuple[Scorer, ...]]]:
        """Passes over control examples, each with the scorers that use it."""
        found: dict[Callable[[Probe], Probe | None], tuple[Probe, list[Scorer]]] = {}
        for scorer in self.seen:
            control = scorer.control
            other = None if control is None else self.controls[control]
            if control is not None and control.of == "pass" and other is not None:
                found.setdefault(control.examples, (other, []))[1].append(scorer)
        return [(other, tuple(scorers)) for other, scorers in found.values()]

    @property
    def examples(self) -> int:
        """Total number of examples over all passes."""
        own = len(self.probe) * (bool(self.seen) + len(self.by_metric))
        return own + sum(len(other) for other, _ in self.passes)

    @property
    def numbered(self) -> Probe:
        """The probe as run, with example numbers and the control examples that scorers need."""
        number = torch.arange(len(self.probe), dtype=torch.float32)
        numbered = replace(self.probe, facts={**self.probe.facts, "example": number})
        others = [one for one in self.controls if one.of == "same_rows"]
        if not others:
            return numbered
        other = others[0].examples(replace(numbered, control=None, corrupt=None))
        return replace(numbered, control=other)

    def check(self, model: HeadModel) -> None:
        """Check the probe's marks and length before any pass.

        Raises:
            InputError: if a scorer's mark is missing, or the probe does not fit the model.
        """
        for scorer in self.scorers:
            scorer.queries(self.probe)
            if scorer.metric is not None:
                scorer.metric.reads(self.probe)
        answers = any("unembedding" in scorer.needs for scorer in self.scorers)
        capture.check_fits(model, self.probe, answers=answers)


def _group_sums(
    model: HeadModel,
    group: _Group,
    run: Callable[..., tuple[dict[str, Sums], dict[str, Sums]]],
    options: RunOptions,
    advance: Advance,
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Sums of every scorer of a group, and of their nulls."""
    sums: dict[str, Sums] = {}
    null: dict[str, Sums] = {}
    if group.seen:
        sums, null = run(group.numbered, group.seen, flat=True)
    for other, compared in group.passes:
        null |= run(other, compared, flat=False)[0]
    for metric, scorers in group.by_metric.items():
        sums |= gradient_sums(model, group.probe, metric, scorers, options, advance)
    return sums, null


def _applicable(model: HeadModel, wanted: Wanted, probe: Probe | None) -> tuple[Scorer, ...]:
    """The requested scorers; by default those that suit the model and the caller's probe."""
    if wanted is None:
        return tuple(
            scorer
            for scorer in resolve(DEFAULT)
            if not any(lacks(model, need) for need in scorer.needs)
            and _can_read(scorer, model, probe)
        )
    chosen = _listed(wanted)
    for scorer in chosen:
        for need in scorer.needs:
            if (reason := lacks(model, need)) is not None:
                raise UnsupportedModelError(f"{scorer.name} needs {need}: {reason}")
    return chosen


def _listed(wanted: Iterable[str | Scorer | Relation] | str | Scorer) -> tuple[Scorer, ...]:
    """The requested scorers as a list."""
    if not isinstance(wanted, str | Scorer | Iterable):
        raise InputError(f"scorers={wanted!r}: give a scorer, its name, or a list of them.")
    chosen = resolve([wanted] if isinstance(wanted, str | Scorer) else list(wanted))
    if not chosen:
        raise InputError("no scorers given: name at least one, or leave them out for the defaults.")
    return chosen


def _can_read(scorer: Scorer, model: HeadModel, probe: Probe | None) -> bool:
    """Whether the probe has the marks that a scorer reads, or a suitable probe can be made."""
    if probe is None and grid_of(model.stacks) is not None:
        probe = random_images(model, batch=1)  # image positions carry these marks
    if probe is None:
        return scorer.probe is None or scorer.probe.possible(model)
    try:
        scorer.queries(probe)
    except InputError:
        return False
    return True


def _assign(
    model: HeadModel, scorers: tuple[Scorer, ...], probe: Probe | None, seed: int
) -> list[tuple[Probe, tuple[Scorer, ...]]]:
    """Group scorers by the probe that serves them."""
    running = [scorer for scorer in scorers if scorer.reads != "weights"]
    if probe is not None:
        return [(probe, group) for group in _beside(running)]
    by_kind: dict[DefaultProbe, list[Scorer]] = {}
    for scorer in running:
        if scorer.probe is None:
            raise InputError(f"{scorer.name} has no default probe: pass probe=.")
        by_kind.setdefault(scorer.probe.suited(model), []).append(scorer)
    made: dict[Callable[..., Probe], Probe] = {}
    found = []
    for kind, group in by_kind.items():
        if kind.make not in made:
            made[kind.make] = kind.make(model, seed)
        found += [(made[kind.make], part) for part in _beside(group)]
    return found


def _beside(scorers: Sequence[Scorer]) -> list[tuple[Scorer, ...]]:
    """Split a group so that scorers in one pass agree on the paired example."""
    groups: dict[object, list[Scorer]] = {}
    rest = []
    for scorer in scorers:
        control = scorer.control
        if control is not None and control.of == "same_rows":
            groups.setdefault(control.examples, []).append(scorer)
        else:
            rest.append(scorer)
    first, *more = list(groups.values()) or [[]]
    asking = set(map(id, (*first, *rest)))
    together = [scorer for scorer in scorers if id(scorer) in asking]  # in the order given
    return [tuple(group) for group in (together, *more) if group]


def _run(
    model: HeadModel,
    probe: Probe,
    scorers: tuple[Scorer, ...],
    *,
    flat: bool,
    options: RunOptions,
    tokens: int | None,
    advance: Advance,
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Sums of every scorer over the whole probe, and of the nulls that share its rows."""

    def watch(batch: Probe, halvings: int) -> Accumulator:
        def on_layer(steps: float = 1) -> None:
            advance(steps * len(batch))

        budget = options.memory_bytes
        return Accumulator(model, batch, scorers, flat, budget, halvings, on_layer, tokens)

    passes = capture.stream(model, probe, watch, batch_size=options.batch_size)
    parts = [(part.sums, part.flat_sums) for _, part in passes]
    sums, flats = zip(*parts, strict=True)
    return joined_sums(sums), joined_sums(flats)


def _to_scores(
    model: HeadModel,
    scorer: Scorer,
    group: _Group,
    sums: Sums,
    null: Sums | None,
    facts: Provenance,
) -> HeadScores:
    held = held_norm(model) if "attention_write" in scorer.needs else {}
    name = None if scorer.control is None or null is None else scorer.control.name
    grid = group.probe.grid
    return HeadScores.from_examples(
        scorer.spec if grid is None else scorer.spec.in_patches,
        _absent(model, sums.mean.numpy()),
        kv_heads=model.shape.n_kv_heads,
        control_per_example=None if null is None else _absent(model, null.mean.numpy()),
        design=_design(scorer, group),
        missing=np.where(_there(model), sums.missing.numpy(), 0).astype(int),
        provenance=replace(facts, control=name, probe={**facts.probe, **held}),
    ).of_stack(model.shape.stack)


def _absent(
    model: HeadModel, values: Float[np.ndarray, "layer head batch"]
) -> Float[np.ndarray, "layer head batch"]:
    """NaN at layers without attention and at pruned heads, 0 elsewhere."""
    return np.where(_there(model)[:, :, None], values, np.nan)


def _there(model: HeadModel) -> Bool[np.ndarray, "layer head"]:
    """Boolean mask of the heads that exist."""
    there = np.zeros((model.shape.n_layers, model.shape.n_heads), dtype=bool)
    there[tuple(np.transpose(model.shape.heads))] = True
    return there


def _design(scorer: Scorer, group: _Group) -> Design:
    """Pairing of the examples with those of the null, for the test."""
    control = scorer.control
    if control is None or control.of != "pass":
        paired = control is not None and scorer.kind == "row"
        return Design(paired=paired, clusters=group.probe.cluster_labels)
    other = group.controls[control]
    return Design(
        paired=other is not None and other.paired,
        clusters=group.probe.cluster_labels,
        control_clusters=None if other is None else other.cluster_labels,
    )
