import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from headscope import circuits
from headscope.errors import UnsupportedModelError
from headscope.models.bridge.model import bridge_over, wrap_bridge
from headscope.models.hf.model import HFModel
from headscope.models.rotary import POSITIONS, find_rotation
from headscope.views import Norm, Rotation

ModelOf = Callable[[str], HFModel]


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("size", [0, 4, 8])
@pytest.mark.parametrize("gain", [1.0, 1.3])
def test_a_rotation_is_found_again(neighbours: bool, size: int, gain: float) -> None:
    content = torch.randn(12, len(POSITIONS), 8, dtype=torch.float64)
    step = torch.arange(0, size, 2) if neighbours else torch.arange(size // 2)
    first = step.tolist()
    second = (step + (1 if neighbours else size // 2)).tolist()
    frequency = 10000.0 ** -(torch.arange(size // 2, dtype=torch.float64) / 4)
    angle = torch.tensor(POSITIONS)[:, None] * frequency
    actual = content.clone()
    a, b = content[..., first], content[..., second]
    actual[..., first] = gain * (a * angle.cos() - b * angle.sin())
    actual[..., second] = gain * (a * angle.sin() + b * angle.cos())
    found = find_rotation(content, actual, 1e-12)
    assert found is not None
    assert (list(found.first), list(found.second)) == (first, second)
    torch.testing.assert_close(found.frequency, frequency, rtol=0, atol=1e-12)
    if size:
        assert found.gain == pytest.approx(gain)


def test_normalised_queries_are_no_rotation() -> None:
    content = torch.randn(12, len(POSITIONS), 8)
    assert find_rotation(content, torch.nn.functional.normalize(content, dim=-1), 1e-6) is None


def test_turning_meets_keys_at_a_distance() -> None:
    rotation = Rotation((0, 1), (2, 3), torch.tensor([0.5, 0.1]), gain=1.2)
    query, key = torch.randn(4), torch.randn(4)

    def at(x: Tensor, position: int) -> Tensor:
        planes = torch.complex(x[:2], x[2:]) * torch.polar(
            torch.full((2,), 1.2), rotation.frequency * position
        )
        return torch.cat([planes.real, planes.imag])

    expected = at(query, 9) @ at(key, 4)
    torch.testing.assert_close(rotation.turned(query, 5) @ key, expected)
    mean = rotation.turned(query, torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(mean, (rotation.turned(query, 1) + rotation.turned(query, 5)) / 2)


@pytest.mark.parametrize("centred", [True, False])
def test_folded_weights_read_the_unnormalised_stream(centred: bool) -> None:
    norm = Norm(torch.rand(8) + 0.5, torch.randn(8), centred, 1e-5)
    x, weight = torch.randn(3, 8) + 1, torch.randn(8, 4)
    expected = norm(x) @ weight
    found = x / norm.scale(x)[:, None] @ norm.folded(weight) + norm.bias @ weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "cohere", "gemma2"])
def test_measured_norm_is_what_attention_reads(family: str, family_model: ModelOf) -> None:
    model = family_model(family)
    tokens = torch.randint(3, 97, (1, 9))
    for layer, parts in model.layout.layers.items():
        seen = []
        handle = parts.attention.register_forward_pre_hook(
            lambda _m, args, kwargs, seen=seen: seen.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        residual = model.parts.layer_inputs(tokens, [layer, 2])[layer]
        handle.remove()
        if seen:
            found = model.parts.input_norm(layer)(residual)
            torch.testing.assert_close(found, seen[0].detach(), rtol=1e-3, atol=1e-3)


def test_first_mlp_is_that_of_the_model(family_model: ModelOf) -> None:
    model = family_model("llama")
    block, x = model.module.model.layers[0], torch.randn(7, 32)
    with torch.no_grad():
        expected = block.mlp(block.post_attention_layernorm(x))
    torch.testing.assert_close(model.parts.first_mlp(x), expected, rtol=1e-4, atol=1e-4)
    model = family_model("gpt_neox")  # parallel: the MLP reads the block's own input
    block = model.module.gpt_neox.layers[0]
    with torch.no_grad():
        expected = block.mlp(block.post_attention_layernorm(x))
    torch.testing.assert_close(model.parts.first_mlp(x), expected, rtol=1e-4, atol=1e-4)


def test_embedding_has_the_familys_multiplier(family_model: ModelOf) -> None:
    weight = family_model("llama").module.get_input_embeddings().weight
    assert torch.equal(family_model("llama").parts.embedding, weight)
    weight = family_model("gemma2").module.get_input_embeddings().weight
    scaled = family_model("gemma2").parts.embedding
    torch.testing.assert_close(scaled, weight.detach() * math.sqrt(32), rtol=1e-3, atol=1e-3)


_SIZE = {"vocab_size": 97, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
BRIDGED: dict[str, Callable[[], nn.Module]] = {
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=140, **_SIZE)
    ),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=140,
            **_SIZE,
        )
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_SIZE)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            new_decoder_architecture=False,
            multi_query=True,
            max_position_embeddings=140,
            **_SIZE,
        )
    ),
}


@pytest.mark.parametrize("family", sorted(BRIDGED))
def test_bridged_families_are_read_or_refused(family: str) -> None:
    """Circuits of families that only transformer-lens opens, against head outputs and scores."""
    model = wrap_bridge(bridge_over(BRIDGED[family]().eval()))
    tokens = torch.randint(3, 97, (12,))
    recording = circuits.record(model, tokens)
    factors = circuits.ov(model)
    for head in range(4):
        x = recording.residual[1]
        x = x / model.parts.input_norm(1).scale(x)[:, None]
        kv = model.shape.kv_head(head)
        written = recording.z[1][:, head] @ model.output_weights(1)[head]
        written = written - written.mean(-1, keepdim=True)
        constant = factors.left_bias[1, kv] @ factors.right[1, head]
        found = recording.attends[1][head] @ x @ factors.explicit((1, head)) + constant
        torch.testing.assert_close(found, written, rtol=1e-3, atol=1e-3)
    if family in ("gptj", "falcon"):  # their rotated queries are not shown
        with pytest.raises(UnsupportedModelError, match="queries and keys"):
            model.parts.rotation(1)
    else:
        assert not model.parts.rotation(1).first


def test_both_paths_measure_the_same(family_model: ModelOf) -> None:
    for family in ("llama", "gpt2"):
        model = family_model(family)
        bridged = wrap_bridge(model.bridge)
        for ask in (circuits.ov, circuits.qk):
            ours, theirs = ask(model), ask(bridged)
            torch.testing.assert_close(ours.left, theirs.left)
            torch.testing.assert_close(ours.right, theirs.right)
        torch.testing.assert_close(
            circuits.qk(model, offset=5).left, circuits.qk(bridged, offset=5).left
        )
        x = torch.randn(3, 32)
        torch.testing.assert_close(model.parts.first_mlp(x), bridged.parts.first_mlp(x))
