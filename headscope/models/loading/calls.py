"""How a transformers module is called, whatever its family."""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.errors import InputError, UnsupportedModelError


def accepted(module: Any) -> frozenset[str]:
    """Names of the arguments that its ``forward`` takes."""
    return frozenset(inspect.signature(module.forward).parameters)


def answer(output: Any) -> Tensor:
    """What a module says of every position: logits, or its last hidden states without a head."""
    found: Tensor | None = getattr(output, "logits", None)
    return output[0] if found is None else found


def padding(
    real: Bool[Tensor, "batch pos"],
    accepts: Collection[str],
    first: int = 0,
    turns_at: int | None = None,
) -> dict[str, Tensor]:
    """Arguments that say which tokens are real; positions count them alone, on either side.

    Args:
        real: False at padding.
        accepts: names of arguments that the module takes.
        first: number of the first position; see :func:`first_position`.
        turns_at: longest text of the first of two sets of rotations (:class:`ModelShape`).

    Raises:
        InputError: if the texts need both sets of rotations: a model takes one for a whole batch.
    """
    if turns_at is not None:
        beyond = real.sum(1) > turns_at
        if bool(beyond.any()) and not bool(beyond.all()):
            raise InputError(
                f"the batch has texts of at most {turns_at} tokens and longer ones, and the model "
                "rotates a whole batch by the angles of its longest text (longrope): run them "
                "apart, for example with batch_size=1."
            )
    inputs = {"attention_mask": real.long()}
    if "position_ids" in accepts:
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0) + first
    return inputs


@torch.no_grad()
def first_position(module: Any, tokens: Int[Tensor, "batch pos"]) -> int:
    """Number that a module gives to the position of its first token.

    0, but in families whose table of positions begins with a row for padding (roberta).

    Args:
        module: a transformers model whose ``forward`` takes ``position_ids``.
        tokens: a few ids, none of them padding.

    Raises:
        UnsupportedModelError: if no numbering gives what the model gives by itself.
    """
    own = answer(module(input_ids=tokens, use_cache=False))
    counted = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    padding_row = getattr(module.config.get_text_config(), "pad_token_id", None) or 0
    for first in dict.fromkeys((0, padding_row + 1, 1, 2)):
        try:
            places = counted + first
            logits = answer(module(input_ids=tokens, position_ids=places, use_cache=False))
        except (IndexError, RuntimeError, TypeError, ValueError):
            continue
        scale = own.abs().max().clamp_min(1.0)
        if bool((logits - own).abs().max() <= 1e-3 * scale):
            return first
    raise UnsupportedModelError(
        f"{type(module).__name__} numbers its positions in a way that padding cannot be told of: "
        "give texts of one length."
    )
