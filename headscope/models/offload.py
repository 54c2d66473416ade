"""Weights that accelerate keeps elsewhere (another device, memory, a disk) until a module runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
