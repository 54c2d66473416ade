"""The bundled models have grown the circuits that headscope looks for, and these carry them.

Seeds, token sequences, fact keys and name pairs are none that training used.
"""

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.heads import HeadIndex
from headscope.models import bundled
from headscope.models.protocol import Edit, HeadModel
from headscope.table import HeadTable
from tools.train_bundled import examples
from tools.train_bundled.data import Rows

SEED = 98765
NAMES = ("tiny-gpt2", "tiny-llama")
each = pytest.mark.parametrize("name", NAMES)


@cache
def model(name: str) -> HeadModel:
    return hs.load(name)


@cache
def table(name: str) -> HeadTable:
    return hs.score(model(name), seed=SEED, progress=False)


@dataclass(frozen=True)
class Off:
    """Zero some heads of one layer."""

    layer: int
    heads: tuple[int, ...]
    site: Literal["z"] = "z"

    @property
    def layers(self) -> frozenset[int]:
        return frozenset({self.layer})

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        value = value.clone()
        value[:, :, list(self.heads)] = 0
        return value


def off(heads: list[HeadIndex]) -> tuple[Edit, ...]:
    layers = sorted({head.layer for head in heads})
    return tuple(Off(n, tuple(h.head for h in heads if h.layer == n)) for n in layers)


def second_copy_loss(name: str, edits: tuple[Edit, ...] = ()) -> tuple[float, float]:
    """Mean loss over the first copy and over the second, less its first token."""
    probe = hs.probes.repeated_tokens(model(name), length=50, batch=16, seed=SEED + 1)
    with torch.no_grad():
        logits = model(name).forward(probe.tokens, edits=edits)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), probe.tokens[:, 1:].flatten(), reduction="none"
    ).view(len(probe), -1)
    return float(losses[:, :50].mean()), float(losses[:, 51:].mean())


@each
def test_it_has_previous_token_and_induction_heads(name: str) -> None:
    found = table(name)
    assert found["previous_token"].top(1)[0][1] >= 0.8
    assert found["induction"].top(1)[0][1] >= 0.7
    roles = {finding.score: finding.heads for finding in found.role_summary()}
    assert roles["induction"]
    assert roles["previous_token"]


@each
def test_an_induction_head_stands_above_a_previous_token_head(name: str) -> None:
    found = table(name)
    previous = found["previous_token"].top(1)[0][0]
    assert any(head.layer > previous.layer for head, _ in found["induction"].top(2))


@each
def test_what_was_said_before_is_known(name: str) -> None:
    first, second = second_copy_loss(name)
    assert first > 5
    assert second < 1


@each
def test_without_the_induction_heads_the_advantage_is_gone(name: str) -> None:
    first, clean = second_copy_loss(name)
    induction = table(name)["induction"]
    top = [head for head, score in induction.top(induction.mean.size) if score > 0.5]
    _, without = second_copy_loss(name, off(top))
    # Guessing evenly costs log(d_vocab); the first copy costs more, since the model is sure there.
    chance = np.log(model(name).shape.d_vocab)
    assert clean < 0.1 * chance < chance < min(without, first)
    # Previous-token heads feed the induction heads: they are of the circuit, and no control for it.
    circuit = {*top, *table(name).filter("previous_token", minimum=0.3)}
    others = [head for head in model(name).shape.heads if head not in circuit]
    draws = [
        second_copy_loss(name, off(Random(seed).sample(others, len(top))))[1] for seed in range(8)
    ]
    assert np.mean(draws) - clean < 0.25 * (chance - clean)


@each
def test_facts_with_new_keys_are_recalled_over_the_whole_context(name: str) -> None:
    rows = Rows(model(name).tokenizer)
    prompts = examples.fact_prompts(rows, 100, model(name).shape.n_ctx or 256, SEED)
    right = 0
    with torch.no_grad():
        for prompt in prompts:
            logits = model(name).forward(torch.tensor([prompt.ids]), logits_at=torch.tensor([-1]))
            right += int(logits[0, 0].argmax()) == prompt.answer
    assert right / len(prompts) >= 0.9


@each
def test_the_indirect_object_is_preferred(name: str) -> None:
    rows = Rows(model(name).tokenizer)
    margins = []
    with torch.no_grad():
        for prompt in examples.name_prompts(rows, 50, SEED):
            logits = model(name).forward(torch.tensor([prompt.ids]))[0, -1]
            margins.append(float(logits[prompt.answer] - logits[prompt.wrong]))
    assert np.mean(np.array(margins) > 0) >= 0.9


def test_checkpoints_show_induction_appearing() -> None:
    (name,) = [name for name in NAMES if bundled.checkpoints(name)]
    steps = bundled.checkpoints(name)
    assert len(steps) >= 8
    best = []
    for step in steps:
        early = hs.load(name, revision=step)
        probe = hs.probes.repeated_tokens(early, length=50, batch=4, seed=SEED)
        scores = hs.score(early, probe, ["induction"], progress=False)
        best.append(scores["induction"].top(1)[0][1])
    assert best[0] < 0.1
    assert best[-1] > 0.7


def test_unknown_revision_is_told() -> None:
    with pytest.raises(hs.HeadscopeError, match="revision"):
        hs.load("tiny-gpt2", revision="step-nope")


def test_all_of_it_is_small() -> None:
    folder = bundled.folder("tiny-gpt2").parent
    sizes = {
        part.name: sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        for part in folder.iterdir()
        if part.name.startswith("tiny-")
    }
    readers = sum(sizes.pop(name) for name in bundled.READERS)
    assert readers <= 12e6
    assert sum(sizes.values()) <= 3e6
