"""Promises about the whole repository: safe loading, honest metadata."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import headscope
from tests.conftest import LONGEST

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "headscope"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FETCHES = {"requests", "urllib", "urllib3", "httpx", "http", "socket"}
# An import name that is not its distribution's name.
DISTRIBUTION = {
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "PIL": "pillow",
}  # pydantic pins its core
# Comes with transformers and says so in transformers' own interface.
VIA_TRANSFORMERS = {"tokenizers", "huggingface_hub"}


def unsafe(source: str) -> Iterator[str]:
    """Every place in a source where foreign data could run as code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(node):
                if name in RUNS_CODE:
                    yield f"line {node.lineno}: imports {name}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in ("eval", "exec"):
                yield f"line {node.lineno}: {called}"
            if called == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if re.fullmatch(r"yaml\.(load|load_all|unsafe_load\w*|full_load\w*)", called):
                yield f"line {node.lineno}: {called} instead of yaml.safe_load"
            for risk in ("allow_pickle", "trust_remote_code"):
                if given.get(risk) == "True":
                    yield f"line {node.lineno}: {risk}=True"


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Top-level names of what an import statement imports; nothing for relative imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [] if node.level or not node.module else [node.module.split(".")[0]]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_runs_foreign_data(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval('1')",
        "np.load(path, allow_pickle=True)",
        "from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_unsafe_code_is_recognised(source: str) -> None:
    assert list(unsafe(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(path, weights_only=True)", "yaml.safe_load(text)"]
)
def test_safe_code_is_let_through(source: str) -> None:
    assert list(unsafe(source)) == []


def test_pictures_and_reports_fetch_nothing() -> None:
    for path in (*PACKAGE.glob("plots/**/*"), *PACKAGE.glob("report/**/*")):
        if path.suffix not in {".py", ".html", ".js", ".css"}:
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(?:src|href|url|fetch|import)\W{1,3}(?:https?:)?//""", text), path
        assert not re.search(r"""include_plotlyjs\s*=\s*["']cdn""", text), path
        if path.suffix == ".py":
            nodes = ast.walk(ast.parse(text))
            names = {
                n
                for node in nodes
                if isinstance(node, ast.Import | ast.ImportFrom)
                for n in imported(node)
            }
            assert not names & FETCHES, path


def test_every_library_used_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    optional = (one for name in extras if name != "dev" for one in extras[name])
    declared = {Requirement(one).name for one in (*PROJECT["dependencies"], *optional)}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                used = set(imported(node)) - sys.stdlib_module_names - {"headscope"}
                needed = {DISTRIBUTION.get(name, name) for name in used - VIA_TRANSFORMERS}
                missing = {name.replace("_", "-") for name in needed} - declared
                assert not missing, f"{path}:{node.lineno}"


def test_version_is_stated_once_in_effect() -> None:
    assert PROJECT["version"] == headscope.__version__
    assert importlib.metadata.version("headscope") == headscope.__version__


def test_lock_is_portable_and_satisfies_pyproject() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    locked = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in (pin.split("==") for pin in pins)
    }
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-"))]
    # The first of each Python: distributions keep what they began with.
    for one in importlib.metadata.distributions():
        if re.sub(r"[-_.]+", "-", one.name).lower() in locked:
            allowed = SpecifierSet(one.metadata.get("Requires-Python") or "")
            assert all(python in allowed for python in ("3.11.0", "3.12.0", "3.13.0")), one.name
    extras = PROJECT["optional-dependencies"]
    for text in (
        *PROJECT["dependencies"],
        *(one for name in ("dev", "docs", "gguf", "paper", "polars") for one in extras[name]),
    ):
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[wanted.name.lower()]), text


def test_the_house_stays_small() -> None:
    # A concept joins the file where it belongs: each further file makes the house harder to know.
    assert 100 < len(SOURCES) <= 220


def test_most_functions_are_short() -> None:
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert median(lengths) < 15


def imports(body: list[ast.stmt]) -> Iterator[str]:
    """What a module imports as it is loaded: modules, and names that may be modules."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from imports(node.body)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def circle(graph: dict[str, set[str]]) -> set[str]:
    """Modules on circles of imports, or between two: what is left without leaves and roots."""
    while True:
        needed = set().union(*graph.values())
        left = {
            name: {one for one in of if one in graph and one != name}
            for name, of in graph.items()
            if name in needed and any(one in graph and one != name for one in of)
        }
        if left == graph:
            return set(left)
        graph = left


def test_no_modules_import_each_other() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
    }
    graph = {
        name: set(imports(ast.parse(path.read_text(encoding="utf-8")).body))
        # A package is loaded before its modules, and names that it passes on are not taken from it.
        - {one for one in names if names[one].name == "__init__.py" and name.startswith(one)}
        for name, path in names.items()
    }
    assert not circle(graph)


def test_a_circle_of_imports_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
    assert not circle({"a": {"b", "os"}, "b": {"c"}, "c": set()})


CHANGES = ("append", "add", "update", "setdefault", "pop", "clear", "extend", "remove", "insert")
# Which configs and passes have our attention right now: transformers' registry is global too.
OPEN_SCOPES = {"_ROUTES", "_SWITCHED"}


def state(source: str) -> Iterator[str]:
    """Names of a module's values that its functions change, but for caches with weak keys."""
    tree = ast.parse(source)
    held = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and "Weak" not in ast.unparse(node)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        own = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield from node.names
            target = None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                target = node.value
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in CHANGES else None
            if isinstance(target, ast.Name) and target.id in held - own:
                yield target.id


def test_modules_hold_no_state_but_caches_with_weak_keys() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in SOURCES
        for name in state(path.read_text(encoding="utf-8"))
        if name not in OPEN_SCOPES
    }
    assert not found


def test_state_of_a_module_is_found() -> None:
    assert list(state("A = {}\ndef f(x):\n    A[x] = 1")) == ["A"]
    assert list(state("A = []\ndef f(x):\n    A.append(x)")) == ["A"]
    assert list(state("A = 0\ndef f(x):\n    global A\n    A = x")) == ["A"]
    assert not list(state("A = WeakKeyDictionary()\ndef f(x):\n    A[x] = 1"))
    assert not list(state("A = {}\ndef f(x):\n    A = {}\n    A[x] = 1"))


def test_the_longest_tests_are_there() -> None:
    assert not [name for name in LONGEST if not (ROOT / "tests" / name).is_file()]
