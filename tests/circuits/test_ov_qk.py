from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope import circuits
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.interface import routed
from headscope.models.hf.model import HFModel

ModelOf = Callable[[str], HFModel]


def attention_calls(model: HFModel, tokens: Tensor) -> dict[int, AttentionCall]:
    """Queries and keys of every layer as attention used them."""
    parts, calls = model.layout.by_attention(), {}

    def keep(module: torch.nn.Module, call: AttentionCall) -> Tensor:
        calls[parts[module].layer] = call
        return fused(call)

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(routed(model.layout.configs, keep))
        model.module(input_ids=tokens, use_cache=False)
    return calls


def normed(model: HFModel, tokens: Tensor, layer: int) -> Tensor:
    """Inputs over the norm's scale, with a last coordinate 1."""
    x = model.parts.layer_inputs(tokens, [layer])[layer][0].float()
    x = x / model.parts.input_norm(layer).scale(x)[:, None]
    return torch.cat([x, torch.ones(len(x), 1)], 1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gpt_neox", "cohere", "gemma2"])
@pytest.mark.parametrize("offset", [0, 1, 7, 130])
def test_qk_at_an_offset_gives_the_models_own_scores(
    family: str, offset: int, family_model: ModelOf
) -> None:
    model = family_model(family)
    tokens = torch.randint(3, 97, (1, 140))
    calls = attention_calls(model, tokens)
    factors = circuits.with_bias(circuits.qk(model, offset=offset))
    for layer in (0, 2):
        x = normed(model, tokens, layer)
        query, key = calls[layer].query[0], calls[layer].key[0]
        for head in range(4):
            key_head = key[head // model.shape.group_size]
            expected = (query[head, offset:] * key_head[: 140 - offset]).sum(-1)
            W = factors.explicit((layer, head))
            found = ((x[offset:] @ W) * x[: 140 - offset]).sum(-1)
            scale = float(expected.abs().max())
            np.testing.assert_allclose(found / scale, expected / scale, atol=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gpt_neox", "cohere"])
def test_ov_gives_what_heads_write(family: str, family_model: ModelOf) -> None:
    model = family_model(family)
    tokens = torch.randint(3, 97, (1, 12))
    recording = circuits.record(model, tokens[0])
    factors = circuits.ov(model)
    centred = model.parts.input_norm(1).centred
    for layer in (0, 1, 2):
        x = recording.residual[layer]
        x = x / model.parts.input_norm(layer).scale(x)[:, None]
        W_O = model.output_weights(layer)
        for head in range(4):
            kv = model.shape.kv_head(head)
            written = recording.z[layer][:, head] @ W_O[head]
            written = written - written.mean(-1, keepdim=True) if centred else written
            mixed = recording.attends[layer][head] @ x
            constant = factors.left_bias[layer, kv] @ factors.right[layer, head]
            found = mixed @ factors.explicit((layer, head)) + constant
            torch.testing.assert_close(found, written, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere", "gpt2"])
def test_bands_sum_to_the_circuit(family: str, family_model: ModelOf) -> None:
    model = family_model(family)
    whole = circuits.with_bias(circuits.qk(model, offset=3))
    bands = [circuits.with_bias(band) for band in circuits.qk_bands(model, offset=3)]
    total = sum(band.explicit("L1H2") for band in bands)
    expected = whole.explicit("L1H2")
    size = float(expected.abs().max())  # bands cancel: rounding follows the largest, not each sum
    torch.testing.assert_close(total / size, expected / size, rtol=0, atol=3e-6)
    planes = len(model.parts.rotation(1).first)
    still = model.shape.d_head - 2 * planes
    assert [band.left.shape[-1] for band in bands] == [2] * planes + [still] * (still > 0)


def test_content_is_the_mean_over_distances(family_model: ModelOf) -> None:
    model = family_model("llama")
    mean = sum(circuits.qk(model, offset=d).explicit("L2H3") for d in range(2, 9)) / 7
    found = circuits.qk_content(model, range(2, 9)).explicit("L2H3")
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)


def test_offset_changes_rotary_circuits_alone(family_model: ModelOf) -> None:
    for family, changes in (("llama", True), ("gpt2", False)):
        near, far = (circuits.qk(family_model(family), offset=d) for d in (0, 5))
        assert torch.equal(near.left, far.left) is not changes


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
@pytest.mark.parametrize("offset", [0, 1, 7, 130])
def test_under_norms_on_queries_and_keys_products_lack_their_scales_alone(
    family: str, offset: int, family_model: ModelOf
) -> None:
    """Every score is the product's over one number of the query and one of the key."""
    model = family_model(family)
    tokens = torch.randint(3, 97, (1, 140))
    calls = attention_calls(model, tokens)
    factors = circuits.with_bias(circuits.qk(model, offset=offset))
    x, attention = normed(model, tokens, 2), model.layout.layers[2].attention
    read = model.parts.input_norm(2)(model.parts.layer_inputs(tokens, [2])[2][0])
    scales = []
    for project in (attention.q_proj, attention.k_proj):
        made = project(read).detach()
        made = made if family == "olmo2" else made.unflatten(-1, (-1, 8))
        size = (made.square().mean(-1) + attention.q_norm.variance_epsilon).sqrt()
        scales.append(size[:, None] if family == "olmo2" else size)
    for head in range(4):
        query, key = calls[2].query[0, head], calls[2].key[0, head // 2]
        expected = (query[offset:] * key[: 140 - offset]).sum(-1)
        found = ((x[offset:] @ factors.explicit((2, head))) * x[: 140 - offset]).sum(-1)
        by_query = scales[0][offset:, head if family == "qwen3" else 0]
        found = found / by_query / scales[1][: 140 - offset, head // 2 if family == "qwen3" else 0]
        scale = float(expected.abs().max())
        np.testing.assert_allclose(found / scale, expected / scale, atol=2e-4)


def test_bare_circuits_equal_transformer_lens(family_model: ModelOf) -> None:
    for family in ("gpt2", "llama"):
        model = family_model(family)
        pairs = ((circuits.ov, model.bridge.OV), (circuits.qk, model.bridge.QK))
        for circuit, theirs in pairs:
            svd = circuit(model, fold_norm=False).svd()
            U, S, V = theirs.svd()
            torch.testing.assert_close(svd.S, S.detach(), rtol=1e-4, atol=1e-4)
            product = (svd.U * svd.S.unsqueeze(-2)) @ svd.Vh
            expected = (U * S.unsqueeze(-2)) @ V.mT
            torch.testing.assert_close(product, expected.detach(), rtol=1e-3, atol=1e-3)


def test_where_no_matrix_gives_the_scores_it_says_why(family_model: ModelOf) -> None:
    model = family_model("persimmon")
    for ask in (
        lambda: circuits.qk(model),
        lambda: circuits.qk(model, fold_norm=False, offset=0),
        lambda: circuits.qk_bands(model),
        lambda: circuits.qk_content(model, range(3)),
    ):
        with pytest.raises(UnsupportedModelError, match="no single matrix"):
            ask()
    assert circuits.qk(model, fold_norm=False).left.shape == (3, 4, 32, 8)
    parts = model.parts.query_key(1)
    assert parts.query_norm is not None
    assert bool(parts.query_norm.bias.any())


def test_norms_after_attention_are_in_the_circuit_but_for_their_scale(
    family_model: ModelOf,
) -> None:
    """The product of W_V, W_O and the norm's gain is what a head adds, up to that norm's scale."""
    model = family_model("gemma2")
    factors = circuits.ov(model)
    gain = model.parts.attention_write(1).norm.gain
    weights, norm = model.weights(1), model.parts.input_norm(1)
    expected = norm.folded(weights.W_V)[1] @ (model.output_weights(1)[2] * gain)
    torch.testing.assert_close(factors.explicit("L1H2"), expected)
    for ask in (
        lambda: circuits.composition(model, "K"),
        lambda: circuits.subspace_affinity(model, "K"),
        lambda: circuits.relation_scores(model)["maps_copy"],
    ):
        assert "scale held fixed" in ask().provenance.probe["write"]


def test_chosen_layers(family_model: ModelOf) -> None:
    model = family_model("llama")
    one = circuits.ov(model, layers=[2])
    assert one.layers == (2,)
    torch.testing.assert_close(one.explicit("L2H1"), circuits.ov(model).explicit("L2H1"))
    with pytest.raises(InputError, match="layer 9"):
        circuits.qk(model, layers=[9])
