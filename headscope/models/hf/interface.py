"""The hook into transformers: an attention implementation that hands each layer over.

transformers routes the attention of most architectures through a public registry. Under our
entry every layer calls :func:`_attend` with its final queries, keys and values, and masks stay
in their flash form (nothing, or ``[batch key]``), so that no ``[L, L]`` mask is ever built.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.removed import kept_in

NAME = "headscope_stream"
Handler = Callable[[torch.nn.Module, AttentionCall], Tensor]
_HANDLER: ContextVar[Handler | None] = ContextVar("headscope_attention", default=None)


def register() -> None:
    """Enter our attention into transformers' registry. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


@contextmanager
def routed(configs: tuple[Any, ...], handler: Handler) -> Iterator[None]:
    """Send every attention call of models with these configs to ``handler``; restore after.

    Args:
        configs: config objects that the model's modules hold.
        handler: gets the calling module and its call, returns ``[batch query head d_value]``.
            Heads that were pruned are in the call, under their numbers, with nothing but zeros.
    """
    before = [config._attn_implementation for config in configs]
    token = _HANDLER.set(handler)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        _HANDLER.reset(token)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


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
    """Stand in for an attention function of transformers; see its AttentionInterface."""
    if position_bias is not None:
        raise UnsupportedModelError("its attention adds a position bias to the scores.")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedModelError("it builds an attention mask of its own.")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise UnsupportedModelError("its attention is not causal (an encoder).")
    call = AttentionCall(
        layer=getattr(module, "layer_idx", -1),
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        real=None if attention_mask is None else attention_mask.bool(),
        window=sliding_window,
        soft_cap=softcap,
        sinks=s_aux,
    )
    handler = _HANDLER.get()
    if handler is None:
        return fused(call), None
    kept = kept_in(module)
    return handler(module, call if kept is None else kept.spread_call(call)), None
