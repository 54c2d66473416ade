"""Heads that do one thing only get exactly 1 for it, and computable values for the rest."""

import math

import pytest
import torch

from headscope.probes import from_tokens
from headscope.scorers import CATALOGUE, relative_offset
from tests.scorers.support import averaged, one_hot_rows, repeated, uniform_rows

N = 6


def keys(what: str, bos: bool) -> torch.Tensor:
    """The key that a pure head looks at, for every query of ``[BOS] R R``."""
    length = 2 * N + bos
    i = torch.arange(length)
    second = i >= N + bos
    key = {
        "previous_token": (i - 1).clamp_min(0),
        "current_token": i,
        "first_token": torch.zeros_like(i),
        "duplicate_token": torch.where(second, i - N, i),
        "induction": torch.where(second, i - N + 1, i),
    }[what]
    return key.expand(2, -1)


PURE = ["previous_token", "current_token", "first_token", "duplicate_token", "induction"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("head", PURE)
def test_a_pure_head_scores_one_for_its_own_name(head: str, name: str, bos: bool) -> None:
    probe = repeated(N, bos=bos)
    score = averaged(CATALOGUE[name], one_hot_rows(keys(head, bos)), probe)
    others = {
        # Without a match these heads look at themselves: all queries but the first and N others.
        ("duplicate_token", "current_token"): (N - 1 + bos) / (2 * N - 1 + bos),
        ("induction", "current_token"): (N - 1 + bos) / (2 * N - 1 + bos),
        # Query 1 finds the first token before it.
        ("previous_token", "first_token"): 1 / (2 * N - 1 + bos),
        ("first_token", "previous_token"): 1 / (2 * N - 1 + bos),
        # Without a BOS the first token is the duplicate of one query of the second copy.
        ("first_token", "duplicate_token"): 0 if bos else 1 / N,
        ("duplicate_token", "first_token"): 0 if bos else 1 / (2 * N - 1),
    }
    expected = 1.0 if head == name else others.get((head, name), 0.0)
    torch.testing.assert_close(score, torch.full((2, 1), float(expected)))


def test_a_uniform_head_gets_the_computable_values() -> None:
    probe, length = repeated(N), 2 * N + 1
    rows = uniform_rows(2, length)
    i = torch.arange(1, length).float()
    late = torch.arange(N + 1, length).float()
    past = torch.arange(8, length).float()
    expected = {
        "previous_token": (1 / (i + 1)).mean(),
        "current_token": (1 / (i + 1)).mean(),
        "first_token": (1 / (i + 1)).mean(),
        "duplicate_token": (1 / (late + 1)).mean(),
        "induction": (1 / (late + 1)).mean(),
        "local_window": (8 / (past + 1)).mean(),
        "attention_distance": (i / 2).mean(),
        "entropy": (i + 1).log().mean(),
        "normalised_entropy": torch.tensor(1.0),
        "max_attention": (1 / (i + 1)).mean(),
        "previous_token_no_sink": (1 / i[1:]).sum() / len(i[1:]),  # query 1 has none but the sink
    }
    for name, value in expected.items():
        seen = rows.without_first(probe.first) if name.endswith("_no_sink") else rows
        score = averaged(CATALOGUE[name], seen, probe)
        torch.testing.assert_close(score, value.expand(2, 1), msg=lambda m, n=name: f"{n}: {m}")


def test_a_head_of_one_key_has_no_entropy_and_its_distance() -> None:
    probe = repeated(N)
    rows = one_hot_rows(keys("previous_token", True))
    assert averaged(CATALOGUE["entropy"], rows, probe).abs().max() == 0
    assert averaged(CATALOGUE["max_attention"], rows, probe).min() == 1
    assert averaged(CATALOGUE["attention_distance"], rows, probe).unique().tolist() == [1]
    assert averaged(relative_offset(1), rows, probe).min() == 1
    assert averaged(relative_offset(2), rows, probe).max() == 0


def test_short_distances_stay_exact_in_long_texts() -> None:
    length = 30_000
    probe = from_tokens(torch.arange(length)[None])
    query = torch.tensor([29_000, 29_500, 29_999])
    pattern = torch.zeros(1, 1, 3, length)
    pattern[..., torch.arange(3), query - 1] = 1
    rows = uniform_rows(1, 1)
    seen = torch.arange(length)[None] <= query[:, None]
    rows = type(rows)(0, query, pattern, seen[None])
    assert CATALOGUE["attention_distance"](rows, probe).tolist() == [[[1, 1, 1]]]


def test_induction_is_exactly_the_second_copy() -> None:
    for bos in (True, False):
        chosen = CATALOGUE["induction"].queries(repeated(N, bos=bos))
        assert chosen.sum(1).tolist() == [N, N]
        assert chosen[:, N + bos :].all()


def test_entropy_of_an_uneven_row_by_hand() -> None:
    probe = from_tokens([[1, 2, 3]])
    rows = uniform_rows(1, 3)
    pattern = rows.pattern.clone()
    pattern[..., 2, :] = torch.tensor([0.5, 0.25, 0.25])
    rows = type(rows)(0, rows.query_pos, pattern, rows.visible)
    by_hand = -(0.5 * math.log(0.5) + 0.5 * math.log(0.25))
    assert CATALOGUE["entropy"](rows, probe)[0, 0, 2].item() == pytest.approx(by_hand)
    halved = type(rows)(0, rows.query_pos, pattern / 2, rows.visible)  # a learned sink took half
    assert CATALOGUE["entropy"](halved, probe)[0, 0, 2].item() == pytest.approx(by_hand)
    distance = CATALOGUE["attention_distance"]
    torch.testing.assert_close(distance(halved, probe), distance(rows, probe))
