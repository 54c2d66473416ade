"""Texts beyond the trained length: rotary models, when asked; learned positions never."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError
from tests.models.families import build


def test_rotary_models_read_on_and_results_say_so() -> None:
    torch.manual_seed(1)
    long = hs.probes.from_tokens(torch.randint(3, 61, (1, 150)))
    short = hs.probes.from_tokens(long.tokens[:, :100])
    with pytest.raises(InputError, match="extrapolate=True"):
        hs.score(hs.load(build("llama")), long, "entropy", progress=False)
    model = hs.load(build("llama"), extrapolate=True)
    assert (model.shape.n_ctx, model.shape.trained_ctx) == (None, 128)
    beyond = hs.score(model, long, "entropy", progress=False)["entropy"]
    within = hs.score(model, short, "entropy", progress=False)["entropy"]
    assert beyond.provenance.probe["extrapolated_from"] == 128
    assert "extrapolated_from" not in within.provenance.probe
    plain = hs.score(hs.load(build("llama")), short, "entropy", progress=False)["entropy"]
    assert (within.mean == plain.mean).all()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_refuse(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="has a table of 128 positions"):
        hs.load(build(family), extrapolate=True)


def test_what_has_no_rotation_says_so() -> None:
    assert "rotary" in hs.load(build("gpt2")).limits
    assert "rotary" not in hs.load(build("gpt_neox")).limits


def test_ablation_says_so_too() -> None:
    model = hs.load(build("llama"), extrapolate=True)
    probe = hs.probes.from_tokens(torch.randint(3, 61, (1, 140)))
    found = hs.ablate_heads(model, probe, hs.metrics.loss, method="zero", heads=["L0H0"])
    assert found.provenance.probe["extrapolated_from"] == 128


def rotating(kind: str, n_ctx: int, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    rotation = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, **settings}
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=n_ctx,
        initializer_range=0.4,
        rope_parameters=rotation,
    )
    return LlamaForCausalLM(config).eval()


def test_rotations_that_depend_on_what_ran_before_are_refused() -> None:
    """On the model alone: 80 tokens give other numbers once it has read 100."""
    module = rotating("dynamic", 64)
    ids = torch.randint(3, 199, (1, 100))
    with torch.no_grad():
        first = module(ids[:, :80]).logits
        module(ids)
        assert (module(ids[:, :80]).logits - first).abs().max() > 0.01
    assert hs.load(rotating("dynamic", 64)).shape.n_ctx == 64
    with pytest.raises(UnsupportedModelError, match="depend on earlier calls"):
        hs.load(rotating("dynamic", 64), extrapolate=True)


def longrope() -> LlamaForCausalLM:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    return rotating("longrope", 128, original_max_position_embeddings=64, **factors)


def test_short_texts_do_not_turn_by_the_angles_of_long_ones_beside_them() -> None:
    module = longrope()
    model = hs.load(module)
    hs.testing.check_model(model)
    assert model.shape.turns_at == 64
    tokens, lengths = torch.randint(3, 199, (5, 80)), [80, 20, 64, 65, 30]
    real = torch.stack([torch.arange(80) >= 80 - length for length in lengths])
    probe = hs.probes.from_tokens(tokens, real=real)
    found = hs.score(model, probe, "entropy", progress=False)["entropy"].per_example
    for example, length in enumerate(lengths):
        alone = hs.probes.from_tokens(tokens[example : example + 1, -length:])
        own = hs.score(model, alone, "entropy", progress=False)["entropy"].per_example
        assert own[..., 0] == pytest.approx(found[..., example], abs=1e-5)
    with pytest.raises(InputError, match="at most 64 tokens and longer ones"):
        hs.ablate_heads(model, probe, hs.metrics.loss, heads=["L0H0"], progress=False)
    one_by_one = hs.ablate_heads(
        model, probe, hs.metrics.loss, "zero", heads=["L0H0"], batch_size=1, progress=False
    )
    assert np.isfinite(one_by_one.mean[0, 0])
