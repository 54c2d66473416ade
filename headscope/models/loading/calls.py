"""How a transformers module is called, whatever its family."""

import inspect
from collections.abc import Collection
from typing import Any

from jaxtyping import Bool
from torch import Tensor


def accepted(module: Any) -> frozenset[str]:
    """Names of the arguments that its ``forward`` takes."""
    return frozenset(inspect.signature(module.forward).parameters)


def padding(real: Bool[Tensor, "batch pos"], accepts: Collection[str]) -> dict[str, Tensor]:
    """Arguments that say which tokens are real; positions count them alone, on either side."""
    inputs = {"attention_mask": real.long()}
    if "position_ids" in accepts:
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
    return inputs
