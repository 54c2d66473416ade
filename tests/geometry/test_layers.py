"""Measures of layers over texts: the states that they are of, streaming, nulls, files, refusals."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.base.specs import ScoreSpec
from headscope.errors import InputError
from headscope.geometry import measures as gm
from headscope.geometry.layers import TEXT_MEASURES
from headscope.models.protocol import HeadModel
from headscope.table.lens import LayerMeasure, LayerTable
from tests.models import families

FAMILIES = ["gpt2", "llama", "gemma2", "bloom"]


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(families.build(family))


def probe_of(batch: int = 5, length: int = 24, seed: int = 0) -> hs.Probe:
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, families.VOCAB, (batch, length), generator=drawn)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, length - 6 :] = False
    real[2, :3] = False
    return hs.probes.from_tokens(tokens, real=real)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_measures_of_the_models_own_hidden_states(family: str) -> None:
    model, probe = model_of(family), probe_of()
    table = hs.geometry.layers(model, probe, skip=1, batch_size=2)
    for number in range(len(probe)):
        ids = probe.tokens[number, probe.real[number]]
        with torch.no_grad():
            own = model.module(ids[None], output_hidden_states=True).hidden_states
        # The last of these is behind the final norm; the places end before it.
        for place in range(model.shape.n_layers):
            x = own[place][0, 1:]
            for name, measure in (
                ("matrix_entropy", gm.matrix_entropy),
                ("curvature", gm.curvature),
                ("mean_cosine", gm.mean_cosine),
                ("anisotropy", gm.anisotropy),
            ):
                found = table[name].per_text[place, number]
                assert found == pytest.approx(float(measure(x)), rel=2e-3, abs=2e-4), (name, place)


def test_batches_and_padding_change_nothing() -> None:
    model, probe = model_of("llama"), probe_of()
    one, all_ = (hs.geometry.layers(model, probe, batch_size=size) for size in (1, 5))
    for name in one:
        np.testing.assert_allclose(one[name].per_text, all_[name].per_text, rtol=2e-3, atol=2e-4)


def test_linearity_is_of_all_tokens_together() -> None:
    model, probe = model_of("gpt2"), probe_of(batch=20, length=30)
    table = hs.geometry.layers(model, probe, measures=["linearity"], batch_size=7)
    kept: dict[str, list[torch.Tensor]] = {"resid_pre": [], "resid_post": []}
    for number in range(len(probe)):
        ids = probe.tokens[number, probe.real[number]]
        model.run(
            ids[None],
            reads={
                (site, 1): lambda view, s=site: kept[s].append(view.value[0, 1:].clone())
                for site in kept
            },
        )
    expected = gm.linearity(torch.cat(kept["resid_pre"]), torch.cat(kept["resid_post"]))
    assert table["linearity"].mean[2] == pytest.approx(expected, abs=1e-3)
    assert np.isnan(table["linearity"].mean[0])


def test_an_untrained_network_leaves_entropy_as_it_was() -> None:
    """With weights near 0 blocks add next to nothing, so that every place has the embedding's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, initializer_range=1e-3)
    module = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        module.transformer.wte.weight.mul_(1000)
    table = hs.geometry.layers(hs.load(module), probe_of(batch=20, length=30))
    kept = {"neighbourhood_overlap", "linearity"}
    for name in set(TEXT_MEASURES) - kept:
        np.testing.assert_allclose(
            table[name].mean, table[name].mean[0], rtol=0.02, atol=0.01, err_msg=name
        )
    for name in kept:
        np.testing.assert_array_less(0.95, table[name].mean[1:])


def test_a_table_is_what_was_saved(tmp_path: Path) -> None:
    table = hs.geometry.layers(model_of("gpt2"), probe_of(), measures=["curvature", "anisotropy"])
    table.save(tmp_path / "layers.parquet")
    again = LayerTable.load(tmp_path / "layers.parquet")
    assert again.places == table.places
    assert list(again) == ["curvature", "anisotropy"]
    np.testing.assert_array_equal(again["curvature"].per_text, table["curvature"].per_text)
    assert again["curvature"].bounds == table["curvature"].bounds
    assert again.provenance.weight_digest == table.provenance.weight_digest
    scores = hs.score(model_of("gpt2"), probe_of(), ["entropy"])
    scores.save(tmp_path / "scores.parquet")
    with pytest.raises(InputError, match="damaged"):
        LayerTable.load(tmp_path / "scores.parquet")


def test_intervals_hold_the_mean_and_stay_in_bounds() -> None:
    measure = LayerMeasure(
        ScoreSpec("share", bounds=(0.0, 1.0)),
        np.array([[0.0, 1.0, 1.0, 0.9], [0.5, 0.5, np.nan, 0.7]]),
    )
    low, high = measure.interval()
    assert (low >= 0).all()
    assert (high <= 1).all()
    np.testing.assert_allclose(measure.mean, [0.725, 0.5666667])


def test_a_figure_has_a_line_and_a_band_for_each_measure() -> None:
    table = hs.geometry.layers(model_of("gpt2"), probe_of())
    figure = hs.plots.layers(table)
    assert len(figure.data) == 2 * len(table)
    assert figure.data[1].y[0] == pytest.approx(table.measures[0].mean[0])


def test_what_cannot_be_measured_gets_a_sentence() -> None:
    model, probe = model_of("gpt2"), probe_of(length=10)
    with pytest.raises(InputError, match="did you mean 'curvature'"):
        hs.geometry.layers(model, probe, measures=["curvatur"])
    with pytest.raises(InputError, match="intrinsic_dimension needs 20 tokens in a text"):
        hs.geometry.layers(model, probe, measures=["intrinsic_dimension"])
    with pytest.raises(InputError, match="linearity needs 320 tokens in all"):
        hs.geometry.layers(model, probe, measures=["linearity"])
    assert "linearity" not in hs.geometry.layers(model, probe)
    with pytest.raises(InputError, match="too short for every measure"):
        hs.geometry.layers(model, hs.probes.from_tokens(torch.tensor([[3, 4]])))
    with pytest.raises(InputError, match="skip=-1"):
        hs.geometry.layers(model, probe, skip=-1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_are_measured_on_their_own_outputs(family: str) -> None:
    model, probe = model_of(family), probe_of(length=30)
    table = hs.geometry.heads(model, probe, batch_size=2)
    kept = hs.capture.collect(model, probe)
    for layer, head in ((0, 1), (1, 3)):
        for number in range(len(probe)):
            real = probe.real[number]
            x = kept[layer].z[number, real][1:, head]
            ids = probe.tokens[number, real][1:]
            expected = {
                "matrix_entropy": gm.matrix_entropy(x),
                "anisotropy": gm.anisotropy(x),
                "intrinsic_dimension": gm.two_nn(x),
                "intrinsic_dimension_gride": gm.gride(x),
                "self_similarity": gm.self_similarity(x, ids),
            }
            for name, value in expected.items():
                found = table[name].per_example[layer, head, number]
                assert found == pytest.approx(float(value), rel=2e-3, abs=2e-4, nan_ok=True), name
    assert "neighbourhood_overlap" not in table
    assert table["curvature"].provenance.weight_digest


def test_a_head_that_writes_nothing_has_no_geometry() -> None:
    module = families.fresh("gpt2")
    with torch.no_grad():
        d_model = module.config.n_embd
        d_head = d_model // module.config.n_head
        attention = module.transformer.h[0].attn.c_attn
        attention.weight[:, 2 * d_model : 2 * d_model + d_head] = 0
        attention.bias[2 * d_model : 2 * d_model + d_head] = 0
    table = hs.geometry.heads(hs.load(module), probe_of())
    for name in table:
        assert np.isnan(table[name].mean[0, 0]), name
        assert np.isfinite(table[name].mean[0, 1]), name


def slow_self_similarity(x: torch.Tensor, tokens: list[int]) -> float:
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    means = []
    for token in sorted(set(tokens)):
        at = [i for i, one in enumerate(tokens) if one == token]
        pairs = [float(cosine[i, j]) for i in at for j in at if i != j]
        means += [np.mean(pairs)] if pairs else []
    apart = [float(cosine[i, j]) for i in range(len(x)) for j in range(len(x)) if i != j]
    return float(np.mean(means) - np.mean(apart)) if means else float("nan")


@pytest.mark.parametrize("seed", range(4))
def test_self_similarity_is_of_equal_tokens(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, tokens = torch.randn(12, 5, generator=draw), torch.randint(4, (12,), generator=draw)
    found = gm.self_similarity(x, tokens)
    assert float(found) == pytest.approx(slow_self_similarity(x, tokens.tolist()), abs=1e-9)
    turned = 3 * x @ torch.linalg.qr(torch.randn(5, 5, generator=draw)).Q
    assert float(gm.self_similarity(turned, tokens)) == pytest.approx(float(found), abs=1e-5)
    assert np.isnan(float(gm.self_similarity(x[:4], torch.arange(4))))
    embedded = torch.randn(4, 5, generator=draw)[tokens]
    expected = 1 - float(gm.mean_cosine(embedded))
    assert float(gm.self_similarity(embedded, tokens)) == pytest.approx(expected, abs=1e-6)


def test_invariance_is_of_mean_states_of_views() -> None:
    model, probe = model_of("gpt2"), probe_of(batch=6)
    still = hs.geometry.invariance(model, probe, drop=0.0, batch_size=2)
    means = []
    for number in range(len(probe)):
        ids = probe.tokens[number, probe.real[number]]
        with torch.no_grad():
            own = model.module(ids[None], output_hidden_states=True).hidden_states
        means.append(torch.stack([state[0, 1:].mean(0) for state in own[:-1]]))
    states = torch.stack(means, 1)
    for place, x in enumerate(states):
        assert still["info_nce"].mean[place] == pytest.approx(gm.info_nce(x, x), abs=1e-4)
        assert still["dime"].mean[place] == pytest.approx(gm.dime(x, x), abs=1e-3)
    assert still["info_nce"].per_text.shape == (model.shape.n_layers + 1, 6)
    noisy = hs.geometry.invariance(model, probe, drop=0.6, seed=1)
    assert (noisy["info_nce"].mean > still["info_nce"].mean).all()
    assert (noisy["dime"].mean < still["dime"].mean).all()
    again = hs.geometry.invariance(model, probe, drop=0.6, seed=1)
    np.testing.assert_allclose(again["lidar"].mean, noisy["lidar"].mean)


def test_invariance_says_what_it_lacks() -> None:
    model = model_of("gpt2")
    with pytest.raises(InputError, match="at least 3 texts and 2 views"):
        hs.geometry.invariance(model, probe_of(batch=3).examples(slice(0, 2)))
    with pytest.raises(InputError, match="drop=1"):
        hs.geometry.invariance(model, probe_of(), drop=1.0)
    with pytest.raises(InputError, match="no token after the first 18"):
        hs.geometry.invariance(model, probe_of(), skip=18)
    with pytest.raises(InputError, match="did you mean 'curvature'"):
        hs.geometry.heads(model, probe_of(), measures=["curvatur"])
