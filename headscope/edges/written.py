"""Writes of every node to the residual stream, in clean and corrupted runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture
from headscope.base.options import RunOptions
from headscope.base.stacks import all_causal
from headscope.edges.rules import Rules
from headscope.errors import InputError, UnsupportedModelError, nearest
from headscope.metrics import AnyMetric, LogitRows, Metric, as_metric
from headscope.models.hf.model import HFModel
from headscope.models.hf.replay import Resumable, quick_activations
from headscope.models.protocol import HeadModel
from headscope.models.taps import Site, Tap, TapView, Texts
from headscope.probes.probe import Probe
from headscope.table.edges import Wiring


@dataclass(eq=False)
class Measured:
    """A metric on one batch.

    Attributes:
        metric: metric to compute.
        probe: clean batch with its answers.
        read: mask of the positions that the metric reads.
        clean: logits of the clean run at :attr:`at`, for metrics that compare with it.
    """

    metric: AnyMetric
    probe: Probe
    read: Bool[Tensor, "batch pos"]
    clean: Float[Tensor, "batch at d_vocab"] | None = None

    @cached_property
    def at(self) -> Int[Tensor, " at"]:
        """Positions whose logits are needed."""
        return self.read.any(0).nonzero().squeeze(1)

    @cached_property
    def counted(self) -> Bool[Tensor, " batch"]:
        """Mask of examples in which the metric reads a position."""
        return self.read.any(1)

    def __call__(self, logits: Float[Tensor, "row at d_vocab"]) -> Float[Tensor, "run batch"]:
        """Metric per run and example; 0 for examples without a position to read.

        Args:
            logits: logits of one or several runs of the batch, with runs outermost.
        """
        runs = logits.unflatten(0, (-1, len(self.probe)))
        if not isinstance(self.metric, Metric):
            return torch.stack([self.metric(run.float(), self.probe) for run in runs])
        return self._averaged(self.metric, runs)

    def _averaged(
        self, metric: Metric, runs: Float[Tensor, "run batch at d_vocab"]
    ) -> Float[Tensor, "run batch"]:
        device, n = runs.device, len(runs)
        read = self.read[:, self.at].to(device)
        example = read.nonzero()[:, 0]
        probe, clean = self.probe, self.clean
        foils = None if probe.foils is None else probe.foils[self.read].to(device).repeat(n)
        rows = LogitRows(
            runs[:, read].flatten(0, 1).float(),
            probe.targets[self.read].to(device).repeat(n),
            foils,
            None if clean is None else clean[read].float().repeat(n, 1),
        )
        values = metric.value(rows).view(n, -1)
        total = values.new_zeros(n, len(probe)).index_add(1, example, values)
        return total / read.sum(1).clamp_min(1)


ENTRIES: tuple[Site, ...] = ("query", "key", "value")
Ablation = Literal["patch", "zero", "mean"]
ABLATIONS: Mapping[str, Ablation] = {
    "patch": "patch",
    "zero": "zero",
    "mean": "mean",
    "corrupt": "patch",
    "counterfactual": "patch",
    "resample": "patch",
}
# Relative tolerance for the sum of nodes against the residual stream.
_ADDS_UP = 1e-3
_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class PaddedTexts:
    """Padded token sequences in the form that :meth:`HeadModel.run` takes."""

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]

    def times(self, copies: int) -> "PaddedTexts":
        """Repeat the texts, with copies outermost."""
        return PaddedTexts(self.tokens.repeat(copies, 1), self.real.repeat(copies, 1))


@dataclass(frozen=True, eq=False)
class WrittenRun:
    """Recorded run of a batch, split into the writes of nodes.

    Attributes:
        model: model that was run.
        real: False at padding.
        taps: residual stream before every layer and after the last, queries, keys, values, head
            outputs, and attention and MLP writes, as in the pass.
        logits: logits at the requested positions; None if none were requested.
    """

    model: HeadModel
    real: Bool[Tensor, "batch pos"]
    taps: Mapping[Tap, Tensor]
    logits: Float[Tensor, "batch at d_vocab"] | None

    @cached_property
    def sources(self) -> Float[Tensor, "batch source pos d_model"]:
        """Write of every node in fp32; 0 at padding."""
        return written_by_nodes(self.model, self.taps, self.real)

    @property
    def embed(self) -> Float[Tensor, "batch pos d_model"]:
        """Input of the first block in fp32; 0 at padding."""
        value = self.taps[Tap("embed")].detach().float()
        return value * self.real.to(value.device)[..., None]


def taps_of(model: HeadModel) -> list[Tap]:
    """All taps needed for edges, in the order of a pass."""
    found = [Tap("embed")]
    for layer in range(model.shape.n_layers):
        sites = ("resid_pre", "query", "key", "value", "z", "attn_out", "mlp_out", "resid_post")
        found += [Tap(site, layer) for site in sites]
    return found


def run_apart(
    model: HeadModel,
    texts: PaddedTexts,
    *,
    embed: Float[Tensor, "batch pos d_model"] | None = None,
    logits_at: Int[Tensor, " at"] | None = None,
    grad: bool = False,
    changes: Mapping[Tap, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    rules: Rules | None = None,
) -> WrittenRun:
    """Run a batch once and record the write of every node.

    Args:
        model: model to run.
        texts: batch of texts.
        embed: input of the first block in place of the embedding.
        logits_at: positions of the returned logits; None: all; empty: none.
        grad: keep the autograd graph, which then includes the taps from the embedding on.
        changes: functions by tap that replace the tap's value.
        rules: backward rules that replace gradients.
    """
    held: dict[Tap, Tensor] = {}

    def keep(view: TapView) -> None:
        held[view.tap] = view.value
        if rules is not None and view.tap.site in ("attn_out", "mlp_out"):
            rules.in_mlp = view.tap.site == "attn_out"

    def begin(value: Tensor, _span: Any) -> Tensor:
        start = value if embed is None else embed.to(value)
        return start.detach().clone().requires_grad_() if grad else start

    writes: dict[Tap, Any] = {Tap("embed"): begin} if grad or embed is not None else {}
    taps = taps_of(model)
    reads = {tap: keep for tap in taps if tap.site not in ENTRIES}
    writes |= {tap: keeper(held, tap) for tap in taps if tap.site in ENTRIES}
    writes |= {tap: _changer(held, tap, change) for tap, change in changes.items()}
    reads = {tap: read for tap, read in reads.items() if tap not in changes}
    plain = quick_activations(model) if isinstance(model, HFModel) else nullcontext()
    with rules or plain:
        logits = model.run(texts, reads=reads, writes=writes, logits_at=logits_at, grad=grad)
    return WrittenRun(model, texts.real, held, logits)


def keeper(held: dict[Tap, Tensor], tap: Tap) -> Callable[[Tensor, Any], Tensor]:
    """Write that stores a tap's value without changing it.

    Queries, keys and values are stored through writes, which every model path supports, and in the
    model's dtype.
    """

    def keep(value: Tensor, _span: Any) -> Tensor:
        held[tap] = value.view_as(value)
        return held[tap]

    return keep


def _changer(
    held: dict[Tap, Tensor], tap: Tap, change: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Any], Tensor]:
    """Write that changes a tap; for queries, keys and values, the original value is stored."""

    def write(value: Tensor, _span: Any) -> Tensor:
        there = value.view_as(value)
        changed = change(there)
        held[tap] = there if tap.site in ENTRIES else changed
        return changed

    return write


@torch.no_grad()
def written_by_nodes(
    model: HeadModel,
    held: Mapping[Tap, Tensor],
    real: Bool[Tensor, "batch pos"],
    less: Mapping[Tap, Tensor] | None = None,
) -> Float[Tensor, "batch source pos d_model"]:
    """Write of every node in fp32; 0 at padding.

    Args:
        model: model to run.
        held: embedding, head outputs and MLP writes of a run.
        real: False at padding.
        less: the same for another run, whose writes are subtracted; None: nothing is subtracted.
    """
    padded, shape = not bool(real.all()), model.shape

    def part(tap: Tap) -> Tensor:
        value = held[tap].detach().float()
        value = value if less is None else value - less[tap].detach().float()
        mask = real.to(value.device).view(*real.shape, *[1] * (value.ndim - 2))
        return value * mask if padded else value

    embed = part(Tap("embed"))
    found = embed.new_empty(1 + shape.n_layers * (shape.n_heads + 1), *embed.shape)
    found[0] = embed
    for layer in range(shape.n_layers):
        z, first = part(Tap("z", layer)), 1 + layer * (shape.n_heads + 1)
        weights = model.output_weights(layer).detach().to(z.device).float()
        heads = torch.bmm(z.flatten(0, 1).transpose(0, 1), weights)
        found[first : first + shape.n_heads] = heads.view(-1, *embed.shape)
        found[first + shape.n_heads] = part(Tap("mlp_out", layer))
    return found.transpose(0, 1)


def heads_write(
    model: HeadModel, layer: int, z: Float[Tensor, "batch pos head d_head"]
) -> Float[Tensor, "batch head pos d_model"]:
    """Write of every head of a layer to the residual stream in fp32, without biases."""
    weights = model.output_weights(layer).detach().to(z.device).float()
    return torch.einsum("bphd,hdm->bhpm", z.float(), weights)


@dataclass(eq=False)
class EdgeMeasurement:
    """Model, probe, metric and corruption, validated and split into batches.

    Attributes:
        ablation: what an ablated edge carries: ``patch``, ``zero`` or ``mean``.
        size: examples per batch.
        means: mean write of every node over real positions, for ``mean``.
        by_weights: whether gradients through the weights of a layer's queries, keys or values match
            the model's backward pass.
    """

    model: HeadModel
    probe: Probe
    metric: AnyMetric
    ablation: Ablation
    size: int
    wiring: Wiring
    means: Float[Tensor, "source d_model"] | None = field(default=None)
    by_weights: dict[tuple[str, int], bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: HeadModel,
        probe: Probe,
        metric: Any,
        ablation: str | None = None,
        options: RunOptions = RunOptions(),
    ) -> "EdgeMeasurement":
        """Validate all arguments before any pass, then find out how the layers are wired.

        Raises:
            InputError: if the arguments do not fit each other.
            UnsupportedModelError: if the model's heads do not each write to the residual stream
                through a matrix.
        """
        chosen = ablation_of(ablation, probe)
        measured = as_metric(metric)
        capture.check_fits(model, probe, answers="target" in measured.needs)
        measured.reads(probe)
        if chosen == "patch":
            _check_pair(model, probe)
        check_family(model)
        size = min(len(probe), options.per_pass(probe.length, _TOKENS))
        if options.memory_bytes is not None:
            size = min(size, _texts_that_fit(model, probe, options.memory_bytes))
        study = cls(model, probe, measured, chosen, size, wiring_of(model, probe))
        study._check_sum()
        if chosen == "mean":
            study.means = study._averages()
        return study

    def batches(self) -> Iterator["EdgeBatch"]:
        """Batches of the probe, each with one clean and one corrupted run."""
        for start in range(0, len(self.probe), self.size):
            yield self.batch(start)

    def batch(self, start: int, grad: bool = False) -> "EdgeBatch":
        """Batch starting at an example, with one clean and one corrupted run.

        Args:
            start: index of the first example.
            grad: keep the autograd graph of the clean run.
        """
        chosen = slice(start, min(start + self.size, len(self.probe)))
        reads = self.metric.reads(self.probe)[chosen]
        probe = self.probe.examples(chosen)
        texts = PaddedTexts(probe.tokens, probe.real)
        measured = Measured(self.metric, probe, reads)
        with torch.set_grad_enabled(grad):
            clean = run_apart(self.model, texts, logits_at=measured.at, grad=grad)
        assert clean.logits is not None  # noqa: S101  # they were asked for
        measured.clean = clean.logits.detach()
        return EdgeBatch(self, texts, measured, clean, self._change(probe, clean))

    @torch.no_grad()
    def _change(self, probe: Probe, clean: WrittenRun) -> Float[Tensor, "batch source pos d_model"]:
        """Change in every node's write under corruption."""
        if self.ablation == "zero":
            return -clean.sources
        if self.means is not None:
            mask = probe.real.to(self.means.device)[:, None, :, None]
            return (self.means[None, :, None] - clean.sources) * mask
        assert probe.corrupt is not None  # noqa: S101  # checked at first
        texts = PaddedTexts(probe.corrupt.tokens, probe.real)
        other = run_apart(self.model, texts, logits_at=torch.empty(0, dtype=torch.long))
        return written_by_nodes(self.model, other.taps, probe.real, less=clean.taps)

    @torch.no_grad()
    def _averages(self) -> Float[Tensor, "source d_model"]:
        total: Any = 0.0
        nothing = torch.empty(0, dtype=torch.long)
        for start in range(0, len(self.probe), self.size):
            part = self.probe.examples(slice(start, start + self.size))
            total = total + run_apart(
                self.model, PaddedTexts(part.tokens, part.real), logits_at=nothing
            ).sources.sum((0, 2))
        means: Tensor = total / self.probe.real.sum().to(total.device)
        return means

    @torch.no_grad()
    def _check_sum(self) -> None:
        """Raise if the nodes do not sum to the residual stream, up to a constant."""
        part = self.probe.examples(slice(0, 1))
        run = run_apart(
            self.model, PaddedTexts(part.tokens, part.real), logits_at=torch.empty(0).long()
        )
        last = run.taps[Tap("resid_post", self.model.shape.n_layers - 1)].float()
        real = part.real[0].to(last.device)
        rest = (last[0] - run.sources[0].sum(0))[real]
        gap = float((rest - rest.mean(0)).abs().max() / last[0][real].abs().max())
        allowed = _ADDS_UP if self.model.dtype in (torch.float32, torch.float64) else 5e-2
        if gap > allowed:
            raise UnsupportedModelError(
                f"edges of {self.model.name}: embedding, heads and MLPs do not add up to its "
                f"residual stream (relative gap {gap:.2g}), so edges are not defined; use "
                "hs.ablate_heads or hs.path_patch."
            )


def _texts_that_fit(model: HeadModel, probe: Probe, limit: int) -> int:
    """Number of texts per batch for which all nodes' writes in both runs fit in memory, in fp32.

    Raises:
        InputError: if a single text, or the scores of all edges, do not fit.
    """
    shape = model.shape
    wiring = Wiring(shape.n_heads, (False,) * shape.n_layers)
    nodes, text = len(wiring.sources), 2 * 4 * len(wiring.sources) * probe.length * shape.d_model
    scores = 4 * len(wiring) * len(probe)
    if scores > limit:
        raise InputError(
            f"scores of {len(wiring):,} edges on {len(probe):,} texts take {scores / 1e6:.3g} MB, "
            f"and the memory budget is {limit / 1e6:.3g} MB: raise it, or give fewer texts."
        )
    if text > limit:
        raise InputError(
            f"the writes of {nodes:,} nodes on one text of {probe.length:,} tokens take "
            f"{text / 1e6:.3g} MB, and the memory budget is {limit / 1e6:.3g} MB: raise it, or "
            "give shorter texts."
        )
    return limit // text


@dataclass(frozen=True, eq=False)
class EdgeBatch:
    """One batch, prepared for ablating edges.

    Attributes:
        study: the measurement.
        texts: batch of texts.
        measured: metric on this batch.
        clean: the clean run.
        change: change in every node's write under corruption; 0 at padding.
    """

    study: EdgeMeasurement
    texts: PaddedTexts
    measured: Measured
    clean: WrittenRun
    change: Float[Tensor, "batch source pos d_model"]

    @property
    def room(self) -> int:
        """Number of runs of the batch that are stacked at once."""
        return max(1, 2 * _TOKENS // self.texts.tokens.numel())

    @cached_property
    def first(self) -> int:
        """First position that corruption changes.

        With causal attention, everything before the first differing token of a pair is the same.
        """
        probe = self.measured.probe
        if self.study.ablation != "patch" or not all_causal(self.study.model.stacks):
            return 0
        assert probe.corrupt is not None  # noqa: S101  # checked at first
        differ = (probe.tokens != probe.corrupt.tokens).any(0).nonzero()
        return int(differ[0]) if len(differ) else 0

    @cached_property
    def recorded(self) -> Resumable | None:
        """Recorded clean pass from which others resume; None if the model does not support it."""
        model = self.study.model
        if not isinstance(model, HFModel) or not all_causal(model.stacks):
            return None
        return Resumable.of(model, Texts(self.texts.tokens, self.texts.real))

    def after(self, given: "Given", copies: int) -> AbstractContextManager[None]:
        """Scope in which blocks before the first given tap return their recorded values.

        Args:
            given: values by tap.
            copies: number of stacked copies of the batch.
        """
        first = min(-1 if tap.layer is None else tap.layer for tap in given)
        if first < 1 or self.recorded is None:
            return nullcontext()
        return self.recorded.before(first, copies)

    def clean_value(self) -> Float[Tensor, " batch"]:
        """Metric on the clean run."""
        assert self.clean.logits is not None  # noqa: S101  # they were asked for
        return self.measured(self.clean.logits)[0]


def ablation_of(name: str | None, probe: Probe) -> Ablation:
    """Look up a corruption by name. Default: the probe's pair, or means if it has none.

    Raises:
        InputError: if there is no such corruption, or the probe has no pair for it.
    """
    if name is None:
        return "mean" if probe.corrupt is None else "patch"
    if name not in ABLATIONS:
        raise InputError(nearest(str(name), ABLATIONS, kind="ablation"))
    found = ABLATIONS[name]
    if found == "patch" and probe.corrupt is None:
        raise InputError(
            f"ablation={name!r} takes values from a paired run, and this probe has no corrupt "
            "pair: use a probe of pairs, or ablation='mean' or 'zero'."
        )
    return found


def _check_pair(model: HeadModel, probe: Probe) -> None:
    other = probe.corrupt
    assert other is not None  # noqa: S101  # checked with the ablation's name
    if other.tokens.shape != probe.tokens.shape or not torch.equal(other.real, probe.real):
        raise InputError(
            f"the corrupt probe has texts of other lengths or padding than the clean one "
            f"({tuple(other.tokens.shape)} and {tuple(probe.tokens.shape)}): a pair must be "
            "aligned token by token."
        )
    capture.check_fits(model, replace(other, corrupt=None, control=None))


def check_family(model: HeadModel) -> None:
    """Raise if the model's heads do not each read and write the residual stream through matrices.

    Raises:
        UnsupportedModelError: if heads cannot be separated this way.
    """
    shape = model.shape
    for limit in ("linear_write", "values", "ov"):
        if limit in model.limits:
            raise UnsupportedModelError(
                f"edges of {model.name}: {model.limits[limit].rstrip('.')}, so head writes are not "
                "a sum of parts that edges could carry; use hs.ablate_heads or hs.path_patch."
            )
    if len(shape.attention_layers) < shape.n_layers or shape.removed:
        missing = "layers without attention" if not shape.removed else "heads that were removed"
        raise UnsupportedModelError(
            f"edges of {model.name}: it has {missing}, which cannot be nodes; use hs.ablate_heads."
        )


def wiring_of(model: HeadModel, probe: Probe) -> Wiring:
    """Nodes and edges of a model; runs two tokens to find out what its MLPs read."""
    first = int(probe.first[0])
    tokens = probe.tokens[:1, first : first + 2]
    texts = PaddedTexts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with torch.enable_grad():
        try:
            run = run_apart(model, texts, logits_at=torch.tensor([0]), grad=True)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"edges of {model.name}: {str(error).rstrip('.')}, so edges into its heads cannot "
                "be separated; use hs.ablate_heads."
            ) from None
        parallel = []
        for layer in range(model.shape.n_layers):
            attention, mlp = run.taps[Tap("attn_out", layer)], run.taps[Tap("mlp_out", layer)]
            (slope,) = torch.autograd.grad(
                mlp.sum(), attention, retain_graph=True, allow_unused=True
            )
            parallel.append(slope is None)
    return Wiring(model.shape.n_heads, tuple(parallel))


Given = Mapping[Tap, Tensor]


def values_with(batch: EdgeBatch, given: Given, reads: Sequence[Tap]) -> dict[Tap, Tensor]:
    """Values of some taps of a layer, given the values of others.

    Args:
        batch: batch to run; taps that are not given are computed as usual.
        given: values by tap, ``[run batch *rest]``.
        reads: taps to read; the pass stops after the last. Queries, keys and values are read
            together.

    Returns:
        By tap, ``[run batch *rest]``.
    """
    found: dict[Tap, list[Tensor]] = {tap: [] for tap in reads}
    last = reads[-1]
    until = Tap("z", last.layer) if last.site in ENTRIES else last
    for some, count in _stacks(batch, given):
        held: dict[Tap, Tensor] = {}
        keepers = {tap: keeper(held, tap) for tap in reads if tap.site in ENTRIES}
        with batch.after(some, count):
            batch.study.model.run(
                batch.texts.times(count),
                reads={tap: _reader(held) for tap in reads if tap.site not in ENTRIES},
                writes=_writes(some) | keepers,
                until=until,
            )
        for tap in reads:
            found[tap].append(held[tap].unflatten(0, (count, -1)).clone())
    return {tap: torch.cat(parts) for tap, parts in found.items()}


def measured_with(batch: EdgeBatch, given: Given) -> Float[Tensor, "run batch"]:
    """Metric of runs in which some taps are given, ``[run batch *rest]``."""
    parts = []
    for some, count in _stacks(batch, given):
        with batch.after(some, count):
            logits = batch.study.model.run(
                batch.texts.times(count), writes=_writes(some), logits_at=batch.measured.at
            )
        assert logits is not None  # noqa: S101  # they were asked for
        parts.append(batch.measured(logits))
    return torch.cat(parts)


def _stacks(batch: EdgeBatch, given: Given) -> Iterator[tuple[dict[Tap, Tensor], int]]:
    """Split runs into stacks that fit at once."""
    runs = len(next(iter(given.values())))
    for start in range(0, runs, batch.room):
        some = {tap: value[start : start + batch.room] for tap, value in given.items()}
        yield some, min(batch.room, runs - start)


def _writes(given: Given) -> dict[Tap, Callable[[Tensor, Any], Tensor]]:
    return {tap: _giver(value) for tap, value in given.items()}


def _giver(value: Float[Tensor, "run batch *rest"]) -> Callable[[Tensor, Any], Tensor]:
    return lambda there, _span: value.flatten(0, 1).to(there)


def _reader(held: dict[Tap, Tensor]) -> Callable[[TapView], None]:
    def read(view: TapView) -> None:
        held[view.tap] = view.value

    return read
