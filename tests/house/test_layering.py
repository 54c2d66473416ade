"""The floors of the house hold: who may import whom, and which words stand where."""

from dataclasses import is_dataclass
from itertools import takewhile
from pathlib import Path

import pytest

from tests.house.layers import ALLOWED, FLOORS, unit, violations

PACKAGE = Path(__file__).parents[2] / "headscope"


def test_sources_keep_to_the_floor_plan() -> None:
    found = violations(PACKAGE)
    assert not found, "\n" + "\n".join(map(str, found))


def test_every_module_has_a_place() -> None:
    units = {
        unit(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
    }
    assert units - set(ALLOWED) <= {"__init__"}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_imports_go_strictly_downwards(name: str) -> None:
    below = set().union(*takewhile(lambda floor: name not in floor, FLOORS))
    assert ALLOWED[name] <= below
    assert name in set().union(*FLOORS)


PLANTED = {
    # file: (source, what the finding must say)
    "capture.py": ("from headscope.scorers.catalogue import row_scorer", "capture imports scorers"),
    "scorers/mine.py": ("def f():\n    import headscope.table as t", "scorers imports table"),
    "scorers/rel.py": ("from ..models.hf import HFModel", "scorers imports models"),
    "sweeps/run.py": ("from headscope import plots", "sweeps imports plots"),
    "lens/direct.py": ("import headscope", "lens imports the public surface"),
    "novelty.py": ("from headscope import heads", "novelty has no place"),
    "models/loading.py": ("import transformer_lens.model_bridge", "imports transformer_lens"),
    "models/late.py": ("def f():\n    from plotly import express", "imports plotly"),
    "plots/heatmap.py": ("import torch.nn as nn", "imports torch"),
    "table.py": ("from torch import Tensor", "imports torch"),
    "tables/wide.py": ("import torch", "imports torch"),
    "ablation.py": ("HOOK = 'hook_z'", "'hook_z'"),
    "circuits/ov_qk.py": ("def f(m):\n    return m.self_attn.o_proj", "'o_proj'"),
    "scoring/score.py": (
        "def f(m, g):\n    m.register_forward_pre_hook(g)",
        "register_forward_pre_hook",
    ),
    "models/hf/late.py": ("def f(m, g):\n    m.register_forward_hook(g)", "may be called in"),
    "models/loading/late.py": ("def f(c):\n    return c._attn_implementation", "_attn_impl"),
    "models/bridge/late.py": ("def f(c):\n    return getattr(c, '_commit_hash')", "_commit_hash"),
    "models/bundled/card.py": ("names = f'{1}.embed_tokens'", "'embed_tokens'"),
}


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_violation_is_found(file: str, tmp_path: Path) -> None:
    source, expected = PLANTED[file]
    planted = tmp_path / "headscope" / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    found = violations(tmp_path / "headscope")
    assert any(expected in str(one) for one in found), found


FINE = {
    "models/bridge/model.py": "import transformer_lens\nx = 'blocks.0.hook_resid_pre'",
    "models/hf/layout.py": "from headscope.views import AttentionRows\nx = 'self_attn.o_proj'",
    "models/bridge/train.py": "def f(m):\n    return m.lm_head",
    "report/page.py": "from plotly import graph_objects\nfrom headscope.plots import heatmap",
    "scoring/score.py": '"""Unlike hook_z, ..."""\nfrom headscope import __version__, capture',
    "probes/needle.py": "from .probe import Probe\nfrom headscope.probes.probe import Probe as P",
    "__init__.py": "from headscope.cli import main",
}


@pytest.mark.parametrize("file", FINE)
def test_what_is_allowed_is_not_found(file: str, tmp_path: Path) -> None:
    written = tmp_path / "headscope" / file
    written.parent.mkdir(parents=True)
    written.write_text(FINE[file])
    assert violations(tmp_path / "headscope") == []


# What these rooms return that is no result: models, inputs, maps into a vocabulary.
NO_RESULTS = {
    "Clip",
    "Diffusion",
    "ImageKeys",
    "Sentence",
    "Treebank",
    "ResidualLens",
    "AttentionLens",
}
ROOMS = ("vision", "alignment", "similarity", "syntax", "lens", "diffusion", "comparing")


@pytest.mark.parametrize("room", ROOMS)
def test_results_of_public_functions_can_be_shown_and_saved(room: str) -> None:
    """Each has a glance, sections, columns, ``save`` and ``load``, and comes back as it was."""
    import importlib
    import inspect
    from typing import get_args, get_type_hints

    from headscope.base.result import Result

    module = importlib.import_module(f"headscope.{room}")
    wanted = {"load", *(name for name in vars(Result) if name.islower() and name[0] != "_")}
    assert {"glance", "summary", "sections", "columns", "to_pandas", "save"} <= wanted
    seen = 0
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("_") or not function.__module__.startswith(f"headscope.{room}"):
            continue
        found = get_type_hints(function).get("return")
        for kind in (found, *get_args(found)):
            ours = inspect.isclass(kind) and kind.__module__.startswith("headscope.")
            if not ours or not is_dataclass(kind) or kind.__name__ in NO_RESULTS:
                continue
            missing = sorted(one for one in wanted if not hasattr(kind, one))
            assert not missing, f"{kind.__name__}, which {room}.{name} returns, has no {missing}"
            assert "_repr_html_" in dir(kind)
            made = inspect.unwrap(kind.__repr__).__code__.co_filename  # "<string>": of all fields
            assert made != "<string>", f"{kind.__name__} prints its arrays"
            seen += 1
    assert seen
