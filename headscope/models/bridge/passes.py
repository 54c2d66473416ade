"""Attention taps in a ``TransformerBridge``: for one pass, and for all passes in a scope."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headscope.base.stacks import MaskRule
from headscope.edits import Span
from headscope.errors import UnsupportedModelError
from headscope.models.attention import visible_keys
from headscope.models.bridge.layout import BridgeLayer, BridgeLayout
from headscope.models.hf.hooks import Hook, hooked, leaving
from headscope.models.hf.passes import Writes
from headscope.models.hf.taps import OwnPasses, Pass, replaced, watched, written
from headscope.models.hf.transformers_api import ATTENTION_METHOD
from headscope.models.running import scope_over, use_of
from headscope.models.taps import Tap, TapView
from headscope.views import AttentionRows, QueryKeys

# Attention on keys that the config's window hides; above this the config does not tell the truth.
_STRAY = 1e-3

# Sites that are reached inside a module which computes attention in one piece.
_INSIDE = ("query", "key", "value", "pattern")


@dataclass(frozen=True, eq=False)
class BridgeLayerView:
    """One attention layer of a running pass; see :class:`headscope.models.protocol.LayerView`."""

    layer: int
    pattern: Float[Tensor, "batch head query key"]
    value: Float[Tensor, "batch kv_head query d_head"] | None
    window: int | None
    real: Bool[Tensor, "batch query"] | None

    def rows(self, query_pos: Int[Tensor, " query"]) -> AttentionRows:
        """Rows of these queries as the model computed them, in fp32; a padding query sees itself.

        Raises:
            UnsupportedModelError: if the layer attends where its config says that it cannot.
        """
        n_keys = int(query_pos.max()) + 1
        positions = query_pos.to(self.pattern.device)
        batch, mask = self.pattern.shape[0], MaskRule("causal", self.window)
        visible = visible_keys(positions, slice(0, n_keys), batch, mask=mask, real=self.real)
        whole = self.pattern[:, :, positions].float()
        pattern = whole[..., :n_keys].masked_fill(~visible[:, None], 0.0)
        stray = whole.sum(-1) - pattern.sum(-1)
        if self.real is not None:
            padding = ~self.real[:, None, positions]
            stray = stray.masked_fill(padding, 0.0)
            itself = torch.nn.functional.one_hot(positions, n_keys).to(pattern.dtype)
            pattern = torch.where(padding[..., None], itself, pattern)
        if not bool((stray <= _STRAY).all()):  # NaN is not a row either
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

    def query_keys(self, query_pos: Int[Tensor, " query"]) -> QueryKeys:
        """Not shown on this path."""
        raise UnsupportedModelError(
            f"layer {self.layer} does not show its queries and keys as attention uses them."
        )


@dataclass(eq=False)
class AttentionTaps(ABC):
    """Hooks on the attention of a bridge; subclasses decide how values are used.

    Attributes:
        module: the model under the bridge.
    """

    module: Any
    layout: BridgeLayout

    @abstractmethod
    def touches(self, layer: int, *sites: str) -> bool:
        """Whether some of these sites of a layer are read or written."""

    @property
    @abstractmethod
    def acts(self) -> bool:
        """Whether it is this pass, or one of this scope, that runs now."""

    @abstractmethod
    def through(self, site: str, layer: int, value: Tensor) -> Tensor:
        """A value as it is written; shown to who reads it."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the bridge; hooks that it already has stay."""
        with ExitStack() as stack:
            for parts in self.layout.layers.values():
                stack.enter_context(hooked(self.hooks(parts)))
                if parts.kernel is not None and self.touches(parts.layer, *_INSIDE):
                    stack.enter_context(self._inside(parts.kernel, parts.layer))
            yield

    def hooks(self, parts: BridgeLayer) -> Iterator[Hook]:
        """Hooks of one layer."""
        layer = parts.layer
        if parts.kernel is None:
            if self.touches(layer, "query"):
                yield self.mine(_point(parts.query, layer, "queries"), self._at_query(parts))
            if self.touches(layer, "key"):
                _point(None, layer, "keys as it uses them")
            if self.touches(layer, "value"):
                yield self.mine(_point(parts.value, layer, "values"), self._at_value(layer))
        if self.touches(layer, "z"):
            yield self.mine(parts.z, self._at_z(layer))

    def mine(self, point: nn.Module, act: Callable[[Tensor], Tensor | None]) -> Hook:
        """A hook that is silent in passes that are not this one or not of this scope."""
        return leaving(point, lambda value: act(value) if self.acts else None)

    def _at_query(self, parts: BridgeLayer) -> Callable[[Tensor], Tensor]:
        heads = self.layout.shape.n_heads

        def at_query(value: Tensor) -> Tensor:
            if parts.query_is_rotated:
                return self.through("query", parts.layer, value)
            return self._by_head("query", parts.layer, value, heads)

        return at_query

    def _at_value(self, layer: int) -> Callable[[Tensor], Tensor]:
        heads = self.layout.shape.n_kv_heads
        return lambda value: self._by_head("value", layer, value, heads)

    def _by_head(self, site: str, layer: int, value: Tensor, heads: int) -> Tensor:
        by_head = rearrange(value, "batch pos ... -> batch pos (...)")
        by_head = rearrange(by_head, "batch pos (head d) -> batch head pos d", head=heads)
        made = self.through(site, layer, by_head)
        return rearrange(made, "batch head pos d -> batch pos head d").reshape(value.shape)

    def _at_z(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        shape = self.layout.shape

        def at_z(value: Tensor) -> Tensor | None:
            z = value.reshape(*value.shape[:2], shape.n_heads, shape.d_head)
            edited = self.through("z", layer, z)
            return None if edited is z else edited.reshape(value.shape)

        return at_z

    def at_pattern(self, layer: int, pattern: Tensor) -> Tensor:
        """A pattern as it is written, in its own type."""
        return self.through("pattern", layer, pattern.float()).to(pattern.dtype)

    @contextmanager
    def _inside(self, kernel: Any, layer: int) -> Iterator[None]:
        """Reach queries and patterns inside a module that computes attention in one piece."""
        original = getattr(kernel, ATTENTION_METHOD)

        def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            if not self.acts:
                inner: tuple[Tensor, Tensor] = original(query, key, value, *rest)
                return inner
            query = self.through("query", layer, query)
            key = self.through("key", layer, key)
            value = self.through("value", layer, value)
            z, pattern = original(query, key, value, *rest)
            if self.touches(layer, "pattern"):
                pattern = self.at_pattern(layer, pattern)
                z = torch.matmul(pattern.to(value.dtype), value)
            return z, pattern

        with replaced(kernel, ATTENTION_METHOD, attend):
            yield


def _point(point: nn.Module | None, layer: int, what: str) -> nn.Module:
    if point is None:
        raise UnsupportedModelError(f"layer {layer} does not show its {what}.")
    return point


@dataclass(eq=False)
class PassTaps(AttentionTaps):
    """The attention of one pass with its taps.

    Attributes:
        seen: pattern, head outputs and values of the layer that runs, until it is shown.
    """

    run: Pass
    seen: dict[str, Tensor] = field(default_factory=dict)

    def touches(self, layer: int, *sites: str) -> bool:
        """Whether some of these sites of a layer are read or written."""
        return self.run.touches(layer, *sites)

    @property
    def acts(self) -> bool:
        """Whether it is this pass that runs now."""
        return self.run.acts

    def hooks(self, parts: BridgeLayer) -> Iterator[Hook]:
        """Hooks of one layer; who reads head outputs may ask for its rows and values."""
        layer, run = parts.layer, self.run
        writes = Tap("pattern", layer) in run.writes
        if writes and parts.kernel is None and not parts.pattern_is_live:
            raise _not_live(layer)
        shows = any(run.is_read(Tap(site, layer)) for site in ("z", "pattern"))
        yield from super().hooks(parts)
        if shows and parts.value is not None:
            yield self.mine(parts.value, self._keep_value)
        if shows or writes:
            yield self.mine(parts.pattern, self._at_pattern(parts))
        if shows and not self.touches(layer, "z"):
            yield self.mine(parts.z, self._at_z(layer))

    def through(self, site: str, layer: int, value: Tensor) -> Tensor:
        """A value as it is written; head outputs are shown once their pattern is there."""
        tap, span = Tap(site, layer), self.run.span.last(value.shape[1 if site == "z" else 2])
        if self.run.grad or site not in ("z", "pattern"):
            return self.run.through(tap, value, span=span)
        value = written(tap, value, [self.run.writes], span)
        if site == "z":
            self.seen["z"] = value
            self._show(layer)
        return value

    def _keep_value(self, value: Tensor) -> None:
        heads = self.layout.shape.n_kv_heads
        self.seen["value"] = value.reshape(*value.shape[:2], heads, -1).transpose(1, 2)

    def _at_pattern(self, parts: BridgeLayer) -> Callable[[Tensor], Tensor | None]:
        layer = parts.layer

        def at_pattern(value: Tensor) -> Tensor | None:
            live = parts.pattern_is_live and self.touches(layer, "pattern")
            made = self.at_pattern(layer, value) if live else value
            self.seen["pattern"] = made
            self._show(layer)
            return made if live else None

        return at_pattern

    def _show(self, layer: int) -> None:
        """Hand the layer over once its pattern and its head outputs are both there."""
        if self.run.grad or not {"pattern", "z"} <= self.seen.keys():
            return
        seen, self.seen = self.seen, {}
        window = self.layout.shape.windows[layer]
        view = BridgeLayerView(layer, seen["pattern"], seen.get("value"), window, self.run.real)
        if self.run.is_read(Tap("pattern", layer)):
            self.run.show(TapView(Tap("pattern", layer), self.run.span, view))
        self.run.show(TapView(Tap("z", layer), self.run.span, view, seen["z"]))


@dataclass(eq=False)
class EditScope(AttentionTaps):
    """Edits of every pass of a bridge while the scope is open: headscope's, and its own."""

    writes: Writes
    own: OwnPasses | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hook the bridge until the scope ends."""
        with ExitStack() as stack:
            stack.enter_context(scope_over(self.module, self))
            self.own = stack.enter_context(watched(self.module))
            stack.enter_context(self.attached())
            yield

    def touches(self, layer: int, *sites: str) -> bool:
        """Whether some of these sites of a layer are written."""
        return any(Tap(site, layer) in self.writes for site in sites)

    @property
    def acts(self) -> bool:
        """Whether no measurement runs."""
        return not use_of(self.module).measuring()

    def hooks(self, parts: BridgeLayer) -> Iterator[Hook]:
        """Hooks of one layer."""
        yield from super().hooks(parts)
        if self.touches(parts.layer, "pattern") and parts.kernel is None:
            if not parts.pattern_is_live:
                raise _not_live(parts.layer)
            layer = parts.layer
            yield self.mine(parts.pattern, lambda value: self.at_pattern(layer, value))

    def through(self, site: str, layer: int, value: Tensor) -> Tensor:
        """A value as it is written, at the positions of whatever pass runs."""
        count = value.shape[1 if site == "z" else 2]
        run = use_of(self.module).running()
        where = self.own if run is None else run
        span = (getattr(where, "span", None) or Span.whole(count)).last(count)
        return written(Tap(site, layer), value, [self.writes], span)


def _not_live(layer: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {layer} shows its attention pattern only after it was used, so that it cannot be "
        "edited."
    )
