"""Attention implementation registered in transformers, which passes on each layer's call.

transformers routes the attention of most architectures through a public registry. Under our
entry every layer calls :func:`_attend` with its final queries, keys and values, and masks are
facts (which keys are real, which rule the mask follows), so that no ``[L, L]`` mask is ever built.

Some families (mpnet, megatron-bert) compute attention in code of their own instead. Within a scope
the product of queries and keys in that code makes :class:`Scores`, which collect what the code does
to them, and their product with the values comes to the same place.
"""

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headscope.base.stacks import CAUSAL, MaskRule
from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused, visible_keys
from headscope.models.hf.hooks import Call, Hook, after, before, hooked
from headscope.models.hf.removed import heads_left
from headscope.models.hf.transformers_api import (
    MaskFunction,
    Switch,
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
        modules: modules whose calls count; None: all.
        thread: thread whose calls count; None: all.
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
    """A config that is switched to our attention, with its original setting."""

    config: Any
    before: str | None
    users: int = 0


# Innermost last. Models may share a config, and threads may share a model: calls without a route
# are computed normally, and a config gets its attention back when the last user leaves.
_ROUTES: tuple[Route, ...] = ()
_SWITCHED: dict[int, _Switched] = {}
_GUARD = threading.RLock()


# Attribute that marks a mask as ours. Masks pass through model code, which keeps attributes as long
# as it keeps the tensor.
_FACTS = "headscope_mask"
# Tensor keyword arguments that do not affect attention weights.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "position_embeddings", "image_sizes", "logits_to_keep"}
)
# Masks up to this many entries are checked in full; larger ones at this many rows.
_WHOLE, _ROWS = 1 << 16, 16
# Modules with keys from another sequence than their queries, which calls do not declare.
_CROSS: "WeakSet[torch.nn.Module]" = WeakSet()


@dataclass(frozen=True)
class MaskFacts:
    """Facts about one attention call that the model's mask reveals.

    Attributes:
        rule: which keys a query sees, apart from padding.
        padded: whether any key is padding.
        end: number of keys visible to any query; a static cache has more.
        function: transformers' mask function of examples, heads, queries and keys.
        use_vmap: whether the function takes single indices only.
        refused: why attention under this mask is refused; None if it is not. Some families also
            make masks that no attention is called with (an encoder's, in bart's decoder).
        reach: last visible key of blocks of positions that see each other; see
            :class:`AttentionCall`.
        keys: mask of real keys, if the family added a bias to its mask (beit) and the facts are
            those of the bias; None if they are the mask's own.
    """

    rule: MaskRule
    padded: bool
    end: int
    function: MaskFunction
    use_vmap: bool
    refused: str | None = None
    reach: Tensor | None = None
    keys: Tensor | None = None


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
    """Facts of a mask that we built; None for other masks."""
    facts: MaskFacts | None = getattr(mask, _FACTS, None)
    return facts


def with_facts(mask: Tensor, facts: MaskFacts) -> Tensor:
    """Mark a mask as ours, e.g. a copy of one for a larger batch."""
    # A tensor of a class of its own (on a simulated device) stays what it is.
    marked = mask.as_subclass(_Mask) if type(mask) in (Tensor, _Mask) else mask
    setattr(marked, _FACTS, facts)
    return marked


class _Mask(Tensor):
    """Mask that stays ours where a family adds scores of relative positions to it (beit)."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add a bias to the mask; all else is torch's own."""
        if _named(func) == "add" and len(args) == 2:
            mask, other = args if mask_facts(args[0]) is not None else args[::-1]
            if (facts := mask_facts(mask)) is not None and mask_facts(other) is None:
                return _biased(mask, facts, other)
        plain: Any = super()
        return plain.__torch_function__(func, types, args, kwargs or {})


def _named(func: Any) -> str:
    """Name of a function or method of torch, the same for all forms of one operation."""
    name = getattr(func, "__name__", str(func)).strip("_")
    return {"radd": "add", "iadd": "add", "truediv": "div", "rmul": "mul", "imul": "mul"}.get(
        name, name
    )


def _biased(mask: Tensor, facts: MaskFacts, bias: Tensor) -> Tensor:
    """A mask with what a family added to it."""
    if facts.keys is not None:
        return with_facts(mask.as_subclass(Tensor) + bias, facts)
    return with_facts(bias.clone(), replace(facts, keys=mask.as_subclass(Tensor)))


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

    A mask without a known rule is refused when attention uses it.
    """
    if attention_mask is not None and mask_facts(attention_mask) is not None:
        return attention_mask  # a model passed its mask to an inner model (paligemma)
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
    elif not rule.causal:  # keys may belong to another sequence, and are all present
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
        None if the mask is another; else the rule and the last key that each position sees.
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
        # For bidirectional windows, this counts one side without the query itself.
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
        handler: takes the calling module and its call, and returns ``[batch query head d_value]``.
            Pruned heads are in the call under their own numbers, filled with zeros.
        modules: modules whose calls are routed; None: all.
        all_threads: also route calls of other threads.
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
    facts = mask_facts(attention_mask)
    if facts is not None and attention_mask is not None:
        attention_mask = attention_mask.as_subclass(Tensor)
        if facts.keys is not None:  # the family's own bias came with the mask
            added = _by_head(attention_mask, query.shape[1])
            position_bias = added if position_bias is None else position_bias + added
            attention_mask = facts.keys
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModelError("it builds an attention mask of its own.")
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


def _by_head(bias: Tensor, heads: int) -> Tensor:
    """A bias as ``[_ head query key]``."""
    whole = bias[None] if bias.ndim == 3 else bias
    return whole.expand(-1, heads, -1, -1)


class OwnCode(Switch):
    """Attention modules of a model whose code computes attention itself (mpnet).

    Under our name they make :class:`Scores` of queries and keys; under any other they run as they
    are.

    Args:
        modules: that multiply queries and keys.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.modules = tuple(modules)
        self._before: list[Any] = []

    def set_to(self, name: str | None) -> None:
        """Put our product of queries and keys into the modules, or take it out."""
        if (name == NAME) == (self.named == NAME):
            self.named = name
            return
        self.named = name
        if name != NAME:
            for module, own in zip(self.modules, self._before, strict=True):
                module.__dict__.pop("forward")
                module.__dict__.update({} if own is None else {"forward": own})
            return
        self._before = [module.__dict__.get("forward") for module in self.modules]
        for module in self.modules:
            module.__dict__["forward"] = partial(_scored, module, module.forward)


def _scored(module: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Output of a module of such a family, with None in place of its whole pattern."""
    with _Products(module):
        output = forward(*args, **kwargs)
    if isinstance(output, tuple):
        return tuple(None if isinstance(one, Scores) else one for one in output)
    return output


class _Products(TorchFunctionMode):
    """Scope in which the first product of queries and keys is scores.

    What comes later is what hooks inside the module compute.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module: torch.nn.Module | None = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make scores of a product of queries ``[batch head query d_head]`` and keys."""
        whole = all(type(one) is Tensor and one.ndim == 4 for one in args)
        if self.module is not None and whole and _named(func) == "matmul":
            module, self.module = self.module, None
            return Scores(module, args[0], args[1].mT)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Scores:
    """Attention scores that are not computed: what they are of, and what was done to them.

    Attributes:
        module: whose they are.
        query, key: ``[batch head position d_head]``.
        scaling: multiplier of their product.
        bias: what was added to it.
        mask: ours, once it was added.
        normal: whether a softmax was taken.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    normal: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """That of queries."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """That of queries."""
        return self.query.device

    @property
    def shape(self) -> torch.Size:
        """Axes ``batch head query key``."""
        return torch.Size((*self.query.shape[:3], self.key.shape[2]))

    def __getattr__(self, name: str) -> Any:
        """Refuse what scores of no known family are asked for."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(name)

    def __truediv__(self, number: Any) -> "Scores":
        """Scores divided by a number."""
        return self.__mul__(1 / number)

    def __mul__(self, number: Any) -> "Scores":
        """Scores times a number."""
        if self.normal or self.mask is not None or isinstance(number, Tensor):
            raise _unknown("mul")
        bias = None if self.bias is None else self.bias * number
        return replace(self, scaling=self.scaling * float(number), bias=bias)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> "Scores":
        """Scores with a mask of ours, or with a bias."""
        if self.normal or not isinstance(other, Tensor):
            raise _unknown("add")
        if mask_facts(other) is not None:
            if self.mask is not None:
                raise _unknown("add")
            return replace(self, mask=other)
        if other.ndim not in (3, 4) or other.shape[-2:] != self.shape[-2:]:
            raise _unknown("add")
        bias = _by_head(other, self.query.shape[1])
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    __radd__ = __add__
    __iadd__ = __add__

    def to(self, *_: Any, **__: Any) -> "Scores":
        """The same: rows are computed in fp32."""
        return self

    def softmax(self, dim: int | None, *_: Any, **__: Any) -> "Scores":
        """The same, of which a softmax over keys was taken."""
        if self.normal or dim not in (-1, 3):
            raise _unknown("softmax")
        return replace(self, normal=True)

    def __matmul__(self, value: Tensor) -> Tensor:
        """Average of values, outside the scope that this is called in."""
        product: Any = torch.matmul
        averaged: Tensor = product(self, value)
        return averaged

    def average(self, value: Tensor) -> Tensor:
        """Values ``[batch head key d_head]`` averaged by the softmax of these scores."""
        if not self.normal:
            raise _unknown("matmul")
        made, _ = _attend(
            self.module,
            self.query,
            self.key,
            value,
            self.mask,
            scaling=self.scaling,
            position_bias=self.bias,
            is_causal=False,
        )
        return made.transpose(1, 2)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What functions of torch make of scores."""
        name, named = _named(func), kwargs or {}
        if name in ("add", "mul") and len(args) == 2:
            one, other = args if isinstance(args[0], Scores) else args[::-1]
            made: Scores = one + other if name == "add" else one * other
            return made
        scores = args[0]
        if not isinstance(scores, Scores):
            raise _unknown(name)
        if name == "softmax":
            return scores.softmax(named.get("dim", args[1] if len(args) > 1 else None))
        if name == "dropout" and not named.get("training", args[2] if len(args) > 2 else True):
            return scores
        if name == "matmul":
            return scores.average(args[1])
        if name == "div" and len(args) == 2:
            return scores / args[1]
        raise _unknown(name)


def _unknown(name: str) -> UnsupportedModelError:
    """Refusal of attention that does something else to its scores."""
    return UnsupportedModelError(
        "its attention is code of its own, which makes more of its scores than a multiple, a bias, "
        f"a mask and a softmax (it calls {name}), so its rows cannot be told."
    )


def own_attention(module: torch.nn.Module, run: Callable[[], Any]) -> tuple[torch.nn.Module, ...]:
    """Modules of a model in whose own code a softmax over keys is taken, in order.

    Args:
        module: the model.
        run: one pass of it.
    """
    looking = _Looking()
    hooks = [hook for part in module.modules() for hook in looking.hooks(part)]
    with hooked(hooks), looking, torch.no_grad():
        run()
    return tuple(looking.found)


class _Looking(TorchFunctionMode):
    """Scope that notes which module takes the softmax of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[torch.nn.Module] = []
        self.found: dict[torch.nn.Module, None] = {}

    def hooks(self, part: torch.nn.Module) -> tuple[Hook, Hook]:
        """Hooks that say when a module runs."""

        def enter(module: torch.nn.Module, _call: Call) -> None:
            self.running.append(module)

        def leave(_module: torch.nn.Module, _call: Call, _output: Any) -> None:
            self.running.pop()

        return before(part, enter), after(part, leave, first=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the module with parts of its own that is running."""
        if _named(func) == "softmax" and args and getattr(args[0], "ndim", 0) == 4:
            whole = (one for one in reversed(self.running) if any(True for _ in one.children()))
            self.found.update({one: None for one in [next(whole, None)] if one is not None})
        return func(*args, **(kwargs or {}))


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
