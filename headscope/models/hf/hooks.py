"""Module hooks: the only place that registers hooks and unpacks modules' inputs and outputs.

Families give a block or an attention module the residual stream as its first argument or as
``hidden_states``, and get it back bare or as the first of several values.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_STREAM = "hidden_states"


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a module's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def stream(self) -> Any:
        """The residual stream: ``hidden_states``, or else the first argument; None without any."""
        if _STREAM in self.kwargs:
            return self.kwargs[_STREAM]
        return self.args[0] if self.args else None

    def giving(self, stream: Tensor) -> "Call":
        """The same call with another residual stream."""
        if _STREAM in self.kwargs:
            return Call(self.args, {**self.kwargs, _STREAM: stream})
        return Call((stream, *self.args[1:]), self.kwargs)

    def changed(self, change: Callable[[Any], Any]) -> "Call":
        """The same call with a function applied to everything but the residual stream."""
        own = 0 if _STREAM in self.kwargs or not self.args else 1
        args = (*self.args[:own], *(change(value) for value in self.args[own:]))
        kwargs = {
            name: value if name == _STREAM else change(value) for name, value in self.kwargs.items()
        }
        return Call(args, kwargs)


def stream_of(output: Any) -> Any:
    """Residual stream (or contribution to it) in a module's output."""
    return output[0] if isinstance(output, tuple) else output


def returning(output: Any, stream: Tensor) -> Any:
    """A module's output with another residual stream."""
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


@dataclass(frozen=True, eq=False)
class Hook:
    """A function that is called before or after a module runs; see the functions that make them."""

    module: nn.Module
    act: Callable[..., Any]
    after: bool
    first: bool = False

    def register(self) -> Callable[[], None]:
        """Hook the module; call what is returned to unhook it."""
        hook = self.act
        if self.after:
            remove = self.module.register_forward_hook(hook, with_kwargs=True, prepend=self.first)
        else:
            remove = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        return remove.remove


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """Context manager that hooks modules."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.register())
        yield


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is hooked to a module or a part of it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


@contextmanager
def unhooked(handles: Iterable[tuple[nn.Module, int]]) -> Iterator[None]:
    """Context manager without some output hooks, which are restored in place.

    Args:
        handles: modules with the ids of their hooks.
    """
    by_module: dict[nn.Module, list[int]] = {}
    for module, number in handles:
        by_module.setdefault(module, []).append(number)
    kept = {module: dict(module._forward_hooks) for module in by_module}
    try:
        for module, numbers in by_module.items():
            for number in numbers:
                module._forward_hooks.pop(number, None)
        yield
    finally:
        for module, hooks in kept.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def before(module: nn.Module, act: Callable[[nn.Module, Call], Call | None]) -> Hook:
    """Hook on a module's call: ``act(module, call)`` returns None, or the changed call."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = act(module, Call(args, kwargs))
        return None if made is None else (made.args, made.kwargs)

    return Hook(module, hook, after=False)


def after(
    module: nn.Module, act: Callable[[nn.Module, Call, Any], Any], *, first: bool = False
) -> Hook:
    """Hook on a module's output: ``act(module, call, output)`` returns None, or a new output.

    Args:
        module: to hook.
        act: what to call.
        first: before hooks that are already there.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return act(module, Call(args, kwargs), output)

    return Hook(module, hook, after=True, first=first)


def entering(module: nn.Module, act: Callable[[Tensor], Tensor | None]) -> Hook:
    """Hook on the residual stream, or the only tensor, that a module receives."""

    def hook(_module: nn.Module, call: Call) -> Call | None:
        made = act(call.stream)
        return None if made is None else call.giving(made)

    return before(module, hook)


def leaving(module: nn.Module, act: Callable[[Tensor], Tensor | None]) -> Hook:
    """Hook on the first tensor that a module returns."""

    def hook(_module: nn.Module, _call: Call, output: Any) -> Any:
        made = act(stream_of(output))
        return None if made is None else returning(output, made)

    return after(module, hook)
