"""One forward pass of a ``TransformerBridge``: edits go in, layers are shown."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.stacks import MaskRule
from headscope.edits import Span, during
from headscope.errors import UnsupportedModelError
from headscope.matches import Matches
from headscope.models.attention import visible_keys
from headscope.models.bridge.layout import BridgeLayer, BridgeLayout
from headscope.models.hf.hooks import hooked, leaving
from headscope.models.hf.spans import OwnPasses, replaced, watched
from headscope.models.hf.transformers_api import ATTENTION_METHOD
from headscope.models.protocol import Edit, Observer
from headscope.models.running import Finished, pass_over, scope_over, use_of
from headscope.rows import AttentionRows

# Attention on keys that the config's window hides; above this the config does not tell the truth.
_STRAY = 1e-3

# Sites that are edited inside a module which computes attention in one piece.
_INSIDE = ("query", "key", "value", "pattern")

Act = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class BridgeLayerView:
    """One attention layer of a running pass; see :class:`headscope.models.protocol.LayerView`."""

    layer: int
    pattern: Float[Tensor, "batch head query key"]
    z: Float[Tensor, "batch query head d_head"]
    value: Float[Tensor, "batch kv_head query d_head"] | None
    window: int | None
    real: Bool[Tensor, "batch query"] | None

    @property
    def n_queries(self) -> int:
        """Number of positions in this pass."""
        return self.pattern.shape[2]

    def rows(self, query_pos: Int[Tensor, " query"]) -> AttentionRows:
        """Rows of these queries as the model computed them, in fp32; a padding query sees itself.

        Raises:
            UnsupportedModelError: if the layer attends where its config says that it cannot.
        """
        n_keys = int(query_pos.max()) + 1
        positions = query_pos.to(self.pattern.device)
        batch, mask = self.pattern.shape[0], MaskRule("causal", self.window)
        visible = visible_keys(positions, n_keys, batch, mask=mask, real=self.real)
        whole = self.pattern[:, :, positions].float()
        pattern = whole[..., :n_keys].masked_fill(~visible[:, None], 0.0)
        stray = whole.sum(-1) - pattern.sum(-1)
        if self.real is not None:
            padding = ~self.real[:, None, positions]
            stray = stray.masked_fill(padding, 0.0)
            itself = torch.nn.functional.one_hot(positions, n_keys).to(pattern.dtype)
            pattern = torch.where(padding[..., None], itself, pattern)
        if not bool((stray <= _STRAY).all()):  # NaN is no row either
            raise UnsupportedModelError(
                f"layer {self.layer} attends to keys that its config says it cannot see (window "
                f"{self.window})."
            )
        return AttentionRows(self.layer, positions, pattern, visible, mask)

    def values(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """Value vectors as attention used them."""
        if self.value is None:
            raise UnsupportedModelError(f"layer {self.layer} does not show its values.")
        return self.value

    def matches(self, query_pos: Int[Tensor, " query"]) -> Matches:
        """Not shown on this path."""
        raise UnsupportedModelError(
            f"layer {self.layer} does not show its queries and keys as attention uses them."
        )


@dataclass(eq=False)
class BridgePass:
    """Applies edits and shows layers to observers, for one pass or, as a scope, for all.

    Attributes:
        module: the model under the bridge.
        span: which positions the pass runs; None: a scope, which each pass is asked for its own.
    """

    module: Any
    layout: BridgeLayout
    observers: Sequence[Observer]
    edits: Sequence[Edit]
    may_stop: bool
    real: Bool[Tensor, "batch pos"] | None
    span: Span | None
    own: OwnPasses | None = None
    seen: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the bridge for one pass or scope; hooks that it already has stay."""
        with ExitStack() as stack:
            if self.span is None:
                stack.enter_context(scope_over(self.module, self))
                self.own = stack.enter_context(watched(self.module))
            else:
                stack.enter_context(pass_over(self.module, self))
            for parts in self.layout.layers.values():
                hooks = (leaving(point, self._mine(hook)) for point, hook in self._hooks(parts))
                stack.enter_context(hooked(hooks))
                if parts.kernel is not None and self._edits(parts.layer, *_INSIDE):
                    stack.enter_context(self._inside(parts.kernel, parts.layer))
            if self._wants_final:
                if self.layout.final is None:
                    raise UnsupportedModelError("it has no plain norm before its unembedding.")
                hook = leaving(self.layout.final, self._mine(self._at_final))
                stack.enter_context(hooked([hook]))
            yield

    def _mine(self, hook: Act) -> Act:
        """The hook, silent in passes that are not this one or not of this scope."""

        def mine(value: Tensor) -> Tensor | None:
            return hook(value) if self._acts else None

        return mine

    @property
    def _acts(self) -> bool:
        use = use_of(self.module)
        return not use.measuring() if self.span is None else use.running() is self

    def _span(self, count: int) -> Span:
        """Positions of a value that has ``count`` of them."""
        run = use_of(self.module).running()
        span = self.own.span if run is None and self.own is not None else getattr(run, "span", None)
        return (span or Span.whole(count)).last(count)

    @property
    def _wants_final(self) -> bool:
        return any(observer.wants_final for observer in self.observers)

    def _edits(self, layer: int, *sites: str) -> list[Edit]:
        return [edit for edit in self.edits if edit.site in sites and layer in edit.layers]

    def _hooks(self, parts: BridgeLayer) -> Iterator[tuple[nn.Module, Act]]:
        layer = parts.layer
        if self._edits(layer, "query") and parts.kernel is None:
            if parts.query is None:
                raise UnsupportedModelError(f"layer {layer} does not show its queries.")
            yield parts.query, self._at_query(parts)
        if self._edits(layer, "pattern") and parts.kernel is None and not parts.pattern_is_live:
            raise UnsupportedModelError(
                f"layer {layer} shows its attention pattern only after it was used, so that it "
                "cannot be edited."
            )
        if parts.kernel is None and self._edits(layer, "key"):
            raise UnsupportedModelError(f"layer {layer} does not show its keys as it uses them.")
        edits_value = parts.kernel is None and bool(self._edits(layer, "value"))
        if edits_value and parts.value is None:
            raise UnsupportedModelError(f"layer {layer} does not show its values.")
        if parts.value is not None and (self.observers or edits_value):
            yield parts.value, self._at_value(parts, edits_value)
        yield parts.pattern, self._at_pattern(parts)
        yield parts.z, self._at_z(parts)

    def _at_query(self, parts: BridgeLayer) -> Act:
        heads = self.layout.shape.n_heads

        def hook(value: Tensor) -> Tensor:
            if parts.query_is_rotated:
                return self._edited("query", parts.layer, value)
            query = value.reshape(*value.shape[:2], heads, -1).transpose(1, 2)
            edited = self._edited("query", parts.layer, query)
            return edited.transpose(1, 2).reshape(value.shape)

        return hook

    def _at_value(self, parts: BridgeLayer, edits: bool) -> Act:
        heads = self.layout.shape.n_kv_heads

        def hook(value: Tensor) -> Tensor | None:
            by_head = value.reshape(*value.shape[:2], heads, -1).transpose(1, 2)
            by_head = self._edited("value", parts.layer, by_head) if edits else by_head
            if self.observers:
                self.seen["value"] = by_head
            return by_head.transpose(1, 2).reshape(value.shape) if edits else None

        return hook

    def _at_pattern(self, parts: BridgeLayer) -> Act:
        def hook(value: Tensor) -> Tensor | None:
            self.seen["pattern"] = value
            self._show(parts)
            if parts.pattern_is_live and self._edits(parts.layer, "pattern"):
                return self._edited("pattern", parts.layer, value.float()).to(value.dtype)
            return None

        return hook

    def _at_z(self, parts: BridgeLayer) -> Act:
        shape = self.layout.shape

        def hook(value: Tensor) -> Tensor | None:
            z = value.reshape(*value.shape[:2], shape.n_heads, shape.d_head)
            edited = self._edited("z", parts.layer, z)
            self.seen["z"] = edited
            self._show(parts)
            return None if edited is z else edited.reshape(value.shape)

        return hook

    def _show(self, parts: BridgeLayer) -> None:
        """Hand the layer over once its pattern and its head outputs are both there."""
        if "pattern" not in self.seen or "z" not in self.seen:
            return
        seen, self.seen = self.seen, {}
        window = self.layout.shape.windows[parts.layer]
        view = BridgeLayerView(
            parts.layer, seen["pattern"], seen["z"], seen.get("value"), window, self.real
        )
        for observer in self.observers:
            observer.on_layer(view)
        if self.may_stop and parts.layer == max(self.layout.layers) and not self._wants_final:
            raise Finished

    def _at_final(self, value: Tensor) -> None:
        for observer in self.observers:
            if observer.wants_final:
                observer.on_final(value)
        if self.may_stop:
            raise Finished

    @contextmanager
    def _inside(self, kernel: Any, layer: int) -> Iterator[None]:
        """Edit queries and patterns inside a module that computes attention in one piece."""
        original = getattr(kernel, ATTENTION_METHOD)

        def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            if not self._acts:
                inner: tuple[Tensor, Tensor] = original(query, key, value, *rest)
                return inner
            query = self._edited("query", layer, query)
            key = self._edited("key", layer, key)
            value = self._edited("value", layer, value)
            z, pattern = original(query, key, value, *rest)
            if self._edits(layer, "pattern"):
                edited = self._edited("pattern", layer, pattern.float()).to(value.dtype)
                z = torch.matmul(edited, value)
            return z, pattern

        with replaced(kernel, ATTENTION_METHOD, attend):
            yield

    def _edited(self, site: str, layer: int, value: Tensor) -> Tensor:
        edits = self._edits(layer, site)
        if not edits:
            return value
        for edit in during(edits, self._span(value.shape[1 if site == "z" else 2])):
            value = edit(layer, value)
        return value
