"""Mask rules against masks written out by hand, and addresses of heads in stacks."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from headscope.base.stacks import MaskRule, Stack
from headscope.errors import InputError
from headscope.heads import HeadIndex


def by_hand(rule: MaskRule, query: int, key: int) -> bool:
    if rule.kind == "causal" and key > query:
        return False
    if rule.window is not None and abs(query - key) >= rule.window:
        return False
    return rule.block is None or query // rule.block == key // rule.block


RULES = [
    MaskRule(kind, window, block)
    for kind in ("causal", "bidirectional")
    for window in (None, 1, 3)
    for block in (None, 4)
] + [MaskRule("cross")]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("arange", [np.arange, torch.arange])
def test_rule_shows_the_keys_that_its_definition_shows(rule: MaskRule, arange: Any) -> None:
    seen = rule.visible(arange(9), arange(11))
    assert seen.tolist() == [[by_hand(rule, q, k) for k in range(11)] for q in range(9)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_span_is_the_smallest_run_of_visible_keys(rule: MaskRule) -> None:
    for first in range(9):
        for last in range(first, 9):
            keys = [k for k in range(11) for q in range(first, last + 1) if by_hand(rule, q, k)]
            span = rule.span(first, last, 11)
            assert (span.start, span.stop) == (min(keys), max(keys) + 1)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="window=0"):
        MaskRule("causal", window=0)
    with pytest.raises(InputError, match="cross-attention has no window"):
        MaskRule("cross", window=3)


def test_addresses_name_their_stack() -> None:
    head = HeadIndex(3, 2, "cross")
    assert str(head) == "X3H2"
    assert HeadIndex.parse("x3h2") == head
    assert HeadIndex.parse(head) == head
    assert pickle.loads(pickle.dumps(head)) == head  # noqa: S301  # made here


def test_heads_of_different_stacks_are_different() -> None:
    heads = {HeadIndex(0, 1, stack) for stack in ("", "encoder", "decoder", "cross", "vision")}
    assert len(heads) == 5
    assert HeadIndex(0, 1) in heads
    assert (0, 1) in heads
    assert HeadIndex(0, 1, "encoder") != (0, 1)
    assert HeadIndex(0, 1) == (0, 1)


def test_a_head_indexes_an_array_by_layer_and_head() -> None:
    values = np.arange(12).reshape(3, 4)
    assert values[HeadIndex(2, 1, "vision")] == 9


def test_unknown_stacks_and_heads_get_a_sentence() -> None:
    with pytest.raises(InputError, match="unknown stack 'encodr'; did you mean 'encoder'"):
        HeadIndex(0, 0, "encodr")
    stack = Stack("cross", 2, 4, 4, 8, MaskRule("cross"), queries="decoder", keys="encoder")
    with pytest.raises(InputError, match="no head X2H0"):
        stack.head(2, 0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_most_keys_that_any_query_sees_bound_every_row(rule: MaskRule) -> None:
    most = max(int(row.sum()) for row in rule.visible(np.arange(60), np.arange(60)))
    assert most <= rule.sees(60)
    assert rule.block is not None or most == rule.sees(60)
