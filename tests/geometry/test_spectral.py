"""Rotary bands and their removal, and gains of patterns, against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.protocol import HeadModel
from tests.models import families


def model_of(family: str) -> HeadModel:
    return hs.load(families.build(family))


def probe_of(batch: int = 3, length: int = 20) -> hs.Probe:
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, families.VOCAB, (batch, length), generator=drawn)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, length - 6 :] = False
    real[2, :3] = False
    return hs.probes.from_tokens(tokens, real=real)


def entropy(values: list[float]) -> float:
    total = sum(values)
    return -sum(v / total * math.log(v / total) for v in values if v > 0)


@pytest.mark.parametrize("side", ["key", "query"])
def test_bands_and_heads_are_spectra_of_what_attention_uses(side: str) -> None:
    model, probe = model_of("llama"), probe_of()
    found = hs.geometry.rotary_bands(model, probe, side=side, rank=3, batch_size=2)
    kept = {}
    model.run(probe, reads={(side, 1): lambda view: kept.setdefault(1, view.value.clone())})
    x = kept[1]
    group = model.shape.n_heads // x.shape[1]
    rotation = model.parts.rotation(1)
    order = sorted(range(len(rotation.first)), key=lambda p: -abs(float(rotation.frequency[p])))
    for head in range(model.shape.n_heads):
        heads, bands = [], []
        for number in range(len(probe)):
            own = x[number, head // group][probe.real[number]][1:].double()
            values = torch.linalg.svdvals(own).square()[:3].tolist()
            heads.append(entropy(values))
            pair = [rotation.first[order[2]], rotation.second[order[2]]]
            bands.append(entropy(torch.linalg.svdvals(own[:, pair]).square().tolist()))
        np.testing.assert_allclose(found.scores.per_example[1, head], heads, atol=1e-4)
        assert found.entropy[1, head, 2] == pytest.approx(np.mean(bands), abs=1e-4)
    assert (np.diff(found.frequency[0]) <= 0).all()


def test_a_constant_key_is_a_line_in_slow_planes_and_a_circle_in_fast_ones() -> None:
    module = families.fresh("llama")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.k_proj.weight.zero_()
            bias = torch.nn.Parameter(torch.ones(layer.self_attn.k_proj.out_features))
            layer.self_attn.k_proj.bias = bias
    found = hs.geometry.rotary_bands(hs.load(module), probe_of(batch=3, length=60))
    n = 59 - np.array([0, 6, 3])
    for plane, speed in enumerate(found.frequency[0]):
        # Angles speed * i: second moments (n +- |sum of e^(2 i angle)|) / 2.
        expected = []
        for count in n:
            around = abs(np.exp(2j * speed * np.arange(count)).sum())
            expected.append(entropy([(count + around) / 2, (count - around) / 2]))
        assert found.entropy[0, 0, plane] == pytest.approx(np.mean(expected), abs=1e-4)
    assert found.entropy[0, 0, 0] > 0.65
    assert found.entropy[0, 0, -1] < found.entropy[0, 0, 0]


def test_denoising_takes_a_planes_part_out_of_the_scores() -> None:
    model, probe = model_of("llama"), probe_of()
    planes = {"L1H2": (0, 3), hs.HeadIndex(0, 1): (1,)}
    intervention = hs.interventions.Denoise(planes)
    setting = hs.interventions.Setting(model, probe, None, len(probe))
    edit = intervention.prepare(setting)(slice(0, 3), None)(model.shape.heads)
    seen = {}

    def read(view: object) -> None:
        assert isinstance(view, hs.models.taps.TapView)
        seen[view.layer] = view.query_keys(torch.arange(probe.length))

    taps = {("pattern", layer): read for layer in range(2)}
    model.run(probe, reads=taps)
    plain = dict(seen)
    model.run(probe, reads=taps, writes=hs.models.taps.writes_of([edit]))
    rotation = model.parts.rotation(0)
    order = sorted(range(len(rotation.first)), key=lambda p: -abs(float(rotation.frequency[p])))
    pair = torch.tensor([rotation.first[order[1]], rotation.second[order[1]]])
    part = plain[0].products(pair)
    torch.testing.assert_close(
        seen[0].scores[:, 1], (plain[0].scores - part)[:, 1], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(seen[0].scores[:, 0], plain[0].scores[:, 0])
    assert not torch.allclose(seen[1].scores[:, 2], plain[1].scores[:, 2])
    assert hs.testing.check_intervention(hs.interventions.Denoise({"L0H1": [0]}), model)
    none = hs.ablate_heads(
        model, probe, hs.metrics.loss, hs.interventions.Denoise({}), heads="L0H1"
    )
    assert float(none.mean[0, 1]) == pytest.approx(0, abs=1e-6)


def test_noise_of_the_querys_size_stands_where_planes_were() -> None:
    model, probe = model_of("llama"), probe_of()
    planes = tuple(range(model.shape.d_head // 2))
    noisy = hs.interventions.Denoise({"L0H1": planes}, noise=0.5, seed=3)
    setting = hs.interventions.Setting(model, probe, None, len(probe))

    def queries(some: hs.Probe, intervention: hs.interventions.Denoise | None) -> torch.Tensor:
        found = []
        setting = hs.interventions.Setting(model, some, None, len(some))
        edits = []
        if intervention is not None:
            edits = [intervention.prepare(setting)(slice(0, len(some)), None)(["L0H1"])]
        model.run(
            some,
            reads={("query", 0): lambda view: found.append(view.value.clone())},
            writes=hs.models.taps.writes_of(edits),
        )
        return found[0]

    plain, changed = queries(probe, None), queries(probe, noisy)
    torch.testing.assert_close(changed[:, 0], plain[:, 0])
    unit = changed[:, 1] / plain[:, 1].square().mean(-1, keepdim=True).sqrt()
    assert float(unit.std()) == pytest.approx(0.5, rel=0.15)
    assert abs(float(unit.mean())) < 0.1
    torch.testing.assert_close(unit[0], unit[1])  # the same in every text
    assert not torch.allclose(unit[0, 0], unit[0, 1])
    left = hs.probes.from_tokens(
        torch.nn.functional.pad(probe.tokens, (2, 0)),
        real=torch.nn.functional.pad(probe.real, (2, 0)),
    )
    torch.testing.assert_close(queries(left, noisy)[:, 1, 2:], changed[:, 1], atol=1e-4, rtol=1e-4)
    other = hs.interventions.Denoise({"L0H1": planes}, noise=0.5, seed=4)
    assert not torch.allclose(queries(probe, other)[:, 1], changed[:, 1])
    assert hs.testing.check_intervention(noisy, model)
    assert noisy.prepare(setting) is not None
    assert noisy.facts["noise"] == 0.5
    with pytest.raises(InputError, match="noise=-1"):
        hs.interventions.Denoise({}, noise=-1.0)


def test_gains_by_hand() -> None:
    model = model_of("gpt2")
    tokens = torch.randint(3, families.VOCAB, (1, 2), generator=torch.Generator().manual_seed(0))
    probe = hs.probes.from_tokens(tokens)
    gain = hs.geometry.high_frequency_gain(model, probe)
    pattern = hs.capture.collect(model, probe)[0].pattern
    # A = [[1, 0], [a, 1 - a]] leaves 1 - a of the only difference there is.
    np.testing.assert_allclose(gain.mean[0], 1 - pattern[0, :, 1, 0].numpy(), atol=1e-6)


def test_gain_is_the_largest_singular_value_without_the_mean() -> None:
    model, probe = model_of("llama"), probe_of()
    gain = hs.geometry.high_frequency_gain(model, probe, batch_size=2)
    patterns = hs.capture.collect(model, probe)
    for layer in range(model.shape.n_layers):
        for number in range(len(probe)):
            real = probe.real[number]
            own = patterns[layer].pattern[number][:, real][..., real].double()
            n = int(real.sum())
            centre = torch.eye(n) - torch.ones(n, n) / n
            expected = [
                float(torch.linalg.svdvals(centre.double() @ a @ centre.double())[0]) for a in own
            ]
            np.testing.assert_allclose(gain.per_example[layer, :, number], expected, atol=1e-5)


def test_what_has_no_bands_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        hs.geometry.rotary_bands(model_of("gpt2"), probe_of())
    model = model_of("llama")
    with pytest.raises(InputError, match="rank=1"):
        hs.geometry.rotary_bands(model, probe_of(), rank=1)
    with pytest.raises(InputError, match="give 2 or more"):
        hs.geometry.rotary_bands(model, probe_of(), skip=13)
    with pytest.raises(InputError, match="rotary planes, not plane 99"):
        hs.ablate_heads(
            model, probe_of(), hs.metrics.loss, hs.interventions.Denoise({"L0H0": [99]})
        )
    with pytest.raises(InputError, match="no head L7H0"):
        hs.ablate_heads(model, probe_of(), hs.metrics.loss, hs.interventions.Denoise({"L7H0": [0]}))
