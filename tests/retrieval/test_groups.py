"""Key/value heads, activity, recall, agreement, need and rotary contributions."""

from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.retrieval import activity, agreement, by_kv_head, word_recall
from headscope.table import HeadScores
from tests.models.families import build


def scores(values: np.ndarray, **facts: Any) -> HeadScores:
    return HeadScores.from_examples("x", values, kv_heads=2, **facts)


def test_key_value_heads_take_their_query_heads_together() -> None:
    values = np.arange(24, dtype=float).reshape(2, 4, 3)
    values[0, 1, 2] = values[1, 2:, 0] = np.nan
    mean, most = by_kv_head(scores(values)), by_kv_head(scores(values), "max")
    assert mean.mean.shape == (2, 2)
    assert mean.per_example[0, 0].tolist() == [1.5, 2.5, 2.0]
    assert most.per_example[0, 0].tolist() == [3.0, 4.0, 2.0]
    assert np.isnan(mean.per_example[1, 1, 0])
    assert np.isnan(most.per_example[1, 1, 0])
    assert mean.name == "x_kv"
    with_null = by_kv_head(scores(values, control_per_example=np.zeros((2, 4, 3))))
    assert (with_null.null == 0).all()
    with pytest.raises(InputError, match="not kept"):
        by_kv_head(HeadScores.from_summary("x", np.zeros((2, 4)), kv_heads=2))


def test_activity_says_how_often() -> None:
    values = np.zeros((1, 4, 3))
    values[0, 1] = 1
    values[0, 2, 1] = 0.2
    values[0, 3] = np.nan
    assert activity(scores(values)) == {
        HeadIndex(0, 0): "never",
        HeadIndex(0, 1): "always",
        HeadIndex(0, 2): "sometimes",
    }
    assert activity(scores(values), 0.5)[HeadIndex(0, 2)] == "never"


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        ("eat a sandwich", "Eat a sandwich!", 1),
        ("eat a sandwich", "You should eat the sandwich.", 2 / 3),
        ("a a b", "a b b", 2 / 3),
        ("63031", "it is 63031", 1),
        ("seven", "", 0),
        ("", "seven", 0),
    ],
)
def test_word_recall(reference: str, response: str, expected: int | float) -> None:
    assert word_recall(reference, response) == pytest.approx(expected)


def test_agreement_of_equal_and_of_opposite_scores() -> None:
    values = np.random.default_rng(0).random((2, 4, 3))
    same = agreement(scores(values), scores(values), 3)
    assert (same.rank_correlation, same.overlap, same.largest_difference) == (1, 1, 0)
    assert agreement(scores(values), scores(-values), 3).rank_correlation == -1
    with pytest.raises(InputError, match="has heads"):
        agreement(scores(values), scores(values[:1]))


@pytest.fixture(scope="module")
def model() -> Any:
    return hs.load("tiny-llama")


def test_precision_and_recall_of_the_predicted_need(model: Any) -> None:
    probe = hs.probes.needle(model, lengths=200, depths=3, per_cell=1)
    options: Any = {"sink": 4, "recent": 24, "threshold": 0.6}
    table = hs.retrieval.need(model, probe, **options, progress=False)
    patterns = hs.capture.collect(model, probe)
    asked = probe.mark("question") | probe.mark("answering")
    for layer, kept in patterns.items():
        for head in range(model.shape.n_heads):
            far = []
            for row, i in asked.nonzero().tolist():
                a = kept.pattern[row, head, i, : i + 1]
                far.append(float(a[4 : i - 23].sum()) > 0.4)
            assert table["long_need"].mean[layer, head] == pytest.approx(np.mean(far), abs=0.02)
    guess, exact = table["long_need_predicted"].per_example, table["long_need"].per_example
    precision = table["long_need_precision"].per_example
    recall = table["long_need_recall"].per_example
    both = np.nan_to_num(precision * guess)
    np.testing.assert_allclose(both, np.nan_to_num(recall * exact), atol=1e-12)
    assert table["long_need_recall"].mean[2].min() > 0.9  # errors are on the safe side
    local = hs.retrieval.need(model, probe, **options, moments="local", progress=False)
    assert local["long_need"].mean.tolist() == table["long_need"].mean.tolist()


def test_rotary_contributions_are_shares_of_known_frequencies(model: Any) -> None:
    probe = hs.probes.needle(model, lengths=100, depths=2, per_cell=1)
    found = hs.retrieval.rotary_contributions(model, probe)
    np.testing.assert_allclose(found.share.sum(-1), 1, rtol=1e-5)
    expected = 10000.0 ** (-np.arange(16) / 16)
    np.testing.assert_allclose(found.frequency, np.tile(expected, (3, 1)), rtol=1e-4)
    np.testing.assert_allclose(found.wavelength[0, 0], 2 * np.pi, rtol=1e-4)
    one = hs.retrieval.rotary_contributions(model, probe, batch_size=1)
    np.testing.assert_allclose(one.share, found.share, rtol=1e-4)
    slow = hs.score(model, probe, "rotary_slowness", progress=False)["rotary_slowness"]
    rank = np.arange(16)
    by_hand = [[np.corrcoef(found.share[i, j], rank)[0, 1] for j in range(8)] for i in range(3)]
    # of a mean of shares, not a mean of correlations: near, not equal
    assert np.abs(slow.mean - by_hand).mean() < 0.1


def test_models_without_rotation_refuse() -> None:
    learned = hs.load(build("gpt2"), check=False)
    ids = torch.randint(3, 60, (1, 20))
    probe = hs.probes.from_tokens(ids, marks={"answering": ids > 0})
    with pytest.raises(UnsupportedModelError, match="no rotary positions"):
        hs.retrieval.rotary_contributions(learned, probe)
    with pytest.raises(UnsupportedModelError, match="no rotary positions"):
        hs.score(learned, probe, "rotary_slowness")


def test_layers_without_rotation_have_no_contributions() -> None:
    model = hs.load(build("cohere2"), check=False)  # its full layers know no positions
    ids = torch.randint(3, 60, (2, 20))
    at = torch.arange(20).expand(2, -1)
    probe = hs.probes.from_tokens(ids, marks={"answering": at > 14})
    found = hs.retrieval.rotary_contributions(model, probe)
    slow = hs.score(model, probe, "rotary_slowness", progress=False)["rotary_slowness"]
    for layer, turns in enumerate((True, False, True)):
        assert np.isnan(found.share[layer]).all() != turns
        assert np.isnan(slow.mean[layer]).all() != turns
        assert np.isnan(found.frequency[layer]).all() != turns
    np.testing.assert_allclose(found.share[[0, 2]].sum(-1), 1, rtol=1e-5)


def test_what_has_no_measured_rotation_is_refused_in_words_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = hs.load(build("qwen3"), check=False)  # norms on queries and keys turn as any other
    ids = torch.randint(3, 60, (1, 20))
    probe = hs.probes.from_tokens(ids, marks={"answering": ids > 0})
    slow = hs.score(model, probe, "rotary_slowness")["rotary_slowness"]
    assert np.isfinite(slow.mean).all()

    def refuse(*_: Any) -> None:
        raise UnsupportedModelError("its rotation cannot be measured.")

    monkeypatch.setattr(type(model.parts), "rotation", refuse)
    with pytest.raises(UnsupportedModelError, match="its rotation cannot be measured") as said:
        hs.score(model, probe, "rotary_slowness")
    assert "fold_norm" not in str(said.value)
