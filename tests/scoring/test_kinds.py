"""Scorers of weights and of gradients beside those of rows, and controls of a user's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.errors import InputError, UnsupportedModelError
from headscope.models.hf.model import HFModel
from headscope.scorer import Control, DefaultProbe
from tests.models.families import build


def wrapped(family: str) -> HFModel:
    found = HFModel.wrap(build(family))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model() -> HFModel:
    return wrapped("llama")


@pytest.fixture(scope="module")
def probe(model: HFModel) -> hs.Probe:
    return hs.probes.repeated_tokens(model, length=6, batch=3, seed=1)


def test_one_call_takes_scorers_of_every_kind_in_the_order_given(
    model: HFModel, probe: hs.Probe
) -> None:
    names = ["ov_norm", "entropy", "loss_sensitivity", "head_output_norm", "qk_norm"]
    table = hs.score(model, probe, names)
    assert list(table) == names
    alone = hs.circuits.score(model)
    for name in ("ov_norm", "qk_norm"):
        np.testing.assert_array_equal(table[name].mean, alone[name].mean)
        assert table[name].spec == alone[name].spec


def test_bounds_by_the_model_stand_in_the_result(model: HFModel) -> None:
    found = hs.score(model, scorers="ov_effective_rank")["ov_effective_rank"]
    assert hs.scorers.CATALOGUE["ov_effective_rank"].bounds == (0.0, None)
    assert found.bounds == (0.0, float(model.shape.d_head))


def _keep(kept: dict[int, Tensor], layer: int, z: Tensor) -> None:
    z.retain_grad()
    kept[layer] = z


def test_gradients_are_those_of_plain_autograd(model: HFModel, probe: hs.Probe) -> None:
    """Independent: hooks on the output projection, and autograd on whole logits."""
    found = hs.score(model, probe, "loss_sensitivity", batch_size=2)["loss_sensitivity"]
    slow = np.zeros(found.per_example.shape)
    for example in range(len(probe)):
        kept: dict[int, Tensor] = {}

        hooks = [
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, layer=layer, kept=kept: _keep(kept, layer, args[0])
            )
            for layer, block in enumerate(model.module.model.layers)
        ]
        tokens = probe.tokens[example : example + 1]
        logits = model.module(tokens).logits[0].float().log_softmax(-1)
        at = probe.targets[example] >= 0
        loss = -logits[at].gather(1, probe.targets[example][at][:, None]).mean()
        loss.backward()
        for one in hooks:
            one.remove()
        for layer, z in kept.items():
            assert z.grad is not None
            product = (z * z.grad)[0].unflatten(-1, (model.shape.n_heads, -1)).sum(-1)
            slow[layer, :, example] = product.abs().mean(0).detach().numpy()
        model.module.zero_grad()
    np.testing.assert_allclose(found.per_example, slow, rtol=2e-4, atol=1e-6)


def test_gradient_scores_are_the_importance_by_token(model: HFModel, probe: hs.Probe) -> None:
    found = hs.score(model, probe, "loss_sensitivity")["loss_sensitivity"]
    known = hs.pruning.gradient_importance(model, probe, over="token", normalise=False)
    np.testing.assert_allclose(found.per_example, known.per_example, rtol=1e-6)


def test_a_metric_without_a_slope_is_refused_before_any_pass(
    model: HFModel, probe: hs.Probe
) -> None:
    @hs.gradient_scorer(metric=hs.metrics.kl_divergence)
    def slope(gradients, probe):  # noqa: ANN001, ANN202
        """Slope of the divergence."""
        return (gradients.z * gradients.gradient).sum(-1).transpose(1, 2)

    with pytest.raises(InputError, match="gradient there is 0"):
        hs.score(model, probe, slope)


def test_a_family_that_refuses_a_circuit_refuses_its_scorers() -> None:
    with pytest.raises(UnsupportedModelError):
        hs.score(wrapped("qwen3"), scorers="qk_norm")


def test_a_control_and_a_default_probe_of_a_users_own(model: HFModel) -> None:
    made = []

    def short(model: HFModel, seed: int) -> hs.Probe:
        made.append(seed)
        return hs.probes.repeated_tokens(model, length=5, batch=4, seed=seed)

    def backwards(probe: hs.Probe) -> hs.Probe:
        return replace(probe, tokens=probe.tokens.flip(1), control=None, paired=True)

    own = Control("backwards", "pass", backwards)

    @hs.row_scorer(probe=DefaultProbe("short", short), control=own)
    def last(rows, probe):  # noqa: ANN001, ANN202
        """Attention to the last visible token."""
        return rows.at(rows.query_pos.expand(len(probe), -1))

    found = hs.score(model, scorers=[last, "entropy"], seed=3)["last"]
    assert made == [3]
    assert found.provenance.control == "backwards"
    assert found.design.paired
    there = hs.score(model, backwards(short(model, 3)), last)["last"]
    np.testing.assert_allclose(found.null, there.mean, rtol=1e-5)


def test_two_controls_on_the_same_rows_are_kept_apart(model: HFModel) -> None:
    def turned(by: int) -> Control:
        def examples(probe: hs.Probe) -> hs.Probe:
            order = torch.arange(len(probe)).roll(by)
            return probe.examples(order)

        return Control(f"turned {by}", "same_rows", examples)

    def scorer(name: str, control: Control) -> hs.scorers.Scorer:
        @hs.row_scorer(name=name, control=control)
        def of_token(rows, probe):  # noqa: ANN001, ANN202
            """Attention to the key whose place the query's token names."""
            place = probe.tokens[:, rows.query_pos] % (rows.query_pos + 1)
            return rows.at(place)

        return of_token

    probe = hs.probes.random_tokens(model, length=8, batch=4, seed=2)
    both = [scorer("one", turned(1)), scorer("two", turned(2))]
    together = hs.score(model, probe, both)
    for each in both:
        alone = hs.score(model, probe, each)[each.name]
        np.testing.assert_allclose(together[each.name].null, alone.null, rtol=1e-6)
    assert not np.allclose(together["one"].null, together["two"].null)


def test_unknown_names_of_probes_and_controls_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'needle'"):
        hs.row_scorer(probe="needel")(lambda rows, probe: rows.pattern[..., 0])
    with pytest.raises(InputError, match="did you mean 'flat'"):
        hs.row_scorer(control="flatt")(lambda rows, probe: rows.pattern[..., 0])
