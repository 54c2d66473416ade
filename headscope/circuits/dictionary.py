"""The vocabulary on both ends of a circuit: what tokens put in, what logits take out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.protocol import HeadModel

Embedding = Literal["raw", "mlp", "mlp_only"]

# Entries of one block of vocabulary vectors: 64 MB in fp32.
_BLOCK_ENTRIES = 1 << 24


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Vectors of all tokens as a head's input and as its output.

    Attributes:
        model: whose vocabulary it is.
        embedding: ``raw``: the token embedding. ``mlp``: with what the first MLP adds to it,
            which is nearer to what later layers see, above all where embedding and unembedding
            are tied; heads of layer 0 see the raw embedding in any case. ``mlp_only``: what the
            first MLP adds, without the embedding (MAPS).
        fold_norm: logit directions with the gain of the final norm, centred with it, and with
            the mean over the vocabulary removed, which no softmax sees; False: rows of ``W_U``.
    """

    model: HeadModel
    embedding: Embedding = "raw"
    fold_norm: bool = True

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.model.shape.d_vocab

    @cached_property
    def _after_mlp(self) -> Float[Tensor, "d_vocab d_model"]:
        """What all tokens look like behind the first MLP; kept, since blocks are read often."""
        raw = self.model.parts.embedding
        added = torch.empty_like(raw)
        for block in self.blocks():
            row = raw[block].float()
            change = self.model.parts.first_mlp(row)
            added[block] = (change if self.embedding == "mlp_only" else row + change).to(raw.dtype)
        return added

    def inputs(self, tokens: Int[Tensor, " token"] | slice, layer: int) -> Tensor:
        """Vectors ``[token d_model]`` that these tokens put into heads of a layer."""
        raw = self.embedding == "raw" or layer == 0
        table = self.model.parts.embedding if raw else self._after_mlp
        return table[tokens].float()

    def outputs(self, tokens: Int[Tensor, " token"] | slice) -> Float[Tensor, "token d_model"]:
        """Residual directions that raise the logits of these tokens."""
        readout = self.model.readout
        if not self.fold_norm:
            return readout.W_U[tokens].float()
        if isinstance(tokens, slice):
            tokens = torch.arange(self.size, device=readout.W_U.device)[tokens]
        return readout.directions(tokens) - readout.mean_direction

    def blocks(self) -> Iterator[slice]:
        """Runs of token ids whose vectors fit in a block."""
        step = max(1, _BLOCK_ENTRIES // self.model.shape.d_model)
        return (slice(at, min(at + step, self.size)) for at in range(0, self.size, step))

    def output_input_gram(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """``W_U.T @ E``, shared by all heads of a layer: one matrix the size of a weight."""
        return self._gram(lambda block: (self.outputs(block), self.inputs(block, layer)))

    def input_gram(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """``E.T @ E`` with the mean over the vocabulary removed."""
        mean = self._input_mean(layer)
        return self._gram(lambda block: (self.inputs(block, layer) - mean,) * 2)

    def output_gram(self) -> Float[Tensor, "d_model d_model"]:
        """``W_U.T @ W_U``."""
        return self._gram(lambda block: (self.outputs(block),) * 2)

    def _input_mean(self, layer: int) -> Tensor:
        total = sum(self.inputs(block, layer).sum(0) for block in self.blocks())
        return torch.as_tensor(total) / self.size

    def _gram(self, pair: "Callable[[slice], tuple[Tensor, Tensor]]") -> Tensor:
        width = self.model.shape.d_model
        gram = torch.zeros(width, width, device=self.model.device)
        for block in self.blocks():
            out, given = pair(block)
            gram += out.T @ given
        return gram
