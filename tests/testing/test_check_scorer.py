"""``hs.testing.check_scorer`` passes every scorer that ships, and names what is wrong in others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.scorers import CATALOGUE, AttentionRows, Scorer
from headscope.testing import CheckError, check_scorer

# These ask of marked positions what lies over a thousand tokens back; tests/scorers has such texts.
FAR = ("streaming_gap", "long_need", "long_need_predicted", "long_need_predicted_local")


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in FAR])
def test_scorers_that_ship(name: str) -> None:
    assert len(check_scorer(CATALOGUE[name]).passed) == 11


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
