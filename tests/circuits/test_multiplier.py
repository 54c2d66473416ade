"""Where a family multiplies what attention writes, circuits describe what reaches the residual."""

import copy

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from headscope import circuits
from headscope.models.hf.model import HFModel

MULTIPLIER = 0.37


@pytest.fixture(scope="module")
def granite() -> HFModel:
    torch.manual_seed(0)
    module = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            residual_multiplier=MULTIPLIER,
            initializer_range=0.4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()
    torch.nn.init.zeros_(module.model.layers[0].mlp.down_proj.weight)
    model = HFModel.wrap(module)
    assert model is not None
    return model


def test_ov_is_what_a_head_adds_to_the_residual_stream(granite: HFModel) -> None:
    tokens, head = torch.arange(3, 15), 2
    without = copy.deepcopy(granite.module)
    with torch.no_grad():  # its columns of the output projection: nothing else of layer 0 writes
        without.model.layers[0].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] = 0
        kept, gone = (
            module.model(tokens[None], output_hidden_states=True).hidden_states[1][0]
            for module in (granite.module, without)
        )
    recording = circuits.record(granite, tokens)
    x = recording.residual[0]
    x = x / granite.parts.input_norm(0).scale(x)[:, None]
    written = recording.attends[0][head] @ x @ circuits.ov(granite).explicit((0, head))
    torch.testing.assert_close(written, kept - gone, rtol=1e-4, atol=1e-4)


def test_bare_spectra_have_the_multiplier(granite: HFModel) -> None:
    attention = granite.module.model.layers[1].self_attn
    W_V = attention.v_proj.weight.detach().double().numpy().T[:, 8:]
    W_O = attention.o_proj.weight.detach().double().numpy().T[24:]
    expected = np.linalg.svd(MULTIPLIER * W_V @ W_O, compute_uv=False)[:8]
    found = circuits.ov(granite, fold_norm=False).singular_values()[1, 3]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
