"""``hs.prune``: a smaller model, with the heads really gone; read from a folder; what it costs.

The cost is in parameters, floating-point operations of a pass, and measured time.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headscope.ablation.run import present
from headscope.base.arguments import checked
from headscope.edits import Heads, head_list
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.hf.model import HFModel
from headscope.models.hf.removal import is_pruned, pruned, read_pruned
from headscope.models.hf.transformers_api import attention_name
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@checked
@own_types()
def prune(model: HeadModel, heads: Heads) -> "PreTrainedModel":
    """A copy of a model without some heads: rows and columns of Q, K, V and O are really gone.

    Its logits are those of the model with the outputs ``z`` of these heads at 0 (to rounding; this
    is checked on a few tokens). A head's value bias goes with it, the output projection's bias
    stays. A layer without any head writes that bias. The model that was given is left as it is;
    the copy takes memory of its own.

    The result is a ``PreTrainedModel`` of the same class, which trains, generates with a cache and
    is saved by ``save_pretrained``. What was removed stands in its config (``headscope_removal``);
    :func:`headscope.load` and :func:`load_pruned` read such a folder, transformers alone refuses
    it, since none of its configs can say different numbers of heads per layer. headscope shows a
    pruned model with its heads under the numbers that they had; those that went have no scores.

    Grouped-query attention: a key/value head goes when all query heads that read it go. Where
    query heads of one layer's groups went unevenly, the key/value heads that are left keep their
    weights once, and are repeated in the pass until all groups are equally large; the cache of
    such a layer holds the repeated ones.

    Args:
        model: from :func:`headscope.load`; of a family whose attention goes through transformers'
            attention registry (``model.path == "hf"``).
        heads: which to remove; none: a plain copy.

    Raises:
        InputError: if the model lacks one of them.
        UnsupportedModelError: if the family's heads cannot be removed, e.g. because queries are
            normalised over all heads together (olmo2), or the model was pruned before.

    Example:
        >>> import headscope as hs
        >>> model = hs.load()
        >>> smaller = hs.prune(model, ["L0H1", "L1H0"])
        >>> len(model.shape.heads) - len(hs.load(smaller).shape.heads)
        2
    """
    named = head_list(heads)
    chosen = present(model, named) if named else ()
    if not isinstance(model, HFModel):
        raise UnsupportedModelError(
            f"{model.name} cannot be pruned: its attention does not go through transformers' "
            "attention registry, so its matrices cannot be told apart by heads. Ablate its heads "
            "instead, with headscope.ablate_groups."
        )
    smaller: PreTrainedModel = pruned(model, chosen)
    return smaller


@checked
def load_pruned(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
) -> "PreTrainedModel":
    """Read a model that :func:`prune` made and ``save_pretrained`` wrote.

    :func:`headscope.load` reads such a folder too, to be seen head by head.

    Args:
        folder: where it is; only safetensors are read.
        device: where to put the weights; default: the CPU.
        dtype: of the weights; default: as stored.

    Raises:
        InputError: if the folder holds no pruned model.
        ModelLoadError: if its weights are not what its config says.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> hs.prune(model, "L0H1").save_pretrained(folder)
        >>> hs.load(hs.pruning.load_pruned(folder)).shape.removed
        frozenset({L0H1})
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(folder)!r} holds no model: {error}") from error
    if not is_pruned(config):
        raise InputError(f"{str(folder)!r} holds a model that was never pruned: use hs.load.")
    model: PreTrainedModel = read_pruned(
        folder, config, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    if device is not None:
        model.to(device)
    return model


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


@checked
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
