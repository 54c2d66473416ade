"""Two ways to run edited variants of a batch, with the same numbers: replay, or whole passes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.options import free_cached_memory, is_out_of_memory, keep_freed_memory
from headscope.base.stacks import all_causal
from headscope.edits import Variant, scale, stack
from headscope.errors import UnsupportedModelError
from headscope.models.hf.model import HFModel
from headscope.models.hf.replay import Replay, quick_activations, record
from headscope.models.protocol import HeadModel
from headscope.models.running import use_of
from headscope.models.taps import Read, Tap, TapView, Texts, Write, writes_of

# A replay must give the model's own logits to this share of the largest; half precision keeps
# about three digits.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 5e-2
_TRIAL_LENGTH = 32


@runtime_checkable
class Source(Protocol):
    """One batch, ready to be run with edits."""

    @property
    def z(self) -> dict[int, Tensor] | None:
        """Clean head outputs by layer, where they were kept."""

    def start(self, variant: Variant) -> tuple[int, int]:
        """First layer and first position that a variant runs."""

    def rows(self, variants: Sequence[Variant]) -> Tensor:
        """What :meth:`logits` makes logits of: every position read of every variant, in order."""

    def values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """What some taps hold in every variant, ``[variant batch *rest]``."""

    def logits(self, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
        """Logits of such rows."""

    def clean(self) -> Tensor:
        """Rows of the unedited batch."""


def kept_in(found: dict[Tap, Tensor], copies: int) -> Read:
    """A reader that keeps what it reads, the variants of a stack apart."""

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
        """First layer and first position that a variant runs."""
        return self.replay.start(variant)

    def rows(self, variants: Sequence[Variant]) -> Tensor:
        """Last residual stream at the positions read."""
        rows = self.replay.run(variants)
        assert rows is not None  # noqa: S101  # nothing stops it before
        return rows

    def values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """What some taps hold in every variant, ``[variant batch *rest]``."""
        found: dict[Tap, Tensor] = {}
        self.replay.run(variants, reads=dict.fromkeys(taps, kept_in(found, len(variants))))
        return found

    def logits(self, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
        """Final norm and unembedding."""
        return self.replay.logits(rows)

    def clean(self) -> Tensor:
        """Last residual stream of the recorded pass."""
        final = self.replay.recording.final
        return final[self.replay.on_host.nonzero(as_tuple=True)]


@dataclass(frozen=True, eq=False)
class ForwardSource:
    """Whole passes, one per stack of variants."""

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
        """Run everything."""
        return 0, 0

    def rows(self, variants: Sequence[Variant]) -> Tensor:
        """Logits at the positions read."""
        if _in_scope(self.model):  # whose edits may be values of each example
            return torch.cat([self._stacked((variant,)) for variant in variants])
        return self._stacked(variants)

    def _stacked(self, variants: Sequence[Variant]) -> Tensor:
        copies = len(variants)
        read = self.read.cpu()
        at = read.any(0).nonzero().squeeze(1)
        with quick(self.model):
            logits = self.model.run(
                self._texts.repeated(copies),
                reads=self.reads,
                writes=self.writes(variants),
                logits_at=at,
            )
        assert logits is not None  # noqa: S101  # they were asked for
        return logits[read[:, at].repeat(copies, 1).nonzero(as_tuple=True)]

    def writes(self, variants: Sequence[Variant]) -> Mapping[Tap, Write]:
        """What a stack of variants writes."""
        return writes_of(stack(variants))

    def values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        """What some taps hold in every variant, ``[variant batch *rest]``."""
        if _in_scope(self.model):
            parts = [self._values_at((variant,), taps) for variant in variants]
            return {tap: torch.cat([part[tap] for part in parts]) for tap in taps}
        return self._values_at(variants, taps)

    def _values_at(self, variants: Sequence[Variant], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
        found: dict[Tap, Tensor] = {}
        copies = len(variants)
        self.model.run(
            self._texts.repeated(copies),
            reads=dict.fromkeys(taps, kept_in(found, copies)),
            writes=self.writes(variants),
            logits_at=torch.empty(0, dtype=torch.long),
        )
        return found

    def logits(self, rows: Tensor) -> Float[Tensor, "row d_vocab"]:
        """They are logits already."""
        return rows

    def clean(self) -> Tensor:
        """Logits of the unedited batch."""
        return self.rows([()])


@dataclass(frozen=True)
class Engine:
    """How a model is run, and how far a pass that edits nothing is from the model's own logits.

    Attributes:
        replays: whether parts of a pass can be run again.
        prefix: whether positions before the first edit can be kept.
        noop_error: largest difference of logits, as a share of the largest logit.
    """

    replays: bool
    prefix: bool
    noop_error: float

    def source(
        self,
        model: HeadModel,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        read: Bool[Tensor, "batch pos"],
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Source:
        """Make a batch ready; ``inputs`` are what the model reads beside tokens."""
        if not self.replays or not isinstance(model, HFModel):
            return ForwardSource(model, tokens, real, read, inputs=inputs)
        padding = None if bool(real.all()) else real
        recording = record(model, tokens, padding)
        return ReplaySource(Replay(model, recording, read, self.prefix, lean=self.prefix))


def quick(model: HeadModel) -> AbstractContextManager[None]:
    """Scope of one pass in which a model's own modules run their faster equals."""
    return quick_activations(model) if isinstance(model, HFModel) else nullcontext()


# By model, and whether a batch is padded and of which type: an engine speaks of nothing else.
_ENGINES: "WeakKeyDictionary[HeadModel, dict[tuple[bool, torch.dtype], Engine]]" = (
    WeakKeyDictionary()
)


def engine_for(
    model: HeadModel,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    inputs: Mapping[str, Tensor] = MappingProxyType({}),
) -> Engine:
    """The fastest way to run a model that gives its own logits when nothing is edited.

    Tried once per model, on two short texts of the batch: suffix replay with kept prefixes and a
    last block cut to what is read; suffix replay alone; whole passes. Running out of memory says
    nothing about a model: then memory is freed and the trial taken again, or its error raised.
    A model that reads more than tokens is run in whole passes.
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
    """Whole passes, with the error of an edit of nothing on the first example."""
    inputs = {name: value[:1] for name, value in texts.inputs.items()}
    first = Texts(texts.tokens[:1], None if texts.real is None else texts.real[:1], inputs)
    layers = model.shape.attention_layers
    noop = scale((layers[len(layers) // 2], 0), 1.0)
    own, again = (model.run(first, writes=writes_of(edits)) for edits in ((), (noop,)))
    assert own is not None  # noqa: S101  # logits were asked for
    assert again is not None  # noqa: S101
    error = (again - own).abs().max() / own.abs().max().clamp_min(1e-12)
    return Engine(False, False, float(error))


def _tried_twice(model: HeadModel, tokens: Tensor, real: Tensor) -> Engine:
    try:
        return _tried(model, tokens, real)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()  # not above, where the error still holds what was allocated
    return _tried(model, tokens, real)


def _in_scope(model: HeadModel) -> bool:
    """Whether the model is being edited now, which a replay would do twice or not at all."""
    return isinstance(model, HFModel) and bool(use_of(model.module).scopes)


def _trial(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows from the first example's text; with padding in one if the batch has any."""
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
    # Layers without attention carry a state of their own from position to position, and where later
    # keys are seen an edit changes the positions before it too.
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
    return Engine(False, False, _largest(_noop_errors, model, engine, tokens, real, read, own))


def _largest(
    errors_of: Callable[..., list[float]], model: HeadModel, engine: Engine, *given: Tensor
) -> float:
    """The largest of some errors; infinite where one is NaN or parts do not run on their own."""
    try:
        errors = errors_of(model, engine, *given)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, UnsupportedModelError) as e:
        if is_out_of_memory(e) or not engine.replays:
            raise
        return float("inf")  # this architecture's blocks do not run on their own
    return max(errors) if all(error == error for error in errors) else float("inf")


def _noop_errors(
    model: HeadModel, engine: Engine, tokens: Tensor, real: Tensor, read: Tensor, own: Tensor
) -> list[float]:
    """Of edits that change nothing, from the first and from a middle layer and position on."""
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
    """Of layers whose heads are all zeroed, against whole passes.

    Shows what passes from layer to layer beside the residual stream (as the router states of
    zaya): a replay would take it from the clean run, which edits of nothing do not tell.
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
    """The first layer, everywhere; and a middle one, from a middle position on."""
    layers = model.shape.attention_layers
    late = torch.zeros_like(real)
    late[:, real.shape[1] // 2 :] = True
    return [(layers[0], None), (layers[len(layers) // 2], late)]
