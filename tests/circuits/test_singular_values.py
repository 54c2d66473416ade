import numpy as np
import pytest
import torch

from headscope.circuits import measures


def test_flat_spectra_have_full_rank_by_every_measure() -> None:
    S = torch.full((2, 8), 3.0)
    for measure in (
        measures.effective_rank,
        measures.stable_rank,
        measures.participation_ratio,
    ):
        torch.testing.assert_close(measure(S), torch.full((2,), 8.0))
    torch.testing.assert_close(measures.top_share(S, 2), torch.full((2,), 0.25))


def test_one_direction_has_rank_one_by_every_measure() -> None:
    S = torch.tensor([2.0, 0, 0, 0])
    for measure in (
        measures.effective_rank,
        measures.stable_rank,
        measures.participation_ratio,
        measures.top_share,
    ):
        assert float(measure(S)) == pytest.approx(1)


def test_zero_matrices_have_rank_zero() -> None:
    S = torch.zeros(3, 4)
    for measure in (
        measures.effective_rank,
        measures.stable_rank,
        measures.participation_ratio,
        measures.top_share,
    ):
        assert measure(S).tolist() == [0, 0, 0]


def test_measures_do_not_see_scale() -> None:
    S = torch.rand(5, 6).sort(descending=True).values
    for measure in (
        measures.effective_rank,
        measures.stable_rank,
        measures.participation_ratio,
        measures.top_share,
    ):
        torch.testing.assert_close(measure(S), measure(S * 1e-6), rtol=1e-4, atol=1e-6)


def test_edge_of_one_factor_is_that_of_a_large_random_matrix() -> None:
    generator = np.random.default_rng(0)
    largest = np.linalg.norm(0.1 * generator.standard_normal((600, 60)), 2)
    assert measures.marchenko_pastur_edge(600, 60, 0.01) == pytest.approx(largest, rel=0.03)


def test_edge_of_a_product_is_that_of_random_products() -> None:
    generator = np.random.default_rng(0)
    drawn = [
        np.linalg.norm(generator.standard_normal((80, 10)) @ generator.standard_normal((10, 50)), 2)
        for _ in range(200)
    ]
    mean, deviation = measures.product_edge(80, 10, 50, draws=400)
    assert mean == pytest.approx(np.mean(drawn), rel=0.02)
    assert deviation == pytest.approx(np.std(drawn), rel=0.25)
    assert measures.product_edge(80, 10, 50, draws=4) == measures.product_edge(80, 10, 50, draws=4)


def test_outliers_count_what_lies_above_the_edge() -> None:
    S = torch.tensor([[5.0, 2.0, 1.0], [0.5, 0.2, 0.1]])
    assert measures.outliers(S, 1.5).tolist() == [2, 0]
    assert measures.outliers(S, torch.tensor([4.0, 0.1])).tolist() == [1, 2]
