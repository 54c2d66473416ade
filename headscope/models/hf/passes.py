"""One forward pass of a transformers model: edits go in, layers are shown."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.edits import AnyEdit, Span, among, during, edited_heads
from headscope.errors import UnsupportedModelError
from headscope.matches import Matches
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.hooks import entering, hooked
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import LayerParts, Layout
from headscope.models.hf.spans import OwnPasses, watched
from headscope.models.protocol import Edit, Observer
from headscope.models.running import Finished, pass_over, scope_over, use_of
from headscope.rows import AttentionRows

# Entries of the rows that an edit of patterns holds at once.
_EDITED_ENTRIES = 1 << 24


@dataclass(frozen=True, eq=False)
class HFLayerView:
    """One attention layer of a running pass; see :class:`headscope.models.protocol.LayerView`."""

    call: AttentionCall
    z: Float[Tensor, "batch pos head d_head"]

    @property
    def layer(self) -> int:
        """The model's layer number."""
        return self.call.layer

    @property
    def n_queries(self) -> int:
        """Number of positions in this pass."""
        return self.call.n_queries

    def rows(self, query_pos: Int[Tensor, " query"]) -> AttentionRows:
        """Exact softmax rows of these queries, in fp32."""
        return self.call.rows(query_pos)

    def values(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """Value vectors as attention used them."""
        return self.call.value

    def matches(self, query_pos: Int[Tensor, " query"]) -> Matches:
        """Queries at these positions and keys, as attention used them, in fp32."""
        return self.call.matches(query_pos)

    def keep_rows(self) -> Callable[[Int[Tensor, " query"]], AttentionRows]:
        """Return what computes rows after the pass too; it holds queries, keys and values."""
        return self.call.rows


@dataclass(eq=False)
class Pass:
    """One forward pass: routes attention, applies edits, shows layers to observers.

    Attributes:
        module: that runs.
        span: which positions it runs.
        may_stop: whether it ends with the last layer that somebody wants to see.
    """

    module: Any
    layout: Layout
    observers: Sequence[Observer]
    edits: Sequence[Edit]
    span: Span
    may_stop: bool = False
    parts: dict[nn.Module, LayerParts] = field(init=False)
    pending: AttentionCall | None = None
    finals: int = 0

    def __post_init__(self) -> None:
        """Index the layers by the module that calls attention."""
        self.parts = self.layout.by_attention()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model for the length of one pass."""
        with ExitStack() as stack:
            stack.enter_context(pass_over(self.module, self))
            if self.observers or any(edit.site == "z" for edit in self.edits):
                hooks = (
                    entering(parts.projection, self._at_projection(parts.layer))
                    for parts in self.layout.layers.values()
                )
                stack.enter_context(hooked(hooks))
            if self._wants_final:
                if self.layout.final_norm is None:
                    raise UnsupportedModelError("it has no plain norm before its unembedding.")
                stack.enter_context(hooked([entering(self.layout.final_norm, self._at_final)]))
            stack.enter_context(routed(self.layout.configs, self._attend, self.parts))
            yield

    @property
    def _wants_final(self) -> bool:
        return any(observer.wants_final for observer in self.observers)

    @property
    def _runs(self) -> bool:
        """Whether it is this pass that runs now, and not one inside it or beside it."""
        return use_of(self.module).running() is self

    def _attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        layer = self.parts[module].layer
        # Head outputs that scopes edit are edited by their own hooks.
        edits = (*scoped_edits(self.module), *self.edits)
        call = edited_call(replace(call, layer=layer), edits, self.span)
        self.pending = call if self.observers else None
        return edited_attention(call, edits, self.span)

    def _at_projection(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        last = max(self.layout.layers)
        shape = self.layout.shape

        def hook(given: Tensor) -> Tensor | None:
            if not self._runs:
                return None
            z = given.unflatten(-1, (shape.n_heads, shape.d_head))
            edited = edited_at("z", layer, z, self.edits, self.span)
            if self.pending is not None:
                view = HFLayerView(self.pending, edited)
                self.pending = None
                for observer in self.observers:
                    observer.on_layer(view)
            if self.may_stop and layer == last and not self._wants_final:
                raise Finished
            return None if edited is z else edited.flatten(-2)

        return hook

    def _at_final(self, residual: Tensor) -> None:
        if not self._runs:
            return
        self.finals += 1
        if self.finals < self.layout.final_norm_uses:
            return  # the model uses its final norm for something else before
        for observer in self.observers:
            if observer.wants_final:
                observer.on_final(residual)
        if self.may_stop:
            raise Finished


@dataclass(eq=False)
class Scope:
    """Edits of every pass of a model while the scope is open: headscope's, and the model's own."""

    module: Any
    layout: Layout
    edits: Sequence[Edit]
    own: OwnPasses = field(init=False)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hook the model until the scope ends."""
        with ExitStack() as stack:
            stack.enter_context(scope_over(self.module, self))
            self.own = stack.enter_context(watched(self.module))
            touched = {layer for edit in self.edits if edit.site == "z" for layer in edit.layers}
            hooks = (
                entering(self.layout.layers[layer].projection, self._at_projection(layer))
                for layer in sorted(touched & self.layout.layers.keys())
            )
            stack.enter_context(hooked(hooks))
            parts = self.layout.by_attention()
            stack.enter_context(routed(self.layout.configs, self._attend, parts, all_threads=True))
            yield

    def _attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """Attention of a pass of the model's own, with the edits of all scopes."""
        if use_of(self.module).measuring():
            return fused(call)
        layer = self.layout.by_attention()[module].layer
        span, edits = self._span(call.n_queries), scoped_edits(self.module)
        call = edited_call(replace(call, layer=layer), edits, span)
        return edited_attention(call, edits, span)

    def _at_projection(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        shape = self.layout.shape

        def hook(given: Tensor) -> Tensor | None:
            use = use_of(self.module)
            if use.measuring():
                return None
            run = use.running()
            z = given.unflatten(-1, (shape.n_heads, shape.d_head))
            span = self._span(z.shape[1]) if run is None else run.span
            edited = edited_at("z", layer, z, self.edits, span)
            return None if edited is z else edited.flatten(-2)

        return hook

    def _span(self, count: int) -> Span:
        return self.own.span or Span.whole(count)


def scoped_edits(module: Any) -> tuple[Edit, ...]:
    """Edits of attention by the scopes that are open on a module, outermost first."""
    use = use_of(module)
    scopes = () if use.measuring() else use.scopes
    return tuple(edit for scope, _ in scopes for edit in scope.edits if edit.site != "z")


def edited_at(site: str, layer: int, value: Tensor, edits: Sequence[Edit], span: Span) -> Tensor:
    """A layer's value at a site, edited; ``span`` says which positions it has."""
    chosen = [edit for edit in edits if edit.site == site and layer in edit.layers]
    for edit in during(chosen, span):
        value = edit(layer, value)
    return value


def edited_call(call: AttentionCall, edits: Sequence[Edit], span: Span) -> AttentionCall:
    """A call with its queries, keys and values edited, and without the free places of a cache."""
    call = call.up_to(span.end)
    keys = span.last(call.n_keys)
    return replace(
        call,
        query=edited_at("query", call.layer, call.query, edits, span),
        key=edited_at("key", call.layer, call.key, edits, keys),
        value=edited_at("value", call.layer, call.value, edits, keys),
    )


def edited_attention(
    call: AttentionCall, edits: Sequence[Edit], span: Span
) -> Float[Tensor, "batch query head d_value"]:
    """Fused attention, but for heads whose pattern is edited: exact rows of those, in chunks."""
    here = [edit for edit in edits if edit.site == "pattern" and call.layer in edit.layers]
    chosen = during(here, span)
    if not chosen:
        return fused(call)
    heads = edited_heads(chosen, call.layer)
    if heads is None:  # an edit of the caller's, which sees the whole pattern
        pattern = call.rows(call.positions).pattern
        for edit in chosen:
            pattern = edit(call.layer, pattern)
        return call.average(pattern)
    own = call.of_heads(heads)
    narrow = [among(edit, call.layer, heads) for edit in here if isinstance(edit, AnyEdit)]
    parts = []
    size = max(1, _EDITED_ENTRIES // (call.query.shape[0] * len(heads) * call.n_keys))
    for at in range(0, call.n_queries, size):
        positions = own.positions[at : at + size]
        pattern = own.rows(positions).pattern
        for edit in during(narrow, span.part(at, len(positions))):
            pattern = edit(call.layer, pattern)
        parts.append(own.average(pattern))
    index = torch.tensor(heads, device=call.query.device)
    return fused(call).index_copy(2, index, torch.cat(parts, 1))
