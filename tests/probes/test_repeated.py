from itertools import pairwise

import pytest
import torch

from headscope.errors import InputError
from headscope.probes import random_tokens, repeated_tokens, uses_bos
from tests.probes.support import Reader, reader, real_reader, shape_of


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("copies", [2, 3])
def test_bos_then_the_same_tokens_again(bos: bool, copies: int) -> None:
    model = reader(bos)
    probe = repeated_tokens(model, length=20, batch=3, copies=copies)
    assert uses_bos(model) is bos
    assert probe.tokens.shape == (3, bos + 20 * copies)
    if bos:
        assert (probe.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    parts = probe.tokens[:, bos:].unflatten(1, (copies, 20))
    assert (parts == parts[:, :1]).all()
    assert all(len(set(row)) == 20 for row in parts[:, 0].tolist())
    assert probe.marks["first_copy"].sum(1).tolist() == [20] * 3
    assert probe.marks["second_copy"].sum(1).tolist() == [20 * (copies - 1)] * 3
    assert not (probe.marks["first_copy"] & probe.marks["second_copy"]).any()
    assert probe.previous_occurrence.ge(0).equal(probe.marks["second_copy"])
    assert probe.most_earlier == copies - 1
    assert probe.targets[:, :-1].equal(probe.tokens[:, 1:])
    assert (probe.targets[:, -1] == -1).all()
    assert probe.settings == {"length": 20, "copies": copies, "bos": bos, "replacement": False}


def test_only_ordinary_tokens_are_drawn() -> None:
    model = reader(extra=500)
    tokens = random_tokens(model, length=250, batch=40).tokens[:, 1:]
    assert tokens.max() < len(model.tokenizer)
    assert tokens.min() > 1  # <s> and the reserved token are special


@pytest.mark.parametrize("length", [3, 4, 7, 30])
@pytest.mark.parametrize("copies", [2, 3])
def test_the_control_permutes_the_later_copies(length: int, copies: int) -> None:
    probe = repeated_tokens(reader(), length=length, batch=4, copies=copies)
    control = probe.control
    assert control is not None
    assert control.paired
    assert control.tokens.shape == probe.tokens.shape
    assert control.tokens[:, : 1 + length].equal(probe.tokens[:, : 1 + length])
    for row in range(4):
        first, *later = control.tokens[row, 1:].unflatten(0, (copies, length)).tolist()
        asked = (control.previous_occurrence[row, 1:] >= 0).unflatten(0, (copies, length))
        assert not asked[0].any()
        for copy, wanted in zip(later, asked[1:], strict=True):
            assert sorted(copy) == sorted(first)
            for j in wanted.nonzero().flatten().tolist():
                # the query is another token, and the key's token is the next that will be said
                assert copy[j] != first[j]
                assert copy[(j + 1) % length] == first[(j + 1) % length]
                assert first[(j + 1) % length] not in copy[: j + 1] or j == length - 1
            assert not set(pairwise(copy)) & set(pairwise(first))
            if length > 3:
                assert wanted.sum() >= length // 2 - 1


def test_all_places_count_alike_in_the_control() -> None:
    control = repeated_tokens(reader(), length=30, batch=4).control
    assert control is not None
    assert (control.previous_occurrence >= 0).sum(0)[31:].tolist() == [2] * 30


def test_of_two_tokens_there_is_no_other_order() -> None:
    probe = repeated_tokens(reader(), length=2, batch=4)
    control = probe.control
    assert control is not None
    assert all(len(set(row)) == len(row) for row in control.tokens.tolist())
    assert control.structure.equal(probe.structure)


def test_the_control_has_the_facts_of_the_probe() -> None:
    probe = repeated_tokens(reader(), length=30, batch=4)
    control = probe.control
    assert control is not None
    assert control.targets[:, :-1].equal(control.tokens[:, 1:])
    assert all(control.marks[name].equal(mark) for name, mark in probe.marks.items())
    assert control.name == "repeated_tokens_control"


def test_the_seed_decides_the_bytes() -> None:
    model = reader()
    one, same, other = (repeated_tokens(model, seed=seed) for seed in (3, 3, 4))
    assert one.tokens.equal(same.tokens)
    assert not one.tokens.equal(other.tokens)
    assert one.control is not None
    assert same.control is not None
    assert one.control.tokens.equal(same.control.tokens)
    before = torch.random.get_rng_state()
    repeated_tokens(model)
    assert torch.random.get_rng_state().equal(before)  # nobody else's randomness is touched


def test_more_examples_begin_with_the_same_ones() -> None:
    few, many = (repeated_tokens(reader(), batch=batch).tokens for batch in (2, 5))
    assert many[:2].equal(few)


def test_without_a_tokenizer_every_id_counts_and_there_is_no_bos() -> None:
    probe = repeated_tokens(Reader(None, shape_of(40)), length=40, batch=2)
    assert probe.tokens.shape == (2, 80)
    assert all(set(row) == set(range(40)) for row in probe.tokens.tolist())


def test_a_small_vocabulary_is_drawn_from_with_replacement() -> None:
    probe = repeated_tokens(Reader(None, shape_of(5)), length=12, batch=2)
    assert probe.settings["replacement"] is True
    assert probe.most_earlier > 1
    assert probe.structure.equal(probe.tokens)


def test_what_does_not_fit_is_refused() -> None:
    model = reader(n_ctx=64)
    with pytest.raises(InputError, match="101 tokens long, a test model reads at most 64"):
        repeated_tokens(model)
    repeated_tokens(model, length=31)
    repeated_tokens(reader(n_ctx=None), length=300)
    for wrong in ({"length": 0}, {"batch": 0}, {"copies": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            repeated_tokens(model, **{"length": 5, **wrong})
    with pytest.raises(InputError, match="no BOS"):
        repeated_tokens(Reader(None), length=5, bos=True)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_gpt2_is_not_given_a_bos_unless_asked(name: str) -> None:
    model = real_reader(name)
    assert not uses_bos(model)
    assert repeated_tokens(model).tokens.shape == (8, 100)
    asked = repeated_tokens(model, bos=True).tokens
    assert asked.shape == (8, 101)
    assert (asked[:, 0] == model.tokenizer.bos_token_id).all()
