"""Check annotated types and shapes at run time, in every function of headscope.

What jaxtyping's own import hook does, at a fraction of its cost: it calls a stub for the arguments,
then the function, then a stub for arguments and result, and writes and compiles both stubs anew
whenever a function within a function is defined. Here beartype wraps the function itself, once, and
only annotations with shapes open a scope in which one name of an axis means one size. What is asked
most often is answered here: whether an array fits plain axes, and whether a type that was found to
have the members of a protocol still does. jaxtyping and typing answer the rest.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from types import CodeType, FunctionType, GeneratorType, ModuleType
from typing import Any, NamedTuple, Protocol, get_args, get_origin, get_type_hints
from unittest.mock import patch

import typing_extensions
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, _array_types, _storage, config
from jaxtyping._storage import pop_shape_memo, push_shape_memo

_CONF = BeartypeConf(violation_type=TypeCheckError)
_made: dict[CodeType, tuple[dict[str, Any], FunctionType, bool]] = {}
_stubs: dict[CodeType, FunctionType] = {}


def checked(target: Any) -> Any:
    """Wrap a function, or what constructs a dataclass, in checks of its annotations."""
    if inspect.isclass(target):
        if isinstance(start := target.__dict__.get("__init__"), FunctionType):
            target.__init__ = checked(start)
        return target
    if not isinstance(target, FunctionType) or not target.__annotations__:
        return target
    if inspect.isgeneratorfunction(target):
        return _generator(target)
    typed, has_shapes = _typed(target)
    if not has_shapes:
        return typed

    @wraps(target)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        if config.jaxtyping_disable:
            return target(*args, **kwargs)
        push_shape_memo({})
        try:
            return typed(*args, **kwargs)
        finally:
            pop_shape_memo()

    return scoped


def _generator(target: FunctionType) -> Any:
    """A generator function whose arguments are checked when it is called.

    beartype alone waits until the first value is asked for. A function that takes the same and does
    nothing is checked in its place.
    """
    if (stub := _stubs.get(target.__code__)) is None:
        stub = _stubs[target.__code__] = _stub(target)
    admits = checked(_copied_stub(stub, target))

    @wraps(target)
    def generator(*args: Any, **kwargs: Any) -> Any:
        if not config.jaxtyping_disable:
            admits(*args, **kwargs)
        return target(*args, **kwargs)

    return generator


def _stub(target: FunctionType) -> FunctionType:
    """A function that takes what a generator function takes, and does nothing."""
    result = _resolved(target.__annotations__.get("return", Any), target)
    kind = get_origin(result) or result
    if kind is not Any and not issubclass(GeneratorType, kind):
        raise TypeCheckError(f"{target.__qualname__} gives a generator, not {result}")
    signature = inspect.signature(target)
    plain = [
        one.replace(annotation=one.empty, default=one.empty if one.default is one.empty else None)
        for one in signature.parameters.values()
    ]
    bare = signature.replace(parameters=plain, return_annotation=signature.empty)
    scope: dict[str, Any] = {}
    exec(f"def stub{bare}: pass", scope)  # noqa: S102
    made: FunctionType = scope["stub"]
    return made


def _copied_stub(stub: FunctionType, target: FunctionType) -> FunctionType:
    known = FunctionType(
        stub.__code__, target.__globals__, target.__name__, target.__defaults__, None
    )
    known.__kwdefaults__ = target.__kwdefaults__
    known.__annotations__ = {
        name: hint for name, hint in target.__annotations__.items() if name != "return"
    }
    known.__qualname__, known.__module__ = target.__qualname__, target.__module__
    return known


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


class _Plan(NamedTuple):
    """What fits an annotation with plain axes: its class, its axes by name or size, the rest."""

    array_type: Any
    of_type: Any  # the same annotation of any shape
    types: dict[Any, bool]  # the data types met so far, and whether they fit
    before: tuple[str | int | None, ...]
    after: tuple[str | int | None, ...]
    rest: str | None  # "" for axes without a name, None where there are none


@cache
def _plan(kind: Any) -> _Plan | None:
    """The plan of an annotation; None where an axis is one of jaxtyping's special ones."""
    dims, at = kind.dims, kind.index_variadic
    known = [_axis(dim) for dim in dims]
    if kind.array_type is Any or Any in known or kind.dtypes != kind.dtype.dtypes:
        return None
    any_shape = kind.dtype[kind.array_type, "..."]
    if at is None:
        return _Plan(kind.array_type, any_shape, {}, tuple(known), (), None)
    rest = known[at] or ""
    return _Plan(
        kind.array_type, any_shape, {}, tuple(known[:at]), tuple(known[at + 1 :]), str(rest)
    )


def _axis(dim: Any) -> Any:
    """The name or size of an axis, None for an axis without a name, Any for a special one."""
    if isinstance(dim, _array_types._AnonymousDim | _array_types._AnonymousVariadicDim):
        return None
    if getattr(dim, "broadcastable", True) or getattr(dim, "treepath", False):
        return Any
    return getattr(dim, "name", getattr(dim, "size", Any))


def _fits(kind: Any, value: Any) -> bool:
    """Whether an array is of an annotation, as jaxtyping finds it."""
    plan = None if kind is AbstractArray else _plan(kind)
    stack = getattr(_storage._shape_storage, "memo_stack", None)
    if plan is None or kind._skip_instancecheck or _storage.get_treeflatten_memo():
        return _jaxtyping_finds(kind, value)
    if not isinstance(value, plan.array_type):
        return False
    if (typed := plan.types.get(value.dtype)) is None:
        typed = plan.types[value.dtype] = _jaxtyping_finds(plan.of_type, value)
    shape, n_before, n_after = value.shape, len(plan.before), len(plan.after)
    n_rest = len(shape) - n_before - n_after
    if not typed or n_rest < 0 or (n_rest and plan.rest is None):
        return False
    sizes, shapes = stack[-1][:2] if stack else ({}, {})
    new: dict[str, int] = {}
    for axis, size in zip(
        plan.before + plan.after, shape[:n_before] + shape[n_before + n_rest :], strict=True
    ):
        if axis is None:
            continue
        expected = axis if type(axis) is int else sizes.get(axis, new.get(axis))
        if expected is None:
            new[axis] = size
        elif expected != size:
            return False
    if plan.rest:
        found = shape[n_before : n_before + n_rest]
        broadcast, expected = shapes.get(plan.rest, (False, found))
        if broadcast:
            return _jaxtyping_finds(kind, value)
        if expected != found:
            return False
        shapes[plan.rest] = (False, found)
    sizes.update(new)
    return True


_jaxtyping_finds: Callable[[Any, Any], bool] = type(AbstractArray).__instancecheck__


def _quick_protocols(metaclass: Any) -> None:
    """Ask a protocol's own check once for a class; then only for what instances hold."""
    whole = metaclass.__instancecheck__
    held: dict[tuple[Any, type], tuple[str, ...]] = {}  # members that are not of the class

    def has_members(kind: Any, value: Any) -> bool:
        at = (kind, type(value))
        if at in held:
            own = getattr(value, "__dict__", ())
            if all(name in own for name in held[at]):
                return True
        good: bool = whole(kind, value)
        if good and getattr(kind, "_is_protocol", False):
            of_class = {name for one in type(value).__mro__ for name in vars(one)}
            held[at] = tuple(_members(kind) - of_class)
        return good

    metaclass.__instancecheck__ = has_members


def _members(protocol: type) -> set[str]:
    return set(typing_extensions.get_protocol_members(protocol))


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
    type(AbstractArray).__instancecheck__ = _fits
    for metaclass in {type(Protocol), type(typing_extensions.Protocol)}:
        _quick_protocols(metaclass)
