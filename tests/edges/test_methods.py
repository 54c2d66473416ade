"""Estimators with closed forms: linear nets, relevance that is conserved, gates of known heads."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import headscope as hs
from headscope.edges import EdgeGraph
from headscope.edges.compare import _by_head, heads_out
from headscope.edges.rules import (
    TEMPERATURE,
    InteractionRules,
    RelevanceRules,
    _half,
    _identity,
    _SoftGradient,
)
from headscope.edges.written import EdgeMeasurement, run_apart
from headscope.errors import InputError
from headscope.metrics import answer_log_prob, logit_difference
from headscope.models.protocol import HeadModel
from tests.edges.helpers import fresh, pair
from tests.edges.test_attribute import linear_net


@cache
def linear() -> HeadModel:
    return hs.load(linear_net())


@cache
def exact() -> EdgeGraph:
    return hs.edges.attribute(linear(), pair(), logit_difference, "exact")


@pytest.mark.parametrize("method", ["eap", "eap_ig", "eap_ig_activations", "relp"])
def test_all_are_exact_in_a_linear_net(method: str) -> None:
    graph = hs.edges.attribute(linear(), pair(), logit_difference, method, 2)
    np.testing.assert_allclose(graph.mean, exact().mean, atol=2e-5)
    assert np.abs(exact().mean).max() > 1


def test_gim_passes_half_through_values_and_all_elsewhere() -> None:
    """In a linear net whose patterns are flat: what enters the last layer's values is halved."""
    graph = hs.edges.attribute(linear(), pair(), logit_difference, "gim")
    share = {
        edge: graph.mean[at] / exact().mean[at]
        for at, edge in enumerate(graph.edges)
        if abs(exact().mean[at]) > 0.05
    }
    last = {edge: one for edge, one in share.items() if edge.target.startswith("L1")}
    out = {edge: one for edge, one in share.items() if edge.target in ("logits", "MLP1")}
    assert {edge.slot for edge in last} == {"value"}
    np.testing.assert_allclose(list(last.values()), 0.5, rtol=1e-3)
    np.testing.assert_allclose(list(out.values()), 1.0, rtol=1e-3)


def test_relevance_is_conserved() -> None:
    """Without biases and with flat patterns every rule is linear in its input: all relevance of
    the logit comes back to the embedding. Gradients do not do that.
    """
    module = fresh("mistral")
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    model, probe = hs.load(module), pair()
    study = EdgeMeasurement.of(model, probe, logit_difference, "zero")
    clean = next(study.batches()).clean_value()
    for method, conserves in (("relp", True), ("eap", False)):
        graph = hs.edges.attribute(model, probe, logit_difference, method, ablation="zero")
        leaving = [at for at, edge in enumerate(graph.edges) if edge.source == "embed"]
        total = graph.per_example[leaving].sum(0)
        assert np.allclose(total, -clean, atol=1e-4) == conserves


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "granite", "mixtral"])
@pytest.mark.parametrize("rules", [RelevanceRules, InteractionRules])
def test_rules_change_no_value(family: str, rules: type) -> None:
    model, probe = hs.load(fresh(family)), pair("right")
    study = EdgeMeasurement.of(model, probe, logit_difference)
    texts = next(study.batches()).texts
    with torch.enable_grad():
        plain = run_apart(model, texts, grad=True)
        ruled = run_apart(model, texts, grad=True, rules=rules())
    assert plain.logits is not None
    assert ruled.logits is not None
    real = probe.real
    torch.testing.assert_close(ruled.logits[real], plain.logits[real], atol=2e-5, rtol=1e-5)


def test_rules_one_by_one() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    (slope,) = torch.autograd.grad(_identity(torch.nn.functional.silu, x).sum(), x)
    torch.testing.assert_close(slope, torch.sigmoid(x.detach()))  # silu(x) / x
    a, b = x * 2, x + 1
    (half,) = torch.autograd.grad(_half(torch.mul, a, b).sum(), x)
    (whole,) = torch.autograd.grad((x * 2 * (x + 1)).sum(), x)
    torch.testing.assert_close(half, whole / 2)
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, dtype=torch.float64)
    (soft,) = torch.autograd.grad((_SoftGradient.apply(scores) * weights).sum(), scores)
    p = torch.softmax(scores.detach() / TEMPERATURE, -1)
    slow = torch.stack(
        [(torch.diag(row) - torch.outer(row, row)) @ w for row, w in zip(p, weights, strict=True)]
    )
    torch.testing.assert_close(soft, slow)


def test_gates_know_who_helps_and_who_hurts() -> None:
    case = hs.compiled.make_case("previous", {"noise_heads": 2}, batch=4)
    used = next(iter(case.made.truth.used))
    options = {"steps": 25, "progress": False}
    good = hs.edges.causal_gates(case.made.model, case.probe, answer_log_prob, **options)
    others = np.ones_like(good["facilitating"].mean, bool)
    others[used.layer, used.head] = False
    assert good["facilitating"].mean[used.layer, used.head] > 0.8
    assert good["facilitating"].mean[others].max() < 0.5
    assert good["irrelevant"].mean[others].min() > 0.5
    bad = hs.edges.causal_gates(
        case.made.model, case.probe, answer_log_prob, better="lower", **options
    )
    assert bad["interfering"].mean[used.layer, used.head] > 0.8
    assert bad["interfering"].mean[others].max() < 0.3
    best = hs.edges.best_heads(
        case.made.model, case.probe, answer_log_prob, 1, ablation="zero", **options
    )
    assert best.top(1)[0][0] == used


def test_exact_scores_are_compared_with_themselves() -> None:
    found = hs.edges.compare_methods(
        linear(), pair(), logit_difference, ["gim", "exact"], exact=exact(), progress=False
    )
    assert found.methods == ("exact", "gim")
    for name in ("edges", "edges_low", "edges_high", "signed", "overlap"):
        assert getattr(found, name)[0] == pytest.approx(1.0), name
    assert found.gradients.tolist() == [110, 1]
    assert len(found.to_pandas()) == 2
    assert "rank correlations" in str(found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_some_edges_have_the_scores_that_they_have_among_all(family: str) -> None:
    """Of every kind of slot; all others are missing, and methods are compared on those alone."""
    model, probe = hs.load(fresh(family)), pair("right")
    whole = hs.edges.attribute(model, probe, logit_difference, "exact")
    places = np.random.default_rng(0).choice(len(whole.edges), 30, replace=False)
    some = [whole.edges[at] for at in places]
    assert len({edge.slot for edge in some}) == 5
    found = hs.edges.attribute(model, probe, logit_difference, "exact", edges=some)
    known = ~np.isnan(found.mean)
    assert {edge for edge, there in zip(whole.edges, known, strict=True) if there} == set(some)
    np.testing.assert_allclose(found.per_example[known], whole.per_example[known], atol=1e-5)
    eap = hs.edges.attribute(model, probe, logit_difference, "eap")
    compared = hs.edges.compare_methods(
        model, probe, logit_difference, [eap, "eap"], exact=found, progress=False
    )
    assert compared.compared == 30
    assert compared.edges[0] == compared.edges[1]
    expected = spearmanr(*(np.abs(one.mean[known]) for one in (eap, found))).statistic
    assert compared.edges[0] == pytest.approx(expected, abs=1e-9)


def test_a_sample_of_edges_is_drawn_by_the_seed() -> None:
    given, eap = (linear(), pair(), logit_difference), ["eap"]
    one, two = (
        hs.edges.compare_methods(*given, eap, sample=20, seed=seed, progress=False)
        for seed in (0, 1)
    )
    assert one.compared == two.compared == 20
    # Exact in a linear net but for rounding, which ranks edges without any effect.
    assert min(one.signed[0], two.signed[0]) > 0.5
    assert "over 20 edges" in str(one)


def test_in_a_linear_net_a_head_is_the_sum_of_its_edges() -> None:
    heads = heads_out(EdgeMeasurement.of(linear(), pair(), logit_difference))
    sums = _by_head(exact().wiring, exact().per_example.astype(float))
    # a sum of some twenty effects, each a difference of fp32 logits
    np.testing.assert_allclose(heads.reshape(sums.shape), sums, atol=1e-4)


def test_mistakes_get_a_sentence() -> None:
    given = (linear(), pair(), logit_difference)
    with pytest.raises(InputError, match="did you mean"):
        hs.edges.compare_methods(*given, ["eapp"])
    eap = hs.edges.attribute(*given)
    with pytest.raises(InputError, match="exact holds scores by 'eap'"):
        hs.edges.compare_methods(*given, ["eap"], exact=eap)
    with pytest.raises(InputError, match="was not computed with this model"):
        hs.edges.compare_methods(*given, [hs.edges.attribute(*given, ablation="zero")])
    with pytest.raises(InputError, match="give exact or sample"):
        hs.edges.compare_methods(*given, ["eap"], exact=exact(), sample=5)
    with pytest.raises(InputError, match="draw 2 to 110 edges"):
        hs.edges.compare_methods(*given, ["eap"], sample=1)
    with pytest.raises(InputError, match="scores all edges at once"):
        hs.edges.attribute(*given, edges=[("embed", "logits", "output")])
    with pytest.raises(InputError, match="edges is empty"):
        hs.edges.attribute(*given, "exact", edges=[])
    with pytest.raises(InputError, match="there is no edge"):
        hs.edges.attribute(*given, "exact", edges=[("logits", "embed", "output")])
    with pytest.raises(InputError, match="a number above 0"):
        hs.edges.causal_gates(*given, strength=0.0)
    with pytest.raises(InputError, match="1 or more"):
        hs.edges.best_heads(*given, 1, steps=0)
    with pytest.raises(InputError, match="1 to 8 heads"):
        hs.edges.best_heads(*given, 9)
