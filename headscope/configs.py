"""Reading YAML that users write: safe, small, and with one sentence for every mistake."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from headscope.errors import InputError, nearest

# A config is written by hand; anything larger is another file by mistake.
_MAX_BYTES = 2**20
Config = TypeVar("Config", bound=BaseModel)


class Strict(BaseModel):
    """Base of every config: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Mapping in a YAML file, read with the safe loader.

    Raises:
        InputError: if the file is missing, empty, too large, no YAML or no mapping.
    """
    import yaml

    place = Path(path)
    try:
        if place.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than a config should be (1 MiB).")
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} could not be read: {_reason(error)}.") from error
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        raise InputError(f"{path} is no readable YAML{line}.") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} should hold keys with values, such as 'kind: repeated_tokens'.")
    return {str(key): value for key, value in found.items()}


def parse(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Make a config of plain values.

    Args:
        kind: which config.
        values: as read.
        where: file they came from, for the sentence.

    Raises:
        InputError: naming the first key that is wrong, and the nearest one where it is unknown.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A key that is wrong explains the one that is missing.
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        place = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            sentence = nearest(place[-1], _keys_beside(kind, place), kind="key")
        else:
            given = repr(first["input"])
            shown = given if len(given) <= 60 else given[:57] + "..."
            sentence = f"{'.'.join(place) or 'the config'}: {first['msg']} (given: {shown})."
        raise InputError(f"{where}: {sentence}") from error


def _keys_beside(kind: type[BaseModel], place: list[str]) -> list[str]:
    """Keys that would have been right where an unknown one stands."""
    here: Any = kind
    for part in place[:-1]:
        field = here.model_fields.get(part) if _is_config(here) else None
        if field is None:
            continue
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        here = next((one for one in inner if _is_config(one)), here)
    return list(here.model_fields)


def _is_config(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, BaseModel)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it is not UTF-8 text"
