"""A real language model, where ``make test-real`` has put it: SmolLM2-135M-Instruct as GGUF."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import headscope as hs
from headscope.models.protocol import HeadModel

FIGURES = Path(__file__).with_name("figures.json")


@pytest.fixture(scope="session")
def file() -> Path:
    """The GGUF file below the folder that HEADSCOPE_REAL names."""
    place = os.environ.get("HEADSCOPE_REAL")
    found = sorted(Path(place).rglob("SmolLM2-135M-Instruct*.gguf")) if place else []
    if not found:
        pytest.fail("no model: run 'make test-real', which downloads it and says where it is")
    return found[0]


@pytest.fixture(scope="session")
def model(file: Path) -> HeadModel:
    """The model in fp32, from the GGUF file."""
    return hs.load(file)


@pytest.fixture(scope="session")
def folder(model: HeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a folder of transformers."""
    place = tmp_path_factory.mktemp("smollm2")
    model.module.save_pretrained(place)
    model.tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def eager(model: HeadModel) -> Any:
    """A second copy that knows nothing of headscope, with eager attention."""
    config = copy.deepcopy(model.module.config)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    plain.load_state_dict(model.module.state_dict())
    return plain.eval()


@pytest.fixture(scope="session")
def probe(model: HeadModel) -> hs.Probe:
    """Random tokens said twice."""
    return hs.probes.repeated_tokens(model, length=16, batch=3, seed=0)


@pytest.fixture(scope="session")
def stays() -> Callable[..., None]:
    """Compare a number with the committed figure of its name.

    Figures are shares of attention and nats, near 1: what rounding may move them by is 32 units
    of the last place of the dtype that they were computed in (instruction sets and threads move
    them by 5).
    """
    committed = json.loads(FIGURES.read_text(encoding="utf-8"))

    def check(name: str, found: Any, dtype: torch.dtype = torch.float32) -> None:
        expected = committed[name]
        if isinstance(expected, list):
            assert sorted(found) == sorted(expected), f"{name}: {found}"
            return
        tolerance = 32 * torch.finfo(dtype).eps
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), name

    return check
