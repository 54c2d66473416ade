"""Per-head weights, read from a model's own matrices and proved on its activations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headscope as hs
from headscope import circuits
from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.bridge.model import bridge_weights
from headscope.models.hf.interface import routed
from headscope.models.hf.model import HFModel
from headscope.views import HeadNorm
from tests.models import checks
from tests.models.families import HF_FAMILIES, build, fresh, tokens
from tools.tiny_models import tiny_model

NAMES = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")


def wrapped(module: Any) -> HFModel:
    model = HFModel.wrap(module)
    assert model is not None
    return model


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_they_are_those_of_transformer_lens(family: str) -> None:
    model = wrapped(build(family))
    for layer in model.shape.attention_layers:
        ours, theirs = model.weights(layer), bridge_weights(model.bridge, layer)
        for name in NAMES:
            assert checks.difference(getattr(ours, name), getattr(theirs, name)) < 1e-6, name


def seen(model: HFModel, layer: int) -> tuple[Tensor, AttentionCall]:
    """What one layer's attention reads in a plain pass, and its call."""
    attention, found = model.layout.layers[layer].attention, {}

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        found["x"] = args[0] if args else kwargs["hidden_states"]

    def attend(_module: nn.Module, call: AttentionCall) -> Tensor:
        found["call"] = call
        return fused(call)

    handle = attention.register_forward_pre_hook(enter, with_kwargs=True)
    with torch.no_grad(), routed(model.layout.configs, attend, {attention}):
        model.module.base_model(input_ids=tokens(), use_cache=False)
    handle.remove()
    return found["x"], found["call"]


# Without rotation, queries and keys are what weights give; transformer-lens opens none of these.
@pytest.mark.parametrize("kind", ["biogpt", "bart", "whisper", "ctrl", "jamba", "xlm-roberta"])
def test_queries_keys_and_values_of_families_without_rotation(kind: str) -> None:
    model = hs.load(tiny_model(kind))
    assert isinstance(model, HFModel)
    layer = model.shape.attention_layers[-1]
    x, call = seen(model, layer)
    weights, between = model.weights(layer), model.parts.query_key(layer)
    assert not between.rotation.first
    assert between.query_scale == pytest.approx(8**-0.5 if kind == "whisper" else 1)
    for weight, bias, expected in (
        (weights.W_Q, weights.b_Q, call.query / between.query_scale),
        (weights.W_K, weights.b_K, call.key),
        (weights.W_V, weights.b_V, call.value),
    ):
        made = torch.einsum("bpd,hde->bhpe", x, weight) + bias[:, None]
        assert checks.difference(made, expected) < 1e-5


@pytest.mark.parametrize(
    "kind", ["helium", "moshi", "persimmon", "dots1", "olmoe", "modernbert-decoder"]
)
def test_values_of_families_that_nothing_else_opens(kind: str) -> None:
    model = hs.load(tiny_model(kind))
    assert isinstance(model, HFModel)
    for layer in model.shape.attention_layers:
        x, call = seen(model, layer)
        weights = model.weights(layer)
        made = torch.einsum("bpd,hde->bhpe", x, weights.W_V) + weights.b_V[:, None]
        assert checks.difference(made, call.value) < 1e-5


def test_trained_and_replaced_weights_are_read_anew() -> None:
    model = wrapped(fresh("qwen3"))
    before = model.weights(1).W_Q.clone()
    attention = model.layout.layers[1].attention
    with torch.no_grad():
        attention.q_proj.weight.mul_(2)
        attention.q_norm.weight.mul_(3)
    assert checks.difference(model.weights(1).W_Q, 2 * before) == 0
    norm = model.parts.query_key(1).query_norm
    assert norm is not None
    assert checks.difference(norm.gain, attention.q_norm.weight.detach().expand(4, -1)) < 1e-5


class Adapter(nn.Module):
    """A matrix with another of low rank beside it, as adapters add it."""

    def __init__(self, base: nn.Linear, act: nn.Module | None = None) -> None:
        super().__init__()
        self.base, self.act = base, act or nn.Identity()
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.act(self.down(x)))
        return out


def test_an_adapter_is_part_of_the_weights() -> None:
    module, merged = fresh("llama"), fresh("llama")
    own = module.model.layers[1].self_attn
    own.q_proj = Adapter(own.q_proj)
    with torch.no_grad():
        change = own.q_proj.up.weight @ own.q_proj.down.weight
        merged.model.layers[1].self_attn.q_proj.weight.add_(change)
    found, expected = wrapped(module).weights(1), wrapped(merged).weights(1)
    for name in NAMES:
        assert checks.difference(getattr(found, name), getattr(expected, name)) < 1e-5, name


@pytest.mark.parametrize("bend", ["adapter", "hook"])
def test_what_is_more_than_a_matrix_is_refused(bend: str) -> None:
    module = fresh("llama")
    own = module.model.layers[1].self_attn
    if bend == "adapter":
        own.k_proj = Adapter(own.k_proj, nn.ReLU())
    else:
        own.k_proj.register_forward_hook(lambda _m, _a, out: out + out.square())
    model = wrapped(module)
    with pytest.raises(UnsupportedModelError, match="key of layer 1 does more than its matrix"):
        model.weights(1)
    assert model.weights(0).W_K.shape == (2, 32, 12)
    with pytest.raises(UnsupportedModelError, match="more than its matrix"):
        circuits.ov(model)


def test_not_a_number_is_no_proof() -> None:
    module = fresh("llama")
    module.model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda _m, _a, out: out * float("nan")
    )
    with pytest.raises(UnsupportedModelError, match="no weights per head"):
        wrapped(module).weights(1)


def test_values_that_are_normed_are_not_what_weights_give() -> None:
    model = hs.load(tiny_model("gemma3n_text"))
    with pytest.raises(UnsupportedModelError, match="changes the values of layer 0"):
        model.parts.need_values(0)
    assert model.weights(0).W_V.shape[1] == 32


def test_half_precision_is_proved_to_its_own_rounding() -> None:
    whole, half = wrapped(fresh("qwen3")), wrapped(fresh("qwen3").to(torch.bfloat16))
    assert half.weights(2).W_Q.dtype == torch.bfloat16
    assert checks.difference(half.weights(2).W_Q.float(), whole.weights(2).W_Q) < 5e-3
    found, expected = (model.parts.query_key(2).rotation for model in (half, whole))
    assert (found.first, found.second) == (expected.first, expected.second)


@torch.no_grad()
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_of_heads_is_torchs_own(together: bool, centred: bool) -> None:
    width = 12 if together else 4
    theirs = nn.LayerNorm(width, eps=0.1) if centred else nn.RMSNorm(width, eps=0.1)
    theirs.weight.normal_()
    x = torch.randn(5, 3, 4)
    expected = theirs(x.flatten(-2)).view_as(x) if together else theirs(x)
    gain = theirs.weight.view(3, 4) if together else theirs.weight.expand(3, 4)
    norm = HeadNorm(gain, torch.zeros(3, 4), centred, 0.1, together)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.folded(x) / norm.scale(x)[..., None], expected)


@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "nanochat", "apertus", "lfm2"])
def test_queries_are_normed_turned_weights(kind: str) -> None:
    """Norm and rotation together give the queries of the call, at every position."""
    model = hs.load(tiny_model(kind))
    assert isinstance(model, HFModel)
    layer = model.shape.attention_layers[-1]
    x, call = seen(model, layer)
    weights, between = model.weights(layer), model.parts.query_key(layer)
    norm, rotation = between.query_norm, between.rotation
    assert norm is not None
    made = norm(torch.einsum("bpd,hde->bphe", x, weights.W_Q) + weights.b_Q)
    turned = torch.stack([rotation.turned(made[:, p], -p) for p in range(made.shape[1])], 1)
    if rotation.first:  # at position p a query is turned as one that meets a key p before it
        other = torch.stack([rotation.turned(made[:, p], p) for p in range(made.shape[1])], 1)
        wanted = call.query.transpose(1, 2)
        assert min(checks.difference(one, wanted) for one in (turned, other)) < 1e-4
    else:
        assert checks.difference(made, call.query.transpose(1, 2)) < 1e-4


def test_a_norm_that_follows_rotation_is_read_only_where_the_two_commute() -> None:
    module = tiny_model("hunyuan_v1_dense")
    model = hs.load(module)
    with pytest.raises(UnsupportedModelError, match="after positions turned them"):
        circuits.qk(model, offset=1)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "layernorm" in name and name.split(".")[-2].startswith(("query", "key")):
                weight.fill_(1.5)
    assert circuits.qk(model, offset=1).left.shape[:2] == (3, 4)
