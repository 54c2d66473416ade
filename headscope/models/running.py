"""Running modules: parameters, digests, call arguments and state."""

import hashlib
import inspect
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headscope.errors import HeadscopeError, InputError, UnsupportedModelError


def put_away(module: nn.Module) -> None:
    """Unload weights that a pass left loaded because it ended early."""
    for part in submodules(module):
        if "_hf_hook" not in vars(part):
            continue
        if _away(part) and not all(value.is_meta for _, value in _own_tensors(part)):
            _hook(part).post_forward(part, None)


def submodules(module: nn.Module) -> list[nn.Module]:
    """List a module and all modules below it, each once, in the order of ``modules()``.

    That method also builds every name, which takes longer than a small layer takes to run.
    """
    found: dict[nn.Module, None] = {}
    ahead = [module]
    while ahead:
        part = ahead.pop()
        if part not in found:
            found[part] = None
            ahead += reversed([*part.children()])
    return list(found)


def runs_on(module: nn.Module, weight: Tensor) -> torch.device:
    """Device that a module computes on, regardless of where its weight is stored."""
    device = getattr(_hook(module), "execution_device", None)
    return weight.device if device is None else torch.device(device)


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Scope in which a module's own weights are loaded."""
    if not _away(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def parameter(module: nn.Module, name: str) -> Tensor:
    """Current weight of a module, on the device that it computes on."""
    with at_hand(module):
        weight: Tensor = getattr(module, name)
        return weight.detach()


def all_weights(module: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of a module, including offloaded weights."""
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
    """Hook of accelerate that moves a module's weights; None without one."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "execution_device"):
            return one
    return None


# Bytes of a weight that are read at once, and words that share one row of multipliers.
_CHUNK = 1 << 26
_ROW = 1 << 14


def weight_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and every byte of all weights.

    The bytes enter through XXH3-128, which runs at memory speed; any change or move of a weight
    changes the digest.
    """
    return _joined({name: _described(name, value) for name, value in weights.items()})


class Digest:
    """Digest of one model's current weights, with caching.

    Weights in main memory are read each time. Weights on another device are copied once; afterwards
    a position-weighted sum over all their bytes is computed on the device, and only weights whose
    sum has changed are copied again.
    """

    def __init__(self) -> None:
        """Start with an empty cache."""
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
    """Name, dtype, shape and hash of one weight."""
    bytes_of = xxhash.xxh3_128()
    for part in _bytes(value).split(_CHUNK):
        bytes_of.update(part.cpu().numpy())
    return f"{name} {value.dtype} {tuple(value.shape)} {bytes_of.hexdigest()}\n"


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _place_sums(weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Sums over the words of each weight, each times an odd number for its position, modulo 2^64.

    One sum per 128 kB, which detects both changes and moves; all are fetched at once.
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


# Marks a measurement pass, which scopes do not edit.
MEASURING = object()


class Finished(Exception):  # noqa: N818  # not an error
    """Raised inside a pass to stop it once all requested values were read."""


@dataclass(eq=False)
class Use:
    """Current passes and edit scopes of one module, across all its wrappers.

    Attributes:
        lock: lock held by the thread that runs a pass.
        scopes: open scopes of edits with the threads that opened them, outermost first.
        passes: passes running in the thread that holds the lock, innermost last.
    """

    lock: Any = field(default_factory=threading.RLock)
    scopes: tuple[tuple[Any, int], ...] = ()
    passes: tuple[tuple[Any, int], ...] = ()

    def running(self) -> Any:
        """Innermost headscope pass in this thread; None if there is none."""
        if not self.passes:
            return None
        run, thread = self.passes[-1]
        return run if thread == threading.get_ident() else None

    def measuring(self) -> bool:
        """Whether a measurement, including any passes inside it, runs in this thread."""
        return (MEASURING, threading.get_ident()) in self.passes


_USES: "WeakKeyDictionary[nn.Module, Use]" = WeakKeyDictionary()
_GUARD = threading.RLock()


def use_of(module: Any) -> Use:
    """Return the state shared by a module's wrappers; a model with a head shares its body's."""
    body = getattr(module, "base_model", module)
    with _GUARD:
        return _USES.setdefault(body if isinstance(body, nn.Module) else module, Use())


@contextmanager
def pass_over(module: Any, run: Any = MEASURING) -> Iterator[None]:
    """Run a module exclusively for one pass, in evaluation mode, uncompiled and in its own dtypes.

    Args:
        module: module to run.
        run: pass whose positions the hooks of edit scopes query; None: they infer them. Default: a
            measurement, which scopes do not edit.

    Raises:
        HeadscopeError: if another thread has a scope of edits open on this module.
    """
    with ExitStack() as stack:
        use = stack.enter_context(held(module))
        stack.enter_context(own_types())
        stack.enter_context(uncompiled())
        stack.enter_context(evaluating(module))
        before = use.passes
        try:
            use.passes = (*before, (run, threading.get_ident()))
            yield
        finally:
            use.passes = before
            put_away(module)


@contextmanager
def scope_over(module: Any, scope: Any) -> Iterator[None]:
    """Register an edit scope with a module, and disable compiled graphs within it.

    Raises:
        HeadscopeError: if another thread has a scope of edits open on this module.
    """
    entry = (scope, threading.get_ident())
    with uncompiled():
        with held(module) as use:
            use.scopes = (*use.scopes, entry)
        try:
            yield
        finally:
            with use.lock:
                use.scopes = tuple(one for one in use.scopes if one is not entry)


@contextmanager
def held(module: Any) -> Iterator[Use]:
    """Hold a module's lock: wait for other threads' passes, raise if they have edit scopes.

    Raises:
        HeadscopeError: if another thread has a scope of edits open on this module.
    """
    use = use_of(module)
    with use.lock:
        if any(thread != threading.get_ident() for _, thread in use.scopes):
            raise HeadscopeError(
                "another thread has a scope of edits open on this model (model.edited, "
                "mask_heads): leave that scope first, or load a second copy of the model for this "
                "thread."
            )
        yield use


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode within a scope, then restore training mode."""
    training = [part for part in submodules(module) if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def own_types() -> Iterator[None]:
    """Compute in the tensors' own dtypes: without autocast, and outside inference mode.

    Tensors created in inference mode could not take part in gradients later.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device in _autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def need_gradients(module: nn.Module, name: str) -> None:
    """Raise if gradients cannot flow through a module's weights.

    Raises:
        UnsupportedModelError: if it was made in inference mode.
    """
    if any(weight.is_inference() for weight in module.parameters()):
        raise UnsupportedModelError(
            f"{name} was created in torch.inference_mode, so gradients, which headscope needs, "
            "cannot flow through it: create it outside, or let headscope.load read it by name."
        )


def _autocast_devices() -> list[str]:
    devices = ["cpu"]
    if torch.accelerator.is_available() and (here := torch.accelerator.current_accelerator()):
        devices.append(here.type)
    return [device for device in devices if torch.is_autocast_enabled(device)]


class _Counted:
    """Process-wide switch that is on while any user needs it, and restored after the last."""

    def __init__(self) -> None:
        self._count = 0
        self._open = ExitStack()

    def enter(self, switch: AbstractContextManager[Any]) -> None:
        with _GUARD:
            if self._count == 0:
                self._open.enter_context(switch)
            self._count += 1

    def leave(self) -> None:
        with _GUARD:
            self._count -= 1
            if self._count == 0:
                self._open.close()


_EAGER = _Counted()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules as plain Python, since compiled graphs skip hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and the import is slow
        yield
        return
    _EAGER.enter(_eager_stance())
    try:
        yield
    finally:
        _EAGER.leave()


@contextmanager
def _eager_stance() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def accepted(module: Any) -> frozenset[str]:
    """Argument names of a module's ``forward``."""
    return frozenset(inspect.signature(module.forward).parameters)


def answer(output: Any) -> Tensor:
    """Output of a module at every position: logits, or last hidden states without a head."""
    found: Tensor | None = getattr(output, "logits", None)
    return output[0] if found is None else found


def padding(
    real: Bool[Tensor, "batch pos"],
    accepts: Collection[str],
    first: int = 0,
    turns_at: int | None = None,
) -> dict[str, Tensor]:
    """Padding arguments of a module; position numbers count only real tokens, on either side.

    Args:
        real: False at padding.
        accepts: argument names that the module takes.
        first: number of the first position; see :func:`first_number`.
        turns_at: longest text for the first of two sets of rotations; see :class:`ModelShape`.

    Raises:
        InputError: if the texts need both sets of rotations, since a model uses one per batch.
    """
    if turns_at is not None:
        beyond = real.sum(1) > turns_at
        if bool(beyond.any()) and not bool(beyond.all()):
            raise InputError(
                f"the batch has texts of at most {turns_at} tokens and longer ones, and the model "
                "uses one set of rotations per batch (longrope): run them separately, for example "
                "with batch_size=1."
            )
    inputs = {"attention_mask": real.long()}
    if "position_ids" in accepts:
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0) + first
    return inputs


@torch.no_grad()
def first_number(module: Any, tokens: Int[Tensor, "batch pos"]) -> int:
    """Position number that a module assigns to its first token.

    0, except in families whose position table begins with a padding row (roberta).

    Args:
        module: transformers model whose ``forward`` takes ``position_ids``.
        tokens: a few ids, none of them padding.

    Raises:
        UnsupportedModelError: if no numbering reproduces the model's own output.
    """
    own = answer(module(input_ids=tokens, use_cache=False))
    counted = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    padding_row = getattr(module.config.get_text_config(), "pad_token_id", None) or 0
    for first in dict.fromkeys((0, padding_row + 1, 1, 2)):
        try:
            places = counted + first
            logits = answer(module(input_ids=tokens, position_ids=places, use_cache=False))
        except (IndexError, RuntimeError, TypeError, ValueError):
            continue
        scale = own.abs().max().clamp_min(1.0)
        if bool((logits - own).abs().max() <= 1e-3 * scale):
            return first
    raise UnsupportedModelError(
        f"{type(module).__name__} numbers its positions in a way that does not support padding: "
        "give texts of equal length."
    )
