"""Run many edited variants of one batch, by suffix replay or whole passes, and read metrics."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, field, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.options import Advance, free_cached_memory, is_out_of_memory, keep_freed_memory
from headscope.base.stacks import all_causal
from headscope.edits import Span, Variant, cut, first_layer, scale, stack, zero
from headscope.errors import HeadscopeError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.interventions import Place
from headscope.metrics import AnyMetric, LogitRows, Metric, WholeMetric
from headscope.models.hf.model import HFModel
from headscope.models.hf.replay import Replay, Resumable, quick_activations, record
from headscope.models.hf.seq2seq import StackView
from headscope.models.protocol import HeadModel
from headscope.models.running import use_of
from headscope.models.taps import Read, Reads, Tap, TapView, Texts, Write, writes_of
from headscope.probes.probe import Probe

# A replay must give the model's own logits to this share of the largest; half precision keeps
# about three digits.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 5e-2
_TRIAL_LENGTH = 32
# The last block is cut to the positions read only where that spares at least half of them.
_FEW_ROWS = 0.5
Found = TypeVar("Found")
# Rows of the last block that run: those whose logits are read, the first of each example, or all.
Lean = Literal["read", "first", "all"]


@runtime_checkable
class Source(Protocol):
    """Protocol of a batch that can be run with edits."""

    @property
    def z(self) -> dict[int, Tensor] | None:
        """Clean head outputs by layer, if they were kept."""

    def start(self, variant: Variant) -> tuple[int, int]:
        """First layer and position that a variant has to recompute."""

    def rows(self, variants: Sequence[Variant]) -> Tensor:
        """Inputs of :meth:`logits` at every position read of every variant, in order."""

    def values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Values at some taps in every variant, ``[variant batch *rest]``."""

    def logits(self, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
        """Logits of such rows."""

    def clean(self) -> Tensor:
        """Rows of the unedited batch."""


def kept_in(found: dict[Tap, Tensor], copies: int) -> Read:
    """Make a reader that keeps what it reads, separately for each variant of a stack."""

    def keep(view: TapView) -> None:
        found[view.tap] = view.value.unflatten(0, (copies, -1)).clone()

    return keep


@dataclass(frozen=True, eq=False)
class ReplaySource:
    """Suffix replay of a recorded pass."""

    replay: Replay

    @property
    def z(self) -> dict[int, Tensor] | None:
        """Clean head outputs by layer."""
        return self.replay.recording.z

    def start(self, variant: Variant) -> tuple[int, int]:
        """First layer and position that a variant has to recompute."""
        return self.replay.start(variant)

    def rows(self, variants: Sequence[Variant]) -> Tensor:
        """Last residual stream at the positions read."""
        rows = self.replay.run(variants)
        assert rows is not None  # noqa: S101  # nothing stops it before
        return rows

    def values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Values at some taps in every variant, ``[variant batch *rest]``."""
        found: dict[Tap, Tensor] = {}
        self.replay.run(variants, reads=dict.fromkeys(taps, kept_in(found, len(variants))))
        return found

    def logits(self, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
        """Apply the final norm and unembedding."""
        return self.replay.logits(rows)

    def clean(self) -> Tensor:
        """Last residual stream of the recorded clean pass."""
        final = self.replay.recording.final
        return final[self.replay.on_host.nonzero(as_tuple=True)]


@dataclass(frozen=True, eq=False)
class ForwardSource:
    """Whole passes: one forward pass per stack of variants."""

    model: HeadModel
    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    read: Bool[Tensor, "batch pos"]
    reads: Mapping[Tap, Read] = field(default_factory=dict)
    z: None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def _texts(self) -> Texts:
        return Texts(self.tokens, self.real, self.inputs)

    def start(self, variant: Variant) -> tuple[int, int]:
        """Recompute everything."""
        return 0, 0

    def rows(self, variants: Sequence[Variant]) -> Tensor:
        """Logits at the positions read."""
        if _in_scope(self.model):  # its edits may hold values per example
            return torch.cat([self._stacked((variant,)) for variant in variants])
        return self._stacked(variants)

    def _stacked(self, variants: Sequence[Variant]) -> Tensor:
        copies = len(variants)
        read = self.read.cpu()
        at = read.any(0).nonzero().squeeze(1)
        with quick(self.model), self._pass(variants, list(self.reads)):
            logits = self.model.run(
                self._texts.repeated(copies),
                reads=self.reads,
                writes=self.writes(variants),
                logits_at=at,
            )
        assert logits is not None  # noqa: S101  # they were asked for
        return logits[read[:, at].repeat(copies, 1).nonzero(as_tuple=True)]

    def writes(self, variants: Sequence[Variant]) -> Mapping[Tap, Write]:
        """Taps that a stack of variants writes."""
        return writes_of(stack(variants))

    def values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """Values at some taps in every variant, ``[variant batch *rest]``."""
        if _in_scope(self.model):
            parts = [self._values_at((variant,), taps) for variant in variants]
            return {tap: torch.cat([part[tap] for part in parts]) for tap in taps}
        return self._values_at(variants, taps)

    def _values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        found: dict[Tap, Tensor] = {}
        copies = len(variants)
        with self._pass(variants, taps):
            self.model.run(
                self._texts.repeated(copies),
                reads=dict.fromkeys(taps, kept_in(found, copies)),
                writes=self.writes(variants),
                logits_at=torch.empty(0, dtype=torch.long),
            )
        return found

    def _pass(
        self, _variants: Sequence[Variant], _taps: Sequence[Tap]
    ) -> AbstractContextManager[None]:
        """Context manager around one pass."""
        return nullcontext()

    def logits(self, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
        """Return the rows unchanged: they are logits already."""
        return rows

    def clean(self) -> Tensor:
        """Logits of the unedited batch."""
        return self.rows([()])


@dataclass(frozen=True, eq=False)
class ResumedSource(ForwardSource):
    """Whole passes that resume from a clean pass at the first edited block.

    Attributes:
        clean_pass: the recorded clean pass; None: every block runs.
        lean: which rows of the last block run; None: all of every block that runs.
    """

    clean_pass: Resumable | None = None
    lean: Lean | None = None

    def start(self, variant: Variant) -> tuple[int, int]:
        """First layer that a variant has to recompute, at all positions."""
        layer = first_layer(variant)
        return self.model.shape.n_layers if layer is None else layer, 0

    def _pass(
        self, variants: Sequence[Variant], taps: Sequence[Tap]
    ) -> AbstractContextManager[None]:
        if self.clean_pass is None:
            return nullcontext()
        layer = min(self.start(variant)[0] for variant in variants)
        if taps or self.lean is None:
            first = [layer, *(0 if tap.layer is None else tap.layer for tap in taps)]
            return self.clean_pass.before(min(first), len(variants))
        rows = rows_read(self.clean_pass.model, self._texts, self.read, self.lean)
        return lean_pass(self.clean_pass, self._texts, rows, layer, variants)


def rows_read(
    model: HFModel | StackView, texts: Texts, read: Bool[Tensor, "batch pos"], lean: Lean
) -> Int[Tensor, " row"] | None:
    """Rows of the last block that have to run; None: all, or so many that it spares little.

    Args:
        model: model to run.
        texts: a batch.
        read: positions whose logits are read.
        lean: which of them count: of images, the first are those of class and register tokens.
    """
    length = model.n_queries(texts)
    if lean == "all" or not isinstance(model, HFModel):
        return None
    if lean == "read":
        rows = read.cpu().any(0).nonzero()[:, 0]
    elif model.grid is not None:
        rows = torch.arange(model.grid.first)
    else:
        shown = torch.ones(1, length) if texts.real is None else texts.real.cpu().int()
        rows = shown.argmax(1).unique()
    return rows.to(model.device) if 0 < len(rows) <= _FEW_ROWS * length else None


def lean_pass(
    clean: Resumable,
    texts: Texts,
    rows: Int[Tensor, " row"] | None,
    layer: int,
    variants: Sequence[Variant],
) -> AbstractContextManager[None]:
    """Scope in which a stack of variants runs what their edits change and what is read.

    Args:
        clean: the recorded pass.
        texts: its batch.
        rows: of the last block; see :func:`rows_read`.
        layer: first that is edited.
        variants: of the stack.
    """
    length, real = clean.model.n_queries(texts), texts.real
    padded = None if real is None or real.shape[1] != length else real.repeat(len(variants), 1)
    span = Span(0, length, length, real=padded)
    return clean.edited(layer, tuple(one.during(span) for one in stack(variants)), rows)


@dataclass(frozen=True)
class Engine:
    """How a model is run, and the error of a pass whose edit changes nothing.

    Attributes:
        replays: whether parts of a pass can be run again.
        prefix: whether positions before the first edit can be kept.
        noop_error: largest difference of logits, as a share of the largest logit.
        resumes: whether whole passes can start from a clean pass at the first edited block.
        lean: which rows of the last block these run, where they leave out attention of the first
            one, whose outputs are known; None: they run all of every block.
    """

    replays: bool
    prefix: bool
    noop_error: float
    resumes: bool = False
    lean: Lean | None = None

    @property
    def name(self) -> str:
        """Description in words."""
        if self.replays:
            return "suffix replay"
        return "passes from the first edited layer" if self.resumes else "whole passes"

    def source(
        self,
        model: HeadModel,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        read: Bool[Tensor, "batch pos"],
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Source:
        """Prepare a batch; ``inputs`` are model inputs other than tokens."""
        if self.resumes and isinstance(model, HFModel | StackView):
            clean = Resumable.of(model, Texts(tokens, real, inputs))
            return ResumedSource(
                model, tokens, real, read, inputs=inputs, clean_pass=clean, lean=self.lean
            )
        if not self.replays or not isinstance(model, HFModel):
            return ForwardSource(model, tokens, real, read, inputs=inputs)
        padding = None if bool(real.all()) else real
        recording = record(model, tokens, padding)
        return ReplaySource(Replay(model, recording, read, self.prefix, lean=self.prefix))


def quick(model: HeadModel) -> AbstractContextManager[None]:
    """Context manager in which the model's modules use faster equivalents during a pass."""
    return quick_activations(model) if isinstance(model, HFModel) else nullcontext()


# Keyed by model, padding and dtype, which determine the engine.
_ENGINES: "WeakKeyDictionary[HeadModel, dict[tuple[bool, torch.dtype], Engine]]" = (
    WeakKeyDictionary()
)


def engine_for(
    model: HeadModel,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
) -> Engine:
    """Choose the fastest way to run a model that reproduces its own logits under a no-op edit.

    Tried once per model, on two short texts of the batch, in this order: suffix replay with kept
    prefixes and a last block cut to what is read; suffix replay alone; passes of the whole model
    that resume from a clean pass; whole passes. Running out of memory is not evidence about a
    model: memory is then freed and the trial repeated, or the error raised. A model with inputs
    other than tokens is not replayed.
    """
    keep_freed_memory()
    if inputs:
        return _whole(model, Texts(tokens, real, inputs))
    if _in_scope(model):
        return _tried(model, *_trial(tokens, real), replay=False)
    known = _ENGINES.setdefault(model, {})
    key = (not bool(real.all()), model.dtype)
    if key not in known:
        known[key] = _tried_twice(model, *_trial(tokens, real))
    return known[key]


@torch.no_grad()
def _whole(model: HeadModel, texts: Texts) -> Engine:
    """Engine of whole passes, with its no-op error on the first example."""
    inputs = {name: value[:1] for name, value in texts.inputs.items()}
    first = Texts(texts.tokens[:1], None if texts.real is None else texts.real[:1], inputs)
    layers = model.shape.attention_layers
    noop = scale((layers[len(layers) // 2], 0), 1.0)
    own, again = (model.run(first, writes=writes_of(edits)) for edits in ((), (noop,)))
    assert own is not None  # noqa: S101  # logits were asked for
    assert again is not None  # noqa: S101
    error = (again - own).abs().max() / own.abs().max().clamp_min(1e-12)
    return replace(_resuming(model, first), noop_error=float(error))


def _resuming(model: HeadModel, texts: Texts) -> Engine:
    """Engine of whole passes, resumed if that equals a whole pass, and lean if that does too."""
    whole = Engine(False, False, 0.0)
    if not isinstance(model, HFModel | StackView) or use_of(model.module).scopes:
        return whole
    clean = _unless_unsupported(lambda: Resumable.of(model, texts))
    if clean is None:
        return whole
    pools = isinstance(model, HFModel) and (model.grid is not None or model.pooling is not None)
    ways: tuple[Lean | None, ...] = ("first" if pools else "read", "all", None)
    for lean in ways:
        if _unless_unsupported(partial(_agrees, model, texts, clean, lean)):
            return replace(whole, resumes=True, lean=lean)
    return whole


def _unless_unsupported(found: Callable[[], Found]) -> Found | None:
    """What a function returns; None if blocks are called in a way that it does not support."""
    try:
        return found()
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return None


def _agrees(model: HFModel | StackView, texts: Texts, clean: Resumable, lean: Lean | None) -> bool:
    """Whether a pass resumed at a middle and at the last layer, with all heads zeroed, is right."""
    layers = model.shape.attention_layers
    length = model.n_queries(texts)
    at = torch.tensor([min(int(texts.tokens.shape[1]), length) - 1])
    read = torch.zeros(len(texts.tokens), length, dtype=torch.bool)
    read[:, at] = True
    for layer in dict.fromkeys((layers[len(layers) // 2], layers[-1])):
        off = [(scale([head for head in model.shape.heads if head.layer == layer], 0.0),)] * 2
        whole = model.run(texts, writes=writes_of(off[0]), logits_at=at)
        rows = None if lean is None else rows_read(clean.model, texts, read, lean)
        scope: AbstractContextManager[None] = clean.before(layer, copies=2)
        if lean is not None:
            scope = lean_pass(clean, texts, rows, layer, off)
        with scope:
            again = model.run(texts.repeated(2), writes=writes_of(stack(off)), logits_at=at)
        assert whole is not None  # noqa: S101  # logits were asked for
        assert again is not None  # noqa: S101
        size = float(whole.float().abs().max()) or 1.0
        difference = again.float().unflatten(0, (2, -1)) - whole.float()
        limit = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
        if not bool(difference.abs().max() <= limit * size):  # also if one is NaN
            return False
    return True


def _tried_twice(model: HeadModel, tokens: Tensor, real: Tensor) -> Engine:
    try:
        return _tried(model, tokens, real)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()  # not inside except, where the traceback still holds tensors
    return _tried(model, tokens, real)


def _in_scope(model: HeadModel) -> bool:
    """Whether the model is already being edited, which a replay would apply twice or not at all."""
    return isinstance(model, HFModel) and bool(use_of(model.module).scopes)


def _trial(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Cut two short trial rows from the first example; one padded if the batch has padding."""
    text = tokens[0, real[0]][:_TRIAL_LENGTH]
    rows = torch.stack([text, text.roll(1)])
    shown = torch.ones_like(rows, dtype=torch.bool)
    if not bool(real.all()) and len(text) > 2:
        shown[1, :1] = False
    return rows, shown


@torch.no_grad()
def _tried(model: HeadModel, tokens: Tensor, real: Tensor, *, replay: bool = True) -> Engine:
    read = torch.zeros_like(real)
    read[:, -1] = True
    own = model.forward(tokens, real=real)[read.to(model.device)].float()
    limit = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    # Layers without attention carry state from position to position, and where later keys are
    # visible, an edit changes earlier positions too.
    plain = len(model.shape.attention_layers) == model.shape.n_layers and all_causal(model.stacks)
    for prefix in (True, False) if replay else ():
        if (
            isinstance(model, HFModel)
            and (plain or not prefix)
            and "unembedding" not in model.limits
        ):
            engine = Engine(True, prefix, 0.0)
            error = _largest(_noop_errors, model, engine, tokens, real, read, own)
            if (
                error <= limit
                and _largest(_edit_errors, model, engine, tokens, real, read) <= limit
            ):
                return Engine(True, prefix, error)
    engine = Engine(False, False, 0.0)
    error = _largest(_noop_errors, model, engine, tokens, real, read, own)
    engine = _resuming(model, Texts(tokens, real)) if replay else engine
    return replace(engine, noop_error=error)


def _largest(
    errors_of: Callable[..., list[float]], model: HeadModel, engine: Engine, *given: Tensor
) -> float:
    """Largest of some errors; infinite if one is NaN or the blocks do not run on their own."""
    try:
        errors = errors_of(model, engine, *given)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, UnsupportedModelError) as e:
        if is_out_of_memory(e) or not engine.replays:
            raise
        return float("inf")  # this architecture's blocks cannot run on their own
    return max(errors) if all(error == error for error in errors) else float("inf")


def _noop_errors(
    model: HeadModel, engine: Engine, tokens: Tensor, real: Tensor, read: Tensor, own: Tensor
) -> list[float]:
    """Errors of no-op edits, from the first and from a middle layer and position on."""
    source = engine.source(model, tokens, real, read)
    errors = []
    for layer, where in _starts(model, real):
        noop = scale((layer, 0), 1.0, positions=where)
        again = source.logits(source.rows([(noop,), (noop,)])).float()
        difference = (again.view(2, *own.shape) - own).abs().max()
        errors.append(float(difference / own.abs().max().clamp_min(1e-12)))
    return errors


def _edit_errors(
    model: HeadModel, engine: Engine, tokens: Tensor, real: Tensor, read: Tensor
) -> list[float]:
    """Errors of replays with all heads of a layer zeroed, against whole passes.

    This exposes state that passes from layer to layer beside the residual stream (such as the
    router states of zaya): a replay would take it from the clean run, which no-op edits do not
    reveal.
    """
    source, whole = (
        engine.source(model, tokens, real, read),
        ForwardSource(model, tokens, real, read),
    )
    errors = []
    for layer, where in _starts(model, real):
        heads = [head for head in model.shape.heads if head.layer == layer]
        off = [(scale(heads, 0.0, positions=where),)]
        expected = whole.rows(off).float()
        difference = (source.logits(source.rows(off)).float() - expected).abs().max()
        errors.append(float(difference / expected.abs().max().clamp_min(1e-12)))
    return errors


def _starts(model: HeadModel, real: Tensor) -> list[tuple[int, Tensor | None]]:
    """Starting points: the first layer at all positions; a middle layer and position."""
    layers = model.shape.attention_layers
    late = torch.zeros_like(real)
    late[:, real.shape[1] // 2 :] = True
    return [(layers[0], None), (layers[len(layers) // 2], late)]


@dataclass(eq=False)
class MetricReading:
    """A metric, and the rows it reads among the positions whose logits are computed.

    Attributes:
        read: positions that the metric reads.
        among: positions whose logits are computed; contains ``read``.
        inside: indices into the latter of the rows that the metric reads.
        reference: clean logits of those rows, if the metric compares with the clean run.
    """

    probe: Probe
    metric: AnyMetric
    read: Bool[Tensor, "batch pos"]
    among: InitVar[Bool[Tensor, "batch pos"]]
    inside: Bool[Tensor, " row"] = field(init=False)
    reference: Tensor | None = None

    def __post_init__(self, among: Bool[Tensor, "batch pos"]) -> None:
        """Find and number the metric's rows."""
        self.inside = self.read[among]
        self._all = bool(self.inside.all())
        self._number = self.inside.cumsum(0) - 1

    def own(self, logits: Float[Tensor, "row d_vocab"], at: Int[Tensor, " row"]) -> Tensor:
        """Select the metric's rows from the logits of some positions.

        Args:
            logits: logits at some positions of a run.
            at: which positions they are.
        """
        return logits if self._all else logits[self.inside[at].to(logits.device)]

    def numbers(self, logits: Float[Tensor, "row d_vocab"], at: Int[Tensor, " row"]) -> Tensor:
        """Metric at each of its rows, or of a whole run if it is a function of all logits."""
        if isinstance(self.metric, WholeMetric):
            return self.metric(logits.view(*self.read.shape, -1), self.probe)
        mine = self._number[at[self.inside[at]]].to(logits.device)
        return self.metric.value(self.facts(self.own(logits, at), mine))

    def facts(
        self, logits: Float[Tensor, "row d_vocab"], number: Tensor | slice = slice(None)
    ) -> LogitRows:
        """Build the metric's rows, with what the probe says about them.

        Args:
            logits: logits at some of the positions that the metric reads.
            number: index. Default: all of one run.
        """
        probe, device = self.probe, logits.device
        return LogitRows(
            logits,
            probe.targets[self.read].to(device)[number],
            None if probe.foils is None else probe.foils[self.read].to(device)[number],
            None if self.reference is None else self.reference[number].float(),
        )

    def by_example(self, parts: Sequence[Tensor], runs: int) -> Float[Tensor, "run batch"]:
        """Average rows to one number per run and example; NaN where the metric reads nothing."""
        numbers = torch.cat(list(parts)).cpu().double()
        if not isinstance(self.metric, Metric):
            return numbers.view(runs, -1)
        example = self.read.nonzero()[:, 0].cpu()
        count = torch.bincount(example, minlength=len(self.probe))
        total = numbers.new_zeros(runs, len(self.probe))
        return total.index_add(1, example, numbers.view(runs, len(example))) / count


def partner_rows(
    model: HeadModel, probe: Probe, metrics: Sequence[AnyMetric]
) -> Float[Tensor, "row d_vocab"] | None:
    """Clean rows of every example's partner; None if no metric needs them.

    Args:
        model: the model to run.
        probe: with partners, if a metric needs them.
        metrics: metrics that read the run.
    """
    asking = [one for one in metrics if "pair" in one.needs]
    if not asking or probe.corrupt is None:
        return None
    partner = replace(probe.corrupt, corrupt=probe)
    read = asking[0].reads(partner)
    source = ForwardSource(model, partner.tokens, partner.real, read, inputs=partner.inputs)
    rows: Tensor = source.clean()
    return rows.float()


# Tokens of one stack: on a CPU what fits its caches, on a GPU what gives each multiprocessor four
# tiles of 128 rows.
CPU_STACK, _ROWS_PER_PROCESSOR = 1024, 4 * 128
# Rows whose logits are computed at once.
_ROWS = 512
# Seconds between writes of a checkpoint.
_EVERY = 5.0

Keep = Callable[[list[int], Float[Tensor, "metric variant batch"]], None]


def stack_tokens(model: HeadModel, memory: int | None) -> int:
    """Number of tokens in one stack of variants.

    Args:
        model: the model, whose device decides.
        memory: bytes that a stack's activations may take; None: what suits the device.
    """
    if memory is not None:
        width = 16 * model.shape.d_model * model.dtype.itemsize
        return max(1, memory // width)
    return gpu_stack(model.device) if model.device.type == "cuda" else CPU_STACK


@cache
def gpu_stack(device: torch.device) -> int:
    """Number of tokens in one stack on a GPU, read from the device once per process.

    It depends on the kind of device and never on timing: stacks of the same size give the same
    sums, so two workers on the same kind of device write identical tables.
    """
    return _ROWS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass
class RecordedBatch:
    """A batch of a probe that was run once cleanly and is ready for variants.

    Attributes:
        metric: the metric that :meth:`values` returns.
        read: positions whose logits are computed.
        limit: tokens per stack; halved whenever memory runs out.
        reads: metrics that share the runs, each with the positions that it reads; default:
            ``metric`` at ``read``.
        partner: clean rows of every example's partner, if a metric compares with them.
        all_clean: every metric on the unedited batch.
    """

    probe: Probe
    metric: AnyMetric
    source: Source
    read: Bool[Tensor, "batch pos"]
    limit: int
    reads: Sequence[tuple[AnyMetric, Bool[Tensor, "batch pos"]]] = ()
    partner: Float[Tensor, "row d_vocab"] | None = None
    readings: tuple[MetricReading, ...] = field(init=False)
    all_clean: Float[Tensor, "metric batch"] = field(init=False)

    def __post_init__(self) -> None:
        """Read the metrics on the clean run."""
        reads = self.reads or [(self.metric, self.read)]
        self.readings = tuple(
            MetricReading(self.probe, one, read, self.read) for one, read in reads
        )
        rows = self.source.clean()
        for reading in self.readings:
            if "pair" in reading.metric.needs:
                reading.reference = self.partner
            if "clean" in reading.metric.needs:
                reading.reference = torch.cat(
                    [reading.own(logits, at) for logits, at in self._logits(rows, _ROWS)]
                )
        self.all_clean = self._reduced([rows])[:, 0]

    @classmethod
    def of(
        cls,
        model: HeadModel,
        engine: Engine,
        probe: Probe,
        reads: Sequence[tuple[AnyMetric, Bool[Tensor, "batch pos"]]],
        limit: int,
    ) -> "RecordedBatch":
        """Run a batch cleanly."""
        read = torch.stack([one for _, one in reads]).any(0)
        if not bool(read.any()):  # every run has to read some position
            read[0, int(probe.last[0])] = True
        source = engine.source(model, probe.tokens, probe.real, read, probe.inputs)
        partner = partner_rows(model, probe, [one for one, _ in reads])
        return cls(probe, reads[0][0], source, read, limit, reads, partner)

    @property
    def clean(self) -> Float[Tensor, " batch"]:
        """The metric on the unedited batch."""
        return self.all_clean[0]

    def values(
        self, variants: Sequence[Variant], advance: Advance | None = None
    ) -> Float[Tensor, "variant batch"]:
        """Metric of every variant on every example."""
        return self.all_values(variants, advance)[0]

    def all_values(
        self,
        variants: Sequence[Variant],
        advance: Advance | None = None,
        keep: Keep | None = None,
    ) -> Float[Tensor, "metric variant batch"]:
        """Every metric of every variant on every example; each variant is run once.

        Args:
            variants: the variants to run.
            advance: callback with the number of finished examples.
            keep: callback with the indices and values of finished variants.
        """
        size = (len(self.readings), len(variants), len(self.probe))
        done = torch.full(size, float("nan"), dtype=torch.float64)
        waiting: list[tuple[list[int], Tensor]] = []
        per_variant, since = int(self.read.sum()), time.monotonic()
        for chosen, rows in self._stacks(variants):
            waiting.append((chosen, rows))
            due = keep is not None and time.monotonic() - since > _EVERY
            if due or sum(len(index) for index, _ in waiting) * per_variant >= _ROWS:
                self._flush(waiting, done, keep)
                since = time.monotonic()
            if advance is not None:
                advance(float(len(chosen) * len(self.probe)))
        self._flush(waiting, done, keep)
        return done

    def _flush(
        self, waiting: list[tuple[list[int], Tensor]], done: Tensor, keep: Keep | None
    ) -> None:
        if waiting:
            index = [number for chosen, _ in waiting for number in chosen]
            done[:, index] = self._reduced([rows for _, rows in waiting])
            waiting.clear()
            if keep is not None:
                keep(index, done[:, index])

    def _stacks(self, variants: Sequence[Variant]) -> Iterator[tuple[list[int], Tensor]]:
        """Run the variants in stacks: grouped by first layer, late positions first."""
        starts = [self.source.start(variant) for variant in variants]
        order = sorted(range(len(variants)), key=lambda i: (starts[i][0], -starts[i][1], i))
        at = 0
        while at < len(order):
            count = self._fitting([starts[i] for i in order[at:]])
            chosen = order[at : at + count]
            rows = None
            try:
                rows = self.source.rows([variants[i] for i in chosen])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or count == 1:
                    raise
            if rows is None:
                self.limit //= 2
                free_cached_memory()
                continue
            yield chosen, rows
            at += count

    def _fitting(self, starts: Sequence[tuple[int, int]]) -> int:
        """Number of these variants that fit in the next stack."""
        count = 0
        for layer, first in starts:
            tokens = (count + 1) * len(self.probe) * (self.probe.length - first)
            if count and (layer != starts[0][0] or tokens > self.limit):
                break
            count += 1
        return count

    def _reduced(self, parts: Sequence[Tensor]) -> Float[Tensor, "metric variant batch"]:
        """Reduce rows to one number per metric, variant and example, whole variants in order."""
        rows = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        size = int(self.read.sum())
        whole = any(isinstance(one.metric, WholeMetric) for one in self.readings)
        found: list[list[Tensor]] = [[] for _ in self.readings]
        for logits, at in self._logits(rows, size if whole else _ROWS):
            for reading, numbers in zip(self.readings, found, strict=True):
                numbers.append(reading.numbers(logits, at))
        pairs = zip(self.readings, found, strict=True)
        return torch.stack([one.by_example(numbers, len(rows) // size) for one, numbers in pairs])

    def _logits(self, rows: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits for some rows at a time, with their positions in the variant."""
        size = int(self.read.sum())
        for start in range(0, len(rows), step):
            logits = self.source.logits(rows[start : start + step]).float()
            yield logits, torch.arange(start, start + len(logits)) % size


# The metric of a replay and of a whole pass may differ by this, beside the metric's own size.
_AGREEMENT = 1e-3
_HALF_AGREEMENT = 1e-1
_SILENT_LENGTH = 16


@dataclass
class _Layer:
    """Reader that keeps the outputs of one layer."""

    layer: int
    z: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def reads(self) -> Reads:
        """Taps to read: the layer's outputs."""
        return {Tap("z", self.layer): self._keep}

    def _keep(self, view: TapView) -> None:
        self.z = view.z.float().clone()


def proofs(
    model: HeadModel, engine: Engine, batch: RecordedBatch, place: Place, heads: Sequence[HeadIndex]
) -> dict[str, Any]:
    """Check on one example, with a head from the middle of the list, that edits work as intended.

    Returns:
        ``engine``; ``noop_error``: change of the logits under a no-op edit, as a share of the
        largest logit; ``head_checked``; ``own_output_changed``; ``other_heads_changed``: the same
        for the other heads of the layer (must be 0); ``replay_error``: largest difference over
        metrics between replay and a whole pass; ``heads_off_error``: how much of the logits still
        depends on other positions when all heads are zeroed (0: nothing).

    Raises:
        HeadscopeError: if an edit changed another head of its layer, or if replay and whole pass
            disagree.
    """
    head = heads[len(heads) // 2]
    changed, error = _check_head(model, engine, batch, place, head)
    return {
        "engine": engine.name,
        "prefix_reuse": engine.prefix,
        "noop_error": engine.noop_error,
        "head_checked": str(head),
        "own_output_changed": changed,
        "other_heads_changed": 0,
        "replay_error": error,
        "heads_off_error": heads_off_error(model, batch),
    }


@torch.no_grad()
def _check_head(
    model: HeadModel, engine: Engine, batch: RecordedBatch, place: Place, head: HeadIndex
) -> tuple[bool, float | None]:
    """Change of the head's own output, and difference between replay and a whole pass."""
    at = int(batch.read.any(1).nonzero()[0])  # an example that the metrics read
    chosen = slice(at, at + 1)
    one, read = batch.probe.examples(chosen), batch.read[chosen]
    reads = [(reading.metric, reading.read[chosen]) for reading in batch.readings]
    variant: Variant = cut((place([head]),), examples=chosen)
    after = _Layer(head.layer)
    whole_pass = ForwardSource(model, one.tokens, one.real, read, after.reads, inputs=one.inputs)
    partner = partner_rows(model, one, [metric for metric, _ in reads])
    alone = RecordedBatch(one, batch.metric, whole_pass, read, batch.limit, reads, partner)
    whole = alone.all_values([variant])
    z = _clean_z(model, batch, head.layer, chosen)
    difference = (after.z - z).abs().amax((0, 1, 3))
    others = torch.arange(len(difference), device=difference.device) != head.head
    if not bool((difference[others] <= 1e-5 * (float(z.abs().max()) or 1.0)).all()):  # also if NaN
        raise HeadscopeError(
            f"ablating {head} changed the output of another head of its layer: refusing an edit "
            "that is not confined to its head."
        )
    changed = bool(difference[head.head] > 0)
    if not (engine.replays or engine.resumes):
        return changed, None
    source = engine.source(model, one.tokens, one.real, read, one.inputs)
    again = RecordedBatch(one, batch.metric, source, read, batch.limit, reads, partner)
    replayed = again.all_values([variant])
    errors = (whole - replayed).abs().nan_to_num()
    error = float(errors.max())
    allowed = _AGREEMENT if model.dtype in (torch.float32, torch.float64) else _HALF_AGREEMENT
    if bool((errors > allowed * whole.abs().nan_to_num().clamp_min(1.0)).any()):
        raise HeadscopeError(
            f"ablating {head} by replay and by a whole pass gives metrics that differ by "
            f"{error:.2g}: refusing to replay this model."
        )
    return changed, error


def _clean_z(
    model: HeadModel, batch: RecordedBatch, layer: int, chosen: slice
) -> Float[Tensor, "1 pos head d_head"]:
    """Head outputs of a layer on one example, unedited.

    The example is run alone, like the edited pass: in a larger batch rounding differs, and a deep
    model amplifies the difference beyond the tolerance.
    """
    before, one = _Layer(layer), batch.probe.examples(chosen)
    model.run(one, reads=before.reads, logits_at=torch.empty(0, dtype=torch.long))
    return before.z


@torch.no_grad()
def heads_off_error(model: HeadModel, batch: RecordedBatch) -> float | None:
    """How much the last logits depend on earlier tokens when all heads are zeroed.

    Without attention nothing can move between positions. As a share of the largest logit; None if
    it cannot be measured (a single token, layers without attention that mix positions, or inputs
    other than tokens).
    """
    if batch.probe.inputs:
        return None
    text = batch.probe.tokens[0, batch.probe.real[0]][:_SILENT_LENGTH]
    hybrid = len(model.shape.attention_layers) < model.shape.n_layers
    if hybrid or len(text) < 2:
        return None
    tokens = torch.stack([text, torch.cat([text[:-1].flip(0), text[-1:]])])
    last = torch.tensor([len(text) - 1])
    off = model.forward(tokens, edits=(zero(model.shape.heads),), logits_at=last).float()
    return float((off[0] - off[1]).abs().max() / off.abs().max().clamp_min(1e-12))
