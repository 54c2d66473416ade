"""``hs.edges.attribute``: contribution of every edge of a model to a metric.

Estimated by edge attribution patching, with one or several gradients or with other rules, or
measured exactly by removing one edge at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import whole_file, writable_folder
from headscope.base.options import Advance, RunOptions
from headscope.edges.rules import GIM_SHARES, InteractionRules, RelevanceRules, Rules, with_share
from headscope.edges.written import (
    ENTRIES,
    EdgeBatch,
    EdgeMeasurement,
    WrittenRun,
    measured_with,
    run_apart,
    values_with,
)
from headscope.errors import InputError, UnsupportedModelError, nearest
from headscope.metrics import AnyMetric, as_metric
from headscope.models.proof import gap, rounding
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Site, Tap
from headscope.origin import origin
from headscope.probes.probe import Probe, probe_digest
from headscope.table.edges import EdgeGraph, Wiring
from headscope.views import HeadNorm, Norm, Rotation

_MATRIX = {"query": "W_Q", "key": "W_K", "value": "W_V"}


@dataclass(frozen=True, eq=False)
class SlotGradient:
    """Gradient of a metric with respect to a layer's queries, keys or values, per query head.

    Attributes:
        site: ``query``, ``key`` or ``value``.
        layer: the model's layer number.
        slope: gradient per query head, at the vectors that attention uses: after norms, rotation
            and multiplier.
    """

    site: Site
    layer: int
    slope: Float[Tensor, "batch head pos d_head"]

    def through_weights(
        self,
        model: HeadModel,
        stream: Float[Tensor, "batch pos d_model"],
        place: Int[Tensor, "batch pos"],
        frozen: bool = False,
    ) -> "HeadReads | None":
        """Matrix by which each head reads the normalised stream, with the gradient at its output.

        Args:
            model: model whose weights are used.
            stream: input of the layer.
            place: index of every position among the real ones of its text.
            frozen: treat norm scales as constants.

        Returns:
            None if the weights do not determine it: no per-head weights, or heads of queries and
            keys that share the scale of a norm.
        """
        try:
            weights, norm = model.weights(self.layer), model.parts.input_norm(self.layer)
            between = model.parts.query_key(self.layer)
        except UnsupportedModelError:
            return None
        matrix = getattr(weights, _MATRIX[self.site]).detach().float().to(stream.device)
        slope = self.slope.detach().float()
        group = slope.shape[1] // len(matrix)
        if self.site != "value":
            query = self.site == "query"
            inner = between.query_norm if query else between.key_norm
            slope = (between.query_scale if query else between.key_scale) * slope
            slope = unturned(between.rotation, slope, place[:, None].to(slope.device))
            if inner is not None and inner.together:
                return None
            if inner is not None:
                bias = (weights.b_Q if query else weights.b_K).detach().float().to(stream.device)
                content = torch.einsum("bpd,hde->bphe", norm(stream.detach()), matrix) + bias
                slope = _behind_head_norm(inner, content, slope, group, frozen)
        return HeadReads(slope, matrix.repeat_interleave(group, 0))


@dataclass(frozen=True, eq=False)
class HeadReads:
    """How heads read the normalised residual stream, with the gradient at their output.

    Attributes:
        slope: gradient at the output of every head's matrix.
        matrix: matrix that reads the norm's output.
    """

    slope: Float[Tensor, "batch head pos d_head"]
    matrix: Float[Tensor, "head d_model d_head"]

    @classmethod
    def together(cls, reads: "Sequence[HeadReads]") -> "HeadReads":
        """Concatenate several slots."""
        return cls(
            torch.cat([read.slope for read in reads], 1),
            torch.cat([read.matrix for read in reads]),
        )

    def at_stream(
        self, norm: Norm, stream: Float[Tensor, "batch pos d_model"], frozen: bool = False
    ) -> Float[Tensor, "batch head pos d_model"]:
        """Gradient at the residual stream before the norm, in fp32.

        The norm's gain and mean are folded into the matrix, so tensors as wide as the residual
        stream are written only once per head and changed once.

        Args:
            norm: norm before attention.
            stream: input of the norm.
            frozen: treat the norm's scale as a constant.

        Example:
            >>> norm = Norm(torch.ones(2), torch.zeros(2), centred=False, epsilon=0.0)
            >>> x = torch.tensor([[[3.0, 4.0]]])  # no slope along the input of a norm that divides
            >>> found = HeadReads(x[:, None], torch.eye(2)[None]).at_stream(norm, x)
            >>> float(found.abs().max()) < 1e-6
            True
        """
        batch, heads, pos, _ = self.slope.shape
        content, scale = stream.detach().float(), norm.scale(stream.detach())
        by_head = (self.slope / scale[:, None, :, None]).transpose(0, 1).flatten(1, 2)
        found = torch.bmm(by_head, norm.folded(self.matrix).mT)
        if norm.divides and not frozen:
            content = content - content.mean(-1, keepdim=True) if norm.centred else content
            content = content.flatten(0, 1)
            along = torch.bmm(found.transpose(0, 1), content[..., None]).squeeze(-1)
            along /= content.shape[-1] * scale.square().view(-1, 1)
            found.addcmul_(along.mT[..., None], content, value=-1)
        return found.view(heads, batch, pos, -1).transpose(0, 1)


def unturned(
    rotation: Rotation, slope: Float[Tensor, "*any pos d_head"], place: Tensor
) -> Float[Tensor, "*any pos d_head"]:
    """Gradient before the rotation, given the gradient after it.

    Args:
        rotation: rotation of the layer.
        slope: gradient at rotated vectors.
        place: position of each vector.
    """
    if not rotation.first:
        return slope
    angle = place.double()[..., None] * rotation.frequency.double().to(slope.device)
    cos, sin = (rotation.gain * part.to(slope) for part in (angle.cos(), angle.sin()))
    first, second = list(rotation.first), list(rotation.second)
    a, b = slope[..., first], slope[..., second]
    found = slope.clone()
    found[..., first] = a * cos + b * sin
    found[..., second] = b * cos - a * sin
    return found


def _behind_head_norm(
    norm: HeadNorm,
    content: Float[Tensor, "batch pos any_head d_head"],
    slope: Float[Tensor, "batch head pos d_head"],
    group: int,
    frozen: bool,
) -> Float[Tensor, "batch head pos d_head"]:
    """Gradient at the input of a per-head norm."""
    x = content - content.mean(-1, keepdim=True) if norm.centred else content
    scale = norm.scale(content)[..., None]
    x, scale, gain = (
        one.repeat_interleave(group, -2).transpose(-2, -3)
        for one in (x, scale, norm.gain.to(x)[None])
    )
    found = slope * gain
    if not frozen:
        found = found - (found * x).mean(-1, keepdim=True) / scale.square() * x
    found = found / scale
    return found - found.mean(-1, keepdim=True) if norm.centred else found


# Tolerance between gradients through a head's weights and the model's own backward pass.
_AGREEMENT = 1e-4
_LEAST = 1e-30


def gradient_scores(batch: EdgeBatch, method: str, steps: int) -> Float[Tensor, "batch edge"]:
    """First-order effect of every edge on every example.

    The change in the source's write, times the gradient of the metric with respect to the input of
    the target's slot, summed over positions.

    Args:
        batch: batch to score.
        method: any method except ``exact``.
        steps: number of gradients averaged by integrated methods.
    """
    if method == "relp":
        return _batch_scores(batch, Backwards(rules=RelevanceRules()))
    if method == "gim":
        return _batch_scores(batch, Backwards(rules=InteractionRules(), shares=GIM_SHARES))
    if method == "eap":
        return _batch_scores(batch, Backwards())
    if method == "eap_ig":
        return _over_inputs(batch, steps)
    return _over_activations(batch, steps)


@dataclass(frozen=True, eq=False)
class Backwards:
    """Settings of a backward pass: changes to the run, and backward rules.

    Attributes:
        embed: input of the first block in place of the embedding.
        shift: offset added to the output of attention or an MLP.
        rules: backward rules that replace gradients; None: none.
        shares: shares of the gradient passed on by queries, keys and values.
    """

    embed: Float[Tensor, "batch pos d_model"] | None = None
    shift: Mapping[Tap, Tensor] = field(default_factory=dict)
    rules: Rules | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether this is the gradient of the clean run."""
        return self.embed is None and self.rules is None and not (self.shift or self.shares)

    def changes(self, n_layers: int) -> dict[Tap, Callable[[Tensor], Tensor]]:
        """Functions of taps that modify the pass."""
        found: dict[Tap, Callable[[Tensor], Tensor]] = {
            tap: _added(value) for tap, value in self.shift.items()
        }
        for site, share in self.shares.items():
            found |= {Tap(site, layer): with_share(share) for layer in range(n_layers)}
        return found


def _added(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda there: there + value.to(there)


def _over_inputs(batch: EdgeBatch, steps: int) -> Float[Tensor, "batch edge"]:
    """Mean over runs with the embedding interpolated from corrupt to clean."""
    clean = batch.clean.embed
    total = torch.zeros(len(batch.texts.tokens), len(batch.study.wiring), dtype=torch.float64)
    for step in range(steps):
        embed = clean + (1 - step / steps) * batch.change[:, 0]
        total += _batch_scores(batch, Backwards(embed=embed)) / steps
    return total


def _over_activations(batch: EdgeBatch, steps: int) -> Float[Tensor, "batch edge"]:
    """Mean over runs with one layer's heads, or one MLP, interpolated from corrupt to clean.

    Edges that leave the embedding, a layer's heads or an MLP are scored on the runs that
    interpolate these.
    """
    wiring = batch.study.wiring
    total = torch.zeros(len(batch.texts.tokens), len(wiring), dtype=torch.float64)
    for tap, sources in _groups(wiring):
        mine = torch.from_numpy(np.isin(wiring.ends[1], sources))
        change = batch.change[:, sources].sum(1)
        for step in range(steps):
            moved = (1 - step / steps) * change
            of = (
                Backwards(embed=batch.clean.embed + moved)
                if tap.site == "embed"
                else Backwards(shift={tap: moved})
            )
            total[:, mine] += _batch_scores(batch, of)[:, mine] / steps
    return total


def _groups(wiring: Wiring) -> Iterator[tuple[Tap, np.ndarray]]:
    """Sources that are interpolated together, and their taps."""
    every = np.arange(len(wiring.sources))
    yield Tap("embed"), every[:1]
    for layer in range(wiring.n_layers):
        heads = wiring.heads_of(layer)
        yield Tap("attn_out", layer), every[heads]
        yield Tap("mlp_out", layer), every[heads.stop : heads.stop + 1]


def _batch_scores(batch: EdgeBatch, of: Backwards) -> Float[Tensor, "batch edge"]:
    """Scores from the gradient of one run."""
    run = batch.clean
    with torch.enable_grad():
        if not (of.is_clean and run.taps[Tap("embed")].requires_grad):
            run = run_apart(
                batch.study.model,
                batch.texts,
                embed=of.embed,
                logits_at=batch.measured.at,
                grad=True,
                changes=of.changes(batch.study.wiring.n_layers),
                rules=of.rules,
            )
        assert run.logits is not None  # noqa: S101  # they were asked for
        values = batch.measured(run.logits)[0][batch.measured.counted.to(run.logits.device)]
    if not values.requires_grad:
        raise InputError(
            f"{batch.measured.metric.name} has no gradient, so gradient methods cannot score "
            "edges: use another metric, or method='exact'."
        )
    return _contracted(batch, _Slopes.of(batch, run, values.sum(), of.rules is not None))


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Gradients of one backward pass, from the first corrupted position on.

    Attributes:
        run: run that was differentiated.
        at: gradients by tap; 0 if the metric does not depend on it.
        frozen: whether norms divide by a constant in this pass.
    """

    run: WrittenRun
    at: Mapping[Tap, Tensor]
    frozen: bool

    @classmethod
    def of(cls, batch: EdgeBatch, run: WrittenRun, total: Tensor, frozen: bool) -> "_Slopes":
        layers = range(batch.study.wiring.n_layers)
        grouped = batch.study.model.shape.group_size > 1
        sites = ("resid_pre", "attn_out", "mlp_out", *(("z",) if grouped else ENTRIES))
        taps = [Tap(site, layer) for layer in layers for site in sites]
        taps.append(Tap("resid_post", layers[-1]))
        entries = [run.taps[tap] for tap in taps]
        found = torch.autograd.grad(total, entries, retain_graph=True, allow_unused=True)
        return cls(
            run,
            {
                tap: torch.zeros_like(entry) if one is None else one
                for tap, entry, one in zip(taps, entries, found, strict=True)
            },
            frozen,
        )


@torch.no_grad()
def _contracted(batch: EdgeBatch, slopes: _Slopes) -> Float[Tensor, "batch edge"]:
    """Multiply gradients at every input by the changes, layer by layer."""
    wiring, first = batch.study.wiring, batch.first
    parts = []
    for layer in range(wiring.n_layers):
        at_mlp = _mlp_input(slopes, layer, wiring)[:, None, first:]
        inputs = _head_inputs(batch, slopes, layer, at_mlp[:, 0])
        parts.append(_times(batch.change[:, : wiring.before(layer), first:], inputs))
        parts.append(_times(batch.change[:, : wiring.before_mlp(layer), first:], at_mlp))
    last = slopes.at[Tap("resid_post", wiring.n_layers - 1)][:, None, first:]
    parts.append(_times(batch.change[:, :, first:], last))
    return torch.cat([part.flatten(1) for part in parts], 1)


def _times(
    change: Float[Tensor, "batch source pos d_model"],
    gradient: Float[Tensor, "batch target pos d_model"],
) -> Float[Tensor, "batch target source"]:
    """Inner products over positions and dimensions, summed in fp64 on the CPU."""
    return (gradient.float().flatten(2) @ change.flatten(2).mT).cpu().double()


def _head_inputs(
    batch: EdgeBatch, slopes: _Slopes, layer: int, at_mlp: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch slot_head pos d_model"]:
    """Gradient at the residual stream for every slot of every head of a layer.

    Uses each head's weights if they reproduce the model's backward pass in the first batch;
    otherwise differentiates the model's code head by head, at the cost of one backward pass through
    the layer's matrices for each.

    Args:
        batch: batch to score.
        slopes: gradients of the run.
        layer: the model's layer number.
        at_mlp: gradient at the stream that enters the MLP.
    """
    known, group = batch.study.by_weights, batch.study.model.shape.group_size
    slots = _slots(slopes, layer, group)
    reads = _reads(batch, slopes, layer, slots)
    inputs: dict[str, Tensor] = {}
    together = None
    if reads:
        norm, stream = batch.study.model.parts.input_norm(layer), _later(batch, slopes, layer)
        together = HeadReads.together(list(reads.values())).at_stream(norm, stream, slopes.frozen)
        inputs |= zip(reads, together.split(batch.study.wiring.n_heads, 1), strict=True)
    for slot in slots:
        if slot.site not in reads:
            inputs[slot.site] = _through_code(slopes, slot, group)[:, :, batch.first :]
    if any((site, layer) not in known for site in reads):
        agree = _agree(batch, slopes, layer, at_mlp, list(inputs.values()))
        known.update({(site, layer): agree for site in reads})
        if not agree:
            return _head_inputs(batch, slopes, layer, at_mlp)
    if together is not None and len(reads) == len(slots):
        return together
    return torch.cat([inputs[site] for site in ENTRIES], 1)


def _reads(
    batch: EdgeBatch, slopes: _Slopes, layer: int, slots: Sequence[SlotGradient]
) -> dict[str, HeadReads]:
    """How heads read through their own weights, for slots where these are valid."""
    place = (batch.texts.real.long().cumsum(1) - 1).clamp_min(0)[:, batch.first :]
    stream = _later(batch, slopes, layer)
    found: dict[str, HeadReads] = {}
    for slot in slots:
        later = SlotGradient(slot.site, layer, slot.slope[:, :, batch.first :])
        read = later.through_weights(batch.study.model, stream, place, slopes.frozen)
        if read is not None and batch.study.by_weights.get((slot.site, layer), True):
            found[slot.site] = read
    return found


def _later(batch: EdgeBatch, slopes: _Slopes, layer: int) -> Float[Tensor, "batch pos d_model"]:
    """Input of a layer, from the first corrupted position on."""
    return slopes.run.taps[Tap("resid_pre", layer)][:, batch.first :]


def _agree(
    batch: EdgeBatch,
    slopes: _Slopes,
    layer: int,
    at_mlp: Float[Tensor, "batch pos d_model"],
    each: Sequence[Float[Tensor, "batch head pos d_model"]],
) -> bool:
    """Whether gradients through weights match attention's gradient in the model's backward pass.

    The latter is the gradient at the layer's input minus the part that bypasses attention.
    """
    before = slopes.at[Tap("resid_pre", layer)].float()
    past = "mlp_out" if batch.study.wiring.parallel[layer] else "attn_out"
    expected = (before - slopes.at[Tap(past, layer)].float())[:, batch.first :]
    if batch.study.wiring.parallel[layer]:
        expected = expected - at_mlp
    total = sum(one.sum(1) for one in each)
    assert isinstance(total, Tensor)  # noqa: S101  # there are three slots
    rounded = rounding(batch.study.model.dtype, before.shape[-1])
    lost = float(before.abs().max() / expected.abs().max().clamp_min(_LEAST))
    return gap(total, expected, max(_AGREEMENT, rounded * max(1.0, lost))).closed


def _slots(slopes: _Slopes, layer: int, group: int) -> list[SlotGradient]:
    """Gradients at a layer's queries, keys and values, per query head.

    If heads share keys and values, differentiate attention for one query head of each group at a
    time, so gradients at shared vectors are separated by reading head.
    """
    if group == 1:
        return [SlotGradient(site, layer, slopes.at[Tap(site, layer)]) for site in ENTRIES]
    z, slope = slopes.run.taps[Tap("z", layer)], slopes.at[Tap("z", layer)]
    entries = [slopes.run.taps[Tap(site, layer)] for site in ENTRIES]
    at: list[list[Tensor]] = [[], [], []]
    for member in range(group):
        mine = torch.zeros_like(slope)
        mine[:, :, member::group] = slope[:, :, member::group]
        passed = torch.autograd.grad(z, entries, mine, retain_graph=True)
        for entry, one in enumerate(passed):
            at[entry].append(one[:, member::group] if entry == 0 else one)
    return [
        SlotGradient(site, layer, torch.stack(of, 2).flatten(1, 2))
        for site, of in zip(ENTRIES, at, strict=True)
    ]


def _through_code(
    slopes: _Slopes, slot: SlotGradient, group: int
) -> Float[Tensor, "batch head pos d_model"]:
    """Gradients at the residual stream, by differentiating the model's code."""
    stream = slopes.run.taps[Tap("resid_pre", slot.layer)]
    made = slopes.run.taps[Tap(slot.site, slot.layer)]
    group = 1 if slot.site == "query" else group
    found: list[Tensor] = []
    for head in range(slot.slope.shape[1]):
        one = torch.zeros_like(made)
        one[:, head // group] = slot.slope[:, head]
        found += torch.autograd.grad(made, stream, one, retain_graph=True)
    return torch.stack(found, 1)


def _mlp_input(slopes: _Slopes, layer: int, wiring: Wiring) -> Float[Tensor, "batch pos d_model"]:
    """Gradient at the residual stream that enters an MLP.

    The stream after attention feeds both the MLP and the residual connection, so this is the
    gradient at attention's output minus that at the MLP's output. In half precision the difference
    would be lost to rounding, and in parallel blocks it would include attention; there the MLP
    alone is differentiated.
    """
    mlp = slopes.at[Tap("mlp_out", layer)]
    if not wiring.parallel[layer] and mlp.dtype in (torch.float32, torch.float64):
        return slopes.at[Tap("attn_out", layer)] - mlp
    site = "resid_pre" if wiring.parallel[layer] else "attn_out"
    made, entry = slopes.run.taps[Tap("mlp_out", layer)], slopes.run.taps[Tap(site, layer)]
    (found,) = torch.autograd.grad(made, entry, mlp, retain_graph=True)
    return found


@torch.no_grad()
def exact_scores(
    batch: EdgeBatch, advance: Advance, asked: Bool[np.ndarray, " edge"] | None = None
) -> Float[Tensor, "batch edge"]:
    """Measure the change in the metric when one edge carries its corrupted source.

    Args:
        batch: batch to score.
        advance: progress callback, called with the number of finished edges.
        asked: mask of the edges to measure; others are NaN. None: all.
    """
    wiring = batch.study.wiring
    rows = torch.from_numpy(wiring.present if asked is None else wiring.kept(asked))
    parts: list[Tensor] = []
    for layer in range(wiring.n_layers):
        parts += _into_heads(batch, layer, rows[wiring.inputs_of(layer)], advance)
        parts.append(_into_mlp(batch, layer, rows[wiring.inputs_of(layer).stop], advance))
    if rows[-1].any():
        parts.append(output_edges(batch, advance).masked_fill(~rows[-1, :, None], _UNASKED))
    else:
        parts.append(torch.full((len(wiring.sources), len(batch.texts.tokens)), _UNASKED))
    found = torch.cat([part.cpu() for part in parts])
    return (found - batch.clean_value().cpu()).mT.double()


def _into_heads(
    batch: EdgeBatch, layer: int, asked: Bool[Tensor, "slot_head every"], advance: Advance
) -> Iterator[Float[Tensor, "source batch"]]:
    """Metric of runs with one edge into a head removed, per slot and head."""
    wiring, size = batch.study.wiring, len(batch.texts.tokens)
    asked = asked[:, : wiring.before(layer)].view(len(ENTRIES), wiring.n_heads, -1)
    sources = asked.any(0).any(0).nonzero().squeeze(1)
    taps = tuple(Tap(site, layer) for site in ENTRIES)
    z_tap = Tap("z", layer)
    clean = {tap: batch.clean.taps[tap] for tap in (*taps, z_tap)}
    stream = batch.clean.taps[Tap("resid_pre", layer)]
    change = batch.change[:, sources].transpose(0, 1)
    moved: dict[Tap, Tensor] = {}
    if len(sources):
        moved = values_with(batch, {Tap("resid_pre", layer): stream + change}, taps)
    for entry, of_slot in zip(taps, asked, strict=True):
        if of_slot.any():
            # A head's output depends only on its own inputs, so all heads are patched in one run.
            given = {
                tap: moved[tap] if tap == entry else clean[tap].expand_as(moved[tap])
                for tap in taps
            }
            z = values_with(batch, given, (z_tap,))[z_tap]
        for head, wanted in enumerate(of_slot):
            found = torch.full((wiring.before(layer), size), _UNASKED, device=stream.device)
            if wanted.any():
                own = wanted[sources]
                patched = clean[z_tap].repeat(int(own.sum()), 1, 1, 1, 1)
                patched[..., head, :] = z[own, ..., head, :]
                found[wanted] = _measured(batch, z_tap, patched, advance)
            yield found


def _into_mlp(
    batch: EdgeBatch, layer: int, asked: Bool[Tensor, " every"], advance: Advance
) -> Float[Tensor, "source batch"]:
    wiring, out = batch.study.wiring, Tap("mlp_out", layer)
    wanted = asked[: wiring.before_mlp(layer)]
    entry = Tap("resid_pre" if wiring.parallel[layer] else "attn_out", layer)
    stream = batch.clean.taps[entry]
    found = torch.full((len(wanted), len(stream)), _UNASKED, device=stream.device)
    if wanted.any():
        change = batch.change[:, : len(wanted)][:, wanted].transpose(0, 1)
        moved = values_with(batch, {entry: stream + change}, (out,))[out]
        found[wanted] = _measured(batch, out, moved, advance)
    return found


@torch.no_grad()
def output_edges(batch: EdgeBatch, advance: Advance) -> Float[Tensor, "source batch"]:
    """Metric of runs with one edge into the output removed.

    Computed with the final norm and the unembedding if these reproduce the clean run's logits;
    otherwise every block runs again.

    Args:
        batch: batch to score.
        advance: progress callback, called with the number of finished edges.
    """
    last = Tap("resid_post", batch.study.wiring.n_layers - 1)
    stream, change = batch.clean.taps[last], batch.change.transpose(0, 1)
    model, logits, at = batch.study.model, batch.clean.logits, batch.measured.at
    if "unembedding" in model.limits:
        return _measured(batch, last, stream + change, advance)
    unembedding = model.unembedding
    assert logits is not None  # noqa: S101  # they were asked for
    rows = stream.float()[:, at]
    allowed = rounding(model.dtype, rows.shape[-1])
    if not gap(unembedding.logits(rows), logits, allowed).closed:
        return _measured(batch, last, stream + change, advance)
    found = []
    for part in change.split(batch.room):
        found.append(batch.measured(unembedding.logits((rows + part[:, :, at]).flatten(0, 1))))
        advance(float(len(part)))
    return torch.cat(found)


def _measured(
    batch: EdgeBatch, tap: Tap, values: Tensor, advance: Advance
) -> Float[Tensor, "run batch"]:
    found = measured_with(batch, {tap: values})
    advance(float(len(values)))
    return found


EdgeMethod = Literal["eap", "eap_ig", "eap_ig_activations", "relp", "gim", "exact"]
STEPPED = ("eap_ig", "eap_ig_activations")
_RESUMED_BATCH = 8
_UNASKED = float("nan")


@checked
@own_types()
def attribute(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    method: str = "eap",
    steps: int = 5,
    *,
    ablation: str | None = None,
    edges: Iterable[Sequence[str]] | None = None,
    batch_size: int | None = None,
    memory: str | int | None = None,
    resume: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> EdgeGraph:
    """Score every edge by the change in the metric when the edge carries its corrupted source.

    Nodes are the embedding (including added positions), every head with its query, key and value
    slots, every MLP, and the output. An edge carries its source's write to the residual stream into
    one slot of its target, at all positions. Ablating an edge leaves all other edges unchanged and
    recomputes everything after the target. Query heads that share a key/value head each have their
    own key and value slots. GPT-2 small has 32,491 edges.

    ``exact`` ablates one edge at a time, which costs a pass per edge and example. ``eap`` estimates
    all edges from the gradient of the clean run: the change in the source's write times the
    gradient of the metric with respect to the slot's input, through norms. Scores of the edges that
    leave a node sum exactly to the node's attribution, and those that enter a slot to the
    attribution of its input. ``eap_ig`` averages the gradients of ``steps`` runs whose embedding is
    interpolated from corrupt to clean (a left Riemann sum, which includes the corrupt run but not
    the clean one); it captures effects that a saturated softmax hides from a single gradient.
    ``eap_ig_activations`` instead interpolates the writes of one layer's heads, or of one MLP, and
    scores the edges that leave them, with ``(2 layers + 1) steps`` gradients.

    Two methods take one gradient with other backward rules. ``relp`` propagates relevance: norms
    divide by a constant, activations are their input times a constant, and gates split the gradient
    with the gated value. ``gim`` freezes norms, takes the gradient of softmax at twice its
    temperature, and passes on a quarter of the gradient to queries and keys and half to values; its
    scores rank the edges of a slot and are not changes in the metric.

    An edge can matter and have score 0: ``patch`` cannot see information that is equal in both
    texts of a pair, such as positions; ``mean`` and ``zero`` can.

    Args:
        model: model whose heads each write to the residual stream through a matrix; families with a
            norm after attention are refused.
        probe: texts with answers, and the pair ``corrupt`` for ``patch``.
        metric: metric from :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: ``eap``, ``eap_ig``, ``eap_ig_activations``, ``relp``, ``gim`` or ``exact``.
        steps: number of gradients in integrated methods; ignored by other methods.
        ablation: what an ablated edge carries: ``patch`` (also called ``corrupt``,
            ``counterfactual`` or ``resample``), its source's write on the paired text at the same
            position; ``mean``, the source's mean write over the probe's real positions; or
            ``zero``. Default: ``patch`` if the probe has a pair, else ``mean``.
        edges: for ``exact``, the edges to measure, as (source, target, slot); all others are NaN.
            If a pass for every edge is too expensive, measure the strongest ones or a random
            sample.
        batch_size: examples per pass; affects only time and memory.
        memory: memory budget for the writes of all nodes in a batch, e.g. ``"2GB"``, which limits
            the batch size. Default: only ``batch_size`` limits it.
        resume: folder for finished batches, written atomically; a call with the same arguments
            resumes from it. For ``exact``, which takes long, batches then have 8 examples unless
            ``batch_size`` is given.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.

    Returns:
        Scores in the metric's unit, per edge and example.

    Raises:
        InputError: if probe, metric and method do not fit each other.
        UnsupportedModelError: if the model's heads do not each write through a matrix.

    Source:
        Syed et al. 2023, arXiv 2310.10348 (edge attribution patching); Hanna et al. 2024,
        arXiv 2403.17806 (integrated gradients); Conmy et al. 2023, arXiv 2304.14997; Jafari et al.
        2025, arXiv 2508.21258 (RelP); Edin et al. 2025, arXiv 2505.17630 (GIM).

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> graph = attribute(model, names, hs.metrics.logit_difference)
        >>> graph.head_scores.shape == (model.shape.n_layers, model.shape.n_heads)
        True
        >>> sorted(graph.scores)[0]
        Edge(source='L0H0', target='L1H0', slot='key')
    """
    check_method(method, steps, as_metric(metric))
    if resume is not None and batch_size is None and method == "exact":
        batch_size = min(len(probe), _RESUMED_BATCH)
    options = RunOptions(batch_size, memory, progress=progress)
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    asked = _asked(study.wiring, method, edges)
    store = None if resume is None else _Store.of(Path(resume), study, method, steps, asked)
    work = _work(study, method, steps) if asked is None else int(asked.sum()) * len(probe)
    with options.track(float(work), f"edges by {method}") as advance:
        parts = []
        for number, start in enumerate(range(0, len(probe), study.size)):
            if store is not None and (kept := store.read(number)) is not None:
                parts.append(kept)
                continue
            batch = study.batch(start, grad=method == "eap")
            count = len(batch.texts.tokens)

            def done(steps: int | float = 1, count: int = count) -> None:
                advance(steps * count)

            parts.append(_scores(batch, method, steps, done, asked))
            if store is not None:
                store.write(number, parts[-1])
    return EdgeGraph(
        study.wiring,
        method,
        study.ablation,
        np.concatenate(parts, 1),
        model.shape.n_kv_heads,
        steps if method in STEPPED else 0,
        study.metric.unit,
        origin(
            model,
            probe,
            attention="whole passes",
            metric=study.metric.name,
            method=method,
            ablation=study.ablation,
            steps=steps if method in STEPPED else 0,
        ),
        probe.cluster_labels,
    )


@dataclass(frozen=True)
class _Store:
    """Finished batches of one computation on disk.

    Attributes:
        folder: folder of the files.
        name: digest of everything that the scores depend on.
    """

    folder: Path
    name: str

    @classmethod
    def of(
        cls,
        folder: Path,
        study: EdgeMeasurement,
        method: str,
        steps: int,
        asked: Bool[np.ndarray, " edge"] | None,
    ) -> "_Store":
        said: dict[str, Any] = {
            "model": study.model.digest(),
            "probe": probe_digest(study.probe),
            "metric": (study.metric.name, getattr(study.metric, "mark", None)),
            "method": (method, steps if method in STEPPED else 0),
            "ablation": study.ablation,
            "size": study.size,
        }
        if asked is not None:
            said["edges"] = hashlib.sha256(asked.tobytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        return cls(writable_folder(folder), digest)

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05}.npy"

    def read(self, number: int) -> np.ndarray | None:
        """Read the scores of one batch; None if unfinished or damaged."""
        try:
            kept: np.ndarray = np.load(self._file(number), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return kept

    def write(self, number: int, scores: np.ndarray) -> None:
        with whole_file(self._file(number)) as file:
            np.save(file, scores, allow_pickle=False)


def check_method(method: str, steps: int, metric: AnyMetric) -> None:
    """Raise InputError for an unknown method, or if the metric has no gradient for it.

    Raises:
        InputError: if the method does not fit.
    """
    if method not in get_args(EdgeMethod):
        raise InputError(nearest(str(method), get_args(EdgeMethod), kind="method"))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: give 1 or more.")
    if method in ("eap", "relp", "gim") and "clean" in metric.needs:
        raise InputError(
            f"{metric.name} is smallest at the clean run, so its gradient there is 0: use "
            "method='eap_ig' or 'exact', or another metric."
        )


def _asked(
    wiring: Wiring, method: str, edges: Iterable[Sequence[str]] | None
) -> Bool[np.ndarray, " edge"] | None:
    """Mask of the edges to measure; None: all."""
    if edges is None:
        return None
    if method != "exact":
        raise InputError(
            f"{method!r} scores all edges at once: leave out edges=, or use method='exact'."
        )
    asked = np.zeros(len(wiring), bool)
    asked[[wiring.find(edge) for edge in edges]] = True
    if not asked.any():
        raise InputError("edges is empty: name at least one edge, or leave it out for all.")
    return asked


def _work(study: EdgeMeasurement, method: str, steps: int) -> int:
    return passes_of(study.wiring, method, steps) * len(study.probe)


def passes_of(wiring: Wiring, method: str, steps: int) -> int:
    """Number of gradients (passes, for ``exact``) per example."""
    if method == "exact":
        return len(wiring)
    groups = 2 * wiring.n_layers + 1 if method == "eap_ig_activations" else 1
    return groups * (steps if method in STEPPED else 1)


def _scores(
    batch: EdgeBatch,
    method: str,
    steps: int,
    done: Advance,
    asked: Bool[np.ndarray, " edge"] | None = None,
) -> np.ndarray:
    """Scores ``[edge example]`` of one batch."""
    if method == "exact":
        found = exact_scores(batch, done, asked)
    else:
        found = gradient_scores(batch, method, steps)
        done(float(passes_of(batch.study.wiring, method, steps)))
    unread = ~batch.measured.counted.to(found.device)
    values: np.ndarray = found.masked_fill(unread[:, None], float("nan")).mT.numpy()
    return values
