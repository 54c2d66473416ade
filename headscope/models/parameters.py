"""Parameters of a module: where they are, and a digest that says which they are.

accelerate may keep them elsewhere (another device, memory, a disk) until a module runs.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import Tensor, nn


def put_away(module: nn.Module) -> None:
    """Unload what a pass that ended early left loaded, as it would have been at its end."""
    for part in module.modules():
        if _away(part) and not all(value.is_meta for _, value in _own_tensors(part)):
            _hook(part).post_forward(part, None)


def runs_on(module: nn.Module, weight: Tensor) -> torch.device:
    """Device that a module computes on, wherever its weight is kept."""
    device = getattr(_hook(module), "execution_device", None)
    return weight.device if device is None else torch.device(device)


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights loaded within a scope."""
    if not _away(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def parameter(module: nn.Module, name: str) -> Tensor:
    """A module's weight as it is now, on the device where the module runs."""
    with at_hand(module):
        weight: Tensor = getattr(module, name)
        return weight.detach()


def all_weights(module: nn.Module) -> dict[str, Tensor]:
    """What ``state_dict`` gives, with the weights that are kept elsewhere read from there."""
    weights: dict[str, Tensor] = module.state_dict()
    for path, part in module.named_modules(remove_duplicate=False):
        if not _away(part):
            continue
        kept = _hook(part).weights_map
        for name, value in _own_tensors(part):
            full = f"{path}.{name}" if path else name
            if full in weights and value.is_meta:
                weights[full] = kept[name]
    return weights


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    if getattr(_hook(module), "offload_buffers", False):
        yield from module.named_buffers(recurse=False)


def _away(module: nn.Module) -> bool:
    return bool(getattr(_hook(module), "offload", False))


def _hook(module: nn.Module) -> Any:
    """The hook of accelerate that moves a module's weights; None without one."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "execution_device"):
            return one
    return None


# Bytes of a weight that are read at once, and words that share one row of multipliers.
_CHUNK = 1 << 26
_ROW = 1 << 14


def weight_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and every byte of all weights.

    The bytes enter through XXH3-128, which reads them at the speed of memory: whichever weight
    changes or moves to another place, the digest is another.
    """
    return _joined({name: _described(name, value) for name, value in weights.items()})


class Digest:
    """Digest of one model's weights, always of what they are now.

    Weights in main memory are read each time. Those on another device are copied once; after that
    a sum over all their bytes, each multiplied by a number of its place, is taken where they are,
    and only what that shows to have changed is copied again.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: dict[str, tuple[bytes, str]] = {}

    def of(self, weights: Mapping[str, Tensor]) -> str:
        """The same as :func:`weight_digest`."""
        sums = _place_sums({n: w for n, w in weights.items() if w.device.type != "cpu"})
        known = self._known
        self._known = {
            name: known[name]
            if name in known and known[name][0] == total
            else (total, _described(name, weights[name]))
            for name, total in sums.items()
        }
        described = {
            name: self._known[name][1] if name in self._known else _described(name, value)
            for name, value in weights.items()
        }
        return _joined(described)


def _joined(described: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(described):
        digest.update(described[name].encode())
    return digest.hexdigest()


def _described(name: str, value: Tensor) -> str:
    """Name, type, shape and hash of one weight."""
    bytes_of = xxhash.xxh3_128()
    for part in _bytes(value).split(_CHUNK):
        bytes_of.update(part.cpu().numpy())
    return f"{name} {value.dtype} {tuple(value.shape)} {bytes_of.hexdigest()}\n"


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _place_sums(weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Sums over the words of each weight, each times an odd number of its place, modulo 2^64.

    One number for every 128 kB, so that both a change and a move show; all are fetched at once.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in weights.items():
        by_device.setdefault(value.device, {})[name] = value
    found: dict[str, bytes] = {}
    for device, group in by_device.items():
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(-(2**62), 2**62, (_ROW,), generator=generator) * 2 + 1
        factors = factors.to(device)
        sums = {name: _row_sums(_bytes(value), factors) for name, value in group.items()}
        fetched = torch.cat(list(sums.values())).cpu().split([len(one) for one in sums.values()])
        facts = {name: f"{value.dtype} {tuple(value.shape)} " for name, value in group.items()}
        found |= {
            name: facts[name].encode() + part.numpy().tobytes()
            for name, part in zip(sums, fetched, strict=True)
        }
    return found


def _row_sums(flat: Tensor, factors: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % (8 * len(factors))))
    rows = padded.view(torch.int64).view(-1, len(factors))
    return torch.cat([(part * factors).sum(1) for part in rows.split(64)])
