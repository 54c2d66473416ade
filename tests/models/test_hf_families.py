import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.models.hf.model import HFModel
from tests.models import checks
from tests.models.families import HF_FAMILIES, WINDOW, build, fresh, padding, tokens
from tests.watching import watch

each_family = pytest.mark.parametrize("family", HF_FAMILIES)
# A full mask row, the widest chunk and fused attention sum in other orders: fp32 rounding, which
# these wide random weights amplify from layer to layer.
TOLERANCE = 1e-5


@cache
def wrapped(family: str) -> HFModel:
    module = fresh(family)
    if module._supports_sdpa:
        module.set_attn_implementation("sdpa")
    model = HFModel.wrap(module)
    assert model is not None
    return model


@cache
def eager(family: str, kind: str) -> checks.Plain:
    return reference(build(family), wrapped(family), padding(kind))


def reference(module: Any, model: HFModel, real: Tensor | None) -> checks.Plain:
    names = {part: name for name, part in model.module.named_modules()}
    projections = {
        layer: module.get_submodule(names[parts.projection])
        for layer, parts in model.layout.layers.items()
    }
    return checks.plain(module, projections, real)


@each_family
@pytest.mark.parametrize("kind", ["none", "left", "right", "both"])
def test_agrees_with_plain_eager_attention(family: str, kind: str) -> None:
    worst = checks.worst(wrapped(family), eager(family, kind), padding(kind))
    assert max(worst.values()) < TOLERANCE, worst


@each_family
@pytest.mark.parametrize("kind", ["none", "both"])
def test_rows_average_values_to_z_and_do_not_depend_on_chunks(family: str, kind: str) -> None:
    checks.rows_are_exact(wrapped(family), padding(kind))
    assert checks.chunks_agree(wrapped(family), padding(kind)) < 1e-6


@each_family
def test_logits_only_where_asked(family: str) -> None:
    checks.logits_at_selects(wrapped(family))


@each_family
def test_a_batch_of_one(family: str) -> None:
    checks.examples_are_independent(wrapped(family))


@each_family
def test_edits(family: str) -> None:
    checks.edits_act(wrapped(family))
    checks.pattern_edit_is_z_edit(wrapped(family))


@each_family
@pytest.mark.parametrize("kind", ["none", "both"])
def test_zero_query_is_uniform_attention(family: str, kind: str) -> None:
    checks.zero_query_is_uniform(wrapped(family), padding(kind))


@each_family
def test_a_pass_leaves_the_model_as_it_was(family: str) -> None:
    model = wrapped(family)
    before = checks.state(model.module)
    edit = checks.Change("z", frozenset({0}), torch.zeros_like)
    with torch.no_grad():
        watch(model, tokens(), checks.Everything(), edits=[edit])
        assert checks.same_state(before, checks.state(model.module))
        with pytest.raises(ZeroDivisionError):
            watch(model, tokens(), checks.Broken())
        assert checks.same_state(before, checks.state(model.module))
        assert checks.difference(model.module(tokens()).logits, eager(family, "none").logits) < 1e-5


@each_family
def test_half_precision_is_as_near_as_eager_half_precision(family: str) -> None:
    # bf16 keeps 8 bits: a score of 20 is off by up to 0.04 in eager attention, which rounds
    # scores and rows; ours rounds neither. So layer 0, whose inputs are the same on both ways,
    # agrees to about 0.05 in a row, and the logits are no further from fp32 than eager's are.
    module = fresh(family).to(torch.bfloat16)
    half = copy.deepcopy(module)
    if half._supports_sdpa:
        half.set_attn_implementation("sdpa")
    model = HFModel.wrap(half)
    assert model is not None
    rounded = reference(module, model, None)
    seen = checks.Everything()
    with torch.no_grad():
        logits = watch(model, tokens(), seen)
    assert seen.patterns[0].dtype == torch.float32
    gap = (seen.patterns[0] - rounded.patterns[0].float()).abs()
    assert float(gap.max()) < 0.1
    assert float(gap.mean()) < 2e-3
    exact = eager(family, "none").logits
    ours = (logits.float() - exact).abs().mean()
    theirs = (rounded.logits.float() - exact).abs().mean()
    assert float(ours) < 1.5 * float(theirs) + 1e-3


def test_shape_says_what_the_config_says() -> None:
    shapes = {family: wrapped(family).shape for family in HF_FAMILIES}
    assert {family: shape.n_kv_heads for family, shape in shapes.items()} == {
        "gpt2": 4,
        "gpt_neox": 4,
        "llama": 2,
        "mistral": 1,
        "qwen2": 2,
        "qwen3": 2,
        "gemma2": 2,
        "gemma3_text": 1,
        "phi3": 2,
        "olmo2": 2,
        "gpt_oss": 2,
        "granite": 2,
        "cohere2": 2,
        "starcoder2": 2,
        "mixtral": 2,
        "opt": 4,
    }
    windowed = (WINDOW, None, WINDOW)
    for family, shape in shapes.items():
        assert (shape.n_layers, shape.n_heads, shape.d_model) == (3, 4, 32)
        if family in ("gemma2", "gemma3_text", "gpt_oss", "cohere2"):
            assert shape.windows == windowed
        elif family == "mistral":
            assert shape.windows == (WINDOW,) * 3
        else:
            assert shape.windows == (None,) * 3


def test_write_into_the_residual_stream() -> None:
    scales = {
        family: {parts.write_scale for parts in wrapped(family).layout.layers.values()}
        for family in HF_FAMILIES
    }
    after_norm = ("gemma2", "gemma3_text", "olmo2")
    for family, scale in scales.items():
        assert ("linear_write" in wrapped(family).limits) == (family in after_norm)
        if family in after_norm:
            assert scale == {None}
        else:
            expected = 0.5 if family == "granite" else 1.0
            assert list(scale) == pytest.approx([expected] * len(scale), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_write_below_a_long_residual_stream(family: str, dtype: torch.dtype) -> None:
    module = fresh(family)
    first = module.base_model.layers[0].mlp if family != "gpt2" else module.transformer.h[0].mlp
    first.register_forward_hook(lambda _module, _args, output: output * 1e4)
    model = HFModel.wrap(module.to(dtype))
    assert model is not None
    expected = None if family == "gemma2" else 1.0
    assert {parts.write_scale for parts in model.layout.layers.values()} == {expected}
