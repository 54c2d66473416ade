"""Orders of pruning: by a score, in steps, greedily, at random."""

from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope.ablation.groups import Sets
from headscope.ablation.run import Measurement, Metricish, Placer
from headscope.edits import Heads, head_list, zero
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.pruning import gradient_importance, greedy, iterative, one_shot, orders, random_order
from headscope.table import HeadScores
from tests.ablation.helpers import model_of, probe_of, whole_pass


def heads(text: str) -> tuple[HeadIndex, ...]:
    return head_list(text.split())


def scores(values: list[list[float]]) -> hs.HeadScores:
    return hs.HeadScores.from_summary("x", np.array(values), kv_heads=1)


def test_one_shot_takes_the_smallest_first_and_keeps_the_best_of_each_layer() -> None:
    given = scores([[3.0, 1.0, np.nan], [0.0, 1.0, 9.0]])
    assert one_shot(given) == heads("L1H0 L0H1 L1H1 L0H0 L1H2")
    assert one_shot(given, keep=1) == heads("L1H0 L0H1 L1H1")
    assert one_shot(given, keep=2) == heads("L1H0")
    assert one_shot(given, keep=3) == ()
    with pytest.raises(InputError, match="keep=-1"):
        one_shot(given, keep=-1)


def test_random_orders_are_of_all_heads_and_of_their_seed() -> None:
    model = model_of("gpt2")
    orders = [random_order(model, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert set(orders[2]) == set(model.shape.heads)


def test_steps_score_again_without_those_that_went() -> None:
    model, probe = model_of("gpt2"), probe_of()
    seen = []

    def importance(
        model: HeadModel, probe: hs.Probe, metric: Metricish, *, removed: Heads
    ) -> hs.HeadScores:
        gone = list(removed)
        seen.append(gone)
        values = np.arange(12.0).reshape(3, 4) * (-1) ** len(seen)  # turns round every time
        values[tuple(zip(*gone, strict=True)) if gone else ([], [])] = np.nan
        return hs.HeadScores.from_summary("x", values, kv_heads=1)

    order = iterative(model, probe, step=0.25, count=8, keep=1, importance=importance)
    # Kept is the best of each layer at first, when the smallest number was best.
    assert order == heads("L2H3 L2H2 L2H1 L0H1 L0H2 L0H3 L1H3 L1H2")
    assert [len(gone) for gone in seen] == [0, 3, 6]
    whole = iterative(model, probe, step=1.0)
    assert whole == one_shot(gradient_importance(model, probe))
    for wrong in ({"step": 0.0}, {"count": 13}, {"count": 0}):
        with pytest.raises(InputError):
            iterative(model, probe, **wrong)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_is_the_exhaustive_choice_at_every_step(family: str) -> None:
    model, probe = model_of(family), probe_of("left")
    found = greedy(model, probe, count=3)
    gone: tuple[HeadIndex, ...] = ()
    for head in found:
        cost = {
            h: float(whole_pass(model, probe, (zero((*gone, h)),), hs.metrics.loss).mean())
            for h in model.shape.heads
            if h not in gone
        }
        assert cost[head] <= min(cost.values()) + 1e-4
        gone = (*gone, head)
    last = greedy(model, probe, hs.metrics.logit_difference, count=1)[0]
    best = max(
        model.shape.heads,
        key=lambda h: float(whole_pass(model, probe, (zero([h]),)).mean()),
    )
    assert last == best


def test_greedy_leaves_each_layer_what_it_must() -> None:
    order = greedy(model_of("gpt2"), probe_of(batch=2), keep=3)
    assert sorted(head.layer for head in order) == [0, 1, 2]


def test_an_importance_that_runs_out_of_values_is_told() -> None:
    def first_layer_alone(
        model: HeadModel, probe: hs.Probe, metric: object, *, removed: object
    ) -> HeadScores:
        found = gradient_importance(model, probe, removed=removed)
        values = np.array(found.mean)
        values[1 if removed else 3 :] = np.nan
        return HeadScores.from_summary("some", values, kv_heads=found.kv_heads)

    with pytest.raises(InputError, match="no value for any other"):
        iterative(model_of("gpt2"), probe_of(batch=2), step=0.3, importance=first_layer_alone)


def test_a_greedy_order_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, probe, file = model_of("llama"), probe_of(batch=2), tmp_path / "kept" / "order.json"
    expected, measured = greedy(model, probe), orders.joint
    steps: list[int] = []

    def counted(
        measurement: Measurement, placer: Placer, sets: Sets
    ) -> tuple[np.ndarray, np.ndarray]:
        steps.append(len(sets))
        if len(steps) == 4:
            raise KeyboardInterrupt
        return measured(measurement, placer, sets)

    monkeypatch.setattr(orders, "joint", counted)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, probe, checkpoint=file)
    assert greedy(model, probe, checkpoint=file) == expected
    n = len(expected)
    assert steps == [*range(n, n - 4, -1), *range(n - 3, 0, -1)]  # only the fourth was run again
    assert greedy(model, probe, count=2, checkpoint=file) == expected[:2]
    assert len(steps) == n + 1
    with pytest.raises(InputError, match=r"of another order \(other keep\)"):
        greedy(model, probe, keep=1, checkpoint=file)
    with pytest.raises(InputError, match=r"of another order \(other data, examples\)"):
        greedy(model, probe_of(batch=3), checkpoint=file)
    for text in ("", "[]", '{"heads": ["x"], "facts": {}}'):
        file.write_text(text)
        with pytest.raises(InputError, match="not a kept order"):
            greedy(model, probe, checkpoint=file)
