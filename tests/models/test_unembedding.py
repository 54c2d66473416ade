import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoConfig, OlmoForCausalLM, OPTConfig, OPTForCausalLM

import headscope as hs
from headscope.errors import UnsupportedModelError
from headscope.models.bridge.model import BridgeModel, bridge_over, wrap_bridge
from headscope.models.hf.measured import measure_norm
from headscope.models.hf.model import HFModel
from headscope.models.running import submodules
from tests.models import checks
from tests.models.families import BRIDGE_FAMILIES, HF_FAMILIES, build, tokens
from tests.watching import watch


def wrapped(family: str) -> HFModel | BridgeModel:
    if family in BRIDGE_FAMILIES:
        return wrap_bridge(bridge_over(build(family)))
    model = HFModel.wrap(build(family))
    assert model is not None
    return model


@pytest.mark.parametrize("family", [*HF_FAMILIES, *BRIDGE_FAMILIES])
def test_unembedding_of_the_last_residual_stream_is_the_logits(family: str) -> None:
    model = wrapped(family)
    seen = checks.Everything()
    with torch.no_grad():
        logits = watch(model, tokens(), seen)
        assert seen.final is not None
        unembedding = model.unembedding
        assert checks.difference(unembedding.logits(seen.final), logits) < 1e-5
        # A token's direction gives its logit, less what norm bias and unembedding bias add.
        ids = torch.tensor([3, 7, 50])
        centred = seen.final - seen.final.mean(-1, keepdim=True) * unembedding.centred
        linear = centred @ unembedding.directions(ids).T / unembedding.scale(seen.final)[..., None]
        constant = unembedding.bias @ unembedding.W_U[ids].T * unembedding.logit_scale
        if unembedding.b_U is not None:
            constant = constant + unembedding.b_U[ids] * unembedding.logit_scale
        expected = linear + constant
        if unembedding.soft_cap is not None:
            expected = unembedding.soft_cap * torch.tanh(expected / unembedding.soft_cap)
        assert checks.difference(expected, logits[..., ids]) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "cohere2", "opt", "llama"])
def test_both_paths_read_out_alike(family: str) -> None:
    fast, slow = wrapped(family).unembedding, wrap_bridge(bridge_over(build(family))).unembedding
    assert slow.soft_cap == fast.soft_cap
    assert slow.logit_scale == fast.logit_scale
    assert slow.centred == fast.centred
    assert slow.epsilon == fast.epsilon
    assert checks.difference(slow.gain, fast.gain) < 1e-5
    assert torch.equal(slow.W_U, fast.W_U)


def test_what_the_families_do_to_logits() -> None:
    assert wrapped("gemma2").unembedding.soft_cap == 5.0
    assert wrapped("granite").unembedding.logit_scale == 0.5
    assert wrapped("cohere2").unembedding.logit_scale == 0.25
    assert wrapped("gptj").unembedding.b_U is not None
    assert wrapped("llama").unembedding.b_U is None
    assert not wrapped("llama").unembedding.centred
    assert wrapped("opt").unembedding.centred


@pytest.mark.parametrize("path", ["hf", "bridge"])
def test_a_model_without_a_last_norm_has_no_unembedding(path: str) -> None:
    config = OPTConfig(  # as opt-350m: norms after the sums, embedding narrower than the stream
        vocab_size=61,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        pad_token_id=0,
        init_std=0.4,
    )
    module = OPTForCausalLM(config).eval()
    model = HFModel.wrap(module) if path == "hf" else wrap_bridge(bridge_over(module))
    assert model is not None
    assert {"unembedding", "linear_write"} <= set(model.limits)
    with pytest.raises(UnsupportedModelError, match="no plain norm"):
        _ = model.unembedding
    assert model.forward(tokens()).shape == (4, 12, 61)


def test_a_norm_that_names_no_epsilon_has_it_measured() -> None:
    class Olmo(nn.Module):
        """As in olmo: no weights, and a constant in the code."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)

    class Rms(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    for module, centred, epsilon in ((Olmo(), True, 1e-5), (Rms(), False, 1e-6)):
        norm = measure_norm(module, 32, torch.device("cpu"))
        assert norm.centred == centred
        assert norm.epsilon == pytest.approx(epsilon, rel=1e-2)
        small = 0.01 * torch.randn(3, 32)
        torch.testing.assert_close(norm(small), module(small), rtol=1e-3, atol=1e-5)


def test_a_final_norm_without_weights_is_found() -> None:
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
    )  # drawn as narrow as it is, so that epsilon matters
    model = hs.load(OlmoForCausalLM(config).eval())
    assert "unembedding" not in model.limits
    assert model.unembedding.epsilon == pytest.approx(1e-5, rel=1e-2)
    split = hs.lens.attribute(model, [3, 4, 5, 6], 7, 9)
    logits = model.forward(torch.tensor([[3, 4, 5, 6]]))[0, -1].detach()
    assert split.whole == pytest.approx(float(logits[7] - logits[9]), abs=1e-4)
    grid = hs.lens.logit_lens(model, [3, 4, 5, 6])
    expected = logits.softmax(0).max().item()
    assert grid.probabilities[-1, -1, 0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5)])
def test_a_norm_is_measured_again_once_it_holds_other_numbers(norm: nn.Module) -> None:
    def measured() -> tuple[Tensor, Tensor, float]:
        found = measure_norm(norm, 8, torch.device("cpu"))
        return found.gain, found.bias, found.epsilon

    first = measured()
    assert measured()[0] is first[0]
    weight = norm.get_parameter("weight")
    weight.data[3] = 5.0  # past torch's counter of writes
    torch.testing.assert_close(measured()[0], weight.detach())
    assert first[0][3] != 5
    if isinstance(bias := getattr(norm, "bias", None), Tensor):
        bias.data[2] = -3.0
        torch.testing.assert_close(measured()[1], bias.detach())
    norm.eps = 0.25
    assert measured()[2] == 0.25
    norm.weight = nn.Parameter(torch.full((8,), 2.0))
    torch.testing.assert_close(measured()[0], torch.full((8,), 2.0))


def test_submodules_are_those_of_torch_in_its_order() -> None:
    shared = nn.Linear(2, 2)
    inner = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"a": shared, "b": nn.Dropout()}))
    inner.register_module("none", None)
    inner.append(inner[1])
    for module in (inner, nn.ModuleList([inner, shared, inner]), build("gpt2"), build("bloom")):
        assert submodules(module) == list(module.modules())
