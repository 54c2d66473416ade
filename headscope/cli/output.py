"""Output of commands: tables, JSON, and run folders."""

import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.base.result import Result
from headscope.cli.options import Loading
from headscope.errors import InputError
from headscope.table import HeadTable

if TYPE_CHECKING:
    from headscope.models.protocol import HeadModel
    from headscope.report.folder import RunFolder


def print_result(result: Result, *, as_json: bool) -> None:
    """Print a result of any kind: its rows, or its glance."""
    print_either(lambda: json_rows(result), lambda: [result], as_json=as_json)


def print_either(
    document: Callable[[], Any], shown: Callable[[], Iterable[Any]], *, as_json: bool
) -> None:
    """Print JSON for programs or a formatted result for people on stdout.

    Args:
        document: returns JSON values.
        shown: returns what is printed on a terminal, part by part; texts are not wrapped.
        as_json: which of the two.
    """
    if as_json:
        print(json.dumps(document(), allow_nan=False))
        return
    terminal = console()
    for part in shown():
        terminal.print(part, soft_wrap=isinstance(part, str))


def print_written(place: Path, *files: str, page: bool = True) -> None:
    """Report the files that a command has written, on stderr."""
    named = (["index.html (open it in a browser)"] if page else []) + list(files)
    console(stderr=True).print(f"Written to {place}: {', '.join(named)}.", soft_wrap=True)


def json_rows(result: Result) -> list[dict[str, Any]]:
    """One JSON object per row of a result; non-finite numbers become null."""
    return plain_rows(result.to_pandas())


def plain_rows(frame: Any) -> list[dict[str, Any]]:
    """Rows of a data frame as JSON objects; missing or non-finite values become null."""
    records: list[dict[str, Any]] = frame.to_dict(orient="records")
    return [{key: _plain(value) for key, value in record.items()} for record in records]


def console(*, stderr: bool = False) -> Any:
    """Console to print on; 100 columns if the output is not a terminal."""
    import sys

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 100)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if type(value).__name__ == "NAType":  # pandas' own missing number
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


_ABSOLUTE = re.compile(r"^(?:~|/|\\\\|[A-Za-z]:[\\/]|file:)")
# ``--name=`` and ``-n``, with the value attached.
_JOINED = re.compile(r"^(--[\w-]+=|-[A-Za-z](?=[/~\\]))(.*)$", re.DOTALL)


def typed() -> str | None:
    """The current command line; None if headscope was called from Python.

    Absolute paths are cut to their last part, so that a shared file does not reveal the author's
    folders.
    """
    program = Path(sys.argv[0])
    script = program.stem == "headscope" and program.suffix in ("", ".exe")
    module = program.parts[-2:] == ("headscope", "__main__.py")
    if not (script or module):
        return None
    return shlex.join(["headscope", *map(without_folders, sys.argv[1:])])


def without_folders(word: str) -> str:
    """Remove local folders from one word of a command line."""
    joined = _JOINED.match(word)
    name, value = joined.groups() if joined else ("", word)
    return name + ",".join(_last_part(one) for one in value.split(","))


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] if _ABSOLUTE.match(path) else path


def run_folder(out: Path | None, kind: str, *, overwrite: bool) -> "RunFolder | None":
    """Claim a run's folder before anything is loaded; None if none was requested.

    Raises:
        InputError: if it is not writable, or holds another kind of run.
    """
    from headscope.report.folder import RunFolder

    check_overwrite(out, overwrite=overwrite)
    return None if out is None else RunFolder.create(out, kind, overwrite=overwrite)


@dataclass(eq=False)
class ModelCommand:
    """A command at work on a model, from the claim of its folder on.

    Attributes:
        name: name of the command.
        model: the loaded model.
        folder: folder of the run; None if none was requested.
        timings: seconds of the steps so far, by name.
    """

    name: str
    model: "HeadModel"
    folder: "RunFolder | None"
    timings: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(
        cls, name: str, loading: Loading, out: Path | None, /, *, overwrite: bool, **asked: Any
    ) -> "ModelCommand":
        """Claim the folder, load the model, and tell the folder what is asked of it.

        Raises:
            InputError: if the folder is not writable, or holds another run.
        """
        folder = run_folder(out, name, overwrite=overwrite)
        started = time.perf_counter()
        model = loading.model()
        begun = cls(name, model, folder, {"load_seconds": time.perf_counter() - started})
        if folder is not None:
            begun.folder = folder.of(asked_of(model, loading, **asked))
        return begun

    def took(self, step: str) -> None:
        """Note the seconds since the last step."""
        now = time.perf_counter()
        self.timings[f"{step}_seconds"], self._since = now - self._since, now

    def settings(self, **more: Any) -> dict[str, Any]:
        """Settings of the run, as its folder stores them."""
        return {
            "command": self.name,
            "model": self.model.name,
            "revision": self.model.revision,
            **more,
        }


def check_overwrite(out: Path | None, *, overwrite: bool) -> None:
    """Refuse ``--overwrite`` if nothing is written.

    Raises:
        InputError: if there is no ``--out``.
    """
    if overwrite and out is None:
        raise InputError("--overwrite needs --out: without it nothing is written.")


def asked_of(model: "HeadModel", loading: Loading, **other: Any) -> dict[str, Any]:
    """Identity of a run on a model: weights, loading options, and settings."""
    return {
        "model": model.name,
        "revision": model.revision,
        "weights": model.digest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "extrapolate": loading.extrapolate,
        **other,
    }


def print_run(place: Path, *, as_json: bool) -> None:
    """Print the table in a run folder, or in a Parquet file."""
    file = place / "table.parquet" if place.is_dir() else place
    if not file.exists():
        raise InputError(f"{place} holds no finished run: there is no {file.name} in it.")
    print_result(HeadTable.load(file), as_json=as_json)
