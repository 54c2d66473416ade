"""Tiny random models of every supported family, with attention that is far from flat.

Weights are drawn wide, and biases, norm gains and sinks are moved off their initial 0 and 1, so
that a part that is dropped or misread changes every number.
"""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, LENGTH, WINDOW = 61, 12, 5

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _BASE | {"num_key_value_heads": 2, "head_dim": 12}  # heads together wider than d_model
_ONE_KV = _GROUPED | {"num_key_value_heads": 1}
_WINDOW = {"sliding_window": WINDOW}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}

HF_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _TOKENS
    | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.4},
    "gpt_neox": _BASE,
    "llama": _GROUPED | {"attention_bias": True},
    "mistral": _ONE_KV | _WINDOW,
    "qwen2": _BASE | {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gemma2": _GROUPED
    | _WINDOW
    | _ALTERNATING
    | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _ONE_KV | _WINDOW | _ALTERNATING,
    "phi3": _BASE | {"num_key_value_heads": 2},
    "olmo2": _BASE | {"num_key_value_heads": 2},
    "gpt_oss": _GROUPED | _WINDOW | _ALTERNATING | _EXPERTS | {"initializer_range": 0.3},
    "granite": _BASE
    | {
        "num_key_value_heads": 2,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
    },
    "cohere2": _GROUPED | _WINDOW | _ALTERNATING | {"logit_scale": 0.25},
    "starcoder2": _BASE | {"num_key_value_heads": 2},
    "mixtral": _GROUPED | _EXPERTS,
    "opt": _TOKENS
    | {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "init_std": 0.4,
        "pad_token_id": 0,
    },
}

BRIDGE_FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": _TOKENS | {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.4},
    "falcon": _BASE,  # one KV head, rotary, parallel block
    "falcon_heads": _BASE | {"multi_query": False, "bias": True, "parallel_attn": False},
    "falcon_alibi": _BASE | {"multi_query": False, "alibi": True},
    "gptj": _TOKENS
    | {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "rotary_dim": 4,
        "n_positions": 128,
        "initializer_range": 0.4,
    },
    "gpt_neo": _TOKENS
    | {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 128,
        "window_size": WINDOW,
        "initializer_range": 0.25,  # its scores are not divided by the root of d_head
    },
}

ALIBI = ("bloom", "falcon_alibi")


@cache
def build(family: str) -> Any:
    """Build the model of a family, on eager attention; shared, so never changed by a test."""
    kwargs = (HF_FAMILIES | BRIDGE_FAMILIES)[family]
    model_type = "falcon" if family.startswith("falcon") else family
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(kwargs))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    _unsettle(model)
    _BUILT[family] = (model, writes_to(model))
    return model


# Every model that was built, and how often its weights had been written to by then.
_BUILT: dict[str, tuple[Any, int]] = {}


def writes_to(model: Any) -> int:
    """How often the weights of a model were written to in place."""
    return sum(weight._version for weight in model.parameters())


def changed() -> list[str]:
    """Families whose shared model was written to since it was built."""
    found = [family for family, (model, writes) in _BUILT.items() if writes_to(model) != writes]
    for family in found:  # said once, of the file that did it
        _BUILT[family] = (_BUILT[family][0], writes_to(_BUILT[family][0]))
    return found


def fresh(family: str) -> Any:
    """Build a copy that a test may change."""
    return copy.deepcopy(build(family))


def tokens(batch: int = 4) -> Tensor:
    """Draw token ids; none is a special one."""
    return torch.randint(3, VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(1))


def padding(kind: str) -> Tensor | None:
    """Say which positions are real, for a batch of four."""
    real = torch.ones(4, LENGTH, dtype=torch.bool)
    if kind == "none":
        return None
    if kind in ("left", "both"):
        real[0, :3] = False
        real[1, :6] = False
    if kind in ("right", "both"):
        real[1 if kind == "right" else 2, -4:] = False
        real[3, -1:] = False
    return real


def _unsettle(model: nn.Module) -> None:
    """Move biases, gains and sinks, which start at 0 or 1."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
