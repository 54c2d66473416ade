"""Attribution: the gate identity, completeness of integrated gradients, and screening."""

import numpy as np
import pytest
import torch

import headscope as hs
from headscope import edits
from headscope.errors import InputError
from tests.ablation.helpers import model_of, probe_of, whole_pass

difference = hs.metrics.logit_difference


@pytest.mark.parametrize(("family", "baseline"), [("llama", "mean"), ("gpt_neox", "zero")])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_attribution_is_the_derivative_by_the_gate(
    family: str, baseline: str, padding: str
) -> None:
    model, probe = model_of(family), probe_of(padding)
    found = hs.estimate_heads(model, probe, difference, baseline=baseline)
    means = hs.ablation.head_means(model, probe)
    step = 2e-3
    for head in model.shape.heads[::5]:

        def moved(by: float, head: hs.HeadIndex = head) -> np.ndarray:
            donors = {i: by * m for i, m in means.items()} if baseline == "mean" else None
            edit = edits.HeadEdit.at("gate", [head], donors=donors, factor=1 - by)
            return whole_pass(model, probe, [edit])

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert found.per_example[head] == pytest.approx(slope, rel=2e-2, abs=1e-2)


def test_what_has_no_gradient_is_refused() -> None:
    model, probe = model_of("llama"), probe_of()
    for metric in (hs.metrics.answer_rank, lambda logits, _: logits.argmax(2).float().mean(1)):
        with pytest.raises(InputError, match="has no gradient"):
            hs.estimate_heads(model, probe, metric)


def test_gate_identity() -> None:
    """Zero baseline: the derivative is minus the sum of z times d metric / d z."""
    model, probe = model_of("llama"), probe_of()
    kept: dict[int, torch.Tensor] = {}

    class Keep:
        site, layers = "z", frozenset({0, 1, 2})

        def __call__(self, layer: int, value: torch.Tensor) -> torch.Tensor:
            kept[layer] = value * 1.0  # a tensor of its own, that the rest of the pass hangs on
            return kept[layer]

    logits = model.forward(probe.tokens, edits=[Keep()], grad=True)
    total = difference(logits, probe).nansum()
    grads = torch.autograd.grad(total, [kept[i] for i in range(3)])
    found = hs.estimate_heads(model, probe, difference, baseline="zero")
    for layer in range(3):
        expected = -(kept[layer] * grads[layer]).sum((1, 3)).T.detach().numpy()
        assert found.per_example[layer] == pytest.approx(expected, abs=1e-4)


def test_integrated_gradients_are_complete() -> None:
    model, probe = model_of("llama"), probe_of()
    everything = edits.zero(model.shape.heads)
    effect = whole_pass(model, probe, [everything]) - whole_pass(model, probe, ())
    errors = []
    for steps in (4, 96):
        found = hs.estimate_heads(model, probe, difference, baseline="zero", steps=steps)
        errors.append(np.abs(found.per_example.sum((0, 1)) - effect).max())
    assert errors[1] < 0.03 * np.abs(effect).max()
    assert errors[1] < errors[0]


def test_attribution_on_the_bridge_path_and_at_positions() -> None:
    probe = probe_of()
    for family in ("bloom", "llama"):
        found = hs.estimate_heads(model_of(family), probe, difference, positions="late")
        assert np.isfinite(found.per_example).all()
        assert found.mean.any()


def test_screening_measures_the_best_and_a_sample() -> None:
    model, probe = model_of("llama"), probe_of()
    exact = hs.ablate_heads(model, probe, difference, "zero")
    estimate = hs.estimate_heads(model, probe, difference, baseline="zero")
    found = hs.screen_heads(model, probe, difference, baseline="zero", top=3, sample=2, seed=4)
    measured = ~np.isnan(found.mean)
    assert measured.sum() == 5
    assert found.mean[measured] == pytest.approx(exact.mean[measured], abs=1e-5)
    largest = np.sort(np.abs(estimate.mean).ravel())[-3:]
    assert set(largest) <= set(np.abs(estimate.mean)[measured])
    checks = found.provenance.checks
    assert -1 <= checks["rank_correlation"] <= 1
    assert len(checks["heads_sampled"]) == 2
