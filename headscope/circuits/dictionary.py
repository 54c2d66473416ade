"""The vocabulary on both ends of a circuit: what tokens put in, what logits take out."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.models.protocol import HeadModel

Embedding = Literal["raw", "mlp", "mlp_only"]
Gram = Literal["output_input", "input", "output"]

# Entries of one block of vocabulary vectors: 16 MB in fp32.
_BLOCK_ENTRIES = 1 << 22
# Entries of the table of all tokens behind the first MLP, 128 MB in fp32: a larger one is not
# kept, and blocks of it are computed whenever they are asked for.
_KEPT_ENTRIES = 1 << 25


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

    _kept: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def kind(self, layer: int) -> int:
        """Number that layers share where tokens look alike to their heads."""
        return 0 if self.embedding == "raw" else min(layer, 1)

    @property
    def _keeps(self) -> bool:
        return self.size * self.model.shape.d_model <= _KEPT_ENTRIES

    @cached_property
    def _after_mlp(self) -> Float[Tensor, "d_vocab d_model"]:
        """What all tokens look like behind the first MLP; kept, since blocks are read often."""
        added = torch.empty_like(self.model.parts.embedding)
        for block in self.blocks():
            added[block] = self._behind_mlp(block).to(added.dtype)
        return added

    def _behind_mlp(self, tokens: Int[Tensor, " token"] | slice) -> Tensor:
        rows = self.model.parts.embedding[tokens].float()
        change = self.model.parts.first_mlp(rows)
        return change if self.embedding == "mlp_only" else rows + change

    def inputs(self, tokens: Int[Tensor, " token"] | slice, layer: int) -> Tensor:
        """Vectors ``[token d_model]`` that these tokens put into heads of a layer."""
        if self.embedding == "raw" or layer == 0:
            return self.model.parts.embedding[tokens].float()
        kept = "_after_mlp" in self.__dict__ or (isinstance(tokens, slice) and self._keeps)
        return self._after_mlp[tokens].float() if kept else self._behind_mlp(tokens)

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

    def gram(self, kind: Gram, layer: int) -> Float[Tensor, "d_model d_model"]:
        """Gram matrix of vectors of all tokens, shared by all heads of a layer and kept.

        ``output_input``: ``W_U.T @ E``; ``input``: ``E.T @ E`` with the mean over the vocabulary
        removed; ``output``: ``W_U.T @ W_U``.
        """
        key = (kind, self.kind(layer))
        if key not in self._kept:
            width = self.model.shape.d_model
            gram = torch.zeros(width, width, dtype=torch.float32, device=self.model.device)
            for out, given in self._pairs(kind, layer):
                gram += out.T @ given
            self._kept[key] = gram
        return self._kept[key]

    def gram_times(
        self, kind: Gram, layer: int, columns: Float[Tensor, "*head d_model column"], *, few: bool
    ) -> Float[Tensor, "*head d_model column"]:
        """Product of :meth:`gram` with some columns; without the matrix itself where they are few.

        Args:
            kind: of the matrix.
            layer: whose heads read the tokens.
            columns: to be multiplied.
            few: whether these are the only columns, and fewer than pay for the whole matrix.
        """
        if not few or (kind, self.kind(layer)) in self._kept:
            return self.gram(kind, layer) @ columns
        product = torch.zeros_like(columns)
        for out, given in self._pairs(kind, layer):
            product += out.T @ (given @ columns)
        return product

    def gram_trace(self, kind: Gram, layer: int) -> Float[Tensor, ""]:
        """Trace of :meth:`gram`, without the matrix."""
        if (kind, self.kind(layer)) in self._kept:
            return self.gram(kind, layer).trace()
        return torch.stack([(out * given).sum() for out, given in self._pairs(kind, layer)]).sum()

    def _pairs(self, kind: Gram, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Both factors of a Gram matrix, a block of the vocabulary at a time."""
        for block in self.blocks():
            if kind == "input":
                centred = self.inputs(block, layer) - self._input_mean(layer)
                yield centred, centred
            else:
                out = self.outputs(block)
                yield out, out if kind == "output" else self.inputs(block, layer)

    def _input_mean(self, layer: int) -> Tensor:
        key = ("mean", self.kind(layer))
        if key not in self._kept:
            total = sum(self.inputs(block, layer).sum(0) for block in self.blocks())
            self._kept[key] = torch.as_tensor(total) / self.size
        return self._kept[key]
