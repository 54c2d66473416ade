"""What every test stands on: no network, fixed seeds, few threads, fresh interpreters on demand."""

# ruff: noqa: E402  some things must be set before what reads them is imported
import gc
import os

# Imports and tests make millions of objects that stay; looking through them for cycles again and
# again is a tenth of the time. What is left of a test is found a little later.
gc.set_threshold(20_000, 20, 20)

# Models here are tiny: threads cost more than they bring, and the workers fill the cores. What a
# test starts in a process of its own inherits it.
os.environ.setdefault("HEADSCOPE_TEST_THREADS", "1")
# Before anything imports torch or transformers, which read these once.
os.environ.update(
    OMP_NUM_THREADS=os.environ["HEADSCOPE_TEST_THREADS"],
    HEADSCOPE_CACHE="off",  # models are proved each time
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)

import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checked import install

ROOT = Path(__file__).parents[1]

# Every annotated shape and type is checked, in tests only; users pay nothing.
install("headscope")

# Put before code that runs in its own interpreter: whatever it does, it must not need a network.
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise RuntimeError("this code reached for the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""

# Files of few tests that take long; begun last, they would leave all workers but one idle.
LONGEST = (
    "docs/test_pages.py",
    "sweeps/test_ray.py",
    "sweeps/test_crash.py",
    "notebooks/test_notebooks.py",
    "docs/test_build.py",
    "retrieval/test_influence.py",
    "report/test_browser.py",
)

# Marker -> the files and folders that it stands for, less those after a "!". `pytest -m fast` is
# what to run while writing, `-m numeric` what may depend on the processor, `-m real` needs a
# model's weights.
MARKED = {
    "fast": (
        *("base/test_stacks.py", "table", "plots", "test_errors.py", "test_metrics.py"),
        *("!plots/test_export.py", "!plots/test_flow_plots.py", "!plots/test_text.py"),
        *("circuits/test_orthogonal.py", "circuits/test_spectrum.py", "scorers/test_formulas.py"),
    ),
    "numeric": (
        *("ablation", "capture", "circuits", "scorers", "scoring", "test_metrics.py"),
        *("edges/test_attribute.py", "flow/test_flow.py", "geometry/test_measures.py"),
        *("lens/test_attribution.py", "lens/test_logit_lens.py", "models/test_attention.py"),
        *("models/test_blocks.py", "models/test_bridge_weights.py"),
        *("models/test_unembedding.py", "pruning/test_structure.py"),
    ),
    "real": ("real",),
}

torch.set_num_threads(int(os.environ["HEADSCOPE_TEST_THREADS"]))


def markers_of(path: Path) -> set[str]:
    """Markers that a test file or folder has by its place."""
    return {
        marker
        for marker, names in MARKED.items()
        if _stands_in(path, [name for name in names if name[0] != "!"])
        and not _stands_in(path, [name[1:] for name in names if name[0] == "!"])
    }


def _stands_in(path: Path, names: list[str]) -> bool:
    return any(path.is_relative_to(ROOT / "tests" / name) for name in names)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import nothing that is not asked for: most of the time of a few fast tests would be that."""
    wanted = config.option.markexpr
    found = markers_of(collection_path)
    if "real" in found and wanted != "real":
        return True
    if collection_path.is_dir():
        return None
    only = collection_path.name.startswith("test_") and wanted in MARKED and wanted not in found
    return True if only else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, the rest as they were; markers by place."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
    for item in items:
        for marker in markers_of(item.path):
            item.add_marker(marker)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every search for cycles, and keep names."""
    gc.collect()
    gc.freeze()
    # plotly splits the names of properties anew at each use, the same few thousand times over.
    if (plotly := sys.modules.get("plotly.basedatatypes")) is not None:
        plotly._str_to_dict_path_full = cache(plotly._str_to_dict_path_full)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random state for every test, in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let no test connect anywhere but to this computer (notebook kernels talk over loopback)."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or str(address[0]) in {"127.0.0.1", "::1"}
        if not local:
            raise RuntimeError(f"a test reached for the network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Run code in a fresh interpreter without a network; gives what it printed."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", NO_NETWORK + code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(autouse=True, scope="module")
def _shared_models_stay_as_they_are() -> Iterator[None]:
    """Models of one process are shared by its test files, so that none may write to them."""
    yield
    built = sys.modules.get("tests.models.families")
    changed = [] if built is None else built.changed()
    assert not changed, f"this file wrote to shared models: {changed}; take families.fresh"
