"""Read and write taps in one pass: the hooks behind ``model.run``, for both kinds of model."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.stacks import CAUSAL, MaskRule, Stack
from headscope.edits import Span
from headscope.errors import UnsupportedModelError
from headscope.heads import ModelShape
from headscope.models.hf.hooks import Hook, entering, hooked, leaving
from headscope.models.protocol import LayerView
from headscope.models.running import Finished, held, use_of
from headscope.models.taps import (
    ATTENTION_SITES,
    Read,
    Tap,
    TapView,
    TextBatch,
    Write,
    checked,
)

_NOTHING: Mapping[Any, Any] = MappingProxyType({})
AttentionSite = Literal["z", "query", "key", "value", "pattern"]


class Tapped:
    """What both kinds of model offer by taps alone: :meth:`run`, and their stacks."""

    name: str
    shape: ModelShape

    @property
    def mask(self) -> MaskRule:
        """Rule of the model's attention, windows of single layers apart."""
        return CAUSAL

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """Attention stacks by name; a text model with a single one has it under an empty name."""
        shape = self.shape
        stack = Stack(
            "",
            shape.n_layers,
            shape.n_heads,
            shape.n_kv_heads,
            shape.d_head,
            self.mask,
            windows=shape.windows,
        )
        return {"": stack}

    def run(
        self,
        batch: TextBatch | Int[Tensor, "batch pos"],
        *,
        reads: Mapping[Any, Read] = _NOTHING,
        writes: Mapping[Any, Write] = _NOTHING,
        until: Any = None,
        logits_at: Int[Tensor, " at"] | None = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch at d_vocab"] | None:
        """Run the model once, reading and writing at taps; see :class:`HeadModel`."""
        tokens, real = (batch, None) if isinstance(batch, Tensor) else (batch.tokens, batch.real)
        engine = _Engine(
            self,
            checked(reads, self.name, self.shape),
            checked(writes, self.name, self.shape, writing=True),
            None if until is None else next(iter(checked({until: id}, self.name, self.shape))),
            Span.whole(tokens.shape[1]),
            grad,
        )
        return engine.run(tokens, real, logits_at)


@dataclass(eq=False)
class _Engine:
    """One pass with its taps."""

    model: Any
    reads: dict[Tap, Read]
    writes: dict[Tap, Write]
    until: Tap | None
    span: Span
    grad: bool
    wants_final: bool = field(init=False)

    def __post_init__(self) -> None:
        """Let the pass go as far as the taps need."""
        self.wants_final = any(
            tap.site not in ATTENTION_SITES for tap in (*self.reads, *self.writes)
        )

    def run(
        self, tokens: Tensor, real: Tensor | None, logits_at: Tensor | None
    ) -> Float[Tensor, "batch at d_vocab"] | None:
        # A pass that owes no logits stops after its last attention layer, which may be too early.
        nothing = torch.zeros(1 if self.wants_final else 0, dtype=torch.long)
        empty = logits_at is not None and len(logits_at) == 0
        wants_logits = self.until is None or self.until.site == "logits"
        with ExitStack() as stack:
            stack.enter_context(held(self.model.module))
            stack.enter_context(hooked(self._hooks()))
            shows = any(tap.site in ATTENTION_SITES for tap in self._shown())
            logits = self.model.forward(
                tokens,
                real=real,
                observers=(self,) if shows and not self.grad else (),
                edits=self._edits(),
                logits_at=nothing if empty or not wants_logits else logits_at,
                grad=self.grad,
            )
        if empty or not wants_logits:
            return None
        return self._through(Tap("logits"), logits)

    # Attention: edits write, and an observer reads. With gradients the reads are edits that
    # change nothing, so that what is read is what the pass goes on with.

    def _shown(self) -> list[Tap]:
        taps = dict.fromkeys(self.reads)
        if self.until is not None:
            taps[self.until] = None
        return list(taps)

    def _edits(self) -> tuple["_Written", ...]:
        made = [
            _Written(self, tap, write)
            for tap, write in self.writes.items()
            if tap.site in ATTENTION_SITES
        ]
        if self.grad:
            made += [
                _Written(self, tap, None) for tap in self._shown() if tap.site in ATTENTION_SITES
            ]
        return tuple(made)

    def on_layer(self, view: LayerView) -> None:
        """Hand an attention layer to the reads of its sites."""
        for tap in self._shown():
            if tap.layer == view.layer and tap.site in ATTENTION_SITES:
                seen = None if tap.site == "pattern" else _of_layer(view, tap.site)
                self._read(TapView(tap, self.span, view, seen))

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Unused: the final residual stream has a hook of its own."""

    # Residual stream: hooks on blocks, on the two modules of each that write, on the final norm.

    def _hooks(self) -> list[Hook]:
        found: list[Hook] = []
        parts = self.model.parts
        taps = dict.fromkeys((*self.writes, *self._shown()))
        for tap in taps:
            if tap.site in ("embed", "resid_pre"):
                found.append(entering(parts.block(tap.layer or 0), self._entered(tap)))
            elif tap.site == "resid_post":
                found.append(leaving(parts.block(tap.layer), self._left(tap)))
            elif tap.site in ("attn_out", "mlp_out"):
                module, scale = parts.writer(tap.layer, tap.site)
                found.append(leaving(module, self._left(tap, scale)))
            elif tap.site == "final_resid":
                norm = self.model.final_entry
                if norm is None:
                    raise UnsupportedModelError(
                        f"{self.model.name} has no plain norm before its unembedding, so its "
                        f"final_resid cannot be told: read resid_post of the last layer."
                    )
                found.append(entering(norm, self._entered(tap)))
        return found

    @property
    def _acts(self) -> bool:
        """False in passes of others, and in measurements that this pass starts."""
        use = use_of(self.model.module)
        return use.running() is not None and not use.measuring()

    def _entered(self, tap: Tap) -> Callable[[Tensor], Tensor | None]:
        def entered(given: Tensor) -> Tensor | None:
            value = self._through(tap, given) if self._acts else given
            return None if value is given else value

        return entered

    def _left(self, tap: Tap, scale: float = 1.0) -> Callable[[Tensor], Tensor | None]:
        def left(given: Tensor) -> Tensor | None:
            if not self._acts:
                return None
            shaped = given.reshape(self._stream_shape(given))
            value = self._through(tap, shaped if scale == 1 else shaped * scale)
            if tap not in self.writes and not self.grad:  # a gradient passes what was read
                return None
            made = value if scale == 1 else value / scale
            return made.reshape(given.shape).to(given.dtype)

        return left

    def _stream_shape(self, given: Tensor) -> tuple[int, ...]:
        """``[batch pos d_model]``, also where a module flattens batch and positions."""
        return (-1, self.span.count, given.shape[-1])

    def _through(self, tap: Tap, value: Tensor) -> Tensor:
        """A value with its tap written and read."""
        write = self.writes.get(tap)
        if write is not None:
            value = write(value, self.span)
        if tap in self.reads or tap == self.until:
            self._read(TapView(tap, self.span, None, value))
        return value

    def _read(self, view: TapView) -> None:
        read = self.reads.get(view.tap)
        if read is not None:
            read(view)
        if view.tap == self.until and view.tap.site != "logits":
            raise Finished


@dataclass(frozen=True, eq=False)
class _Written:
    """An edit of one tap of attention; without a function it reads and changes nothing."""

    engine: _Engine
    tap: Tap
    write: Write | None

    @property
    def site(self) -> AttentionSite:
        """What is edited."""
        return self.tap.site  # type: ignore[return-value]  # checked when the engine was made

    @property
    def layers(self) -> frozenset[int]:
        """The one layer that it touches."""
        return frozenset({self.tap.layer or 0})

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Write, or read a view that the pass goes on with."""
        if self.write is not None:
            return self.write(value, self.engine.span)
        shown = value.view_as(value)
        self.engine._read(TapView(self.tap, self.engine.span, None, shown))
        return shown


def _of_layer(view: LayerView, site: str) -> Tensor:
    if site == "z":
        return view.z
    if site == "value":
        return view.values()
    matches = view.matches(torch.arange(view.n_queries))
    return matches.query if site == "query" else matches.key
