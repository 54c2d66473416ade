"""One forward pass of a transformers model: edits go in, layers are shown."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.matches import Matches
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import LayerParts, Layout
from headscope.models.protocol import Edit, Observer
from headscope.rows import AttentionRows

# Passes that are attached now, outermost first: a pass inside a scope keeps to the scope's edits.
_ATTACHED: ContextVar[tuple["Pass", ...]] = ContextVar("headscope_passes", default=())


def scoped_edits(layout: Layout) -> tuple[Edit, ...]:
    """Edits of attention by the scopes that run now; those of ``z`` act by their own hooks."""
    return tuple(
        edit
        for scope in _ATTACHED.get()
        if scope.layout is layout
        for edit in scope.edits
        if edit.site != "z"
    )


class Finished(Exception):  # noqa: N818  # not an error
    """Raised inside a pass that has nothing left to show."""


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


@dataclass
class Pass:
    """One forward pass: routes attention, applies edits, shows layers to observers."""

    layout: Layout
    observers: Sequence[Observer]
    edits: Sequence[Edit]
    may_stop: bool
    parts: dict[nn.Module, LayerParts] = field(init=False)
    pending: AttentionCall | None = None
    acting: tuple[Edit, ...] = ()
    finals: int = 0

    def __post_init__(self) -> None:
        """Index the layers by the module that calls attention."""
        self.parts = self.layout.by_attention()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model for the length of one pass."""
        handles = []
        self.acting = (*scoped_edits(self.layout), *self.edits)
        token = _ATTACHED.set((*_ATTACHED.get(), self))
        try:
            if self.observers or any(edit.site == "z" for edit in self.edits):
                for parts in self.layout.layers.values():
                    hook = self._at_projection(parts.layer)
                    handles.append(parts.projection.register_forward_pre_hook(hook))
            if any(observer.wants_final for observer in self.observers):
                if self.layout.final_norm is None:
                    raise UnsupportedModelError("it has no plain norm before its unembedding.")
                handles.append(self.layout.final_norm.register_forward_pre_hook(self._at_final))
            with routed(self.layout.configs, self._attend):
                yield
        finally:
            _ATTACHED.reset(token)
            for handle in handles:
                handle.remove()

    def _attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        layer = self.parts[module].layer
        query, key, value = (
            self._edited(site, layer, given)
            for site, given in (("query", call.query), ("key", call.key), ("value", call.value))
        )
        call = replace(call, layer=layer, query=query, key=key, value=value)
        self.pending = call if self.observers else None
        if not any(edit.site == "pattern" and layer in edit.layers for edit in self.acting):
            return fused(call)
        positions = torch.arange(call.first_query, call.n_keys, device=query.device)
        return call.average(self._edited("pattern", layer, call.rows(positions).pattern))

    def _at_projection(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
        last = max(self.layout.layers)
        shape = self.layout.shape

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            z = args[0].unflatten(-1, (shape.n_heads, shape.d_head))
            edited = self._edited("z", layer, z)
            if self.pending is not None:
                view = HFLayerView(self.pending, edited)
                self.pending = None
                for observer in self.observers:
                    observer.on_layer(view)
            if self.may_stop and layer == last and not any(o.wants_final for o in self.observers):
                raise Finished
            return None if edited is z else (edited.flatten(-2), *args[1:])

        return hook

    def _at_final(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.finals += 1
        if self.finals < self.layout.final_norm_uses:
            return  # the model uses its final norm for something else before
        for observer in self.observers:
            if observer.wants_final:
                observer.on_final(args[0])
        if self.may_stop:
            raise Finished

    def _edited(self, site: str, layer: int, value: Tensor) -> Tensor:
        for edit in self.acting:
            if edit.site == site and layer in edit.layers:
                value = edit(layer, value)
        return value
