"""Pairs of random texts, and a metric that reads the last real position."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headscope.probes import Probe, from_tokens
from tests.models import families


def fresh(family: str) -> Any:
    """Two layers of a family, which a test may change."""
    config = copy.deepcopy(families.build(family).config)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    families._unsettle(module)
    return module


def pair(kind: str = "none") -> Probe:
    """Four texts whose middle tokens differ in the corrupt half; foils and targets at the end."""
    tokens, real = families.tokens(), families.padding(kind)
    other = tokens.clone()
    generator = torch.Generator().manual_seed(3)
    other[:, 2:6] = torch.randint(3, families.VOCAB, (4, 4), generator=generator)
    probe = replace(from_tokens(tokens, real), corrupt=from_tokens(other, real))
    targets, foils = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    at = torch.arange(4), probe.last
    targets[at], foils[at] = 5, 7
    return replace(probe, targets=targets, foils=foils)


def swapped(probe: Probe) -> Probe:
    """The corrupt texts as the clean ones, with the same answers."""
    assert probe.corrupt is not None
    plain = from_tokens(probe.tokens, probe.real)
    return replace(
        probe, tokens=probe.corrupt.tokens, structure=probe.corrupt.structure, corrupt=plain
    )


def last_difference(logits: Tensor, probe: Probe) -> Tensor:
    """Logit difference of tokens 5 and 7 at the last real position, over ``[row pos vocab]``."""
    at = torch.arange(len(logits)), probe.last
    return logits[at][:, 5] - logits[at][:, 7]
