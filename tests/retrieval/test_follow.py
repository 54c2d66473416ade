"""The decoded score: by construction, by a slow reference, and where nothing can be seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import HeadscopeError, InputError
from headscope.retrieval import Run, agreement, decoded, follow, forced
from headscope.retrieval.follow import _Stops
from tests.handwired import Handwired, handwired_gpt2, handwired_llama
from tests.models.families import build


def hidden(key: list[int], answer: list[int], filler: list[int]) -> hs.Probe:
    """``[BOS] filler key answer filler key`` with the answer appended; one example."""
    half = len(filler) // 2
    ids = [0, *filler[:half], *key, *answer, *filler[half:], *key, *answer]
    at = 1 + half + len(key)
    size = len(answer)
    end = len(ids) - size - 1
    marks = {
        "needle": range(at - len(key), at + size),
        "needle_answer": range(at, at + size),
        "question": range(end + 1 - len(key), end + 1),
        "end": [end],
        "answer": range(end + 1, len(ids)),
        "answering": range(end, len(ids) - 1),
    }
    masks = {name: torch.zeros(1, len(ids), dtype=torch.bool) for name in marks}
    for name, where in marks.items():
        masks[name][0, list(where)] = True
    targets = torch.full((1, len(ids)), -1)
    targets[0, end:-1] = torch.tensor(answer)
    return hs.probes.from_tokens([ids], marks=masks, targets=targets)


@pytest.mark.parametrize("make", [handwired_gpt2, handwired_llama])
def test_the_one_head_that_retrieves_gets_one_and_others_zero(
    make: Callable[[], Handwired],
) -> None:
    wired = make()
    model = hs.load(wired.model, check=False)
    probe = hidden([7], [12, 9, 20, 15], [3, 4, 5, 6, 21, 22, 23, 24, 25, 26])
    found = decoded(model, probe, new_tokens=4, progress=False)
    expected = np.zeros(found.by_set.mean.shape)
    expected[wired.roles["induction"]] = 1.0
    assert found.runs.runs[0].tokens == (12, 9, 20, 15)
    for scores in (found.by_set, found.by_step, found.activation, forced(model, probe)):
        assert (scores.mean == expected).all(), scores.name
    assert found.heads() == (wired.roles["induction"],)
    assert "1 retrieval heads" in str(found)
    assert hs.retrieval.activity(found.activation)[wired.roles["induction"]] == "always"


def test_set_and_step_counting_part_where_the_needle_is_said_twice() -> None:
    copied = np.zeros((4, 1, 2), dtype=bool)
    copied[[0, 1, 2, 3], 0, 0] = True
    copied[[0, 2], 0, 1] = True
    said = Run((5, 6, 5, 6), "", 1.0, (5, 6), copied, np.ones((4, 1), dtype=bool))
    assert said.by_set.tolist() == [[1.0, 0.5]]
    assert said.by_step.tolist() == [[2.0, 1.0]]
    assert said.active.tolist() == [[1.0, 1.0]]
    twice = Run((5,), "", 1.0, (5, 5), copied[:1], np.ones((1, 1), dtype=bool))
    assert twice.by_set.tolist() == [[1.0, 1.0]]  # a set of tokens, as the paper writes it
    assert twice.by_step.tolist() == [[0.5, 0.5]]


def slow_reference(module: Any, probe: hs.Probe, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores by set and step ``[layer head example]``: eager, whole patterns, token by token."""
    module.set_attn_implementation("eager")
    by_set, by_step = [], []
    for row in range(len(probe)):
        end = int(probe.mark("end")[row].nonzero())
        text = probe.tokens[row : row + 1, : end + 1]
        needle = probe.mark("needle_answer")[row].nonzero().flatten().tolist()
        wanted = [int(probe.tokens[row, at]) for at in needle]
        sets: dict[tuple[int, int], set[int]] = {}
        counts: dict[tuple[int, int], int] = {}
        for _ in range(steps):
            with torch.no_grad():
                out = module(text, output_attentions=True, use_cache=False)
            said = int(out.logits[0, -1].argmax())
            for layer, pattern in enumerate(out.attentions):
                for head in range(pattern.shape[1]):
                    sets.setdefault((layer, head), set())
                    best = int(pattern[0, head, -1].argmax())
                    if best in needle and int(text[0, best]) == said:
                        sets[layer, head].add(said)
                        counts[layer, head] = counts.get((layer, head), 0) + 1
            text = torch.cat([text, torch.tensor([[said]])], 1)
        layers, heads = len(out.attentions), pattern.shape[1]
        cells = [(i, j) for i in range(layers) for j in range(heads)]
        of_set = [len(sets[cell]) / len(set(wanted)) for cell in cells]
        of_step = [counts.get(cell, 0) / len(needle) for cell in cells]
        by_set.append(np.reshape(of_set, (layers, heads)))
        by_step.append(np.reshape(of_step, (layers, heads)))
    return np.stack(by_set, -1), np.stack(by_step, -1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return hs.load("tiny-llama")


@pytest.fixture(scope="module")
def facts(llama: Any) -> hs.Probe:
    return hs.probes.needle(llama, lengths=[64, 120], depths=[0, 0.5, 1], per_cell=1)


@pytest.mark.parametrize("steps", [1, 6])
def test_equal_to_a_slow_reference(facts: hs.Probe, steps: int) -> None:
    model: Any = hs.load("tiny-llama")  # of its own: the reference changes its attention
    runs = follow(model, facts, new_tokens=steps, progress=False)
    by_set, by_step = slow_reference(model.module, facts, steps)
    full = [len(run.tokens) == steps for run in runs.runs]
    assert any(full)
    for row in np.flatnonzero(full):
        np.testing.assert_allclose(runs.runs[row].by_set, by_set[..., row], atol=0)
        np.testing.assert_allclose(runs.runs[row].by_step, by_step[..., row], atol=0)
    assert by_set.max() == 1


def test_both_forms_agree_on_a_trained_model(llama: Any, facts: hs.Probe) -> None:
    found = decoded(llama, facts, progress=False)
    other = forced(llama, facts, runs=found.runs, progress=False)
    close = hs.retrieval.agreement(found.by_set, other, k=7)
    assert found.runs.accuracy == 1
    assert close.rank_correlation > 0.99
    assert close.overlap == 1
    assert close.largest_difference < 0.1
    assert "rank correlation" in str(close)


def test_retrieval_heads_of_the_bundled_model_exist_and_are_few(llama: Any) -> None:
    probe = hs.probes.needle(llama, lengths=[128, 250], depths=3, per_cell=2, seed=5)
    found = decoded(llama, probe, progress=False)
    heads = found.heads()
    assert 1 <= len(heads) <= 8  # of 24
    assert {head.layer for head in heads} == {2}
    assert found.by_set.mean[0].max() < 0.1
    significant = found.by_set.significant()
    assert all(significant[head] for head in heads)
    assert found.by_set.null.max() < 0.1
    assert found.by_set.provenance.probe["form"] == "decoded"
    assert found.by_set.provenance.control == "removed"
    low, high = found.by_set.interval()
    assert ((low <= found.by_set.mean) & (found.by_set.mean <= high)).all()


def test_batches_change_nothing(llama: Any, facts: hs.Probe) -> None:
    one, many = (follow(llama, facts, batch_size=n, progress=False) for n in (1, 8))
    for a, b in zip(one.runs, many.runs, strict=True):
        assert a.tokens == b.tokens
        assert (a.copied == b.copied).all()


def test_the_grid_holds_every_cell(llama: Any, facts: hs.Probe) -> None:
    lengths, depths, right, count = follow(llama, facts, progress=False).grid()
    assert lengths.tolist() == [64, 120]
    assert depths.tolist() == [0, 0.5, 1]
    assert right.shape == count.shape == (2, 3)
    assert (count == 1).all()
    assert (right == 1).all()


def test_a_needle_outside_the_window_is_missing_not_zero() -> None:
    model = hs.load(build("gemma2"), check=False)  # windows of 5 in layers 0 and 2
    probe = hidden([7], [12, 9], list(range(20, 40)))
    found = decoded(model, probe, new_tokens=2, threshold=-1, progress=False)
    other = forced(model, probe, progress=False)
    for scores in (found.by_set, found.by_step, found.activation, other):
        assert np.isnan(scores.mean[[0, 2]]).all()
        assert not np.isnan(scores.mean[1]).any()
        assert (scores.missing[[0, 2]] > 0).all()
        assert (scores.missing[1] == 0).all()
    near = hidden([7], [12, 9], [20, 21])
    seen = decoded(model, near, new_tokens=2, threshold=-1, progress=False)
    assert not np.isnan(seen.by_set.mean).any()


def test_only_runs_above_the_threshold_count(llama: Any) -> None:
    probe = hs.probes.needle(llama, lengths=96, depths=2, per_cell=2)
    runs = follow(llama, probe, progress=False)
    assert runs.counted.all()
    with pytest.raises(HeadscopeError, match="answered none of the 4 examples"):
        decoded(llama, probe, threshold=1, progress=False)


def test_runs_stop_at_a_line_break(llama: Any) -> None:
    end = llama.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    stops = _Stops(llama)
    assert [stops(end, 0), stops(end, 1), stops(40, 1)] == [False, True, False]
    assert stops(llama.tokenizer.eos_token_id, 0)


def test_runs_stop_where_a_chat_model_ends_its_turn(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    eos = llama.tokenizer.eos_token_id
    monkeypatch.setattr(llama.module.generation_config, "eos_token_id", [eos, 41])
    stops = _Stops(llama)
    assert [stops(token, 0) for token in (eos, 41, 42)] == [True, True, False]


def test_what_cannot_be_decoded_is_said_first(llama: Any) -> None:
    probe = hs.probes.needle(llama, lengths=256, depths=[0.5], per_cell=1)
    with pytest.raises(InputError, match="steps are more than the 256"):
        follow(llama, probe, new_tokens=50)
    with pytest.raises(InputError, match="no mark 'end'"):
        follow(llama, hs.probes.from_tokens([[1, 2, 3]]))
    with pytest.raises(InputError, match="new_tokens=0"):
        follow(llama, probe, new_tokens=0)


def test_half_precision_is_near(llama: Any) -> None:
    exact, half = llama, hs.load("tiny-llama", dtype="bf16")
    probe = hs.probes.needle(exact, lengths=64, depths=[0.5], per_cell=3)
    for form in (forced, lambda *given, **kept: decoded(*given, **kept).by_set):
        found, expected = (form(model, probe, progress=False) for model in (half, exact))
        assert found.provenance.dtype == "bfloat16"
        assert np.abs(found.mean - expected.mean).max() < 0.3  # one token in four, at most
        assert agreement(found, expected, 5).rank_correlation > 0.8
