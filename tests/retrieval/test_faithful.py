"""Passages against memory, the three ways of generating side by side."""

from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.probes import Needle
from headscope.retrieval import contradictions, decoded, faithfulness


@pytest.fixture(scope="module")
def model() -> Any:
    return hs.load("tiny-gpt2")


@pytest.fixture(scope="module")
def heads(model: Any) -> Any:
    find = hs.probes.needle(model, lengths=96, depths=3, per_cell=2, seed=3)
    return decoded(model, find, progress=False).heads()


def test_passages_contradict_what_the_model_says_by_itself(model: Any) -> None:
    probe = contradictions(model, examples=6, length=110, distractors=3, seed=4)
    values = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
              "eleven", "twelve", "twenty", "thirty", "forty", "fifty", "sixty", "hundred",
              "thousand"]  # fmt: skip
    ids = [model.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in values]
    for row in range(6):
        text = model.tokenizer.decode(probe.tokens[row, probe.real[row]])
        question = text[: text.rindex(" is ") + 3].split(". ")[-1]
        alone = torch.tensor([[model.tokenizer.bos_token_id, *model.tokenizer(question, add_special_tokens=False).input_ids]])  # noqa: E501  # fmt: skip
        with torch.no_grad():
            logits = model.forward(alone)[0, -1]
        likeliest = max(ids, key=lambda i: float(logits[i]))
        start = int((probe.targets[row] >= 0).nonzero()[0])
        assert probe.foils is not None
        assert int(probe.foils[row, start]) == likeliest
        answer = int(probe.targets[row, start])
        assert answer != likeliest
        assert float(logits[answer]) <= float(logits[ids].median())
        assert text.count(question) == 2  # told once, asked once
    other = contradictions(model, examples=6, length=110, distractors=3, seed=4)
    assert torch.equal(other.tokens, probe.tokens)


def test_retrieval_heads_are_why_the_passage_is_believed(model: Any, heads: Any) -> None:
    probe = contradictions(model, examples=24, length=120, distractors=4, seed=1)
    found = faithfulness(model, probe, heads, alphas=["entropy", 0.5, 0])
    assert found.arms == ("base", "masked", "DeCoRe entropy", "DeCoRe 0.5", "DeCoRe 0")
    shares = found.passage.mean(1)
    assert shares[0] > 0.9
    assert shares[1] < 0.1
    assert shares[2] > 0.9
    margin = found.margin.mean(1)
    assert margin[0] > margin[1] + 10
    # the contrast by hand: (1 + a) base - a masked, and a difference cancels the normaliser
    np.testing.assert_allclose(
        found.margin[3], 1.5 * found.margin[0] - 0.5 * found.margin[1], atol=1e-3
    )
    np.testing.assert_allclose(found.margin[4], found.margin[0], atol=1e-4)
    random = [head for head in model.shape.heads if head not in heads][-len(heads) :]
    assert faithfulness(model, probe, random, alphas=[]).passage.mean(1)[1] > 0.9
    frame = found.to_pandas()
    np.testing.assert_allclose(frame.passage + frame.own + frame.neither, 1)
    assert "as the passage says" in str(found)
    small = faithfulness(model, probe, heads, alphas=["entropy"], batch_size=5)
    assert small.texts == found.texts[:3]


def test_needles_of_your_own_keep_those_that_contradict() -> None:
    model: Any = hs.load("tiny-llama")
    asked = [f"The {one} of the red door is" for one in ("code", "number", "price", "size", "sign")]
    alone = hs.retrieval.generate(model, asked, new_tokens=1).texts
    whole = [(one, text) for one, text in zip(asked, alone, strict=True) if text[:1] == " "]
    question, said = whole[0][0], whole[0][1].strip()
    word = next(w for w in ("seven", "nine") if w != said)
    own = Needle((f"{question} {said}.",), question, said, (said,), cloze=True)
    against = Needle((f"{question} {word}.",), question, word, (word,), cloze=True)
    probe = contradictions(model, [own, against], length=64)
    assert len(probe) == 1
    assert word in model.tokenizer.decode(probe.tokens[0])
    with pytest.raises(InputError, match="gives every answer"):
        contradictions(model, [own], length=64)
    with pytest.raises(InputError, match="examples=0"):
        contradictions(model, examples=0)
    with pytest.raises(InputError, match="without a passage"):
        contradictions(model, "numbers")
    with pytest.raises(InputError, match="no foils"):
        faithfulness(model, hs.probes.needle(model, lengths=64, depths=1, per_cell=1), ["L0H0"])
