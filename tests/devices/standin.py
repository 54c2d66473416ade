"""A device that stands in for a GPU: its tensors live on the CPU but say and behave otherwise.

:func:`install` gives torch a device of this name. Every operation on it runs on the CPU, so that
numbers can be compared; but an operation on tensors of two devices, a tensor read as numpy and
float64 where it is switched off raise, as on a GPU or on Apple's MPS. :func:`counting` tells how
often the host waited for the device: a number read from a tensor, a copy to the CPU, and every
operation the size of whose result depends on values.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
DEVICE = torch.device("cpu")  # until installed
# The size of their result is known to the device alone.
_SIZED_BY_VALUE = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::is_nonzero",
    "aten::repeat_interleave",
}
# Indices may stay on the CPU, as they may for a GPU.
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# By themselves these would make an empty tensor and then change its size.
_MADE_IN_ONE_GO = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace"),
    *("randperm", "randperm.generator", "tril_indices", "triu_indices"),
)
_counters: list[Counter[str]] = []
_without_float64 = False
_library: list[torch.library.Library] = []


class StandInTensor(Tensor):
    """A tensor that says that it is on the stand-in device; ``raw`` holds its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls: type["StandInTensor"], raw: Tensor) -> "StandInTensor":
        """Wrap a CPU tensor."""
        if _without_float64 and raw.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert to {raw.dtype}: {NAME} does not support it.")
        wrapped: StandInTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        wrapped.raw = raw
        return wrapped

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation."""
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the numbers."""
        return f"StandInTensor({self.raw})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as a GPU's tensors do."""
        raise TypeError(
            f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Refuse, as a GPU's tensors do."""
        return self.numpy()

    def tolist(self) -> Any:
        """Copy to the host; torch refuses this for subclasses."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        """Address of the numbers."""
        return self.raw.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandInTensor":
        """A tensor with numbers of its own, a parameter if this is one."""
        made = StandInTensor(copy.deepcopy(self.raw.detach()))
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, StandInTensor) else value


def _here(device: Any) -> bool:
    return torch.device(device).type == NAME


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    mine = [one for one in flat if isinstance(one, StandInTensor)]
    if name == "aten::_to_copy":
        return _copied(func, args[0], dict(kwargs))
    if name == "aten::copy_":
        return _filled(args[0], args[1])
    _note(name, args, bool(mine))
    _refuse_mixture(name, args, flat, mine)
    there = bool(mine)
    plain = dict(kwargs)
    if plain.get("device") is not None:
        there = _here(plain["device"])
        plain["device"] = torch.device("cpu")
    out = func(*tree_map(_raw, args), **tree_map(_raw, plain))
    if name == "aten::squeeze_":
        with no_dispatch():  # the wrapper has a shape of its own
            func(*args, **kwargs)
    given = {id(one.raw): one for one in mine}
    if any(one.shape != one.raw.shape for one in mine):
        raise NotImplementedError(f"{name} changes the size of a tensor: give it a kernel")
    return tree_map(lambda one: _wrapped(one, given) if there else one, out)


def _wrapped(value: Any, given: dict[int, StandInTensor]) -> Any:
    """Hand back the wrapper that was given where an operation wrote into it."""
    if not isinstance(value, Tensor) or isinstance(value, StandInTensor):
        return value
    known = given.get(id(value))
    return StandInTensor(value) if known is None else known


def _copied(func: Any, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    target = kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    here = isinstance(source, StandInTensor)
    stays = here if target is None else _here(target)
    if here and not stays:
        _count("copy to the CPU")
    out: Tensor = func(_raw(source), **kwargs)
    out = out.clone() if out is _raw(source) else out
    return StandInTensor(out) if stays else out


def _filled(into: Tensor, source: Tensor) -> Tensor:
    if isinstance(source, StandInTensor) and not isinstance(into, StandInTensor):
        _count("copy to the CPU")
    _raw(into).copy_(_raw(source))
    return into


def _refuse_mixture(
    name: str, args: tuple[Any, ...], flat: list[Tensor], mine: list[StandInTensor]
) -> None:
    """Raise as torch does where two devices meet; single numbers may come from the CPU."""
    if not mine:
        return
    if name in _INDEXED and isinstance(args[0], StandInTensor):
        flat = [args[0], *([args[2]] if len(args) > 2 else [])]
    if any(one.dim() > 0 and not isinstance(one, StandInTensor) for one in flat):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! (in {name})"
        )


def _note(name: str, args: tuple[Any, ...], here: bool) -> None:
    by_mask = name in _INDEXED and any(
        isinstance(one, StandInTensor) and one.dtype == torch.bool for one in args[1]
    )
    if here and (by_mask or name in _SIZED_BY_VALUE):
        _count(name)


def _count(what: str) -> None:
    for counter in _counters:
        counter[what] += 1


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count, by operation, how often the host waits for the device inside the scope."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


@contextmanager
def without_float64() -> Iterator[None]:
    """Scope in which the device knows no float64, as Apple's MPS."""
    global _without_float64
    _without_float64 = True
    try:
        yield
    finally:
        _without_float64 = False


def install() -> None:
    """Give torch this device. Idempotent; before the process's first backward pass."""
    global DEVICE
    if _library:
        return
    _setup_privateuseone_for_python_backend(NAME)
    DEVICE = torch.device(NAME, 0)
    # Recomputing in the backward pass asks for it, for tensors on the CPU too.
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    _library.append(torch.library.Library("aten", "IMPL"))
    kernels: dict[str, Callable[..., Any]] = {
        "empty.memory_format": lambda size, dtype=None, **_: StandInTensor(
            torch.empty(size, dtype=dtype)
        ),
        "empty_strided": lambda size, stride, dtype=None, **_: StandInTensor(
            torch.empty_strided(size, stride, dtype=dtype)
        ),
        "_copy_from": lambda source, into, _blocking=False: _filled(into, source),
    }
    for name in _MADE_IN_ONE_GO:
        kernels[name] = _maker(name)
    for name, kernel in kernels.items():
        _library[0].impl(name, kernel, "PrivateUse1")


def _maker(name: str) -> Callable[..., StandInTensor]:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def make(*args: Any, **kwargs: Any) -> StandInTensor:
        kwargs.pop("pin_memory", None)
        return StandInTensor(operation(*args, **kwargs | {"device": torch.device("cpu")}))

    return make
