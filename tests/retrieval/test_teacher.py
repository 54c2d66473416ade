"""Teacher-forced runs: equal to decoding where the answer is what greedy decoding says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.retrieval import follow, forced, forms, scan_grid
from headscope.retrieval.follow import follow_forced
from tests.models.families import build

STEPS = 4


def greedy_probe(model: Any, module: Any) -> hs.Probe:
    """Prompts of unequal lengths that are followed by what greedy decoding says."""
    made = torch.Generator().manual_seed(2)
    tokens = torch.zeros(4, 20 + STEPS, dtype=torch.long)
    real = torch.zeros_like(tokens, dtype=torch.bool)
    marks = {name: real.clone() for name in ("needle_answer", "end", "answer", "answering")}
    targets = torch.full_like(tokens, -1)
    for row, length in enumerate((14, 20, 14, 17)):
        prompt = torch.randint(3, 61, (1, length), generator=made)
        whole = prompt
        for _ in range(STEPS):
            with torch.no_grad():
                said = module(whole).logits[:, -1:].argmax(-1)
            whole = torch.cat([whole, said], 1)
        size = length + STEPS
        tokens[row, :size], real[row, :size] = whole[0], True
        marks["needle_answer"][row, 1 : length - (9 if row == 3 else 1)] = True
        marks["end"][row, length - 1] = True
        marks["answer"][row, length:size] = True
        marks["answering"][row, length - 1 : size - 1] = True
        targets[row, length - 1 : size - 1] = whole[0, length:]
    return hs.probes.from_tokens(tokens, real=real, targets=targets, marks=marks)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_equal_to_decoding_and_to_the_scorer(family: str) -> None:
    module = build(family)
    model = hs.load(module, check=False)
    probe = greedy_probe(model, module)
    ours = follow_forced(model, probe, batch_size=2, progress=False)
    other = follow(model, probe, new_tokens=STEPS, progress=False)
    for one, two in zip(ours.runs, other.runs, strict=True):
        assert one.tokens == two.tokens
        assert one.response == two.response
        assert one.recall == two.recall
        assert one.needle == two.needle
        np.testing.assert_array_equal(one.copied, two.copied)
        np.testing.assert_array_equal(one.reachable, two.reachable)
    assert sum(run.copied.sum() for run in ours.runs) > 3
    if family == "mistral":  # its window hides some
        assert not all(run.reachable.all() for run in ours.runs)
    scores = forced(model, probe, progress=False).per_example
    for row, run in enumerate(ours.runs):
        seen = run.reachable[..., None]
        with np.errstate(invalid="ignore"):
            mean = (run.copied & seen).sum(0) / seen.sum(0)
        np.testing.assert_allclose(scores[..., row], mean, atol=1e-6)


def test_all_texts_are_scored_and_recall_is_told_apart() -> None:
    model = hs.load("tiny-llama", extrapolate=True)
    probe: dict[str, Any] = {"lengths": [200, 1500], "depths": [0, 0.5], "per_cell": 1, "seed": 4}
    found, whole = scan_grid(model, form="forced", progress=False, **probe)
    assert found.runs.scored.all()
    right = found.recall_grid().share
    assert right[0].tolist() == [1, 1]
    assert right[1].tolist() == [0, 0]  # far beyond the trained length
    scorer = forced(model, whole, progress=False)
    np.testing.assert_allclose(found.by_step.per_example, scorer.per_example, atol=1e-6)
    np.testing.assert_allclose(found.by_step.null, scorer.null, atol=1e-6)
    facts = found.by_set.provenance.probe
    assert (facts["form"], facts["runs_counted"]) == ("forced", 4)
    assert facts["runs_answered"] == int(found.runs.counted.sum())
    assert "4 texts with the answer appended" in str(found)


def test_cells_go_on_and_are_not_those_of_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hs.load("tiny-llama")
    grid: dict[str, Any] = {"lengths": 64, "depths": [0, 1], "per_cell": 1, "folder": tmp_path}
    scan_grid(model, **grid, progress=False)
    first = scan_grid(model, **grid, form="forced", progress=False).retrieval
    assert len(list(tmp_path.glob("*.parquet"))) == 4

    def never(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("a finished cell was run again")

    module: Any = forms
    monkeypatch.setattr(module, "follow_forced", never)
    again = scan_grid(model, **grid, form="forced", progress=False).retrieval
    np.testing.assert_array_equal(again.by_set.per_example, first.by_set.per_example)
    np.testing.assert_array_equal(again.by_set.null, first.by_set.null)


def test_what_does_not_fit_is_said() -> None:
    model = hs.load("tiny-llama")
    bare = hs.probes.repeated_tokens(model, length=8, batch=2)
    with pytest.raises(InputError, match="end"):
        follow_forced(model, bare)
    with pytest.raises(InputError, match="generates nothing"):
        scan_grid(model, 64, form="forced", new_tokens=3)


@pytest.mark.parametrize("form", [follow, follow_forced])
def test_an_example_without_its_marks_is_named(form: Callable[..., object]) -> None:
    model = hs.load("tiny-llama")
    probe = hs.probes.needle(model, lengths=64, depths=2, per_cell=1)
    needle = probe.mark("needle_answer").clone()
    needle[1] = False
    bare = replace(probe, marks={**probe.marks, "needle_answer": needle})
    with pytest.raises(InputError, match=r"example 1 has no token marked 'needle_answer': make"):
        form(model, bare)
