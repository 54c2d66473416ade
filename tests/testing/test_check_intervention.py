"""``hs.testing.check_intervention`` passes every edit, and names what is wrong in others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.edits import head_list
from headscope.testing import CheckError, check_intervention


def edits() -> dict[str, Callable[[Any], Any]]:
    model = hs.load()
    probe = hs.probes.repeated_tokens(model, length=6, batch=2)
    means = hs.ablation.head_means(model, probe)
    values = hs.ablation.head_values(model, probe.tokens.flip(0))
    patterns = hs.ablation.head_values(model, probe.tokens, site="pattern")
    marked = probe.mark("second_copy")
    return {
        "zero": hs.edits.zero,
        "zero_marked": lambda heads: hs.edits.zero(heads, positions=marked),
        "mean": lambda heads: hs.edits.mean(heads, means),
        "resample": lambda heads: hs.edits.resample(heads, values),
        "uniform": hs.edits.uniform,
        "freeze_pattern": lambda heads: hs.edits.freeze_pattern(heads, patterns),
        "attend_to_first": lambda heads: hs.edits.attend_to_first(heads, probe.real),
        "scale": lambda heads: hs.edits.scale(heads, 0.5),
    }


@pytest.mark.parametrize("name", edits())
def test_edits_that_ship(name: str) -> None:
    report = check_intervention(edits()[name])
    assert set(report.limited) <= {"pattern"}


def test_one_edit_alone() -> None:
    report = check_intervention(hs.edits.zero("L1H1"))
    assert set(report.limited) == {"other heads", "pattern", "replay"}


@dataclass(frozen=True)
class Own:
    """An edit of head outputs by a function of ``value`` and the head's number."""

    head: int
    change: Callable[[Tensor, int], Tensor]
    layers: frozenset[int]
    site: str = field(default="z")

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        return self.change(value, self.head)


def made(change: Callable[[Tensor, int], Tensor]) -> Callable[[Any], Own]:
    def make(heads: Any) -> Own:
        first = head_list(heads)[0]
        return Own(first.head, change, frozenset({first.layer}))

    return make


def in_place(value: Tensor, head: int) -> Tensor:
    value[:, :, head] = 0
    return value


def noise(value: Tensor, head: int) -> Tensor:
    changed = value.clone()
    changed[:, :, head] += torch.randn(value.shape[-1])
    return changed


def all_heads(value: Tensor, head: int) -> Tensor:
    return value - value.mean(2, keepdim=True)


def over_the_batch(value: Tensor, head: int) -> Tensor:
    changed = value.clone()
    changed[:, :, head] = value[:, :, head].mean(0)
    return changed


def over_positions(value: Tensor, head: int) -> Tensor:
    changed = value.clone()
    changed[:, :, head] = value[:, :, head].mean(1, keepdim=True)
    return changed


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (in_place, "pure"),
        (noise, "pure"),
        (all_heads, "other heads"),
        (over_the_batch, "batch size"),
        (over_positions, "padding"),
        (lambda value, head: value[:, 1:], "shape"),
        (lambda value, head: value / 0.0, "finite"),
    ],
)
def test_a_broken_rule_is_named(change: Any, check: str) -> None:
    report = check_intervention(made(change), raises=False)
    assert check in report.failed, str(report)
    with pytest.raises(CheckError, match="fails the check"):
        check_intervention(made(change))


@pytest.mark.parametrize("value", [hs.interventions.Zero(), hs.interventions.Scale(0.5)], ids=repr)
def test_values_are_checked_as_they_are(value: hs.interventions.Intervention) -> None:
    report = check_intervention(value)
    assert "replay" in report.passed
    assert not report.failed
