"""The benchmark of methods: its arithmetic, what it asks, and what it is known to find."""

import itertools

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.compiled import CASES, METHODS, QUESTIONS, Method
from headscope.compiled.benchmark import make_case, pessimistic_auroc
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.proof import logit_gap
from tools.methods import PAGE, page

INDUCTION = [("induction", {"noise_heads": 1, "rotation_seed": 3})]


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_the_right_order(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    true, others = (drawn.integers(0, 4, n).astype(float).tolist() for n in (7, 9))
    pairs = [a > b for a, b in itertools.product(true, others)]
    assert pessimistic_auroc(true, others) == pytest.approx(np.mean(pairs))


def test_there_are_at_least_twenty_models_of_every_kind() -> None:
    assert len(CASES) >= 20
    builds = [build for _, build in CASES]
    assert all(build.get("noise_heads") for build in builds)
    assert sum(build.get("family") == "llama" for build in builds) >= 4
    assert sum(build.get("kv_group", 1) > 1 for build in builds) >= 2
    assert sum("rotation_seed" in build for build in builds) >= 8
    assert {method.asks for method in METHODS.values()} == set(QUESTIONS)


def test_answers_of_the_probe_are_what_the_model_says() -> None:
    case = make_case("indirect object", {"noise_heads": 1})
    said = case.made.model.forward(case.probe.tokens).argmax(-1)
    asked = case.probe.targets >= 0
    assert asked.any()
    assert bool((said[asked] == case.probe.targets[asked]).all())
    assert not asked[:, 0].any()


def test_scores_ablation_and_exact_edges_find_the_truth() -> None:
    names = ["previous_token", "induction", "ablation, mean", "exact, zero", "composition K"]
    found = hs.compiled.benchmark(names, INDUCTION, progress=False)
    assert [trial.auroc for trial in found.trials] == [1.0] * 5
    assert all(trial.exact for trial in found.trials)


def test_a_gradient_through_saturated_attention_finds_half_of_it() -> None:
    names = ["attribution", "edge sums, eap", "eap_ig, mean"]
    found = hs.compiled.benchmark(names, INDUCTION, progress=False)
    one, same, through = (trial.auroc for trial in found.trials)
    assert one == same <= 0.75
    assert through > 0.95


def test_what_everything_ties_has_zero_and_chance_a_half() -> None:
    def flat(case: hs.compiled.Case) -> np.ndarray:
        return np.ones((case.made.model.shape.n_layers, case.made.model.shape.n_heads))

    drawn = np.random.default_rng(0)

    def random(case: hs.compiled.Case) -> np.ndarray:
        return drawn.random((case.made.model.shape.n_layers, case.made.model.shape.n_heads))

    extra = [Method("flat", "used", flat)]
    extra += [Method(f"random {i}", "used", random) for i in range(200)]
    found = hs.compiled.benchmark([], INDUCTION, extra=extra, progress=False)
    assert found.trials[0].auroc == 0.0
    assert np.mean([one.auroc for one in found.trials[1:]]) == pytest.approx(0.5, abs=0.06)


def test_a_question_that_a_model_lacks_is_not_asked_and_refusals_are_kept() -> None:
    def refuse(case: hs.compiled.Case) -> np.ndarray:
        raise hs.HeadscopeError(f"not on {case.name}")

    found = hs.compiled.benchmark(
        ["induction"], [("copy", {"noise_heads": 1}), *INDUCTION],
        extra=[Method("shy", "used", refuse)], progress=False,
    )  # fmt: skip
    assert [(one.method, bool(one.refused)) for one in found.trials] == [
        ("shy", True), ("induction", False), ("shy", True),
    ]  # fmt: skip
    row = found.by_method().set_index("method").loc["shy"]
    assert row["refused"] == 2
    assert np.isnan(row["auroc"])
    assert found.trials[0].refused == "not on copy (noise heads 1)"


def test_items_that_a_method_leaves_out_come_last() -> None:
    method = Method("some", "induction", lambda _: {HeadIndex(1, 0): 1.0, HeadIndex(0, 0): 2.0})
    found = hs.compiled.benchmark([method], [("induction", {"noise_heads": 1})], progress=False)
    assert found.trials[0].auroc == pytest.approx(2 / 3)


def test_mistakes_are_said() -> None:
    with pytest.raises(InputError, match="did you mean 'induction'"):
        hs.compiled.benchmark(["inducton"], INDUCTION)
    with pytest.raises(InputError, match="program"):
        hs.compiled.benchmark(["induction"], [("no such", {})])
    with pytest.raises(InputError, match="question"):
        hs.compiled.benchmark([Method("mine", "use", lambda _: {})], INDUCTION)
    wrong = Method("mine", "edges", lambda _: np.zeros((2, 2)))
    found = hs.compiled.benchmark([wrong], INDUCTION, progress=False)
    assert "needs a number per item" in found.trials[0].refused


def test_a_benchmark_shows_itself_and_the_page_lists_every_method() -> None:
    found = hs.compiled.benchmark(["induction", "chance"], INDUCTION, progress=False)
    assert "induction" in repr(found)
    assert len(found.to_pandas()) == 2
    assert "| induction | induction | 1 | 1.00 | 1.00 | 100% | 0 |" in page(found)
    text = PAGE.read_text(encoding="utf-8")
    for name, method in METHODS.items():
        assert f"| {method.asks} | {name} |" in text, "run python -m tools.methods"


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_wider_than_the_model_are_decomposed(heads: int) -> None:
    made = hs.compiled.from_library("previous", family="llama", noise_heads=heads - 1)
    assert made.model.shape.d_head > made.model.shape.d_model
    ov = hs.circuits.ov(made.model)
    explicit = ov.explicit("L0H0").double()
    values = np.linalg.svd(explicit.numpy(), compute_uv=False)
    rank = min(len(values), ov.singular_values().shape[-1])
    np.testing.assert_allclose(ov.singular_values()[0, 0, :rank], values[:rank], atol=1e-4)
    parts = ov.svd()
    again = (parts.U[0, 0] * parts.S[0, 0]) @ parts.Vh[0, 0]
    np.testing.assert_allclose(again, explicit, atol=1e-4)


def test_logits_whose_terms_cancel_are_proved_within_their_rounding() -> None:
    # A hidden rotation spreads the constant that holds norms fixed, so that terms cancel.
    for name, build in CASES[1], CASES[3]:
        model = make_case(name, build).made.model
        assert "unembedding" not in model.limits
    unembedding, states = model.unembedding, 5 + torch.randn(1, 4, model.shape.d_model)
    own = unembedding.logits(states)
    assert logit_gap(unembedding, states, own, 0.0).closed
    assert not logit_gap(unembedding, states, 1.01 * own, 1e-5).closed


def test_eigenvalues_that_are_rounding_have_no_ratio() -> None:
    for build in ({"noise_heads": 1}, {"noise_heads": 2, "rotation_seed": 11}):
        case = make_case("bystanders", build)
        found = METHODS["matching_eigenvalues"].answer(case)
        assert found[0, 1] == pytest.approx(1)  # looks for its own token
        # These read positions, or what another head wrote, so nothing of tokens is left.
        assert np.isnan(found[[0, 1, 1], [0, 0, 1]]).all()
