"""Geometry measures: closed forms, invariances, slow obvious versions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.errors import InputError
from headscope.geometry import measures as gm


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(drawn(d, d, seed=9)).Q


POINTWISE = {
    "matrix_entropy": gm.matrix_entropy,
    "entropy of order 2": lambda x: gm.matrix_entropy(x, alpha=2.0),
    "curvature": gm.curvature,
    "token_angle": gm.token_angle,
    "anisotropy": gm.anisotropy,
    "mean_cosine": gm.mean_cosine,
    "two_nn": gm.two_nn,
    "gride": gm.gride,
}


@pytest.mark.parametrize("name", POINTWISE)
def test_rotation_and_scale_change_nothing(name: str) -> None:
    x, measure = drawn(60, 12), POINTWISE[name]
    before = float(measure(x))
    assert float(measure(5 * x @ rotation(12))) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("name", ["matrix_entropy", "curvature", "anisotropy", "two_nn", "gride"])
def test_shift_changes_nothing(name: str) -> None:
    x, measure = drawn(60, 12), POINTWISE[name]
    assert float(measure(x + 3)) == pytest.approx(float(measure(x)), rel=1e-3)


@pytest.mark.parametrize("name", ["matrix_entropy", "anisotropy", "mean_cosine", "two_nn", "gride"])
def test_order_of_points_changes_nothing(name: str) -> None:
    x, measure = drawn(60, 12), POINTWISE[name]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert float(measure(x[order])) == pytest.approx(float(measure(x)), rel=1e-4)


@pytest.mark.parametrize("name", ["matrix_entropy", "curvature", "anisotropy", "two_nn"])
def test_a_batch_of_clouds_gives_each_clouds_number(name: str) -> None:
    x, measure = drawn(3, 20, 6), POINTWISE[name]
    torch.testing.assert_close(measure(x), torch.stack([measure(one) for one in x]))


def test_entropy_closed_forms() -> None:
    simplex = torch.eye(8)  # centred: 7 equal directions
    assert gm.matrix_entropy(simplex).item() == pytest.approx(math.log(7), abs=1e-5)
    assert gm.matrix_entropy(simplex, normalise=True).item() == pytest.approx(1, abs=1e-5)
    line = torch.arange(5.0)[:, None] @ drawn(1, 6)
    assert gm.matrix_entropy(line).item() == pytest.approx(0, abs=1e-5)
    assert math.isnan(gm.matrix_entropy(torch.ones(5, 3)).item())
    for alpha in (0.5, 2.0, 3.0):
        assert gm.matrix_entropy(simplex, alpha).item() == pytest.approx(math.log(7), abs=1e-5)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_entropy_is_that_of_the_whole_spectrum(shape: tuple[int, int]) -> None:
    x = drawn(*shape).double().numpy()
    rows = x - x.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    p = np.linalg.eigvalsh(rows @ rows.T) / len(rows)
    p = p[p > 1e-12]
    expected = -(p * np.log(p)).sum()
    assert gm.matrix_entropy(torch.from_numpy(x)).item() == pytest.approx(expected, abs=1e-4)
    second = -np.log((p**2).sum())
    assert gm.matrix_entropy(torch.from_numpy(x), 2.0).item() == pytest.approx(second, abs=1e-4)


def test_curvature_closed_forms() -> None:
    turn = torch.arange(13) * math.pi / 6
    circle = torch.stack([turn.cos(), turn.sin()], 1)
    assert gm.curvature(circle).item() == pytest.approx(math.pi / 6, abs=1e-5)
    assert gm.token_angle(circle).item() == pytest.approx(math.pi / 6, abs=1e-5)
    assert gm.token_angle(circle, apart=3).item() == pytest.approx(math.pi / 2, abs=1e-5)
    zigzag = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert gm.curvature(zigzag).item() == pytest.approx(math.pi, abs=1e-5)


def test_mean_cosine_is_the_mean_over_pairs() -> None:
    x = drawn(7, 4).double()
    pairs = [
        float(torch.nn.functional.cosine_similarity(x[i], x[j], dim=0))
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    assert gm.mean_cosine(x).item() == pytest.approx(np.mean(pairs), abs=1e-9)


@pytest.mark.parametrize(("dimension", "expected"), [(1, 1.02), (2, 1.96), (5, 4.64)])
def test_dimension_of_cubes(dimension: int, expected: float) -> None:
    cube = torch.rand(2000, dimension, generator=torch.Generator().manual_seed(0))
    found = gm.two_nn(cube @ drawn(dimension, 20)).item()
    assert found == pytest.approx(expected, rel=0.07)
    assert gm.gride(cube, scale=1) == pytest.approx(gm.two_nn(cube).item(), rel=2e-3)
    assert gm.gride(cube, scale=4) == pytest.approx(dimension, rel=0.12)


def test_gride_maximises_its_likelihood() -> None:
    from scipy.optimize import minimize_scalar
    from scipy.special import betaln

    x, scale = drawn(200, 3), 3
    far = torch.cdist(x.double(), x.double()).sort(dim=1).values.numpy()
    mu = far[:, 2 * scale] / far[:, scale]

    def loss(d: float) -> float:
        density = np.log(d) + (scale - 1) * np.log(mu**d - 1)
        density -= ((2 * scale - 1) * d + 1) * np.log(mu) + betaln(scale, scale)
        return -float(density.sum())

    best = minimize_scalar(loss, bounds=(0.1, 20), method="bounded").x
    assert gm.gride(x, scale) == pytest.approx(best, rel=1e-3)


# Points, dimension, width and seed of cubes that are mapped into more dimensions, with what other
# libraries give: scikit-dimension 0.5.0, TwoNN(discard_fraction=0, method="mle"), and dadapy 0.3.4,
# IdEstimation(coordinates=x, maxk=n - 1).return_id_scaling_gride(range_max=8), scales 1, 2, 4.
ORACLES = [
    ((300, 2, 10, 0), 2.044964775328417, (2.04496477, 1.88817398, 1.85649490)),
    ((300, 5, 20, 1), 4.721181264537046, (4.72118125, 4.58579485, 4.33245377)),
    ((500, 8, 8, 2), 5.81513432380925, (5.81513430, 5.45322818, 5.54404362)),
]


@pytest.mark.parametrize(("cube", "two_nn", "gride"), ORACLES)
def test_dimensions_are_those_of_scikit_dimension_and_dadapy(
    cube: tuple[int, int, int, int], two_nn: float, gride: tuple[float, ...]
) -> None:
    n, dimension, width, seed = cube
    random = np.random.default_rng(seed)
    points = random.random((n, dimension)) @ random.standard_normal((dimension, width))
    x = torch.from_numpy(points)
    assert gm.two_nn(x).item() == pytest.approx(two_nn, rel=1e-9)
    for scale, expected in zip((1, 2, 4), gride, strict=True):
        # dadapy has n - 1 for n in the likelihood's slope, which lowers it by less than 1 / n.
        assert 0 <= gm.gride(x, scale) / expected - 1 <= 1.02 / n


def test_equal_points_have_no_dimension() -> None:
    x = drawn(20, 3)
    x[3] = x[4]
    assert math.isnan(gm.two_nn(x).item())
    assert math.isnan(gm.gride(x, 1))


def test_overlap_of_neighbours() -> None:
    x, y = drawn(300, 10), drawn(300, 10, seed=1)
    assert gm.neighbourhood_overlap(x, x @ rotation(10), 10).item() == 1
    assert gm.neighbourhood_overlap(x, y, 10).item() == pytest.approx(10 / 299, abs=0.01)


def test_linearity() -> None:
    x, noise = drawn(500, 8), drawn(500, 8, seed=2)
    assert gm.linearity(x, x @ drawn(8, 8, seed=3) + 4) == pytest.approx(1, abs=1e-6)
    assert gm.linearity(x, noise, adjusted=False) == pytest.approx(8 / 499, abs=0.01)
    assert gm.linearity(x, noise) == pytest.approx(0, abs=0.01)
    a, b = (v - v.mean(0) for v in (x.double(), noise.double()))
    left = b - a @ torch.linalg.lstsq(a, b).solution
    slow = 1 - float(left.square().sum() / b.square().sum())
    assert gm.linearity(x, noise, adjusted=False) == pytest.approx(slow, abs=1e-9)
    with pytest.raises(InputError, match="give at least 80 points"):
        gm.linearity(x[:50], noise[:50])


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x, y = drawn(200, 5), drawn(200, 5, seed=1)
    moments = gm.LinearMoments(5)
    for at in range(0, 200, 30):
        moments.add(x[at : at + 30], y[at : at + 30])
    assert moments.linearity() == pytest.approx(gm.linearity(x, y), abs=1e-9)


def test_contrastive_closed_forms() -> None:
    n, temperature = 6, 0.1
    expected = math.log(1 + (2 * n - 2) * math.exp(-1 / temperature))
    assert gm.info_nce(torch.eye(n), torch.eye(n), temperature) == pytest.approx(expected, abs=1e-9)
    alike = torch.ones(n, 3)
    assert gm.info_nce(alike, alike) == pytest.approx(math.log(2 * n - 1), abs=1e-6)


def test_lidar_counts_the_directions_that_tell_texts_apart() -> None:
    directions = 4
    centres = torch.cat([drawn(400, directions), torch.zeros(400, 6)], 1)
    views = centres[:, None] + 0.05 * drawn(400, 5, 10, seed=1)
    assert gm.lidar(views) == pytest.approx(directions, rel=0.05)


def test_dime_of_unrelated_views_is_near_zero() -> None:
    x, y = drawn(60, 10), drawn(60, 10, seed=1)
    assert abs(gm.dime(x, y)) < 0.1
    assert gm.dime(x, x) > 0.2
    assert gm.dime(x, y, seed=3) == gm.dime(x, y, seed=3)


@pytest.mark.parametrize(
    ("call", "least"),
    [
        (lambda: gm.matrix_entropy(torch.ones(1, 3)), "2 or more"),
        (lambda: gm.curvature(torch.ones(2, 3)), "3 or more"),
        (lambda: gm.two_nn(torch.ones(9, 3)), "10 or more"),
        (lambda: gm.gride(torch.ones(12, 3), 8), "17 or more"),
        (lambda: gm.neighbourhood_overlap(torch.ones(9, 3), torch.ones(9, 3)), "12 or more"),
        (lambda: gm.lidar(torch.ones(2, 3, 4)), "at least 3 texts and 2 views"),
        (lambda: gm.token_angle(torch.ones(4, 3), apart=0), "a distance of 1 or more"),
    ],
)
def test_too_few_points_get_a_sentence(call: object, least: str) -> None:
    with pytest.raises(InputError, match=least):
        call()
