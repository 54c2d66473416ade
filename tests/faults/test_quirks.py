"""Every row of the table of quirks is what a model of the family gives on random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headscope as hs
from docs.pages.quirks import quirk_table
from headscope.models.quirks import QUIRKS, Quirk
from tests.faults.test_models import family, llama
from tests.watching import watch

TOKENS = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(1))
_FOUR: dict[str, Any] = {"num_hidden_layers": 4}
_WINDOWS: dict[str, Any] = {"sliding_window": 5}
_GEMMA4: dict[str, Any] = {
    **_FOUR,
    **_WINDOWS,
    "head_dim": 8,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
}
_GEMMA3N: dict[str, Any] = {
    **_FOUR,
    **_WINDOWS,
    "head_dim": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [48] * 4,
}
_LONGROPE: dict[str, Any] = {
    "rope_theta": 1e4,
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
    "original_max_position_embeddings": 64,
}

# Name of a row -> the models that show it: model type and what differs from the small config.
SHOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "gate after attention": (
        "afmoe",
        {
            **_WINDOWS,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "num_dense_layers": 1,
        },
    ),
    "norm before the output projection": ("bitnet", {}),
    "norm after attention": ("olmo2", {}),
    "learned sinks": (
        "gpt_oss",
        {
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "initializer_range": 0.3,
            **_WINDOWS,
        },
    ),
    "hybrid with a shifted attention index": (
        "lfm2",
        {**_FOUR, "layer_types": ["conv", "full_attention"] * 2},
    ),
    "keys and values shared between layers": ("gemma3n_text", _GEMMA3N),
    "positions dropped before layers that share keys and values": (
        "gemma4_text",
        {**_GEMMA4, "num_kv_shared_layers": 2},
    ),
    "keys equal to values": (
        "gemma4_text",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 2},
    ),
    "latent attention": (
        "deepseek_v3",
        {
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "head sizes that differ by layer": ("gemma4_text", {**_GEMMA4, "global_head_dim": 16}),
    "rotation that differs by layer": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "rotation that depends on the length of the text": ("llama", {"rope_parameters": _LONGROPE}),
    "queries and keys with a norm": ("qwen3", {"head_dim": 12}),
    "soft caps": (
        "gemma2",
        {"head_dim": 12, "attn_logit_softcapping": 5.0, **_WINDOWS},
    ),
    "sliding windows": ("mistral", _WINDOWS),
    "fused QKV side by side": ("phi3", {}),
    "fused QKV in turns per head": ("gpt_neox", {}),
    "fused QKV with shared keys and values": ("falcon", {}),
    "several residual streams": ("gemma3n_text", _GEMMA3N),
    "multipliers on residual, embedding and logits": (
        "granite",
        {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    ),
    "final norm used elsewhere too": ("nanochat", {}),
    "output projection that is more than a matrix": (
        "jetmoe",
        {"kv_channels": 8, "num_local_experts": 4},
    ),
    "chunks and blocks of keys": (
        "llama4_text",
        {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 5},
    ),
    "keys chosen by an indexer": ("llama", {"layer_types": ["indexed_attention"] * 3}),
    "several attention stacks": ("llama", {"is_encoder_decoder": True}),
}


def shown(quirk: Quirk) -> Any:
    name, changes = SHOWN[quirk.name]
    if name == "llama":
        changes = dict(changes)
        kinds = changes.pop("layer_types", None)
        module = llama(**changes)
        if kinds is not None:
            module.config.layer_types = kinds
        return module
    return family(name, **changes)


def test_the_docs_hold_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "howto" / "your-model.md"
    assert quirk_table() in page.read_text(encoding="utf-8")


def test_the_table_is_complete() -> None:
    assert [quirk.name for quirk in QUIRKS] == list(SHOWN)
    for quirk in QUIRKS:
        assert bool(quirk.instead) == (quirk.answer != "exact"), quirk.name
        assert quirk.answer == "limited" or not quirk.limits


@pytest.mark.parametrize(
    "quirk", [q for q in QUIRKS if q.answer == "refused"], ids=lambda q: q.name
)
def test_a_refused_quirk_is_one_sentence(quirk: Quirk) -> None:
    with pytest.raises(hs.HeadscopeError) as error:
        hs.load(shown(quirk))
    assert "Error:" not in str(error.value)
    assert "is not supported" in str(error.value)


@pytest.mark.parametrize(
    "quirk", [q for q in QUIRKS if q.answer != "refused"], ids=lambda q: q.name
)
def test_other_quirks_are_exact(quirk: Quirk) -> None:
    module = shown(quirk)
    model = hs.load(module)
    assert set(quirk.limits) <= set(model.limits)
    if quirk.answer == "exact":
        assert set(model.limits) <= {"query_keys", "linear_write", "rotary"}
    patterns: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    class Look:
        wants_final = False

        def on_layer(self, view: Any) -> None:
            patterns[view.layer] = view.rows(torch.arange(14)).pattern.clone()
            outputs[view.layer] = view.z.clone()

        def on_final(self, _residual: Tensor) -> None: ...

    with torch.no_grad():
        logits = watch(model, TOKENS, Look())
        own = module(TOKENS, output_attentions=True, use_cache=False)
    scale = float(own.logits.abs().max())
    torch.testing.assert_close(logits, own.logits, atol=1e-5 * scale, rtol=0)
    assert tuple(patterns) == model.shape.attention_layers
    eager = [rows for rows in own.attentions or () if rows is not None]
    if len(eager) == len(patterns):
        for (layer, rows), expected in zip(patterns.items(), eager, strict=True):
            plain = expected[..., : rows.shape[-1]]
            torch.testing.assert_close(
                rows, plain, atol=1e-5, rtol=0, msg=lambda m, n=layer: f"layer {n}: {m}"
            )
