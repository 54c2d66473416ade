"""The diluted scores are the mean over all rows of attention on transformer-lens' matrices."""

import pytest
import torch

from headscope.probes import from_tokens
from headscope.scorers import CATALOGUE
from tests.scorers.support import averaged, one_hot_rows, random_rows

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 5]


def matrix(kind: str) -> torch.Tensor:
    """Detection matrix by its definition: 1 where the head should look."""
    size = len(TEXT)
    wanted = {
        "previous_token": lambda i, j: j == i - 1,
        "duplicate_token": lambda i, j: j < i and TEXT[j] == TEXT[i],
        "induction": lambda i, j: 0 < j <= i and TEXT[j - 1] == TEXT[i] and j - 1 < i,
    }[kind]
    return torch.tensor([[float(wanted(i, j)) for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("kind", ["previous_token", "duplicate_token", "induction"])
def test_equal_to_the_overlap_with_the_matrix(kind: str) -> None:
    probe = from_tokens([TEXT])
    rows = random_rows(probe)
    overlap = (rows.pattern * matrix(kind)).sum((-1, -2)) / rows.pattern.sum((-1, -2))
    torch.testing.assert_close(averaged(CATALOGUE[f"detect_head_{kind}"], rows, probe), overlap)


def test_a_perfect_induction_head_reaches_half() -> None:
    size = 8
    probe = from_tokens([[*range(size), *range(size)]])
    i = torch.arange(2 * size)
    rows = one_hot_rows(torch.where(i < size, i, i - size + 1)[None])
    assert averaged(CATALOGUE["detect_head_induction"], rows, probe).item() == 0.5
    assert averaged(CATALOGUE["induction"], rows, probe).item() == 1
