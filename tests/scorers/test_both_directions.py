"""Scorers where queries see later keys: against loops over single keys, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headscope.base.stacks import MaskRule
from headscope.models.attention import visible_keys
from headscope.probes import Probe, from_tokens
from headscope.scorers import CATALOGUE, relative_offset
from headscope.views import AttentionRows

LENGTH, HEADS = 14, 3
RULE = MaskRule("bidirectional")


def probe() -> Probe:
    tokens = torch.randint(1, 9, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 11:] = False
    marks = {"separator": torch.zeros_like(real), "delimiter": torch.zeros_like(real)}
    for row, last in enumerate((LENGTH - 1, 10)):
        marks["separator"][row, last] = True
        marks["delimiter"][row, [4, last]] = True
    return from_tokens(tokens, real, marks)


def rows(p: Probe, mask: MaskRule = RULE) -> AttentionRows:
    visible = visible_keys(torch.arange(LENGTH), slice(0, LENGTH), len(p), mask=mask, real=p.real)
    scores = 3 * torch.randn(2, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    pattern = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return AttentionRows(0, torch.arange(LENGTH), pattern, visible, mask)


Weight = Callable[[Probe, int, int, int], float]


def same_earlier(p: Probe, b: int, i: int, j: int) -> float:
    return float(j < i and p.tokens[b, i] == p.tokens[b, j])


# Name -> what attention of query i on key j counts for; a score is the sum over the keys.
WEIGHTS: dict[str, Weight] = {
    "previous_token": lambda _p, _b, i, j: float(j == i - 1),
    "next_token": lambda _p, _b, i, j: float(j == i + 1),
    "current_token": lambda _p, _b, i, j: float(j == i),
    "duplicate_token": same_earlier,
    "first_token": lambda p, b, _i, j: float(j == p.first[b]),
    "delimiter": lambda p, b, _i, j: float(p.marks["delimiter"][b, j]),
    "separator": lambda p, b, _i, j: float(p.marks["separator"][b, j]),
    "local_window": lambda _p, _b, i, j: float(abs(i - j) < 8),
    "attention_distance": lambda _p, _b, i, j: float(abs(i - j)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_score_is_the_sum_over_keys_on_both_sides(name: str) -> None:
    p = probe()
    seen, scorer = rows(p), CATALOGUE[name]
    values, chosen = scorer(seen, p), scorer.queries(p)
    assert chosen.any()
    for b, i in chosen.nonzero().tolist():
        keys = [j for j in range(LENGTH) if p.real[b, j]]
        weights = torch.tensor([WEIGHTS[name](p, b, i, j) for j in keys])
        expected = (seen.pattern[b, :, i, keys] * weights).sum(-1)
        torch.testing.assert_close(values[b, :, i], expected, atol=1e-6, rtol=1e-5)


def test_the_next_token_is_asked_of_all_but_the_first_and_the_last() -> None:
    asked = CATALOGUE["next_token"].queries(probe())
    assert asked.sum(1).tolist() == [LENGTH - 2, 9]
    assert torch.equal(asked, relative_offset(-1).queries(probe()))
    assert relative_offset(-3).queries(probe())[1].nonzero().flatten().tolist() == list(range(1, 8))


def test_entropy_may_reach_the_log_of_all_keys() -> None:
    p = probe()
    even = rows(p).uniform()
    entropy = CATALOGUE["entropy"](even, p)[:, 0]
    expected = p.real.sum(1).float().log()[:, None].expand_as(entropy)
    torch.testing.assert_close(entropy[p.real], expected[p.real])
    share = CATALOGUE["normalised_entropy"](even, p)[:, 0]
    torch.testing.assert_close(share[p.real], torch.ones_like(share[p.real]))


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_chunks_change_nothing(name: str) -> None:
    p = probe()
    for mask in (RULE, MaskRule("bidirectional", window=4)):
        whole = rows(p, mask)
        parts = []
        for at in torch.arange(LENGTH).split(5):
            keys = mask.span(int(at[0]), int(at[-1]), LENGTH).stop
            part: Tensor = whole.pattern[:, :, at, :keys]
            cut = AttentionRows(0, at, part, whole.visible[:, at, :keys], mask)
            parts.append(CATALOGUE[name](cut, p))
        together = torch.cat(parts, -1)
        chosen = CATALOGUE[name].queries(p)[:, None].expand_as(together)
        torch.testing.assert_close(
            together[chosen], CATALOGUE[name](whole, p)[chosen], equal_nan=True
        )
