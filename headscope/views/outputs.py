"""What a scorer sees of what heads write: outputs of one layer, and how the model reads them.

A gradient scorer also sees the gradient of a metric by them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.errors import UnsupportedModelError
from headscope.views.qk import Norm, QueryKeys
from headscope.views.rows import AttentionRows


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
    """How the model turns its last residual stream into logits.

    ``logits = logit_scale * (((x - mean(x)) / scale(x) * gain + bias) @ W_U + b_U)``, with no
    subtraction of the mean where ``centred`` is False (RMSNorm), and before a soft cap.

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
        """What the unembedding reads of a residual stream, in fp32."""
        return self.norm(residual)

    def uncapped(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_vocab"]:
        """Logits of a residual stream before the soft cap."""
        logits = self.normed(residual) @ self.W_U.float().T * self.logit_scale
        if self.b_U is not None:
            logits = logits + self.b_U.float() * self.logit_scale
        return logits

    def capped(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Logits behind the soft cap; the same ones where there is none."""
        if self.soft_cap is None:
            return logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap)

    def logits(self, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any d_vocab"]:
        """Logits of a residual stream: the definition above, soft cap included."""
        return self.capped(self.uncapped(residual))

    def losses(
        self, residual: Float[Tensor, "row d_model"], targets: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """Cross-entropy of each row's target under the logits of its residual stream, in nats.

        Logits exist for some rows and some of the vocabulary at a time, whatever its size: the
        normaliser is summed block by block.
        """
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

    def constant(self, tokens: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Part of each token's logit that no residual stream changes: biases of norm and matrix."""
        constant = self.W_U[tokens].float() @ self.bias.float()
        if self.b_U is not None:
            constant = constant + self.b_U[tokens].float()
        return constant * self.logit_scale

    @cached_property
    def mean_direction(self) -> Float[Tensor, " d_model"]:
        """Mean of :meth:`directions` over the vocabulary: what raises all logits alike."""
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
    """What the heads of one layer write at some query positions. Never written to.

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
            norm's gain and centring are in ``W_O``. None where no norm follows attention.
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
        """Queries and keys of the same queries; only if a scorer asks."""
        return self.make_query_keys()

    @cached_property
    def rows(self) -> AttentionRows:
        """Attention rows of the same queries; computed only if a scorer asks."""
        return self.make_rows()

    def norm(self) -> Float[Tensor, "batch head query"]:
        """Euclidean length of every head's write, through the Gram matrix of ``W_O``."""
        gram = self.W_O.float() @ self.W_O.float().mT
        squared = torch.einsum("bqhd,hde,bqhe->bhq", self.z, gram, self.z)
        return self._scaled(squared.clamp_min(0).sqrt())

    def averaged(
        self, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch query head d_head"]:
        """Values averaged by another pattern over the first keys: what ``z`` would then be."""
        return self._summed(pattern, self.values[:, :, : pattern.shape[-1]])

    def of_keys(self, keys: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch query head d_head"]:
        """The part of ``z`` that comes from a set of keys: ``sum of A[i, j] v[j]`` over them.

        Args:
            keys: the set; best on the CPU (``probe.host``): counting them on a device waits for it.
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
    """Head outputs of one layer and the gradient of a metric by them. Never write to them.

    Attributes:
        layer: its number.
        query_pos: positions, ascending.
        z: what each head gives before the output projection, in fp32.
        gradient: derivative of the example's metric by ``z``, all later layers included.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    z: Float[Tensor, "batch query head d_head"]
    gradient: Float[Tensor, "batch query head d_head"]
