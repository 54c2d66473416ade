import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from headscope import circuits
from headscope.circuits.composition import _all_pairs
from headscope.circuits.ov_qk import HeadFactors
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.hf.model import HFModel
from tests.circuits.conftest import HandWired

ModelOf = Callable[[str], HFModel]


def slow_composition(model: HFModel, mode: str, fold_norm: bool) -> np.ndarray:
    """Definition, by loops over explicit products in float64."""
    writer = circuits.ov(model, fold_norm)
    reader = writer if mode == "V" else circuits.qk(model, fold_norm)
    layers, heads = len(writer.layers), writer.n_heads
    values = np.zeros((layers, heads, layers, heads))
    for i in range(layers):
        for j in range(i + 1, layers):
            for a in range(heads):
                for b in range(heads):
                    first = writer.explicit((i, a)).double().numpy()
                    second = reader.explicit((j, b)).double().numpy()
                    second = second.T if mode == "K" else second
                    size = np.linalg.norm(first) * np.linalg.norm(second)
                    values[i, a, j, b] = np.linalg.norm(first @ second) / size
    return values


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("fold_norm", [True, False])
def test_equals_the_definition(
    family: str, mode: str, fold_norm: bool, family_model: ModelOf
) -> None:
    model = family_model(family)
    found = circuits.composition(model, mode, fold_norm).values
    np.testing.assert_allclose(found, slow_composition(model, mode, fold_norm), atol=2e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_bare_weights_equal_transformer_lens(family: str, mode: str, family_model: ModelOf) -> None:
    model = family_model(family)
    expected = model.bridge.all_composition_scores(mode).scores.detach().numpy()
    found = circuits.composition(model, mode, fold_norm=False).values
    np.testing.assert_allclose(found, expected, atol=1e-5)


def random_factors(d_model: int, d_head: int) -> HeadFactors:
    return HeadFactors(
        left=torch.randn(2, 4, d_model, d_head),
        right=torch.randn(2, 4, d_head, d_model),
        left_bias=torch.zeros(2, 4, d_head),
        right_bias=torch.zeros(2, 4, d_head),
        layers=(0, 1),
        n_heads=4,
    )


@pytest.mark.parametrize("d_model", [64, 256])
def test_random_heads_compose_as_one_over_root_d_model(d_model: int) -> None:
    values = _all_pairs(random_factors(d_model, 8), random_factors(d_model, 8))
    assert float(values[0, :, 1].mean()) == pytest.approx(1 / math.sqrt(d_model), rel=0.05)


def test_baseline_is_subtracted_where_pairs_exist(family_model: ModelOf) -> None:
    model = family_model("llama")
    chance = circuits.random_composition(model)
    assert chance == pytest.approx(1 / math.sqrt(32))
    plain, less = (circuits.composition(model, "K", subtract_random=flag) for flag in (False, True))
    np.testing.assert_allclose(
        less.values[less.present], plain.values[plain.present] - chance, atol=1e-7
    )
    assert not less.values[~less.present].any()


def test_hand_wired_heads_compose_fully(hand_wired: HandWired) -> None:
    K = circuits.composition(hand_wired, "K")
    # 6 equal directions: |A B| = sqrt(6) over sqrt(6) * sqrt(6)
    assert K.top(1) == [(HeadIndex(0, 0), HeadIndex(1, 0), pytest.approx(1 / math.sqrt(6)))]
    for mode in ("Q", "V"):
        values = circuits.composition(hand_wired, mode).values
        assert values[0, 0, 1, 0] == 0  # writes where neither queries nor values are read
        assert values[0, 1, 1, 0] == pytest.approx(1 / math.sqrt(6))
    assert circuits.composition(hand_wired, "V").values[..., 1, 1].max() == 0


def test_hand_wired_path_is_found(hand_wired: HandWired) -> None:
    path = circuits.strongest_paths(hand_wired, k=3, modes=["K"])
    assert [one.heads for one in path] == [(HeadIndex(0, 0), HeadIndex(1, 0))]
    assert path[0].modes == ("K",)
    assert path[0].strength == pytest.approx(math.sqrt(18) / math.sqrt(6))
    assert str(path[0]) == "L0H0 -K-> L1H0 (1.7)"


@pytest.mark.parametrize("length", [2, 3])
def test_paths_equal_an_exhaustive_search(length: int, family_model: ModelOf) -> None:
    model = family_model("llama")
    scores = [circuits.composition(model, mode) for mode in ("Q", "K", "V")]
    best = np.max([one.values for one in scores], axis=0)
    every = {}
    heads = list(model.shape.heads)
    for first in heads:
        for second in heads:
            if second.layer <= first.layer:
                continue
            if length == 2:
                every[first, second] = best[(*first, *second)]
                continue
            for third in heads:
                if third.layer > second.layer:
                    both = best[(*first, *second)] * best[(*second, *third)]
                    every[first, second, third] = math.sqrt(both)
    expected = sorted(every, key=lambda chain: -every[chain])[:5]
    found = circuits.chains(scores, 0.5, 5, length)
    assert [one.heads for one in found] == expected
    assert found[0].strength == pytest.approx(every[expected[0]] / 0.5)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_components_add_up_to_composition(mode: str, family_model: ModelOf) -> None:
    model = family_model("llama")
    parts = circuits.component_composition(model, mode, components=None).values
    S = circuits.ov(model).svd().S.numpy()
    share = np.square(S) / np.square(S).sum(-1, keepdims=True)
    total = np.sqrt((np.square(parts) * share[..., None, None]).sum(2))
    np.testing.assert_allclose(total, circuits.composition(model, mode).values, atol=1e-5)


def test_directions_of_a_pair(family_model: ModelOf) -> None:
    model = family_model("llama")
    found = circuits.direction_composition(model, "L0H1", "L2H3", "K")
    writer, reader = circuits.ov(model).svd(), circuits.qk(model).svd()
    expected = writer.Vh[0, 1] @ reader.Vh[2, 3].T
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="is not in a lower layer"):
        circuits.direction_composition(model, "L2H1", "L2H3", "K")


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_affinity_is_the_mean_squared_cosine(mode: str, family_model: ModelOf) -> None:
    model = family_model("llama")
    found = circuits.subspace_affinity(model, mode).values
    weights = model.weights(2)
    side = {"Q": weights.W_Q[3], "K": weights.W_K[1], "V": weights.W_V[1]}[mode]
    read = np.linalg.qr((model.parts.input_norm(2).folded(side)).numpy())[0]
    written = np.linalg.qr(model.output_weights(0)[1].T.numpy())[0]
    assert found[0, 1, 2, 3] == pytest.approx(np.square(written.T @ read).sum() / 8, abs=1e-6)
    assert found[2, 0, 0, 1] == 0


def test_unknown_mode_names_the_known(family_model: ModelOf) -> None:
    with pytest.raises(InputError, match="known: K, Q, V"):
        circuits.composition(family_model("llama"), "X")
