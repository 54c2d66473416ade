"""QR of many thin matrices: as exact as numpy's, whatever the conditioning."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.circuits.ov_qk import orthonormal, thin_qr


def of_condition(condition: float, rows: int = 60, columns: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, columns, generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return ((left * torch.logspace(0, -np.log10(condition), columns)) @ right.T).float()


def assert_exact_qr(matrices: torch.Tensor) -> None:
    Q, R = thin_qr(matrices)
    size = matrices.double().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    assert float(((Q.double() @ R.double() - matrices.double()) / size).abs().max()) < 1e-6
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
    assert float((Q.double().mT @ Q.double() - identity).abs().max()) < 3e-6
    assert not R.tril(-1).abs().max()


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 1e4, 1e6, 1e9])
def test_orthogonal_and_exact_at_any_condition(condition: float) -> None:
    assert_exact_qr(torch.stack([of_condition(condition, seed=seed) for seed in range(3)])[None])


def test_singular_values_equal_numpys_in_float64() -> None:
    matrices = torch.stack([of_condition(10.0**power, seed=power) for power in range(5)])
    found = np.linalg.svd(thin_qr(matrices)[1].double().numpy(), compute_uv=False)
    expected = np.linalg.svd(matrices.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rank_deficient_and_empty_heads_are_among_good_ones() -> None:
    matrices = torch.stack([of_condition(5.0), torch.zeros(60, 8), of_condition(5.0, seed=1)])
    matrices[2, :, 3] = matrices[2, :, 4]
    assert_exact_qr(matrices)


@pytest.mark.parametrize("condition", [1.0, 3.0, 10.0, 1e3, 1e9])
def test_span_times_mix_is_orthonormal_at_any_condition(condition: float) -> None:
    matrices = torch.stack([of_condition(1.0), of_condition(condition, seed=1)])
    span, mix, R = orthonormal(matrices)
    Q = span.double() @ mix.double()
    assert float((Q @ R.double() - matrices.double()).abs().max()) < 1e-6
    assert float((Q.mT @ Q - torch.eye(8, dtype=torch.float64)).abs().max()) < 5e-6
    assert (span is matrices) == (condition < 5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(0, 20), st.floats(-15, 10))
def test_any_shape_and_size(seed: int, columns: int, more: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert_exact_qr(10.0**power * torch.randn(2, columns + more, columns, generator=generator))
