"""Texts beyond the trained length: rotary models, when asked; learned positions never."""

import pytest
import torch

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
    with pytest.raises(UnsupportedModelError, match="looks its positions up in a table of 128"):
        hs.load(build(family), extrapolate=True)


def test_what_has_no_rotation_says_so() -> None:
    assert "rotary" in hs.load(build("gpt2")).limits
    assert "rotary" not in hs.load(build("gpt_neox")).limits


def test_ablation_says_so_too() -> None:
    model = hs.load(build("llama"), extrapolate=True)
    probe = hs.probes.from_tokens(torch.randint(3, 61, (1, 140)))
    found = hs.ablate_heads(model, probe, hs.metrics.loss, method="zero", heads=["L0H0"])
    assert found.provenance.probe["extrapolated_from"] == 128
