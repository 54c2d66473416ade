"""Steering: identities, sums of patches, planted directions, and the last token of a prompt."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.models.protocol import HeadModel
from headscope.steering import HeadVectors, direction
from tests.models import families

PAIRS = [
    ("cat", " Mary"), ("dog", " John"), ("park", " Mary"),
    ("store", " John"), ("box", " Mary"), ("road", " John"),
]  # fmt: skip
TEMPLATE = "the {text} and{label} ."


@cache
def bundled() -> HeadModel:
    return hs.load()


@cache
def prompts() -> hs.Probe:
    return hs.probes.in_context(bundled(), PAIRS, template=TEMPLATE)


@cache
def means() -> HeadVectors:
    return hs.steering.head_means(bundled(), prompts())


def test_means_are_those_of_captured_outputs() -> None:
    acts = hs.capture.collect(bundled(), prompts())
    for layer, one in acts.items():
        wanted = one.z[prompts().mark("end")].mean(0)
        assert torch.allclose(means().values[layer], wanted, atol=1e-5)
    assert torch.equal(means().by_layer[1], means().values[1])


def test_strength_zero_is_the_model_and_one_is_a_patch() -> None:
    model, probe = bundled(), prompts()
    where = probe.mark("end")
    plain = model.forward(probe.tokens, real=probe.real)

    def steered(**options: object) -> torch.Tensor:
        with hs.steering.inject(model, means(), ["L1H0", "L2H1"], positions=where, **options):
            return model.forward(probe.tokens, real=probe.real)

    assert torch.allclose(steered(strength=0.0), plain, atol=1e-4)
    patch = hs.edits.mean(["L1H0", "L2H1"], means().by_layer, positions=where)
    wanted = model.forward(probe.tokens, real=probe.real, edits=[patch])
    assert torch.allclose(steered(strength=1.0), wanted, atol=1e-4)
    strength = np.full((3, 4), 0.25)
    one = steered(strength=strength)
    assert torch.allclose(one, steered(strength={"L1H0": 0.25, (2, 1): 0.25}), atol=1e-6)
    assert not torch.allclose(one, plain, atol=1e-3)


def test_adding_in_the_last_layer_adds_the_function_vector_to_the_stream() -> None:
    model, probe = bundled(), prompts()
    heads = ["L2H0", "L2H3"]
    vector = hs.steering.function_vector(model, means(), heads)
    wanted = sum(means().values[2, h] @ model.output_weights(2)[h] for h in (0, 3))
    assert torch.allclose(vector.values, wanted, atol=1e-4)
    seen: list[torch.Tensor] = []

    def keep(view) -> None:  # noqa: ANN001
        seen.append(view.value.clone())

    for edits in ((), hs.steering.injection(
        model, means(), heads, mode="add", positions=probe.mark("end"))):  # fmt: skip
        with model.edited(edits):
            model.run(probe, reads={("head_sum", 2): keep}, logits_at=torch.empty(0).long())
    change = (seen[1] - seen[0])[probe.mark("end")]
    assert torch.allclose(change, vector.values.expand_as(change), atol=1e-3)


def test_the_last_token_of_a_prompt_is_edited_once_while_a_model_generates() -> None:
    model = bundled()
    ids = model.tokenizer("Mary went to the store and", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with hs.steering.inject(model, means(), "L2H1", strength=3.0, mode="add"):
        cached = model.module.generate(ids, use_cache=True, **options)
        whole = model.module.generate(ids, use_cache=False, **options)
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    text = ids
    for _ in range(4):
        where = torch.nn.functional.pad(last, (0, text.shape[1] - ids.shape[1]))
        edits = hs.steering.injection(model, means(), "L2H1", 3.0, mode="add", positions=where)
        following = model.forward(text, edits=edits)[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, following], 1)
    assert cached.tolist() == text.tolist() == whole.tolist()


def test_a_constant_head_has_no_indirect_effect_and_others_are_those_of_whole_passes() -> None:
    model, probe = bundled(), prompts()
    found = hs.steering.indirect_effect(model, {"names": probe}, heads=["L0H0", "L2H1"])
    order = torch.arange(len(probe))
    wanted = []
    for half in (order % 2 == 0, order % 2 == 1):
        given = hs.steering.head_means(model, probe.examples(order[half])).by_layer
        shuffled = probe.corrupt.examples(order[~half])
        where = shuffled.mark("end")
        edit = hs.edits.mean("L2H1", given, positions=where)
        answers = shuffled.targets[where]
        values = []
        for edits in ([], [edit]):
            logits = model.forward(shuffled.tokens, real=shuffled.real, edits=edits)[where]
            values.append(logits.softmax(-1)[torch.arange(len(answers)), answers])
        wanted.append(values[1] - values[0])
    assert found.per_example[2, 1] == pytest.approx(torch.cat(wanted).numpy(), abs=1e-5)
    assert found.control_per_example is not None
    assert np.isnan(found.mean[1]).all()


def test_learning_lowers_the_held_out_loss_and_keeps_the_best_check() -> None:
    found = hs.steering.learn_strengths(bundled(), means(), prompts(), steps=6, every=2)
    assert found.losses[-1] < found.losses[0]
    assert found.after == min(loss for _, loss in found.checks) < found.before
    assert len(found.checks) == 3
    assert ((found.values > 0) & (found.values < 1)).all()


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_a_planted_direction_is_found(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.tensor([0.0, 3.0, 0.0, 0.0])
    amount = 1 + torch.rand(800, 1, generator=generator) * (method == "pca")
    low = 0.05 * torch.randn(800, 4, generator=generator)
    high = low + amount * planted
    found = direction(high, low, method)
    assert float(torch.cosine_similarity(found, planted, dim=0)) > 0.99
    if method != "mean":
        assert float(found.norm()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(direction(high, low, method), direction(high, low, method))


def test_a_discriminant_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    high, low = torch.randn(9, 3, generator=generator) + 1, torch.randn(7, 3, generator=generator)
    sides = [side - side.mean(0) for side in (high, low)]
    spread = sum(side.T @ side for side in sides) / 14
    ridge = 0.1 * torch.trace(spread) / 3 * torch.eye(3)
    wanted = torch.linalg.inv(spread + ridge) @ (high.mean(0) - low.mean(0))
    assert torch.allclose(direction(high, low, "probe"), wanted / wanted.norm(), atol=1e-4)


def test_contrast_tells_classes_apart_on_held_out_examples_only_where_there_is_something() -> None:
    model = hs.load(families.build("gpt2"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 60, (40, 6), generator=generator)
    same = hs.probes.from_tokens(tokens[:20]), hs.probes.from_tokens(tokens[20:])
    tokens = tokens.clone()
    tokens[:20, -1], tokens[20:, -1] = 1, 2
    other = hs.probes.from_tokens(tokens[:20]), hs.probes.from_tokens(tokens[20:])
    last = torch.nn.functional.one_hot(torch.full((20,), 5), 6).bool()
    assert hs.steering.contrast(model, *other, at=last).auc.mean.max() > 0.95
    null = hs.steering.contrast(model, *same, at=last).auc
    assert np.nanmean(null.mean) == pytest.approx(0.5, abs=0.2)
    assert (null.p_value < 0.05).mean() < 0.5


def test_mean_centring_leaves_differences_between_tasks() -> None:
    first, second = means(), means().random(1)
    both = HeadVectors("mean", (first.values + second.values) / 2)
    centred = [one.minus(both).values for one in (first, second)]
    assert torch.allclose(centred[0] - centred[1], first.values - second.values, atol=1e-5)
    assert torch.allclose(first.random(3).norm, first.norm, atol=1e-4)
    assert torch.allclose(first.cosine(first), torch.ones(3, 4), atol=1e-5)


def test_arms_of_a_comparison() -> None:
    found = hs.steering.compare(bundled(), prompts(), means(), ["L1H0", "L2H1"], strength=0.0)
    assert found.arms[0] == "none"
    rows = dict(zip(found.arms, found.task, strict=True))
    for arm in ("heads", "residual", "random residual"):
        assert rows[arm] == pytest.approx(rows["none"], abs=1e-4)
    assert found.side == pytest.approx(0, abs=1e-5)
    moved = hs.steering.compare(
        bundled(), prompts(), means(), ["L1H0", "L2H1"], prompt=prompts().corrupt
    )
    assert moved.arms[-1] == "prompt"
    assert moved.side[1:-1].mean() > 0.01
    assert np.isnan(moved.side[-1]).all()
    asked = prompts().corrupt
    logits = bundled().forward(asked.tokens, real=asked.real)[asked.mark("end")].log_softmax(-1)
    wanted = logits[torch.arange(len(asked)), asked.targets[asked.mark("end")]]
    assert moved.task[-1] == pytest.approx(wanted.numpy(), abs=1e-4)
    with pytest.raises(InputError, match="same questions"):
        hs.steering.compare(
            bundled(), prompts(), means(), "L1H0", prompt=prompts().examples(slice(0, 4))
        )


def test_reading_a_write_into_its_own_place_is_the_readout() -> None:
    model = bundled()
    found = hs.steering.patchscope(
        model, "L2H1", "Mary went to the", template="Mary and", place="and", layer=2, scaled=False
    )
    z = hs.ablation.head_values(model, model.tokenizer("Mary went to the", return_tensors="pt")[
        "input_ids"], layers=[2])[2][0, -1, 1]  # fmt: skip
    logits = model.unembedding.logits(z @ model.output_weights(2)[1])
    wanted = logits.softmax(-1).sort(descending=True).values[:8]
    assert found.probabilities == pytest.approx(wanted.detach().numpy(), abs=1e-5)
    assert found.scale == 1


def test_back_patching_between_equal_layers_runs_them_once_more() -> None:
    # Layers that share their weights and attend to nothing but themselves: from s to d it is a run
    # of L + s - d layers.
    module = families.fresh("gpt2")
    with torch.no_grad():
        for block in module.transformer.h:
            block.load_state_dict(module.transformer.h[0].state_dict())
            block.attn.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_()
    model, tokens = hs.load(module), families.tokens(4)
    marks = {"end": torch.nn.functional.one_hot(torch.full((4,), 11), 12).bool()}
    targets = torch.full_like(tokens, -1).where(~marks["end"], 7)
    probe = hs.probes.from_tokens(tokens, marks=marks, targets=targets)
    found = hs.ablation.back_patch(model, probe)
    with torch.no_grad():
        x = module.transformer.wte(tokens[:, 11]) + module.transformer.wpe.weight[11]
        for count in range(1, 6):
            x = x + module.transformer.h[0].mlp(module.transformer.h[0].ln_2(x))
            if count > 3:
                rows = module.lm_head(module.transformer.ln_f(x)).log_softmax(-1)[:, 7]
                s, d = {4: (1, 0), 5: (2, 0)}[count]
                edited = found.effects.per_example[s, d] + found.effects.unedited
                assert edited == pytest.approx(rows.numpy(), abs=1e-4)
    assert found.effects.per_example[2, 1] == pytest.approx(
        found.effects.per_example[1, 0], abs=1e-5
    )
    assert np.isnan(found.effects.mean[0, 0])
    s, d = found.pair
    even = found.effects.per_example[..., ::2].mean(-1)
    assert even[s, d] == np.nanmax(even)
    assert found.held_out.tolist() == found.effects.per_example[s, d, 1::2].tolist()
    heads = hs.ablation.back_patch(model, probe, heads=[0])
    assert np.nanmax(np.abs(heads.effects.mean)) < 1e-5  # no head writes anything


def test_results_are_kept(tmp_path: Path) -> None:
    means().save(tmp_path / "means.safetensors")
    again = HeadVectors.load(tmp_path / "means.safetensors")
    assert torch.equal(again.values, means().values)
    again.check(bundled())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: hs.steering.inject(m, means(), strength=float("nan")), "strength=nan"),
        (lambda m: hs.steering.inject(m, means(), strength={"L0H0": 1.0}), "strength of L0H1"),
        (lambda m: hs.steering.inject(m, means(), "L7H0"), "no head"),
        (lambda m: hs.steering.inject(m, means(), mode="mix"), "unknown mode"),
        (lambda m: hs.steering.inject(m, means(), positions="first"), "positions"),
        (lambda m: hs.steering.inject(m, means(), positions=[1, 2]), "true or false"),
        (lambda m: hs.steering.inject(m, means(), positions=torch.tensor([[1, 2]])), "true or"),
        (lambda m: hs.steering.inject(m, means(), strength=np.ones((2, 2))), "3 layers of 4"),
        (lambda m: hs.steering.inject(m, means(), "L1H0", {"L2H0": 1.0}), "not injected"),
        (lambda m: hs.steering.inject(m, means(), strength="much"), "strength"),
        (lambda m: hs.steering.inject(m, means(), strength=1j), "finite number"),
        (
            lambda m: hs.steering.inject(
                m, replace(means(), values=means().values * float("nan")), "L1H0"
            ),
            "vector of L1H0",
        ),
        (
            lambda m: hs.steering.inject(m, replace(means(), values=means().values[:2])),
            "another model",
        ),
        (lambda m: hs.steering.indirect_effect(m, {}), "no tasks"),
        (
            lambda m: hs.steering.indirect_effect(m, {"a": prompts().examples(slice(0, 3))}),
            "3 prompts",
        ),
        (lambda m: hs.steering.learn_strengths(m, means(), prompts(), steps=0), "steps=0"),
        (lambda m: hs.steering.contrast(m, prompts(), prompts(), method="svm"), "unknown method"),
        (
            lambda m: hs.steering.contrast(m, prompts(), prompts().examples(slice(0, 1))),
            "two examples",
        ),
        (lambda m: hs.ablation.back_patch(m, prompts(), at="label"), "one position"),
        (lambda m: hs.ablation.back_patch(m, prompts().examples(slice(0, 3))), "too few"),
        (lambda m: hs.steering.patchscope(m, "L0H0", "Mary", template="the cat"), "does not occur"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    call: Callable[[HeadModel], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(InputError, match=said):
        call(bundled())


def test_vectors_of_another_model_are_refused() -> None:
    other = hs.load(families.build("gpt2"))
    with pytest.raises(InputError, match="another model"):
        hs.steering.inject(other, means())
    changed = hs.load(families.fresh("gpt2"))
    own = hs.steering.head_means(changed, hs.probes.from_tokens(families.tokens(2)))
    with torch.no_grad():
        changed.module.transformer.h[0].attn.c_attn.weight.add_(1.0)
    with pytest.raises(InputError, match="other weights"):
        hs.steering.inject(hs.load(changed.module), own)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_of_a_padded_prompt_is_edited(side: str) -> None:
    model = bundled()
    short, long = torch.arange(5, 9)[None], torch.arange(20, 27)[None]
    pad = (0, 3) if side == "right" else (3, 0)
    tokens = torch.cat([torch.nn.functional.pad(short, pad), long])
    real = torch.cat([torch.nn.functional.pad(torch.ones(1, 4), pad), torch.ones(1, 7)]).bool()
    with hs.steering.inject(model, means(), ["L1H0", "L2H1"], strength=3.0, mode="add"):
        alone = [model.forward(one)[0, -1] for one in (short, long)]
        together = model.forward(tokens, real=real)
        direct = model.module(tokens, attention_mask=real.long()).logits
        same = model.forward(tokens[:1], real=real[:1])
        together_without = _effects(model, tokens, real)
        alone_without = [_effects(model, one, one > 0)[0] for one in (short, long)]
    assert together_without == pytest.approx(alone_without, abs=1e-4)
    at = 3 if side == "right" else -1
    for found in (together, direct) if side == "right" else (together,):
        assert torch.allclose(found[0, at], alone[0], atol=1e-4)
        assert torch.allclose(found[1, -1], alone[1], atol=1e-4)
    assert torch.allclose(same[0, at], alone[0], atol=1e-4)


def _effects(model: HeadModel, tokens: torch.Tensor, real: torch.Tensor) -> list[float]:
    """Effect of L1H1 on the loss of a token at the end of each text."""
    last = real.int().cumsum(1).argmax(1)
    targets = torch.full_like(tokens, -1)
    targets[torch.arange(len(tokens)), last] = 9
    probe = hs.probes.from_tokens(tokens, real=real, targets=targets)
    found = hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads=["L1H1"])
    return found.per_example[1, 1].tolist()
