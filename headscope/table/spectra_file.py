"""Spectra of heads as a file: safetensors, with names and chance in the header."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from headscope.errors import InputError
from headscope.files import whole_file
from headscope.table.provenance import Provenance
from headscope.table.spectra import HeadSpectra

_KEY = "headscope"
_ARRAYS = ("values", "scale", "low", "high")
_MAX_BYTES = 200_000_000


def save_spectra(spectra: Sequence[HeadSpectra], path: "str | PathLike[str]") -> None:
    """Write spectra of one model atomically."""
    from safetensors.numpy import save

    arrays = {
        f"{i}.{name}": getattr(one, name).astype("float32")
        for i, one in enumerate(spectra)
        for name in _ARRAYS
    }
    facts = [
        {"name": one.name, "chance": one.chance, "provenance": one.provenance.to_json()}
        for one in spectra
    ]
    made = save(arrays, metadata={_KEY: json.dumps(facts)})
    with whole_file(Path(path)) as file:
        file.write(made)


def load_spectra(path: "str | PathLike[str]") -> list[HeadSpectra]:
    """Read what :func:`save_spectra` wrote.

    Raises:
        InputError: if the file is none.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InputError(f"{str(file)!r} is larger than any file of spectra.")
        with safe_open(file, framework="numpy") as opened:
            facts = json.loads((opened.metadata() or {})[_KEY])
            return [
                HeadSpectra(
                    name=str(one["name"]),
                    chance=str(one["chance"]),
                    provenance=Provenance.from_json(one["provenance"]),
                    **{
                        name: opened.get_tensor(f"{i}.{name}").astype("float64") for name in _ARRAYS
                    },
                )
                for i, one in enumerate(facts)
            ]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(file)!r} holds no spectra: {error!r}.") from None
