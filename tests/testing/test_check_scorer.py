"""``hs.testing.check_scorer`` passes every scorer that ships, and names what is wrong in others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.scorers import CATALOGUE, AttentionRows, Scorer
from headscope.testing import CheckError, check_scorer

# These ask of marked positions what lies over a thousand tokens back; tests/scorers has such texts.
FAR = ("streaming_gap", "long_need", "long_need_predicted", "long_need_predicted_local")


MARKED = ("separator",)


def test_a_scorer_of_marks_is_checked_on_a_probe_that_has_them() -> None:
    probe = hs.probes.repeated_tokens(hs.load(), length=9, batch=4)
    marks = {**probe.marks, "separator": probe.real & (probe.position_in_text % 4 == 3)}
    assert check_scorer(CATALOGUE["separator"], replace(probe, marks=marks))


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in FAR + MARKED])
def test_scorers_that_ship(name: str) -> None:
    checks = 6 if CATALOGUE[name].kind == "weight" else 11
    checks -= 2 * ("patches" in CATALOGUE[name].needs)  # images have no padding
    assert len(check_scorer(CATALOGUE[name]).passed) == checks


def broken_by_weights() -> list[tuple[str, Scorer]]:
    def made(function: Callable[[Any], Tensor], **declared: Any) -> Scorer:
        return hs.weight_scorer(description="Breaks a rule.", **declared)(function)

    return [
        ("shape", made(lambda weights: weights.ov.norm()[:, 0])),
        ("finite", made(lambda weights: weights.ov.norm() / 0)),
        ("bounds", made(lambda weights: weights.ov.norm(), bounds=(None, 0.0))),
        ("pure", made(lambda weights: torch.rand(weights.ov.norm().shape))),
        ("one head", made(lambda weights: weights.ov.norm() / weights.ov.norm().sum())),
    ]


@pytest.mark.parametrize(("check", "scorer"), broken_by_weights())
def test_a_broken_rule_of_a_weight_scorer_is_named(check: str, scorer: Scorer) -> None:
    assert check in check_scorer(scorer, raises=False).failed


def _scorer(function: Callable[[AttentionRows, Any], Tensor], **declared: Any) -> Scorer:
    function.__doc__ = "A scorer that breaks a rule."
    return hs.row_scorer(**declared)(function)


def broken() -> list[tuple[str, Scorer]]:
    def writes(rows: AttentionRows, probe: Any) -> Tensor:
        rows.pattern[..., 0] = 0
        return rows.pattern.amax(-1)

    def draws(rows: AttentionRows, probe: Any) -> Tensor:
        return torch.rand(rows.pattern.shape[:-1])

    def leaves_bounds(rows: AttentionRows, probe: Any) -> Tensor:
        return rows.pattern.amax(-1) + 1

    def mixes_examples(rows: AttentionRows, probe: Any) -> Tensor:
        return rows.pattern.amax(-1) - rows.pattern.amax(-1).mean(0) / 2

    def reads_column_zero(rows: AttentionRows, probe: Any) -> Tensor:
        return rows.pattern[..., 0]  # not the first token under left padding

    def ranks_in_its_chunk(rows: AttentionRows, probe: Any) -> Tensor:
        return rows.pattern.amax(-1) / rows.pattern.amax(-1).amax(-1, keepdim=True)

    def knows_its_head(rows: AttentionRows, probe: Any) -> Tensor:
        heads = torch.arange(rows.pattern.shape[1])[:, None] / 10
        return rows.pattern.amax(-1) * heads

    def infinite(rows: AttentionRows, probe: Any) -> Tensor:
        return rows.pattern.amax(-1) / 0.0

    def one_a_head(rows: AttentionRows, probe: Any) -> Tensor:
        return rows.pattern.amax((-1, -2))

    return [
        ("pure", _scorer(writes)),
        ("pure", _scorer(draws)),
        ("bounds", _scorer(leaves_bounds)),
        ("batch size", _scorer(mixes_examples, bounds=(None, None))),
        ("padding left", _scorer(reads_column_zero)),
        ("chunks", _scorer(ranks_in_its_chunk)),
        ("heads", _scorer(knows_its_head)),
        ("finite", _scorer(infinite)),
        ("shape", _scorer(one_a_head)),
        ("declared", _scorer(lambda rows, probe: rows.pattern.amax(-1), bounds=(1.0, 0.0))),
    ]


@pytest.mark.parametrize(("check", "scorer"), broken())
def test_a_broken_rule_is_named(check: str, scorer: Scorer) -> None:
    report = check_scorer(scorer, raises=False)
    assert check in report.failed, str(report)
    with pytest.raises(CheckError, match="fails the check"):
        check_scorer(scorer)
