"""Masking curves: equal to generation under the same mask; what retrieval heads are for."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headscope as hs
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.retrieval import Mask, MaskingConfig, decoded, generate, masking_curve
from headscope.retrieval.masking_curve import matched
from tests.handwired import handwired_gpt2
from tests.models.families import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gpt2"])
def trained(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model = hs.load(request.param)
    find = hs.probes.needle(model, lengths=[96, 200], depths=3, per_cell=2, seed=3)
    return model, decoded(model, find, progress=False)


def test_retrieval_heads_are_few_and_recall_rests_on_them(trained: tuple[Any, Any]) -> None:
    model, found = trained
    heads = found.heads()
    assert 1 <= len(heads) <= len(model.shape.heads) // 3
    held_out = hs.probes.needle(model, lengths=[80, 180], depths=4, per_cell=2, seed=77)
    curve = masking_curve(
        model, held_out, found.by_set, counts=[0, len(heads)], random=10, progress=False
    )
    arms = dict(zip(curve.effects.labels[0], curve.mean[:, 1], strict=True))
    random = [arms[name] for name in curve.controls]
    assert curve.mean[:, 0].min() > 0.9
    assert arms["top"] < 0.1
    assert np.median(random) > 0.7
    assert np.mean(random) > 0.6
    _, high = curve.interval()
    top = curve.effects.labels[0].index("top")
    assert high[top, 1] < 0.2
    assert not {*heads} & {head for name in curve.controls for head in curve.orders[name]}


def test_the_curve_is_that_of_generation_under_the_same_mask(trained: tuple[Any, Any]) -> None:
    model, found = trained
    probe = hs.probes.needle(model, lengths=[64, 100], depths=2, per_cell=2, seed=8)
    curve = masking_curve(model, probe, found.by_set, counts=[0, 1, 3, 6], random=1, progress=False)
    answers = [probe.tokens[i, mark].tolist() for i, mark in enumerate(probe.mark("answer"))]
    for i, arm in enumerate(curve.effects.labels[0]):
        for j, n in enumerate(curve.counts):
            mask = Mask.of(model, curve.orders[arm][:n]) if n else None
            said = generate(model, probe, mask=mask, new_tokens=1)
            right = [list(one) == answer for one, answer in zip(said.tokens, answers, strict=True)]
            assert curve.per_example[i, j].tolist() == right, (arm, n)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("scope", ["decode", "prefill", "all"])
def test_long_answers_equal_generation_too(family: str, scope: Any) -> None:
    model = hs.load(build(family), check=False)
    heads = ["L0H1", "L1H0", "L2H2"]
    ids = torch.randint(3, 61, (6, 9), generator=torch.Generator().manual_seed(5))
    mask = Mask.of(model, heads, "uniform", scope)
    said = torch.tensor([list(one) for one in generate(model, ids, mask=mask, new_tokens=3).tokens])
    said[3:, 1] = (said[3:, 1] + 1) % 61  # in half of them the second token is another
    whole = torch.cat([ids, said], 1)
    targets = torch.full_like(whole, -1)
    targets[:, 8:-1] = said
    probe = hs.probes.from_tokens(whole, targets=targets)
    curve = masking_curve(
        model, probe, heads, counts=[3], random=0, scope=scope, batch_size=2, progress=False
    )
    assert curve.per_example[0, 0].tolist() == [1, 1, 1, 0, 0, 0]
    share = masking_curve(
        model, probe, heads, counts=[3], random=0, scope=scope, right="share", progress=False
    )
    assert (share.per_example[0, 0, :3] == 1).all()
    assert (share.per_example[0, 0, 3:] <= 2 / 3 + 1e-9).all()


def test_copying_is_read_in_the_second_copy_alone() -> None:
    wired = handwired_gpt2()
    model = hs.load(wired.model, check=False)
    probe = hs.probes.repeated_tokens(model, length=12, batch=3)
    head = wired.roles["induction"]
    curve = masking_curve(
        model, probe, [head], counts=[0, 1], random=3, right="share", progress=False
    )
    top = curve.mean[curve.effects.labels[0].index("top")]
    assert top[0] == 1  # the first copy, which nothing predicts, is not read
    assert top[1] < 0.3
    feeders = {wired.roles["previous_token"]}
    for name in curve.controls:
        if not feeders & set(curve.orders[name][:1]):
            assert curve.mean[curve.effects.labels[0].index(name), 1] == 1


def test_the_picture_and_the_file(trained: tuple[Any, Any], tmp_path: Path) -> None:
    model, found = trained
    probe = hs.probes.needle(model, lengths=64, depths=2, per_cell=1, seed=8)
    curve = masking_curve(model, probe, found.by_set, counts=[0, 2], random=2, progress=False)
    figure = hs.plots.curves(curve.effects, controls=curve.controls)
    assert "right answers against heads masked" in figure.layout.title.text
    assert {line.name for line in figure.data} >= {"top", "lowest", "random (2)"}
    curve.save(tmp_path / "curve.csv")
    assert "arm,control,masked,head" in (tmp_path / "curve.csv").read_text()
    assert curve.effects.provenance.probe["scope"] == "decode"


def test_the_config_that_ships_runs_and_mistakes_are_told(tmp_path: Path) -> None:
    model = hs.load("tiny-llama")
    written = (ROOT / "configs" / "masking.yaml").read_text()
    small = tmp_path / "small.yaml"
    small.write_text(
        written.replace("[0, 1, 2, 3, 5, 8, 12]", "[0, 6]").replace("random: 5", "random: 3")
    )
    heads = [f"L2H{i}" for i in range(7)]
    curves = hs.retrieval.masking_curves(model, heads, small, progress=False)
    assert list(curves) == ["needle", "passage", "keys and values", "copying"]
    for curve in curves.values():
        assert curve.mean[0, 0] > 0.9
        assert curve.mean[0, 1] < 0.35
        assert curve.mean[1:, 1].mean() > curve.mean[0, 1] + 0.3
    small.write_text(written.replace("method:", "methd:"))
    with pytest.raises(InputError, match="did you mean 'method'"):
        hs.retrieval.masking_curves(model, heads, small)


def test_what_does_not_fit_is_said_first() -> None:
    model = hs.load("tiny-llama")
    probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
    cases: list[tuple[Any, str]] = [
        (lambda: masking_curve(model, probe, ["L0H0"], counts=[99]), "0 to 24 heads"),
        (lambda: masking_curve(model, probe, ["L0H0"], random=-1), "random=-1"),
        (lambda: masking_curve(model, probe, ["L0H0"], at="nowhere"), "no mark 'nowhere'"),
        (lambda: masking_curve(model, probe, ["L0H0"], reference=probe), "method='mean'"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    assert MaskingConfig.model_validate({"tasks": {"a": {"kind": "ioi"}}}).method == "uniform"


@given(
    heads=st.permutations([HeadIndex(layer, head) for layer in range(4) for head in range(3)]),
    kept=st.integers(0, 12),
)
def test_matched_orders_have_as_many_heads_of_every_layer(heads: Any, kept: int) -> None:
    top, drawn = tuple(heads), tuple(sorted(heads[kept:], key=lambda head: head.head))
    order = matched(top, drawn)
    assert sorted(order) == sorted(drawn)
    there = Counter(head.layer for head in drawn)
    for n in range(len(drawn) + 1):
        wanted, given_ = (Counter(head.layer for head in one[:n]) for one in (top, order))
        for layer in range(4):
            assert given_[layer] >= min(wanted[layer], there[layer])
        if all(wanted[layer] <= there[layer] for layer in range(4)):
            assert given_ == wanted


def test_controls_of_the_same_layers(trained: tuple[Any, Any]) -> None:
    model, found = trained
    probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1, seed=8)
    options: dict[str, Any] = {"counts": [0, 2], "random": 4, "progress": False}
    curve = masking_curve(model, probe, found.by_set, controls="layers", **options)
    loose = masking_curve(model, probe, found.by_set, **options)
    count = min(
        len(found.heads()),
        *(sum(head.layer == 2 for head in curve.orders[n]) for n in curve.controls),
    )
    assert count > 0
    top = sorted(head.layer for head in curve.orders["top"][:count])
    for name in curve.controls:
        assert sorted(head.layer for head in curve.orders[name][:count]) == top
        assert sorted(curve.orders[name]) == sorted(loose.orders[name])
    assert len({curve.orders[name] for name in curve.controls}) > 1
    assert any(
        sorted(head.layer for head in loose.orders[name][:count]) != top for name in loose.controls
    )
    assert curve.effects.provenance.probe["controls"] == "layers"
    assert loose.effects.provenance.probe["controls"] == "any"
