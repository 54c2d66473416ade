"""Every public function has an example in its docstring, and every example runs.

Examples may use ``hs``, ``torch``, ``np``, and what most of them need: ``model`` (the bundled
tiny-gpt2), ``probe`` (two examples of random tokens said twice) and ``table`` (its scores).
"""

import doctest
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs

ROOT = Path(__file__).parents[2]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
# Modules that are being built: their public functions may still lack examples.
WITHOUT: tuple[str, ...] = ()

MODULES = [
    found.name
    for found in pkgutil.walk_packages([str(Path(hs.__path__[0]))], "headscope.")
    if not found.name.endswith("__main__") and ".training" not in found.name
]


def public_functions() -> dict[str, Any]:
    """Functions of the public surface: names of ``hs`` and of its public modules."""
    found = {}
    for name in hs._HOME:
        value = getattr(hs, name)
        members = {name: value}
        if inspect.ismodule(value):
            own = [one for one in vars(value) if one[0] != "_"]
            names = getattr(value, "__all__", own)
            members = {f"{name}.{one}": getattr(value, one) for one in names}
            members = {k: v for k, v in members.items() if _is_of(v, value)}
        for full, member in members.items():
            if inspect.isfunction(member) and member.__module__.startswith("headscope"):
                found[full] = member
    return found


def _is_of(member: Any, module: Any) -> bool:
    """Whether a member comes from this module or below it, or is offered in its ``__all__``."""
    home = getattr(member, "__module__", "") or ""
    return hasattr(module, "__all__") or home.startswith(module.__name__)


@cache
def given() -> dict[str, Any]:
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=10, batch=2)
    table = hs.score(model, probe, ["previous_token", "induction"])
    return {"hs": hs, "torch": torch, "np": np, "model": model, "probe": probe, "table": table}


def test_every_public_function_has_an_example() -> None:
    functions = public_functions()
    bare = {
        name: one for name, one in functions.items() if ">>>" not in (inspect.getdoc(one) or "")
    }
    assert len(functions) > 80
    assert not [name for name, one in bare.items() if not one.__module__.startswith(WITHOUT)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    wrong: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module):
        if not example.examples:
            continue
        example.globs = vars(module) | given()
        doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(example, out=wrong.append)
    assert not wrong, "".join(wrong)
