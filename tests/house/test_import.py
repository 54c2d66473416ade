"""Importing headscope changes nothing outside headscope, and loads nothing before it is needed."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

import headscope

PACKAGE = Path(headscope.__file__).parent
HEAVY = ("torch", "transformers", "transformer_lens", "plotly", "pandas", "numpy", "pyarrow")

# What a program that imports headscope would notice. Threads are counted by name, so that a
# library's own worker does not hide one of ours.
SNAPSHOT = """
import logging, os, random, sys, threading, warnings
def snapshot():
    state = dict(
        environment=dict(os.environ),
        hook=sys.excepthook,
        path=list(sys.path),
        warning_filters=list(warnings.filters),
        showwarning=warnings.showwarning,
        log_handlers=list(logging.getLogger().handlers),
        log_level=logging.getLogger().level,
        python_random=random.getstate(),
        threads=sorted(thread.name for thread in threading.enumerate()),
    )
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if numpy is not None:
        state.update(
            numpy_random=numpy.random.get_state()[1].tolist(),
            numpy_errors=numpy.geterr(),
            numpy_print=numpy.get_printoptions(),
        )
    if torch is not None:
        state.update(
            torch_random=torch.get_rng_state().tolist(),
            torch_dtype=torch.get_default_dtype(),
            torch_device=torch.get_default_device(),
            torch_grad=torch.is_grad_enabled(),
            torch_threads=torch.get_num_threads(),
            torch_precision=torch.get_float32_matmul_precision(),
            torch_deterministic=torch.are_deterministic_algorithms_enabled(),
            torch_backward=torch.Tensor.backward,
        )
    if "plotly.io" in sys.modules:
        import plotly.io
        state.update(
            plotly_template=plotly.io.templates.default,
            plotly_templates=sorted(plotly.io.templates),
            plotly_renderer=plotly.io.renderers.default,
        )
    if "pandas" in sys.modules:
        import pandas
        state.update(pandas_rows=pandas.get_option("display.max_rows"))
    if "transformers" in sys.modules:
        import transformers
        state.update(transformers_verbosity=transformers.logging.get_verbosity())
    return state

def assert_same(before, after):
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, changed
"""

# Everything but the command line's own entry and scripts that run when imported.
IMPORT_ALL = """
import importlib, pkgutil, headscope
for found in pkgutil.walk_packages(headscope.__path__, "headscope."):
    if not found.name.endswith("__main__") and ".training" not in found.name:
        importlib.import_module(found.name)
"""


def test_import_is_light_and_leaves_no_trace(run_python: Callable[[str], str]) -> None:
    printed = run_python(
        f"""{SNAPSHOT}
before = snapshot()
import headscope
assert_same(before, snapshot())
assert dir(headscope) and headscope.__version__
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY})))
"""
    )
    assert printed.split() == []


def test_importing_every_module_leaves_no_trace(run_python: Callable[[str], str]) -> None:
    run_python(
        f"""{SNAPSHOT}
import torch, numpy, pandas, pyarrow.parquet, scipy.stats, plotly.io, plotly.graph_objects
import transformers, transformer_lens, transformer_lens.model_bridge, typer, rich.console
plotly.io.templates.default, plotly.io.renderers.default  # both are looked up on first use
from transformers import AutoModelForCausalLM, AutoTokenizer
before = snapshot()
{IMPORT_ALL}
assert_same(before, snapshot())
"""
    )


def test_help_needs_no_torch(run_python: Callable[[str], str]) -> None:
    printed = run_python(
        f"""
import contextlib, io, sys
from headscope.cli import main
sys.argv = ["headscope", "--help"]
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    main()
assert "scan" in out.getvalue(), out.getvalue()
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY})))
"""
    )
    assert printed.split() == []


def test_type_checkers_and_python_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.test, ast.Name)
    )
    typed = {}
    for node in ast.walk(block):
        if isinstance(node, ast.ImportFrom):
            (name,) = node.names
            assert name.asname == name.name, "without `as`, a type checker takes it for private"
            is_module = node.module == "headscope"
            typed[name.name] = f"headscope.{name.name}" if is_module else node.module
    assert typed == headscope._HOME


@pytest.mark.parametrize("name", headscope._HOME)
def test_public_name_is_where_it_says(name: str) -> None:
    home = importlib.import_module(headscope._HOME[name])
    module_itself = home.__name__ == f"headscope.{name}"
    assert getattr(headscope, name) is (home if module_itself else getattr(home, name))
    assert name in dir(headscope)
    assert module_itself or not (PACKAGE / f"{name}.py").exists()
    assert module_itself or not (PACKAGE / name).exists()


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = headscope.nothing_here
