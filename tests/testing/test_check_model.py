"""``hs.testing.check_model`` passes what is right, and names what is wrong."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.models.hf.model import HFModel
from headscope.testing import CheckError, check_model
from tests.models.families import fresh


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
def test_what_is_right_passes(family: str) -> None:
    report = check_model(fresh(family))
    assert len(report.passed) == 19, str(report)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "bloom"])
def test_what_is_limited_says_why(family: str) -> None:
    report = check_model(fresh(family))
    assert report
    assert {"rows", "head outputs", "zero ablation", "attribution"} <= set(report.passed)
    assert all(reason.endswith(".") for reason in report.limited.values())
    if family == "gemma2":
        assert set(report.limited) == {"write"}


def _wrapped(change: Callable[[HFModel], None]) -> Any:
    model = hs.load(fresh("llama"))
    change(model)
    return model


def _double_write(model: HFModel) -> None:
    parts = model.layout.layers
    for layer, part in list(parts.items()):
        parts[layer] = replace(part, write_scale=2.0)


def _other_outputs(model: HFModel) -> None:
    run = model.run

    def wrong(batch: Any, *, reads: Any = (), **kwargs: Any) -> Tensor | None:
        louder = {tap: _louder(tap, read) for tap, read in dict(reads).items()}
        return run(batch, reads=louder, **kwargs)

    model.run = wrong


def _louder(tap: Any, read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reader that is shown head outputs a tenth too large."""
    return lambda view: read(replace(view, seen=view.seen * 1.1) if tap[0] == "z" else view)


def _position_bound(model: HFModel) -> None:
    run = model.run

    def wrong(batch: Any, **kwargs: Any) -> Tensor | None:
        return run(getattr(batch, "tokens", batch), **kwargs)  # padding is not said

    model.run = wrong


def _leaves_a_trace(model: HFModel) -> None:
    run = model.run

    def wrong(batch: Any, **kwargs: Any) -> Tensor | None:
        model.module.seen = [*getattr(model.module, "seen", ()), batch]
        setattr(model.module, f"pass_{len(model.module.seen)}", 0)
        return run(batch, **kwargs)

    model.run = wrong


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_double_write, "write"),
        (_other_outputs, "head outputs"),
        (_position_bound, "padding left"),
        (_leaves_a_trace, "restored"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[HFModel], None], check: str) -> None:
    report = check_model(_wrapped(change), raises=False)
    assert check in report.failed, str(report)
    with pytest.raises(CheckError, match="LlamaForCausalLM fails the check '"):
        check_model(_wrapped(change))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_check_leaves_the_model_as_it_was(family: str) -> None:
    module = fresh(family)
    before = copy.deepcopy(module.state_dict())
    check_model(module)
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = [
        (name, hook)
        for name, part in module.named_modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ]
    # transformers puts these on blocks when hidden states are first asked for, and leaves them.
    own = "install_output_capuring_hook"
    assert all(hook.__qualname__.startswith(own) for _, hook in kept), kept
