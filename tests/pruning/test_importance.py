"""Importance against slow versions: finite differences, whole matrices, loops over patterns."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.edits import scale, zero
from headscope.errors import InputError
from headscope.pruning import (
    ablation_importance,
    confidence,
    gradient_importance,
    output_norm,
    weight_norm,
)
from tests.ablation.helpers import model_of, probe_of
from tests.models import families

H = 1e-5


def doubled(family: str) -> Any:
    module = families.fresh(family).double()
    module.set_attn_implementation("sdpa")  # eager attention takes its softmax in fp32
    return hs.load(module)


@torch.no_grad()
def losses(model: Any, probe: hs.Probe, edits: tuple[Any, ...]) -> np.ndarray:
    """Loss of every example (each has one target), in double precision."""
    logits = model.forward(probe.tokens, real=probe.real, edits=edits).double()
    at = (probe.targets >= 0).nonzero().T.tolist()
    return -logits.log_softmax(-1)[at[0], at[1], probe.targets[at[0], at[1]]].numpy()


def slopes(model: Any, probe: hs.Probe, head: Any, also: tuple[Any, ...] = ()) -> np.ndarray:
    """Derivative of the metric by a factor on one head, by differences."""
    up, down = (losses(model, probe, (*also, scale([head], 1 + step))) for step in (H, -H))
    return (up - down) / (2 * H)


@pytest.mark.parametrize("padding", ["none", "both"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # others compute norms in fp32
def test_gradients_are_the_slopes_of_the_metric(family: str, padding: str) -> None:
    model, probe = doubled(family), probe_of(padding)
    found = gradient_importance(model, probe, normalise=False, batch_size=3)
    heads = model.shape.heads[1::3]
    for head in heads:
        expected = np.abs(slopes(model, probe, head))
        np.testing.assert_allclose(found.per_example[head], expected, rtol=1e-3, atol=1e-5)
    gone = ["L0H0", "L1H2"]
    rest = gradient_importance(model, probe, removed=gone, normalise=False)
    assert np.isnan(rest["L0H0"])
    assert np.isnan(rest["L1H2"])
    for head in heads:
        expected = np.abs(slopes(model, probe, head, (zero(gone),)))
        if str(head) not in gone:
            np.testing.assert_allclose(rest.per_example[head], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2"])
def test_gradients_are_those_of_a_plain_pass(family: str) -> None:
    model, probe = model_of(family), probe_of()
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor]) -> None:
            kept[layer] = args[0]
            args[0].retain_grad()

        return hook

    handles = [
        parts.projection.register_forward_pre_hook(keep(layer))
        for layer, parts in model.layout.layers.items()
    ]
    logits = model.module(input_ids=probe.tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    (-logits[:, -1].log_softmax(-1)[:, 5]).sum().backward()
    model.module.zero_grad(set_to_none=True)
    found = gradient_importance(model, probe, normalise=False)
    for layer, z in kept.items():
        by_head = (z * z.grad).unflatten(-1, (4, -1)).sum((1, 3)).abs().detach()
        np.testing.assert_allclose(found.per_example[layer], by_head.T, rtol=1e-2, atol=1e-3)


def test_token_by_token_is_no_smaller_and_sums_by_hand() -> None:
    model, probe = doubled("gpt2"), probe_of("left")
    by_token = gradient_importance(model, probe, over="token", normalise=False)
    by_example = gradient_importance(model, probe, normalise=False)
    lengths = probe.real.sum(1).numpy()
    assert (by_token.per_example * lengths >= by_example.per_example - 1e-9).all()
    head, example = (1, 2), 1
    total = 0.0
    for position in range(probe.length):
        where = torch.zeros_like(probe.real)
        where[:, position] = True
        up, down = (losses(model, probe, (scale([head], 1 + s, positions=where),)) for s in (H, -H))
        total += abs((up - down)[example] / (2 * H))
    assert by_token.per_example[1, 2, example] == pytest.approx(total / lengths[example], rel=1e-3)


def test_layers_are_normalised_and_batches_do_not_matter() -> None:
    model, probe = model_of("llama"), probe_of("left")
    whole = gradient_importance(model, probe)
    np.testing.assert_allclose(np.square(whole.mean).sum(1), 1.0, rtol=1e-6)
    parts = gradient_importance(model, probe, batch_size=1)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-4)
    raw = gradient_importance(model, probe, normalise=False)
    ratio = raw.mean / whole.mean
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(4, 1), rtol=1e-6)
    assert (whole.sem > 0).all()
    with pytest.raises(InputError, match="'example' or 'token'"):
        gradient_importance(model, probe, over="batch")


def test_ablation_importance_has_the_sign_of_damage() -> None:
    model, probe = model_of("gpt2"), probe_of()
    for metric, sign in ((hs.metrics.loss, 1), (hs.metrics.logit_difference, -1)):
        effect = hs.ablate_heads(model, probe, metric, "zero")
        found = ablation_importance(model, probe, metric)
        np.testing.assert_array_equal(found.per_example, sign * effect.per_example)

    def mine(logits: torch.Tensor, probe: hs.Probe) -> torch.Tensor:
        return logits[:, -1].amax(1)

    with pytest.raises(InputError, match="'mine' has no direction"):
        ablation_importance(model, probe, mine)
    assert ablation_importance(model, probe, mine, better="higher").n.min() == len(probe)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_weight_norm_is_that_of_the_whole_matrix(family: str) -> None:
    model = model_of(family)
    found = weight_norm(model)
    for layer, head in model.shape.heads:
        weights = model.weights(layer)
        whole = weights.W_V[model.shape.kv_head(head)] @ weights.W_O[head]
        assert found[layer, head] == pytest.approx(float(whole.norm()), rel=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_confidence_and_output_norm_by_hand(padding: str) -> None:
    model, probe = model_of("llama"), probe_of(padding)
    acts = hs.capture.collect(model, probe)
    sure, size = confidence(model, probe), output_norm(model, probe)
    for layer, head in ((0, 1), (2, 3)):
        for example in range(len(probe)):
            first, n = int(probe.first[example]), probe.length
            pattern = acts[layer].pattern[example, head]
            best = [float(pattern[q, first + 1 :].max()) for q in range(first + 1, n)]
            assert sure.per_example[layer, head, example] == pytest.approx(np.mean(best), rel=1e-4)
            z = acts[layer].z[example, first + 1 :, head]
            lengths = (z @ model.output_weights(layer)[head]).norm(dim=-1)
            expected = float(lengths.mean())
            assert size.per_example[layer, head, example] == pytest.approx(expected, rel=1e-4)


def test_examples_without_answer_count_for_nothing_whoever_is_beside_them() -> None:
    model = hs.load("tiny-gpt2")
    probe = hs.probes.pairs(model, "ioi", batch=3, seed=0)
    assert probe.targets is not None
    targets = probe.targets.clone()
    targets[1] = -1
    given = replace(probe, targets=targets)
    alone, together = (
        gradient_importance(model, given, hs.metrics.answer_log_prob, batch_size=size)
        for size in (1, 3)
    )
    assert set(np.unique(alone.n)) == {2}
    np.testing.assert_allclose(alone.mean, together.mean, rtol=1e-4, atol=1e-6)
