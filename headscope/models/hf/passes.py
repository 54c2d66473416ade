"""Attention taps in a transformers model: for one pass, and for all passes in a scope."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.edits import Span
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.hooks import entering, hooked
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import LayerParts, Layout
from headscope.models.hf.taps import OwnPasses, Pass, watched, written
from headscope.models.running import scope_over, use_of
from headscope.models.taps import Edited, Tap, TapView, Write
from headscope.views import AttentionRows, QueryKeys

# Entries of pattern rows that are edited at once.
_EDITED_ENTRIES = 1 << 24

Writes = Mapping[Tap, Write]


@dataclass(frozen=True, eq=False)
class HFLayerView:
    """One attention layer of a running pass; see :class:`headscope.models.protocol.LayerView`.

    Attributes:
        writes: what writes its pattern.
        span: positions of the pass.
    """

    call: AttentionCall
    writes: tuple[Write, ...]
    span: Span

    def rows(self, query_pos: Int[Tensor, " query"]) -> AttentionRows:
        """Exact softmax rows of some queries, in fp32, after writes to the pattern."""
        rows = self.call.rows(query_pos)
        if not self.writes:
            return rows
        pattern = self.call.rows(self.call.positions).pattern
        for write in self.writes:
            pattern = write(pattern, self.span)
        at = query_pos.to(pattern.device)
        return replace(rows, pattern=pattern[:, :, at, : rows.pattern.shape[-1]])

    def values(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """Value vectors as used by attention."""
        return self.call.value

    def query_keys(self, query_pos: Int[Tensor, " query"]) -> QueryKeys:
        """Queries at some positions and all keys, as used by attention, in fp32."""
        return self.call.query_keys(query_pos)

    def keep_rows(self) -> Callable[[Int[Tensor, " query"]], AttentionRows]:
        """Function that computes rows after the pass; it holds queries, keys and values."""
        return self.rows


@dataclass(eq=False)
class AttentionTaps:
    """Routes the attention of one pass through its taps.

    Attributes:
        pending: layer whose head outputs come next, if something reads or edits it.
    """

    run: Pass
    layout: Layout
    parts: dict[nn.Module, LayerParts] = field(init=False)
    pending: HFLayerView | None = None

    def __post_init__(self) -> None:
        """Index the layers by the module that calls attention."""
        self.parts = self.layout.by_attention()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Route attention, and hook the projections of layers that something reads or edits."""
        hooks = (
            entering(parts.projection, self._at_projection(layer))
            for layer, parts in self.layout.layers.items()
            if self.run.touches(layer, "z", "pattern")
        )
        with hooked(hooks), routed(self.layout.configs, self._attend, self.parts):
            yield

    def _attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        run, layer = self.run, self.parts[module].layer
        # Scopes write head outputs through their own hooks.
        scopes = scoped_writes(run.model.module)
        call = replace(call, layer=layer)
        call = written_call(
            call, run.span, lambda tap, value, span: run.through(tap, value, scopes, span)
        )
        writes = at_tap(Tap("pattern", layer), (*scopes, run.writes))
        if run.touches(layer, "z", "pattern"):
            self.pending = HFLayerView(call, tuple(writes), run.span)
        if run.grad and run.is_read(Tap("pattern", layer)):
            writes.append(self._read_whole)
        return written_attention(call, writes, run.span)

    def _read_whole(self, pattern: Tensor, span: Span) -> Tensor:
        """Pass a whole pattern to its readers, as part of the autograd graph."""
        assert self.pending is not None  # noqa: S101  # set where it is read
        shown = pattern.view_as(pattern)
        self.run.show(TapView(Tap("pattern", self.pending.call.layer), span, None, shown))
        return shown

    def _at_projection(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        run, shape = self.run, self.layout.shape

        def hook(given: Tensor) -> Tensor | None:
            if not run.acts or self.pending is None:
                return None
            view = None if run.grad else self.pending
            if not run.grad and run.touches(layer, "pattern"):
                run.show(TapView(Tap("pattern", layer), run.span, view))
            z = given.unflatten(-1, (shape.n_heads, shape.d_head))
            edited = run.through(Tap("z", layer), z, view=view)
            self.pending = None
            return None if edited is z else edited.flatten(-2)

        return hook


@dataclass(eq=False)
class EditScope:
    """Edits of all passes while the scope is open, both headscope's and the model's own."""

    module: Any
    layout: Layout
    writes: Writes
    own: OwnPasses = field(init=False)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hook the model until the scope ends."""
        hooks = (
            entering(parts.projection, self._at_projection(layer))
            for layer, parts in sorted(self.layout.layers.items())
            if Tap("z", layer) in self.writes
        )
        with ExitStack() as stack:
            stack.enter_context(scope_over(self.module, self))
            self.own = stack.enter_context(watched(self.module))
            stack.enter_context(hooked(hooks))
            parts = self.layout.by_attention()
            stack.enter_context(routed(self.layout.configs, self._attend, parts, all_threads=True))
            yield

    def _attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Attention in the model's own passes, with the writes of all scopes."""
        if use_of(self.module).measuring():
            return fused(call)
        layer = self.layout.by_attention()[module].layer
        span, scopes = self._span(call.n_queries), scoped_writes(self.module)
        call = written_call(
            replace(call, layer=layer),
            span,
            lambda tap, value, span: written(tap, value, scopes, span),
        )
        return written_attention(call, at_tap(Tap("pattern", layer), scopes), span)

    def _at_projection(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        shape = self.layout.shape

        def hook(given: Tensor) -> Tensor | None:
            use = use_of(self.module)
            if use.measuring():
                return None
            run = use.running()
            z = given.unflatten(-1, (shape.n_heads, shape.d_head))
            span = self._span(z.shape[1]) if run is None else run.span
            edited = written(Tap("z", layer), z, [self.writes], span)
            return None if edited is z else edited.flatten(-2)

        return hook

    def _span(self, count: int) -> Span:
        return self.own.span or Span.whole(count)


def scoped_writes(module: Any) -> tuple[Writes, ...]:
    """Writes of a module's open scopes, outermost first."""
    use = use_of(module)
    return () if use.measuring() else tuple(scope.writes for scope, _ in use.scopes)


def at_tap(tap: Tap, sources: Sequence[Writes]) -> list[Write]:
    """Writes of several sources at one tap, in order."""
    return [writes[tap] for writes in sources if tap in writes]


def written_call(
    call: AttentionCall, span: Span, through: Callable[[Tap, Tensor, Span], Tensor]
) -> AttentionCall:
    """Apply writes to a call's queries, keys and values.

    Args:
        call: attention call of one layer.
        span: positions of the queries; free slots of a cache after them are dropped.
        through: ``(tap, value, positions) -> value``.
    """
    if call.mask.kind == "cross":
        keys = Span.whole(call.n_keys)
    else:
        call = call.up_to(span.end)
        keys = span.last(call.n_keys)
    return replace(
        call,
        query=through(Tap("query", call.layer), call.query, span),
        key=through(Tap("key", call.layer), call.key, keys),
        value=through(Tap("value", call.layer), call.value, keys),
    )


def written_attention(
    call: AttentionCall, writes: Sequence[Write], span: Span
) -> Float[Tensor, "batch query head d_value"]:
    """Fused attention, with exact rows in chunks for heads whose pattern is written."""
    edits = [write.acting(span) for write in writes if isinstance(write, Edited)]
    named = [edited.heads for edited in edits]
    if (
        len(edits) < len(writes) or None in named
    ):  # writes of the caller, which see the whole pattern
        pattern = call.rows(call.positions).pattern
        for write in writes:
            pattern = write(pattern, span)
        return call.average(pattern)
    heads = tuple(sorted({head for some in named if some is not None for head in some}))
    return _narrow(call, edits, heads, span) if heads else fused(call)


def _narrow(
    call: AttentionCall, edits: Sequence[Edited], heads: tuple[int, ...], span: Span
) -> Float[Tensor, "batch query head d_value"]:
    """Attention with the patterns of some heads edited."""
    own = call.of_heads(heads)
    narrow = [edited.among(heads) for edited in edits]
    parts = []
    size = max(1, _EDITED_ENTRIES // (call.query.shape[0] * len(heads) * call.n_keys))
    for at in range(0, call.n_queries, size):
        positions = own.positions[at : at + size]
        pattern = own.rows(positions).pattern
        for edited in narrow:
            pattern = edited(pattern, span.part(at, len(positions)))
        parts.append(own.average(pattern))
    index = torch.tensor(heads, device=call.query.device)
    return fused(call).index_copy(2, index, torch.cat(parts, 1))
