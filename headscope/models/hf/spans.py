"""Which positions a model's own passes run: told by their cache and by ``generate``."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from headscope.edits import Span


class OwnPasses(threading.local):
    """Positions of the pass that a model runs in this thread, called by its owner.

    Attributes:
        span: of the pass that began last.
        asked: length of the prompt that ``generate`` was given; None outside of it.
    """

    span: Span | None = None
    asked: int | None = None

    def begin(self, length: int, cached: int) -> None:
        """Note a pass over ``length`` positions behind those of its cache."""
        if self.asked is not None:
            prompt = self.asked
        elif not cached:
            prompt = length
        else:  # what a cache held before anybody looked was read as a prompt
            prompt = cached if self.span is None else self.span.prompt
        self.span = Span(cached, length, prompt, grows=True)


@contextmanager
def watched(module: Any) -> Iterator[OwnPasses]:
    """Follow the passes of a model, and its ``generate``, within a scope."""
    own = OwnPasses()
    with ExitStack() as stack:
        body = getattr(module, "base_model", module)
        hook = body.register_forward_pre_hook(_entering(own), with_kwargs=True)
        stack.callback(hook.remove)
        if callable(getattr(module, "generate", None)):
            stack.enter_context(replaced(module, "generate", _asked(own, module.generate)))
        yield own


def _entering(own: OwnPasses) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        cache = kwargs.get("past_key_values")
        if isinstance(given, Tensor):
            cached = 0 if cache is None else int(cache.get_seq_length())
            own.begin(int(given.shape[1]), cached)

    return hook


def _asked(own: OwnPasses, generate: Callable[..., Any]) -> Callable[..., Any]:
    def asked(*args: Any, **kwargs: Any) -> Any:
        names = ("input_ids", "inputs", "inputs_embeds")
        given = args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)
        before = own.asked
        own.asked = int(given.shape[1]) if isinstance(given, Tensor) else None
        try:
            return generate(*args, **kwargs)
        finally:
            own.asked = before

    return asked


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let something stand for an attribute of an object within a scope, and put it back after."""
    own = owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own
