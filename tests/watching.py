"""Look at a pass through an object: every attention layer, every block, and the end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headscope.heads import ModelShape
from headscope.models.protocol import Edit, HeadModel
from headscope.models.taps import Reads, Texts, at_blocks, at_final, at_layers, writes_of


def reads_of(shape: ModelShape, eyes: Any) -> Reads:
    """``on_layer`` of attention layers, ``on_block`` of blocks, ``on_final`` if it is wanted."""
    if hasattr(eyes, "reads"):
        return eyes.reads(shape)
    reads: Reads = at_layers(shape, eyes.on_layer)
    if hasattr(eyes, "on_block"):
        reads |= at_blocks(shape, eyes.on_block)
    if getattr(eyes, "wants_final", False):
        reads |= at_final(eyes.on_final)
    return reads


def watch(
    model: HeadModel,
    tokens: Tensor,
    eyes: Any,
    *,
    real: Tensor | None = None,
    edits: Sequence[Edit] = (),
    logits_at: Tensor | None = None,
) -> Tensor:
    """Logits of a pass that somebody looks at."""
    reads, writes = reads_of(model.shape, eyes), writes_of(edits)
    logits = model.run(Texts(tokens, real), reads=reads, writes=writes, logits_at=logits_at)
    return torch.empty(len(tokens), 0, model.shape.n_logits) if logits is None else logits
