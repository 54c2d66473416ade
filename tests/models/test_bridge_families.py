import warnings
from functools import cache

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel

import headscope as hs
from headscope.errors import UnsupportedModelError
from headscope.models.bridge.model import BridgeModel, bridge_over, wrap_bridge
from headscope.models.hf.model import HFModel
from tests.models import checks
from tests.models.families import (
    ALIBI,
    BRIDGE_FAMILIES,
    HF_FAMILIES,
    WINDOW,
    build,
    fresh,
    padding,
    tokens,
)
from tests.watching import watch

each_family = pytest.mark.parametrize("family", BRIDGE_FAMILIES)
TOLERANCE = 1e-5  # fp32 rounding in other orders of summation, amplified by wide random weights


@cache
def bridged(family: str) -> BridgeModel:
    return wrap_bridge(bridge_over(build(family)), name=family)


@cache
def eager(family: str, kind: str) -> checks.Plain:
    model, module = bridged(family), build(family)
    inside = dict(module.named_modules())
    projections = {}
    for layer in model.shape.attention_layers:
        under = model.bridge.blocks[layer].attn.o.original_component.weight
        (projections[layer],) = (
            part
            for part in inside.values()
            if getattr(part, "weight", None) is not None
            and part.weight.data_ptr() == under.data_ptr()
        )
    return checks.plain(module, projections, padding(kind))


@each_family
@pytest.mark.parametrize("kind", ["none", "left", "right", "both"])
def test_agrees_with_plain_eager_attention(family: str, kind: str) -> None:
    worst = checks.worst(bridged(family), eager(family, kind), padding(kind))
    assert max(worst.values()) < TOLERANCE, worst


@each_family
@pytest.mark.parametrize("kind", ["none", "both"])
def test_rows_average_values_to_z_and_do_not_depend_on_chunks(family: str, kind: str) -> None:
    checks.rows_are_exact(bridged(family), padding(kind))
    assert checks.chunks_agree(bridged(family), padding(kind)) < 1e-6


@each_family
def test_logits_only_where_asked(family: str) -> None:
    checks.logits_at_selects(bridged(family))


@each_family
def test_a_batch_of_one(family: str) -> None:
    checks.examples_are_independent(bridged(family))


@each_family
def test_edits(family: str) -> None:
    checks.edits_act(bridged(family))
    checks.pattern_edit_is_z_edit(bridged(family))


@pytest.mark.parametrize("family", [name for name in BRIDGE_FAMILIES if name not in ALIBI])
def test_zero_query_is_uniform_attention(family: str) -> None:
    checks.zero_query_is_uniform(bridged(family), padding("both"))


@each_family
def test_a_pass_leaves_bridge_and_model_as_they_were(family: str) -> None:
    model, module = bridged(family), build(family)
    before, plain = checks.state(model.module), checks.state(module)
    edits = [
        checks.Change("z", frozenset({0}), torch.zeros_like),
        checks.Change("pattern", frozenset({0}), torch.zeros_like),
    ]
    with torch.no_grad():
        watch(model, tokens(), checks.Everything(), edits=edits)
        with pytest.raises(ZeroDivisionError):
            watch(model, tokens(), checks.Broken(), edits=edits)
        assert checks.same_state(before, checks.state(model.module))
        assert checks.same_state(plain, checks.state(module))
        again = model.forward(tokens())
    assert checks.difference(again, eager(family, "none").logits) < TOLERANCE


@pytest.mark.parametrize("family", HF_FAMILIES)
@pytest.mark.parametrize("kind", ["none", "both"])
def test_both_paths_agree(family: str, kind: str) -> None:
    real = padding(kind)
    fast, slow = HFModel.wrap(fresh(family)), bridged(family)
    assert fast is not None
    assert fast.shape == slow.shape
    assert set(fast.limits) <= set(slow.limits)
    by_fast, by_slow = checks.Everything(), checks.Everything()
    with torch.no_grad():
        logits = watch(fast, tokens(), by_fast, real=real)
        again = watch(slow, tokens(), by_slow, real=real)
    kept = torch.ones(logits.shape[:2], dtype=torch.bool) if real is None else real
    assert checks.difference(again, logits, kept) < TOLERANCE
    assert by_fast.final is not None
    assert by_slow.final is not None
    assert checks.difference(by_slow.final, by_fast.final, kept) < TOLERANCE
    for layer in fast.shape.attention_layers:
        assert torch.equal(by_slow.visible[layer], by_fast.visible[layer])
        rows = (by_slow.patterns[layer].mT, by_fast.patterns[layer].mT)
        assert checks.difference(*(r.permute(0, 3, 1, 2) for r in rows), kept) < TOLERANCE
        assert checks.difference(by_slow.z[layer], by_fast.z[layer], kept) < TOLERANCE
        values = (by_slow.values[layer], by_fast.values[layer])
        assert checks.difference(*(v.transpose(1, 2) for v in values), kept) < TOLERANCE
        assert fast.layout.layers[layer].write_scale == pytest.approx(
            slow.layout.layers[layer].write_scale, abs=1e-4
        )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_edits_of_fast_families_through_the_bridge(family: str) -> None:
    checks.edits_act(bridged(family))
    checks.pattern_edit_is_z_edit(bridged(family))
    checks.zero_query_is_uniform(bridged(family), padding("both"))


def test_pattern_edits_are_refused_where_they_would_not_act() -> None:
    model = bridged("opt")
    assert "pattern_edit" in model.limits
    checks.edits_act(model, sites=("z", "query"))
    with pytest.raises(UnsupportedModelError, match="cannot be edited"):
        model.forward(tokens(), edits=[checks.Change("pattern", frozenset({0}), torch.clone)])


def test_shapes() -> None:
    shapes = {family: bridged(family).shape for family in BRIDGE_FAMILIES}
    assert shapes["falcon"].n_kv_heads == 1
    assert shapes["falcon_heads"].n_kv_heads == shapes["bloom"].n_kv_heads == 4
    assert shapes["gpt_neo"].windows == (None, WINDOW, None, WINDOW)
    assert shapes["bloom"].windows == (None,) * 3
    assert shapes["bloom"].n_ctx is None
    assert shapes["gptj"].n_ctx == 128


@pytest.fixture
def own_bridge() -> BridgeModel:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = fresh("gpt2")
    bridge = build_bridge_from_module(
        module, architecture="GPT2LMHeadModel", hf_config=module.config, model_name="mine"
    )
    return wrap_bridge(bridge)


def test_users_own_bridge_keeps_its_hooks(own_bridge: BridgeModel) -> None:
    assert own_bridge.name == "mine"
    with torch.no_grad():
        plain = build("gpt2")(tokens()).logits
        assert checks.difference(own_bridge.forward(tokens()), plain) < TOLERANCE
    calls: list[str] = []
    own_bridge.bridge.blocks[1].attn.hook_z.add_hook(lambda value, hook: calls.append(hook.name))
    edit = checks.Change("z", frozenset({1}), torch.clone)
    with torch.no_grad():
        edited = own_bridge.forward(tokens(), edits=[edit])
        own_bridge.bridge(tokens())
    assert len(calls) == 2
    assert checks.difference(edited, plain) < TOLERANCE


def test_a_bridge_of_the_user_is_proved_without_its_hooks(own_bridge: BridgeModel) -> None:
    bridge = own_bridge.bridge
    bridge.blocks[1].attn.hook_z.add_hook(lambda value, hook: torch.zeros_like(value))
    bridge.blocks[1].attn.hook_z.add_hook(lambda value, hook: value + 1)
    before = list(bridge.blocks[1].attn.hook_z._forward_hooks)
    silenced = bridge(tokens()).detach()
    model = hs.load(bridge)
    assert {check.what for check in model.proof.checks} >= {
        "rows x values = z",
        "logits = the model's own",
        "final norm and unembedding = the model's own logits",
    }
    assert all(check.passed for check in model.proof.checks)
    assert not model.limits.keys() & {"values", "ov", "unembedding"}
    assert list(bridge.blocks[1].attn.hook_z._forward_hooks) == before
    assert checks.difference(model.forward(tokens()).detach(), silenced) < TOLERANCE


def test_a_bridge_of_the_user_that_does_more_than_its_matrices_is_refused(
    own_bridge: BridgeModel,
) -> None:
    projection = own_bridge.bridge.blocks[1].attn.o
    handle = projection.register_forward_hook(lambda _m, _args, out: out + out.square())
    with pytest.raises(UnsupportedModelError, match="layer 1 adds something to z @ W_O"):
        hs.load(own_bridge.bridge)
    handle.remove()
    assert hs.load(own_bridge.bridge).proof.checks


def test_a_bridge_of_the_user_may_be_in_training_mode(own_bridge: BridgeModel) -> None:
    calm = hs.load(own_bridge.bridge).forward(tokens())
    own_bridge.bridge.train()
    model = hs.load(own_bridge.bridge)
    assert checks.difference(model.forward(tokens()), calm) == 0
    assert own_bridge.bridge.original_model.training


def test_folded_bridge_of_the_user(own_bridge: BridgeModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own_bridge.bridge.enable_compatibility_mode(disable_warnings=True)
    model = wrap_bridge(own_bridge.bridge)
    seen = checks.Everything()
    with torch.no_grad():
        logits = watch(model, tokens(), seen)
        plain = build("gpt2")(tokens()).logits
    # Folding centres the unembedding: logits move by one number per position.
    assert checks.difference(logits.log_softmax(-1), plain.log_softmax(-1)) < 1e-4
    assert seen.final is not None
    assert checks.difference(model.unembedding.logits(seen.final), logits) < TOLERANCE


def test_native_bridge_of_transformer_lens() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_native(
        {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 8, "n_heads": 2, "d_vocab": 61}
        | {"act_fn": "gelu", "normalization_type": "LN"}
    )
    model = wrap_bridge(bridge)
    seen = checks.Everything()
    with torch.no_grad():
        logits = watch(model, tokens(), seen)
    assert seen.final is not None
    assert checks.difference(model.unembedding.logits(seen.final), logits) < TOLERANCE
    checks.rows_are_exact(model, None)
    checks.edits_act(model)
    assert model.shape.n_ctx == 32


def test_what_transformer_lens_runs_wrongly_is_refused() -> None:
    config = FalconConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        new_decoder_architecture=True,
        multi_query=False,
        num_kv_heads=2,
        initializer_range=0.4,
    )
    with pytest.raises(UnsupportedModelError, match=r"FalconForCausalLM .* other logits"):
        bridge_over(FalconForCausalLM(config).eval())


def test_what_transformer_lens_does_not_know_is_refused() -> None:
    class Unheard(GPT2LMHeadModel):
        pass

    module = Unheard(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(UnsupportedModelError, match=r"Unheard .*Unsupported architecture"):
        bridge_over(module)


def test_a_window_that_the_config_does_not_tell_is_noticed() -> None:
    bridge = bridge_over(build("gpt_neo"))
    bridge.original_model.config.attention_layers = ["local"] * 4
    model = wrap_bridge(bridge)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="cannot see"):
        watch(model, tokens(), checks.Everything())
