"""Which positions a model's own passes run: told by their cache and by ``generate``."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from headscope.edits import Span
from headscope.models.hf.hooks import Call, before, hooked


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
        stack.enter_context(hooked([before(body, _began(own))]))
        if callable(getattr(module, "generate", None)):
            stack.enter_context(replaced(module, "generate", _asked(own, module.generate)))
        yield own


def _began(own: OwnPasses) -> Callable[[nn.Module, Call], None]:
    def began(_module: nn.Module, call: Call) -> None:
        given = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        given = call.kwargs.get("inputs_embeds") if given is None else given
        cache = call.kwargs.get("past_key_values")
        if isinstance(given, Tensor):
            cached = 0 if cache is None else int(cache.get_seq_length())
            own.begin(int(given.shape[1]), cached)

    return began


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
