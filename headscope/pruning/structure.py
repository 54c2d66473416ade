"""``hs.prune``: a smaller model, with the heads really gone; and reading one from a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headscope.ablation.run import present
from headscope.edits import Heads, head_list
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.hf.model import HFModel
from headscope.models.hf.removal import is_pruned, pruned, read_pruned
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
