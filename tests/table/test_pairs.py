import numpy as np
import pytest
from jaxtyping import TypeCheckError

from headscope.base.specs import ScoreSpec
from headscope.errors import InputError
from headscope.table import PairScores


def values() -> np.ndarray:
    full = np.full((2, 2, 2, 2), 9.0)  # what lies outside the upward pairs must not be seen
    full[0, :, 1, :] = [[0.1, 0.7], [0.7, np.nan]]
    return full


def test_top_looks_upward_only() -> None:
    assert PairScores(ScoreSpec("k"), values()).top(5) == [
        ((0, 0), (1, 1), 0.7),
        ((0, 1), (1, 0), 0.7),
        ((0, 0), (1, 0), 0.1),
    ]


def test_pairs_without_direction() -> None:
    assert len(PairScores(ScoreSpec("k"), values(), upward=False).top(99)) == 15


def test_frame_has_one_row_per_pair() -> None:
    frame = PairScores(ScoreSpec("k"), values()).to_pandas()
    assert list(frame["first"] + frame["second"]) == ["L0H0L1H0", "L0H0L1H1", "L0H1L1H0"]
    assert list(frame["value"]) == [0.1, 0.7, 0.7]
    assert list(frame["second_head"]) == [0, 1, 0]


def test_wrong_shape() -> None:
    with pytest.raises((InputError, TypeCheckError), match="layer head layer head"):
        PairScores(ScoreSpec("k"), np.zeros((2, 2, 2, 3)))
