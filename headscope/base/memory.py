"""How much memory a chunk of work may take, and what to do when it was too much."""

import re

import torch

from headscope.errors import InputError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
# A chunk much larger than the processor's caches is slower, not faster; a GPU wants more.
_CPU_CHUNK = 32 * 2**20
_GPU_CHUNK = 512 * 2**20
_SHARE = 0.25


def parse_memory(amount: "str | int | None") -> int | None:
    """Bytes of ``"2GB"``, ``"512 MiB"`` or a number; None stays None.

    Raises:
        InputError: if it is not an amount.
    """
    if amount is None:
        return None
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", amount.upper())
        unit = match.group(2) if match else None
        if match is None or unit not in _UNITS:
            raise InputError(
                f"{amount!r} is not an amount of memory: write it as '2GB' or '512MB'."
            )
        amount = int(float(match.group(1)) * _UNITS[unit])
    if amount <= 0:
        raise InputError("the memory for a chunk must be more than nothing.")
    return amount


def chunk_bytes(device: torch.device, limit: int | None) -> int:
    """Bytes that one chunk of rows may take.

    The limit where it is given; else what the device works through fastest, and on a GPU never
    more than a quarter of what is free.
    """
    if limit is not None:
        return limit
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(min(_GPU_CHUNK, _SHARE * free))
    return _CPU_CHUNK


def keep_freed_memory() -> None:
    """Have the C library hold freed memory ready for the next tensors, up to 62 MB of it.

    glibc hands freed blocks back to the system above a size that it learns from what was freed,
    32 MB at most (mallopt(3), M_MMAP_THRESHOLD). Until it has met a large block, activations are
    mapped anew in every layer, at the cost of a page fault for every 4 kB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # never touched, so it costs nothing


def free_cached_memory() -> None:
    """Give a GPU's cached blocks back after an allocation failed.

    Outside of the ``except`` block: inside it the traceback still holds the tensors.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, or on the CPU, where torch raises a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )
