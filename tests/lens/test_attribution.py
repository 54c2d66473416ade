"""Direct attribution: exact sums in every family, known values, other libraries, and alarms."""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope import lens
from headscope.errors import HeadscopeError, InputError
from headscope.lens.attribution import Against
from headscope.models.bridge.model import bridge_over, wrap_bridge
from headscope.models.loading import load
from tests.handwired import handwired_gpt2, handwired_llama
from tests.lens.helpers import EVERY, TOKENS, model_of, plain_logits
from tests.models import families
from tests.watching import watch


def uncapped(family: str, position: int) -> Tensor:
    """The model's own logits, the soft cap undone."""
    logits = plain_logits(family)[position]
    cap = model_of(family).unembedding.soft_cap
    return logits if cap is None else cap * torch.atanh(logits / cap)


@pytest.mark.parametrize("family", EVERY)
def test_parts_sum_to_the_models_own_logits(family: str) -> None:
    model = model_of(family)
    own = uncapped(family, 7)
    # atanh magnifies what the cap squeezed: compare where that is harmless
    tolerance = 1e-4 if model.unembedding.soft_cap is None else 1e-2
    by_size = plain_logits(family)[7].abs().argsort()
    target, foil = int(by_size[5]), int(by_size[20])
    with_values = "values" not in model.limits
    split = lens.attribute(model, TOKENS, target, foil, position=7, sources=with_values)
    alone = lens.attribute(model, TOKENS, target, position=7, sources=False)
    scale = max(1.0, max(abs(part.value) for part in split))
    for one, expected in ((split, own[target] - own[foil]), (alone, own[target])):
        assert sum(part.value for part in one) == pytest.approx(
            float(expected), abs=tolerance * scale
        )
    if with_values:
        assert split.sources is not None
        assert np.abs(split.sources.sum(-1) - split.heads).max() < 1e-4 * scale
        assert split.sources.shape[-1] == 8
    kinds = {part.kind for part in split}
    learned_positions = family in ("gpt2", "opt", "gpt_neo")
    assert ("position embedding" in kinds) == learned_positions


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "granite", "cohere2"])
def test_both_paths_give_the_same_parts(family: str) -> None:
    slow = wrap_bridge(bridge_over(families.build(family)))
    expected = lens.attribute(model_of(family), TOKENS, 5, 9)
    found = lens.attribute(slow, TOKENS, 5, 9)
    for name in ("heads", "biases", "mlps", "sources"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "starcoder2"])
def test_equal_to_transformer_lens(family: str) -> None:
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    model = model_of(family)
    bridge = bridge_over(families.build(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
    asked: dict[str, Any] = {
        "input": torch.tensor([TOKENS]),
        "answer_tokens": torch.tensor([5]),
        "incorrect_tokens": torch.tensor([9]),
    }
    with torch.no_grad():
        heads = theirs(bridge, **asked, unit="head")
        parts = theirs(bridge, **asked, unit="component")
    split = lens.attribute(model, TOKENS, 5, 9)
    scale = max(1.0, float(np.nanmax(np.abs(split.heads))))
    by_head = dict(zip(heads.labels, heads.attribution[:, 0].tolist(), strict=True))
    for layer, head in model.shape.heads:
        assert split.heads[layer, head] == pytest.approx(
            by_head[f"L{layer}H{head}"], abs=1e-4 * scale
        )
    by_part = dict(zip(parts.labels, parts.attribution[:, 0].tolist(), strict=True))
    for layer in range(3):
        attention = split.heads[layer].sum() + split.biases[layer]
        assert attention == pytest.approx(by_part[f"{layer}_attn_out"], abs=1e-4 * scale)
        assert split.mlps[layer] == pytest.approx(by_part[f"{layer}_mlp_out"], abs=1e-4 * scale)
    embedding = sum(value for name, value in by_part.items() if "embed" in name)
    assert sum(split.embedding.values()) == pytest.approx(embedding, abs=1e-4 * scale)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_heads_and_sources_by_hand_in_double_precision(family: str) -> None:
    """From whole eager patterns, values and W_O, with both norms' scales frozen."""
    model, module = model_of(family), families.build(family)
    layer, kept = 1, hs.capture.collect(model, hs.probes.from_tokens(torch.tensor([TOKENS])))
    with torch.no_grad():
        out = module(torch.tensor([TOKENS]), output_attentions=True, output_hidden_states=True)
    unembedding = model.unembedding
    seen: dict[str, Any] = {}

    class Look:
        wants_final = True

        def on_layer(self, view: Any) -> None:
            if view.layer == layer:
                seen["value"] = view.values()[0].double().numpy()

        def on_final(self, residual: Tensor) -> None:
            seen["final"] = residual[0, -1].double().numpy()

    with torch.no_grad():
        watch(model, torch.tensor([TOKENS]), Look())
    x = seen["final"] - (seen["final"].mean() if unembedding.centred else 0)
    sigma = math.sqrt(float(np.mean(x**2)) + unembedding.epsilon)
    W_U, gain = (one.double().numpy() for one in (unembedding.W_U, unembedding.gain))
    direction = (W_U[5] - W_U[9]) * gain * unembedding.logit_scale
    direction -= direction.mean() if unembedding.centred else 0
    W_O = model.output_weights(layer).double().numpy()
    norm = model.parts.attention_write(layer).norm
    if norm is not None:  # gemma2: gain and scale of the norm after attention
        total = np.einsum("he,hed->d", kept[layer].z[0, -1].double().numpy(), W_O)
        direction = direction * norm.gain.double().numpy()
        direction /= math.sqrt(float(np.mean(total**2)) + norm.epsilon)
    value = np.repeat(seen["value"], model.shape.group_size, 0)
    pattern = out.attentions[layer][0, :, -1].double().numpy()
    moved = pattern * np.einsum("hke,hed,d->hk", value, W_O, direction) / sigma
    split = lens.attribute(model, TOKENS, 5, 9)
    assert split.sources is not None
    np.testing.assert_allclose(split.sources[layer], moved, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(split.heads[layer], moved.sum(1), atol=1e-4, rtol=1e-3)


def test_wired_heads_have_known_attributions() -> None:
    wired = handwired_gpt2()
    split = lens.attribute(load(wired.model), [3, 4, 5, 6, 3, 4], target=5, foil=7)
    values = {str(head): split.heads[head] for head in wired.roles.values()}
    wanted = {str(head): 0.0 for head in wired.roles.values()}
    wanted[str(wired.roles["induction"])] = wired.gain
    assert values == pytest.approx(wanted, abs=1e-3)
    assert split.top_sources(1)[0][:2] == ("L1H0", 2)  # it moved the 5 after the first 4
    assert split.top_sources(1)[0][2] == pytest.approx(wired.gain, abs=1e-3)
    before = lens.attribute(load(wired.model), [3, 4, 5, 6, 3, 4], target=7, foil=3)
    assert before.heads[wired.roles["anti_copy"]] == pytest.approx(1.0, abs=1e-3)
    assert before.top_sources(1)[0][:2] == ("L1H1", 4)
    llama = handwired_llama()
    rotary = lens.attribute(load(llama.model), [0, 3, 4, 5, 6, 3, 4], target=5, foil=7)
    assert rotary.head_scores().top(1)[0] == (
        llama.roles["induction"],
        pytest.approx(llama.gain, abs=1e-2),
    )


def test_a_difference_is_the_difference_of_its_logits() -> None:
    model = model_of("gemma2")
    one, other = (lens.attribute(model, TOKENS, token) for token in (5, 9))
    both = lens.attribute(model, TOKENS, 5, 9)
    np.testing.assert_allclose(both.heads, one.heads - other.heads, atol=1e-4)
    np.testing.assert_allclose(both.mlps, one.mlps - other.mlps, atol=1e-4)
    assert both.whole == pytest.approx(one.whole - other.whole, abs=1e-4)


def test_the_default_target_is_the_models_own_guess() -> None:
    split = lens.attribute(model_of("llama"), TOKENS, position=4)
    assert split.target == str(int(plain_logits("llama")[4].argmax()))


def test_half_precision_is_checked_too() -> None:
    for family in ("llama", "gemma2"):
        model = load(families.fresh(family).bfloat16())
        split = lens.attribute(model, TOKENS, 5, 9)
        scale = max(1.0, max(abs(part.value) for part in split))
        assert abs(split.gap) < 5e-2 * scale
        exact = lens.attribute(model_of(family), TOKENS, 5, 9)
        assert np.corrcoef(split.heads.ravel(), exact.heads.ravel())[0, 1] > 0.95
        assert list(split.embedding) == ["token embedding"]  # rounding is no position


def test_a_wrong_part_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(families.fresh("llama"))
    right = model.output_weights
    monkeypatch.setattr(model, "output_weights", lambda layer: right(layer) * 1.01)
    with pytest.raises(HeadscopeError, match="parts sum to"):
        lens.attribute(model, TOKENS, 5, 9)
    probe = hs.probes.repeated_tokens(model, length=4, batch=2)
    with pytest.raises(HeadscopeError, match="parts sum to"):
        lens.head_attribution(model, probe)
    monkeypatch.undo()
    unembedding = dataclasses.replace(model.unembedding, logit_scale=1.01)
    monkeypatch.setattr(type(model), "unembedding", unembedding)
    with pytest.raises(HeadscopeError, match="logits of"):
        lens.attribute(model, TOKENS, 5, 9)
    with pytest.raises(HeadscopeError, match="logits of"):
        lens.head_attribution(model, probe)


def test_a_split_that_was_tampered_with_cannot_be_made() -> None:
    split = lens.attribute(model_of("gpt2"), TOKENS, 5, 9)
    with pytest.raises(HeadscopeError, match="parts sum to"):
        dataclasses.replace(split, mlps=split.mlps + 0.01)
    assert split.sources is not None
    with pytest.raises(HeadscopeError, match="by source token"):
        dataclasses.replace(split, sources=split.sources * 1.01)


def test_over_a_probe_it_is_the_scorers_value() -> None:
    for family in ("gpt2", "llama", "granite"):
        model = model_of(family)
        probe = hs.probes.repeated_tokens(model, length=5, batch=3)
        foiled = dataclasses.replace(probe, foils=(probe.targets + 1).where(probe.targets >= 0, -1))
        cases: tuple[tuple[hs.Probe, Against, str], ...] = (
            (probe, "mean", "direct_logit_attribution"),
            (foiled, "foil", "direct_logit_difference"),
        )
        for one, against, name in cases:
            expected = hs.score(model, one, [name])[name]
            found = lens.head_attribution(model, one, against, mark="second_copy")
            np.testing.assert_allclose(
                found.per_example, expected.per_example, atol=1e-4, rtol=1e-4
            )


def test_over_a_probe_batches_and_padding_change_nothing() -> None:
    model = model_of("gemma2")
    ids, real = families.tokens(), families.padding("both")
    assert real is not None
    probe = hs.probes.from_tokens(ids, real)
    targets = ids.roll(-1, 1).where(real & real.roll(-1, 1), -1)
    targets[:, -1] = -1
    probe = dataclasses.replace(probe, targets=targets)
    whole = lens.head_attribution(model, probe).per_example
    cut = lens.head_attribution(model, probe, batch_size=1).per_example
    np.testing.assert_allclose(cut, whole, atol=1e-4)
    alone = hs.probes.from_tokens(ids[1:2, 6:])
    alone = dataclasses.replace(alone, targets=targets[1:2, 6:])
    np.testing.assert_allclose(
        lens.head_attribution(model, alone).per_example[..., 0], whole[..., 1], atol=1e-4
    )


def test_removed_heads_have_no_part() -> None:
    model = load(hs.prune(model_of("llama"), ["L1H0", "L1H1"]))
    split = lens.attribute(model, TOKENS, 5, 9)
    assert np.isnan(split.heads[1]).tolist() == [True, True, False, False]
    assert "L1H0" not in {part.name for part in split}
    assert split.sources is not None
    assert np.isnan(split.sources[1, 0]).all()


def test_the_frame_has_every_part() -> None:
    split = lens.attribute(model_of("gpt2"), TOKENS, 5, 9)
    frame = split.to_pandas()
    assert frame.value.sum() == pytest.approx(split.whole, abs=1e-4)
    assert list(frame.name[:3]) == ["token embedding", "position embedding", "L0H0"]
    assert len(frame) == 2 + 3 * (4 + 2) + 1
    assert split.by_source.sum() == pytest.approx(split.heads.sum(), abs=1e-4)


def test_mistakes_get_a_sentence() -> None:
    model = model_of("gpt2")
    with pytest.raises(InputError, match="same token"):
        lens.attribute(model, TOKENS, 5, 5)
    with pytest.raises(InputError, match="no logit of token 99"):
        lens.attribute(model, TOKENS, 99)
    probe = hs.probes.repeated_tokens(model, length=4, batch=2)
    with pytest.raises(InputError, match="no foils"):
        lens.head_attribution(model, probe, "foil")
    none = dataclasses.replace(probe, targets=torch.full_like(probe.targets, -1))
    with pytest.raises(InputError, match="no targets"):
        lens.head_attribution(model, none)
