"""``hs.prune``: structural removal of heads, loading of pruned models, and their cost.

The cost is measured in parameters, FLOPs of a pass, and seconds.
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
from headscope.base.result import Listed
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
    """Copy a model without some heads: their rows and columns of Q, K, V and O are removed.

    Its logits equal those of the model with the outputs ``z`` of these heads set to 0 (up to
    rounding; checked on a few tokens). A head's value bias goes with it, the output projection's
    bias stays. A layer without any head still writes that bias. The given model is unchanged; the
    copy takes its own memory.

    The result is a ``PreTrainedModel`` of the same class, which trains, generates with a cache and
    is saved by ``save_pretrained``. Its config records the removal (``headscope_removal``);
    :func:`headscope.load` and :func:`load_pruned` read such a folder, transformers alone refuses
    it, since its configs cannot express different numbers of heads per layer. headscope shows a
    pruned model with the original head numbers; removed heads have no scores.

    Grouped-query attention: a key/value head is removed when all query heads that read it are. If a
    layer's groups lose different numbers of query heads, the remaining key/value heads keep their
    weights once, and are repeated in the pass until all groups are equally large; the cache of such
    a layer holds the repeated ones.

    Args:
        model: from :func:`headscope.load`; from a family whose attention goes through transformers'
            attention registry (``model.path == "hf"``).
        heads: heads to remove; none: a plain copy.

    Raises:
        InputError: if the model lacks one of them.
        UnsupportedModelError: if the family's heads cannot be removed, e.g. because queries are
            normalised over all heads together (olmo2), or the model was already pruned.

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
            "attention registry, so its matrices cannot be split by heads. Ablate its heads "
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
    """Load a model that :func:`prune` made and ``save_pretrained`` wrote, as a transformers model.

    To analyse it head by head, load the folder with :func:`headscope.load`.

    Args:
        folder: its path; only safetensors are read.
        device: device of the weights; default: the CPU.
        dtype: dtype of the weights; default: as stored.

    Raises:
        InputError: if the folder holds no pruned model.
        ModelLoadError: if its weights do not match its config.

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


@dataclass(frozen=True, repr=False)
class Size(Listed):
    """Cost of one forward pass over a batch.

    Attributes:
        parameters: number of weights, tied ones counted once.
        flops: FLOPs of the pass's matrix products, a multiply-add counting as two; attention over
            all pairs of positions (counted by torch, with eager attention).
        seconds: measured time of the pass, the shortest of three, on this machine at this moment.
        shared: key/value heads that lost some of their query heads but are still needed by the
            others, so that fewer weights were saved.
    """

    parameters: int
    flops: int
    seconds: float
    shared: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe the cost, with the key/value heads that had to stay."""
        said = f"{self.parameters:,} parameters, {self.flops:,} FLOPs, {self.seconds:.3g} s"
        if not self.shared:
            return said
        return f"{said}; key/value heads that stay: {'; '.join(self.shared)}"


@checked
@torch.no_grad()
def measure_size(
    model: Any, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"] | None = None
) -> Size:
    """Measure a model, such as a pruned one, on a batch.

    Args:
        model: a ``PreTrainedModel``, as :func:`prune` returns it, or from :func:`headscope.load`.
        tokens: token ids.
        real: False at padding.

    Example:
        >>> import headscope as hs
        >>> import torch
        >>> tokens = torch.zeros(2, 10, dtype=torch.long)
        >>> model = hs.load()
        >>> whole = hs.pruning.measure_size(model, tokens)
        >>> less = hs.pruning.measure_size(hs.prune(model, "L0H1"), tokens)
        >>> less.parameters < whole.parameters and less.flops < whole.flops
        True
    """
    model = getattr(model, "module", model)
    ids = torch.as_tensor(tokens, device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if real is not None:
        inputs["attention_mask"] = real.long().to(model.device)
    with _eager(model), FlopCounterMode(display=False) as counter:
        model(**inputs)
    model(**inputs)  # warm up: the first pass is slower
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
    """Context manager for eager attention, whose products torch can count."""
    before = attention_name(model.config)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
