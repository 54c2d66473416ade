"""Options that commands share: model and loading, names, lengths, depths."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headscope.errors import InputError

if TYPE_CHECKING:
    from headscope.models.protocol import HeadModel


def path_option(said: str, *names: str) -> Any:
    """Path option that rejects an empty path, which is usually an unset variable."""
    return typer.Option(*names, help=said, parser=_path, metavar="<path>")


def _path(text: "str | Path") -> Path:
    if str(text) == "":
        raise typer.BadParameter("the path is empty: give a path, or leave the option out.")
    return Path(text)


Model = Annotated[
    str | None,
    typer.Argument(
        help="Hugging Face name, local folder, or bundled model (default: tiny-gpt2).",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag, commit; or bundled checkpoint.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (default: as stored).")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 (default: a GPU if there is one).")
]
Memory = Annotated[str | None, typer.Option(help="Memory limit for a chunk of rows, e.g. 2GB.")]
Scorers = Annotated[str | None, typer.Option(help="Names, separated by commas.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the files of an earlier run in the folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled weights.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model's own code; needs --revision COMMIT."),
]


@dataclass(frozen=True)
class Loading:
    """How to load a model."""

    source: str | None = None
    extrapolate: bool = False
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def of(self, source: str | None, *, extrapolate: bool = False) -> "Loading":
        """The same options for a given model."""
        return replace(self, source=source, extrapolate=extrapolate)

    def model(self) -> "HeadModel":
        """Load the model, without transformers' own progress bars and advice."""
        from transformers.utils import logging

        from headscope.cli.output import console
        from headscope.models.loading import load

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = load(
            self.source,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            extrapolate=self.extrapolate,
        )
        if getattr(getattr(model, "proof", None), "remembered", False):
            said = f"{model.name} was proved by an earlier run with the same weights."
            console(stderr=True).print(said, soft_wrap=True, markup=False, highlight=False)
        return model


def with_loading(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the options of :func:`_options`, passed to it as ``loading``."""
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


def listed(names: str | None) -> list[str] | None:
    """Split names at commas; None if none were given."""
    return None if names is None else [one.strip() for one in names.split(",") if one.strip()]


def scorer_names(names: str | None) -> list[str] | None:
    """Split and validate names of scorers.

    Raises:
        InputError: if a scorer is unknown.
    """
    from headscope.scorers import resolve

    found = listed(names)
    if found is not None:
        resolve(found)
    return found


_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_MOST = 64


def parse_lengths(text: str) -> list[int]:
    """Parse ``1k..32k`` (doubling), ``64,128,1k``, or both mixed; k is 1024.

    Raises:
        InputError: if the text has another form.
    """
    found: list[int] = []
    for part in text.split(","):
        low, dots, high = part.partition("..")
        if not dots:
            found.append(_length(low, text))
            continue
        length, last = _length(low, text), _length(high, text)
        if last < length:
            raise InputError(
                f"the lengths {part.strip()!r} are in descending order: write the smaller first."
            )
        while length <= last:
            found.append(length)
            length *= 2
    if len(found) > _MOST:
        raise InputError(f"{text!r} is {len(found)} lengths: give at most {_MOST}.")
    return list(dict.fromkeys(found))


def _length(word: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d{1,9})\s*([kKmM]?)\s*", word)
    if match is None or int(match[1]) < 1:
        raise InputError(
            f"{text!r} is not a list of lengths: write 1k..32k (doubling) or 128,512,2k."
        )
    return int(match[1]) * _UNITS[match[2].lower()]


def parse_depths(text: str) -> int | list[float]:
    """Parse ``10`` (that many, evenly spaced), or ``0,0.5,1``.

    Raises:
        InputError: if the text has another form.
    """
    try:
        if "," not in text and "." not in text:
            count = int(text)
            if not 1 <= count <= 1000:
                raise ValueError
            return count
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{text!r} is not a list of depths: write how many (10), or shares from 0 to 1 "
            "(0,0.5,1)."
        ) from None
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(f"depths are shares from 0 (start) to 1 (end); got {text!r}.")
    return shares
