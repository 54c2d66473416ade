"""Tiny vision models with wide random weights, images, and what plain transformers says of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.models.encoders import widened

WIDTH, HEADS, D_HEAD, LAYERS, CLASSES, SIDE, PATCH = 32, 4, 8, 2, 5, 16, 4
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 48, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_DINO = {**_SIZES, "mlp_ratio": 2}
del _DINO["intermediate_size"]
_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 40,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_WITH = {"num_labels": CLASSES}
BUILDS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**_SIZES, **_WITH)
    ),
    "vit-bare": lambda: transformers.ViTModel(transformers.ViTConfig(**_SIZES)),
    "deit": lambda: transformers.DeiTForImageClassification(
        transformers.DeiTConfig(**_SIZES, **_WITH)
    ),
    "beit": lambda: transformers.BeitForImageClassification(
        transformers.BeitConfig(**_SIZES, **_WITH, use_relative_position_bias=True)
    ),
    "beit-shared": lambda: transformers.BeitForImageClassification(
        transformers.BeitConfig(
            **_SIZES,
            **_WITH,
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,
            layer_scale_init_value=0.0,
            use_absolute_position_embeddings=True,
        )
    ),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**_DINO, **_WITH)
    ),
    "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**_DINO, num_register_tokens=2)
    ),
    "clip": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**_SIZES, projection_dim=12)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_SIZES)),
}
SPECIALS = {
    "vit": ("class",),
    "vit-bare": ("class",),
    "deit": ("class", "distillation"),
    "beit": ("class",),
    "beit-shared": ("class",),
    "dinov2": ("class",),
    "dinov2-registers": ("class", "register 1", "register 2"),
    "clip": ("class",),
    "siglip": (),
}


def vision(name: str, seed: int = 0) -> Any:
    """A vision model whose attention is far from flat."""
    torch.manual_seed(seed)
    return widened(BUILDS[name]())


def clip_text() -> Any:
    """The text half of clip."""
    torch.manual_seed(0)
    return widened(
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**_TEXT, projection_dim=12)
        )
    )


def clip() -> Any:
    """Both halves of clip."""
    return transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=_SIZES, text_config=_TEXT)
    ).eval()


def pictures(batch: int = 3, seed: int = 0) -> Tensor:
    """Images of noise."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, SIDE, SIDE, generator=draw)


def projections(module: Any) -> list[torch.nn.Module]:
    """Output projection of attention, by layer."""
    names = ("o_proj", "out_proj", "attention.output.dense")
    found = [part for name, part in module.named_modules() if name.endswith(names)]
    linear: list[torch.nn.Module] = [part for part in found if type(part) is torch.nn.Linear]
    return linear[:LAYERS]


def plain(
    module: Any, pixels: Tensor, zeroed: Sequence[tuple[int, int]] = ()
) -> tuple[Any, list[Tensor]]:
    """The model's own output, with some heads set to zero by plain hooks, and what heads gave."""
    seen: list[Tensor] = []

    def hook(layer: int) -> Callable[..., Any]:
        def before(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (HEADS, D_HEAD)).clone()
            for at, head in zeroed:
                if at == layer:
                    z[:, :, head] = 0
            seen.append(z)
            return (z.flatten(-2), *args[1:])

        return before

    with ExitStack() as stack, torch.no_grad():
        for layer, part in enumerate(projections(module)):
            stack.callback(part.register_forward_pre_hook(hook(layer)).remove)
        output = module(pixel_values=pixels)
    return output, seen


def eager_rows(module: Any, pixels: Tensor) -> list[Tensor]:
    """Patterns of every layer, by the model's own eager attention."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return list(module(pixel_values=pixels, output_attentions=True).attentions)
    finally:
        module.set_attn_implementation(before)
