"""The pass engine: one run of a model with reads and writes at its taps.

A model says where its taps are; here they are read and written, and the pass ends as soon as
nothing is left to see. Which positions a model's own passes run is told by their cache and by
``generate``.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.batches import PATCHES, PIXELS, TEXT, TOKENS, Batch
from headscope.base.stacks import CAUSAL, MaskRule, PatchGrid, Stack
from headscope.edits import Span
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import ModelShape
from headscope.models.hf.hooks import Call, Hook, before, entering, hooked, leaving
from headscope.models.protocol import Edit, LayerView
from headscope.models.running import Finished, pass_over, use_of
from headscope.models.taps import (
    Read,
    Tap,
    TapView,
    TextBatch,
    Texts,
    Write,
    checked_taps,
    writes_of,
)

_NOTHING: Mapping[Any, Any] = MappingProxyType({})


@dataclass(eq=False)
class Pass:
    """One pass with its taps.

    Attributes:
        model: model to run.
        reads, writes: functions by tap.
        span: positions that the pass runs.
        until: tap after which it stops.
        stops: whether it stops once every tap was seen.
        grad: whether gradients are tracked: then what is read is what the pass goes on with.
        real: False at padding, on the model's device; None if there is none.
        inputs: what the model reads beside tokens.
    """

    model: Any
    reads: Mapping[Tap, Read]
    writes: Mapping[Tap, Write]
    span: Span
    until: Tap | None = None
    stops: bool = False
    grad: bool = False
    real: Bool[Tensor, "batch pos"] | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    missing: set[Tap] = field(init=False)
    finals: int = 0

    def __post_init__(self) -> None:
        """Note what there is to see."""
        self.missing = {*self.reads, *self.writes}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context manager that hooks the model for one pass."""
        with ExitStack() as stack:
            stack.enter_context(pass_over(self.model.module, self))
            stack.enter_context(hooked(self._stream_hooks()))
            stack.enter_context(self.model.attention_taps(self))
            yield

    @property
    def acts(self) -> bool:
        """Whether it is this pass that runs now, and not one inside it or beside it."""
        return use_of(self.model.module).running() is self

    def is_read(self, tap: Tap) -> bool:
        """Whether some read or write uses a tap, or the pass ends there."""
        return tap in self.reads or tap == self.until

    def touches(self, layer: int, *sites: str) -> bool:
        """Whether some of these sites of a layer are read or written."""
        taps = [Tap(site, layer) for site in sites]
        return any(self.is_read(tap) or tap in self.writes for tap in taps)

    def through(
        self,
        tap: Tap,
        value: Tensor,
        before: Sequence[Mapping[Tap, Write]] = (),
        span: Span | None = None,
        view: LayerView | None = None,
    ) -> Tensor:
        """Apply the writes of a tap to a value, and pass it to its readers.

        Args:
            tap: where it is.
            value: what is there.
            before: writes of scopes, which come first.
            span: positions of the value; default: those of the pass.
            view: the attention layer, for readers.
        """
        span = self.span if span is None else span
        value = written(tap, value, (*before, self.writes), span)
        if self.grad and self.is_read(tap):
            value = value.view_as(value)  # so that what was read is what the pass goes on with
        self.show(TapView(tap, span, view, value))
        return value

    def show(self, view: TapView) -> None:
        """Pass a tap to its reader, and end the pass if nothing is left to read."""
        tap = view.tap
        read = self.reads.get(tap)
        if read is not None:
            read(view)
        self.missing.discard(tap)
        ends = tap == self.until and tap.site != "logits"
        if ends or (self.stops and self.until is None and not self.missing):
            raise Finished

    # The residual stream: hooks on blocks, on the modules of each that write, on the final norm.

    def _stream_hooks(self) -> list[Hook]:
        found: list[Hook] = []
        parts = self.model.parts
        for tap in dict.fromkeys((*self.writes, *self.reads, *filter(None, [self.until]))):
            if tap.site in ("embed", "resid_pre"):
                found.append(entering(parts.block(tap.layer or 0), self._entered(tap)))
            elif tap.site == "resid_post":
                found.append(leaving(parts.block(tap.layer), self._left(tap)))
            elif tap.site == "head_sum":
                found.append(leaving(parts.projection(tap.layer), self._left(tap)))
            elif tap.site in ("attn_out", "mlp_out"):
                module, scale = parts.writer(tap.layer, tap.site)
                found.append(leaving(module, self._left(tap, scale)))
            elif tap.site == "final_resid":
                found.append(entering(self._final_norm(), self._at_final))
        return found

    def _final_norm(self) -> nn.Module:
        norm: nn.Module | None = self.model.final_entry
        if norm is None:
            raise UnsupportedModelError(
                f"{self.model.name} has no plain norm before its unembedding, so its final_resid "
                "cannot be told: read resid_post of the last layer."
            )
        return norm

    def _entered(self, tap: Tap) -> Callable[[Tensor], Tensor | None]:
        def entered(given: Tensor) -> Tensor | None:
            value = self.through(tap, given) if self.acts else given
            return None if value is given else value

        return entered

    def _at_final(self, given: Tensor) -> Tensor | None:
        if not self.acts:
            return None
        self.finals += 1
        if self.finals < self.model.final_uses:
            return None  # the model uses its final norm for something else before
        value = self.through(Tap("final_resid"), given)
        return None if value is given else value

    def _left(self, tap: Tap, scale: float = 1.0) -> Callable[[Tensor], Tensor | None]:
        def left(given: Tensor) -> Tensor | None:
            if not self.acts:
                return None
            # Some modules flatten batch and positions.
            shaped = given.reshape(-1, self.span.count, given.shape[-1])
            value = self.through(tap, shaped if scale == 1 else shaped * scale)
            if tap not in self.writes and not self.grad:
                return None
            made = value if scale == 1 else value / scale
            return made.reshape(given.shape).to(given.dtype)

        return left


def written(tap: Tap, value: Tensor, sources: Sequence[Mapping[Tap, Write]], span: Span) -> Tensor:
    """Apply the writes of several sources to a value, in order."""
    for writes in sources:
        write = writes.get(tap)
        if write is not None:
            value = write(value, span)
    return value


class Tapped(ABC):
    """Base of models that run by taps; see :class:`headscope.models.protocol.HeadModel`."""

    name: str
    shape: ModelShape
    module: Any

    @property
    @abstractmethod
    def limits(self) -> Mapping[str, str]:
        """What this family cannot be asked, and why."""

    @property
    def mask(self) -> MaskRule:
        """Rule of the model's attention, windows of single layers apart."""
        return CAUSAL

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """Attention stacks by name; a text model with a single one has it under an empty name."""
        shape, grid = self.shape, self.grid
        runs_over = TEXT if grid is None else PATCHES
        stack = Stack(
            shape.stack,
            shape.n_layers,
            shape.n_heads,
            shape.n_kv_heads,
            shape.d_head,
            self.mask,
            queries=runs_over,
            keys=runs_over,
            windows=shape.windows,
            grid=grid,
        )
        return {shape.stack: stack}

    @property
    def grid(self) -> PatchGrid | None:
        """How it cuts images into positions; None if it reads texts."""
        return None

    def taps(
        self, reads: Mapping[Any, Read], writes: Mapping[Any, Write]
    ) -> tuple[dict[Tap, Read], dict[Tap, Write]]:
        """Functions by tap, checked.

        Raises:
            InputError: if a tap is not one of the model's.
        """
        return (
            checked_taps(reads, self.name, self.shape),
            checked_taps(writes, self.name, self.shape, writing=True),
        )

    @property
    def has_logits(self) -> bool:
        """Whether it gives a logit of every token at every position."""
        return True

    @property
    def final_uses(self) -> int:
        """How often a pass uses the final norm; the last time before the unembedding."""
        return 1

    def n_queries(self, texts: Texts) -> int:
        """How many positions a pass over a batch runs.

        Raises:
            InputError: if the model reads images and the batch holds none, or the other way.
        """
        if self.grid is None:
            if PIXELS in texts.inputs:
                self.need_images(texts)
            return int(texts.tokens.shape[1])
        images = PIXELS in texts.inputs
        given = Batch(texts.inputs if images else {TOKENS: texts.tokens}, {})
        misfit = given.misfit(self.name, None, 0, self.grid)
        if misfit is not None or self.grid is None:
            raise InputError(str(misfit))
        return self.grid.length

    def need_images(self, texts: Texts) -> None:
        """Refuse texts with images in them where the model does not read such.

        Raises:
            InputError: if it does not, or no image stands in a text.
        """
        raise InputError(
            f"the probe holds images beside its texts, and {self.name} reads texts alone: leave "
            "them out, or load a vision-language model."
        )

    def check_batch(self, texts: Texts) -> None:  # noqa: B027  # most families have no such batch
        """Refuse a batch that the model cannot read in one way only, before it runs.

        Raises:
            InputError: if the family reads it differently under different attention kernels.
        """

    @abstractmethod
    def attention_taps(self, run: Pass) -> AbstractContextManager[None]:
        """Scope in which attention runs with the taps of a pass."""

    @abstractmethod
    def compute(
        self,
        tokens: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"] | None,
        logits_at: Int[Tensor, " at"] | None,
        run: Pass,
    ) -> Float[Tensor, "batch at d_vocab"]:
        """Logits of a pass; none need to be computed where it stops before."""

    def run(
        self,
        batch: Batch | TextBatch | Texts | Int[Tensor, "batch pos"],
        *,
        reads: Mapping[Any, Read] = _NOTHING,
        writes: Mapping[Any, Write] = _NOTHING,
        until: Any = None,
        logits_at: Int[Tensor, " at"] | None = None,
        prompt: int | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch at d_vocab"] | None:
        """Run the model once, reading and writing at taps; see :class:`HeadModel`."""
        texts = Texts.of(batch)
        self.check_batch(texts)
        reads_at, writes_at = self.taps(reads, writes)
        if not self.has_logits:
            if any(tap.site == "logits" for tap in (*reads_at, *writes_at)):
                raise UnsupportedModelError(self.limits["logits"])
            logits_at = torch.empty(0, dtype=torch.long)
        end = None if until is None else next(iter(self.taps({until: id}, {})[0]))
        empty = logits_at is not None and len(logits_at) == 0
        if grad and not any(one.requires_grad for one in self.module.parameters()):
            writes_at = self.taps({}, _with_root(writes))[1]
        run = Pass(
            self,
            reads_at,
            writes_at,
            self._span(texts, prompt),
            end,
            stops=empty or (end is not None and end.site != "logits"),
            grad=grad,
            inputs=texts.inputs,
        )
        return self._logits_of(run, texts, logits_at)

    def answer(
        self,
        batch: Batch | TextBatch | Texts | Int[Tensor, "batch pos"],
        *,
        reads: Mapping[Any, Read] = _NOTHING,
        writes: Mapping[Any, Write] = _NOTHING,
        logits_at: Int[Tensor, " at"] | None = None,
    ) -> Float[Tensor, "batch at width"] | None:
        """What the model itself says in a run: its last hidden states where it gives no logits."""
        texts = Texts.of(batch)
        run = Pass(
            self, *self.taps(reads, writes), self._span(texts, None), None, inputs=texts.inputs
        )
        return self._logits_of(run, texts, logits_at)

    def _span(self, texts: Texts, prompt: int | None) -> Span:
        """All positions of the texts."""
        length = self.n_queries(texts)
        real = None if texts.real is None or texts.real.shape[1] != length else texts.real
        return Span(0, length, length if prompt is None else prompt, real=real)

    def _logits_of(
        self, run: Pass, texts: Texts, logits_at: Int[Tensor, " at"] | None
    ) -> Float[Tensor, "batch at width"] | None:
        """Logits of a pass through its writes and reads; None if it stops before."""
        if run.stops and not (run.missing or run.until):
            return None  # there is nothing to see
        try:
            logits = self.compute(texts.tokens, texts.real, None if run.stops else logits_at, run)
        except Finished:
            return None
        return None if run.stops else run.through(Tap("logits"), logits)

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        real: Bool[Tensor, "batch pos"] | None = None,
        edits: Sequence[Edit] = (),
        logits_at: Int[Tensor, " at"] | None = None,
        prompt: int | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch at d_vocab"]:
        """Logits of a run with edits; see :class:`headscope.models.protocol.HeadModel`."""
        if not self.has_logits and (logits_at is None or len(logits_at)):
            raise UnsupportedModelError(self.limits["logits"])
        logits = self.run(
            Texts(tokens, real),
            writes=writes_of(edits),
            logits_at=logits_at,
            prompt=prompt,
            grad=grad,
        )
        return torch.empty(len(tokens), 0, self.shape.n_logits) if logits is None else logits


def _with_root(writes: Mapping[Any, Write]) -> dict[Any, Write]:
    """Writes by which gradients reach what a model computes of weights that ask for none."""
    root = Tap("resid_pre", 0)
    written = next((writes[tap] for tap in writes if Tap(*tap) == root), None)

    def begin(value: Tensor, span: Span) -> Tensor:
        value = value if written is None else written(value, span)
        return value if value.requires_grad else value.detach().requires_grad_()

    return {**{tap: one for tap, one in writes.items() if Tap(*tap) != root}, root: begin}


class OwnPasses(threading.local):
    """Positions of a pass that the model's owner runs in this thread.

    Attributes:
        span: positions of the pass that began last.
        asked: length of the prompt that ``generate`` was given; None outside of it.
    """

    span: Span | None = None
    asked: int | None = None

    def begin(self, length: int, cached: int, mask: Any = None) -> None:
        """Note a pass over ``length`` positions behind those of its cache, and its padding."""
        if self.asked is not None:
            prompt = self.asked
        elif not cached:
            prompt = length
        else:  # what a cache held before anybody looked was read as a prompt
            prompt = cached if self.span is None else self.span.prompt
        plain = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == cached + length
        self.span = Span(cached, length, prompt, grows=True, real=mask.bool() if plain else None)


@contextmanager
def watched(module: Any) -> Iterator[OwnPasses]:
    """Follow the passes of a model, and its ``generate``, within a scope."""
    own = OwnPasses()
    with ExitStack() as stack:
        body = getattr(module, "base_model", module)
        stack.enter_context(hooked([before(body, _began(own))]))
        if callable(getattr(module, "generate", None)):
            stack.enter_context(replaced(module, "generate", _asked(own, module.generate)))
        yield own


def _began(own: OwnPasses) -> Callable[[nn.Module, Call], None]:
    def began(_module: nn.Module, call: Call) -> None:
        given = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        given = call.kwargs.get("inputs_embeds") if given is None else given
        cache = call.kwargs.get("past_key_values")
        if isinstance(given, Tensor):
            cached = 0 if cache is None else int(cache.get_seq_length())
            own.begin(int(given.shape[1]), cached, call.kwargs.get("attention_mask"))

    return began


def _asked(own: OwnPasses, generate: Callable[..., Any]) -> Callable[..., Any]:
    def asked(*args: Any, **kwargs: Any) -> Any:
        names = ("input_ids", "inputs", "inputs_embeds")
        given = args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)
        before = own.asked
        own.asked = int(given.shape[1]) if isinstance(given, Tensor) else None
        try:
            return generate(*args, **kwargs)
        finally:
            own.asked = before

    return asked


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager that replaces an attribute of an object."""
    own = owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own
