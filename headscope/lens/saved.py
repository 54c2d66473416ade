"""Learned lenses on disk: weights as safetensors, everything else as JSON."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.configs import Strict, parse
from headscope.errors import InputError
from headscope.files import whole_file, writable_folder

_WEIGHTS, _CONFIG = "lens.safetensors", "config.json"
_MOST = 2**24  # bytes of a config


class Saved(Strict):
    """What ``config.json`` says of a lens."""

    kind: str
    model: str
    digest: str
    settings: dict[str, Any]
    report: dict[str, Any]
    format: int = 1


def save_lens(folder: "str | PathLike[str]", tensors: Mapping[str, Tensor], facts: Saved) -> None:
    """Write weights, then config: a folder with a config is complete."""
    from safetensors.torch import save

    place = writable_folder(Path(folder))
    (place / _CONFIG).unlink(missing_ok=True)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(place / _WEIGHTS) as file:
        file.write(save(plain))
    with whole_file(place / _CONFIG) as file:
        file.write(json.dumps(facts.model_dump(), indent=2, allow_nan=False).encode() + b"\n")


def load_lens(folder: "str | PathLike[str]") -> tuple[dict[str, Tensor], Saved]:
    """Read what :func:`save_lens` wrote.

    Raises:
        InputError: if it is not there, not whole, or not what it says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    place = Path(folder)
    try:
        if (place / _CONFIG).stat().st_size > _MOST:
            raise InputError(f"{place / _CONFIG} is larger than such a file can be.")
        facts = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = load((place / _WEIGHTS).read_bytes())
    except OSError as error:
        raise InputError(
            f"{folder} holds no saved lens ({_CONFIG} and {_WEIGHTS}): {error.strerror}."
        ) from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"the lens in {folder} cannot be read: {error}.") from error
    if not isinstance(facts, dict):
        raise InputError(f"{place / _CONFIG} does not hold a lens.")
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{name} of the lens in {folder} is not finite.")
    return tensors, parse(Saved, facts, str(place / _CONFIG))
