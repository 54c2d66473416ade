"""Subspaces of matrices that lack rank, and of matrices that are wider than tall."""

import pytest
import torch

from headscope.circuits.ov_qk import column_space, orthonormal, thin_qr


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("shape", [(12, 6), (6, 12)])
def test_the_basis_spans_the_columns_and_nothing_else(rank: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator)).Q
    matrix = left @ torch.randn(rank, shape[1], generator=generator)
    basis, found = column_space(matrix)
    assert int(found) == rank
    torch.testing.assert_close(basis @ basis.mT, left @ left.mT, atol=1e-5, rtol=0)


def test_a_matrix_of_zeros_spans_nothing() -> None:
    basis, found = column_space(torch.zeros(2, 5, 3))
    assert not basis.any()
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(2, 4, 9), (3, 9, 4)])
def test_decompositions_of_any_shape_multiply_back(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Q, R = thin_qr(matrix)
    torch.testing.assert_close(Q @ R, matrix, atol=1e-5, rtol=0)
    span, mix, R = orthonormal(matrix)
    torch.testing.assert_close(span @ mix @ R, matrix, atol=1e-5, rtol=0)
