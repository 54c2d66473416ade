"""Check annotated types and shapes at run time, in every function of headscope.

What jaxtyping's own import hook does, at a fraction of its cost: it calls a stub for the arguments,
then the function, then a stub for arguments and result, and writes and compiles both stubs anew
whenever a function within a function is defined. Here beartype wraps the function itself, once, and
only annotations with shapes open a scope in which one name of an axis means one size.
"""

import ast
import inspect
import sys
from collections.abc import Sequence
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from types import CodeType, FunctionType, ModuleType
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, config, jaxtyped

_CONF = BeartypeConf(violation_type=TypeCheckError)
_made: dict[CodeType, tuple[dict[str, Any], FunctionType, bool]] = {}


def checked(target: Any) -> Any:
    """Wrap a function, or what constructs a dataclass, in checks of its annotations."""
    if inspect.isclass(target):
        if isinstance(start := target.__dict__.get("__init__"), FunctionType):
            target.__init__ = checked(start)
        return target
    if not isinstance(target, FunctionType) or not target.__annotations__:
        return target
    if inspect.isgeneratorfunction(target):
        return jaxtyped(target, typechecker=beartype)  # beartype alone waits for the first value
    typed, has_shapes = _typed(target)
    if not has_shapes:
        return typed

    @wraps(target)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        if config.jaxtyping_disable:
            return target(*args, **kwargs)
        with jaxtyped("context"):
            return typed(*args, **kwargs)

    return scoped


def _typed(target: FunctionType) -> tuple[Any, bool]:
    """A function under beartype, and whether an annotation has a shape.

    Wrappers are kept by code: of a function within a function there are many.
    """
    if target.__code__ in _made:
        annotations, typed, has_shapes = _made[target.__code__]
        if annotations == target.__annotations__:
            return _rewrapped(typed, target), has_shapes
    annotations = {name: _resolved(hint, target) for name, hint in target.__annotations__.items()}
    known = _copied(target)
    known.__annotations__ = annotations
    typed = beartype(conf=_CONF)(known)
    has_shapes = any(map(_has_shape, annotations.values()))
    if typed is not known:
        _made[target.__code__] = target.__annotations__, typed, has_shapes
    return typed, has_shapes


def _copied(function: FunctionType, **kwdefaults: Any) -> FunctionType:
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = ((function.__kwdefaults__ or {}) | kwdefaults) or None
    copy.__dict__.update(function.__dict__)
    copy.__annotations__ = function.__annotations__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    copy.__doc__, copy.__type_params__ = function.__doc__, getattr(function, "__type_params__", ())
    return copy


def _rewrapped(typed: FunctionType, target: FunctionType) -> FunctionType:
    """The wrapper of a function's code around another function of this code."""
    wrapper = _copied(typed, __beartype_func=target)
    wrapper.__wrapped__ = target
    return wrapper


def _resolved(hint: Any, target: FunctionType) -> Any:
    """An annotation whose names are looked up; Any where one is not known, or not yet."""
    holder = FunctionType((lambda: None).__code__, target.__globals__)
    holder.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(holder, include_extras=True)["hint"]
    except Exception:
        return Any


def _has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else get_args(hint)
    return any(map(_has_shape, parts))


class _Decorating(ast.NodeVisitor):
    """Puts the decorator nearest to every function, and furthest from every class."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        node.decorator_list.append(_decorator(node))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        node.decorator_list.insert(0, _decorator(node))
        self.generic_visit(node)


def _decorator(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.Name("__checked__", ast.Load()), node)


class _Loader(SourceFileLoader):
    def source_to_code(  # type: ignore[override]
        self, data: Any, path: Any, *, _optimize: int = -1
    ) -> CodeType:
        tree = ast.parse(data, path)
        _Decorating().visit(tree)
        return compile(tree, path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname: str) -> CodeType | None:
        """Compile a module, or read it compiled, from a file beside that of unchecked code."""
        kept = partial(cache_from_source, optimization="checked")
        with patch("importlib._bootstrap_external.cache_from_source", kept):
            return super().get_code(fullname)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__checked__"] = checked
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """Check every function of a package that is imported from here on."""
    early = sorted(name for name in sys.modules if f"{name}.".startswith(f"{package}."))
    if early:
        raise RuntimeError(f"imported before their functions could be checked: {early}")
    sys.meta_path.insert(0, _Finder(package))
