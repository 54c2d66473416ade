from inspect import unwrap

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.errors import InputError
from headscope.probes import Probe, from_tokens


def test_your_own_tokens() -> None:
    real = torch.tensor([[False, True, True, True], [True, True, True, False]])
    probe = from_tokens([[9, 5, 7, 5], [1, 2, 3, 9]], real, {"end": real & False})
    assert probe.targets.tolist() == [[-1, 7, 5, -1], [2, 3, -1, -1]]
    assert probe.structure.tolist() == [[-1, 5, 7, 5], [1, 2, 3, -1]]
    assert probe.first.tolist() == [1, 0]
    assert probe.last.tolist() == [3, 2]
    assert probe.position_in_text.tolist() == [[-1, 0, 1, 2], [0, 1, 2, 3]]
    assert probe.control is None


@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-1, 4), min_size=n, max_size=n), min_size=1, max_size=3
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_earlier_occurrences_by_hand(rows: list[list[int]]) -> None:
    labels = torch.tensor(rows)
    real = torch.ones_like(labels, dtype=torch.bool)
    probe = Probe(tokens=labels.clamp_min(0), real=real, structure=labels, targets=labels)
    counts = []
    for b, row in enumerate(rows):
        for i, label in enumerate(row):
            earlier = [j for j in range(i) if row[j] == label and label >= 0]
            assert probe.previous_occurrence[b, i] == (earlier[-1] if earlier else -1)
            counts.append(len(earlier))
    assert probe.most_earlier == max(counts)


def test_padding_is_no_occurrence() -> None:
    real = torch.tensor([[False, True, True, False]])
    probe = Probe(*(torch.full((1, 4), 3), real, torch.full((1, 4), 3), torch.full((1, 4), 3)))
    assert probe.previous_occurrence.tolist() == [[-1, -1, 1, -1]]
    assert probe.most_earlier == 1


def test_examples_and_devices_keep_everything() -> None:
    tokens = torch.arange(12).view(3, 4)
    probe = from_tokens(tokens, marks={"end": tokens % 4 == 3})
    part = probe.examples(slice(1, 3)).to("cpu")
    assert part.tokens.equal(tokens[1:])
    assert part.marks["end"].equal(probe.marks["end"][1:])
    assert part.settings == probe.settings


@pytest.mark.parametrize(
    ("tokens", "real", "told"),
    [
        ([[1, 2], [3]], None, "rows of whole numbers"),
        ([["a"]], None, "whole numbers"),
        ([[1, 2, 3]], [[True, False, True]], "unbroken run"),
        ([[1, 2, 3]], [[False, False, False]], "unbroken run"),
        ([[]], None, "batch of sequences"),
    ],
)
def test_what_is_no_probe(tokens: list, real: list | None, told: str) -> None:
    with pytest.raises(InputError, match=told):
        unwrap(from_tokens)(tokens, None if real is None else torch.tensor(real))


def test_shapes_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.ones(2, 3, dtype=torch.long)
    real = tokens.bool()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(InputError, match="'end' has shape"):
        Probe(tokens, real, tokens, tokens, marks={"end": real[:1]})
    with pytest.raises(InputError, match="no mark 'needle'; it has: end"):
        Probe(tokens, real, tokens, tokens, marks={"end": real}).mark("needle")
