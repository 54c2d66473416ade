"""``hs.edges.attribute``: what every edge of a model contributes to a metric.

By edge attribution patching, with one gradient or several or by other rules, or exactly: one edge
taken out at a time, and everything that follows run again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.files import whole_file, writable_folder
from headscope.base.options import RunOptions
from headscope.edges.rules import GIM_SHARES, InteractionRules, RelevanceRules, Rules, shared
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
from headscope.models.proof import gap
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Site, Tap
from headscope.origin import origin
from headscope.probes.probe import Probe, probe_digest
from headscope.table.edges import EdgeGraph, Wiring
from headscope.views import Norm, Rotation

_MATRIX = {"query": "W_Q", "key": "W_K", "value": "W_V"}


@dataclass(frozen=True, eq=False)
class Slot:
    """Gradient of a metric at the queries, keys or values of a layer, told apart by query head.

    Attributes:
        site: ``query``, ``key`` or ``value``.
        layer: the model's layer number.
        slope: of every query head, as attention uses it: behind norms, rotation and multiplier.
    """

    site: Site
    layer: int
    slope: Float[Tensor, "batch head pos d_head"]

    def through_weights(
        self,
        model: HeadModel,
        stream: Float[Tensor, "batch pos d_model"],
        real: Bool[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch head pos d_model"] | None:
        """Gradient at the residual stream that enters each head's slot, in fp32.

        Args:
            model: whose weights are taken.
            stream: what enters the layer.
            real: False at padding, which takes no position.

        Returns:
            None where the weights do not say it: no weights per head, or norms on queries and keys.
        """
        try:
            weights, norm = model.weights(self.layer), model.parts.input_norm(self.layer)
            slope = self._before_rotation(model, real)
        except UnsupportedModelError:
            return None
        if slope is None:
            return None
        matrix = getattr(weights, _MATRIX[self.site]).float()
        matrix = matrix.repeat_interleave(slope.shape[1] // len(matrix), 0)
        read = torch.einsum("bhpe,hde->bhpd", slope, matrix.to(slope.device))
        return behind_norm(norm, stream.detach(), read)

    def _before_rotation(
        self, model: HeadModel, real: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch head pos d_head"] | None:
        """Slope at what the matrix gives; None where a norm follows it."""
        slope = self.slope.float()
        if self.site == "value":
            return slope
        between = model.parts.query_key(self.layer)
        if (between.query_norm, between.key_norm) != (None, None):
            return None
        scale = between.query_scale if self.site == "query" else between.key_scale
        place = (real.long().cumsum(1) - 1).clamp_min(0).to(slope.device)
        return scale * unturned(between.rotation, slope, place[:, None])


def unturned(
    rotation: Rotation, slope: Float[Tensor, "*any pos d_head"], place: Tensor
) -> Float[Tensor, "*any pos d_head"]:
    """Slope at a vector, of the slope at what rotation makes of it at a position.

    Args:
        rotation: of a layer.
        slope: at rotated vectors.
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


def behind_norm(
    norm: Norm,
    x: Float[Tensor, "batch pos d_model"],
    slope: Float[Tensor, "batch head pos d_model"],
) -> Float[Tensor, "batch head pos d_model"]:
    """Slope at the input of a norm, of the slope at its output.

    Args:
        norm: any.
        x: its input.
        slope: at its output, of every head.

    Example:
        >>> norm = Norm(torch.ones(2), torch.zeros(2), centred=False, epsilon=0.0)
        >>> x = torch.tensor([[[3.0, 4.0]]])  # along its input, a norm that divides has no slope
        >>> float(behind_norm(norm, x, x[:, None]).abs().max()) < 1e-6
        True
    """
    x = x.float()[:, None]
    found = slope * norm.gain.float().to(slope.device)
    if norm.divides:
        scale = norm.scale(x)[..., None]
        content = x - x.mean(-1, keepdim=True) if norm.centred else x
        along = (found * content).mean(-1, keepdim=True) / scale.square()
        found = (found - along * content) / scale
    return found - found.mean(-1, keepdim=True) if norm.centred else found


# How closely a head's weights must agree with the model's own backward pass to stand for it.
_AGREEMENT = 1e-4


def gradient_scores(batch: EdgeBatch, method: str, steps: int) -> Float[Tensor, "batch edge"]:
    """First-order effect of every edge on every example.

    The change of what the source writes, times the gradient of the metric by what enters the
    target's slot, summed over positions.

    Args:
        batch: the batch.
        method: any but ``exact``.
        steps: gradients that integrated methods take the mean of.
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
    """Of which run, and by which rules, gradients are taken.

    Attributes:
        embed: what enters the first block instead of the embedding.
        shift: what is added to what attention or an MLP adds to the stream.
        rules: what stands in for gradients; None: nothing.
        shares: of the gradient that queries, keys and values pass on.
    """

    embed: Float[Tensor, "batch pos d_model"] | None = None
    shift: Mapping[Tap, Tensor] = field(default_factory=dict)
    rules: Rules | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    def changes(self, n_layers: int) -> dict[Tap, Callable[[Tensor], Tensor]]:
        """Functions of taps that the pass goes on with."""
        found: dict[Tap, Callable[[Tensor], Tensor]] = {
            tap: _added(value) for tap, value in self.shift.items()
        }
        for site, share in self.shares.items():
            found |= {Tap(site, layer): shared(share) for layer in range(n_layers)}
        return found


def _added(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda there: there + value.to(there)


def _over_inputs(batch: EdgeBatch, steps: int) -> Float[Tensor, "batch edge"]:
    """Mean over runs whose embedding goes from the corrupt towards the clean one."""
    clean = batch.clean.sources[:, 0]
    total = torch.zeros(len(batch.texts.tokens), len(batch.study.wiring), dtype=torch.float64)
    for step in range(steps):
        embed = clean + (1 - step / steps) * batch.change[:, 0]
        total += _batch_scores(batch, Backwards(embed=embed)) / steps
    return total


def _over_activations(batch: EdgeBatch, steps: int) -> Float[Tensor, "batch edge"]:
    """Mean over runs in which what one layer's heads, or one MLP, write goes from corrupt to clean.

    The edges that leave the embedding, the heads of a layer, or an MLP are scored by the runs in
    which these alone are moved.
    """
    wiring = batch.study.wiring
    total = torch.zeros(len(batch.texts.tokens), len(wiring), dtype=torch.float64)
    for tap, sources in _groups(wiring):
        mine = torch.from_numpy(np.isin(wiring.ends[1], sources))
        change = batch.change[:, sources].sum(1)
        for step in range(steps):
            moved = (1 - step / steps) * change
            of = (
                Backwards(embed=batch.clean.sources[:, 0] + moved)
                if tap.site == "embed"
                else Backwards(shift={tap: moved})
            )
            total[:, mine] += _batch_scores(batch, of)[:, mine] / steps
    return total


def _groups(wiring: Wiring) -> Iterator[tuple[Tap, np.ndarray]]:
    """Sources that are moved together, and where."""
    every = np.arange(len(wiring.sources))
    yield Tap("embed"), every[:1]
    for layer in range(wiring.n_layers):
        heads = wiring.heads_of(layer)
        yield Tap("attn_out", layer), every[heads]
        yield Tap("mlp_out", layer), every[heads.stop : heads.stop + 1]


def _batch_scores(batch: EdgeBatch, of: Backwards) -> Float[Tensor, "batch edge"]:
    """Scores by the gradient of one run."""
    with torch.enable_grad():
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
                f"{batch.measured.metric.name} has no gradient, so no edge can be estimated by "
                "one: take another metric, or method='exact'."
            )
        plain = of.rules is None and not of.shares
        return _contracted(batch, run, values.sum(), plain)


def _contracted(
    batch: EdgeBatch, run: WrittenRun, total: Tensor, plain: bool
) -> Float[Tensor, "batch edge"]:
    """Gradients at every input, multiplied with changes as they come."""
    wiring = batch.study.wiring
    outputs = [
        run.taps[Tap(site, layer)]
        for layer in range(wiring.n_layers)
        for site in ("z", "mlp_out", "resid_post")
    ]
    found = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    parts = []
    for layer in range(wiring.n_layers):
        z, mlp = found[3 * layer : 3 * layer + 2]
        inputs = _head_inputs(batch, run, layer, z, plain)
        parts.append(_times(batch.change[:, : wiring.before(layer)], inputs))
        at_mlp = _mlp_input(run, layer, mlp, wiring)
        parts.append(_times(batch.change[:, : wiring.before_mlp(layer)], at_mlp[:, None]))
    last = found[-1]
    assert last is not None  # noqa: S101  # the logits come from it
    parts.append(_times(batch.change, last[:, None]))
    return torch.cat([part.flatten(1) for part in parts], 1)


def _times(
    change: Float[Tensor, "batch source pos d_model"],
    gradient: Float[Tensor, "batch target pos d_model"],
) -> Float[Tensor, "batch target source"]:
    """Inner products over positions and dimensions; sums in fp64, on the CPU."""
    return (gradient.float().flatten(2) @ change.flatten(2).mT).cpu().double()


def _head_inputs(
    batch: EdgeBatch, run: WrittenRun, layer: int, z_slope: Tensor | None, plain: bool
) -> Float[Tensor, "batch slot_head pos d_model"]:
    """Gradient at the residual stream that enters every slot of every head of a layer.

    First back through attention, for one query head of every group at a time, so that the slope
    at a shared key or value is told apart by who read it; then through whatever makes queries,
    keys and values of the residual stream.

    Args:
        batch: the batch.
        run: the run that gradients are of.
        layer: the model's layer number.
        z_slope: gradient at head outputs; None: 0.
        plain: whether gradients are gradients, and not what other rules put in their place.
    """
    group = batch.study.model.shape.group_size
    z = run.taps[Tap("z", layer)]
    slope = torch.zeros_like(z) if z_slope is None else z_slope
    entries = [run.taps[Tap(site, layer)] for site in ENTRIES]
    at: list[list[Tensor]] = [[], [], []]
    for member in range(group):
        mine = torch.zeros_like(slope)
        mine[:, :, member::group] = slope[:, :, member::group]
        slopes = torch.autograd.grad(z, entries, mine, retain_graph=True)
        for entry, one in enumerate(slopes):
            at[entry].append(one[:, member::group] if entry == 0 else one)
    slots = [
        Slot(site, layer, torch.stack(of, 2).flatten(1, 2))
        for site, of in zip(ENTRIES, at, strict=True)
    ]
    return torch.cat([_at_stream(batch, run, slot, plain) for slot in slots], 1)


def _at_stream(
    batch: EdgeBatch, run: WrittenRun, slot: Slot, plain: bool
) -> Float[Tensor, "batch head pos d_model"]:
    """Slopes at the residual stream by every head's queries, keys or values.

    By each head's own weights where these are shown to be what the model's code does, on the head
    with the largest slope of the first batch; else head by head through that code, which costs a
    whole backward pass of the layer's matrices for each.
    """
    model, known = batch.study.model, batch.study.by_weights
    stream, made = run.taps[Tap("resid_pre", slot.layer)], run.taps[Tap(slot.site, slot.layer)]
    group = 1 if slot.site == "query" else model.shape.group_size
    place = (slot.site, slot.layer)
    found = slot.through_weights(model, stream, batch.texts.real) if plain else None
    if found is not None and place not in known:
        largest = int(slot.slope.square().sum((0, 2, 3)).argmax())
        own = _pulled_back(stream, made, slot.slope[:, largest], largest // group)
        known[place] = gap(found[:, largest], own.float(), _AGREEMENT).closed
    if found is not None and known[place]:
        return found
    heads = range(slot.slope.shape[1])
    each = [_pulled_back(stream, made, slot.slope[:, head], head // group) for head in heads]
    return torch.stack(each, 1)


def _pulled_back(
    stream: Float[Tensor, "batch pos d_model"],
    made: Float[Tensor, "batch head pos d_head"],
    slope: Float[Tensor, "batch pos d_head"],
    head: int,
) -> Float[Tensor, "batch pos d_model"]:
    """Slope at the residual stream by one head's queries, keys or values."""
    one = torch.zeros_like(made)
    one[:, head] = slope
    (found,) = torch.autograd.grad(made, stream, one, retain_graph=True)
    return found


def _mlp_input(
    run: WrittenRun, layer: int, slope: Tensor | None, wiring: Wiring
) -> Float[Tensor, "batch pos d_model"]:
    """Gradient at the residual stream that enters an MLP.

    After attention the stream is its input plus what attention wrote, so a slope at what attention
    wrote, with the MLP's output as the only way on, is the slope at the stream.
    """
    site = "resid_pre" if wiring.parallel[layer] else "attn_out"
    mlp, entry = run.taps[Tap("mlp_out", layer)], run.taps[Tap(site, layer)]
    if slope is None:
        return torch.zeros_like(run.taps[Tap("resid_pre", layer)])
    (found,) = torch.autograd.grad(mlp, entry, slope, retain_graph=True)
    return found


Advance = Callable[[float], None]


@torch.no_grad()
def exact_scores(batch: EdgeBatch, advance: Advance) -> Float[Tensor, "batch edge"]:
    """Change of the metric when one edge carries what its source writes once corrupted.

    Args:
        batch: the batch.
        advance: is told how many edges are done.
    """
    clean = batch.clean_value()
    parts: list[Tensor] = []
    for layer in range(batch.study.wiring.n_layers):
        parts += _into_heads(batch, layer, advance)
        parts.append(_into_mlp(batch, layer, advance))
    parts.append(_into_output(batch, advance))
    return (torch.cat(parts) - clean).mT.cpu().double()


def _into_heads(batch: EdgeBatch, layer: int, advance: Advance) -> Iterator[Tensor]:
    """Metric of runs with one edge into a head taken out, ``[source batch]`` per slot and head."""
    wiring = batch.study.wiring
    taps = tuple(Tap(site, layer) for site in ENTRIES)
    z_tap = Tap("z", layer)
    clean = {tap: batch.clean.taps[tap] for tap in (*taps, z_tap)}
    stream = batch.clean.taps[Tap("resid_pre", layer)]
    change = batch.change[:, : wiring.before(layer)].transpose(0, 1)
    moved = values_with(batch, {Tap("resid_pre", layer): stream + change}, taps)
    for entry in taps:
        # A head's output depends on its own inputs alone: all heads are patched in one run.
        given = {
            tap: moved[tap] if tap == entry else clean[tap].expand_as(moved[tap]) for tap in taps
        }
        z = values_with(batch, given, (z_tap,))[z_tap]
        for head in range(wiring.n_heads):
            patched = clean[z_tap].repeat(len(z), 1, 1, 1, 1)
            patched[..., head, :] = z[..., head, :]
            yield _measured(batch, z_tap, patched, advance)


def _into_mlp(batch: EdgeBatch, layer: int, advance: Advance) -> Float[Tensor, "source batch"]:
    wiring, out = batch.study.wiring, Tap("mlp_out", layer)
    entry = Tap("resid_pre" if wiring.parallel[layer] else "attn_out", layer)
    change = batch.change[:, : wiring.before_mlp(layer)].transpose(0, 1)
    moved = values_with(batch, {entry: batch.clean.taps[entry] + change}, (out,))[out]
    return _measured(batch, out, moved, advance)


def _into_output(batch: EdgeBatch, advance: Advance) -> Float[Tensor, "source batch"]:
    last = Tap("resid_post", batch.study.wiring.n_layers - 1)
    patched = batch.clean.taps[last] + batch.change.transpose(0, 1)
    return _measured(batch, last, patched, advance)


def _measured(
    batch: EdgeBatch, tap: Tap, values: Tensor, advance: Advance
) -> Float[Tensor, "run batch"]:
    found = measured_with(batch, {tap: values})
    advance(float(len(values)))
    return found


Method = Literal["eap", "eap_ig", "eap_ig_activations", "relp", "gim", "exact"]
STEPPED = ("eap_ig", "eap_ig_activations")
_RESUMED_BATCH = 8


@own_types()
def attribute(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric | Callable[..., Tensor],
    method: str = "eap",
    steps: int = 5,
    *,
    ablation: str | None = None,
    batch_size: int | None = None,
    resume: "str | PathLike[str] | None" = None,
    progress: bool | None = None,
) -> EdgeGraph:
    """Score every edge: how much the metric changes when it carries what a corrupted source writes.

    Nodes are the embedding (positions included, where they are added to it), every head with its
    query, key and value slots, every MLP, and the output. An edge carries what its source writes
    to the residual stream into one slot of its target, at all positions. Taking it out leaves what
    all other edges carry as it is; what follows the target is computed anew. Query heads that
    share a key/value head have a key and a value slot each. GPT-2 small has 32,491 edges.

    ``exact`` takes out one edge at a time, which costs a pass per edge and example. ``eap``
    estimates all of them by the gradient of the clean run: the change of what the source writes
    times the gradient of the metric by the input of the slot, norms included. The scores of the
    edges that leave a node sum to its own attribution, those of the edges that enter a slot to
    that of its input, exactly. ``eap_ig`` takes the mean gradient of ``steps`` runs whose embedding
    goes from the corrupt to the clean one (a left Riemann sum, which includes the corrupt run and
    not the clean one); it sees what a saturated softmax hides from a single gradient.
    ``eap_ig_activations`` moves what one layer's heads, or one MLP, write instead, and scores the
    edges that leave them: ``(2 layers + 1) steps`` gradients.

    Two take one gradient by other rules. ``relp`` propagates relevance: norms divide by a constant,
    an activation is its input times a constant, a gate shares with what it gates. ``gim`` freezes
    norms, takes the gradient of softmax at twice its temperature, and passes on a quarter of what
    comes to queries and keys and half of what comes to values: its scores rank edges of a slot
    and are not changes of the metric.

    An edge can be true and have score 0: what is equal in both texts of a pair, such as positions,
    is not seen by ``patch``; ``mean`` and ``zero`` see it.

    Args:
        model: the model; its heads must write to the residual stream by a matrix of their own, so
            families with a norm after attention are refused.
        probe: texts with answers, and the pair ``corrupt`` for ``patch``.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: ``eap``, ``eap_ig``, ``eap_ig_activations``, ``relp``, ``gim`` or ``exact``.
        steps: gradients of integrated methods; others take none.
        ablation: what an edge that is taken out carries: ``patch`` (also called ``corrupt``,
            ``counterfactual`` or ``resample``), what its source writes on the paired text at the
            same position; ``mean``, what it writes on average over the probe's real positions;
            ``zero``. Default: ``patch`` where the probe has a pair, else ``mean``.
        batch_size: examples per pass; changes no number.
        resume: folder that finished batches are kept in, each whole or absent; a call with the
            same arguments takes them from there and goes on. For ``exact``, which takes long, a
            batch then has 8 examples unless ``batch_size`` says otherwise.
        progress: show a bar.

    Returns:
        Scores in the metric's unit, per edge and example.

    Raises:
        InputError: if probe, metric and method do not fit each other.
        UnsupportedModelError: if heads of the model do not write by a matrix of their own.

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
    _check_method(method, steps, as_metric(metric))
    if resume is not None and batch_size is None and method == "exact":
        batch_size = min(len(probe), _RESUMED_BATCH)
    options = RunOptions(batch_size, progress=progress)
    study = EdgeMeasurement.of(model, probe, metric, ablation, options)
    store = None if resume is None else _Store.of(Path(resume), study, method, steps)
    with options.track(float(_work(study, method, steps)), f"edges by {method}") as advance:
        parts = []
        for number, start in enumerate(range(0, len(probe), study.size)):
            if store is not None and (kept := store.read(number)) is not None:
                parts.append(kept)
                continue
            batch = study.batch(start)
            count = len(batch.texts.tokens)

            def done(passes: float, count: int = count) -> None:
                advance(passes * count)

            parts.append(_scores(batch, method, steps, done))
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
        folder: where they are.
        name: stands for all that the scores depend on.
    """

    folder: Path
    name: str

    @classmethod
    def of(cls, folder: Path, study: EdgeMeasurement, method: str, steps: int) -> "_Store":
        said = {
            "model": study.model.digest(),
            "probe": probe_digest(study.probe),
            "metric": (study.metric.name, getattr(study.metric, "mark", None)),
            "method": (method, steps if method in STEPPED else 0),
            "ablation": study.ablation,
            "size": study.size,
        }
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        return cls(writable_folder(folder), digest)

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:05}.npy"

    def read(self, number: int) -> np.ndarray | None:
        """Scores of one batch; None where they are not finished or the file is damaged."""
        try:
            kept: np.ndarray = np.load(self._file(number), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return kept

    def write(self, number: int, scores: np.ndarray) -> None:
        with whole_file(self._file(number)) as file:
            np.save(file, scores, allow_pickle=False)


def _check_method(method: str, steps: int, metric: AnyMetric) -> None:
    if method not in get_args(Method):
        raise InputError(nearest(str(method), get_args(Method), kind="method"))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r}: integrated gradients take 1 run or more.")
    if method in ("eap", "relp", "gim") and "clean" in metric.needs:
        raise InputError(
            f"{metric.name} is smallest at the clean run, so its gradient there is 0: use "
            "method='eap_ig' or 'exact', or another metric."
        )


def _work(study: EdgeMeasurement, method: str, steps: int) -> int:
    return passes_of(study.wiring, method, steps) * len(study.probe)


def passes_of(wiring: Wiring, method: str, steps: int) -> int:
    """Gradients (or passes, for ``exact``) that a method takes per example."""
    if method == "exact":
        return len(wiring)
    groups = 2 * wiring.n_layers + 1 if method == "eap_ig_activations" else 1
    return groups * (steps if method in STEPPED else 1)


def _scores(batch: EdgeBatch, method: str, steps: int, done: Callable[[float], None]) -> np.ndarray:
    """Scores ``[edge example]`` of one batch."""
    if method == "exact":
        found = exact_scores(batch, done)
    else:
        found = gradient_scores(batch, method, steps)
        done(float(passes_of(batch.study.wiring, method, steps)))
    unread = ~batch.measured.counted.to(found.device)
    values: np.ndarray = found.masked_fill(unread[:, None], float("nan")).mT.numpy()
    return values
