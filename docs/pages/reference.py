"""The API reference: one page per public module, from the public surface itself."""

import inspect
from types import ModuleType
from typing import Any

import headscope as hs
from docs.pages.write import heading, list_table

_TOP = "headscope"


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: its ``__all__``, else what it defines or re-exports from below."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith(module.__name__)
    ]


def reference_pages() -> dict[str, str]:
    """Pages by path below ``generated/``."""
    values = {name: getattr(hs, name) for name in hs._HOME}
    modules = {name: value for name, value in values.items() if inspect.ismodule(value)}
    own = {name: value for name, value in values.items() if name not in modules}
    pages = {f"reference/{name}.rst": _module(name, module) for name, module in modules.items()}
    pages["reference/top.rst"] = _top(own)
    rows = [["``hs``", ":doc:`top`", "loading, scoring, ablating; results"]]
    rows += [
        [f"``hs.{name}``", f":doc:`{name}`", _first(module)] for name, module in modules.items()
    ]
    toc = "\n".join(f"   {name}" for name in ["top", *modules])
    pages["reference/index.rst"] = (
        heading("API reference")
        + "\n``import headscope as hs`` and these names are what you may rely on; everything else "
        "may be rearranged.\n\n"
        + list_table(["", "page", "what"], rows)
        + f"\n.. toctree::\n   :hidden:\n\n{toc}\n"
    )
    return pages


def _first(value: Any) -> str:
    return (inspect.getdoc(value) or "").split("\n\n")[0].split(". ")[0].rstrip(".")


def _module(name: str, module: ModuleType) -> str:
    text = heading(f"hs.{name}") + "\n" + (inspect.getdoc(module) or "") + "\n\n"
    text += f".. currentmodule:: {module.__name__}\n\n"
    return text + "".join(
        _entry(one, getattr(module, one), again=one in hs._HOME) for one in public_names(module)
    )


def _top(values: dict[str, Any]) -> str:
    text = heading("headscope") + "\n.. currentmodule:: headscope\n\n"
    functions = {name: v for name, v in values.items() if inspect.isroutine(v)}
    for title, group in (
        ("Functions", functions),
        ("Results and values", {n: v for n, v in values.items() if n not in functions}),
    ):
        text += heading(title, "-") + "\n"
        text += "".join(_entry(name, value) for name, value in group.items())
    return text


def _entry(name: str, value: Any, *, again: bool = False) -> str:
    """One name; what is an instance (a metric, a catalogue) is told by its first sentence."""
    if inspect.isclass(value):
        if again:  # told in full on the page of the top names
            return f".. autoclass:: {name}\n   :no-index:\n\n"
        told = getattr(value, "_fields", ())  # of a NamedTuple: in the docstring already
        without = f"   :exclude-members: {', '.join(told)}\n" if told else ""
        return f".. autoclass:: {name}\n   :members:\n{without}\n"
    if inspect.isroutine(value):
        return f".. autofunction:: {name}\n\n"
    told = getattr(value, "description", None) or type(value).__name__
    return f".. data:: {name}\n   :no-index:\n\n   {told}\n\n"
