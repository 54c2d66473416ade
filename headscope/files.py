"""Writing files so that each is whole or absent, whatever kills the process."""

import errno
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from headscope.errors import InputError

# What disks answer that cannot sync a folder, such as SMB shares: their renames are on their own.
_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only once it is complete and on the disk.

    Args:
        target: where it shall stand; what stands there is replaced at once.
    """
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries on the disk, where the system can do that."""
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


def whole_page(target: Path, page: str) -> None:
    """Write an HTML page, whole or not at all.

    Raises:
        InputError: if the name does not end in ``.html``.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target.name!r} should end in .html.")
    with whole_file(target) as file:
        file.write(page.encode())


def check_same(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Refuse to go on from a file that was made from other facts.

    Raises:
        InputError: naming the facts that differ, and the way out.
    """
    names = sorted({*found, *wanted})
    other = [name for name in names if found.get(name) != wanted.get(name)]
    if other:
        raise InputError(
            f"{file} is of another {what} (other {', '.join(other)}): give another name, or "
            "delete it."
        )


def writable_folder(folder: Path) -> Path:
    """Make a folder and prove that files can be written into it.

    Raises:
        InputError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / ".writable") as file:
            file.write(b"")
        (folder / ".writable").unlink(missing_ok=True)  # another process may try it too
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write to {folder}: {reason}. Choose another folder.") from error
    return folder
