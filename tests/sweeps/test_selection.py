"""Sets of heads, resolved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headscope as hs
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.scorers import CATALOGUE
from headscope.sweeps.config import OWN_SCORES, HeadSet, MetricConfig
from headscope.sweeps.plan import Cell, Rankings, cells
from headscope.table import HeadScores, HeadTable

VALUES = np.arange(12.0).reshape(3, 4)
VALUES[1, 1] = np.nan


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return hs.load()


def chosen(model: HeadModel, *sets: dict[str, Any]) -> list[tuple[int, str]]:
    """Draw and heads of every cell; scores are those above."""
    made = tuple(HeadSet.model_validate({"name": f"s{i}"} | one) for i, one in enumerate(sets))
    found: tuple[Cell, ...] = cells(model, made, lambda _: VALUES)
    return [(cell.draw, " ".join(map(str, cell.heads))) for cell in found]


def test_all_layers_and_lists(model: HeadModel) -> None:
    assert [heads for _, heads in chosen(model, {})] == [str(head) for head in model.shape.heads]
    assert [heads for _, heads in chosen(model, {"layers": [2]})] == [
        "L2H0",
        "L2H1",
        "L2H2",
        "L2H3",
    ]
    together = {"heads": ["2.1", "L0H3", "2.1"], "arrange": "together"}
    assert chosen(model, together) == [(0, "L0H3 L2H1")]


def test_ranked_sets_take_the_extremes_and_never_nan(model: HeadModel) -> None:
    assert chosen(model, {"score": "entropy", "top": 2, "arrange": "together"}) == [
        (0, "L2H2 L2H3")
    ]
    smallest = {"score": "entropy", "order": "smallest", "arrange": "cumulative"}
    curve = chosen(model, smallest)
    assert [len(heads.split()) for _, heads in curve] == list(range(12))
    assert curve[2][1] == "L0H0 L0H1"
    assert "L1H1" not in curve[-1][1]


def test_curves_with_steps_start_at_none_and_end_at_all(model: HeadModel) -> None:
    curve = chosen(model, {"arrange": "cumulative", "steps": 4})
    assert [len(heads.split()) for _, heads in curve] == [0, 3, 6, 9, 12]


def test_draws_are_seeded_and_exclude(model: HeadModel) -> None:
    sets = (
        {"random": 3, "draws": 8, "not_in": "s1", "arrange": "together"},
        {"score": "entropy", "top": 4, "arrange": "together"},
    )
    first = chosen(model, *sets)
    assert first == chosen(model, *sets)
    taken = set(first[-1][1].split())
    drawn = [set(heads.split()) for _, heads in first[:-1]]
    assert [draw for draw, _ in first[:-1]] == list(range(8))
    assert all(len(draw) == 3 and not draw & taken for draw in drawn)
    assert len({frozenset(draw) for draw in drawn}) > 4
    other = chosen(model, sets[0] | {"seed": 1}, sets[1])
    assert other != first


def test_random_orders_hold_every_head(model: HeadModel) -> None:
    curves = chosen(model, {"random": "all", "draws": 2, "arrange": "cumulative", "steps": 1})
    assert [len(set(heads.split())) for _, heads in curves] == [0, 12, 0, 12]
    assert curves[1][1] != curves[3][1]


@pytest.fixture(scope="module")
def probes(model: HeadModel) -> dict[str, hs.Probe]:
    return {
        "short": hs.probes.repeated_tokens(model, length=6, batch=3),
        "ioi": hs.probes.pairs(model, "ioi", batch=3),
    }


def test_scores_are_measured_on_the_model_or_read_from_a_table(
    model: HeadModel, probes: dict[str, hs.Probe], tmp_path: Path
) -> None:
    loss = Rankings(model, probes).of("short", MetricConfig(metric="loss"))
    table = hs.score(model, scorers=["induction"])
    found = loss(HeadSet(name="a", score="induction"))
    np.testing.assert_array_equal(found, table["induction"].mean)
    file = tmp_path / "table.parquet"
    HeadTable([HeadScores.from_summary("mine", VALUES, kv_heads=4)]).save(file)
    np.testing.assert_array_equal(loss(HeadSet(name="a", score="mine", table=file)), VALUES)
    other = tmp_path / "other.parquet"
    HeadTable([HeadScores.from_summary("mine", VALUES[:2], kv_heads=4)]).save(other)
    with pytest.raises(InputError, match="2 layers"):
        loss(HeadSet(name="a", score="mine", table=other))


RANKED: dict[str, Callable[[HeadModel, hs.Probe, Any], np.ndarray]] = {
    "attribution": lambda m, p, metric: abs(hs.estimate_heads(m, p, metric).mean),
    "gradient_importance": lambda m, p, metric: hs.pruning.gradient_importance(m, p, metric).mean,
    "confidence": lambda m, p, _: hs.pruning.confidence(m, p).mean,
    "output_norm": lambda m, p, _: hs.pruning.output_norm(m, p).mean,
    "weight_norm": lambda m, *_: hs.pruning.weight_norm(m).mean,
}


@pytest.mark.parametrize("name", OWN_SCORES)
def test_own_rankings_are_those_of_the_functions(
    model: HeadModel, probes: dict[str, hs.Probe], name: str
) -> None:
    rankings, found = Rankings(model, probes), set()
    for label, probe in probes.items():
        for metric in ("loss", "answer_probability"):
            ranking = rankings.of(label, MetricConfig(metric=metric))
            values = ranking(HeadSet(name="a", score=name))
            expected = RANKED[name](model, probe, getattr(hs.metrics, metric))
            np.testing.assert_allclose(values, expected, atol=1e-6)
            found.add(values.tobytes())
    assert len(found) == len(rankings.known) == 2 ** len(OWN_SCORES[name])


def test_rankings_and_scorers_have_different_names() -> None:
    assert not OWN_SCORES.keys() & CATALOGUE.keys()


def test_heads_that_are_not_there_are_refused(model: HeadModel) -> None:
    for one in ({"heads": ["L9H0"]}, {"layers": [7]}, {"random": 13}):
        with pytest.raises(InputError):
            chosen(model, one)
    assert HeadIndex(0, 0) in model.shape.heads
