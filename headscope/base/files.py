"""Files and folders of results: text, Parquet and saved results, written atomically."""

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TypeVar

import numpy as np

from headscope.base.arguments import checked
from headscope.errors import InputError, WriteError
from headscope.heads import HeadIndex

if TYPE_CHECKING:
    import pyarrow


# What disks answer that cannot sync a folder, such as SMB shares: their renames are on their own.
_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}


def read_text(path: "str | Path") -> str:
    """Text of a UTF-8 file, without a byte-order mark; line ends stay as they are.

    Raises:
        InputError: if it cannot be read, or holds something else.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path} cannot be read as UTF-8 text: line {line} holds the byte "
            f"{error.object[error.start]:#04x}; save it as UTF-8."
        ) from error


def read_lines(path: "str | Path") -> list[str]:
    r"""Lines of a UTF-8 file; only ``\n``, or ``\r\n``, ends a line.

    ``str.splitlines`` would also split at form feeds and Unicode's line separators, which stand
    inside JSON strings.

    Raises:
        InputError: if it cannot be read, or holds something else.
    """
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a text, separated by blank lines."""
    blocks = text.replace("\r\n", "\n").split("\n\n")
    return [block.strip() for block in blocks if block.strip()]


def cache_folder() -> Path | None:
    """Folder for what is worth keeping between runs; None if nothing shall be kept.

    ``HEADSCOPE_CACHE`` names it, or says ``off``. Default: ``headscope`` in ``XDG_CACHE_HOME`` or
    in ``~/.cache``. Nothing is created here.
    """
    named = os.environ.get("HEADSCOPE_CACHE")
    if named is not None:
        return None if named.strip().lower() in ("", "0", "off", "no", "false") else Path(named)
    above = os.environ.get("XDG_CACHE_HOME")
    if above and Path(above).is_absolute():  # others are to be ignored, says the specification
        return Path(above) / "headscope"
    try:
        return Path.home() / ".cache" / "headscope"
    except RuntimeError:  # no home
        return None


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when it is complete and synced.

    A symbolic link of that name is replaced, never followed.

    Args:
        target: where it shall stand; what stands there is replaced at once.

    Raises:
        WriteError: if the disk does not take it, or what stands there must not be replaced.
    """
    with whole_path(target) as beside, beside.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_path(target: Path) -> Iterator[Path]:
    """Path of a temporary file that replaces ``target`` on success.

    For libraries that write to a path; see :func:`whole_file`. The temporary name is unique, so
    two writers of one target never meet.

    Raises:
        WriteError: if the disk does not take it, or what stands there must not be replaced.
    """
    _check_replaceable(target)
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield beside
        beside.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, WriteError) or error.filename not in _names(beside, target):
            raise
        raise _refusal(target, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _names(*paths: Path) -> set[str | None]:
    """Paths that an error belongs to; errors in writing to an open file name none."""
    return {None, *map(str, paths)}


def _check_replaceable(target: Path) -> None:
    """Refuse to replace anything but a writable plain file."""
    try:
        mode = target.lstat().st_mode
    except OSError:
        return  # absent, or opening it will tell
    if stat.S_ISDIR(mode):
        raise WriteError(f"cannot write {target}: a folder has that name. Choose another name.")
    if stat.S_ISREG(mode) and not mode & 0o222:
        raise WriteError(
            f"cannot write {target}: that file is read-only. Choose another name, or make it "
            "writable."
        )
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise WriteError(f"cannot write {target}: it is a device or pipe. Choose a file.")


def _refusal(target: Path, error: OSError) -> WriteError:
    """Message for an error of the operating system."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        fix = "Free some space, or choose another place."
    elif error.errno == errno.ENOENT:
        fix = "Make its folder first."
    else:
        fix = "Choose another place."
    found = WriteError(f"cannot write {target}: {reason}. {fix}")
    found.errno, found.strerror = error.errno, error.strerror
    return found


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, if the system supports it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def whole_page(target: Path, page: str, asked: Mapping[str, Any] | None = None) -> None:
    """Write an HTML page atomically.

    Args:
        target: target of the page.
        page: as HTML.
        asked: what it was made from, kept in it for :func:`check_page`.

    Raises:
        InputError: if the name does not end in ``.html``.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target.name!r} should end in .html.")
    with whole_file(target) as file:
        file.write(page.encode())
        if asked is not None:
            file.write(_stamp(asked))


def check_page(target: Path, asked: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse to replace a file that is not an earlier version of the same page.

    Raises:
        InputError: if another file has the name.
    """
    if overwrite or not target.exists():
        return
    try:
        with target.open("rb") as file:
            file.seek(max(0, target.stat().st_size - _STAMP_BYTES))
            same = file.read().endswith(_stamp(asked))
    except OSError as error:
        raise InputError(f"cannot read {target}: {error.strerror or error}.") from error
    if not same:
        raise InputError(
            f"{target} holds something else: choose another --out, or replace it with --overwrite."
        )


_STAMP_BYTES = 1_000_000


def _stamp(asked: Mapping[str, Any]) -> bytes:
    """Source of a page as an HTML comment, escaped so that it cannot end early."""
    said = json.dumps(asked, sort_keys=True, default=str)
    for sign in "-<>&":
        said = said.replace(sign, f"\\u{ord(sign):04x}")
    return f"\n<!-- headscope {said} -->\n".encode()


def check_same(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Refuse to resume from a file that was made from other facts.

    Raises:
        InputError: naming the facts that differ, and what to do.
    """
    names = sorted({*found, *wanted})
    other = [name for name in names if found.get(name) != wanted.get(name)]
    if other:
        raise InputError(
            f"{file} is of another {what} (other {', '.join(other)}): give another name, or "
            "delete it."
        )


def writable_folder(folder: Path) -> Path:
    """Create a folder and check that it is writable.

    Raises:
        InputError: if they cannot.
    """
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write to {folder}: {reason}. Choose another folder.") from error
    return folder


def subfolder(folder: Path, name: str) -> Path:
    """Create a folder inside a results folder; symbolic links are refused.

    Raises:
        InputError: if it leads elsewhere, or cannot be written to.
    """
    place = folder / name
    if place.is_symlink():
        raise InputError(
            f"{place} is a symbolic link and would lead out of the folder: remove it, or choose "
            "another folder."
        )
    return writable_folder(place)


# What runs leave behind, beside what their ``run.json`` lists. Nothing else is ever removed.
_FILES = (
    *("run.json", "manifest.json", "index.html", "table.parquet", "sections.json"),
    *("attention.safetensors", "spectra.safetensors", "pairs.parquet", "words.json", "paths.json"),
    *("lens.parquet", "attribution.parquet", "heads.parquet", "emergence.parquet"),
    *("comparison.parquet", "recall.csv", "masking.csv", "responses.jsonl"),
    *("ranked.parquet", "ranked.jsonl", "effects.safetensors", "effects.parquet"),
    *("kinds.safetensors", "findings.parquet", "page.txt"),
    *("edges.parquet", "routes.safetensors", "circuit.safetensors", "faithfulness.safetensors"),
)
_FOLDERS = {
    "pictures": (".png", ".html"),
    "parts": (".parquet", ".tmp"),
    "cells": (".parquet", ".tmp"),
    "scored": (".npy", ".tmp"),
    "kinds": (".safetensors", ".tmp"),
    "failed": (".json", ".tmp"),
}
# Folders of finished parts -> the kind of run that goes on from them.
_RESUMED = {"cells": "retrieval", "parts": "influence", "scored": "edges", "kinds": "kinds"}
_MAX_FACTS = 100_000_000


@dataclass(frozen=True)
class FolderClaim:
    """Exclusive claim of one run on a folder.

    Attributes:
        path: the folder.
        kind: kind of run, the command's name.
        overwrite: whether another run's results may be replaced.
        asked: what the run was asked for, as JSON values; None until it is known.
    """

    path: Path
    kind: str
    overwrite: bool = False
    asked: Mapping[str, Any] | None = None

    @classmethod
    def create(cls, path: Path, kind: str, *, overwrite: bool = False) -> "FolderClaim":
        """Create the folder before the work starts, so that a bad path fails at once.

        Raises:
            InputError: if nothing can be written there, or another kind of run did so before.
        """
        made = cls(writable_folder(path), kind, overwrite)
        made._check()
        return made

    def of(self, asked: Mapping[str, Any]) -> "FolderClaim":
        """Like :meth:`create`, for a run with known settings, which must match the folder's.

        Raises:
            InputError: if the folder holds a run with other settings.
        """
        plain = json.loads(json.dumps(dict(asked), default=str))
        made = replace(self, asked=plain)
        made._check()
        return made

    def ready(self) -> "FolderClaim":
        """Prepare the folder for writing after the work is done.

        Results that may be replaced are removed. If another run has taken the folder meanwhile,
        a new folder beside it is given instead: the work is done and must not be lost.
        """
        if self.overwrite:
            clear(self.path)
            return replace(self, overwrite=False)
        try:
            self._check()
        except InputError:
            number = 2
            while (beside := self.path.with_name(f"{self.path.name}-{number}")).exists():
                number += 1
            return replace(self, path=writable_folder(beside))
        return self

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write ``run.json``: the run that owns the folder, and its facts."""
        said = {"kind": self.kind, "asked": dict(self.asked or {}), **facts}
        with whole_file(self.path / "run.json") as file:
            file.write(json.dumps(said, indent=2).encode() + b"\n")

    def _check(self) -> None:
        if self.overwrite:
            return
        found = occupant(self.path)
        if found is None:
            return
        kind, asked = found
        if kind != self.kind:
            raise InputError(f"{self.path} {_holds(kind)}: {_WAY_OUT}")
        if self.asked is None or asked is None:
            return
        names = sorted({*asked, *self.asked})
        other = [name for name in names if asked.get(name) != self.asked.get(name)]
        if other:
            raise InputError(
                f"{self.path} holds another run of headscope {kind} (other "
                f"{', '.join(other)}): {_WAY_OUT}"
            )


_WAY_OUT = "choose another --out, or replace it with --overwrite."


def _holds(kind: str) -> str:
    if not kind:
        return "holds files of a run that does not say what it was"
    return f"holds a run of headscope {kind}"


def occupant(folder: Path) -> tuple[str, dict[str, Any] | None] | None:
    """Kind and settings of the run in a folder; None if there is none.

    The kind is empty where there are results that do not say; the settings are None if only parts
    of an unfinished run stand there.
    """
    if (folder / "manifest.json").exists():
        return "sweep", None
    if (folder / "run.json").exists():
        facts = _facts(folder / "run.json")
        asked = facts.get("asked")
        return str(facts.get("kind", "")), asked if isinstance(asked, dict) else {}
    for name, kind in _RESUMED.items():
        if (folder / name).is_dir() and any((folder / name).iterdir()):
            return kind, None
    if any((folder / name).exists() for name in _FILES):
        return "", None
    return None


def _facts(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_FACTS:
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def clear(folder: Path) -> None:
    """Delete what runs write, and nothing else; links are removed, not followed."""
    for name, endings in _FOLDERS.items():
        place = folder / name
        if place.is_symlink() or not place.is_dir():
            continue
        for file in list(place.iterdir()):
            if file.suffix in endings and (file.is_file() or file.is_symlink()):
                file.unlink(missing_ok=True)
        if not any(place.iterdir()):
            place.rmdir()
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


MAX_ROWS = 50_000_000
MAX_VALUES = 500_000_000  # in all columns together; lists count by their items
MAX_BYTES = 8_000_000_000  # once decompressed


def read_parquet(
    path: "str | PathLike[str]", columns: Sequence[str] | None = None
) -> "pyarrow.Table":
    """Read a Parquet file, refusing footers that claim more than a results table can hold.

    Words are kept as a dictionary, so a long one that stands in every row is held once.

    Args:
        path: path of the file.
        columns: to read; default: all.

    Raises:
        InputError: if it is absent, no Parquet, larger than the limits, or lacks a column.
    """
    import pyarrow

    file = Path(path)
    try:
        return read_limited(file, columns, words_once=True)
    except FileNotFoundError:
        raise InputError(f"there is no file {str(file)!r}.") from None
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise InputError(f"{str(file)!r} is not a readable parquet file: {_line(error)}") from None


def read_part(file: Path, *, again: str = "run the same again") -> "pyarrow.Table":
    """Read a partial result of an earlier run, within the same limits.

    Args:
        file: file of the part.
        again: what to do once a damaged part is deleted.

    Raises:
        FileNotFoundError: if it is absent.
        InputError: if it is not Parquet, or larger than the limits.
    """
    with readable(file, again=again):
        return read_limited(file)


@contextmanager
def readable(file: Path, *, again: str = "run the same again") -> Iterator[None]:
    """Context manager that turns errors of damaged files into messages; missing files still raise.

    Args:
        file: file of the part.
        again: what to do once it is deleted.

    Raises:
        InputError: if the file cannot be read, or holds other things than a part.
    """
    import pyarrow

    try:
        yield
    except (FileNotFoundError, InputError):
        raise
    except (
        *(OSError, pyarrow.ArrowException, MemoryError),
        *(ValueError, KeyError, TypeError, IndexError, AttributeError),
    ) as error:
        raise InputError(
            f"{file} is damaged ({_line(error)[:100]}): delete it, and {again}."
        ) from error


def read_limited(
    file: Path, columns: Sequence[str] | None = None, *, words_once: bool = False
) -> "pyarrow.Table":
    """Read a file within the limits, raising pyarrow's own errors.

    Args:
        file: its path.
        columns: to read; default: all.
        words_once: make dictionaries of columns of words.

    Raises:
        InputError: if it is larger than the limits, or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    _check_size(file, parquet.read_metadata(file))
    schema = parquet.read_schema(file)
    missing = [name for name in columns or () if name not in schema.names]
    if missing:
        raise InputError(f"{str(file)!r} has no column {missing[0]!r}.")
    words = [one.name for one in schema if words_once and pyarrow.types.is_string(one.type)]
    opened = parquet.ParquetFile(file, read_dictionary=words)
    return opened.read(columns=None if columns is None else list(columns))


def _check_size(file: Path, facts: "pyarrow.parquet.FileMetaData") -> None:
    """Refuse a file that by its own account would not fit in memory."""
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    values = sum(one.column(i).num_values for one in groups for i in range(one.num_columns))
    size = sum(one.total_byte_size for one in groups)
    for found, limit, what in (
        (facts.num_rows, MAX_ROWS, "rows"),
        (values, MAX_VALUES, "values"),
        (size, MAX_BYTES, "bytes once decompressed"),
    ):
        if not 0 <= found <= limit:
            raise InputError(
                f"{str(file)!r} claims {found:,} {what}; at most {limit:,} are read here."
            )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


_KEY = "headscope"
_FORMAT = 1
_MAX_BYTES = 8_000_000_000  # a file from elsewhere must not make us allocate what it likes
_MAX_DEPTH = 12

SavedKind = TypeVar("SavedKind", bound="Saved")


class Stored:
    """Base of dataclasses that saved results may contain."""

    _known: ClassVar[dict[str, "type[Stored]"]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Register the class under its name in files."""
        super().__init_subclass__(**options)
        Stored._known[cls.__name__] = cls

    def _parts(self) -> dict[str, Any]:
        """Fields to store, by name."""
        kept: Any = self  # a dataclass, as all subclasses are that do not say what they keep
        return {one.name: getattr(self, one.name) for one in fields(kept) if one.init}

    @classmethod
    def _of_parts(cls, parts: dict[str, Any]) -> "Stored":
        """Rebuild from :meth:`_parts`."""
        return cls(**parts)


class Saved(Stored):
    """Base of results with ``save`` and ``load``."""

    @checked
    def save(self, path: "str | PathLike[str]") -> None:
        """Save as one safetensors file, atomically.

        Args:
            path: path of the file; an existing file is replaced.
        """
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        facts = {"format": _FORMAT, "result": _encoded(self, arrays)}
        made = save(arrays, metadata={_KEY: json.dumps(facts, allow_nan=False)})
        with whole_file(Path(path)) as file:
            file.write(made)

    @classmethod
    @checked
    def load(cls: "type[SavedKind]", path: "str | PathLike[str]") -> SavedKind:
        """Load a file written by :meth:`save`.

        Raises:
            InputError: if the file is missing, damaged, or holds another kind of result.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path)
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise InputError(f"{str(file)!r} is larger than any result.")
            with safe_open(file, framework="numpy") as opened:
                facts = json.loads((opened.metadata() or {})[_KEY])
                if facts["format"] != _FORMAT:
                    raise InputError(
                        f"{str(file)!r} has format {facts['format']}; this version reads {_FORMAT}."
                    )
                found = _decoded(facts["result"], opened.get_tensor, _MAX_DEPTH)
        except FileNotFoundError:
            raise InputError(f"there is no file {str(file)!r}.") from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{str(file)!r} is not a saved {cls.__name__}, or is damaged: {error!r}."
            ) from None
        if not isinstance(found, cls):
            raise InputError(
                f"{str(file)!r} holds {type(found).__name__}: read it with "
                f"{type(found).__name__}.load."
            )
        return found


def _encoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Encode a value as JSON, with its arrays moved to ``arrays``."""
    if (isinstance(value, bool | int | str) and type(value) in (bool, int, str)) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"number": str(float(value))}
    if isinstance(value, HeadIndex):
        return {"head": str(value)}
    if isinstance(value, np.ndarray):
        return _encoded_array(value, arrays)
    if isinstance(value, Stored):
        parts = {name: _encoded(one, arrays) for name, one in value._parts().items()}
        return {"class": type(value).__name__, "parts": parts}
    if isinstance(value, Mapping):
        return {
            "map": [[_encoded(key, arrays), _encoded(one, arrays)] for key, one in value.items()]
        }
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [_encoded(one, arrays) for one in value]}
    if hasattr(value, "detach"):  # a torch tensor
        return {"tensor": _kept(value.detach().cpu().contiguous().numpy(), arrays)}
    if isinstance(value, np.generic):
        return _encoded(value.item(), arrays)
    raise TypeError(f"a {type(value).__name__} cannot be saved.")


_SEQUENCES: dict[str, type[tuple[Any, ...] | list[Any] | frozenset[Any]]] = {
    "tuple": tuple,
    "list": list,
    "set": frozenset,
}


def _encoded_array(value: np.ndarray, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if value.dtype.kind in "OU":
        return {"texts": [str(one) for one in value.ravel()], "shape": list(value.shape)}
    if value.dtype.kind == "c":
        return {"complex": _kept(np.stack([value.real, value.imag], -1), arrays)}
    return {"array": _kept(value, arrays)}


def _kept(value: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    name = str(len(arrays))
    arrays[name] = np.ascontiguousarray(value)
    return name


def _decoded(value: Any, array: Any, depth: int) -> Any:
    """Decode a value from :func:`_encoded`."""
    if not isinstance(value, dict):
        return value
    if depth < 0:
        raise ValueError("nested too deeply")
    if "class" in value:
        made = Stored._known[value["class"]]
        parts = {name: _decoded(one, array, depth - 1) for name, one in value["parts"].items()}
        return made._of_parts(parts)
    ((kind, held),) = (item for item in value.items() if item[0] != "shape")
    if kind == "number":
        return float(held)
    if kind == "head":
        return HeadIndex.parse(held)
    if kind == "array":
        return array(held)
    if kind == "complex":
        pair = array(held)
        return pair[..., 0] + 1j * pair[..., 1]
    if kind == "texts":
        return np.array(held, dtype=object).reshape(value["shape"])
    if kind == "tensor":
        import torch

        return torch.from_numpy(array(held))
    if kind == "map":
        return {
            _decoded(key, array, depth - 1): _decoded(one, array, depth - 1) for key, one in held
        }
    return _SEQUENCES[kind](_decoded(one, array, depth - 1) for one in held)


def read_only(array: np.ndarray, kind: type) -> np.ndarray:
    """Read-only copy of an array."""
    copy: np.ndarray = np.array(array, dtype=kind)
    copy.setflags(write=False)
    return copy
