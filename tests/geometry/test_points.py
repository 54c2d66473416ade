"""Measures from one product of all states against the measures themselves."""

import numpy as np
import pytest
import torch

from headscope.geometry import measures as gm
from headscope.geometry.layers import Points


def compare(x: torch.Tensor, tokens: torch.Tensor, tolerance: float = 1e-9) -> None:
    points = Points(x, tokens)
    pairs = {
        "matrix_entropy": (points.matrix_entropy(), gm.matrix_entropy(x)),
        "anisotropy": (points.anisotropy(), gm.anisotropy(x)),
        "curvature": (points.curvature(), gm.curvature(x)),
        "token_angle": (points.token_angle(), gm.token_angle(x)),
        "mean_cosine": (points.mean_cosine(), gm.mean_cosine(x)),
        "self_similarity": (points.self_similarity(), gm.self_similarity(x, tokens)),
        "two_nn": (points.intrinsic_dimension(), gm.two_nn(x)),
        "gride": (points.gride(), torch.tensor([gm.gride(one) for one in x])),
        "overlap": (points.overlap()[1:], gm.neighbourhood_overlap(x[:-1], x[1:], 10)),
    }
    for name, (found, expected) in pairs.items():
        np.testing.assert_allclose(
            found.double(), expected.double(), atol=tolerance, rtol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("points", [24, 60])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_they_are_the_measures(points: int, shift: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, points, 40, generator=draw) + shift
    compare(x, torch.randint(7, (points,), generator=draw), 1e-6)


def test_equal_and_close_points_are_told_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 40, generator=draw, dtype=torch.float64) + 3
    x[0, 5] = x[0, 9]  # no dimension, and a neighbour at no distance
    x[1, 6] = x[1, 2] + 1e-9 * torch.randn(40, generator=draw, dtype=torch.float64)
    compare(x, torch.arange(24) % 5, 1e-6)
    x[0, 6] = x[0, 5]  # a step that goes nowhere
    compare(x, torch.arange(24) % 5, 1e-6)
    assert bool(Points(x, torch.arange(24)).intrinsic_dimension().isnan()[0])


def test_states_that_are_0_have_no_angle() -> None:
    x = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 0
    x[1, 5] *= 1e-5
    compare(x, torch.arange(24) % 5, 1e-6)
    same = torch.ones(2, 24, 40)
    assert bool(Points(same, torch.arange(24)).matrix_entropy().isnan().all())
