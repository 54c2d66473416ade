"""Probes on tiny models of every family, and the slow reference: one whole pass per variant."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

import headscope as hs
from headscope.edits import AnyEdit
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from tests.models import families


@cache
def model_of(family: str) -> HeadModel:
    return load(families.build(family))


def probe_of(kind: str = "none", batch: int = 4) -> hs.Probe:
    """Random tokens with an answer and a foil at the last real position, and a random pair."""
    tokens = families.tokens(4)[:batch]
    real = families.padding(kind)
    probe = hs.probes.from_tokens(tokens, None if real is None else real[:batch])
    end = torch.zeros_like(probe.real)
    end[torch.arange(batch), probe.last] = True
    late = torch.zeros_like(end)
    late[:, 7:9] = True
    probe = replace(
        probe,
        targets=torch.where(end, 5, -1),
        foils=torch.where(end, 9, -1),
        marks={"end": end, "late": late & probe.real},
    )
    generator = torch.Generator().manual_seed(5)
    other = torch.randint(3, families.VOCAB, tokens.shape, generator=generator)
    corrupt = replace(probe, tokens=torch.where(late, other, tokens))
    return replace(probe, corrupt=corrupt)


@torch.no_grad()
def whole_pass(
    model: HeadModel, probe: hs.Probe, edits: Sequence[AnyEdit], metric: Any = None
) -> np.ndarray:
    """The metric of one edited run, by a whole pass."""
    logits = model.forward(probe.tokens, real=probe.real, edits=edits)
    chosen = hs.metrics.logit_difference if metric is None else metric
    return chosen(logits, probe).double().numpy()
