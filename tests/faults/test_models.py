"""What is read of a model is what runs, or one sentence says why not."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import headscope as hs
from headscope.errors import UnsupportedModelError
from headscope.models import proof
from headscope.models.hf import transformers_api
from headscope.models.hf.interface import NAME, _attend
from headscope.models.hf.measured import Watch, find_writers, measure_norm, write_scales
from headscope.models.proof import Gap, gap, rounding
from headscope.models.rotary import POSITIONS, find_rotation
from tests.watching import watch
from tools.tiny_models import tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = torch.randint(3, 61, (4, 14), generator=torch.Generator().manual_seed(1))


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "head_dim": 12, **changes})).eval()


def family(model_type: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def probe() -> Any:
    return hs.probes.from_tokens(TOKENS)


def zero_effects(model: Any) -> Tensor:
    effects = hs.ablate_heads(
        hs.load(model), probe(), hs.metrics.loss, method="zero", progress=False
    )
    return torch.tensor(effects.mean)


class Adapter(nn.Module):
    """A matrix and a low-rank path beside it, in either order."""

    def __init__(self, base: nn.Module, first: str = "base") -> None:
        super().__init__()
        self.base_layer = base
        self.A, self.B = nn.Linear(48, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first == "base":
            return self.base_layer(x) + self.B(self.A(x))
        beside = self.B(self.A(x))
        return self.base_layer(x) + beside


class Int8(nn.Linear):
    """An int8 weight with a scale beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.register_buffer("scale", base.weight.detach().abs().amax(1, keepdim=True) / 127)
        whole = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


class Rounded(nn.Linear):
    """A matrix that rounds what it is given, as quantised activations do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 4).round() / 4)


def wrapped(make: Any) -> tuple[Any, Any]:
    """A model whose output projections are wrapped, and the same model with plain matrices."""
    given, merged = llama(), llama()
    torch.manual_seed(1)
    for block, plain in zip(given.model.layers, merged.model.layers, strict=True):
        projection = make(block.self_attn.o_proj)
        block.self_attn.o_proj = projection
        with torch.no_grad():
            plain.self_attn.o_proj.weight.copy_(projection(torch.eye(48)).T)
    return given, merged


WRAPPERS = {
    "adapter": Adapter,
    "adapter that acts first": lambda base: Adapter(base, "adapter"),
    "int8": Int8,
    "adapter on int8": lambda base: Adapter(Int8(base)),
    "twice": lambda base: Adapter(Adapter(base)),
    "in a sequence": lambda base: nn.Sequential(base),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a1_a2_a_wrapped_projection_is_read_as_the_merged_matrix(kind: str) -> None:
    given, merged = wrapped(WRAPPERS[kind])
    model, plain = hs.load(given), hs.load(merged)
    assert not model.limits
    for layer in range(3):
        torch.testing.assert_close(
            model.output_weights(layer), plain.output_weights(layer), atol=1e-5, rtol=0
        )
    with hs.mask_heads(model, ["L1H2"], "zero", "all"), torch.no_grad():
        masked = given(TOKENS).logits
    with hs.mask_heads(plain, ["L1H2"], "zero", "all"), torch.no_grad():
        torch.testing.assert_close(masked, merged(TOKENS).logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(zero_effects(given), zero_effects(merged), atol=1e-5, rtol=0)


def test_a1_output_weights_do_not_see_edits_that_run() -> None:
    given, merged = wrapped(Adapter)
    model = hs.load(given)
    before = model.output_weights(0)
    with hs.mask_heads(model, ["L0H0"], "zero", "all"):
        torch.testing.assert_close(model.output_weights(0), before, atol=0, rtol=0)
    torch.testing.assert_close(before, hs.load(merged).output_weights(0), atol=1e-5, rtol=0)


def test_a2_a_projection_that_is_no_matrix_is_refused() -> None:
    model = llama()
    for block in model.model.layers:
        rounded = Rounded(48, 32, bias=False)
        rounded.weight = block.self_attn.o_proj.weight
        block.self_attn.o_proj = rounded
    with pytest.raises(hs.HeadscopeError, match="merge the adapter first"):
        hs.load(model)


WINDOWED = {
    "phimoe": {"sliding_window": 5, "num_local_experts": 4},
    "mistral": {"sliding_window": 5},
    "mixtral": {"sliding_window": 20, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.mark.parametrize("name", WINDOWED)
def test_a3_windows_are_those_of_the_mask(name: str) -> None:
    module = family(name, **WINDOWED[name])
    model = hs.load(module)
    size = WINDOWED[name]["sliding_window"]
    assert size in model.shape.windows
    assert model.proof.tokens > size
    tokens = torch.randint(3, 61, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = module(tokens, output_attentions=True)
        torch.testing.assert_close(model.forward(tokens), own.logits, atol=1e-3, rtol=0)
    rows = hs.capture.collect(model, hs.probes.from_tokens(tokens), layers=[0, 2])
    for layer in (0, 2):
        expected = own.attentions[layer]
        torch.testing.assert_close(rows[layer].pattern, expected, atol=1e-5, rtol=0)


def test_a3_a_window_beyond_the_text_of_the_proof_is_proved_on_masks() -> None:
    module = family("mistral", sliding_window=4096, max_position_embeddings=32768)
    found = hs.load(module).proof
    assert any("windows beyond" in check.what for check in found.checks)
    assert "proved on masks for 6146 tokens" in found.facts[0]


def test_a3_a_long_window_that_the_mask_does_not_keep_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import masking_utils

    whole = masking_utils.sliding_window_causal_mask_function

    def other(size: int) -> Any:
        return whole(size if size < 4096 else size - 1)

    monkeypatch.setattr(masking_utils, "sliding_window_causal_mask_function", other)
    module = family("mistral", sliding_window=4096, max_position_embeddings=32768)
    with pytest.raises(hs.HeadscopeError, match="mask"):
        hs.load(module)


def test_a4_a_mask_of_chunks_is_refused() -> None:
    module = family("mistral", sliding_window=5)
    from transformers.masking_utils import chunked_causal_mask_function
    from transformers.models.mistral import modeling_mistral

    real = modeling_mistral.create_sliding_window_causal_mask

    def chunked(config: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers.masking_utils import create_chunked_causal_mask

        config.attention_chunk_size = 5
        return create_chunked_causal_mask(config, *args, **kwargs)

    assert real is not None
    assert chunked_causal_mask_function is not None
    modeling_mistral.create_sliding_window_causal_mask = chunked
    try:
        with pytest.raises(
            hs.HeadscopeError, match="neither causal nor bidirectional nor a sliding window"
        ):
            hs.load(module)
    finally:
        modeling_mistral.create_sliding_window_causal_mask = real


@pytest.mark.parametrize("given", [torch.zeros(2), [torch.zeros(2)], (None, torch.zeros(1))])
def test_a4_an_unknown_tensor_of_an_attention_call_is_refused(given: Any) -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(hs.HeadscopeError, match="'block_indices'"):
        _attend(nn.Linear(1, 1), x, x, x, None, block_indices=given)
    _attend(nn.Linear(1, 1), x, x, x, None, position_ids=torch.zeros(1, 3), deterministic=True)
    assert NAME


def test_a5_a_final_norm_that_is_used_twice_shows_the_last_use() -> None:
    module = family("nanochat")
    model = hs.load(module)
    grid = hs.lens.logit_lens(model, TOKENS[0], target=5)
    own = module(TOKENS[:1]).logits[0].softmax(-1)[:, 5]
    torch.testing.assert_close(
        torch.tensor(grid.target_probability[-1]).float(), own.detach(), atol=1e-5, rtol=0
    )
    table = hs.score(model, probe(), progress=False)
    for name in ("previous_token", "direct_logit_attribution"):
        assert torch.isfinite(torch.tensor(table[name].mean)).all(), name


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hyperclovax", {"logits_scaling": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("nanochat", {}),
    ],
)
def test_a6_the_lens_ends_at_the_models_own_logits(name: str, changes: dict[str, Any]) -> None:
    module = family(name, **changes)
    model = hs.load(module)
    grid = hs.lens.logit_lens(model, TOKENS[0], target=5)
    own = module(TOKENS[:1]).logits[0].softmax(-1)[:, 5]
    torch.testing.assert_close(
        torch.tensor(grid.target_probability[-1]).float(), own.detach(), atol=1e-5, rtol=1e-4
    )


def test_a6_a_scale_that_no_config_names_is_measured() -> None:
    module = llama()
    module.lm_head.register_forward_hook(lambda _m, _a, output: 7 * (output * 0.3 / 7).tanh())
    unembedding = hs.load(module).unembedding
    assert unembedding.logit_scale == pytest.approx(0.3)
    assert unembedding.soft_cap == pytest.approx(7)


def test_a6_logits_that_are_more_than_scaled_have_no_unembedding() -> None:
    module = llama()
    module.lm_head.register_forward_hook(lambda _m, _a, output: output.abs())
    model = hs.load(module)
    assert "unembedding" in model.limits
    with pytest.raises(hs.HeadscopeError, match="soft cap"):
        hs.lens.logit_lens(model, TOKENS[0])


@pytest.mark.parametrize("name", ["bitnet"])
def test_a7_a_norm_before_the_output_projection_is_noticed(name: str) -> None:
    model = hs.load(family(name))
    assert "gate or a norm" in model.limits["values"]
    with pytest.raises(hs.HeadscopeError, match="gate or a norm"):
        hs.circuits.ov(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt_neo", "llama"])
def test_a8_half_precision_loads(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    if name == "gpt_neo":
        sizes: dict[str, Any] = {
            "attention_types": [[["global", "local"], 2]],
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": 128,
        }
    else:
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        name, vocab_size=61, hidden_size=64, initializer_range=0.3, **sizes
    )
    module = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    assert hs.load(module).dtype == dtype


def test_a9_a_dead_head_is_accepted_and_said() -> None:
    module = llama()
    module.model.layers[0].self_attn.o_proj.weight.data[:, :12] = 0
    model = hs.load(module)
    assert "L0H0 write nothing" in model.proof.facts[0]
    assert torch.as_tensor(zero_effects(module))[0, 0] == 0


def short_head() -> Any:
    module = llama()
    module.lm_head = nn.Linear(32, 40, bias=False)
    return module


def test_a10_tokens_in_and_tokens_out_are_two_sizes() -> None:
    module = short_head()
    model = hs.load(module)
    assert (model.shape.d_vocab, model.shape.n_logits) == (61, 40)
    with pytest.raises(hs.HeadscopeError, match="logits of tokens 0 to 39"):
        hs.ablate_heads(model, probe(), hs.metrics.loss, method="zero", progress=False)
    with pytest.raises(hs.HeadscopeError, match="no logit of token 50"):
        hs.lens.logit_lens(model, TOKENS[0], target=50)
    with pytest.raises(hs.HeadscopeError, match="logits of tokens 0 to 39"):
        hs.score(model, probe(), scorers=["copying"], progress=False)
    table = hs.score(model, probe(), scorers=["previous_token"], progress=False)
    whole = hs.score(hs.load(llama()), probe(), scorers=["previous_token"], progress=False)
    assert table["previous_token"].mean == pytest.approx(whole["previous_token"].mean, abs=1e-6)
    low = hs.probes.from_tokens(TOKENS % 37 + 3)
    hs.score(model, low, scorers=["copying"], progress=False)
    effects = hs.ablate_heads(model, low, hs.metrics.loss, method="zero", progress=False)
    assert effects.mean.shape == (3, 4)


def test_a10_more_tokens_out_than_in() -> None:
    module = llama()
    module.lm_head = nn.Linear(32, 70, bias=False)
    model = hs.load(module)
    assert model.shape.n_logits == 70
    own = module(TOKENS[:1]).logits[0].softmax(-1)[:, 65].detach()
    grid = hs.lens.logit_lens(model, TOKENS[0], target=65)
    found = torch.tensor(grid.target_probability[-1]).float()
    torch.testing.assert_close(found, own, atol=1e-5, rtol=0)


LENGTH_SCALED: dict[str, dict[str, Any]] = {
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 6,
        "long_factor": [float(i + 2) for i in range(6)],
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", LENGTH_SCALED)
def test_a11_a_rotation_that_depends_on_length_has_no_offset(kind: str) -> None:
    rope = {"rope_theta": 1e4, "rope_type": kind, **LENGTH_SCALED[kind]}
    module = llama(max_position_embeddings=256, rope_parameters=rope)
    model = hs.load(module)
    if kind == "longrope":
        assert "other angles in longer texts" in model.limits["rotary"]
        with pytest.raises(hs.HeadscopeError, match="other angles in longer texts"):
            hs.circuits.qk(model, fold_norm=False, offset=3)
        return
    product = hs.circuits.qk(model, fold_norm=False, offset=3).explicit("L1H2").double()
    for length in (14, 100):
        seen = products_in_the_run(model, length)
        assert seen(product) == pytest.approx(seen(None), rel=1e-4)


def products_in_the_run(model: Any, length: int) -> Any:
    """Product of the last query of L1H2 with the key three before it, by a matrix or in the run."""
    tokens = torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(3))
    kept: dict[str, Any] = {}

    class Look:
        wants_final = False

        def on_layer(self, view: Any) -> None:
            if view.layer == 1:
                kept["query_keys"] = view.query_keys(torch.arange(length))

        def on_final(self, _residual: Tensor) -> None: ...

    def read(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        kept["read"] = kwargs["hidden_states"][0].double()

    attention = model.module.model.layers[1].self_attn
    handle = attention.register_forward_pre_hook(read, with_kwargs=True)
    with torch.no_grad():
        watch(model, tokens, Look())
    handle.remove()
    i, matches, x = length - 1, kept["query_keys"], kept["read"]

    def product(matrix: Tensor | None) -> float:
        if matrix is not None:
            return float(x[i] @ matrix @ x[i - 3])
        return float(matches.query[0, 2, i].double() @ matches.key[0, 1, i - 3].double())

    return product


def test_a12_families_that_failed_with_tracebacks() -> None:
    with pytest.raises(hs.HeadscopeError, match="not a matrix"):
        hs.load(family("jetmoe", kv_channels=8, num_local_experts=4))
    hybrid = hs.load(
        family("lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)
    )
    assert hybrid.shape.attention_layers == (1, 3)
    made = hs.retrieval.generate(hybrid, TOKENS[:1], new_tokens=2, progress=False)
    assert made is not None
    with pytest.raises(hs.HeadscopeError, match="cannot be pruned"):
        hs.prune(hs.load(family("olmo", clip_qkv=0.5)), ["L0H1"])
    afmoe = family(
        "afmoe",
        head_dim=8,
        sliding_window=5,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_dense_layers=1,
    )
    pair = dataclasses.replace(probe(), corrupt=hs.probes.from_tokens(TOKENS.flip(0)))
    patched = hs.patch_activations(
        hs.load(afmoe), pair, hs.metrics.loss, site="query", progress=False
    )
    assert patched is not None


def test_a12_layer_types_are_a_list_of_what_is_known() -> None:
    module = llama()
    module.config.layer_types = ["full_attention", "mirror_attention", "full_attention"]
    with pytest.raises(hs.HeadscopeError, match="'mirror_attention'"):
        hs.load(module)


@pytest.mark.parametrize("turned", [2, 4, 8, 12])
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a14_the_smallest_pairing_that_explains_is_taken(
    turned: int, neighbours: bool, seed: int
) -> None:
    """Rounding at the level of fp32 must not decide how many planes turn."""
    draw = torch.Generator().manual_seed(seed)
    content = torch.randn(8, len(POSITIONS), 12, generator=draw, dtype=torch.float64)
    first = list(range(0, turned, 2)) if neighbours else list(range(turned // 2))
    second = [i + 1 for i in first] if neighbours else [i + turned // 2 for i in first]
    frequency = 100.0 ** -(torch.arange(turned // 2, dtype=torch.float64) * 2 / turned)
    angle = torch.tensor(POSITIONS)[:, None] * frequency
    planes = torch.complex(content[..., first], content[..., second])
    planes = planes * torch.polar(torch.ones_like(angle), angle)
    actual = content.clone()
    actual[..., first], actual[..., second] = planes.real, planes.imag
    noise = 1e-7 * torch.randn(actual.shape, generator=draw, dtype=torch.float64)
    found = find_rotation(content, actual + noise, 1e-6)
    assert found is not None
    assert sorted(zip(found.first, found.second, strict=True)) == sorted(
        zip(first, second, strict=True)
    )


def test_a13_nan_never_agrees() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert gap(one, one, 0.0).closed
    for pair in ((nan, one), (one, nan), (nan, nan)):
        assert not gap(*pair, 1e9).closed
    assert not gap(one, torch.ones(3), 1e9).closed
    assert not gap(one[:0], one[:0], 1e9).closed
    assert not Gap(float("nan"), float("inf")).closed


NAN = float("nan")


def test_a13_what_is_measured_at_load_does_not_take_nan_for_agreement() -> None:
    content = torch.randn(4, len(POSITIONS), 8)
    broken = content.clone()
    broken[0, 3, 2] = NAN
    assert find_rotation(content, content, 1e-6) is not None
    for pair in ((content, broken), (broken, content), (broken, broken)):
        assert find_rotation(*pair, 1e-6) is None
    norm = nn.LayerNorm(8)
    assert measure_norm(norm, 8, torch.device("cpu")).centred
    with torch.no_grad():
        norm.weight[3] = NAN
    with pytest.raises(UnsupportedModelError, match="neither LayerNorm nor RMSNorm"):
        measure_norm(norm, 8, torch.device("cpu"))


def test_a13_a_layer_that_is_nan_is_not_taken_for_the_clearest() -> None:
    """How blocks add attention's write: by layer 1, as layer 0 saw nothing but NaN."""
    watch, layers = Watch(), {}
    for number, value in enumerate((NAN, 1.0)):
        block, attention = nn.Identity(), nn.Identity()
        x, write = torch.randn(2, 3, 4) * value, torch.randn(2, 3, 4)
        layers[number] = (block, attention)
        watch.inputs[block], watch.writes[attention] = x, write
        watch.outputs[block] = x + 0.5 * write
    assert write_scales(watch, layers)[1] == pytest.approx(0.5)
    seen = Watch()
    block = nn.ModuleDict({"attention": nn.Identity(), "mlp": nn.Identity()})
    parts = [torch.randn(2, 3, 4) for _ in range(3)]
    seen.inputs[block] = parts[0]
    seen.outputs = {block["attention"]: parts[1], block["mlp"]: parts[2] * NAN}
    seen.outputs[block] = parts[0] + parts[1] + seen.outputs[block["mlp"]]
    with pytest.raises(
        UnsupportedModelError, match="do more than add attention's write and one other"
    ):
        find_writers(seen, {0: (block, block["attention"])})


@pytest.mark.parametrize("where", ["embed_tokens.weight", "norm.weight"])
def test_a13_a_model_whose_logits_are_nan_is_refused(where: str) -> None:
    module = llama()
    module.model.get_parameter(where).data[:] = torch.nan
    with pytest.raises(hs.HeadscopeError, match="NaN"):
        hs.load(module)


def test_tolerances_follow_dtype_and_length() -> None:
    assert rounding(torch.float32) < rounding(torch.float32, 1000) < 1e-4
    assert rounding(torch.float16, 64) < rounding(torch.bfloat16, 64) < 0.15
    assert rounding(torch.bfloat16, score=1e6) == 0.5


def test_a_proof_is_made_once_for_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = proof._proved
    monkeypatch.setattr(proof, "_proved", lambda model: made.append(model) or real(model))
    module = llama()
    first, second = hs.load(module), hs.load(module)
    assert len(made) == 1
    assert first.proof is second.proof
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight.mul_(2)
    hs.load(module)
    module.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    hs.load(module)
    assert len(made) == 3
    hs.load(copy.deepcopy(module))
    assert len(made) == 4


def test_a_proof_says_what_it_proved() -> None:
    found = hs.load(llama()).proof
    assert found.tokens == 64
    assert all(check.passed for check in found.checks)
    assert {check.what for check in found.checks} >= {
        "logits = the model's own",
        "rows x values = z",
        "z @ W_O + bias = what the output projection returns",
        "final norm and unembedding = the model's own logits",
        "every layer attends as without headscope",
    }
    assert dataclasses.is_dataclass(found)


def test_transformers_has_every_name_that_is_relied_on() -> None:
    assert transformers_api.moved() == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doge", r"makes more of the mask than which keys are visible \(in prepare_dynamic_mask"),
        ("diffllama", "its layers call attention more than once"),
        ("hrm_text", "which it runs more than once in a pass"),
    ],
)
def test_a12_refusals_say_what_the_family_does(kind: str, reason: str) -> None:
    with pytest.raises(hs.HeadscopeError, match=reason) as refusal:
        hs.load(tiny_model(kind))
    assert "Error" not in str(refusal.value)


def test_a12_a_model_that_cannot_be_opened_is_not_said_to_lack_bilinear_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = hs.load(llama())
    reason = "transformer-lens cannot open it."

    def refuse(*_: Any) -> None:
        raise UnsupportedModelError(reason)

    monkeypatch.setattr(type(model.parts), "query_key", refuse)
    with pytest.raises(UnsupportedModelError) as refusal:
        hs.circuits.qk(model, offset=1)
    assert str(refusal.value).startswith(reason)
    assert "bilinear" not in str(refusal.value)


def test_a12_what_passes_from_layer_to_layer_beside_the_stream_is_run_again() -> None:
    """Zaya's routers read those of the layer before: a replay would leave them as they were."""
    module = tiny_model("zaya").eval()
    model = hs.load(module)
    tokens = torch.arange(24).view(2, 12) + 5
    given = hs.probes.from_tokens(tokens)
    found = hs.ablate_heads(model, given, hs.metrics.loss, "zero", heads="L0H1", progress=False)
    assert found.provenance.attention != "suffix replay"

    def losses() -> Tensor:
        with torch.no_grad():
            logits = module(input_ids=tokens).logits[:, :-1].float()
        return nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        ).mean(1)

    def silence(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., model.shape.d_head : 2 * model.shape.d_head] = 0
        return (z, *args[1:])

    clean = losses()
    with model.layout.layers[0].projection.register_forward_pre_hook(silence):
        effect = losses() - clean
    assert found.mean[0, 1] == pytest.approx(float(effect.mean()), abs=1e-5)


def test_the_commit_of_a_repository_is_that_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, folder = "5" * 40, tmp_path / "models--some--model"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert transformers_api.commit_hash(LlamaConfig(), "some/model", None) == commit
    assert transformers_api.commit_hash(LlamaConfig(), "another/model", "v2") == "v2"
    assert transformers_api.commit_hash(LlamaConfig(), str(tmp_path), None) is None
