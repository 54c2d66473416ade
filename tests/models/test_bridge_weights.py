from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.models.bridge.model import bridge_over, bridge_weights, wrap_bridge
from headscope.models.hf.model import HFModel
from headscope.views import HeadWeights
from tests.models import checks
from tests.models.families import BRIDGE_FAMILIES, HF_FAMILIES, build, fresh, tokens

each_family = pytest.mark.parametrize("family", [*HF_FAMILIES, *BRIDGE_FAMILIES])


@cache
def bridge(family: str) -> Any:
    return bridge_over(build(family))


def seen(family: str, layer: int) -> dict[str, Tensor]:
    """What passed one layer's attention: its input, projections, head outputs and result."""
    attention = bridge(family).blocks[layer].attn
    points = {
        "x": attention.q.hook_in,
        "q": attention.q.hook_out,
        "k": attention.k.hook_out,
        "v": attention.v.hook_out,
        "z": attention.o.hook_in,
        "out": attention.o.hook_out,
    }
    values: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _args, value: values.__setitem__(name, value.flatten(2))

    handles = [point.register_forward_hook(keep(name)) for name, point in points.items()]
    with torch.no_grad():
        bridge(family)(tokens())
    for handle in handles:
        handle.remove()
    return values


def projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (torch.einsum("bpm,hmd->bphd", x, weight) + bias).flatten(2)


@each_family
@pytest.mark.parametrize("layer", [0, 2])
def test_weights_give_what_the_model_computes(family: str, layer: int) -> None:
    weights, found = bridge_weights(bridge(family), layer), seen(family, layer)
    for name, weight, bias in (
        ("q", weights.W_Q, weights.b_Q),
        ("k", weights.W_K, weights.b_K),
        ("v", weights.W_V, weights.b_V),
    ):
        assert checks.difference(projected(found["x"], weight, bias), found[name]) < 1e-5, name
    z = found["z"].unflatten(-1, weights.W_O.shape[:2])
    out = torch.einsum("bphd,hdm->bpm", z, weights.W_O) + weights.b_O
    assert checks.difference(out, found["out"]) < 1e-5


@each_family
def test_key_and_value_heads_are_not_repeated(family: str) -> None:
    weights = bridge_weights(bridge(family), 0)
    config = build(family).config
    n_kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    n_kv = {"falcon": 1, "falcon_heads": 4, "falcon_alibi": 4}.get(family, n_kv)
    assert weights.W_Q.shape[0] == weights.W_O.shape[0] == 4
    assert weights.W_K.shape == weights.W_V.shape == (n_kv, *weights.W_Q.shape[1:])
    assert not weights.W_Q.requires_grad


@each_family
def test_bridge_shares_the_storage_of_every_parameter(family: str) -> None:
    module, tree = build(family), bridge(family).original_model
    there = {p.untyped_storage().data_ptr() for p in tree.parameters()}
    for name, parameter in module.named_parameters():
        assert parameter.untyped_storage().data_ptr() in there, name
    buffers = {b.data_ptr() for b in tree.buffers()}
    for name, buffer in module.named_buffers():
        assert buffer.data_ptr() in buffers, name


@each_family
def test_building_a_bridge_leaves_the_model_as_it_was(family: str) -> None:
    module = fresh(family)
    before = checks.state(module)
    with torch.no_grad():
        plain = module(tokens()).logits
        again = bridge_over(module)(tokens())
        assert checks.difference(again, plain) < 3e-6
        assert checks.same_state(before, checks.state(module))
        assert torch.equal(module(tokens()).logits, plain)


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_both_ways_to_the_output_weights(family: str) -> None:
    model = HFModel.wrap(build(family))
    assert model is not None
    weights: HeadWeights = model.weights(1)
    scale = model.layout.layers[1].write_scale
    expected = weights.W_O * (1.0 if scale is None else scale)
    assert checks.difference(model.output_weights(1), expected) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "gpt_oss", "opt"])
def test_both_paths_have_one_digest(family: str) -> None:
    model = HFModel.wrap(build(family))
    assert model is not None
    assert wrap_bridge(bridge(family)).digest() == model.digest()
    other = fresh(family)
    with torch.no_grad():
        next(other.parameters()).flatten()[5] += 1e-3
    changed = HFModel.wrap(other)
    assert changed is not None
    assert changed.digest() != model.digest()


def test_tied_weights_stay_tied() -> None:
    module = bridge("gpt2").original_model
    head = module.get_output_embeddings().weight
    assert head.data_ptr() == build("gpt2").lm_head.weight.data_ptr()
    assert head.data_ptr() == build("gpt2").transformer.wte.weight.data_ptr()
