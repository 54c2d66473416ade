"""Checks of the arguments of public functions against their annotations, before anything runs."""

import inspect
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from numbers import Real
from typing import (
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import numpy as np
from jaxtyping import AbstractArray

from headscope.errors import InputError, nearest, whole

F = TypeVar("F", bound=Callable[..., Any])
# Says why a value is not of a kind; None if it is.
ArgumentCheck = Callable[[str, Any], str | None]

OPTIONS = ("batch_size", "memory", "seed", "progress")
PROBE = (
    "make one with hs.probes, for example hs.probes.text(model, texts) or "
    "hs.probes.from_tokens(ids)"
)
# What people often give in place of what a function needs: a word for it, what only it has, advice.
HANDED = {
    "HeadModel": ("a loaded model", "limits", "give what hs.load returns"),
    "HasVocabulary": ("a loaded model", "shape", "give what hs.load returns"),
    "Probe": ("a probe", "tokens", PROBE),
}
AS_LIST = {int: "[0, 1]", float: "[0.1, 0.2]", str: "['first', 'second']"}


def checked(function: F) -> F:
    """Make a public function refuse arguments of the wrong kind in one sentence.

    Numbers, texts, choices, models, probes, results and lists of them are checked against the
    function's annotations when it is called; annotations of other types are left to the function.
    Options of a run (``batch_size``, ``memory``, ``seed``, ``progress``) are checked as
    :class:`~headscope.base.options.RunOptions` does.

    Raises:
        InputError: from the decorated function, with the argument's name and value.

    Example:
        >>> @checked
        ... def half(count: int) -> float:
        ...     return count / 2
        >>> half("x")
        Traceback (most recent call last):
        headscope.errors.InputError: count='x': give a whole number.
    """
    names = tuple(inspect.signature(function).parameters)

    @wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        checks = _checks(function)
        options = {}
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in checks and (why := checks[name](name, value)):
                raise InputError(why)
            if name in OPTIONS and name in checks and value is not None:
                options[name] = value
        if options:
            _check_options(options)
        return function(*args, **kwargs)

    return cast(F, refusing)


def check_methods(kind: type) -> None:
    """Make the public methods of a class check their arguments, as :func:`checked` does.

    Example:
        >>> class Ranking:
        ...     def top(self, k: int = 10) -> list[int]:
        ...         return list(range(k))
        >>> check_methods(Ranking)
        >>> Ranking().top("x")
        Traceback (most recent call last):
        headscope.errors.InputError: k='x': give a whole number.
    """
    for name, method in list(vars(kind).items()):
        function = method.__func__ if isinstance(method, classmethod | staticmethod) else method
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        bound = 0 if isinstance(method, staticmethod) else 1
        if len(inspect.signature(function).parameters) > bound:
            made = checked(function)
            setattr(kind, name, made if function is method else type(method)(made))


def _check_options(options: dict[str, Any]) -> None:
    from headscope.base.options import RunOptions  # not above: it imports torch, pictures do not

    RunOptions(**options)


@cache
def _checks(function: Callable[..., Any]) -> dict[str, ArgumentCheck]:
    """The checks of a function's arguments, by name; annotations are read at the first call."""
    known = {}
    for name, parameter in inspect.signature(function).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and (check := _check(_hint(parameter.annotation, function))):
            known[name] = check
    return known


def _hint(annotation: Any, function: Callable[..., Any]) -> Any:
    """An annotation whose names are looked up; Any where a name is known to type checkers only."""
    if not isinstance(annotation, str):
        return annotation
    holder = type("Holder", (), {"__annotations__": {"hint": annotation}})
    try:
        known = inspect.unwrap(function).__globals__
        return get_type_hints(holder, known, include_extras=True)["hint"]
    except NameError:
        return Any


def _check(hint: Any) -> ArgumentCheck | None:
    """The check of an annotation; None if it admits what is not looked at here."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _union([_check(member) for member in get_args(hint)], hint)
    if origin is Literal:
        return _choice(get_args(hint))
    if hint in _PLAIN:
        return _PLAIN[hint]
    if inspect.isclass(origin) and issubclass(origin, os.PathLike):
        return _path
    if inspect.isclass(origin) and issubclass(origin, Iterable):
        return _several(origin, get_args(hint))
    if inspect.isclass(hint):
        return _instance(hint)
    return None


def _union(checks: list[ArgumentCheck | None], hint: Any) -> ArgumentCheck | None:
    """The check of a union: a value is refused where every member refuses it."""
    if None in checks:
        return None
    members = cast(list[ArgumentCheck], checks)
    optional = types.NoneType in get_args(hint)
    told = [check for check in members if check is not _PLAIN[types.NoneType]]
    lists = [
        check
        for check, member in zip(members, get_args(hint), strict=True)
        if (kind := get_origin(member)) and inspect.isclass(kind) and issubclass(kind, Iterable)
    ]

    def check(name: str, value: Any) -> str | None:
        if optional and value is None:
            return None
        why = [check(name, value) for check in told]
        if None in why:
            return None
        if len(why) == 1:
            return why[0]
        if isinstance(value, list | tuple) and len(lists) == 1:
            return lists[0](name, value)  # says which of its values is wrong
        return f"{_given(name, value)}: give {_words(hint)}."

    return check


def _words(hint: Any) -> str:
    """An annotation as a message says it."""
    if get_origin(hint) in (Union, types.UnionType):
        *most, last = dict.fromkeys(_words(member) for member in get_args(hint))
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint in _WORDS:
        return _WORDS[hint]
    origin = get_origin(hint)
    if inspect.isclass(origin) and issubclass(origin, tuple):
        return "a tuple"
    if inspect.isclass(origin) and issubclass(origin, os.PathLike):
        return "a path"
    if inspect.isclass(origin) and issubclass(origin, Iterable):
        if issubclass(origin, Mapping):
            return "a mapping"
        elements = get_args(hint)
        return f"a list of {_MANY.get(elements[0], 'them')}" if elements else "a list"
    if inspect.isclass(hint) and (issubclass(hint, AbstractArray) or _is_tensor(hint)):
        return "a tensor"
    name = getattr(hint, "__name__", str(hint))
    return HANDED[name][0] if name in HANDED else _a(name)


def _is_tensor(kind: type) -> bool:
    # By name: pictures are drawn without torch.
    return (kind.__module__, kind.__name__) == ("torch", "Tensor")


def _given(name: str, value: Any) -> str:
    """An argument as a message says it, large values by their type."""
    shown = repr(value)
    if len(shown) <= 60 and "\n" not in shown:
        return f"{name}={shown}"
    return f"{name} is {_a(type(value).__name__)}"


def _a(noun: str) -> str:
    """A noun with its article."""
    return f"an {noun}" if noun[0].lower() in "aeio" else f"a {noun}"


def _whole(name: str, value: Any) -> str | None:
    try:
        whole(value, name)
    except InputError as error:
        return str(error)
    return None


def _real(name: str, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        return f"{_given(name, value)}: give a number."
    return None


def _truth(name: str, value: Any) -> str | None:
    good = isinstance(value, bool | np.bool_)
    return None if good else f"{_given(name, value)}: give True or False."


def _text(name: str, value: Any) -> str | None:
    return None if isinstance(value, str) else f"{_given(name, value)}: give a text."


def _path(name: str, value: Any) -> str | None:
    return None if isinstance(value, os.PathLike) else f"{_given(name, value)}: give a path."


def _nothing(name: str, value: Any) -> str | None:
    return None if value is None else f"{_given(name, value)}: give None."


def _array(name: str, value: Any) -> str | None:
    plain = isinstance(value, str | bytes | Real | dict | set) or value is None
    texts = isinstance(value, list | tuple) and any(isinstance(one, str) for one in value)
    return f"{_given(name, value)}: give a tensor." if plain or texts else None


def _mapping(name: str, value: Any) -> str | None:
    if isinstance(value, Mapping):
        return None
    return f"{_given(name, value)}: give a mapping, as {name}={{'name': ...}}."


_PLAIN: dict[Any, ArgumentCheck] = {
    int: _whole, float: _real, bool: _truth, str: _text, types.NoneType: _nothing, None: _nothing,
    np.ndarray: _array,
}  # fmt: skip
_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text",
    types.NoneType: "None", np.ndarray: "an array",
}  # fmt: skip
_MANY: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


def _choice(options: tuple[Any, ...]) -> ArgumentCheck:
    """The check of a value out of a few."""

    def check(name: str, value: Any) -> str | None:
        if any(
            value is option or (type(value) is type(option) and value == option)
            for option in options
        ):
            return None
        return nearest(value, map(str, options), kind=name)

    return check


def _several(origin: type, elements: tuple[Any, ...]) -> ArgumentCheck | None:
    """The check of a list, tuple or mapping, and of the plain values in it."""
    if issubclass(origin, Mapping):
        return _mapping
    if not elements or issubclass(origin, str):
        return None
    element = _PLAIN.get(elements[0])
    example = AS_LIST.get(elements[0], "[...]")

    def check(name: str, value: Any) -> str | None:
        letters = element is not None and isinstance(value, str | bytes)
        if letters or not hasattr(type(value), "__iter__"):
            return f"{_given(name, value)}: give a list, as {name}={example}."
        if element and isinstance(value, list | tuple):
            bad = next((part for part in value if element(name, part)), None)
            if bad is not None:
                return f"{_given(name, value)}: {bad!r} is not {_words(elements[0])}."
        return None

    return check


def _instance(kind: type) -> ArgumentCheck | None:
    """The check of an object of a class of headscope; other classes are left to the function."""
    if kind.__name__ in HANDED and kind.__module__.startswith("headscope"):
        what, sign, advice = HANDED[kind.__name__]

        def handed(_: str, value: Any) -> str | None:
            if hasattr(type(value), sign) or sign in getattr(value, "__dict__", ()):
                return None
            given = repr(value) if isinstance(value, str) and what != "a probe" else None
            return f"{given or f'a {type(value).__name__}'} is not {what}: {advice}."

        return handed
    if issubclass(kind, AbstractArray) or _is_tensor(kind):
        return _array
    if is_typeddict(kind):
        return _mapping
    if issubclass(kind, os.PathLike):
        return _path
    if not kind.__module__.startswith("headscope") or Protocol in kind.__bases__:
        return None
    return lambda name, value: (
        None if isinstance(value, kind) else f"{_given(name, value)}: give {_a(kind.__name__)}."
    )
