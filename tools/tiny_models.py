"""Tiny random models of transformers: language models, encoders, vision, encoder-decoders.

A config is shrunk field by field, by the field's name. What is left has a width of 32, four heads
(two key/value heads where there is grouping), as many layers as it takes for every kind of layer
to occur, windows far shorter than the texts that are tried, and four experts. Weights are drawn
wide, and gains, biases and sinks are moved off 0 and 1, so that attention is far from flat and a
part that is misread changes every number.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, CONTEXT, WINDOW, WIDTH, HEADS, KV_HEADS, DEPTH = 61, 256, 5, 32, 4, 2, 3
LARGEST = 4_000_000
# Model types whose first random weights blow rounding up beyond what checks allow.
SEEDS = {"minicpm_ocr": 1, "minicpmv4_6": 1, "minicpmv4_7": 1}


def _each(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    *("num_decoder_layers", "num_blocks"),
)

# Name of a config field -> its size in a tiny model. A field that a config lacks, or leaves at
# None, stays as it is.
SIZES: Mapping[str, Any] = {
    **_each(
        WIDTH,
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"),
        *("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"),
        *("attention_hidden_size", "backbone_hidden_size", "cross_attention_hidden_size"),
        *("hidden_size_global", "projection_dim"),
    ),
    **_each(
        48,
        *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"),
        *("d_inner", "dff", "dim_ff", "ffn_hidden_size", "feed_forward_size"),
        *("intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"),
        *("shared_intermediate_size", "block_ffn_dim"),
    ),
    **_each(
        24,
        *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
        *("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("moe_latent_size", "router_hidden_size"),
    ),
    **_each(DEPTH, *_DEPTHS, "max_window_layers"),
    **_each(1, "encoder_layers", "num_encoder_layers"),
    **_each(
        HEADS,
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_decoder_attention_heads", "attention_heads"),
        *("num_encoder_attention_heads", "swa_num_attention_heads"),
    ),
    **_each(
        KV_HEADS,
        *("num_key_value_heads", "swa_num_key_value_heads", "num_query_groups", "kv_n_heads"),
        *("num_kv_heads", "num_global_key_value_heads"),
    ),
    # Heads together are wider than the residual stream.
    **_each(
        16,
        *("head_dim", "swa_head_dim", "global_head_dim", "kv_channels", "dim_head"),
        *("attention_head_dim", "d_head"),
    ),
    **_each(
        WINDOW,
        *("sliding_window", "window_size", "attention_window_size", "sliding_window_size"),
        *("attention_chunk_size", "local_attention", "keep_window_size"),
        *("local_attention_window_len",),
    ),
    **_each(
        CONTEXT,
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"),
        *("max_target_positions", "context_length", "max_source_positions"),
    ),
    **_each(
        VOCAB, "vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "audio_vocab_size"
    ),
    # Experts.
    **_each(
        4,
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ),
    **_each(
        2,
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"),
        *("top_k_experts", "n_group", "num_expert_group", "zero_expert_num"),
    ),
    **_each(
        1,
        *("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "topk_group"),
        *("first_k_dense_replace", "num_dense_layers"),
    ),
    # Latent attention.
    **_each(16, "kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_nope_head_dim", "v_head_dim"),
    **_each(8, "qk_rope_head_dim"),
    **_each(24, "qk_head_dim"),
    **_each(2, "index_n_heads", "indexer_n_heads"),
    **_each(16, "index_head_dim", "indexer_head_dim"),
    **_each(8, "index_topk"),
    # Mixers that are no attention.
    **_each(8, "mamba_d_state", "state_size", "ssm_state_size", "chunk_size", "mamba_chunk_size"),
    **_each(4, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "time_step_rank"),
    **_each(16, "mamba_d_head", "mamba_head_dim", "mamba_headdim"),
    **_each(64, "mamba_d_ssm"),
    **_each(1, "mamba_n_groups", "mamba_ngroups", "n_groups"),
    **_each(2, "linear_num_key_heads", "linear_num_heads"),
    **_each(4, "linear_num_value_heads"),
    **_each(8, "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"),
    # How wide weights are drawn.
    **_each(
        0.4,
        *("initializer_range", "init_std", "embed_init_std", "embedding_initializer_range"),
    ),
    # Special tokens stay below the ids that tests draw.
    **_each(0, "pad_token_id"),
    **_each(1, "bos_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    **_each(2, "eos_token_id", "forced_eos_token_id", "sep_token_id", "cls_token_id"),
    **_each(2, "eod_token_id"),
    **_each(
        0.0,
        *("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "attn_pdrop"),
        *("embd_pdrop", "decoder_layerdrop", "layerdrop", "encoder_layerdrop"),
    ),
}

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_NO_HEAD_DIM = {"head_dim": WIDTH // HEADS}
_WINDOWED = {
    **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 24},
    **_each(16, "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"),
}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": DEPTH,
    "vocab_size_per_layer_input": 0,
}

# What a name alone does not tell, by model type.
EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "dots3_note_text": {"head_dim": 24} | {f"swa_{name}": v for name, v in _WINDOWED.items()},
    "dots3_note_audio": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH}
    | {"adapter_input_size": WIDTH},
    **_each({"rotary_dim": 4}, "codegen", "gptj"),
    **_each({"head_dim": 16}, "hunyuan_v1_dense", "hunyuan_v1_moe"),
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    **_each({"head_dim": 8, "num_key_value_heads": HEADS}, "blt_patcher", "blt_local_encoder"),
    **_each({"head_dim": 8, "num_key_value_heads": HEADS}, "blt_global_transformer"),
    **_each({"head_dim": 8, "num_key_value_heads": HEADS}, "blt_local_decoder"),
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 4.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"layer_types": _SLIDING}
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": [*_SLIDING[1:], *_SLIDING[:2]]}
    | {"num_hidden_layers": 4, "intermediate_size": 48, "activation_sparsity_pattern": None}
    | {"hidden_size_per_layer_input": 8},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "got_ocr2": {"vision_config": {"image_size": 64, "output_channels": 16, "window_size": 2}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "helium": _NO_HEAD_DIM,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 2}
    | {"expert_layer_period": 2, "mamba_dt_rank": 4},
    "laguna": {"layer_types": _SLIDING, "num_attention_heads_per_layer": [HEADS] * DEPTH},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]}
    | {"full_attn_idxs": None, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    **_each(
        {
            "moe_layers": [1],
            "floor_scale": 16,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "no_rope_layers": [1, 1, 1, 0],
            "num_hidden_layers": 4,
        },
        "llama4_text",
    ),
    "ministral": {"head_dim": 16, "layer_types": _SLIDING},
    "moshi": {"audio_vocab_size": VOCAB},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    **_each({"use_sliding_window": True, "max_window_layers": 1}, "qwen2", "qwen2_moe", "qwen3"),
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
    | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 16]}
    | {"attention_head_size": 8, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    "roc_bert": {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 30}
    | {"shape_embed_dim": 8, "shape_vocab_size": 30},
    "xlnet": {"d_head": WIDTH // HEADS},
    "xmod": {"default_language": "en_XX"},
    "distilbert": {"dim": WIDTH, "hidden_dim": 48},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 4},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}
    | {"num_hidden_layers": 4, "attention_hidden_size": 2 * WIDTH, "num_key_value_heads": HEADS},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}
    | {"num_hidden_layers": 4, "attention_hidden_size": 2 * WIDTH, "num_key_value_heads": HEADS}
    | {"n_mamba_heads": 4, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1, "sliding_window": WINDOW}
    | {"layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]},
}


# Text models of vision-language models whose positions are three numbers, split by hand.
_TURNING = (
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm4v_moe_text"),
    *("glm_ocr_text", "glm46v_text", "glmga_text", "paddleocr_vl_text"),
)
_TURNS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_TURNS |= {"partial_rotary_factor": 1.0}
# Pictures of 4 x 4 patches, of which four become one token where a family merges them.
_PICTURES: Mapping[str, Any] = {
    **{"image_size": 16, "patch_size": 4, "num_channels": 3, "in_channels": 3, "in_chans": 3},
    **{"depth": 2, "embed_dim": WIDTH, "out_hidden_size": WIDTH, "mlp_ratio": 2, "num_heads": 4},
    **{"temporal_patch_size": 2, "spatial_merge_size": 2, "fullatt_block_indexes": [1]},
    **{
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
        "window_size": 16,
        "head_dim": 8,
    },
}
_SPOKEN: Mapping[str, Any] = {"vocab_size": VOCAB, "head_dim": WIDTH // HEADS}


@dataclass(frozen=True)
class Group:
    """Model classes that are built for one purpose.

    Attributes:
        title: what they are, as a heading.
        auto: the class of transformers that makes one from its config.
        tasks: names of transformers' lists of them.
        own: sizes of fields that are otherwise in this group.
        largest: parameters of a tiny model at most.
        said: what is tried of them beside attention rows, head outputs and ablation.
    """

    title: str
    auto: str
    tasks: tuple[str, ...]
    own: Mapping[str, Any] = field(default_factory=dict)
    largest: int = LARGEST
    said: str = ""


GROUPS: Mapping[str, Group] = {
    "causal": Group("Decoders of text", "AutoModelForCausalLM", ("CAUSAL_LM",)),
    "masked": Group(
        "Encoders of text",
        "AutoModelForMaskedLM",
        ("MASKED_LM",),
        {"is_decoder": False},
        said="with a masked-language-model head",
    ),
    "images": Group(
        "Vision models",
        "AutoModelForImageClassification",
        ("IMAGE_CLASSIFICATION",),
        {"image_size": 16, "patch_size": 4, "num_channels": 3},
        largest=40_000_000,
        said="with a head that classifies images",
    ),
    "seq2seq": Group(
        "Encoder-decoders",
        "AutoModelForSeq2SeqLM",
        ("SEQ_TO_SEQ_CAUSAL_LM",),
        {"is_decoder": False, "encoder_layers": 2, "num_encoder_layers": 2, "d_kv": 8},
        largest=8_000_000,
        said="each with three stacks of attention",
    ),
    "speech": Group(
        "Encoder-decoders of speech",
        "AutoModelForSpeechSeq2Seq",
        ("SPEECH_SEQ_2_SEQ",),
        {"is_decoder": False, "encoder_layers": 2, "num_encoder_layers": 2, "num_mel_bins": 8}
        | {"max_source_positions": 20, "d_kv": 8},
        largest=8_000_000,
        said="each with three stacks of attention",
    ),
    "pictures": Group(
        "Vision-language models",
        "AutoModelForImageTextToText",
        ("IMAGE_TEXT_TO_TEXT",),
        {"is_decoder": False, "vision_config": _PICTURES, "text_config": _SPOKEN}
        | {"image_token_id": VOCAB - 3, "image_token_index": VOCAB - 3}
        | {"vision_start_token_id": VOCAB - 5, "vision_end_token_id": VOCAB - 6}
        | {"video_token_id": VOCAB - 4, "image_seq_length": 16, "mm_tokens_per_image": 4}
        | {"vision_feature_layers": (-1, -2)},
        largest=8_000_000,
        said="and the heads of their decoders are read",
    ),
}


def kinds(group: str = "causal") -> tuple[str, ...]:
    """Model types that have a class of a group, in alphabetical order."""
    from transformers.models.auto import modeling_auto

    lists = [
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in GROUPS[group].tasks
    ]
    return tuple(sorted(set().union(*lists)))


def tiny_config(kind: str, group: str = "causal") -> Any:
    """Config of a tiny model of a type.

    Args:
        kind: a model type, as in a ``config.json``.
        group: of ``GROUPS``: what it is built for.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    known = _default(config_class).to_dict()
    own = {
        name: value
        for name, value in GROUPS[group].own.items()
        if known.get(name) is not None and not isinstance(known[name], list)
    }
    for name, value in own.items():  # of a config inside, what it has
        if isinstance(value, Mapping):
            own[name] = {
                one: _alike(size, known[name][one])
                for one, size in value.items()
                if one in known[name]
            }
    return config_class(**_shrunk(config_class, {**EXCEPTIONS.get(kind, {}), **own}))


def _alike(size: Any, default: Any) -> Any:
    """A size in the form that a config's default has."""
    if isinstance(default, float):
        return float(size)
    if isinstance(default, list | tuple) and not isinstance(size, list | tuple):
        return [size] * len(default)
    return size


def _shrunk(config_class: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that make a config tiny.

    Args:
        config_class: its class.
        own: what is to be otherwise; configs inside add the exceptions of their own type.
    """
    default = _default(config_class)
    fields = default.to_dict()
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list) and len(value) > 3 and len(value) == _depth(fields)
    }
    depth = max([DEPTH, *(len(set(v)) for v in lists.values() if isinstance(v[0], str))])
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name in lists:
            small[name] = _every_kind(name, value, depth)
        elif name in SIZES and value is not None and not isinstance(value, list):
            small[name] = depth if name in _DEPTHS else SIZES[name]
    if "kv_lora_rank" in fields:  # latent attention: no grouping, and the rotary part alone
        small |= {"num_key_value_heads": HEADS, "head_dim": SIZES["qk_rope_head_dim"]}
    if "is_decoder" in fields:
        small["is_decoder"] = True
    small |= own
    if fields.get("image_grid_pinpoints"):
        small["image_grid_pinpoints"] = [[16, 16], [16, 32]]
    for name in getattr(default, "sub_configs", {}):
        if (part := getattr(default, name, None)) is not None:
            inside = EXCEPTIONS.get(part.model_type, {})
            if name == "text_config" and part.model_type in _TURNING:
                inside = {**inside, "rope_parameters": _TURNS}
            small[name] = _shrunk(type(part), {**inside, **own.get(name, {})})
    return small


def _default(config_class: Any) -> Any:
    """A config as its class makes it, if it makes one without arguments."""
    try:
        return config_class()
    except ValueError:
        return config_class(**EXCEPTIONS[config_class.model_type])


def _depth(fields: Mapping[str, Any]) -> int:
    """Number of layers of a config."""
    return next((fields[name] for name in _DEPTHS if isinstance(fields.get(name), int)), 0)


def _every_kind(name: str, values: list[Any], depth: int) -> list[Any]:
    """A list of one entry a layer, cut so that every kind of entry is left."""
    nested = any(isinstance(one, list) for one in values)
    kinds = [SIZES[name]] if name in SIZES else values if nested else list(dict.fromkeys(values))
    return [kinds[i % len(kinds)] for i in range(depth)]


def tiny_model(kind: str, seed: int = 0, group: str = "causal") -> Any:
    """Build a random model of a type, in fp32 and eval mode.

    Args:
        kind: a model type.
        seed: of the weights.
        group: of ``GROUPS``: what it is built for.

    Raises:
        ValueError: if what came out is not tiny.
    """
    import transformers

    made = getattr(transformers, GROUPS[group].auto)
    config = tiny_config(kind, group)
    if group in ("seq2seq", "speech") and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    if kind.startswith("musicgen"):  # its class takes the decoder's config alone
        config = config.decoder
    with torch.device("meta"):
        size = sum(p.numel() for p in made.from_config(config).parameters())
    if size > GROUPS[group].largest:
        raise ValueError(f"the tiny {kind} has {size:,} parameters: shrink more fields by name.")
    torch.manual_seed(seed)
    model = made.from_config(config).eval()
    unsettle(model)
    return model


@torch.no_grad()
def image_inputs(model: Any) -> dict[str, Tensor] | None:
    """Two texts with an image in each, as the processor of a tiny vision-language model gives them.

    Args:
        model: of the group ``pictures``.

    Returns:
        None where no layout that is known here runs.
    """
    token = getattr(model.config, "image_token_id", None)
    if not isinstance(token, int):
        return None
    for layout in (_in_grids, _in_tiles, _sized, _alone):
        beside = layout(model, set(inspect.signature(model.forward).parameters))
        if beside is None:
            continue
        for count in (*_missed(model, beside, token), 16, 4):
            inputs = _with_text(model, beside, token, count)
            if isinstance(_tried(model, inputs), Tensor):
                return inputs
    return None


def _missed(model: Any, beside: Mapping[str, Tensor], token: int) -> list[int]:
    """How many tokens stand for an image, as the model says of a text with one too few."""
    said = _tried(model, _with_text(model, beside, token, 1))
    numbers = [int(one) for one in re.findall(r"\d+", str(said))]
    return [
        number // share for number in numbers for share in (2, 2 * WIDTH) if number % share == 0
    ]


def _tried(model: Any, inputs: Mapping[str, Tensor]) -> Tensor | Exception:
    """Logits, or what went wrong."""
    try:
        logits: Tensor = model(**inputs).logits
    except Exception as error:  # code of any family, given what may not suit it
        return error
    return logits


def _with_text(
    model: Any, beside: Mapping[str, Tensor], token: int, count: int
) -> dict[str, Tensor]:
    """Three tokens, ``count`` of the image, and six more, in two texts."""
    draw = torch.Generator().manual_seed(3)
    words = torch.randint(3, VOCAB - 8, (2, 9), generator=draw)
    places = torch.full((2, count), token)
    ids = torch.cat([words[:, :3], places, words[:, 3:]], 1)
    start = getattr(model.config, "vision_start_token_id", None)
    if isinstance(start, int) and start < VOCAB:
        ids[:, 2] = start
    found = {"input_ids": ids, **beside}
    accepted = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in accepted:
            found[name] = (ids == token).long()
    if model.config.model_type == "paligemma":  # a prefix that sees itself, and a suffix
        found["token_type_ids"] = torch.zeros_like(ids)
        found["token_type_ids"][:, -3:] = 1
    return found


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _side(model: Any) -> int | None:
    """Side of a picture in pixels; None where the config does not say."""
    side = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    side = side[0] if isinstance(side, list | tuple) else side
    return side if isinstance(side, int) else None


def _in_grids(model: Any, accepted: set[str]) -> dict[str, Tensor] | None:
    """Patches in a row, and how many there are to each side (qwen2_vl)."""
    if "image_grid_thw" not in accepted:
        return None
    sees = model.config.vision_config
    width = 3 * sees.patch_size**2 * getattr(sees, "temporal_patch_size", 1)
    return {
        "pixel_values": _noise(2 * 16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _in_tiles(model: Any, accepted: set[str]) -> dict[str, Tensor] | None:
    """Several pictures a text, and which of their pixels are real (idefics3)."""
    if "pixel_attention_mask" not in accepted:
        return None
    side = _side(model)
    if side is None:
        return None
    return {
        "pixel_values": _noise(2, 1, 3, side, side),
        "pixel_attention_mask": torch.ones(2, 1, side, side, dtype=torch.long),
    }


def _sized(model: Any, accepted: set[str]) -> dict[str, Tensor] | None:
    """A picture with its size, cut into tiles where the family does so (llava_next)."""
    if "image_sizes" not in accepted:
        return None
    side = _side(model)
    if side is None:
        return None
    tiles = 2 if getattr(model.config, "image_grid_pinpoints", None) else 0
    shape = (2, tiles, 3, side, side) if tiles else (2, 3, side, side)
    return {"pixel_values": _noise(*shape), "image_sizes": torch.tensor([[side, side]] * 2)}


def _alone(model: Any, accepted: set[str]) -> dict[str, Tensor] | None:
    """One picture a text."""
    side = _side(model)
    if "pixel_values" not in accepted or side is None:
        return None
    return {"pixel_values": _noise(2, 3, side, side)}


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Draw matrices wide, and move biases, gains and sinks, which start at 0 or 1."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.3 * noise)
        elif parameter.ndim == 2 and not 0.2 < float(parameter.std()) < 0.6:
            parameter.copy_(0.35 * noise)
