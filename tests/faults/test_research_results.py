"""What a day of research asked of results: fast cards, exact ranks, pictures, files, norms."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope import circuits
from headscope.circuits.dictionary import Dictionary
from headscope.circuits.ranks import Ranks
from headscope.errors import UnsupportedModelError
from headscope.models.hf.model import HFModel
from headscope.table import HeadTable
from tests.circuits.conftest import random_model

D_VOCAB = 97


def slow_ranks(model: HFModel, words: Dictionary, head: tuple[int, int]) -> Ranks:
    """Places of all tokens in the whole token-to-logit matrix of one head."""
    every = torch.arange(D_VOCAB)
    matrix = words.inputs(every, head[0]) @ circuits.ov(model).explicit(head)
    logits = matrix @ words.outputs(every).T
    sides = []
    for signed in (logits, -logits):
        order = signed.argsort(dim=1, descending=True, stable=True)
        sides.append((order == every[:, None]).int().argmax(1))
    return Ranks(*sides)


@pytest.mark.parametrize("limit", [None, 1, 5])
@pytest.mark.parametrize("first", [2, 512])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_e4_ranks_are_those_of_the_whole_matrix_whatever_the_limit_and_the_blocks(
    family: str, first: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.circuits.ranks._FIRST_BLOCK", first)
    model, every = random_model(family), torch.arange(D_VOCAB)
    words = Dictionary(model, "mlp")
    found = circuits.target_ranks(
        circuits.ov(model),
        lambda layer: words.inputs(every, layer),
        words.outputs,
        every,
        words.size,
        limit=limit,
    )
    for head in ((0, 3), (2, 1)):
        for side, whole in zip(found, slow_ranks(model, words, head), strict=True):
            expected = whole if limit is None else whole.clamp_max(limit)
            assert torch.equal(side[head], expected)


def test_e4_undecided_pairs_alone_see_the_rest_of_the_vocabulary() -> None:
    """Work after the first block falls with the pairs that are left: counted in looked-up rows."""
    model, tokens = random_model("llama"), torch.arange(60, 70)
    words, seen = Dictionary(model), []

    def outputs(ids: Tensor) -> Tensor:
        seen.append(len(ids))
        return words.outputs(ids.remainder(D_VOCAB))

    ranks = circuits.target_ranks(
        circuits.ov(model),
        lambda layer: words.inputs(tokens, layer),
        outputs,
        tokens,
        10**6,
        limit=1,
    )
    assert sum(seen) < 10**5
    assert bool((ranks.promoted <= 1).all())


def test_e4_one_pass_serves_every_k(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = circuits.target_ranks

    def counted(*given: Any, **words: Any) -> Ranks:
        calls.append(words["limit"])
        return real(*given, **words)

    model = random_model("llama")
    monkeypatch.setattr("headscope.circuits.copying.target_ranks", counted)
    table = circuits.score(model, tokens=20, k=3, embeddings=["raw"])
    assert calls == [3, 3]  # OV once, QK once
    assert (table["copying_top3"].mean >= table["copying_top1"].mean).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
def test_e4_a_card_scores_one_head_and_has_the_numbers_of_the_whole_table(family: str) -> None:
    model = random_model(family)
    table, relations = circuits.score(model), _relations(model)
    table = table if relations is None else table.join(relations)
    whole = circuits.head_card(model, "L1H2", table=table)
    alone = circuits.head_card(model, "L1H2")
    assert alone.ranks == {}
    assert set(alone.scores) == {name for name in whole.scores if not name.endswith("_mlp")}
    for name, value in alone.scores.items():
        assert value == pytest.approx(whole.scores[name], rel=1e-4, abs=1e-5), name
    assert (alone.ov, alone.qk) == (whole.ov, whole.qk)
    assert set(whole.missing) <= set(alone.missing)


def _relations(model: HFModel) -> HeadTable | None:
    try:
        return circuits.relation_scores(model)
    except UnsupportedModelError:
        return None


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_e4_partners_of_one_head_are_those_of_all_pairs(family: str, mode: str) -> None:
    model = random_model(family)
    pairs = circuits.composition(model, mode).values
    below, above = circuits.partners(model, mode, "L1H2")
    assert {head.layer for head, _ in below} == {0}
    assert {head.layer for head, _ in above} == {2}
    for head, value in below:
        assert value == pytest.approx(pairs[head.layer, head.head, 1, 2], abs=1e-6)
    for head, value in above:
        assert value == pytest.approx(pairs[1, 2, head.layer, head.head], abs=1e-6)
    assert [value for _, value in below] == sorted((value for _, value in below), reverse=True)


def test_e4_a_vocabulary_too_large_to_keep_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama")
    kept = circuits.score(model, tokens=20)
    monkeypatch.setattr("headscope.circuits.dictionary._KEPT_ENTRIES", 10)
    anew = circuits.score(model, tokens=20)
    for name, scores in kept.items():
        np.testing.assert_allclose(anew[name].mean, scores.mean, atol=1e-5, err_msg=name)


def test_e4_the_memory_of_ranks_does_not_grow_with_the_vocabulary() -> None:
    """Largest block of token vectors that is ever asked for, at 49k and at 262k words."""
    model, tokens = random_model("llama"), torch.arange(10)
    words, most = Dictionary(model), {}
    for size in (49_152, 262_144):
        seen: list[int] = []

        def outputs(ids: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(ids))
            return words.outputs(ids.remainder(D_VOCAB))

        circuits.target_ranks(
            circuits.ov(model), lambda layer: words.inputs(tokens, layer), outputs, tokens, size
        )
        assert sum(seen) == size + len(tokens)
        most[size] = max(seen) * model.shape.d_model
    assert max(most.values()) <= 1 << 22
