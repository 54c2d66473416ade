"""Whose a folder of results is: one run's, of one kind and one setting."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headscope.base.files import whole_file, writable_folder
from headscope.errors import InputError

# What runs leave behind, beside what their ``run.json`` lists. Nothing else is ever removed.
_FILES = (
    *("run.json", "manifest.json", "index.html", "table.parquet", "sections.json"),
    *("attention.safetensors", "spectra.safetensors", "pairs.parquet", "words.json", "paths.json"),
    *("lens.parquet", "attribution.parquet", "heads.parquet", "emergence.parquet"),
    *("comparison.parquet", "recall.csv", "masking.csv", "responses.jsonl"),
    *("ranked.parquet", "ranked.jsonl", "effects.safetensors", "effects.parquet"),
    *("edges.parquet", "routes.safetensors", "circuit.safetensors", "faithfulness.safetensors"),
)
_FOLDERS = {
    "pictures": (".png", ".html"),
    "parts": (".parquet", ".tmp"),
    "cells": (".parquet", ".tmp"),
    "scored": (".npy", ".tmp"),
    "failed": (".json", ".tmp"),
}
# Folders of finished parts -> the kind of run that goes on from them.
_RESUMED = {"cells": "retrieval", "parts": "influence", "scored": "edges"}
_MAX_FACTS = 100_000_000


@dataclass(frozen=True)
class Claim:
    """One run's right to a folder.

    Attributes:
        path: the folder.
        kind: of run: the command's name.
        overwrite: whether another run's results may be replaced.
        asked: what the run was asked for, as JSON values; None until it is known.
    """

    path: Path
    kind: str
    overwrite: bool = False
    asked: Mapping[str, Any] | None = None

    @classmethod
    def create(cls, path: Path, kind: str, *, overwrite: bool = False) -> "Claim":
        """Make the folder before the work starts, so that a wrong one costs nothing.

        Raises:
            InputError: if nothing can be written there, or another kind of run did so before.
        """
        made = cls(writable_folder(path), kind, overwrite)
        made._check()
        return made

    def of(self, asked: Mapping[str, Any]) -> "Claim":
        """The same for a run whose settings are known; they must be those of the folder.

        Raises:
            InputError: if the folder holds a run with other settings.
        """
        plain = json.loads(json.dumps(dict(asked), default=str))
        made = replace(self, asked=plain)
        made._check()
        return made

    def ready(self) -> "Claim":
        """The folder to write into now that the work is done.

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
        """Write ``run.json``: whose folder this is, and what else there is to say."""
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
    """Kind and settings of the run whose results stand in a folder; None where there are none.

    The kind is empty where there are results that do not say; the settings are None where only
    parts of an unfinished run stand there.
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
    """Remove what runs leave behind, and nothing else; links go, what they lead to stays."""
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
