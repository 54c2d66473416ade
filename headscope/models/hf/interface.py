"""Attention implementation registered in transformers, which passes on each layer's call.

transformers routes the attention of most architectures through a public registry. Under our
entry every layer calls :func:`_attend` with its final queries, keys and values, and masks are
facts (which keys are real, which rule the mask follows), so that no ``[L, L]`` mask is ever built.
"""

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from headscope.base.stacks import CAUSAL, MaskRule
from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused, visible_keys
from headscope.models.hf.removed import heads_left
from headscope.models.hf.transformers_api import (
    MaskFunction,
    attention_name,
    padding_of_keys,
    plain_rule,
    register_attention,
    set_attention_name,
    visible_by,
)

NAME = "headscope_stream"
Handler = Callable[[torch.nn.Module, AttentionCall], Tensor]


@dataclass(frozen=True, eq=False)
class Route:
    """Destination of the attention calls of some modules.

    Attributes:
        modules: whose calls; None: everybody's.
        thread: in which thread; None: in all.
    """

    handler: Handler
    modules: Container[torch.nn.Module] | None
    thread: int | None

    def takes(self, module: torch.nn.Module) -> bool:
        """Whether a call from a module in this thread goes here."""
        here = self.thread is None or self.thread == threading.get_ident()
        return here and (self.modules is None or module in self.modules)


@dataclass
class _Switched:
    """A config whose attention is ours for now, and what it was."""

    config: Any
    before: str | None
    users: int = 0


# Innermost last. Models may share a config, and threads a model: a call that no route takes is
# computed as it is, and a config gets its attention back when the last that uses it leaves.
_ROUTES: tuple[Route, ...] = ()
_SWITCHED: dict[int, _Switched] = {}
_GUARD = threading.RLock()


# Attribute of a mask that says what it is. A mask is handed through code of the model, which keeps
# attributes as long as it keeps the tensor.
_FACTS = "headscope_mask"
# Keyword arguments with tensors that change nothing about which key a query sees, or how much.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings"})
# Entries of a mask up to which every row of it is looked at, and rows that are looked at above.
_WHOLE, _ROWS = 1 << 16, 16
# Modules whose keys are of another sequence than their queries, which no call says of itself.
_CROSS: "WeakSet[torch.nn.Module]" = WeakSet()


@dataclass(frozen=True)
class MaskFacts:
    """Facts about one attention call that the model's mask reveals.

    Attributes:
        rule: which keys a query sees, padding apart.
        padded: whether any key is padding.
        end: number of keys that any query sees; a static cache has more.
        function: transformers' definition of the mask, of examples, heads, queries and keys.
        use_vmap: whether that takes single indices only.
        refused: why attention under this mask is refused; None where it is not. Some families
            also make masks that no attention is called with (an encoder's, in bart's decoder).
        reach: of blocks of positions that see each other; see :class:`AttentionCall`.
    """

    rule: MaskRule
    padded: bool
    end: int
    function: MaskFunction
    use_vmap: bool
    refused: str | None = None
    reach: Tensor | None = None


_MADE: ContextVar[list[MaskFacts] | None] = ContextVar("headscope_masks", default=None)


def register() -> None:
    """Register our attention in transformers. Idempotent."""
    register_attention(NAME, _attend, _mask)


def know_cross(module: torch.nn.Module) -> None:
    """Register a module whose attention reads keys of another sequence."""
    _CROSS.add(module)


@contextmanager
def made_masks() -> Iterator[list[MaskFacts]]:
    """Context manager that lists the masks made within it."""
    made: list[MaskFacts] = []
    token = _MADE.set(made)
    try:
        yield made
    finally:
        _MADE.reset(token)


def mask_facts(mask: Tensor | None) -> MaskFacts | None:
    """Facts of a mask that we made; None for another mask."""
    facts: MaskFacts | None = getattr(mask, _FACTS, None)
    return facts


def with_facts(mask: Tensor, facts: MaskFacts) -> Tensor:
    """Mark a mask as ours, e.g. a copy of one for a larger batch."""
    setattr(mask, _FACTS, facts)
    return mask


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_others: Any,
) -> Tensor:
    """Build our mask: real keys and rule; see transformers' AttentionMaskInterface.

    A mask that no rule describes is refused where attention uses it.
    """
    if attention_mask is not None and mask_facts(attention_mask) is not None:
        return attention_mask  # a model handed its mask to the model inside it (paligemma)
    first = int(q_offset)
    end = first + q_length - kv_offset
    real = padding_of_keys(attention_mask, kv_length, kv_offset)
    rule, refused, reach = plain_rule(mask_function), None, None
    if rule is None:
        rule = CAUSAL
        try:
            rule = _rule(
                mask_function,
                batch_size,
                torch.arange(first, first + q_length, device=device),
                torch.arange(kv_offset, kv_offset + end, device=device),
                local_size,
                use_vmap,
            )
        except UnsupportedModelError as error:
            whole = first == kv_offset == 0 and q_length == kv_length
            blocks = _blocks(mask_function, batch_size, end, use_vmap, device) if whole else None
            if blocks is None:
                refused = str(error)
            else:
                rule, reach = blocks
    elif rule.causal and local_size is not None:
        rule = MaskRule("causal", local_size)
    elif not rule.causal:  # of keys that may be of another sequence, and are all there
        end = kv_length
    padded = real is not None and not bool(real[:, :end].all())
    mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    mask = mask if real is None else real.to(device).clone()
    facts = MaskFacts(rule, padded, end, mask_function, use_vmap, refused, reach)
    if (listed := _MADE.get()) is not None and refused is None:
        listed.append(facts)
    return with_facts(mask, facts)


def _rule(
    function: MaskFunction,
    batch: int,
    queries: Tensor,
    keys: Tensor,
    local_size: int | None,
    use_vmap: bool,
) -> MaskRule:
    """Rule of a mask, checked against the mask itself."""
    if len(queries) * len(keys) > _WHOLE:
        pick = torch.linspace(0, len(queries) - 1, _ROWS, device=queries.device).long()
        queries = queries[torch.cat([pick, pick[-1:] - 1]).clamp_min(0)]
    shown = visible_by(function, batch, queries, keys, use_vmap=use_vmap)
    for rule in _rules(local_size):
        expected = visible_keys(queries - keys[0], slice(0, len(keys)), batch, mask=rule, real=None)
        if torch.equal(shown, expected):
            return rule
    raise UnsupportedModelError(
        "its attention mask is neither causal nor bidirectional nor a sliding window (e.g. chunks "
        "or blocks), so which keys a query sees cannot be told from its position."
    )


def _blocks(
    function: MaskFunction, batch: int, length: int, use_vmap: bool, device: torch.device | str
) -> tuple[MaskRule, Tensor] | None:
    """Rule of a causal mask with bidirectional blocks, and those blocks.

    Returns:
        None where the mask is another; else the rule and the last key that each position sees.
    """
    places = torch.arange(length, device=device)
    parts = places.split(max(1, _WHOLE // length))

    def shown(queries: Tensor) -> Tensor:
        return visible_by(function, batch, queries, places, use_vmap=use_vmap)

    reach = torch.cat([length - 1 - shown(one).flip(-1).int().argmax(-1) for one in parts], 1)
    counts = torch.cat([shown(one).sum(-1) for one in parts], 1)
    alone = (reach[:, :, None] == reach[:, None]).sum(-1) == 1
    window = int(counts[alone].max()) if bool(alone.any()) else length
    for rule in (MaskRule("causal", window), CAUSAL):
        expected = (
            visible_keys(one, slice(0, length), batch, mask=rule, real=None, reach=reach)
            for one in parts
        )
        if all(torch.equal(shown(one), own) for one, own in zip(parts, expected, strict=True)):
            return (CAUSAL if window >= length else rule), reach
    return None


def _rules(local_size: int | None) -> Iterator[MaskRule]:
    """Candidate rules of a mask, narrowest first, as a short text does not reveal windows."""
    if local_size is not None:
        yield MaskRule("causal", local_size)
        # Counted to one side without the query itself where both sides are seen.
        yield MaskRule("bidirectional", local_size + 1)
    yield CAUSAL
    yield MaskRule("bidirectional")


@contextmanager
def routed(
    configs: tuple[Any, ...],
    handler: Handler,
    modules: Container[torch.nn.Module] | None = None,
    *,
    all_threads: bool = False,
) -> Iterator[None]:
    """Context manager that sends attention calls to ``handler``.

    Args:
        configs: config objects that the model's modules hold.
        handler: gets the calling module and its call, returns ``[batch query head d_value]``.
            Heads that were pruned are in the call, under their numbers, with nothing but zeros.
        modules: whose calls go there; None: everybody's.
        all_threads: whether calls of other threads go there too.
    """
    global _ROUTES
    route = Route(handler, modules, None if all_threads else threading.get_ident())
    entered: list[Any] = []
    try:
        with _GUARD:
            _ROUTES = (*_ROUTES, route)
            for config in configs:
                _switch_on(config)
                entered.append(config)
        yield
    finally:
        with _GUARD:
            _ROUTES = tuple(one for one in _ROUTES if one is not route)
            for config in reversed(entered):
                _switch_off(config)


def _switch_on(config: Any) -> None:
    one = _SWITCHED.get(id(config)) or _Switched(config, attention_name(config))
    one.users += 1
    _SWITCHED[id(config)] = one
    set_attention_name(config, NAME)


def _switch_off(config: Any) -> None:
    one = _SWITCHED[id(config)]
    one.users -= 1
    if one.users == 0:
        set_attention_name(config, one.before)
        del _SWITCHED[id(config)]


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention function with transformers' signature; see its AttentionInterface."""
    _refuse_unknown(ignored)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModelError("it builds an attention mask of its own.")
    facts = mask_facts(attention_mask)
    if facts is not None and facts.refused is not None:
        raise UnsupportedModelError(facts.refused)
    if facts is not None and attention_mask is not None:
        key, value = key[:, :, : facts.end], value[:, :, : facts.end]
        attention_mask = attention_mask[:, : facts.end] if facts.padded else None
        rule = facts.rule
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        rule = MaskRule("causal" if causal else "bidirectional", sliding_window)
    if module in _CROSS:
        rule = MaskRule("cross")
    call = AttentionCall(
        layer=_layer_of(module),
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        real=None if attention_mask is None else attention_mask.bool(),
        mask=rule,
        soft_cap=softcap,
        sinks=s_aux,
        bias=None if position_bias is None else position_bias[..., : key.shape[2]],
        reach=None if facts is None else facts.reach,
    )
    kept = heads_left(module)
    call = call if kept is None else kept.spread_call(call)
    route = next((route for route in reversed(_ROUTES) if route.takes(module)), None)
    return (fused(call) if route is None else route.handler(module, call)), None


def _layer_of(module: torch.nn.Module) -> int:
    """A module's own layer number; -1 if it has none or is shared."""
    number = getattr(module, "layer_idx", None)
    return number if isinstance(number, int) else -1


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Refuse a tensor argument that might change attention in an unknown way."""
    for name, value in arguments.items():
        if name not in _HARMLESS and _holds_tensor(value):
            raise UnsupportedModelError(
                f"its attention is given a tensor {name!r}, and what that does to the rows is not "
                "known to headscope."
            )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensor(one) for one in value)
    return isinstance(value, Tensor)
