"""The matrix that an output projection is, however it is stored."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.hf.removed import ReadsKept
from headscope.models.offload import at_hand, parameter

# Rows of the identity that pass a module at a time.
_ROWS = 1024


def matrix(projection: nn.Module, width: int) -> Float[Tensor, "in out"]:
    """Matrix M of ``projection(z) = z @ M + bias``.

    A plain ``Linear`` or ``Conv1D`` shows its weight. Anything else (adapters beside a matrix,
    quantised weights with scales) is measured: the identity is sent through it.

    Args:
        projection: the module.
        width: length of its input.
    """
    weight = getattr(projection, "weight", None)
    if isinstance(projection, ReadsKept) or _is_plain(projection):
        stored = parameter(projection, "weight") if weight is None or weight.is_meta else weight
        return (stored.T if isinstance(projection, nn.Linear) else stored).detach()
    rows = torch.eye(width, dtype=_dtype(projection), device=_device(projection))
    return torch.cat([_through(projection, part) for part in rows.split(_ROWS)]) - _through(
        projection, torch.zeros_like(rows[:1])
    )


def bias(projection: nn.Module, width: int) -> Float[Tensor, " out"] | None:
    """What the module returns for a head output of zeros; None if it is plain and has no bias."""
    if isinstance(projection, ReadsKept) or _is_plain(projection):
        with at_hand(projection):
            given = getattr(projection, "bias", None)
            return given.detach() if isinstance(given, Tensor) else None
    zeros = torch.zeros(1, width, dtype=_dtype(projection), device=_device(projection))
    return _through(projection, zeros)[0]


def _is_plain(projection: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    weight = getattr(projection, "weight", None)
    own = type(projection).forward
    return (
        isinstance(weight, Tensor)
        and weight.is_floating_point()
        and (own is nn.Linear.forward or own is Conv1D.forward)
    )


@torch.no_grad()
def _through(projection: nn.Module, rows: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
    """Send rows through a module past its hooks, which may be edits that run now.

    Raises:
        UnsupportedModelError: if it is something else than a map of each row.
    """
    try:
        found = projection.forward(rows[None])
    except Exception as error:  # code of any family
        raise _no_matrix(projection) from error
    if not isinstance(found, Tensor) or found.ndim != 3 or len(found[0]) != len(rows):
        raise _no_matrix(projection)
    return found[0]


def _no_matrix(projection: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"what reads its head outputs is a {type(projection).__name__} and not a matrix (e.g. a "
        "mixture of experts), so there is no W_O per head."
    )


def _dtype(projection: nn.Module) -> torch.dtype:
    """Floating type of the module, fp32 if it holds none."""
    tensors = [*projection.parameters(), *projection.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _device(projection: nn.Module) -> torch.device:
    tensors = [*projection.parameters(), *projection.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
