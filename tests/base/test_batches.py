"""Batches: named inputs become probes, and what cannot be handed to a model is refused."""

from typing import Any

import pytest
import torch

import headscope as hs
from headscope.base.batches import Batch
from headscope.errors import InputError
from tests.models.encoders import tokenizer


def test_what_a_tokenizer_gives_becomes_a_probe() -> None:
    texts = ["the cat sat", "the dog ran fast to the house"]
    for side in ("left", "right"):
        read = tokenizer()
        read.padding_side = side
        given = read(texts, padding=True, return_tensors="pt")
        probe = hs.probes.from_batch(given)
        assert torch.equal(probe.tokens, given["input_ids"])
        assert torch.equal(probe.real, given["attention_mask"].bool())
        assert bool(probe.real[0, 0]) == (side == "right")
        assert probe.next_token
        assert (probe.structure[~probe.real] == -1).all()


def test_targets_and_marks_are_kept() -> None:
    tokens = torch.tensor([[2, 4, 7, 3]])
    mark = tokens == 4
    targets = torch.tensor([[-1, 6, -1, -1]])
    probe = hs.probes.from_batch({"input_ids": tokens}, {"hidden": mark}, targets)
    assert torch.equal(probe.targets, targets)
    assert torch.equal(probe.mark("hidden"), mark)
    assert not probe.next_token
    batch = probe.batch
    assert torch.equal(batch.inputs["input_ids"], tokens)
    assert batch.masks["text"].all()
    assert batch.targets is not None
    assert len(batch) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"attention_mask": [[1, 1]]}, "it has: attention_mask"),
    "images of three axes": ({"pixel_values": torch.zeros(3, 4, 4)}, "not .batch channel height"),
    "images and a text mask": (
        {"pixel_values": torch.zeros(1, 3, 4, 4), "attention_mask": [[1]]},
        "'attention_mask'",
    ),
    "a second input": ({"input_ids": [[1, 2]], "position_ids": [[0, 1]]}, "position_ids"),
    "labels": ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "give targets="),
    "segments": ({"input_ids": [[1, 2]], "token_type_ids": [[0, 1]]}, "second segments"),
    "one row": ({"input_ids": [1, 2]}, r"\(2,\), not \[batch pos\]"),
    "ragged": ({"input_ids": [[1, 2], [3]]}, "of one length"),
    "fractions": ({"input_ids": [[1.5, 2.0]]}, "fractions"),
    "another shape": ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "has shape"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_handed_on_is_refused(what: str) -> None:
    inputs, reason = REFUSED[what]
    with pytest.raises(InputError, match=reason):
        hs.probes.from_batch(inputs)


def test_segments_of_zeros_and_at_padding_change_nothing() -> None:
    inputs = {"input_ids": [[5, 6]], "token_type_ids": [[0, 1]], "attention_mask": [[1, 0]]}
    assert hs.probes.from_batch(inputs).real.tolist() == [[True, False]]


def test_examples_must_be_as_many_everywhere() -> None:
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(InputError, match="different numbers of examples: input_ids 2, mask of"):
        Batch({"input_ids": tokens}, {"text": torch.ones(1, 3, dtype=torch.bool)})


def test_a_batch_says_why_a_model_cannot_read_it() -> None:
    batch = Batch.of({"input_ids": [[5, 7, 9]]})
    assert batch.misfit("it", 3, 10) is None
    assert "3 tokens, but it sees at most 2" in str(batch.misfit("it", 2, 10))
    assert "5 to 9, but it knows 0 to 8" in str(batch.misfit("it", None, 9))
    assert batch.labels(None) == ["5", "7", "9"]
    assert batch.labels(tokenizer()) == ["the", "sat", "mat"]
