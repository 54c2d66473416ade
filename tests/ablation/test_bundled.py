"""Trained models: the heads that the scan names carry what they are named for; others do not."""

import numpy as np
import pytest

import headscope as hs

ROLE = 0.3  # mean score from which a head counts as having a role here


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_without_its_induction_heads_a_model_cannot_repeat(name: str) -> None:
    model = hs.load(name)
    probe = hs.probes.repeated_tokens(model, length=20, batch=4)
    table = hs.score(model, probe, ["induction", "previous_token"])
    named = {
        role: [head for head, mean in table[role].top(100) if mean > ROLE] for role in list(table)
    }
    taken = {*named["induction"], *named["previous_token"]}
    others = [head for head in model.shape.heads if head not in taken]
    order = np.random.default_rng(0).permutation(len(others))
    size = len(named["induction"])
    draws = {f"random {i}": [others[j] for j in np.roll(order, i)[:size]] for i in range(4)}
    groups = {"induction": named["induction"], "previous": named["previous_token"], **draws}
    effects = hs.ablate_groups(
        model, probe, hs.metrics.loss.at("second_copy"), groups, reference=probe.control
    )
    loss = effects.unedited.mean()
    assert named["induction"]
    assert loss < 0.5
    assert effects.mean[0] > 3
    assert effects.mean[1] > 3
    assert effects.mean[2:].max() < 0.3 * effects.mean[:2].min()
    assert effects.p_value[0] < 0.01


def test_patching_and_estimates_agree_on_the_indirect_object() -> None:
    model = hs.load("tiny-llama")
    probe = hs.probes.pairs(model, "ioi", batch=8)
    effects = hs.patch_activations(model, probe, hs.metrics.logit_difference)
    ablated = hs.ablate_heads(model, probe, hs.metrics.logit_difference, "patch")
    assert effects.per_example == pytest.approx(ablated.per_example, abs=1e-4)
    assert effects.normalised().min() < 0.5  # some head carries much of it
