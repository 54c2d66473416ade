"""What scorers read from a layer: attention rows, head outputs, queries and keys, weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from headscope.base.stacks import CAUSAL, MaskRule
from headscope.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Attention rows of one layer for one chunk of query positions; read-only.

    Attributes:
        layer: the model's layer number.
        query_pos: position of each row's query.
        pattern: softmax probabilities in fp32; rows sum to 1 minus the share of a learned sink; 0
            where a key is not visible. The key axis starts at position 0 and may end before the
            text does, at the last key that any of these queries can see.
        visible: keys that each query may see, by mask rule and padding. Padding queries see
            themselves alone and are in no mean.
        mask: rule of the layer, padding apart.

    Under a window few keys of a long text are visible. :attr:`held` and :attr:`held_visible` are
    then the same over those keys alone, from position :attr:`first_key` on; methods use these, and
    ``pattern`` is filled up with zeros only when it is asked for.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    pattern: Float[Tensor, "batch head query key"]
    visible: Bool[Tensor, "batch query key"]
    mask: MaskRule = CAUSAL

    @property
    def first_key(self) -> int:
        """Position of the first key in :attr:`held`; no query of the chunk sees an earlier one."""
        return 0

    @property
    def held(self) -> Float[Tensor, "batch head query key"]:
        """``pattern`` from :attr:`first_key` on."""
        return self.pattern

    @property
    def held_visible(self) -> Bool[Tensor, "batch query key"]:
        """``visible`` from :attr:`first_key` on."""
        return self.visible

    @property
    def is_whole(self) -> bool:
        """Whether ``pattern`` or ``visible`` is in memory from position 0 on."""
        return "pattern" in self.__dict__ or "visible" in self.__dict__

    @property
    def n_keys(self) -> int:
        """Number of keys, counted from position 0."""
        return self.first_key + self.held.shape[-1]

    @property
    def keys(self) -> slice:
        """Positions of the keys in :attr:`held`."""
        return slice(self.first_key, self.n_keys)

    @cached_property
    def key_pos(self) -> Int[Tensor, " key"]:
        """Position of each key in :attr:`held`."""
        return torch.arange(self.first_key, self.n_keys, device=self.held.device)

    def over(
        self,
        pattern: Float[Tensor, "batch head query key"],
        visible: Bool[Tensor, "batch query key"] | None = None,
    ) -> "AttentionRows":
        """The same queries and keys with other numbers.

        Args:
            pattern: over the keys of :attr:`held`.
            visible: mask of visible keys. Default: unchanged.
        """
        shown = self.held_visible if visible is None else visible
        if self.first_key == 0:
            return AttentionRows(self.layer, self.query_pos, pattern, shown, self.mask)
        return WindowRows(self.layer, self.query_pos, pattern, shown, self.mask, self.first_key)

    @cached_property
    def total(self) -> Float[Tensor, "batch head query"]:
        """Sum of each row: 1 minus the share of a learned sink."""
        return self.held.sum(-1)

    @cached_property
    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Entropy of each normalised row in nats; NaN for an empty row."""
        total = self.total
        # Half the time of torch.special.entr.
        plogp = self.held.clamp_min(1e-38).log_().mul_(self.held)
        return (total.log() - plogp.sum(-1) / total).clamp_min(0)

    def mass(self, keys: Bool[Tensor, "batch query key"]) -> Float[Tensor, "batch head query"]:
        """Attention mass on a set of keys; NaN where no key of the set is visible.

        Args:
            keys: the set, per example and query of this chunk; keys past the last visible position
                are allowed and count as 0.
        """
        reachable = keys[..., self.keys] & self.held_visible
        weights = reachable.to(self.held.dtype).unsqueeze(1)
        mass: Tensor = torch.linalg.vecdot(self.held, weights)
        return mass.masked_fill(~reachable.any(-1).unsqueeze(1), float("nan"))

    def column_mass(self, keys: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch head query"]:
        """Attention mass on a set of keys that all queries share; NaN as in :meth:`mass`.

        Computed as one matrix product over the chunk, without a copy.
        """
        keys = keys[:, self.keys].to(self.held.device)
        weights = keys.to(self.held.dtype)[:, :, None]
        mass = torch.matmul(self.held.flatten(1, 2), weights).view(self.held.shape[:-1])
        seen = (self.held_visible & keys[:, None]).any(-1)
        return mass.masked_fill(~seen.unsqueeze(1), float("nan"))

    def at(self, key_pos: Int[Tensor, "batch query"]) -> Float[Tensor, "batch head query"]:
        """Attention to one key per query; NaN where the key is negative or not visible."""
        index = (key_pos - self.first_key).clamp(0, self.held.shape[-1] - 1)
        reachable = (
            self.held_visible.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            & (key_pos >= self.first_key)
            & (key_pos < self.n_keys)
        )
        heads = self.held.shape[1]
        picked = self.held.gather(-1, index[:, None, :, None].expand(-1, heads, -1, 1)).squeeze(-1)
        return picked.masked_fill(~reachable.unsqueeze(1), float("nan"))

    def without_first(self, first: Int[Tensor, " batch"]) -> "AttentionRows":
        """Remove each example's first real key and renormalise the rows.

        This is the sink-corrected form: how a head distributes the attention that it does not park
        on the first token. A row whose whole mass was there becomes 0.

        Args:
            first: first real position of each example.
        """
        keep = (self.key_pos[None] != first.to(self.held.device)[:, None])[:, None, :]
        kept = self.held * keep[:, None]
        total = kept.sum(-1, keepdim=True)
        return self.over(kept / total.clamp_min(1e-30), self.held_visible & keep)

    def weighted(self, value_norms: Float[Tensor, "batch head key"]) -> "AttentionRows":
        """Weight rows by the norm of what each key's value writes, and renormalise.

        Entry (i, j) becomes ``A_ij |v_j W_O| / sum_k A_ik |v_k W_O|`` (Kobayashi et al. 2020):
        attention on a key whose value is near zero moves nothing.

        Args:
            value_norms: ``|v_j W_O|`` for every head and key of the text.
        """
        moved = self.held * value_norms[..., self.keys].unsqueeze(-2)
        total = moved.sum(-1, keepdim=True)
        return self.over(moved / total.clamp_min(1e-30))

    def uniform(self) -> "AttentionRows":
        """Rows of one head with uniform attention over the visible keys: the flat null.

        Rows sum to 1, even where a learned sink takes part of the model's own rows.
        """
        shown = self.held_visible.to(self.held.dtype)
        return self.over((shown / shown.sum(-1, keepdim=True).clamp_min(1)).unsqueeze(1))


class WindowRows(AttentionRows):
    """Attention rows that hold the keys of a window alone; see :class:`AttentionRows`."""

    def __init__(
        self,
        layer: int,
        query_pos: Int[Tensor, " query"],
        pattern: Float[Tensor, "batch head query key"],
        visible: Bool[Tensor, "batch query key"],
        mask: MaskRule = CAUSAL,
        first_key: int = 0,
    ) -> None:
        """Store rows whose keys begin at ``first_key``."""
        self.__dict__.update(
            layer=layer, query_pos=query_pos, mask=mask, _held=pattern, _seen=visible, _at=first_key
        )

    @property
    def first_key(self) -> int:
        """Position of the first key that is held."""
        at: int = self.__dict__["_at"]
        return at

    @property
    def held(self) -> Float[Tensor, "batch head query key"]:
        """The rows, over the keys that are held."""
        held: Tensor = self.__dict__["_held"]
        return held

    @property
    def held_visible(self) -> Bool[Tensor, "batch query key"]:
        """Which of the keys that are held each query sees."""
        seen: Tensor = self.__dict__["_seen"]
        return seen

    @cached_property
    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """The rows from position 0 on, as large as the text up to there."""
        return pad(self.held, (self.first_key, 0))

    @cached_property
    def visible(self) -> Bool[Tensor, "batch query key"]:
        """Which keys from position 0 on each query sees."""
        return pad(self.held_visible, (self.first_key, 0))


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the residual stream: ``(x - mean(x)) / scale(x) * gain + bias``.

    The mean is not subtracted if ``centred`` is False (RMSNorm), and nothing is divided if
    ``divides`` is False (attention reads the residual stream directly).

    Attributes:
        gain: effective multiplier (``1 + weight`` where a family uses that).
        bias: additive part.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    epsilon: float
    divides: bool = True

    def scale(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """Denominator: standard deviation or root mean square, per position."""
        x = residual.float()
        if not self.divides:
            return torch.ones_like(x[..., 0])
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.square().mean(-1) + self.epsilon).sqrt()

    def __call__(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Apply the norm to a residual stream, in fp32."""
        x = residual.float()
        scale = self.scale(residual).unsqueeze(-1)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / scale * self.gain.float() + self.bias.float()

    def folded(
        self, weight: Float[Tensor, "*head d_model d_head"]
    ) -> Float[Tensor, "*head d_model d_head"]:
        """Fold the norm's gain and centring into weights that read its output; bias excluded."""
        read = weight * self.gain.to(weight).unsqueeze(-1)
        return read - read.mean(-2, keepdim=True) if self.centred else read


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary position embedding of one layer: a rotation in some planes of head space.

    A query at position i is ``content @ turn(i)``, a key at j likewise, so that their product
    depends only on ``i - j``. Without rotary positions there are no planes.

    Attributes:
        first, second: coordinates of head space that span each plane.
        frequency: angle in radians by which one position turns each plane.
        gain: length of a rotated vector over its length before (YaRN changes it).
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    frequency: Float[Tensor, " plane"]
    gain: float = 1.0

    def phases(self, distance: int | Float[Tensor, " distance"]) -> Complex[Tensor, " plane"]:
        """Complex factor that each plane applies between a query and a key at a distance.

        For several distances, the mean of their factors.
        """
        at = torch.as_tensor(distance, dtype=torch.float64).reshape(-1, 1)
        angle = at * self.frequency.double().cpu()
        return self.gain**2 * torch.polar(torch.ones_like(angle), angle).mean(0)

    def turned(
        self,
        weight: Float[Tensor, "*any d_head"],
        distance: int | Float[Tensor, " distance"],
    ) -> Float[Tensor, "*any d_head"]:
        """Rotate query weights (or vectors) so that unrotated keys act as at this distance.

        ``turned(q, i - j) @ k`` equals the product of the rotated ``q`` at i and ``k`` at j.
        """
        if not self.first:
            return weight
        phase = self.phases(distance)
        cos, sin = (part.to(weight.dtype).to(weight.device) for part in (phase.real, phase.imag))
        a, b = weight[..., list(self.first)], weight[..., list(self.second)]
        turned = weight.clone()
        turned[..., list(self.first)] = a * cos - b * sin
        turned[..., list(self.second)] = a * sin + b * cos
        return turned


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """Norm of a layer's queries or keys: ``(c - mean(c)) / scale(c) * gain + bias``.

    Attributes:
        gain, bias: multiplier and additive part per coordinate and head.
        centred: whether the mean is subtracted (LayerNorm).
        epsilon: added to the mean square under the root.
        together: whether all heads of a position share one scale (olmo2) or each has its own.
    """

    gain: Float[Tensor, "head d_head"]
    bias: Float[Tensor, "head d_head"]
    centred: bool
    epsilon: float
    together: bool

    def scale(self, content: Float[Tensor, "*any head d_head"]) -> Float[Tensor, "*any head"]:
        """Denominator: standard deviation or root mean square, per position and head."""
        square = (content - self._mean(content)).square()
        over = (-2, -1) if self.together else (-1,)
        found = (square.mean(over, keepdim=True) + self.epsilon).sqrt()
        return found.expand(*content.shape[:-1], 1).squeeze(-1)

    def __call__(
        self, content: Float[Tensor, "*any head d_head"]
    ) -> Float[Tensor, "*any head d_head"]:
        """Apply the norm to queries or keys."""
        x = (content - self._mean(content)) / self.scale(content).unsqueeze(-1)
        return x * self.gain.to(x) + self.bias.to(x)

    def folded(
        self, content: Float[Tensor, "*any head d_head"]
    ) -> Float[Tensor, "*any head d_head"]:
        """Linear part of the norm, without division and bias: all that weights alone determine."""
        return (content - self._mean(content)) * self.gain.to(content)

    def _mean(self, content: Tensor) -> Tensor:
        if not self.centred:
            return content.new_zeros(())
        return content.mean((-2, -1) if self.together else (-1,), keepdim=True)


@dataclass(frozen=True, eq=False)
class QueryKey:
    """Maps ``x W_Q + b_Q`` and ``x W_K + b_K`` to the queries and keys that are multiplied.

    Applied in order: a norm if there is one, rotation, a constant multiplier.

    Attributes:
        rotation: rotary embedding; without planes if there is none.
        query_norm, key_norm: None if there is none.
        query_scale, key_scale: constant multipliers of queries and keys (opt scales its queries
            first); usually 1.
    """

    rotation: Rotation
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None
    query_scale: float = 1.0
    key_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class QueryKeys:
    """Queries at some positions and all keys that they can see; read-only.

    Attributes:
        layer: the model's layer number.
        query_pos: positions of the queries.
        query, key: in fp32, as attention used them: rotated, normalised.
        scaling: multiplier of the products.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)`` where it is given.
        visible: keys that each query sees, by order, window and padding.
        rotation: how positions turned them; only for scorers that need ``rotary``.
        bias: what is added to the products, e.g. by relative position.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    query: Float[Tensor, "batch head query d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    scaling: float
    soft_cap: float | None
    visible: Bool[Tensor, "batch query key"]
    rotation: Rotation | None = None
    bias: Float[Tensor, "_ head query key"] | None = None

    @cached_property
    def scores(self) -> Float[Tensor, "batch head query key"]:
        """Attention scores before mask and softmax, with bias and soft cap applied."""
        scores = self.products(torch.arange(self.query.shape[-1], device=self.key.device))
        if self.bias is not None:
            scores = scores + self.bias
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        return scores

    def products(self, dimensions: Int[Tensor, " some"]) -> Float[Tensor, "batch head query key"]:
        """Contribution of some dimensions of head space to the scores, before any soft cap."""
        batch, kv_heads, keys, _ = self.key.shape
        query = self.query[..., dimensions] * self.scaling
        grouped = query.reshape(batch, kv_heads, -1, len(dimensions))
        part = torch.matmul(grouped, self.key[..., dimensions].mT)
        return part.view(batch, -1, len(self.query_pos), keys)


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Attention weights of one layer, row-vector convention: ``q = x W_Q + b_Q``.

    Key/value heads are not repeated: query head ``h`` reads kv head ``h // (head / kv_head)``.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    W_V: Float[Tensor, "kv_head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "kv_head d_head"]
    b_V: Float[Tensor, "kv_head d_head"]
    b_O: Float[Tensor, " d_model"]


# Entries of one block of logits, and of the unembedding in fp32: 64 MB.
_ENTRIES = 1 << 24


@dataclass(frozen=True, eq=False)
class Unembedding:
    """Final norm and unembedding: maps the last residual stream to logits.

    ``logits = logit_scale * (((x - mean(x)) / scale(x) * gain + bias) @ W_U + b_U)``, then an
    optional soft cap; the mean is not subtracted if ``centred`` is False (RMSNorm).

    Attributes:
        gain: effective multiplier of the final norm (``1 + weight`` where a family uses that).
        bias: additive part of the final norm.
        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)`` where it is given.
    """

    W_U: Float[Tensor, "d_vocab d_model"]
    b_U: Float[Tensor, " d_vocab"] | None
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    epsilon: float
    logit_scale: float = 1.0
    soft_cap: float | None = None

    @property
    def norm(self) -> Norm:
        """The final norm."""
        return Norm(self.gain, self.bias, self.centred, self.epsilon)

    def scale(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any"]:
        """Denominator of the final norm: standard deviation or root mean square, per position."""
        return self.norm.scale(residual)

    def normed(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_model"]:
        """Apply the final norm to a residual stream, in fp32."""
        return self.norm(residual)

    def uncapped(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_vocab"]:
        """Logits of a residual stream before the soft cap."""
        normed, words = self.normed(residual), self.W_U
        # Weights in half precision become fp32 a block at a time, not as a second, larger copy.
        step = len(words) if words.dtype == torch.float32 else _ENTRIES // words.shape[1]
        blocks = words.split(max(1, step))
        logits = torch.cat([normed @ block.float().T for block in blocks], -1) * self.logit_scale
        if self.b_U is not None:
            logits = logits + self.b_U.float() * self.logit_scale
        return logits

    def capped(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Apply the soft cap, if there is one."""
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)

    def logits(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_vocab"]:
        """Logits of a residual stream, soft cap included."""
        return self.capped(self.uncapped(residual))

    def losses(
        self, residual: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """Cross-entropy of each row's target under the logits of its residual stream, in nats.

        Logits are computed for a block of rows and of the vocabulary at a time, and the normaliser
        is summed block by block.
        """
        if residual.requires_grad and torch.is_grad_enabled():
            return self._losses_with_gradient(residual, targets)
        step = max(1, _ENTRIES // self.W_U.shape[1])
        rows = max(1, _ENTRIES // min(step, len(self.W_U)))
        normed, own = self.normed(residual), torch.zeros_like(residual[:, 0], dtype=torch.float32)
        total = torch.full_like(own, -torch.inf)
        for start in range(0, len(self.W_U), step):
            block = slice(start, min(start + step, len(self.W_U)))
            words = self.W_U[block].float().T
            shift = None if self.b_U is None else self.b_U[block].float()
            for at in range(0, len(normed), rows):
                part = slice(at, at + rows)
                logits = normed[part] @ words
                logits = logits if shift is None else logits + shift
                logits = self.capped(logits * self.logit_scale)
                total[part] = torch.logaddexp(total[part], logits.logsumexp(1))
                place = targets[part] - start
                inside = (place >= 0) & (place < logits.shape[1])
                found = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                own[part] = torch.where(inside, found, own[part])
        return total - own

    def _losses_with_gradient(
        self, residual: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The same; logits of some rows at a time are made again when the gradient passes."""

        def some(rows: Tensor, of: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(self.logits(rows), of, reduction="none")

        size = max(1, _ENTRIES // len(self.W_U))
        blocks = zip(residual.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(some, *block, use_reentrant=False) for block in blocks])

    def best(self, residual: Float[Tensor, "row d_model"]) -> Int[Tensor, " row"]:
        """Token with the largest logit in every row, of ties the first; by blocks of rows."""
        size = max(1, _ENTRIES // len(self.W_U))
        return torch.cat([self.logits(part).argmax(-1) for part in residual.split(size)])

    def constant(self, tokens: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Part of each token's logit that does not depend on the residual stream (biases)."""
        constant = self.W_U[tokens].float() @ self.bias.float()
        if self.b_U is not None:
            constant = constant + self.b_U[tokens].float()
        return constant * self.logit_scale

    @cached_property
    def mean_direction(self) -> Float[Tensor, " d_model"]:
        """Mean of :meth:`directions` over the vocabulary: the direction that raises all logits."""
        direction = self.W_U.mean(0, dtype=torch.float32) * self.gain.float() * self.logit_scale
        return direction - direction.mean() if self.centred else direction

    def directions(self, tokens: Int[Tensor, "*any"]) -> Float[Tensor, "*any d_model"]:
        """Residual direction that raises each token's logit, with the final norm's scale at 1.

        A write ``r`` adds ``r @ direction / scale`` to the (uncapped) logit.
        """
        direction = self.W_U[tokens].float() * self.gain.float() * self.logit_scale
        return direction - direction.mean(-1, keepdim=True) if self.centred else direction


def _nothing() -> Any:
    raise UnsupportedModelError(
        "these HeadOutputs were made without access to the layer's values, queries and keys: use "
        "hs.score, or give make_values= and make_query_keys=."
    )


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """Head outputs of one layer at some query positions; read-only.

    Attributes:
        layer: the model's layer number.
        query_pos: positions of the outputs.
        z: attention-weighted values in fp32, before the output projection.
        W_O: output projection per head, so that head ``h`` writes ``z[..., h, :] @ W_O[h]``, over
            ``write_scale`` where there is one.
        unembedding: how the model reads its last residual stream.
        make_rows, make_values, make_query_keys: give attention rows, values, queries and keys to a
            scorer that asks.
        write_scale: denominator of a norm that follows attention, in this run, held fixed; that
            norm's gain and centring are in ``W_O``. None if no norm follows attention.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    z: Float[Tensor, "batch query head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    unembedding: Unembedding
    make_rows: Callable[[], AttentionRows]
    make_values: Callable[[], Float[Tensor, "batch kv_head key d_head"]] = _nothing
    make_query_keys: Callable[[], QueryKeys] = _nothing
    write_scale: Float[Tensor, "batch query"] | None = None

    @cached_property
    def values(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """Value vectors as attention used them, in the model's dtype."""
        return self.make_values()

    @cached_property
    def query_keys(self) -> QueryKeys:
        """Queries and keys of the same query positions, computed on demand."""
        return self.make_query_keys()

    @cached_property
    def rows(self) -> AttentionRows:
        """Attention rows of the same query positions, computed on demand."""
        return self.make_rows()

    def norm(self) -> Float[Tensor, "batch head query"]:
        """Norm of every head's write ``z @ W_O``, through the Gram matrix of ``W_O``."""
        gram = self.W_O.float() @ self.W_O.float().mT
        squared = torch.einsum("bqhd,hde,bqhe->bhq", self.z, gram, self.z)
        return self._scaled(squared.clamp_min(0).sqrt())

    def averaged(
        self, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch query head d_head"]:
        """What ``z`` would be under another pattern over the first keys."""
        return self._summed(pattern, self.values[:, :, : pattern.shape[-1]])

    def of_keys(self, keys: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch query head d_head"]:
        """Part of ``z`` that comes from a set of keys: ``sum of A[i, j] v[j]`` over them.

        Args:
            keys: the set; keep it on the CPU (``probe.host``), since counting it on a device forces
                a sync.
        """
        pattern = self.rows.pattern
        columns = keys[:, : pattern.shape[-1]].any(0).nonzero().squeeze(-1)
        chosen = pattern[..., columns] * keys[:, None, None, columns].to(pattern.device)
        return self._summed(chosen, self.values[:, :, columns])

    def _summed(
        self,
        pattern: Float[Tensor, "batch head query key"],
        values: Float[Tensor, "batch kv_head key d_head"],
    ) -> Float[Tensor, "batch query head d_head"]:
        batch, heads, queries, keys = pattern.shape
        grouped = pattern.reshape(batch, values.shape[1], -1, keys)
        z = torch.matmul(grouped, values.float())
        return z.view(batch, heads, queries, -1).transpose(1, 2)

    def along(
        self, direction: Float[Tensor, "batch query d_model"]
    ) -> Float[Tensor, "batch head query"]:
        """Component of every head's write along one residual direction per query."""
        heads = torch.einsum("hdm,bqm->bqhd", self.W_O.float(), direction)
        return self._scaled(torch.einsum("bqhd,bqhd->bhq", self.z, heads))

    def _scaled(
        self, values: Float[Tensor, "batch head query"]
    ) -> Float[Tensor, "batch head query"]:
        return values if self.write_scale is None else values / self.write_scale[:, None]


@dataclass(frozen=True, eq=False)
class HeadGradients:
    """Head outputs of one layer and the gradient of a metric with respect to them; read-only.

    Attributes:
        layer: its number.
        query_pos: positions, ascending.
        z: head outputs before the output projection, in fp32.
        gradient: derivative of the example's metric with respect to ``z``, through all later
            layers.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    z: Float[Tensor, "batch query head d_head"]
    gradient: Float[Tensor, "batch query head d_head"]
