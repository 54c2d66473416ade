"""What every test stands on: no network, fixed seeds, few threads, fresh interpreters on demand."""

import os

# Before anything imports transformers, which reads these once.
os.environ.update(
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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]

# Put before code that runs in its own interpreter: whatever it does, it must not need a network.
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise RuntimeError("this code reached for the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""

# Files of few tests that take long; begun last, they would leave all workers but one idle.
LONGEST = (
    "sweeps/test_ray.py",
    "docs/test_pages.py",
    "sweeps/test_crash.py",
    "notebooks/test_notebooks.py",
    "docs/test_build.py",
    "retrieval/test_influence.py",
    "report/test_browser.py",
)

# Models here are tiny: threads cost more than they bring, and the workers fill the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, the rest as they were."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


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
