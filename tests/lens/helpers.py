"""Tiny models of every family, one prompt, and what plain PyTorch says of it."""

from functools import cache

import torch
from torch import Tensor

from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from tests.models import families

EVERY = (*families.HF_FAMILIES, *families.BRIDGE_FAMILIES)
TOKENS = families.tokens()[0].tolist()


@cache
def model_of(family: str) -> HeadModel:
    return load(families.build(family))


@cache
def plain_logits(family: str) -> Tensor:
    """Logits of the prompt, without headscope."""
    with torch.no_grad():
        logits: Tensor = families.build(family)(torch.tensor([TOKENS])).logits[0]
    return logits.double()
