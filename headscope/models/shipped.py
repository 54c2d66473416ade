"""The models that come with headscope: where they are, and their training checkpoints."""

from pathlib import Path

from headscope.errors import InputError, nearest

DEFAULT = "tiny-gpt2"
_FOLDER = Path(__file__).parent / "bundled"


def names() -> tuple[str, ...]:
    """Names of the bundled models."""
    return tuple(sorted(path.parent.name for path in _FOLDER.glob("*/config.json")))


def checkpoints(name: str) -> tuple[str, ...]:
    """Training checkpoints of a bundled model, earliest first; empty if it ships none.

    Each is a revision: ``hs.load(name, revision=checkpoint)``.
    """
    return tuple(
        sorted(path.parent.name for path in _folder(name).glob("checkpoints/*/config.json"))
    )


def folder(name: str, revision: str | None = None) -> Path:
    """Folder with the weights of a bundled model.

    Raises:
        InputError: if there is no such model or checkpoint.
    """
    home = _folder(name)
    if revision is None:
        return home
    known = checkpoints(name)
    if revision not in known:
        raise InputError(nearest(revision, known, kind=f"revision of {name}"))
    return home / "checkpoints" / revision


def _folder(name: str) -> Path:
    if name not in names():
        raise InputError(nearest(name, names(), kind="bundled model"))
    return _FOLDER / name
