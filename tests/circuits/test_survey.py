"""Everything at once: complete where the family allows it, and said why where not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from headscope import circuits
from headscope.errors import InputError
from headscope.models.hf.model import HFModel
from headscope.table import HeadEigenvalues, HeadSpectra

ModelOf = Callable[[str], HFModel]


@pytest.mark.parametrize("circuit", ["OV", "QK"])
def test_spectra_are_those_of_the_factors_with_the_edge_of_chance(
    circuit: str, family_model: ModelOf
) -> None:
    model = family_model("llama")
    found = circuits.spectra(model, circuit)
    factors = circuits.ov(model) if circuit == "OV" else circuits.qk(model, offset=0)
    explicit = np.linalg.svd(factors.explicit((2, 3)).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values[2, 3], explicit[:8], rtol=1e-4)
    left, right = (
        factors.left[2, 3 * factors.left.shape[1] // 4],
        factors.right[2, 1 if circuit == "QK" else 3],
    )
    size = float(left.square().mean().sqrt() * right.square().mean().sqrt())
    edge, _ = circuits.product_edge(32, 8, 32)
    assert found.scale[2, 3] == pytest.approx(size * edge, rel=1e-5)


def test_random_factors_stay_inside_the_band(family_model: ModelOf) -> None:
    """The band is of draws like these, so nearly all places of nearly all heads lie in it."""
    found = circuits.spectra(family_model("llama"), "QK", fold_norm=False)
    inside = (found.relative >= 0.9 * found.low) & (found.relative <= 1.1 * found.high)
    assert inside.mean() > 0.9
    lifted = HeadSpectra("QK", 3 * found.values, found.scale, found.low, found.high)
    assert (lifted.relative > found.high).mean() > 0.9


def test_drawn_products_have_the_singular_values_of_drawn_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(200, 24, 6, generator=generator)
    B = torch.randn(200, 6, 40, generator=generator)
    expected = torch.linalg.svdvals(A @ B)[:, :6].mean(0)
    found = circuits.product_spectra(24, 6, 40, draws=400, seed=1).mean(0)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.0)


@pytest.mark.parametrize(
    ("circuit", "score"), [("OV", "copying_eigenvalues"), ("QK", "matching_eigenvalues")]
)
def test_eigenvalues_are_those_of_the_explicit_token_matrix(
    circuit: str, score: str, family_model: ModelOf
) -> None:
    model = family_model("llama")
    found = circuits.eigenvalues(model, circuit)
    words = circuits.Dictionary(model)
    every = slice(0, words.size)
    given = words.inputs(every, 2).double()
    if circuit == "OV":
        out = words.outputs(every).double()
        W = circuits.ov(model).explicit((2, 1)).double()
    else:
        given = given - given.mean(0)
        out = given
        W = circuits.qk(model, offset=0).explicit((2, 1)).double()
    full = torch.linalg.eigvals(given @ W @ out.T)
    largest = full[full.abs().argsort(descending=True)[:8]].numpy()
    mine = found.values[2, 1]
    for value in largest:
        assert np.abs(mine - value).min() < 1e-3 * np.abs(largest).max()
    np.testing.assert_allclose(found.ratio, circuits.score(model, tokens=8)[score].mean, atol=1e-5)


def test_eigenvalues_of_a_zero_matrix_have_no_ratio() -> None:
    assert np.isnan(HeadEigenvalues("OV", np.zeros((1, 1, 3), complex)).ratio).all()


def test_unknown_circuits_are_named(family_model: ModelOf) -> None:
    with pytest.raises(InputError, match="OV, QK"):
        circuits.spectra(family_model("llama"), "VO")


def test_a_survey_has_everything(family_model: ModelOf) -> None:
    model = family_model("llama")
    found = circuits.survey(model, tokens=8, paths=3)
    assert set(found.missing) <= {"relations"}  # without a tokenizer there are no relations
    assert [one.name for one in found.pairs] == ["Q_composition", "K_composition", "V_composition"]
    assert [one.name for one in found.spectra] == ["OV", "QK"]
    assert [one.name for one in found.eigenvalues] == ["OV", "QK"]
    assert "copying_eigenvalues" in found.table
    keys = found.paths["two heads, keys only"]
    assert keys == circuits.strongest_paths(model, 3, ["K"])
    assert found.paths["three heads"] == circuits.strongest_paths(model, 3, length=3)


def test_what_a_family_does_not_allow_is_told(family_model: ModelOf) -> None:
    found = circuits.survey(family_model("persimmon"), tokens=8)
    assert [one.name for one in found.spectra] == ["OV"]
    assert "QK_spectra" in found.missing
    assert all(reason.endswith(".") for reason in found.missing.values())
