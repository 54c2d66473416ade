"""States read in the vocabulary, a few at a time, so that no [layer pos vocab] is ever kept.

Readers keep a few positions of what lenses read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.heads import ModelShape
from headscope.models.taps import BlockStates, Reads, at_blocks, at_final
from headscope.views import Unembedding

# Entries of one chunk of logits, and of one block of the unembedding in fp32: 64 MB.
_ENTRIES = 1 << 24


class Top(NamedTuple):
    """The largest values of each row, largest first; of equals the lowest index comes first."""

    values: Float[Tensor, "row k"]
    ids: Int[Tensor, "row k"]


def row_chunks(rows: int, unembedding: Unembedding) -> Iterator[slice]:
    """Runs of rows whose logits fit a chunk."""
    step = max(1, _ENTRIES // unembedding.W_U.shape[0])
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def logits_of(
    unembedding: Unembedding, residual: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_vocab"]:
    """Logits of residual streams, each through its own final norm, soft cap included."""
    logits = _over_vocabulary(
        unembedding, unembedding.normed(residual), lambda block: unembedding.W_U[block]
    )
    if unembedding.b_U is not None:
        logits = logits + unembedding.b_U.float()
    return unembedding.capped(logits * unembedding.logit_scale)


def logits_added(
    unembedding: Unembedding, writes: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_vocab"]:
    """Logits that writes add to the stream, already divided by the final norm's scale."""

    def directions(block: slice) -> Tensor:
        return unembedding.directions(_ids(unembedding)[block])

    return _over_vocabulary(unembedding, writes, directions)


def constants(unembedding: Unembedding) -> Float[Tensor, " d_vocab"]:
    """Part of every logit that no residual stream changes."""
    step = max(1, _ENTRIES // unembedding.W_U.shape[1])
    return torch.cat([unembedding.constant(block) for block in _ids(unembedding).split(step)])


def _ids(unembedding: Unembedding) -> Int[Tensor, " d_vocab"]:
    return torch.arange(unembedding.W_U.shape[0], device=unembedding.W_U.device)


def _over_vocabulary(
    unembedding: Unembedding, rows: Tensor, vectors: Callable[[slice], Tensor]
) -> Float[Tensor, "row d_vocab"]:
    size, width = unembedding.W_U.shape
    step = max(1, _ENTRIES // width)
    starts = range(0, size, step)
    parts = [rows @ vectors(slice(at, min(at + step, size))).float().T for at in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def top_of(values: Float[Tensor, "row d_vocab"], k: int) -> Top:
    """The k largest values of each row; torch alone does not say which of equals it takes."""
    k = min(k, values.shape[1])
    least = values.topk(k, dim=1).values[:, -1:]
    above = values > least
    level = values == least
    wanted = k - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1) <= wanted))
    ids = chosen.nonzero()[:, 1].view(len(values), k)
    found = values.gather(1, ids)
    order = found.sort(dim=1, descending=True, stable=True).indices
    return Top(found.gather(1, order), ids.gather(1, order))


def rank_of(
    values: Float[Tensor, "row d_vocab"], tokens: Int[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """Number of tokens above the wanted one; of equals the lowest id stands above."""
    own = values.gather(1, tokens[:, None])
    lower = torch.arange(values.shape[1], device=values.device)[None] < tokens[:, None]
    return ((values > own) | ((values == own) & lower)).sum(1)


SITES = ("residual", "attention", "mlp")


def row_names(n_layers: int) -> tuple[str, ...]:
    """Places of the residual stream from the bottom up; the last one is the model's own."""
    return ("embedding", *(f"L{layer}" for layer in range(n_layers)))


@dataclass
class States:
    """Keeps chosen positions of chosen sites, by site and place, in layer order.

    Attributes:
        example, position: of each row.
        sites: which.
        rows: what was kept, in fp32.
        final: what entered the final norm.
    """

    example: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    sites: tuple[str, ...] = ("residual",)
    rows: dict[str, dict[str, Float[Tensor, "row d_model"]]] = field(default_factory=dict)
    final: Float[Tensor, "row d_model"] = field(default_factory=lambda: torch.empty(0, 0))

    def __post_init__(self) -> None:
        """Make room."""
        self.rows = {site: {} for site in self.sites}

    def reads(self, shape: ModelShape) -> Reads:
        """Every block, and what enters the final norm."""
        return at_blocks(shape, self._on_block) | at_final(self._on_final)

    def _on_block(self, states: BlockStates) -> None:
        """Keep what the sites name."""
        name = f"L{states.layer}"
        at = (self.example, self.position)
        if "residual" in self.sites:
            if states.layer == 0:
                self.rows["residual"]["embedding"] = states.entering[at].float()
            self.rows["residual"][name] = states.leaving[at].float()
        if "attention" in self.sites and states.attention is not None:
            self.rows["attention"][name] = states.attention[at].float()
        if "mlp" in self.sites:
            self.rows["mlp"][name] = states.mlp[at].float()

    def _on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep what enters the final norm."""
        self.final = residual[self.example, self.position].float()
