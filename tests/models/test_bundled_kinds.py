"""The bundled encoder-decoder, encoder and image model have learned their tasks, by known heads.

The bracket encoder's heads are tested where syntax is, ``tests/syntax``.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.models import bundled
from headscope.models.bundled import tasks

SEED = 4321
ALIGNING = [[1, head] for head in range(4)]


@cache
def model(name: str) -> Any:
    return hs.load(name)


@cache
def sides(order: str) -> tuple[Any, Any]:
    drawn = tasks.orders(40, SEED, order=order)
    return hs.probes.translation(model("tiny-marian"), drawn.sources, drawn.targets), drawn.links


def test_together_they_are_small() -> None:
    kinds = set(bundled.names()) - set(bundled.READERS)
    assert kinds == {"tiny-bert", "tiny-marian", "tiny-vit"}
    files = [one for name in kinds for one in bundled.folder(name).rglob("*") if one.is_file()]
    assert sum(one.stat().st_size for one in files) < 3_000_000
    assert all((bundled.folder(name) / "README.md").is_file() for name in kinds)


def test_translation_is_right_and_generated() -> None:
    drawn = tasks.orders(20, SEED)
    probe = hs.probes.translation(model("tiny-marian"), drawn.sources)
    tokenizer = model("tiny-marian").tokenizer
    said = [
        tokenizer.decode(row[row >= 0], skip_special_tokens=True)
        for row in probe.targets.where(probe.real, -1)
    ]
    assert np.mean([one == other for one, other in zip(said, drawn.targets, strict=True)]) > 0.9


@pytest.mark.parametrize("order", tasks.ORDERS)
def test_alignment_heads_are_found_and_others_not(order: str) -> None:
    probe, links = sides(order)
    table = hs.alignment.find(model("tiny-marian"), probe, links)
    assert sorted(hs.alignment.heads(table)) == ALIGNING
    accuracy = table["alignment_accuracy"].mean
    assert accuracy[1].min() > 0.9
    assert accuracy[0].max() < 0.6
    towards = 1 if order == "copy" else -1
    assert (towards * table["monotonicity"].mean[1] > 0.8).all()


def test_without_its_alignment_heads_it_says_other_words() -> None:
    probe, _ = sides("reverse")
    cross = model("tiny-marian").stack("cross")
    groups = {"aligning": [f"X1H{n}" for n in range(4)], "others": ["X0H0", "X0H2"]}
    loss = hs.ablate_groups(cross, probe, hs.metrics.loss, groups, method="mean", progress=False)
    aligning, others = loss.mean
    assert aligning > 1.0
    assert abs(others) < 0.1


@cache
def pictures() -> tuple[Any, torch.Tensor]:
    drawn = tasks.shapes(96, SEED)
    probe = hs.probes.images(model("tiny-vit"), list(drawn.pictures), drawn.labels)
    return probe, torch.from_numpy(tasks.on_patches(drawn.covered)).flatten(1)


def test_shapes_are_named() -> None:
    probe, _ = pictures()
    logits = model("tiny-vit").run(probe)
    assert float((logits[:, 0].argmax(-1) == probe.targets[:, 0]).float().mean()) > 0.97


def test_heads_that_see_the_shape_carry_its_class_and_others_do_not() -> None:
    probe, covered = pictures()
    acts = hs.capture.collect(model("tiny-vit"), probe)
    rows = torch.stack([acts[layer].pattern[:, :, 0, 1:] for layer in (0, 1)])
    on_shape = (rows * covered[:, None]).sum(-1).mean(1)  # [layer head]
    shape_heads = [hs.HeadIndex(*at) for at in (on_shape > 0.9).nonzero().tolist()]
    assert [str(one) for one in shape_heads] == ["L0H0", "L0H1", "L0H2"]
    effect = hs.ablate_groups(
        model("tiny-vit"),
        probe,
        hs.metrics.accuracy,
        {"shape": shape_heads, **{f"L1H{head}": [f"L1H{head}"] for head in range(4)}},
        method="mean",
        progress=False,
    )
    assert effect.mean[0] < -0.5
    assert (effect.mean[1:] > -0.1).all()


def test_one_head_looks_around_each_patch() -> None:
    probe, _ = pictures()
    acts = hs.capture.collect(model("tiny-vit"), probe)
    place = torch.arange(64)
    row, column = place // 8, place % 8
    apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    near = [acts[layer].pattern[:, :, 1:, 1:] for layer in (0, 1)]
    share = torch.stack([((one * (apart <= 1)).sum(-1) / one.sum(-1)).mean((0, 2)) for one in near])
    by_chance = float((apart <= 1).float().mean())
    assert share.flatten().argmax() == 3  # L0H3
    assert share[0, 3] > 2 * by_chance
    assert share.flatten().sort().values[-2] < 1.5 * by_chance


def test_tasks_say_what_is_right() -> None:
    drawn = tasks.orders(30, SEED)
    for source, target, links in zip(drawn.sources, drawn.targets, drawn.links, strict=True):
        words = source.split()
        assert [words[at] for _, at in links] == target.split()
    for text, partners in zip(*vars(tasks.brackets(30, SEED)).values(), strict=True):
        tokens = text.split()
        for at, partner in enumerate(partners):
            pair = tokens[min(at, partner)] + tokens[max(at, partner)]
            assert (partner == -1) == (tokens[at] in tasks.FILLERS)
            assert partner == -1 or (pair in tasks.BRACKETS and partners[partner] == at)
    shapes = tasks.shapes(8, SEED)
    ground = shapes.pictures[~shapes.covered].mean()
    assert shapes.pictures[shapes.covered].mean() > ground + 60
    assert tasks.on_patches(np.ones((1, 32, 32), dtype=bool)).all()
    for wrong in (lambda: tasks.orders(0), lambda: tasks.orders(order="turn"),
                  lambda: tasks.brackets(depth=0), lambda: tasks.shapes(-1)):  # fmt: skip
        with pytest.raises(InputError):
            wrong()


def test_the_tool_trains(tmp_path: Path) -> None:
    """A few steps from the seed: the same weights each time, lower loss, a card."""
    from tools.train_bundled import kinds

    plan = kinds.Plan(steps=12, batch=8)
    lines: list[str] = []
    first, second = (kinds.train("tiny-bert", 0, plan, lines.append) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for name in kinds.PLANS:
        text = kinds.card(name, {"right": 1.0, "steps": 12, "seed": 0})
        assert max(map(len, text.splitlines())) <= 100
        assert (
            (bundled.folder(name) / "README.md").read_text("utf-8").startswith("---\nlicense: mit")
        )
