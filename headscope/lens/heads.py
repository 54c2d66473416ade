"""The logit lens of single heads: tokens that a head's output promotes and suppresses."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import InputError
from headscope.lens.prompt import Prompt, Promptish, read_prompt, token_texts
from headscope.lens.reading import Top, logits_added, row_chunks, top_of
from headscope.models.blocks import BlockStates
from headscope.models.protocol import HeadModel, LayerView
from headscope.models.running import own_types
from headscope.origin import origin
from headscope.table.lens import HeadWords


@own_types()
@torch.no_grad()
def head_lens(model: HeadModel, prompt: Promptish, position: int = -1, *, k: int = 10) -> HeadWords:
    """Tokens whose logits each head's output at one position raises and lowers most.

    ``(write_h . d_v) / s`` less its mean over the vocabulary v (a shift of all logits changes no
    prediction), in logits: d_v is the residual direction of token v's logit, s the final norm's
    denominator in this run, held fixed, and so is that of a norm after attention. The value of
    token v is the head's part in :func:`attribute` of v, but for that mean. Heads that were pruned
    say nothing, and to ask for them is an error.

    Args:
        model: from :func:`headscope.load`.
        prompt: text, or token ids.
        position: of the head's output.
        k: tokens on each side.

    Raises:
        InputError: if the prompt or position does not fit the model.

    Source: nostalgebraist 2020; Elhage et al. 2021, section on the direct path. Known weakness:
    early heads write for later layers, not for the vocabulary.

    Example:
        >>> import headscope as hs
        >>> words = head_lens(hs.load(), [5, 9, 5, 9], k=3)
        >>> len(words.promoted("L0H0")), len(words.suppressed("L0H0"))
        (3, 3)
    """
    if k < 1:
        raise InputError(f"k must be at least 1; got {k}.")
    text = read_prompt(model, prompt)
    at = text.at(position)
    writes = HeadWrites(model, at)
    with model.parts.blocks_shown(writes):
        model.forward(
            text.ids[None], observers=[writes], logits_at=torch.empty(0, dtype=torch.long)
        )
    vectors = torch.cat(list(writes.vectors.values())) / model.readout.scale(writes.final)
    chunks = row_chunks(len(vectors), model.readout)
    logits = (logits_added(model.readout, vectors[chosen]) for chosen in chunks)
    return head_words(model, text, at, tuple(writes.vectors), logits, k)


def head_words(
    model: HeadModel,
    text: Prompt,
    at: int,
    layers: tuple[int, ...],
    logits: Iterable[Float[Tensor, "row d_vocab"]],
    k: int,
) -> HeadWords:
    """Largest and smallest logits of every head, above their mean over the vocabulary.

    Args:
        model: whose tokens they are.
        text: the prompt.
        at: position of the heads' outputs.
        layers: of the heads.
        logits: what heads add, layer by layer, head by head, in any pieces.
        k: tokens on each side.
    """
    best: tuple[list[Top], list[Top]] = ([], [])
    for piece in logits:
        centred = piece - piece.mean(1, keepdim=True)
        best[0].append(top_of(centred, k))
        best[1].append(top_of(-centred, k))
    shape = (len(layers), model.shape.n_heads, -1)
    ids = np.stack([_joined(side, "ids").reshape(shape) for side in best], 2)
    values = np.stack([_joined(side, "values").reshape(shape) for side in best], 2)
    values[:, :, 1] *= -1
    texts = np.array(token_texts(model.tokenizer, ids.ravel().tolist()), dtype=object)
    return HeadWords(
        token=text.texts[at],
        position=at,
        layers=layers,
        ids=ids,
        texts=texts.reshape(ids.shape),
        values=values.astype(np.float64),
        removed=frozenset(model.shape.removed),
        provenance=origin(model, reading="head lens", tokens=len(text), position=at),
    )


def _joined(tops: list[Top], name: str) -> np.ndarray:
    return np.concatenate([getattr(one, name).cpu().numpy() for one in tops])


@dataclass
class HeadWrites:
    """Observer that keeps what every head adds to the residual stream at one position.

    Attributes:
        at: the position.
        vectors: by layer, with the scale of a norm after attention held.
        final: last residual stream there.
    """

    model: HeadModel
    at: int
    vectors: dict[int, Float[Tensor, "head d_model"]] = field(default_factory=dict)
    final: Float[Tensor, " d_model"] = field(default_factory=lambda: torch.empty(0))
    wants_final: bool = True

    def on_layer(self, view: LayerView) -> None:
        """Keep each head's write, before a norm that may follow attention."""
        weights = self.model.output_weights(view.layer).float()
        z = view.z[0, self.at].float()
        self.vectors[view.layer] = torch.einsum("he,hem->hm", z, weights)

    def on_block(self, states: BlockStates) -> None:
        """Take it through that norm."""
        if states.head_sum is not None:
            write = self.model.parts.attention_write(states.layer)
            vectors = self.vectors[states.layer]
            scale = write.scale(states.head_sum[0, self.at]).expand(len(vectors))
            self.vectors[states.layer] = write.vectors(vectors, scale)

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Keep the position's last residual stream."""
        self.final = residual[0, self.at].float()
