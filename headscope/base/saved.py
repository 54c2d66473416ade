"""Results as files: numbers as safetensors, everything else as JSON in the header."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from headscope.base.files import whole_file
from headscope.errors import InputError
from headscope.heads import HeadIndex

_KEY = "headscope"
_FORMAT = 1
_MAX_BYTES = 8_000_000_000  # a file from elsewhere must not make us allocate what it likes
_MAX_DEPTH = 12

Result = TypeVar("Result", bound="Saved")


class Stored:
    """Base of dataclasses that may stand in a saved result; their fields are what is kept."""

    _known: ClassVar[dict[str, "type[Stored]"]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Remember the class, so that files can name it."""
        super().__init_subclass__(**options)
        Stored._known[cls.__name__] = cls

    def _parts(self) -> dict[str, Any]:
        """What is kept, by name."""
        kept: Any = self  # a dataclass, as all subclasses are that do not say what they keep
        return {one.name: getattr(self, one.name) for one in fields(kept) if one.init}

    @classmethod
    def _of_parts(cls, parts: dict[str, Any]) -> "Stored":
        """Make it again of :meth:`_parts`."""
        return cls(**parts)


class Saved(Stored):
    """Base of results with ``save`` and ``load``."""

    def save(self, path: "str | PathLike[str]") -> None:
        """Write one safetensors file atomically.

        Args:
            path: of the file; what is there is replaced.
        """
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        facts = {"format": _FORMAT, "result": _encoded(self, arrays)}
        made = save(arrays, metadata={_KEY: json.dumps(facts, allow_nan=False)})
        with whole_file(Path(path)) as file:
            file.write(made)

    @classmethod
    def load(cls: "type[Result]", path: "str | PathLike[str]") -> Result:
        """Read what :meth:`save` wrote.

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
    """JSON of a value, whose arrays go to ``arrays``."""
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
    """The value that :func:`_encoded` was given."""
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


def frozen(array: np.ndarray, kind: type) -> np.ndarray:
    """Return a copy that cannot be written to."""
    copy: np.ndarray = np.array(array, dtype=kind)
    copy.setflags(write=False)
    return copy
