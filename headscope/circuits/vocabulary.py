"""Vocabulary views of circuits: tokens at the input and output end of singular directions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import Saved, Stored
from headscope.base.result import Glance, Shown, sizes
from headscope.circuits.ov_qk import HeadFactors, ov, qk
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.views import Unembedding

Embedding = Literal["raw", "mlp", "mlp_only"]
Gram = Literal["output_input", "input", "output"]

# Entries of one block of vocabulary vectors: 16 MB in fp32.
_BLOCK_ENTRIES = 1 << 22
# Entries of the table of all tokens after the first MLP, 128 MB in fp32: a larger table is not
# cached, and its blocks are recomputed on demand.
_KEPT_ENTRIES = 1 << 25


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Token vectors at a head's input and output.

    Attributes:
        model: the model.
        embedding: ``raw``: the token embedding. ``mlp``: with the first MLP's output added, which
            is closer to what later layers see, above all with tied embeddings; heads of layer 0
            always see the raw embedding. ``mlp_only``: the first MLP's output, without the
            embedding (MAPS).
        fold_norm: use logit directions with the gain of the final norm, centred with it, and with
            the mean over the vocabulary removed, which the softmax ignores; False: rows of ``W_U``.
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
        """Identifier shared by layers whose heads see the same token vectors."""
        return 0 if self.embedding == "raw" else min(layer, 1)

    @property
    def _keeps(self) -> bool:
        return self.size * self.model.shape.d_model <= _KEPT_ENTRIES

    @cached_property
    def _after_mlp(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token vectors after the first MLP, cached because blocks are read often."""
        added = torch.empty_like(self._embedding)
        for block in self.blocks():
            added[block] = self._behind_mlp(block).to(added.dtype)
        return added

    @cached_property
    def _embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Embedding, read once for all blocks of the vocabulary."""
        return self.model.parts.embedding

    @cached_property
    def _unembedding(self) -> Unembedding:
        """Unembedding, read once, with its mean over the vocabulary."""
        return self.model.unembedding

    def _behind_mlp(self, tokens: Int[Tensor, " token"] | slice) -> Tensor:
        rows = self._embedding[tokens].float()
        change = self.model.parts.first_mlp(rows)
        return change if self.embedding == "mlp_only" else rows + change

    def inputs(self, tokens: Int[Tensor, " token"] | slice, layer: int) -> Tensor:
        """Input vectors ``[token d_model]`` of tokens for heads of a layer."""
        if self.embedding == "raw" or layer == 0:
            return self._embedding[tokens].float()
        kept = "_after_mlp" in self.__dict__ or (isinstance(tokens, slice) and self._keeps)
        return self._after_mlp[tokens].float() if kept else self._behind_mlp(tokens)

    def outputs(self, tokens: Int[Tensor, " token"] | slice) -> Float[Tensor, "token d_model"]:
        """Residual directions that raise these tokens' logits."""
        unembedding = self._unembedding
        if not self.fold_norm:
            return unembedding.W_U[tokens].float()
        if isinstance(tokens, slice):
            tokens = torch.arange(self.size, device=unembedding.W_U.device)[tokens]
        return unembedding.directions(tokens) - unembedding.mean_direction

    def blocks(self) -> Iterator[slice]:
        """Ranges of token ids whose vectors fit in a block."""
        step = max(1, _BLOCK_ENTRIES // self.model.shape.d_model)
        return (slice(at, min(at + step, self.size)) for at in range(0, self.size, step))

    def gram(self, kind: Gram, layer: int) -> Float[Tensor, "d_model d_model"]:
        """Gram matrix of all token vectors, shared by all heads of a layer and cached.

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
        """Product of :meth:`gram` with some columns, without forming the matrix if they are few.

        Args:
            kind: kind of the matrix.
            layer: layer whose heads read the tokens.
            columns: columns to multiply.
            few: whether these are the only columns, and too few for the whole matrix to pay off.
        """
        if not few or (kind, self.kind(layer)) in self._kept:
            return self.gram(kind, layer) @ columns
        product = torch.zeros_like(columns)
        for out, given in self._pairs(kind, layer):
            product += out.T @ (given @ columns)
        return product

    def gram_trace(self, kind: Gram, layer: int) -> Float[Tensor, ""]:
        """Trace of :meth:`gram`, without forming the matrix."""
        if (kind, self.kind(layer)) in self._kept:
            return self.gram(kind, layer).trace()
        key = (f"trace of {kind}", self.kind(layer))
        if key not in self._kept:
            parts = [(out * given).sum() for out, given in self._pairs(kind, layer)]
            self._kept[key] = torch.stack(parts).sum()
        return self._kept[key]

    def _pairs(self, kind: Gram, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Both factors of a Gram matrix, block by block over the vocabulary."""
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


@dataclass(frozen=True, eq=False)
class TopTokens(Stored):
    """Tokens with the largest and smallest products with given directions.

    Attributes:
        ids: token ids; along ``sign`` first the most positive, then the most negative.
        values: their products with the direction.
    """

    ids: Int[Tensor, "layer head direction sign token"]
    values: Float[Tensor, "layer head direction sign token"]


@dataclass(frozen=True, eq=False, repr=False)
class VocabularyView(Saved, Shown):
    """Tokens at both ends of every head's largest singular directions.

    The signs of the two ends belong together: input along ``read[..., 0, :]`` produces output along
    ``written[..., 0, :]``, and ``read[..., 1, :]`` produces ``written[..., 1, :]``.

    Attributes:
        S: singular values.
        read: by products of token embeddings with the left singular vector.
        written: by products of logit directions (OV) or of key token embeddings (QK) with the right
            one.
        layers: layer number of each entry of the layer axis.
    """

    S: Float[Tensor, "layer head direction"]
    read: TopTokens
    written: TopTokens
    layers: tuple[int, ...]

    def glance(self) -> Glance:
        """Show shape, and how to see the words."""
        count = self.read.ids.shape[-1]
        return Glance(
            "tokens of singular directions",
            [sizes(("layer", "head", "direction"), self.S.shape), f"{count} tokens at each end"],
            hint="view.words('L5H1', model.tokenizer)",
        )

    def words(self, head: "str | tuple[int, int]", tokenizer: Any) -> list[dict[str, Any]]:
        """Directions of one head with their tokens as text."""
        index = HeadIndex.parse(head)
        if index.layer not in self.layers:
            raise InputError(f"this view has no layer {index.layer}; it has {self.layers}.")
        place = (self.layers.index(index.layer), index.head)

        def text(found: TopTokens, direction: int, sign: int) -> list[str]:
            ids = found.ids[place][direction, sign].tolist()
            return [str(one) if tokenizer is None else tokenizer.decode([one]) for one in ids]

        return [
            {
                "singular_value": float(self.S[place][direction]),
                "reads": [text(self.read, direction, sign) for sign in (0, 1)],
                "writes": [text(self.written, direction, sign) for sign in (0, 1)],
            }
            for direction in range(self.S.shape[-1])
        ]


@checked
@own_types()
def vocabulary_view(
    factors: HeadFactors, words: Dictionary, directions: int = 5, tokens: int = 10
) -> VocabularyView:
    """Top tokens of every head's largest singular directions, in one pass over the vocabulary.

    Takes the memory of one block of the vocabulary against all directions, whatever its size.

    Args:
        factors: from :func:`ov` or :func:`qk`, with the norm folded.
        words: token vectors; ``mlp`` shows tokens as later layers see them.
        directions: number of directions of each head.
        tokens: number of tokens at each end of a direction.

    Source: Millidge and Black 2022; Dar et al. 2022. Known weakness: directions of nearly equal
    singular value may be mixed by any rotation, so that only their span means something.

    Example:
        >>> words = hs.circuits.Dictionary(model)
        >>> view = hs.circuits.vocabulary_view(hs.circuits.ov(model), words, directions=2, tokens=3)
        >>> type(view).__name__
        'VocabularyView'
    """
    svd = factors.svd()
    U, Vh = svd.U[..., :directions].mT, svd.Vh[:, :, :directions]
    read = _top_tokens(U, words, factors.layers, tokens, logits=False)
    written = _top_tokens(Vh, words, factors.layers, tokens, logits=factors.name == "OV")
    return VocabularyView(svd.S[..., :directions], read, written, factors.layers)


@checked
@own_types()
def vocabulary_words(
    model: HeadModel, directions: int = 3, tokens: int = 6
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Tokens of every head's largest directions as text: circuit -> head -> directions.

    Token embeddings are raw. Circuits that the family does not allow are left out.

    Args:
        model: from :func:`headscope.load`.
        directions: number of directions of each head.
        tokens: number of tokens at each end of a direction.

    Example:
        >>> sorted(hs.circuits.vocabulary_words(model, directions=1, tokens=2))
        ['OV', 'QK']
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    words = Dictionary(model, "raw")
    for circuit in (ov, qk):
        try:
            factors = circuit(model)
            view = vocabulary_view(factors, words, directions, tokens)
        except UnsupportedModelError:
            continue
        found[factors.name] = {
            str(head): view.words(head, model.tokenizer) for head in model.shape.heads
        }
    return found


def _top_tokens(
    vectors: Float[Tensor, "layer head direction d_model"],
    words: Dictionary,
    layers: tuple[int, ...],
    count: int,
    *,
    logits: bool,
) -> TopTokens:
    count = min(count, words.size)
    parts = []
    for kind in sorted({words.kind(layer) for layer in layers}):
        chosen = [place for place, layer in enumerate(layers) if words.kind(layer) == kind]
        flat = vectors[chosen].flatten(0, 2)
        best = [_Best(count), _Best(count)]
        for block in words.blocks():
            table = words.outputs(block) if logits else words.inputs(block, kind)
            scores = flat @ table.T
            best[0].add(scores, block.start)
            best[1].add(-scores, block.start)
        ids = torch.stack([one.ids for one in best], 1)
        values = torch.stack([best[0].values, -best[1].values], 1)
        shape = (len(chosen), *vectors.shape[1:3], 2, count)
        parts.append(TopTokens(ids.view(shape), values.view(shape)))
    return TopTokens(torch.cat([p.ids for p in parts]), torch.cat([p.values for p in parts]))


class _Best:
    """The largest scores of each row so far; on ties the lower id."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values = torch.empty(0)
        self.ids = torch.empty(0, dtype=torch.long)

    def add(self, scores: Float[Tensor, "row token"], first: int) -> None:
        values, ids = scores.topk(min(self.count, scores.shape[1]), dim=1)
        ids = ids + first
        if self.values.numel():
            values = torch.cat([self.values, values], 1)
            ids = torch.cat([self.ids, ids], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.count]
        self.values, self.ids = values.gather(1, order), ids.gather(1, order)
