"""Tiny vision-language models with wide random weights, and what their processors would give."""

from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE = 98  # the token that stands for a piece of an image
SIDE, PATCH, LAYERS, HEADS = 16, 4, 2, 4
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": 100,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TURNS = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
}
_MARKS = {
    "image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 96,
    "vision_end_token_id": 95,
}  # fmt: skip
_QWEN = {
    "depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip


def _clip() -> Any:
    return transformers.CLIPVisionConfig(**_VISION, projection_dim=16)


BUILDS: dict[str, Any] = {
    "llava": lambda: transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=_clip(),
            text_config=transformers.LlamaConfig(**_TEXT),
            image_token_id=IMAGE,
            image_seq_length=16,
        )
    ),
    "llava_next": lambda: transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=_clip(),
            text_config=transformers.LlamaConfig(**_TEXT),
            image_token_id=IMAGE,
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=_TEXT | _TURNS,
            vision_config=_QWEN | {"embed_dim": 32, "mlp_ratio": 2},
            **_MARKS,
        )
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=_TEXT | _TURNS,
            vision_config=_QWEN
            | {"out_hidden_size": 32, "intermediate_size": 48}
            | {"window_size": 16, "fullatt_block_indexes": [1]},
            **_MARKS,
        )
    ),
    "paligemma": lambda: transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**_VISION, vision_use_head=False),
            text_config=transformers.GemmaConfig(**_TEXT),
            image_token_id=IMAGE,
            projection_dim=32,
        )
    ),
    "smolvlm": lambda: transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(
            vision_config=_VISION,
            text_config=transformers.LlamaConfig(**_TEXT),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config=transformers.SiglipVisionConfig(**_VISION),
            text_config=transformers.Gemma3TextConfig(
                **_TEXT,
                sliding_window=8,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            ),
            image_token_id=IMAGE,
            mm_tokens_per_image=4,
            boi_token_index=96,
            eoi_token_index=97,
        )
    ),
}


def model_of(name: str, seed: int = 0) -> Any:
    """A model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    made = BUILDS[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return made.eval()


def _text(pieces: int, batch: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    before = torch.randint(3, 90, (batch, 3), generator=draw)
    after = torch.randint(3, 90, (batch, 6), generator=draw)
    return torch.cat([before, torch.full((batch, pieces), IMAGE), after], 1)


def inputs_of(name: str, batch: int = 2) -> dict[str, Tensor]:
    """Texts with an image in each, as the family's processor lays them out."""
    draw = torch.Generator().manual_seed(5)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draw)

    if name == "llava_next":  # 16 of the image, and a newline behind each of the 4 rows of 8
        sizes = torch.tensor([[16, 32]] * batch)
        ids = _text(16 + 4 * 9, batch)
        return {"input_ids": ids, "pixel_values": pixels(3, 3, SIDE, SIDE), "image_sizes": sizes}
    if name.startswith("qwen"):  # 4 x 6 patches, merged by 2 x 2
        ids = _text(6, batch)
        ids[:, 2] = 96
        return {
            "input_ids": ids,
            "pixel_values": pixels(24, 96).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 4, 6]] * batch),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
    if name == "smolvlm":  # two tiles, one above the other, and the whole image
        return {
            "input_ids": _text(3 * 4, batch),
            "pixel_values": pixels(3, 3, SIDE, SIDE),
            "pixel_attention_mask": torch.ones(batch, 3, SIDE, SIDE, dtype=torch.long),
        }
    ids = _text(4 if name == "gemma3" else 16, batch)
    found = {"input_ids": ids, "pixel_values": pixels(3, SIDE, SIDE)}
    if name == "gemma3":
        found["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":  # a prefix that sees itself, and a suffix of three tokens
        found["token_type_ids"] = torch.zeros_like(ids)
        found["token_type_ids"][:, -3:] = 1
    return found
