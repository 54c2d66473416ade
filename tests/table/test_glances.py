"""What curves, comparisons and tables of layers say as the last value of a notebook cell."""

from typing import Any

import numpy as np
import pytest

from headscope.base.specs import ScoreSpec
from headscope.heads import HeadIndex
from headscope.table import EffectGrid, HeadTable, OrderCurve
from headscope.table.comparing import Comparison, Emergence
from headscope.table.lens import LayerMeasure, LayerTable
from tests.table.helpers import scores


def curve() -> OrderCurve:
    order = tuple(HeadIndex(0, head) for head in range(4))
    counts = tuple(str(count) for count in range(5))
    effects = np.arange(10.0).reshape(2, 5, 1).repeat(3, 2)
    grid = EffectGrid(
        ScoreSpec("masking"), ("arm", "masked"), (("<best>", "r0"), counts), effects, np.ones(3)
    )
    return OrderCurve(grid, {"<best>": order, "r0": order[::-1]}, ("r0",))


def comparison() -> Comparison:
    pair = (HeadIndex(0, 1), HeadIndex(2, 3))
    first, second = np.array([[0.25, 0.5]]), np.array([[0.5, 0.25 + 0.5]])
    none = np.full((1, 2), np.nan)
    facts = (
        ("induction", "<i>"),
        first,
        second + np.array([[0.0, 0.25]]),
        none,
        none,
        (True, True),
        none,
        none,
        none,
    )
    return Comparison(("old", "new"), (pair,), np.array([0.75]), "correlation", *facts)


def story() -> Emergence:
    tables = [HeadTable([scores("induction", [[value]], threshold=0.4)]) for value in (0.0, 0.5, 1)]
    return Emergence("toy", ("s1", "s2", "<s3>"), tuple(tables))


def layers() -> LayerTable:
    measures = [
        LayerMeasure(ScoreSpec(f"m{at}", "nats"), np.full((3, 2), float(at))) for at in range(8)
    ]
    return LayerTable(("embed", "L0", "L1"), tuple(measures))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (curve, ["masking along 2 orders", "up to 4 heads masked", "r0 (control)  6", "10"]),
        (comparison, ["old with new", "1 pairs", "100%", "L0H1", "L2H3", "<i> 0.5 to 1"]),
        (story, ["3 checkpoints, toy", "induction  L0H0  0", "s2", "story.findings()"]),
        (layers, [f"m{at}" for at in range(8)]),
    ],
)
def test_they_say_what_they_are_and_what_comes_next(made: Any, told: list[str]) -> None:
    text, page = repr(made()), made()._repr_html_()
    for one in [*told, "to_pandas()"]:
        assert one in text
    assert "object at 0x" not in text + page
    assert "array(" not in text + page
    for tag in ("<best>", "<i>", "<s3>"):
        assert tag not in page
