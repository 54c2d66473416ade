"""What a model costs: parameters, floating-point operations of a pass, and its measured time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headscope.models.hf.transformers_api import attention_name

_REPEATS = 3


@dataclass(frozen=True)
class Size:
    """Cost of one forward pass over a batch.

    Attributes:
        parameters: numbers in the weights, tied ones once.
        flops: floating-point operations of the matrix products of the pass, a multiply-add being
            two; attention over all pairs of positions (counted by torch, on eager attention).
        seconds: of the pass as measured, the shortest of three: of this machine at this moment.
        shared: key/value heads that lost some of their query heads and stay for the others, so
            that removing heads saved less than their share of the weights.
    """

    parameters: int
    flops: int
    seconds: float
    shared: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In words, with the key/value heads that had to stay."""
        said = f"{self.parameters:,} parameters, {self.flops:,} FLOPs, {self.seconds:.3g} s"
        if not self.shared:
            return said
        return f"{said}; key/value heads that stay: {'; '.join(self.shared)}"


@torch.no_grad()
def measure_size(
    model: Any, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None = None
) -> Size:
    """Measure a transformers model, e.g. a pruned one, on a batch.

    Args:
        model: a ``PreTrainedModel``.
        tokens: token ids.
        real: False at padding.

    Example:
        >>> import headscope as hs
        >>> import torch
        >>> tokens = torch.zeros(2, 10, dtype=torch.long)
        >>> model = hs.load()
        >>> whole = hs.pruning.measure_size(model.module, tokens)
        >>> less = hs.pruning.measure_size(hs.prune(model, "L0H1"), tokens)
        >>> less.parameters < whole.parameters and less.flops < whole.flops
        True
    """
    inputs: dict[str, Any] = {"input_ids": tokens.to(model.device), "use_cache": False}
    if real is not None:
        inputs["attention_mask"] = real.long().to(model.device)
    with _eager(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    model(**inputs)  # the first pass of a kind is slower
    times = []
    for _ in range(_REPEATS):
        _wait(model)
        started = time.perf_counter()
        model(**inputs)
        _wait(model)
        times.append(time.perf_counter() - started)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, int(counter.get_total_flops()), min(times), _shared(model))


def _shared(model: Any) -> tuple[str, ...]:
    """Key/value heads of a pruned model that only some of their query heads still read."""
    found = []
    for module in model.modules():
        kept = module.__dict__.get("headscope_kept")
        layer = getattr(module, "layer_idx", None)
        if kept is None or layer is None:
            continue
        group = kept.n_heads // kept.n_kv_heads
        for kv_head in dict.fromkeys(kept.kv_heads):
            readers = [head for head in kept.heads if head // group == kv_head]
            if len(readers) < group:
                names = ", ".join(f"L{layer}H{head}" for head in readers)
                found.append(f"L{layer} KV{kv_head}, read by {names}")
    return tuple(found)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Within a scope, attention in products that torch can count."""
    before = attention_name(model.config)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
