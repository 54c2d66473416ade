"""Small models, trained here in seconds, that have learned what a claim is about.

Seeded; margins are wide, since the last digits of a training run differ between processors.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import headscope as hs
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def untrained(seed: int, **sizes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        **sizes, n_positions=16, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def trained(module: GPT2LMHeadModel, draw: Draw, steps: int) -> HeadModel:
    """Adam on tokens and targets at the same places, drawn anew in every step."""
    draws = torch.Generator().manual_seed(0)
    adam = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens, targets = draw(draws)
        logits = module(tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss.detach()) < 0.05
    return hs.load(module)


def test_sparse_modular_addition_has_a_clustering_head() -> None:
    # The sum of the first two of six bits, modulo 2 (Cabannes et al. 2024, arXiv 2410.24050).
    bits = torch.tensor(list(product((0, 1), repeat=6)))
    asked = torch.full((len(bits), 1), 3)
    tokens = torch.cat([bits + 1, asked], 1)
    targets = torch.full_like(tokens, -1)
    targets[:, -1] = bits[:, :2].sum(1) % 2 + 1
    module = untrained(
        0, vocab_size=4, n_embd=16, n_layer=1, n_head=1, n_inner=64, initializer_range=0.5
    )
    before = hs.load(module)
    at = torch.arange(7)
    marks = {name: where.expand(64, -1) for name, where in (("few", at < 2), ("end", at == 6))}
    probe = hs.probes.from_tokens(tokens, targets=targets, marks=marks)
    groups = bits[:, :2].sum(1).tolist()
    kind = hs.kinds.clustering(probe, "few", groups)
    steps = [(row, 6, key) for row in range(64) for key in (0, 1)]
    iteration = hs.kinds.of_relation("iteration", probe, torch.tensor(steps), least=0.5, steady=0.8)
    assert not hs.kinds.survey(before, [kind, iteration], confirm=False).findings

    def draw(draws: torch.Generator) -> tuple[Tensor, Tensor]:
        some = torch.randint(64, (64,), generator=draws)
        return tokens[some], targets[some]

    model = trained(module, draw, 400)
    found = hs.kinds.survey(model, [kind, iteration], confirm=False)
    assert found.named("clustering") == found.named("iteration") == (HeadIndex(0, 0),)
    # The same head is of no such kind for bits that do not matter.
    other = hs.probes.from_tokens(tokens, marks={**marks, "few": (at == 3).expand(64, -1)})
    wrong = hs.kinds.clustering(other, "few", bits[:, 3].tolist())
    assert not hs.kinds.survey(model, wrong, confirm=False).findings


def test_paragraphs_with_a_rare_trigger_go_through_the_head_that_looks_for_it() -> None:
    # Eight paragraphs that begin alike but for one rare token, which decides how they go on.
    draws = torch.Generator().manual_seed(0)
    common = torch.randint(20, 30, (5,), generator=draws).repeat(8, 1)
    endings = torch.randint(30, 64, (8, 8), generator=draws)
    paragraphs = torch.cat([torch.arange(2, 10)[:, None], common, endings], 1)

    def draw(draws: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = paragraphs[torch.randint(8, (24,), generator=draws)]
        return rows, torch.nn.functional.pad(rows[:, 1:], (0, 1), value=-1)

    model = trained(
        untrained(5, vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_inner=64), draw, 250
    )
    noise = torch.randint(20, 64, (8, 14), generator=draws).tolist()
    found = hs.relevance.memorized(model, [*paragraphs.tolist(), *noise], prefix=6, length=8)
    assert found.known.tolist() == [True] * 8 + [False] * 8
    # Another token at the trigger's place breaks spans at once, one that all share does not.
    broken = found.broken.mean(0)
    assert broken[0] < broken[1:5].min()
    targets = torch.full_like(paragraphs, -1)
    targets[:, 5:-1] = paragraphs[:, 6:]
    effects = hs.ablate_heads(
        model, hs.probes.from_tokens(paragraphs, targets=targets), hs.metrics.loss
    )
    (head, most), (_, second) = effects.top(2)
    assert most > 2 * second
    gradients = {name: found.heads[f"grad_{name}"].mean for name in "VO"}
    for values in gradients.values():
        assert np.unravel_index(values.argmax(), values.shape) == (head.layer, head.head)
    rare = found.heads["rare_attention"].mean
    assert rare[head] < -0.2


def test_masks_spread_a_task_of_keys_and_labels_over_heads() -> None:
    # One of eight keys stands somewhere among fillers; its label is asked for at the end.
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, 40, (256, 8), generator=draws)
    key = torch.randint(8, (256,), generator=draws)
    tokens[torch.arange(256), torch.randint(7, (256,), generator=draws)] = 2 + key
    tokens[:, 7] = 1
    targets = torch.full_like(tokens, -1)
    targets[:, 7] = 10 + (3 * key + 1) % 8
    probe = hs.probes.from_tokens(tokens, targets=targets)
    model = hs.load(untrained(2, vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_inner=64))
    options = {"steps": 200, "rate": 3e-3, "batch_size": 64, "seed": 1}
    plain = hs.training.head_mask(model, probe, 0, **options)
    masked = hs.training.head_mask(model, probe, 2, **options)
    for found in (plain, masked):
        assert found.metrics["before"] > 3 > 0.3 > found.metrics["after"]
    worst = [
        float(np.nanmax(hs.ablate_heads(one.model, probe, hs.metrics.loss, "zero").mean))
        for one in (plain, masked)
    ]
    # Without its most needed head the masked model loses less than half of what the plain one does.
    # Gradients do not say so: where the loss is near 0 they are of whatever is left of it.
    assert worst[1] < 0.5 * worst[0]
    assert masked.inequality[0] == pytest.approx(plain.inequality[0])
    assert all(0 <= one <= 0.75 for found in (plain, masked) for one in found.inequality)
