"""``hs.edges.attribute``: what every edge of a model contributes to a metric.

By edge attribution patching, with one gradient or several, or exactly: one edge taken out at a
time, and everything that follows run again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.files import whole_file, writable_folder
from headscope.base.options import RunOptions
from headscope.edges.passes import measured_with, values_with
from headscope.edges.written import ENTRIES, EdgeBatch, Study, Written, run_apart
from headscope.errors import InputError, nearest
from headscope.metrics import AnyMetric, as_metric
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.origin import origin
from headscope.probes.probe import Probe, probe_digest
from headscope.table.edges import EdgeGraph, Wiring


def gradient_scores(batch: EdgeBatch, steps: int) -> Float[Tensor, "batch edge"]:
    """First-order effect of every edge on every example.

    The change of what the source writes, times the gradient of the metric by what enters the
    target's slot, summed over positions.

    Args:
        batch: the batch.
        steps: 0 takes the gradient of the clean run; more take the mean gradient of as many runs
            whose embedding goes from the corrupt towards the clean one,
            ``corrupt + k / steps (clean - corrupt)`` for k from 0.
    """
    clean = batch.clean.sources[:, 0]
    if steps == 0:
        return _batch_scores(batch, None)
    total = torch.zeros(len(batch.texts.tokens), len(batch.study.wiring), dtype=torch.float64)
    for step in range(steps):
        total += _batch_scores(batch, clean + (1 - step / steps) * batch.change[:, 0]) / steps
    return total


def _batch_scores(
    batch: EdgeBatch, embed: Float[Tensor, "batch pos d_model"] | None
) -> Float[Tensor, "batch edge"]:
    """Scores by the gradient of one run."""
    with torch.enable_grad():
        run = run_apart(
            batch.study.model, batch.texts, embed=embed, logits_at=batch.measured.at, grad=True
        )
        assert run.logits is not None  # noqa: S101  # they were asked for
        values = batch.measured(run.logits)[0][batch.measured.counted.to(run.logits.device)]
        if not values.requires_grad:
            raise InputError(
                f"{batch.measured.metric.name} has no gradient, so no edge can be estimated by "
                "one: take another metric, or method='exact'."
            )
        return _contracted(batch, run, values.sum())


def _contracted(batch: EdgeBatch, run: Written, total: Tensor) -> Float[Tensor, "batch edge"]:
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
        inputs = _head_inputs(run, layer, z, wiring, batch.study.model.shape.group_size)
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
    run: Written, layer: int, z_slope: Tensor | None, wiring: Wiring, group: int
) -> Float[Tensor, "batch slot_head pos d_model"]:
    """Gradient at the residual stream that enters every slot of every head of a layer.

    First back through attention, for one query head of every group at a time, so that the slope
    at a shared key or value is told apart by who read it; then through whatever makes queries,
    keys and values of the residual stream, head by head.
    """
    stream = run.taps[Tap("resid_pre", layer)]
    z = run.taps[Tap("z", layer)]
    slope = torch.zeros_like(z) if z_slope is None else z_slope
    entries = [run.taps[Tap(site, layer)] for site in ("query", "key", "value")]
    found: dict[tuple[int, int], Tensor] = {}
    for member in range(group):
        mine = torch.zeros_like(slope)
        mine[:, :, member::group] = slope[:, :, member::group]
        slopes = torch.autograd.grad(z, entries, mine, retain_graph=True)
        for entry, (made, at) in enumerate(zip(entries, slopes, strict=True)):
            for head in range(member, wiring.n_heads, group):
                own = head if entry == 0 else head // group
                found[entry, head] = _pulled_back(stream, made, at, own)
    order = [(entry, head) for entry in range(3) for head in range(wiring.n_heads)]
    return torch.stack([found[place] for place in order], 1)


def _pulled_back(
    stream: Float[Tensor, "batch pos d_model"],
    made: Float[Tensor, "batch head pos d_head"],
    slope: Float[Tensor, "batch head pos d_head"],
    head: int,
) -> Float[Tensor, "batch pos d_model"]:
    """Slope at the residual stream by one head's queries, keys or values."""
    one = torch.zeros_like(slope)
    one[:, head] = slope[:, head]
    (found,) = torch.autograd.grad(made, stream, one, retain_graph=True)
    return found


def _mlp_input(
    run: Written, layer: int, slope: Tensor | None, wiring: Wiring
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


Method = Literal["eap", "eap_ig", "exact"]
STEPPED = ("eap_ig",)
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

    An edge can be true and have score 0: what is equal in both texts of a pair, such as positions,
    is not seen by ``patch``; ``mean`` and ``zero`` see it.

    Args:
        model: the model; its heads must write to the residual stream by a matrix of their own, so
            families with a norm after attention are refused.
        probe: texts with answers, and the pair ``corrupt`` for ``patch``.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        method: ``eap``, ``eap_ig`` or ``exact``.
        steps: runs of ``eap_ig``; other methods take none.
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
        arXiv 2403.17806 (integrated gradients over inputs); Conmy et al. 2023, arXiv 2304.14997.

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
    study = Study.of(model, probe, metric, ablation, options)
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
        steps if method == "eap_ig" else 0,
        study.metric.unit,
        origin(
            model,
            probe,
            attention="whole passes",
            metric=study.metric.name,
            method=method,
            ablation=study.ablation,
            steps=steps if method == "eap_ig" else 0,
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
    def of(cls, folder: Path, study: Study, method: str, steps: int) -> "_Store":
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
    if method == "eap" and "clean" in metric.needs:
        raise InputError(
            f"{metric.name} is smallest at the clean run, so its gradient there is 0: use "
            "method='eap_ig' or 'exact', or another metric."
        )


def _work(study: Study, method: str, steps: int) -> int:
    passes = {"eap": 1, "eap_ig": steps, "exact": len(study.wiring)}[method]
    return passes * len(study.probe)


def _scores(batch: EdgeBatch, method: str, steps: int, done: Callable[[float], None]) -> np.ndarray:
    """Scores ``[edge example]`` of one batch."""
    if method == "exact":
        found = exact_scores(batch, done)
    else:
        found = gradient_scores(batch, steps if method == "eap_ig" else 0)
        done(float(steps if method == "eap_ig" else 1))
    unread = ~batch.measured.counted.to(found.device)
    values: np.ndarray = found.masked_fill(unread[:, None], float("nan")).mT.numpy()
    return values
