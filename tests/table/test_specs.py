import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headscope as hs
from headscope.base.specs import ScoreSpec
from headscope.table import EffectGrid, HeadScores, HeadTable, OrderCurve, PairScores
from headscope.table.lens import LayerTable
from tests.table.helpers import scores

SPEC = ScoreSpec("share", "part", (0.0, 1.0), "higher", "a paper", 0.5, description="More of it.")


def test_a_result_holds_the_declaration_that_it_was_given() -> None:
    one = HeadScores.from_examples(SPEC, np.full((1, 2, 3), 0.25), kv_heads=2)
    assert one.spec is SPEC
    assert (one.name, one.unit, one.bounds, one.source) == ("share", "part", (0.0, 1.0), "a paper")
    assert (one.threshold, one.alternative, one.description) == (0.5, "greater", "More of it.")


def test_what_is_tested_follows_the_bounds_unless_it_is_said() -> None:
    assert ScoreSpec("x").tested == "two-sided"
    assert ScoreSpec("x", bounds=(0.0, None)).tested == "greater"
    assert ScoreSpec("x", bounds=(None, 0.0)).tested == "greater"
    assert ScoreSpec("x", bounds=(0.0, None), alternative="two-sided").tested == "two-sided"


def test_files_hold_the_declaration(tmp_path: Path) -> None:
    one = HeadScores.from_examples(SPEC, np.full((1, 2, 3), 0.25), kv_heads=2)
    HeadTable([one]).save(tmp_path / "table.parquet")
    again = HeadTable.load(tmp_path / "table.parquet")["share"].spec
    assert again == ScoreSpec(**{**SPEC.to_json(), "bounds": (0.0, 1.0)})
    one.save(tmp_path / "one.safetensors")
    assert HeadScores.load(tmp_path / "one.safetensors").spec == SPEC


def test_a_declaration_is_json_and_comes_back() -> None:
    again = ScoreSpec.from_json(json.loads(json.dumps(SPEC.to_json())))
    assert again.tested == SPEC.tested
    assert (again.name, again.bounds, again.direction) == ("share", (0.0, 1.0), "higher")


def test_files_of_the_first_version_are_read() -> None:
    one = scores(threshold=0.5)
    flat: dict[str, Any] = {
        "name": "old",
        "unit": "nats",
        "bounds": (0.0, None),
        "description": "d",
    }
    flat |= {"source": "s", "threshold": 0.1, "alternative": "greater"}
    parts = {"summary": one.numbers, "kv_heads": one.kv_heads, **flat}
    assert HeadScores._of_parts(parts).spec == ScoreSpec(**flat)


def test_files_that_say_the_parts_of_a_declaration_apart_are_read(tmp_path: Path) -> None:
    """Written before these results held a :class:`ScoreSpec`."""
    folder = Path(__file__).parent / "older"
    effect = ScoreSpec("zero_ablation", "nats", description="loss less loss")
    pair = ScoreSpec("K_composition", "share", (0.0, 1.0), source="a paper", description="read")
    curved = ScoreSpec("curvature", "radians", (0.0, None), source="a paper", description="turns")
    grid = EffectGrid.load(folder / "grid.safetensors")
    assert (grid.spec, grid.clusters, grid.provenance.model) == (effect, (0, 0, 1), "m")
    np.testing.assert_array_equal(grid.per_example, np.arange(6.0).reshape(2, 3))
    pairs = PairScores.load(folder / "pairs.safetensors")
    assert (pairs.spec, pairs.upward, pairs.values[1, 1, 1, 1]) == (pair, False, 15.0)
    layers = LayerTable.load(folder / "layers.parquet")
    assert layers["curvature"].spec == curved
    np.testing.assert_array_equal(layers["curvature"].per_text, [[0.5, np.nan], [1.0, 2.0]])
    curve = OrderCurve.load(folder / "curve.parquet")
    assert curve.effects.spec == replace(effect, name="pruning")
    np.testing.assert_array_equal(curve.effects.per_example, np.arange(12.0).reshape(2, 2, 3))
    for result, name in ((grid, "x.safetensors"), (layers, "x.parquet"), (curve, "y.parquet")):
        result.save(tmp_path / name)
    assert EffectGrid.load(tmp_path / "x.safetensors").spec == effect
    again = LayerTable.load(tmp_path / "x.parquet")["curvature"].spec
    assert again == replace(curved, alternative="greater")  # what is tested is written out
    kept = OrderCurve.load(tmp_path / "y.parquet").effects.spec
    assert kept == replace(effect, name="pruning", alternative="two-sided")


def test_effects_are_tested_against_none_at_all() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(1.0, 0.1, (1, 2, 20))
    effects[0, 1] = np.nan
    one = HeadScores.from_effects(SPEC, effects, kv_heads=2)
    assert one.alternative == "two-sided"
    np.testing.assert_array_equal(one.null, [[0.0, np.nan]])
    same = HeadScores.from_examples(
        "x", effects, kv_heads=2, control_per_example=np.array([[[0.0], [np.nan]]])
    )
    np.testing.assert_array_equal(one.p_value, same.p_value)
    assert one.p_value[0, 0] < 1e-6


@pytest.mark.parametrize("name", ["ScoreSpec", "HeadScores"])
def test_declarations_are_public(name: str) -> None:
    assert getattr(hs, name).__name__ == name
