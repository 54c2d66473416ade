"""Reads the package's sources and finds imports and words where they do not belong."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The floors of the house, ground floor first. Imports go strictly downwards.
FLOORS = (
    {"errors"},
    {"heads"},
    {"base"},
    {"views"},
    {"table", "metrics", "edits", "probes", "planning"},
    {"scorer", "plots", "models"},
    {"origin"},
    {"capture", "circuits"},
    {"scorers", "lens", "geometry", "alignment", "similarity", "syntax"},
    {"interventions"},
    {"ablation", "flow"},
    {"scoring"},
    {"pruning", "retrieval", "comparing", "edges", "relevance", "steering", "vision", "diffusion"},
    {"kinds", "training"},
    {"sweeps", "report", "testing", "compiled"},
    {"interactive", "studies"},
    {"cli"},
    {"__main__"},
)

_BASE = {"errors", "heads", "base"}
_TENSORS = _BASE | {"views"}
_SEES_MODELS = _TENSORS | {"edits", "probes", "table", "models", "origin"}
_RUNS_MODELS = _SEES_MODELS | {"metrics", "scorer", "scorers", "capture", "interventions"}

# Who may import whom. Floors alone would let `capture` import `scorers` or `sweeps` import
# `plots`; a new line here is a decision about the design, not a formality.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "heads": {"errors"},
    "base": {"errors", "heads"},
    "views": {"errors", "base"},
    "table": _BASE,
    "planning": {"base", "errors"},
    "metrics": {"base", "errors"},
    "edits": _BASE,
    "probes": {"base", "errors", "heads"},
    "scorer": _TENSORS | {"metrics", "probes"},
    "scorers": _TENSORS | {"metrics", "probes", "scorer", "circuits"},
    "plots": _BASE | {"table"},
    "models": _BASE | {"views", "edits"},
    "origin": {"probes", "table", "models"},
    "capture": _TENSORS | {"edits", "probes", "models"},
    "circuits": _TENSORS | {"probes", "table", "models", "origin", "scorer"},
    "compiled": _RUNS_MODELS
    | {"circuits", "lens", "flow", "scoring", "ablation", "pruning", "edges"},
    "alignment": _SEES_MODELS | {"capture"},
    "similarity": _SEES_MODELS | {"capture"},
    "syntax": _SEES_MODELS | {"capture"},
    "lens": _SEES_MODELS | {"capture"},
    "geometry": _SEES_MODELS | {"capture"},
    "scoring": _RUNS_MODELS - {"interventions"} | {"circuits", "ablation"},
    "interventions": _SEES_MODELS | {"capture"},
    "flow": _SEES_MODELS | {"capture", "lens"},
    "ablation": _RUNS_MODELS - {"scorer", "scorers"},
    "pruning": _RUNS_MODELS | {"scoring", "ablation"},
    "edges": _SEES_MODELS | {"metrics", "capture", "circuits"},
    "comparing": _RUNS_MODELS | {"circuits", "scoring"},
    "retrieval": _RUNS_MODELS | {"scoring", "ablation"},
    "relevance": _RUNS_MODELS | {"ablation", "lens"},
    "vision": _RUNS_MODELS | {"ablation"},
    "diffusion": _SEES_MODELS,
    "kinds": _RUNS_MODELS | {"ablation", "scoring", "relevance", "steering"},
    "steering": _RUNS_MODELS | {"ablation", "lens"},
    "training": _RUNS_MODELS | {"ablation", "pruning"},
    "sweeps": _RUNS_MODELS | {"circuits", "lens", "scoring", "ablation", "pruning", "edges"},
    "report": _BASE | {"table", "plots"},
    "interactive": _RUNS_MODELS | {"circuits", "scoring", "ablation", "report"},
    "cli": set().union(*FLOORS[:-2]),
    "testing": _RUNS_MODELS | {"circuits", "lens", "scoring", "ablation", "pruning"},
    "studies": _RUNS_MODELS
    | {"circuits", "lens", "geometry", "scoring", "ablation", "pruning", "retrieval", "alignment"}
    | {"comparing", "edges", "flow", "kinds", "relevance", "steering", "vision", "diffusion"}
    | {"plots", "report"},
    "__main__": {"cli"},
}

# testing/plain.py hooks a model on its own, to be independent of what it holds it against.
MODEL_FILES = r"models/(hf|bridge)/\w+\.py|testing/plain\.py"

# Modules are hooked in one place; everybody else hands functions to it.
HOOKING_FILES = r"models/hf/hooks\.py|testing/plain\.py"

# A library -> the files that may import it (patterns on the path below headscope/).
ONLY_IN = {
    "transformer_lens": r"models/bridge/model\.py",
    "plotly": r"(plots|report)/.*",
    "diffusers": r"diffusion\.py",
}
# A library -> the files that may not.
NOT_IN = {
    "torch": r"plots/.*|table\w*\.py|tables?/.*|heads\.py|errors\.py",
}

# Names of modules and hooks inside models, as words in strings or as attributes.
HOOK_WORDS = re.compile(
    r"""\b(?: hook_\w* | [qkvo]_proj | c_(?:attn|proj) | query_key_value | qkv_proj
      | self_attn(?:ention)? | embed_(?:tokens|positions|in|out) | lm_head | wte | wpe | ln_f
      | register_(?:full_)?(?:forward|backward)_(?:pre_)?hook )\b
      | \bblocks\. | \btransformer\.h\b | \bmodel\.layers\b""",
    re.VERBOSE,
)


# Private names that are not ours, by what has them. Those of transformers stand in one file.
TRANSFORMERS_API = "models/hf/transformers_api.py"
PRIVATE_NAMES = {
    "_asdict": "named tuples",
    "_fields": "named tuples",
    "_replace": "named tuples",
    "_backward_hooks": "torch",
    "_buffers": "torch",
    "_forward_hooks": "torch",
    "_forward_pre_hooks": "torch",
    "_orig_mod": "torch",
    "_standard_gamma": "torch",
    "_hf_hook": "accelerate",
}


class Found(NamedTuple):
    """Something out of place."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        """One line, clickable in most terminals."""
        return f"headscope/{self.file}:{self.line}: {self.what}"


def violations(package: Path) -> list[Found]:
    """Everything out of place in the sources below ``package``, which is named headscope."""
    found: list[Found] = []
    trees = {
        path.relative_to(package).as_posix(): ast.parse(path.read_text("utf-8"), str(path))
        for path in sorted(package.rglob("*.py"))
    }
    own = set().union(*map(names_given, trees.values()))
    for file, tree in trees.items():
        for line, module in imports(tree, file):
            found += check_import(file, line, module)
        if not re.fullmatch(MODEL_FILES, file):
            found += hook_words(tree, file)
        if not re.fullmatch(HOOKING_FILES, file):
            found += hooking(tree, file)
        if file != TRANSFORMERS_API:
            found += (
                Found(file, line, f"{name} is private to another library: {TRANSFORMERS_API}")
                for line, name in private_names(tree)
                if name not in own and name not in PRIVATE_NAMES
            )
    return found


def names_given(tree: ast.AST) -> set[str]:
    """Names that a file gives to functions, classes, variables, and attributes of its classes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg is not None:  # __dict__.update(_own=...)
            found.add(node.arg)
    return found


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private attributes that are read or set, by a dot or by name as in ``getattr``."""
    for node in ast.walk(tree):
        word: object = None
        if isinstance(node, ast.Attribute):
            word = node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            word = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        if isinstance(word, str) and re.fullmatch(r"_(?!_)\w+", word):
            yield node.lineno, word


def unit(parts: tuple[str, ...]) -> str:
    """The floor plan's name for a module: ``("models", "hf")`` -> ``"models"``."""
    return parts[0] if parts else "__init__"


def imports(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """Every imported module by its absolute name, wherever in the file the import stands."""
    package = ("headscope", *Path(file).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            if module == "headscope":  # the names may be modules
                yield from ((node.lineno, f"headscope.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def check_import(file: str, line: int, module: str) -> Iterator[Found]:
    """What is wrong with one import."""
    top, *rest = module.split(".")
    if top == "headscope":
        yield from check_floor(file, line, unit(tuple(rest)))
    only = ONLY_IN.get(top)
    if only and not re.fullmatch(only, file):
        yield Found(file, line, f"imports {top}, which belongs to {only}")
    banned = NOT_IN.get(top)
    if banned and re.fullmatch(banned, file):
        yield Found(file, line, f"imports {top}, which this file must do without")


def check_floor(file: str, line: int, target: str) -> Iterator[Found]:
    """What is wrong with importing ``target``, a module directly under headscope."""
    source = unit(Path(file).with_suffix("").parts)
    if source in ("__init__", target) or target == "__version__":
        return
    if source not in ALLOWED:
        yield Found(file, line, f"{source} has no place in tests/house/layers.py yet")
    elif target not in ALLOWED[source]:
        what = "the public surface" if target == "__init__" else target
        yield Found(file, line, f"{source} imports {what}, which its floor plan does not allow")


def hooking(tree: ast.AST, file: str) -> Iterator[Found]:
    """Calls that hook a module."""
    for node in ast.walk(tree):
        word = node.attr if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"register_(full_)?(forward|backward)_(pre_)?hook", word):
            yield Found(file, node.lineno, f"{word!r} may be called in {HOOKING_FILES} only")


def hook_words(tree: ast.AST, file: str) -> Iterator[Found]:
    """Names of modules and hooks in strings and attributes; docstrings may speak of them."""
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            word = node.value
        elif isinstance(node, ast.Attribute):
            word = node.attr
        else:
            continue
        match = HOOK_WORDS.search(word)
        if match:
            yield Found(file, node.lineno, f"{match[0]!r} may be written in {MODEL_FILES} only")
