"""Redraw heads that rest on BOS, where they do nothing and learn nothing."""

from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from . import measure
from .data import Mixture, Rows

RESTING = 0.8
"""Mean attention to BOS above which a head is redrawn."""


def revive(model: PreTrainedModel, rows: Rows, seed: int) -> list[int]:
    """Redraw the resting heads of a GPT-2's first layer, in place.

    While the first circuit forms, heads that only disturb it learn to look at BOS, and a softmax
    that is sure of BOS passes no gradient on. Query and key start again as half of those of the
    layer's best previous-token head, so that they know positions, plus noise; value and output
    as at the start of training.

    Returns:
        The heads that were redrawn.
    """
    ids, _ = rows.batch(Random(f"revive {seed}"), 16, 64, Mixture(0.3))
    with torch.no_grad():
        pattern = measure.patterns(model, ids)[0]
        best = int(measure.previous_token_scores(pattern[None])[0].argmax())
        resting = pattern[:, :, 8:, 0].mean((0, 2)) > RESTING
        heads = [head for head in range(len(resting)) if resting[head] and head != best]
        torch.manual_seed(seed)
        for head in heads:
            _redraw(model.transformer.h[0].attn, head, best, model.config.n_head)
    return heads


def _redraw(attention: Any, head: int, best: int, n_heads: int) -> None:
    """Draw one head's columns of Q, K, V and rows of O."""
    into, out = attention.c_attn, attention.c_proj
    d_model = out.weight.shape[0]
    d_head = d_model // n_heads
    for part in range(3):
        here, model_head = (
            slice(part * d_model + index * d_head, part * d_model + (index + 1) * d_head)
            for index in (head, best)
        )
        kept = 0.0 if part == 2 else 0.5
        noise = 0.1 * torch.randn(d_model, d_head)
        into.weight[:, here] = kept * into.weight[:, model_head] + noise
        into.bias[here] = kept * into.bias[model_head]
    rows = slice(head * d_head, (head + 1) * d_head)
    out.weight[rows] = 0.03 * torch.randn(d_head, d_model)
