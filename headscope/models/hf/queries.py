"""Attention of a few queries of a stacked pass, over keys that its variants share and own ones."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.attention import AttentionCall, fused, visible_keys
from headscope.models.hf.record import repeated

# Up to so many queries the scores are cheaper than copies of the shared keys and values.
_FEW = 32
_SCORE_ENTRIES = 1 << 23


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of the positions before the replayed ones, the same for every variant."""

    key: Float[Tensor, "batch kv_head prefix d_head"]
    value: Float[Tensor, "batch kv_head prefix d_value"]
    copies: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.key.shape[2]


def joined(call: AttentionCall, prefix: Prefix) -> AttentionCall:
    """The call with the shared keys and values in front of its own."""
    if prefix.length == 0:
        return call
    key = torch.cat([repeated(prefix.key, prefix.copies), call.key], dim=2)
    value = torch.cat([repeated(prefix.value, prefix.copies), call.value], dim=2)
    return replace(call, key=key, value=value)


def attend(
    call: AttentionCall, prefix: Prefix, queries: Int[Tensor, " query"] | None = None
) -> Float[Tensor, "stacked query head d_value"]:
    """Attention output of a replayed layer.

    Args:
        call: queries, keys and values of the replayed positions; its padding mask is whole.
        prefix: what stands before them.
        queries: which of the replayed positions, counted from the first of them; None: all.
    """
    n_queries = call.n_queries if queries is None else len(queries)
    n_keys = prefix.length + call.n_keys
    entries = call.query.shape[0] * call.query.shape[1] * n_queries * n_keys
    if n_queries > _FEW or entries > _SCORE_ENTRIES or (queries is None and prefix.length == 0):
        z = fused(joined(call, prefix))
        return z if queries is None else z[:, queries]
    if queries is None:
        queries = torch.arange(call.n_queries, device=call.query.device)
    return _few(call, prefix, queries)


def _few(
    call: AttentionCall, prefix: Prefix, queries: Int[Tensor, " query"]
) -> Float[Tensor, "stacked query head d_value"]:
    """Exact softmax over both sets of keys, without a copy of the shared ones."""
    stacked, kv_heads, own, d_head = call.key.shape
    copies, group = prefix.copies, call.query.shape[1] // kv_heads
    batch = stacked // copies
    query = call.query[:, :, queries].float() * call.scaling
    rows = group * len(queries)
    by_group = query.reshape(copies, batch, kv_heads, rows, d_head)
    shared = by_group.permute(1, 2, 0, 3, 4).reshape(batch, kv_heads, copies * rows, d_head)
    before = torch.matmul(shared, prefix.key.float().mT)
    before = before.reshape(batch, kv_heads, copies, rows, -1).permute(2, 0, 1, 3, 4)
    after = torch.matmul(by_group.flatten(0, 1), call.key.float().mT)
    scores = torch.cat([before.reshape(stacked, kv_heads, rows, -1), after], dim=-1)
    n_keys = prefix.length + own
    visible = visible_keys(prefix.length + queries, n_keys, stacked, mask=call.mask, real=call.real)
    pattern = call.softmax(scores.reshape(stacked, -1, len(queries), n_keys), visible)
    pattern = pattern.reshape(copies, batch, kv_heads, rows, n_keys).to(call.value.dtype)
    over = pattern[..., : prefix.length].permute(1, 2, 0, 3, 4)
    over = torch.matmul(over.reshape(batch, kv_heads, copies * rows, -1), prefix.value)
    z = over.reshape(batch, kv_heads, copies, rows, -1).permute(2, 0, 1, 3, 4).flatten(0, 1)
    z = z + torch.matmul(pattern[..., prefix.length :].flatten(0, 1), call.value)
    return z.reshape(stacked, -1, len(queries), z.shape[-1]).transpose(1, 2)
