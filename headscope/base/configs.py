"""Reading of YAML configs: safe, limited in size, and with one-sentence errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from headscope.errors import InputError, nearest

# A config is written by hand; anything larger is another file by mistake.
_MAX_BYTES = 2**20
_MAX_DEPTH = 32
_MAX_ALIASES = 1000
_MAX_NODES = 200_000
Config = TypeVar("Config", bound=BaseModel)


class Strict(BaseModel):
    """Base of every config: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LinedMapping(dict[str, Any]):
    """Mapping read from a file, with the line number of every key.

    Attributes:
        node: the file's syntax tree.
    """

    node: Any = None

    def line(self, place: Sequence[str | int]) -> int:
        """Line of a path into the mapping, from 1; of its parent if it is absent."""
        node, line = self.node, 1
        for part in place:
            found = [
                (key, value)
                for key, value in (node.value if node.id == "mapping" else ())
                if key.value == str(part)
            ]
            if found:
                line, node = found[0][0].start_mark.line + 1, found[0][1]
            elif node.id == "sequence" and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            # Anything else is pydantic's own word, such as the kind of a union.
        return line

    def line_of(self, word: str) -> int | None:
        """Line of a word that is a key or value; None if it does not occur."""
        waiting = [self.node]
        while waiting:
            node = waiting.pop(0)
            if node.id == "scalar" and node.value == word:
                return int(node.start_mark.line) + 1
            if node.id == "sequence":
                waiting += node.value
            elif node.id == "mapping":
                waiting += [one for pair in node.value for one in pair]
        return None


def read_yaml(path: str | Path) -> LinedMapping:
    """Read a YAML file to a mapping with the safe loader.

    Raises:
        InputError: naming the line, if the file is missing, empty, too large, too deep, no YAML
            or no mapping, or says the same key twice.
    """
    import yaml

    place = Path(path)
    try:
        if place.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than a config should be (1 MiB).")
        text = place.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} could not be read: {_reason(error)}.") from error
    try:
        _check_events(text, str(path))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(node, str(path))
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        where = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = where.line + 1 if where is not None else _line_of_position(error, text)
        raise InputError(f"{path} is not readable YAML, line {line}: {_problem(error)}.") from error
    if not isinstance(found, dict) or not found:
        raise InputError(
            f"{path} should hold keys with values, such as 'kind: repeated_tokens', from line 1."
        )
    made = LinedMapping({str(key): value for key, value in found.items()})
    made.node = node
    return made


def _check_events(text: str, path: str) -> None:
    """Refuse deep nesting and too many aliases, before anything is built."""
    import yaml

    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = 1 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > _MAX_DEPTH:
            raise InputError(f"{path}, line {line}: more than {_MAX_DEPTH} levels deep.")
        if aliases > _MAX_ALIASES:
            raise InputError(f"{path}, line {line}: more than {_MAX_ALIASES} aliases (*name).")


def _check_nodes(root: Any, path: str) -> None:
    """Refuse duplicate keys, unreadable values, and aliases that expand too much."""
    from yaml import SafeLoader

    sizes: dict[int, int | None] = {}
    loader = SafeLoader("")

    def size(node: Any) -> int:
        line = node.start_mark.line + 1
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise InputError(f"{path}, line {line}: an alias (*name) holds itself.")
            return known
        sizes[id(node)] = None
        total = 1
        if node.id == "scalar" and node.tag.rpartition(":")[2] not in ("merge", "value"):
            try:
                loader.construct_object(node)
            except ValueError as error:
                said = f"{node.value[:40]!r} cannot be read ({error})"
                raise InputError(f"{path}, line {line}: {said}.") from error
        if node.id == "sequence":
            total += sum(size(one) for one in node.value)
        if node.id == "mapping":
            seen: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                if key.id == "scalar":
                    name, at = (key.tag, key.value), key.start_mark.line + 1
                    if name in seen:
                        raise InputError(
                            f"{path}, line {at}: the key {key.value[:40]!r} stands twice (also in "
                            f"line {seen[name]}): keep one."
                        )
                    seen[name] = at
                total += size(key) + size(value)
        if total > _MAX_NODES:
            raise InputError(f"{path}, line {line}: more than {_MAX_NODES} values with aliases.")
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root)


def _line_of_position(error: Exception, text: str) -> int:
    """Line of a character that YAML does not allow; 1 if unknown."""
    at = getattr(error, "position", None)
    return text[:at].count("\n") + 1 if isinstance(at, int) else 1


def _problem(error: Exception) -> str:
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(said).split())[:200]


def parse(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Validate plain values as a config.

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
        line = f", line {values.line(first['loc'])}" if isinstance(values, LinedMapping) else ""
        raise InputError(f"{where}{line}: {sentence}") from error


def _keys_beside(kind: type[BaseModel], place: list[str]) -> list[str]:
    """Valid keys at the place of an unknown one."""
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
