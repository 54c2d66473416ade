"""What a model was trained to do, told from its config: which of transformers' classes opens it."""

from typing import Any


def auto_class(config: Any) -> Any:
    """Return the ``AutoModel...`` class that opens a checkpoint with all that it was trained with.

    A causal language model where the config names one, or names nothing that is known; a masked
    language model where the config names that; the bare model where it names another head (a
    sentence encoder, a classifier), whose weights a language-model head would not find.

    Args:
        config: of the checkpoint.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
    )

    kind = type(config)
    masked = MODEL_FOR_MASKED_LM_MAPPING.get(kind, None)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    named = (getattr(config, "architectures", None) or [""])[0]
    if masked is None or named == _name(causal) or getattr(config, "is_decoder", False):
        return AutoModelForCausalLM
    if named in (_name(masked), "") or named.endswith("ForPreTraining"):
        return AutoModelForMaskedLM
    return AutoModel


def _name(made: Any) -> str:
    """Name of a class; of the first where there are several."""
    first = made[0] if isinstance(made, tuple | list) else made
    return getattr(first, "__name__", "-")
