"""What a model that has learned nothing is said to have: hardly any head of any name."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.models.protocol import lacks
from headscope.scorers import CATALOGUE
from headscope.scorers.patterns import relative_offset
from headscope.scorers.spread import window_mass

SEEDS = range(3)


def drawn(family: str, seed: int, spread: float) -> Any:
    """A model with random weights and the tokenizer of the bundled one."""
    tokenizer = hs.load().tokenizer
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=64,
            n_layer=2,
            n_head=16,
            n_positions=256,
            initializer_range=spread,
        )
        module = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=256,
            initializer_range=spread,
        )
        module = LlamaForCausalLM(config)
    return hs.load(module.eval(), tokenizer=tokenizer, check=False)


def probes_of(model: Any, seed: int) -> dict[str, hs.Probe]:
    """The default probes, shorter where they can be: as many examples."""
    return {
        "repeated_tokens": hs.probes.repeated_tokens(model, length=16, batch=16, seed=seed),
        "text": hs.probes.text(model, seed=seed),
        "ioi": hs.probes.pairs(model, "ioi", seed=seed),
        "needle": hs.probes.needle(model, lengths=96, per_cell=3, seed=seed),
    }


@pytest.fixture(scope="module")
def named() -> dict[str, float]:
    """Share of the heads of all models that each score names."""
    found = defaultdict(list)
    own = [relative_offset(2), window_mass(4)]
    for family in ("gpt2", "llama"):
        for seed in SEEDS:
            model = drawn(family, seed, (0.02, 0.4)[seed % 2])
            scorers = [
                one
                for one in (*CATALOGUE.values(), *own)
                if one.probe is not None and not any(lacks(model, need) for need in one.needs)
            ]
            for kind, probe in probes_of(model, seed).items():
                table = hs.score(model, probe, [one for one in scorers if one.probe.name == kind])
                for name, scores in table.items():
                    found[name].append(scores.significant())
            for name, scores in hs.circuits.score(model).items():
                found[f"circuits.{name}"].append(scores.significant())
    return {name: float(np.mean(parts)) for name, parts in found.items()}


def test_all_scores_together_name_hardly_any_head_of_random_weights(
    named: dict[str, float],
) -> None:
    others = {"bidirectional", "patches"}  # of models that see both sides, and of images
    tested = {
        name
        for name, one in CATALOGUE.items()
        if one.probe is not None and not others & set(one.needs)
    }
    assert tested <= set(named)
    assert sum(named.values()) <= 0.06 * len(named)
    assert max(named.values()) <= 0.06, named
