"""State of a training run in one file: written whole, read only by the same run."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.base.files import check_same, whole_file, writable_folder
from headscope.errors import InputError

_KEY = "headscope"


class Checkpoint:
    """Tensors of a run that may be stopped at any time, with the facts that decide what it does.

    Args:
        folder: where ``checkpoint.safetensors`` stands; None: nothing is kept.
        facts: JSON values that decide the run: a file of others is refused.

    Raises:
        InputError: if the folder cannot be written.

    Example:
        >>> import tempfile, torch
        >>> kept = Checkpoint(tempfile.mkdtemp(), {"seed": 0})
        >>> kept.write({"step": torch.tensor(3)})
        >>> int(kept.read()["step"])
        3
    """

    def __init__(self, folder: "str | PathLike[str] | None", facts: Mapping[str, Any]) -> None:
        """Write nothing yet, but prove that something can be written."""
        self._facts = json.loads(json.dumps(facts, default=str))
        self._file: Path | None = None
        if folder is not None:
            self._file = writable_folder(Path(folder)) / "checkpoint.safetensors"

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self._file is not None

    def read(self) -> dict[str, Tensor] | None:
        """What was written last; None where nothing was.

        Raises:
            InputError: if the file is damaged, or of another run.
        """
        from safetensors import SafetensorError, safe_open

        if self._file is None or not self._file.exists():
            return None
        try:
            with safe_open(self._file, framework="pt") as opened:
                facts = json.loads((opened.metadata() or {})[_KEY])
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self._file} is not a checkpoint, or is damaged: give another folder, or delete "
                "it to begin again."
            ) from error
        check_same(self._file, facts, self._facts, "training run")
        return found

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace what is there, at once."""
        from safetensors.torch import save

        if self._file is None:
            return
        plain = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        made = save(plain, metadata={_KEY: json.dumps(self._facts)})
        with whole_file(self._file) as file:
            file.write(made)


def adam_state(adam: torch.optim.Adam) -> dict[str, Tensor]:
    """What Adam remembers of every parameter, by name, as :class:`Checkpoint` keeps it.

    Args:
        adam: with one group of parameters.
    """
    return {
        f"adam.{number}.{name}": value
        for number, values in adam.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_adam(adam: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    """Have Adam remember what :func:`adam_state` gave.

    Args:
        adam: of the same parameters, before its first step.
        tensors: of a checkpoint.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, what = name.split(".")
            state.setdefault(int(number), {})[what] = value
    adam.load_state_dict({**adam.state_dict(), "state": state})
