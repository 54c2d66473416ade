"""Which families headscope refuses, told from the config before any weight is read."""

from typing import Any

from headscope.errors import UnsupportedModelError
from headscope.models.hf.transformers_api import ATTENTION_LAYERS, OTHER_LAYERS

KNOWN_LAYERS = ATTENTION_LAYERS | OTHER_LAYERS
# Tokens of the passes that are watched to find the parts of a model.
_SHORTEST = 5


def admit(config: Any, name: str) -> None:
    """Return if a model with this config may have heads that headscope can take apart.

    Raises:
        UnsupportedModelError: with the model and the reason, where it certainly has not.
    """
    text = config.get_text_config()
    family = getattr(config, "model_type", "unknown")
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, with several attention stacks"
    elif getattr(text, "kv_lora_rank", None):
        reason = "it uses multi-head latent attention (MLA), with compressed keys and values"
    elif (getattr(text, "max_position_embeddings", None) or _SHORTEST) < _SHORTEST:
        reason = f"its context is too short to take its heads apart: {_SHORTEST} tokens at least"
    elif str(family).startswith("gemma4") and getattr(text, "num_kv_shared_layers", None):
        reason = (
            "it drops positions before its layers that share keys and values, so that not every "
            "row of attention exists"
        )
    elif not _has_heads(text):
        reason = "it has no attention heads (a state-space or recurrent model)"
    elif unknown := sorted(set(getattr(text, "layer_types", None) or ()) - KNOWN_LAYERS):
        reason = (
            f"it has layers of the kind {unknown[0]!r}, whose visible keys headscope cannot tell"
        )
    if reason is not None:
        raise UnsupportedModelError(
            f"{name} ({family}) is not supported: {reason}. Decoder-only transformers with "
            "ordinary or grouped-query attention are."
        )


def _has_heads(config: Any) -> bool:
    recurrent = ("mamba", "rwkv", "xlstm")
    if str(getattr(config, "model_type", "")).startswith(recurrent):
        return False
    return any(getattr(config, key, None) for key in ("num_attention_heads", "n_head", "num_heads"))
