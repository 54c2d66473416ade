"""What every node writes to the residual stream in a run, and what it writes once corrupted."""

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
        metric: what is measured.
        probe: the batch, clean, with its answers.
        read: positions that the metric reads.
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
        """Examples in which it reads anything."""
        return self.read.any(1)

    def __call__(self, logits: Float[Tensor, "row at d_vocab"]) -> Float[Tensor, "run batch"]:
        """One number per run and example; 0 where it reads nothing.

        Args:
            logits: of one or several runs of the batch, runs outermost.
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
# The nodes must add up to the residual stream to this share of it.
_ADDS_UP = 1e-3
_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class PaddedTexts:
    """Token sequences as :meth:`HeadModel.run` takes them."""

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]

    def times(self, copies: int) -> "PaddedTexts":
        """The same texts several times over, copies outermost."""
        return PaddedTexts(self.tokens.repeat(copies, 1), self.real.repeat(copies, 1))


@dataclass(frozen=True, eq=False)
class WrittenRun:
    """One run of a batch, taken apart.

    Attributes:
        model: what was run.
        real: False at padding.
        taps: the residual stream before every layer and after the last, queries, keys, values
            and head outputs, attention and MLP writes, as the pass holds them.
        logits: at the positions asked for; None where none were.
    """

    model: HeadModel
    real: Bool[Tensor, "batch pos"]
    taps: Mapping[Tap, Tensor]
    logits: Float[Tensor, "batch at d_vocab"] | None

    @cached_property
    def sources(self) -> Float[Tensor, "batch source pos d_model"]:
        """What every node wrote, in fp32; 0 at padding."""
        return written_by_nodes(self.model, self.taps, self.real)

    @property
    def embed(self) -> Float[Tensor, "batch pos d_model"]:
        """What entered the first block, in fp32; 0 at padding."""
        value = self.taps[Tap("embed")].detach().float()
        return value * self.real.to(value.device)[..., None]


def taps_of(model: HeadModel) -> list[Tap]:
    """Every tap that edges are made of, in the order of a pass."""
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
    """Run a batch once and keep what every node wrote.

    Args:
        model: the model.
        texts: the batch.
        embed: what enters the first block instead of the embedding.
        logits_at: positions whose logits are returned; None: all; empty: none.
        grad: keep the graph; the taps are then part of it, from the embedding on.
        changes: functions of what some taps hold, which go on with what they return.
        rules: what stands in for gradients.
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
    """A write that changes nothing and keeps what it sees.

    Queries, keys and values are kept as they are written, which every way of running a model
    allows, and in the model's own type.
    """

    def keep(value: Tensor, _span: Any) -> Tensor:
        held[tap] = value.view_as(value)
        return held[tap]

    return keep


def _changer(
    held: dict[Tap, Tensor], tap: Tap, change: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Any], Tensor]:
    """A write that changes a tap; of queries, keys and values what was there before is kept."""

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
    """What every node writes, in fp32; 0 at padding.

    Args:
        model: the model.
        held: embedding, head outputs and MLP writes of a run.
        real: False at padding.
        less: those of another run, whose writes are subtracted; None: nothing is.
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
    """What every head of a layer adds to the residual stream, in fp32, without biases."""
    weights = model.output_weights(layer).detach().to(z.device).float()
    return torch.einsum("bphd,hdm->bhpm", z.float(), weights)


@dataclass(eq=False)
class EdgeMeasurement:
    """A model, a probe, a metric and a corruption, checked and cut into batches.

    Attributes:
        ablation: what an edge that is taken out carries: ``patch``, ``zero`` or ``mean``.
        size: examples per batch.
        means: what every node writes on average over real positions, for ``mean``.
        by_weights: whether the weights of a layer's queries, keys or values were seen to give the
            slopes that the model's own backward pass does.
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
        """Check everything that can be checked before a pass; then see how the layers are wired.

        Raises:
            InputError: if the arguments do not fit each other.
            UnsupportedModelError: if the model's heads do not write to the residual stream by a
                matrix of their own.
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
        """Batches of the probe, each run once cleanly and once corrupted."""
        for start in range(0, len(self.probe), self.size):
            yield self.batch(start)

    def batch(self, start: int, grad: bool = False) -> "EdgeBatch":
        """The batch whose first example has this number, run once cleanly and once corrupted.

        Args:
            start: number of the example.
            grad: keep the graph of the clean run.
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
        """What corruption changes in what every node writes."""
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
        """Refuse a model whose nodes do not add up to the residual stream, but for a constant."""
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
                f"residual stream (off by {gap:.2g} of it), so no edge carries a part of its own; "
                "use hs.ablate_heads or hs.path_patch."
            )


def _texts_that_fit(model: HeadModel, probe: Probe, limit: int) -> int:
    """How many texts fit in a batch, by what all nodes write in both runs, in fp32.

    Raises:
        InputError: if a single text does not, or the scores of all edges do not.
    """
    shape = model.shape
    wiring = Wiring(shape.n_heads, (False,) * shape.n_layers)
    nodes, text = len(wiring.sources), 2 * 4 * len(wiring.sources) * probe.length * shape.d_model
    scores = 4 * len(wiring) * len(probe)
    if scores > limit:
        raise InputError(
            f"scores of {len(wiring):,} edges on {len(probe):,} texts take {scores / 1e6:.3g} MB, "
            f"and the memory given is {limit / 1e6:.3g} MB: give more, or fewer texts."
        )
    if text > limit:
        raise InputError(
            f"what {nodes:,} nodes write on one text of {probe.length:,} tokens takes "
            f"{text / 1e6:.3g} MB, and the memory given is {limit / 1e6:.3g} MB: give more, or "
            "shorter texts."
        )
    return limit // text


@dataclass(frozen=True, eq=False)
class EdgeBatch:
    """One batch, ready to have edges taken out.

    Attributes:
        study: what is measured.
        texts: the batch.
        measured: the metric on it.
        clean: the clean run.
        change: what corruption changes in what every node writes; 0 at padding.
    """

    study: EdgeMeasurement
    texts: PaddedTexts
    measured: Measured
    clean: WrittenRun
    change: Float[Tensor, "batch source pos d_model"]

    @property
    def room(self) -> int:
        """Runs of the batch that are stacked at once."""
        return max(1, 2 * _TOKENS // self.texts.tokens.numel())

    @cached_property
    def first(self) -> int:
        """The first position where corruption changes anything.

        Before the first token in which pairs differ, what attention from left to right sees is
        the same.
        """
        probe = self.measured.probe
        if self.study.ablation != "patch" or not all_causal(self.study.model.stacks):
            return 0
        assert probe.corrupt is not None  # noqa: S101  # checked at first
        differ = (probe.tokens != probe.corrupt.tokens).any(0).nonzero()
        return int(differ[0]) if len(differ) else 0

    @cached_property
    def recorded(self) -> Resumable | None:
        """A clean pass, block by block, that others begin from; None where there is none."""
        model = self.study.model
        if not isinstance(model, HFModel) or not all_causal(model.stacks):
            return None
        return Resumable.of(model, Texts(self.texts.tokens, self.texts.real))

    def after(self, given: "Given", copies: int) -> AbstractContextManager[None]:
        """Scope in which blocks before the first tap that is given give what they gave.

        Args:
            given: values by tap.
            copies: how often the batch is stacked.
        """
        first = min(-1 if tap.layer is None else tap.layer for tap in given)
        if first < 1 or self.recorded is None:
            return nullcontext()
        return self.recorded.before(first, copies)

    def clean_value(self) -> Float[Tensor, " batch"]:
        """The metric on the clean run."""
        assert self.clean.logits is not None  # noqa: S101  # they were asked for
        return self.measured(self.clean.logits)[0]


def ablation_of(name: str | None, probe: Probe) -> Ablation:
    """The corruption by its name; by default the probe's pair, or means where it has none.

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
    """Refuse models whose heads do not write by a matrix of their own, or read by other ways.

    Raises:
        UnsupportedModelError: if so.
    """
    shape = model.shape
    for limit in ("linear_write", "values", "ov"):
        if limit in model.limits:
            raise UnsupportedModelError(
                f"edges of {model.name}: {model.limits[limit].rstrip('.')}, so what a head writes "
                "is not a sum of parts that edges could carry; use hs.ablate_heads or "
                "hs.path_patch."
            )
    if len(shape.attention_layers) < shape.n_layers or shape.removed:
        missing = "layers without attention" if not shape.removed else "heads that were removed"
        raise UnsupportedModelError(
            f"edges of {model.name}: it has {missing}, which are not among the nodes; use "
            "hs.ablate_heads."
        )


def wiring_of(model: HeadModel, probe: Probe) -> Wiring:
    """Nodes and edges of a model; two tokens are run to see what its MLPs read."""
    first = int(probe.first[0])
    tokens = probe.tokens[:1, first : first + 2]
    texts = PaddedTexts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with torch.enable_grad():
        try:
            run = run_apart(model, texts, logits_at=torch.tensor([0]), grad=True)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"edges of {model.name}: {str(error).rstrip('.')}, so edges into its heads cannot "
                "be told apart; use hs.ablate_heads."
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
    """What some taps of a layer hold when others are given.

    Args:
        batch: its texts are run; what is not given is as it would be.
        given: values by tap, ``[run batch *rest]``.
        reads: taps; the pass stops after the last. Queries, keys and values are read together.

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
    """The metric of runs with some taps given, ``[run batch *rest]``."""
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
    """Runs cut into as many as are stacked at once."""
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
