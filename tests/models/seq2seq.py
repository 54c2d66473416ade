"""Tiny encoder-decoders with peaky attention, and plain passes of them."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, LAYERS, HEADS = 99, 2, 4
_BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.4,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS,
    "num_decoder_layers": LAYERS, "num_heads": HEADS, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "initializer_factor": 1.5, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_MARIAN = {**_BART, "pad_token_id": 98, "decoder_start_token_id": 98}
_SPEECH = {
    "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0,
    "bos_token_id": 1, "decoder_start_token_id": 3, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
_WHISPER = {name: one for name, one in _BART.items() if "max_pos" not in name} | _SPEECH
CONFIGS: Mapping[str, tuple[Any, Any, Mapping[str, Any]]] = {
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, _T5),
    "mt5": (transformers.MT5ForConditionalGeneration, transformers.MT5Config, _T5),
    "umt5": (transformers.UMT5ForConditionalGeneration, transformers.UMT5Config, _T5),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig, _BART),
    "mbart": (transformers.MBartForConditionalGeneration, transformers.MBartConfig, _BART),
    "marian": (transformers.MarianMTModel, transformers.MarianConfig, _MARIAN),
    "m2m_100": (transformers.M2M100ForConditionalGeneration, transformers.M2M100Config, _BART),
    "pegasus": (transformers.PegasusForConditionalGeneration, transformers.PegasusConfig, _BART),
    "whisper": (transformers.WhisperForConditionalGeneration, transformers.WhisperConfig, _WHISPER),
}
STACKS = ("encoder", "decoder", "cross")


def module_of(name: str) -> Any:
    """A random model of a family."""
    torch.manual_seed(0)
    kind, config, options = CONFIGS[name]
    return kind(config(**options)).eval()


def source_of(name: str) -> dict[str, Tensor]:
    """Two sources, the second padded where there are tokens."""
    draw = torch.Generator().manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=draw)}
    ids = torch.randint(5, 95, (2, 13), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both_sides(name: str) -> dict[str, Tensor]:
    """Sources and targets of two examples, of different lengths, padded in both."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 95, (2, 10), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {**source_of(name), "decoder_input_ids": ids, "decoder_attention_mask": mask}


def alone(inputs: Mapping[str, Tensor], example: int) -> dict[str, Tensor]:
    """One example without its padding."""
    found = {name: value[example : example + 1] for name, value in inputs.items()}
    for ids, mask in (
        ("input_ids", "attention_mask"),
        ("decoder_input_ids", "decoder_attention_mask"),
    ):
        if mask in found:
            real = found.pop(mask)[0].bool()
            found[ids] = found[ids][:, real]
    return found


@torch.no_grad()
def plain(module: Any, inputs: Mapping[str, Tensor], off: Mapping[Any, int] | None = None) -> Any:
    """Output of a pass on eager attention, with the heads of some projections at 0.

    Args:
        module: the model.
        inputs: its arguments.
        off: head to silence by output projection.
    """
    d_head = 8

    def hook(head: int) -> Any:
        def silence(_module: Any, args: Any) -> Any:
            z = args[0].clone()
            z[..., head * d_head : (head + 1) * d_head] = 0
            return (z, *args[1:])

        return silence

    module.set_attn_implementation("eager")
    handles = [one.register_forward_pre_hook(hook(head)) for one, head in (off or {}).items()]
    try:
        return module(**inputs, use_cache=False, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()


def projections(module: Any, stack: str) -> list[tuple[str, Any]]:
    """Output projections of a stack's attention, in order, by the names of their modules."""
    part = "encoder." if stack == "encoder" else "decoder."
    cross = ("encoder_attn", "EncDecAttention")
    found = []
    for name, one in module.named_modules():
        crossed = any(word in name for word in cross) == (stack == "cross")
        if crossed and part in name and name.endswith((".out_proj", ".o")):
            found.append((name, one))
    return found
