"""Which model a command reads, and the options that say how it is loaded."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headscope.cli.options import AllowPickle, Device, Dtype, Revision, TrustCode

if TYPE_CHECKING:
    from headscope.models.protocol import HeadModel


@dataclass(frozen=True)
class Loading:
    """Which model, and how to load it."""

    source: str | None = None
    extrapolate: bool = False
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def of(self, source: str | None, *, extrapolate: bool = False) -> "Loading":
        """The same for this model."""
        return replace(self, source=source, extrapolate=extrapolate)

    def model(self) -> "HeadModel":
        """Load it, without transformers' own bars and advice on the terminal."""
        from transformers.utils import logging

        from headscope.models.loading.load import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return load(
            self.source,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            extrapolate=self.extrapolate,
        )


def with_loading(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`_options`; it receives them as ``loading``."""
    shared = inspect.signature(_options).parameters
    own = inspect.signature(command)

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        loading = Loading(**{name: given.pop(name) for name in shared})
        command(loading=loading, **given)

    kept = [one for name, one in own.parameters.items() if name != "loading"]
    # typer reads a command's options off its signature.
    wrapped.__dict__["__signature__"] = own.replace(parameters=[*kept, *shared.values()])
    return wrapped


def _options(
    *,
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustCode = False,
) -> None:
    """Options of every command that loads a model."""
