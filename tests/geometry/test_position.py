"""Position and content: exact sums, held-out shares against slow versions, known heads, nulls."""

import copy
from functools import cache

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.geometry.position import held_out_shares
from headscope.models.protocol import HeadModel
from tests.models import families


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(families.build(family))


def probe_of(batch: int = 6, length: int = 10, seed: int = 0) -> hs.Probe:
    drawn = torch.Generator().manual_seed(seed)
    return hs.probes.from_tokens(torch.randint(3, families.VOCAB, (batch, length), generator=drawn))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_additive_tensor_is_taken_apart_as_it_was_made() -> None:
    mean, position, context = drawn(4), drawn(7, 4, seed=1), drawn(5, 4, seed=2)
    position, context = position - position.mean(0), context - context.mean(0)
    parts = hs.geometry.anova(mean + position + context[:, None])
    torch.testing.assert_close(parts.mean, mean)
    torch.testing.assert_close(parts.position, position)
    torch.testing.assert_close(parts.context, context)
    assert parts.rest.abs().max() < 1e-12


def test_parts_are_orthogonal_and_sum_to_the_states() -> None:
    x = drawn(5, 7, 4)
    parts = hs.geometry.anova(x)
    whole = parts.mean + parts.position + parts.context[:, None] + parts.rest
    torch.testing.assert_close(whole, x)
    assert parts.rest.sum(0).abs().max() < 1e-10
    assert parts.rest.sum(1).abs().max() < 1e-10
    squares = 35 * parts.mean.square().sum() + 5 * parts.position.square().sum()
    squares += 7 * parts.context.square().sum() + parts.rest.square().sum()
    torch.testing.assert_close(squares, x.square().sum())
    assert sum(parts.shares.values()) == pytest.approx(1.0)


def test_noise_has_the_shares_of_noise() -> None:
    shares = hs.geometry.anova(drawn(20, 30, 50)).shares
    assert shares["position"] == pytest.approx(29 / 599, rel=0.1)
    assert shares["context"] == pytest.approx(19 / 599, rel=0.1)


def test_rank_and_smoothness_of_a_circle_and_of_noise() -> None:
    angle = torch.arange(40) * (2 * torch.pi / 40)
    circle = torch.stack([angle.cos(), angle.sin(), 0 * angle], -1)
    parts = hs.geometry.anova(circle.expand(3, 40, 3))
    assert parts.position_rank == pytest.approx(2.0, abs=1e-4)
    assert parts.smoothness == pytest.approx(np.cos(2 * np.pi / 40), abs=1e-3)
    noise = hs.geometry.anova(drawn(1, 300, 40).expand(2, 300, 40))
    assert abs(noise.smoothness) < 0.05


def slow_shares(x: torch.Tensor) -> list[tuple[float, float]]:
    """One text at a time, one position at a time; texts 0, 2, ... are the reference."""
    found = []
    others = torch.stack([x[i] for i in range(0, len(x), 2)])
    for c in range(1, len(x), 2):
        profile, grand = others.mean(0), others.mean((0, 1))
        size = sum(float((h - grand).square().sum()) for h in x[c])
        position = sum(float((h - grand) @ (p - grand)) for h, p in zip(x[c], profile, strict=True))
        content = [h - p for h, p in zip(x[c], profile, strict=True)]
        context = 0.0
        for t, own in enumerate(content):
            elsewhere = torch.stack([one for i, one in enumerate(content) if i != t]).mean(0)
            context += float(own @ elsewhere)
        found.append((position / size, context / size))
    return found


def test_held_out_shares_are_those_of_a_slow_version() -> None:
    x = drawn(5, 6, 4) + drawn(6, 4, seed=1)
    position, context = held_out_shares(x[1::2], x[::2].mean(0))
    expected = np.array(slow_shares(x)).T
    np.testing.assert_allclose(position, expected[0], atol=1e-12)
    np.testing.assert_allclose(context, expected[1], atol=1e-12)


def test_by_chance_held_out_shares_are_zero_and_tests_of_them_hold_their_level() -> None:
    shares, false = [], 0
    for seed in range(300):
        x = drawn(16, 10, 5, seed=seed)
        position, context = held_out_shares(x[1::2], x[::2].mean(0))
        shares.append((float(position.mean()), float(context.mean())))
        values = position.numpy()
        false += values.mean() > 1.895 * values.std(ddof=1) / np.sqrt(8)  # t(7) at 5%
    means = np.mean(shares, 0)
    assert np.abs(means).max() < 0.01
    assert false / 300 < 0.08


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_states_are_the_models_own(family: str) -> None:
    model, probe = model_of(family), probe_of()
    table = hs.geometry.position_layers(model, probe, batch_size=4)
    with torch.no_grad():
        own = model.module(probe.tokens, output_hidden_states=True).hidden_states
    for place in range(model.shape.n_layers):
        expected = np.array(slow_shares(own[place][:, 1:].double())).T
        found = [table[name].per_text[place] for name in ("position_share", "context_share")]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        parts = hs.geometry.anova(own[place][::2, 1:])
        assert table["position_rank"].mean[place] == pytest.approx(parts.position_rank, rel=1e-3)
        smooth = table["position_smoothness"].mean[place]
        assert smooth == pytest.approx(parts.smoothness, abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_panels_are_those_of_a_slow_version(family: str) -> None:
    model, probe = model_of(family), probe_of(4, 7)
    seen: dict[str, torch.Tensor] = {}
    layer = model.shape.attention_layers[-1]
    taps = [hs.Tap(site, layer) for site in ("query", "key")]
    model.run(probe, reads={t: lambda v: seen.update({v.tap.site: v.value.double()}) for t in taps})
    rows = hs.capture.collect(model, probe)[layer].pattern
    q = seen["query"]
    k = seen["key"].repeat_interleave(q.shape[1] // seen["key"].shape[1], 1)
    found = hs.geometry.position_heads(model, probe, batch_size=3)
    Q, K = q[::2].mean(0), k[::2].mean(0)
    for c in (1, 3):
        for head in range(q.shape[1]):
            across, total = np.zeros(4), 0.0
            for i in range(1, 7):
                keys = [j for j in range(1, 7) if rows[c, head, i, j] > 0]
                own = q[c, head, i], Q[head, i]
                parts = np.array([
                    [float(a @ b) for a, b in (
                        (own[1], K[head, j]),
                        (own[0] - own[1], K[head, j]),
                        (own[1], k[c, head, j] - K[head, j]),
                        (own[0] - own[1], k[c, head, j] - K[head, j]),
                    )]
                    for j in keys
                ])  # fmt: skip
                parts -= parts.mean(0)
                score = parts.sum(1)
                across += score @ parts
                total += score @ score
            names = ("qk_position", "qk_query_content", "qk_key_content", "qk_content")
            panels = [found[name].examples[layer, head, c // 2] for name in names]
            np.testing.assert_allclose(panels, across / total, atol=1e-5)
            assert sum(panels) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("rotation_seed", [None, 5])
def test_known_heads_are_positional_or_not(rotation_seed: int | None) -> None:
    made = hs.compiled.induction(noise_heads=1, rotation_seed=rotation_seed)
    table = hs.geometry.position_heads(made.model, made.probe(32))
    (previous,), (induction,) = made.truth.roles["previous_token"], made.truth.roles["induction"]
    assert table["qk_position"].mean[previous] > 0.99
    assert table["qk_content"].mean[induction] > 0.9
    assert table["qk_position"].mean[induction] < 0.1
    assert table["output_position"].mean[previous] < 0.2  # it copies what stood there


def test_a_head_that_copies_positions_writes_positions() -> None:
    made = hs.compiled.from_library("pointer")
    probe = made.probe(32)
    where = hs.compiled.program(
        [hs.compiled.Head(0, "position", "position", hs.compiled.offset(1), "position", "place")],
        tokens=8, length=8, outputs=["place"],
    )  # fmt: skip
    table = hs.geometry.position_heads(where.model, where.probe(32))
    assert table["output_position"].mean[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert hs.geometry.position_heads(made.model, probe)["output_position"].mean[0, 0] < 0.7


def test_embeddings_without_positions_owe_nothing_to_them() -> None:
    table = hs.geometry.position_layers(model_of("llama"), probe_of(24, 12))
    low, high = table["position_share"].interval()
    assert low[0] <= 0.0 <= high[0]


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(hs.HeadscopeError, match="does not show its keys"):
        hs.geometry.position_heads(model_of("bloom"), probe_of())


def test_scores_behind_a_tight_soft_cap_are_refused() -> None:
    module = copy.deepcopy(families.build("gemma2"))
    for part in module.modules():
        if hasattr(part, "attn_logit_softcapping"):
            part.attn_logit_softcapping = 0.05
    with pytest.raises(hs.HeadscopeError, match="not the softmax of query times key"):
        hs.geometry.position_heads(hs.load(module), probe_of())


def test_mistakes_are_said() -> None:
    model, probe = model_of("gpt2"), probe_of()
    with pytest.raises(InputError, match="skip=-1"):
        hs.geometry.position_layers(model, probe, skip=-1)
    with pytest.raises(InputError, match="3 texts of 10 tokens"):
        hs.geometry.position_heads(model, probe.examples(slice(0, 3)))
    with pytest.raises(InputError, match="3 positions"):
        hs.geometry.position_layers(model, probe, skip=8)
    real = probe.real.clone()
    real[0, -1] = False
    with pytest.raises(InputError, match="texts of equal length"):
        hs.geometry.position_layers(model, hs.probes.from_tokens(probe.tokens, real=real))
    with pytest.raises(InputError, match="two texts"):
        hs.geometry.anova(torch.zeros(1, 4, 2))


def test_tables_are_kept_on_disk(tmp_path: object) -> None:
    table = hs.geometry.position_heads(model_of("gpt2"), probe_of())
    table.save(f"{tmp_path}/heads.parquet")
    again = hs.HeadTable.load(f"{tmp_path}/heads.parquet")
    np.testing.assert_array_equal(again["qk_content"].mean, table["qk_content"].mean)


def test_both_views_of_one_model() -> None:
    model = hs.load()
    found = hs.geometry.position_context(model, length=16)
    layers = hs.geometry.position_layers(model, length=16)["position_share"]
    assert found.refused is None
    assert found.heads is not None
    assert (found.layers["position_share"].mean == layers.mean).all()
    heads = hs.geometry.position_heads(model, length=16)["qk_position"]
    assert (found.heads["qk_position"].mean == heads.mean).all()


def test_layers_are_measured_where_scores_cannot_be_split() -> None:
    found = hs.geometry.position_context(model_of("gemma2"), probe_of())
    assert found.heads is None
    assert found.refused is not None
    assert "soft cap" in found.refused
    assert "position_share" in found.layers
