"""The same effects as the usual loop: transformer-lens' run_with_hooks on hook_z."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.models.hf.model import HFModel
from tests.ablation.helpers import model_of, probe_of

FAMILIES = ("gpt2", "llama", "gpt_neox", "cohere2", "mistral", "gemma2", "qwen3")


def _set(z: torch.Tensor, hook: Any, *, head: int, value: torch.Tensor) -> torch.Tensor:
    shaped = z.reshape(*z.shape[:2], 4, -1).clone()
    shaped[:, :, head] = value
    return shaped.reshape(z.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_and_zero_ablation(family: str) -> None:
    model, probe = model_of(family), probe_of()
    assert isinstance(model, HFModel)
    bridge = model.bridge
    means = hs.ablation.head_means(model, probe)
    for method in ("zero", "mean"):
        scores = hs.ablate_heads(model, probe, hs.metrics.logit_difference, method)
        with torch.no_grad():
            clean = hs.metrics.logit_difference(bridge(probe.tokens), probe)
            for layer, head in model.shape.heads:
                value = torch.zeros(model.shape.d_head) if method == "zero" else means[layer][head]
                hook = partial(_set, head=head, value=value)
                name = f"blocks.{layer}.attn.hook_z"
                logits = bridge.run_with_hooks(probe.tokens, fwd_hooks=[(name, hook)])
                effect = (hs.metrics.logit_difference(logits, probe) - clean).numpy()
                scale = max(1.0, float(clean.abs().max()))
                assert np.abs(scores.per_example[layer, head] - effect).max() < 1e-5 * scale
