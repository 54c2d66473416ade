"""One layer's attention call: exact softmax rows on demand, and the fused output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headscope.base.stacks import CAUSAL, MaskRule
from headscope.views import AttentionRows, QueryKeys, WindowRows

# Entries of one boolean mask or block of scores in the fused path: negligible next to the
# activations, but large enough to make the loop cheap.
_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Final queries, keys and values of one layer, with everything that determines the softmax.

    Attributes:
        layer: the model's layer number.
        query, key, value: after rotation and norms, as used by attention.
        scaling: multiplier of the scores.
        real: False at padding, from position 0 on, even if a replay holds only the last keys; None
            without padding.
        mask: which keys a query sees, apart from padding.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
        sinks: learned extra logit per head that takes part in the softmax (gpt-oss).
        bias: bias added to the scaled scores, e.g. by relative position (t5), shared by all
            examples or one per example.
        reach: last key that each position sees, if some positions see later keys within their own
            block (tokens of an image, a prefix), equal for positions of one block; None without
            such blocks.
    """

    layer: int
    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    scaling: float
    real: Bool[Tensor, "batch pos"] | None = None
    mask: MaskRule = CAUSAL
    soft_cap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    bias: Float[Tensor, "_ head query key"] | None = None
    reach: Int[Tensor, "batch pos"] | None = None

    @property
    def n_queries(self) -> int:
        """Number of queries; fewer than keys during decoding."""
        return self.query.shape[2]

    @property
    def n_keys(self) -> int:
        """Number of keys, including cached ones."""
        return self.key.shape[2]

    @property
    def first_query(self) -> int:
        """Position of the first query among the keys, if they belong to the same sequence."""
        return 0 if self.mask.kind == "cross" else self.n_keys - self.n_queries

    @property
    def positions(self) -> Int[Tensor, " query"]:
        """Positions of the queries, starting at :attr:`first_query`."""
        last = self.first_query + self.n_queries
        return torch.arange(self.first_query, last, device=self.query.device)

    def up_to(self, end: int) -> "AttentionCall":
        """The call without keys from ``end`` on, the unused slots of a static cache."""
        if self.n_keys <= end:
            return self
        real = None if self.real is None else self.real[:, :end]
        if real is not None and bool(real.all()):
            real = None
        bias = None if self.bias is None else self.bias[..., :end]
        key, value = self.key[:, :, :end], self.value[:, :, :end]
        return replace(self, key=key, value=value, real=real, bias=bias)

    def of_heads(self, heads: Sequence[int]) -> "AttentionCall":
        """The call restricted to some query heads, each with its own key/value head."""
        index = torch.tensor(tuple(heads), device=self.query.device)
        shared = index // (self.query.shape[1] // self.key.shape[1])
        return replace(
            self,
            query=self.query[:, index],
            key=self.key[:, shared],
            value=self.value[:, shared],
            sinks=None if self.sinks is None else self.sinks[index],
            bias=None if self.bias is None else self.bias[:, index],
        )

    @cached_property
    def key_fp32(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """Keys in fp32, converted once per layer."""
        return self.key.float()

    def visible(
        self, positions: Int[Tensor, " query"], keys: slice
    ) -> Bool[Tensor, "batch query key"]:
        """Mask of the keys in a range that each query position sees.

        A padding query sees only itself, so no row is empty; in cross-attention, whose keys belong
        to another sequence, it sees the same keys as other queries.
        """
        batch = self.query.shape[0]
        return visible_keys(
            positions, keys, batch, mask=self.mask, real=self.real, reach=self.reach
        )

    def seen_by(self, positions: Int[Tensor, " query"]) -> slice:
        """Smallest range of keys that contains all that these queries see.

        Args:
            positions: query positions, on the CPU to avoid a device sync.
        """
        if self.reach is not None:
            return slice(0, self.n_keys)
        return self.mask.span(int(positions.min()), int(positions.max()), self.n_keys)

    def rows(self, positions: Int[Tensor, " query"]) -> AttentionRows:
        """Exact softmax rows in fp32, over the keys visible to any of the queries.

        Args:
            positions: query positions, counted as in :attr:`positions`, on the CPU to avoid a
                device sync. Under a window, neighbours take little memory, and positions far apart
                all that lies between.
        """
        keys = self.seen_by(positions)
        positions = positions.to(self.query.device)
        visible = self.visible(positions, keys)
        batch, kv_heads, _, d_head = self.key.shape
        query = self.query[:, :, positions - self.first_query].float() * self.scaling
        grouped = query.reshape(batch, kv_heads, -1, d_head)
        scores = torch.matmul(grouped, self.key_fp32[:, :, keys].mT)
        scores = scores.view(batch, -1, len(positions), keys.stop - keys.start)
        if (bias := self.bias_of(positions, keys)) is not None:
            scores = scores + bias
        pattern = self.softmax(scores, visible)
        if keys.start == 0:
            return AttentionRows(self.layer, positions, pattern, visible, self.mask)
        return WindowRows(self.layer, positions, pattern, visible, self.mask, keys.start)

    def bias_of(
        self, positions: Int[Tensor, " query"], keys: slice
    ) -> Float[Tensor, "_ head query key"] | None:
        """Bias added to the scores of some queries and keys, in fp32; None without one."""
        if self.bias is None:
            return None
        return self.bias[:, :, positions - self.first_query, keys].float()

    def query_keys(self, positions: Int[Tensor, " query"]) -> QueryKeys:
        """Queries at some positions, and keys up to the last visible to any of them."""
        keys = slice(0, self.seen_by(positions).stop)
        positions = positions.to(self.query.device)
        return QueryKeys(
            layer=self.layer,
            query_pos=positions,
            query=self.query[:, :, positions - self.first_query].float(),
            key=self.key_fp32[:, :, keys],
            scaling=self.scaling,
            soft_cap=self.soft_cap,
            bias=self.bias_of(positions, keys),
            visible=self.visible(positions, keys),
        )

    def softmax(
        self,
        scores: Float[Tensor, "batch head query key"],
        visible: Bool[Tensor, "batch query key"],
    ) -> Float[Tensor, "batch head query key"]:
        """Softmax of scaled scores, in place, including soft cap, mask and sink."""
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        scores = scores.masked_fill_(~visible[:, None], float("-inf"))
        pattern = torch.softmax(scores, -1)
        if self.sinks is not None:
            total = torch.logsumexp(scores, -1, keepdim=True)
            pattern = pattern * torch.sigmoid(total - self.sinks.float()[None, :, None, None])
        return pattern

    def average(
        self, pattern: Float[Tensor, "batch head query key"], first_key: int = 0
    ) -> Float[Tensor, "batch query head d_value"]:
        """Values averaged by a pattern, in the model's dtype.

        Args:
            pattern: attention rows of any queries.
            first_key: position of the pattern's first key.
        """
        batch, kv_heads, _, d_value = self.value.shape
        _, heads, queries, n_keys = pattern.shape
        grouped = pattern.to(self.value.dtype).reshape(batch, kv_heads, -1, n_keys)
        z = torch.matmul(grouped, self.value[:, :, first_key : first_key + n_keys])
        return z.view(batch, heads, queries, d_value).transpose(1, 2)


def visible_keys(
    positions: Int[Tensor, " query"],
    keys: slice,
    batch: int,
    *,
    mask: MaskRule,
    real: Bool[Tensor, "batch pos"] | None,
    reach: Int[Tensor, "batch pos"] | None = None,
) -> Bool[Tensor, "batch query key"]:
    """Mask of the keys in a range that each query position sees, padding included.

    A padding query sees only itself if keys belong to its own sequence. Positions with the same
    ``reach`` see each other; see :class:`AttentionCall`.
    """
    places = torch.arange(keys.start, keys.stop, device=positions.device)
    ruled: Tensor = mask.visible(positions, places)[None].expand(batch, -1, -1)
    if reach is not None:
        ruled = ruled | (reach[:, positions, None] == reach[:, None, keys])
    if real is None:
        return ruled
    if mask.kind == "cross":
        return ruled & real[:, None, keys]
    itself = places[None] == positions[:, None]
    shown = ruled & real[:, None, keys]
    padding = ~real[:, positions]
    return torch.where(padding[:, :, None], itself[None], shown)


def fused(call: AttentionCall) -> Float[Tensor, "batch query head d_value"]:
    """Attention output of every query, holding at most a block of scores at a time.

    Uses torch's fused kernel where it can express the layer, in blocks of queries if a mask is
    needed, and blocks of exact rows for soft caps and learned sinks.
    """
    if call.soft_cap is not None or call.sinks is not None:
        rows = (call.rows(block) for block in _blocks(call))
        return torch.cat([call.average(one.held, one.first_key) for one in rows], dim=1)
    hidden = call.mask.sees(call.n_keys) < call.n_keys
    hidden = hidden or call.bias is not None or call.reach is not None
    square = call.n_queries in (1, call.n_keys) or not call.mask.causal
    if call.real is None and not hidden and square:
        causal = call.mask.causal and call.n_queries > 1
        z = _sdpa(call, call.query, slice(0, call.n_keys), None, causal=causal)
        return z.transpose(1, 2)
    parts = []
    for block in _blocks(call):
        first, last = int(block[0]), int(block[-1])
        keys = call.seen_by(block)
        block = block.to(call.query.device)
        mask = call.visible(block, keys)[:, None]
        if (bias := call.bias_of(block, keys)) is not None:
            mask = bias.masked_fill(~mask, float("-inf")).to(call.query.dtype)
        query = call.query[:, :, first - call.first_query : last + 1 - call.first_query]
        parts.append(_sdpa(call, query, keys, mask, causal=False).transpose(1, 2))
    return torch.cat(parts, dim=1)


def _blocks(call: AttentionCall) -> Iterator[Int[Tensor, " query"]]:
    """Ranges of query positions whose scores fit a block."""
    sees = call.n_keys if call.reach is not None else call.mask.sees(call.n_keys)
    width = min(call.n_keys, 2 * sees)
    rows = call.query.shape[0] * width
    if any(one is not None for one in (call.soft_cap, call.sinks, call.bias)):
        rows *= call.query.shape[1]
    size = max(1, min(call.n_queries, _BLOCK_ENTRIES // rows))
    last = call.first_query + call.n_queries
    return iter(torch.arange(call.first_query, last).split(size))


def _sdpa(
    call: AttentionCall,
    query: Float[Tensor, "batch head query d_head"],
    keys: slice,
    mask: Shaped[Tensor, "_ _ query key"] | None,
    *,
    causal: bool,
) -> Float[Tensor, "batch head query d_value"]:
    key, value = call.key[:, :, keys], call.value[:, :, keys]
    group = query.shape[1] // key.shape[1]
    if (
        group > 1 and query.shape[2] == 1 and call.bias is None
    ):  # a decoding step: put the group's queries on the query axis
        z = torch.nn.functional.scaled_dot_product_attention(
            query.unflatten(1, (-1, group)).squeeze(3), key, value, mask, scale=call.scaling
        )
        return z.flatten(1, 2).unsqueeze(2)
    if group > 1:  # the CPU kernels are faster on repeated keys than with enable_gqa
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=call.scaling
    )
