"""GPT-2 written out in full, with attention scores at hand, to hold relevance against."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import headscope as hs
from headscope.models.protocol import HeadModel

Change = Callable[[int, Tensor], Tensor]


@cache
def bundled() -> HeadModel:
    """The bundled model, loaded once."""
    return hs.load()


def logits(model: GPT2LMHeadModel, tokens: Tensor, change: Change) -> Tensor:
    """Logits ``[pos vocab]`` of one text; ``change(layer, scores [head q k])`` before the mask."""
    body, config = model.transformer, model.config
    length, heads = len(tokens), config.n_head
    x = body.wte.weight[tokens] + body.wpe.weight[:length]
    hidden = torch.ones(length, length).triu(1).bool()
    for number, block in enumerate(body.h):
        y = block.ln_1(x) @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.view(length, heads, -1).transpose(0, 1) for part in y.chunk(3, -1))
        scores = change(number, q @ k.mT / q.shape[-1] ** 0.5)
        z = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        z = z.transpose(0, 1).reshape(length, -1)
        x = x + z @ block.attn.c_proj.weight + block.attn.c_proj.bias
        x = x + block.mlp(block.ln_2(x))
    return body.ln_f(x) @ model.lm_head.weight.T


def suppress(keys: list[int], factor: float, head: tuple[int, int] | None = None) -> Change:
    """Multiply scores of some keys, each taken from the smallest that its row can see."""

    def change(layer: int, scores: Tensor) -> Tensor:
        new = scores.clone()
        for h in range(len(scores)):
            if head not in (None, (layer, h)):
                continue
            for i in range(scores.shape[1]):
                least = scores[h, i, : i + 1].min()
                new[h, i] = scores[h, i] - least
                for key in keys:
                    new[h, i, key] = (scores[h, i, key] - least) * factor
        return new

    return change


def erase(keys: list[int]) -> Change:
    """Hide some keys."""

    def change(_layer: int, scores: Tensor) -> Tensor:
        new = scores.clone()
        new[..., keys] = -torch.inf
        return new

    return change


def plain(_layer: int, scores: Tensor) -> Tensor:
    """Change nothing."""
    return scores
