"""What a scorer sees of attention: exact rows of one layer, for some query positions."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.stacks import CAUSAL, MaskRule


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """Attention of one layer, for one chunk of query positions. Never written to.

    Attributes:
        layer: the model's layer number.
        query_pos: position of each row's query.
        pattern: softmax probabilities in fp32; rows sum to 1, less what a learned sink takes;
            0 where a key is not visible. The key axis starts at position 0 and may end before
            the text does, at the last key that any of these queries can see.
        visible: which keys the query may see: mask rule and padding together.
            Padding queries see themselves alone and are in no mean.
        mask: rule of the layer, padding apart.
    """

    layer: int
    query_pos: Int[Tensor, " query"]
    pattern: Float[Tensor, "batch head query key"]
    visible: Bool[Tensor, "batch query key"]
    mask: MaskRule = CAUSAL

    @cached_property
    def total(self) -> Float[Tensor, "batch head query"]:
        """Sum of each row: 1, less what a learned sink takes."""
        return self.pattern.sum(-1)

    @cached_property
    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Entropy of each row in nats, of the row divided by its sum; NaN for an empty row."""
        total = self.total
        # Half the time of torch.special.entr.
        plogp = self.pattern.clamp_min(1e-38).log_().mul_(self.pattern)
        return (total.log() - plogp.sum(-1) / total).clamp_min(0)

    def mass(self, keys: Bool[Tensor, "batch query key"]) -> Float[Tensor, "batch head query"]:
        """Probability on a set of keys; NaN where no key of the set is visible.

        Args:
            keys: the set, for every example and query of this chunk; keys past the last visible
                one may be given and count for nothing.
        """
        reachable = keys[..., : self.pattern.shape[-1]] & self.visible
        weights = reachable.to(self.pattern.dtype).unsqueeze(1)
        mass: Tensor = torch.linalg.vecdot(self.pattern, weights)
        return mass.masked_fill(~reachable.any(-1).unsqueeze(1), float("nan"))

    def column_mass(self, keys: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch head query"]:
        """Probability on a set of keys that is the same for every query; NaN as in :meth:`mass`.

        One matrix product over the chunk, without a copy of it.
        """
        keys = keys[:, : self.pattern.shape[-1]].to(self.pattern.device)
        weights = keys.to(self.pattern.dtype)[:, :, None]
        mass = torch.matmul(self.pattern.flatten(1, 2), weights).view(self.pattern.shape[:-1])
        seen = (self.visible & keys[:, None]).any(-1)
        return mass.masked_fill(~seen.unsqueeze(1), float("nan"))

    def at(self, key_pos: Int[Tensor, "batch query"]) -> Float[Tensor, "batch head query"]:
        """Probability on one key per query; NaN where it is negative or not visible."""
        index = key_pos.clamp(0, self.pattern.shape[-1] - 1)
        reachable = (
            self.visible.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            & (key_pos >= 0)
            & (key_pos < self.pattern.shape[-1])
        )
        heads = self.pattern.shape[1]
        picked = self.pattern.gather(-1, index[:, None, :, None].expand(-1, heads, -1, 1)).squeeze(
            -1
        )
        return picked.masked_fill(~reachable.unsqueeze(1), float("nan"))

    def without_first(self, first: Int[Tensor, " batch"]) -> "AttentionRows":
        """The same rows with each example's first real key removed, renormalised.

        This is the sink-corrected form: what a head does with the attention that it does
        not park on the first token. A row whose whole mass lay there becomes 0.

        Args:
            first: first real position of each example.
        """
        keys = torch.arange(self.pattern.shape[-1], device=self.pattern.device)
        keep = (keys[None] != first.to(keys.device)[:, None])[:, None, :]
        kept = self.pattern * keep[:, None]
        total = kept.sum(-1, keepdim=True)
        return replace(self, pattern=kept / total.clamp_min(1e-30), visible=self.visible & keep)

    def weighted(self, value_norms: Float[Tensor, "batch head key"]) -> "AttentionRows":
        """The same rows weighted by how much each key's value writes, renormalised.

        Entry (i, j) becomes ``A_ij |v_j W_O| / sum_k A_ik |v_k W_O|`` (Kobayashi et al. 2020):
        attention on a key whose value is near zero moves nothing.

        Args:
            value_norms: ``|v_j W_O|`` for every head and key.
        """
        moved = self.pattern * value_norms.unsqueeze(-2)
        total = moved.sum(-1, keepdim=True)
        return replace(self, pattern=moved / total.clamp_min(1e-30))

    def uniform(self) -> "AttentionRows":
        """One head that spreads its attention evenly over the visible keys: the flat null.

        Its rows sum to 1, also where a learned sink takes part of the model's own rows.
        """
        shown = self.visible.to(self.pattern.dtype)
        return replace(
            self, pattern=(shown / shown.sum(-1, keepdim=True).clamp_min(1)).unsqueeze(1)
        )
