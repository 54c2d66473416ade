"""Which weights a result came from."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Values of each weight that are looked at to see that nothing has changed.
_GLANCE = 64


class Digest:
    """Digest of one model's weights, computed anew only where a weight is not what it was.

    A weight counts as unchanged if its storage, torch's count of in-place changes and a strided
    sample of its values are the same; only a change past torch's count that also misses the
    sample (``weight.data[i] = x`` on single entries) goes unseen.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._seen: object = None
        self._value = ""

    def of(self, weights: Mapping[str, Tensor]) -> str:
        """SHA-256 over what all weights are; see :func:`weight_digest`."""
        glance = tuple((name, *_glance(value)) for name, value in weights.items())
        if glance != self._seen:
            self._value, self._seen = weight_digest(weights), glance
        return self._value


def _glance(value: Tensor) -> tuple[int, int, bytes]:
    flat = value.detach().reshape(-1) if value.is_contiguous() else value.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _GLANCE)].float().cpu().numpy().tobytes()
    return value.data_ptr(), value._version, sample


def weight_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over what all weights are.

    Taken over names, types and shapes, the exact sum of each weight's bits as integers, and a
    strided sample of the bytes themselves.

    Reading every byte through the hash would take half a minute for 16 GB; the exact sums read
    every byte at memory speed, so that one changed weight changes the digest.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        flat = value.detach().contiguous().flatten()
        if flat.is_floating_point() and flat.element_size() in _INTEGERS:
            flat = flat.view(_INTEGERS[flat.element_size()])
        total = int(flat.sum(dtype=torch.int64)) if flat.numel() else 0
        sample = flat[:: max(1, flat.numel() // 4096)].cpu().numpy().tobytes()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {total}".encode() + sample)
    return digest.hexdigest()
