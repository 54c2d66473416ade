"""Curves: the metric against heads removed, what it costs, and that importance beats chance."""

from pathlib import Path

import numpy as np
import pandas
import pytest

import headscope as hs
from headscope.edits import zero
from headscope.errors import InputError, UnsupportedModelError
from headscope.pruning import (
    PruningCurve,
    ablation_importance,
    gradient_importance,
    greedy,
    measure_size,
    one_shot,
    prune,
    pruning_curve,
    random_order,
)
from headscope.table import OrderCurve
from tests.ablation.helpers import model_of, probe_of, whole_pass


def test_every_point_is_that_of_a_whole_pass(tmp_path: Path) -> None:
    model, probe = model_of("llama"), probe_of("left")
    orders = {"all": model.shape.heads, "few": ["L1H1", "L0H2"]}
    counts = [0, 2, 5, 12]
    curve = pruning_curve(
        model, probe, hs.metrics.loss, orders, counts=counts, random=2, seed=3, sizes=True
    )
    assert curve.effects.labels == (("all", "few", "random 3", "random 4"), ("0", "2", "5", "12"))
    assert curve.orders["random 4"] == random_order(model, 4)
    for i, order in enumerate(curve.orders.values()):
        for j, count in enumerate(counts):
            if count > len(order):
                assert np.isnan(curve.mean[i, j])
                continue
            edits = (zero(order[:count]),) if count else ()
            expected = whole_pass(model, probe, edits, hs.metrics.loss)
            np.testing.assert_allclose(curve.per_example[i, j], expected, atol=1e-4)
    size = measure_size(prune(model, orders["few"]), probe.tokens, probe.real)
    assert curve.sizes["few", 2].parameters == size.parameters
    assert curve.sizes["few", 2].flops == size.flops
    assert {arm for arm, _ in curve.sizes} == {"all", "few"}
    flops = [curve.sizes["all", count].flops for count in counts]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] > flops[-1]
    frame = curve.to_pandas()
    assert len(frame) == 4 + 2 + 4 + 4
    assert (frame.low <= frame["mean"] + 1e-9).all()
    assert (frame["mean"] <= frame.high + 1e-9).all()
    curve.save(tmp_path / "curve.csv")
    curve.save(tmp_path / "curve.parquet")
    again = pandas.read_parquet(tmp_path / "curve.parquet")
    np.testing.assert_allclose(again.effect, frame.effect)
    assert pandas.read_csv(tmp_path / "curve.csv").arm.tolist() == frame.arm.tolist()
    with pytest.raises(InputError, match="saved as"):
        curve.save(tmp_path / "curve.xlsx")
    same = PruningCurve.load(tmp_path / "curve.parquet")
    assert any(one.shared for one in curve.sizes.values())
    for name in ("orders", "controls", "sizes", "counts"):
        assert getattr(same, name) == getattr(curve, name)
    for name in ("per_example", "unedited"):
        np.testing.assert_array_equal(getattr(same.effects, name), getattr(curve.effects, name))
    for name in ("name", "axes", "labels", "unit", "description"):
        assert getattr(same.effects, name) == getattr(curve.effects, name)
    assert same.effects.provenance.to_json() == curve.effects.provenance.to_json()
    pandas.testing.assert_frame_equal(same.to_pandas(), frame)
    for name, message in (("curve.csv", "not a readable"), ("none", "no file")):
        with pytest.raises(InputError, match=message):
            PruningCurve.load(tmp_path / name)
    with pytest.raises(InputError, match="holds PruningCurve of format 1; here OrderCurve"):
        OrderCurve.load(tmp_path / "curve.parquet")
    frame.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="not a curve"):
        PruningCurve.load(tmp_path / "other.parquet")


def test_operations_are_counted_by_hand() -> None:
    model = model_of("gpt2")
    tokens = probe_of().tokens
    less = prune(model, ["L0H0", "L0H1"])
    whole, pruned = (measure_size(m, tokens) for m in (model.module, less))
    batch, length = tokens.shape
    shape = model.shape
    matrices = 4 * shape.d_model * shape.d_head * batch * length
    attention = 2 * batch * length * length * shape.d_head
    assert whole.flops - pruned.flops == 2 * 2 * (matrices + attention)
    assert whole.parameters == sum(p.numel() for p in model.module.parameters())


def test_what_does_not_fit_is_said_before_anything_runs() -> None:
    model, probe = model_of("gpt2"), probe_of()
    with pytest.raises(InputError, match="at least one order"):
        pruning_curve(model, probe, random=0)
    with pytest.raises(InputError, match="0 to 12 heads"):
        pruning_curve(model, probe, counts=[13])
    with pytest.raises(UnsupportedModelError, match="cannot be pruned"):
        pruning_curve(model_of("gptj"), probe, sizes=True)


def test_importance_keeps_a_trained_model_longer_than_chance() -> None:
    model = hs.load("tiny-gpt2")
    metric = hs.metrics.loss.at("second_copy")
    find, test = (
        hs.probes.repeated_tokens(model, length=15, batch=8, seed=seed) for seed in (1, 2)
    )
    orders = {
        "gradient": one_shot(gradient_importance(model, find, metric)),
        "ablation": one_shot(ablation_importance(model, find, metric)),
        "greedy": greedy(model, find, metric),
    }
    curve = pruning_curve(model, test, metric, orders, random=5)
    area = dict(zip(curve.effects.labels[0], curve.effects.mean.mean(1), strict=True))
    chance = min(area[name] for name in curve.controls)
    assert area["gradient"] < chance
    assert area["ablation"] < chance
    on_find = pruning_curve(model, find, metric, orders, random=1)
    area = dict(zip(on_find.effects.labels[0], on_find.effects.mean.mean(1), strict=True))
    assert area["greedy"] <= min(area["gradient"], area["ablation"])
