from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from headscope import circuits
from headscope.circuits.ov_qk import HeadFactors
from headscope.models.hf.model import HFModel
from tests.circuits.conftest import HandWired

ModelOf = Callable[[str], HFModel]


def test_table_has_every_score_within_its_bounds(family_model: ModelOf) -> None:
    table = circuits.score(family_model("llama"), tokens=40, k=3)
    assert table.shape == (3, 4)
    for name in ("ov_effective_rank", "copying_top3_mlp", "matching_eigenvalues", "qk_outliers"):
        assert name in table
    for one in table.values():
        low, high = one.bounds
        assert not np.isnan(one.mean).any(), one.name
        assert low is None or one.mean.min() >= low - 1e-6, one.name
        assert high is None or one.mean.max() <= high + 1e-6, one.name
        assert one.description
        assert one.source


def test_hand_wired_scores(hand_wired: HandWired) -> None:
    table = circuits.score(hand_wired, tokens=6, k=2)
    assert table["ov_effective_rank"]["L1H0"] == pytest.approx(6)
    assert table["ov_norm"]["L1H0"] == pytest.approx(np.sqrt(6))
    assert table["ov_norm"]["L1H1"] == 0
    assert table["copying_eigenvalues"]["L1H0"] == pytest.approx(1)
    assert table["ov_read_alignment"]["L1H0"] == pytest.approx(1)
    assert table["ov_write_alignment"]["L0H0"] == pytest.approx(0, abs=1e-6)
    assert table["ov_symmetric_share"]["L1H0"] == pytest.approx(1)
    assert table["ov_symmetric_share"]["L0H0"] == pytest.approx(0.5)


def test_alignment_by_chance_is_the_share_of_dimensions(family_model: ModelOf) -> None:
    model = family_model("llama")
    words = circuits.Dictionary(model)
    share = circuits.read_alignment(circuits.ov(model), words)
    assert share.shape == (3, 4)
    assert float(share.mean()) == pytest.approx(8 / 32, rel=0.2)


def test_symmetric_share_is_that_of_the_product(family_model: ModelOf) -> None:
    for factors in (circuits.qk(family_model("llama")), circuits.ov(family_model("llama"))):
        share = circuits.symmetric_share(factors)
        W = factors.explicit("L1H2")
        expected = ((W + W.T) / 2).square().sum() / W.square().sum()
        assert float(share[1, 2]) == pytest.approx(float(expected), abs=1e-5)


def test_random_heads_have_no_outliers_and_planted_ones_do() -> None:
    left, right = torch.randn(1, 3, 128, 32), torch.randn(1, 3, 32, 128)
    factors = HeadFactors(
        left, right, torch.zeros(1, 3, 32), torch.zeros(1, 3, 32), layers=(0,), n_heads=3
    )
    edge = circuits.random_edge(factors)
    assert not circuits.outliers(factors.singular_values(), edge).any()
    left[0, 1, :, 0] *= 6
    planted = replace(factors, left=left)
    edge = circuits.random_edge(planted)
    assert circuits.outliers(planted.singular_values(), edge).tolist() == [[0, 1, 0]]


def test_same_seed_same_table(family_model: ModelOf) -> None:
    model = family_model("gpt2")
    one, two = (circuits.score(model, tokens=10, seed=3) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name].mean, two[name].mean)


def test_card_holds_json_and_agrees_with_the_table(family_model: ModelOf) -> None:
    import json

    model = family_model("llama")
    table = circuits.score(model, tokens=10)
    card = circuits.head_card(model, "L1H2", table=table, directions=2, tokens=3, partners=2)
    json.dumps(card.to_json())
    assert card.kv_head == 1
    assert card.scores["ov_norm"] == table["ov_norm"]["L1H2"]
    order = np.argsort(-table["ov_norm"].mean.ravel()).tolist()
    assert card.ranks["ov_norm"] == order.index(1 * 4 + 2) + 1
    K = circuits.composition(model, "K").values
    best = int(np.argmax(K[0, :, 1, 2]))
    assert card.fed_by["K"][0] == (f"L0H{best}", pytest.approx(K[0, best, 1, 2]))
    assert card.feeds["K"][0][1] == pytest.approx(K[1, 2, 2].max())
    assert len(card.ov) == len(card.qk) == 2
    assert not card.missing


def test_sizes_that_a_norm_takes_away_are_no_scores(family_model: ModelOf) -> None:
    """Twice the query weights give the same model under a norm on queries, and twice the size."""
    table = circuits.score(family_model("qwen3"), tokens=4)
    assert "qk_stable_rank" in table
    assert not {"qk_norm", "qk_spectral_norm"} & set(table)
    assert "qk_norm" in circuits.score(family_model("llama"), tokens=4)


def test_card_says_what_a_family_does_not_allow(family_model: ModelOf) -> None:
    card = circuits.head_card(family_model("persimmon"), "L1H0", directions=1, tokens=2)
    assert set(card.missing) == {"qk", "Q_composition", "K_composition"}
    assert card.ov
    assert "V" in card.feeds
