from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope import circuits
from headscope.circuits.ov_qk import HeadFactors
from headscope.errors import InputError


def factors_of(
    d_model: int, d_head: int, kv_heads: int, heads: int, seed: int, layers: int = 2
) -> HeadFactors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return HeadFactors(
        left=draw(layers, kv_heads, d_model, d_head),
        right=draw(layers, heads, d_head, d_model),
        left_bias=draw(layers, kv_heads, d_head),
        right_bias=torch.zeros(layers, heads, d_head, dtype=torch.float64),
        layers=tuple(range(layers)),
        n_heads=heads,
    )


shapes = st.tuples(
    st.integers(5, 24), st.integers(1, 5), st.sampled_from([(1, 1), (1, 4), (2, 4), (3, 3)])
)


@settings(deadline=None, max_examples=25)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_svd_is_that_of_the_explicit_product(
    shape: tuple[int, int, tuple[int, int]], seed: int
) -> None:
    d_model, d_head, (kv_heads, heads) = shape
    for factors in (
        factors_of(d_model, d_head, kv_heads, heads, seed),
        factors_of(d_model, d_head, kv_heads, heads, seed).transposed(),
    ):
        svd = factors.svd()
        for layer in factors.layers:
            for head in range(heads):
                explicit = factors.explicit((layer, head)).numpy()
                expected = np.linalg.svd(explicit, compute_uv=False)[:d_head]
                U, S, Vh = svd.U[layer, head], svd.S[layer, head], svd.Vh[layer, head]
                np.testing.assert_allclose(S, expected, atol=1e-10)
                np.testing.assert_allclose((U * S) @ Vh, explicit, atol=1e-10)
                np.testing.assert_allclose(U.T @ U, np.eye(d_head), atol=1e-10)
                np.testing.assert_allclose(Vh @ Vh.T, np.eye(d_head), atol=1e-10)
        np.testing.assert_allclose(factors.singular_values(), svd.S, atol=1e-10)
        np.testing.assert_allclose(factors.norm(), svd.S.norm(dim=-1), atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_core_has_the_nonzero_eigenvalues(kv_heads: int, turned: bool) -> None:
    factors = factors_of(9, 3, kv_heads, 4, seed=1)
    factors = factors.transposed() if turned else factors
    core = factors.core()
    for layer in (0, 1):
        for head in range(4):
            small = np.linalg.eigvals(core[layer, head].numpy())
            large = np.linalg.eigvals(factors.explicit((layer, head)).numpy())
            np.testing.assert_allclose(np.sort(np.abs(small)), np.sort(np.abs(large))[-3:])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_spectrum_is_invariant_to_the_basis_of_head_space(seed: int, scale: float) -> None:
    factors = factors_of(12, 4, 2, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 3 * torch.eye(4)
    rotation = torch.linalg.qr(change).Q
    S = factors.singular_values()
    for M in (rotation, change):
        moved = replace(factors, left=factors.left @ M, right=torch.linalg.inv(M) @ factors.right)
        torch.testing.assert_close(moved.singular_values(), S, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            circuits.symmetric_share(moved), circuits.symmetric_share(factors)
        )
    scaled = replace(factors, left=factors.left * scale).singular_values()
    torch.testing.assert_close(scaled, S * scale)


def test_signs_are_fixed_by_what_is_written() -> None:
    factors = factors_of(10, 3, 2, 4, seed=4)
    Vh = factors.svd().Vh
    assert bool((Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True)) > 0).all())


def test_zero_heads_have_zero_spectra() -> None:
    factors = factors_of(10, 3, 2, 2, seed=4)
    factors.left[0, 0] = 0
    svd = factors.svd()
    assert float(svd.S[0, 0].abs().max()) == 0
    assert bool(torch.isfinite(svd.U).all())


def test_bias_goes_into_a_last_coordinate() -> None:
    factors = factors_of(7, 3, 2, 4, seed=5)
    x = torch.randn(7, dtype=torch.float64)
    extended = circuits.with_bias(factors)
    one = torch.ones(1, dtype=torch.float64)
    expected = (x @ factors.left[1, 1] + factors.left_bias[1, 1]) @ factors.right[1, 3]
    found = torch.cat([x, one]) @ extended.explicit("L1H3")
    torch.testing.assert_close(found[:-1], expected)


def test_unknown_head_is_refused() -> None:
    with pytest.raises(InputError, match="no head L7H0"):
        factors_of(7, 3, 2, 4, seed=5).explicit("L7H0")
