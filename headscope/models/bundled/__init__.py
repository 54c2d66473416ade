"""Tiny trained models that come with headscope: where they are, and texts that they can read."""

from pathlib import Path
from random import Random

from headscope.errors import InputError, nearest

DEFAULT = "tiny-gpt2"
# Those that read the stories; the others read what headscope.models.bundled.tasks draws.
READERS = ("tiny-gpt2", "tiny-llama")
_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Names of the bundled models, decoders and others."""
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


def stories(count: int = 12, sentences: int = 25, seed: int = 0) -> list[str]:
    """Texts like those that the bundled decoders were trained on, drawn anew.

    The sentences come from the same templates, so that single ones may have been seen.
    """
    from headscope.models.bundled.text import story_sentence

    rng = Random(f"stories {seed}")  # noqa: S311  seeded, not secret
    return [" ".join(story_sentence(rng) for _ in range(sentences)) for _ in range(count)]


def _folder(name: str) -> Path:
    if name not in names():
        raise InputError(nearest(name, names(), kind="bundled model"))
    return _FOLDER / name
