"""Matching against brute force and against shuffled models; intervals against their definition."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import headscope as hs
from headscope.comparing import by_profile, profile_distances, weight_similarity
from headscope.errors import InputError
from headscope.table import HeadTable, Provenance
from tests.table.helpers import NAN, scores


def table(
    seed: int, name: str = "a", shape: tuple[int, int] = (2, 3), **facts: object
) -> HeadTable:
    rng = np.random.default_rng(seed)
    origin = Provenance(model=name, probe={"kind": "toy"}, seed=0)
    return HeadTable(
        [scores(one, rng.uniform(0, 1, shape), provenance=origin, **facts) for one in ("x", "y")]
    )


def permuted(of: HeadTable, order: np.ndarray) -> HeadTable:
    def moved(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(-1, *values.shape[2:])
        return flat[order].reshape(values.shape)

    return HeadTable(
        [
            scores(one.name, moved(one.mean), provenance=replace(one.provenance, model="b"))
            for one in of.values()
        ]
    )


def test_distances_are_those_of_the_formula() -> None:
    one, two = table(0), table(1, "b")
    found = profile_distances(one, two)
    for i, j in itertools.product(range(6), range(6)):
        total = 0.0
        for name in ("x", "y"):
            a, b = one[name].mean.ravel(), two[name].mean.ravel()
            total += ((a[i] - b[j]) / np.concatenate([a, b]).std()) ** 2
        assert found[i, j] == pytest.approx(np.sqrt(total / 2))


def test_the_pairing_is_the_best_of_all() -> None:
    one, two = table(2), table(3, "b")
    distance = profile_distances(one, two)
    best = min(
        sum(distance[i, j] ** 2 for i, j in enumerate(order))
        for order in itertools.permutations(range(6))
    )
    _, closeness = by_profile(one, two)
    assert (closeness**2).sum() == pytest.approx(best)


def test_shuffled_heads_are_found_again() -> None:
    one = table(4)
    order = np.random.default_rng(0).permutation(6)
    found = hs.compare(one, permuted(one, order))
    np.testing.assert_allclose(found.closeness, 0, atol=1e-9)
    np.testing.assert_allclose(found.difference, 0, atol=1e-9)
    for a, b in found.pairs:
        assert order[3 * b.layer + b.head] == 3 * a.layer + a.head
    assert found.names == ("a", "b")


def test_heads_and_scores_that_are_missing_are_left_out() -> None:
    origin = Provenance(model="a")
    one = HeadTable([scores("x", ((0.1, 0.9), (NAN, NAN)), provenance=origin)])
    two = HeadTable([scores("x", ((0.9, 0.1), (0.5, 0.5)), provenance=origin)])
    pairs, _ = by_profile(one, two)
    assert {(str(a), str(b)) for a, b in pairs} == {("L0H0", "L0H1"), ("L0H1", "L0H0")}
    with pytest.raises(InputError, match="share no score"):
        hs.compare(one, HeadTable([scores("z")]))


def test_paired_differences_use_the_same_examples() -> None:
    """Noise that both share cancels; the interval of independent means would hold it."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (1, 2, 40))
    origin = Provenance(model="a", probe={"kind": "toy"}, seed=0)

    def of(shift: float, **facts: object) -> HeadTable:
        one = hs.HeadScores.from_examples(
            "x", noise + shift, kv_heads=1, provenance=replace(origin, **facts)
        )
        return HeadTable([one])

    paired = hs.compare(of(0.0), of(0.5), by="address")
    assert paired.paired == (True,)
    np.testing.assert_allclose([paired.low, paired.high], 0.5)
    apart = hs.compare(of(0.0), of(0.5, seed=1), by="address")
    assert apart.paired == (False,)
    sem = np.sqrt(2) * noise[0].std(-1, ddof=1) / np.sqrt(40)
    widths = [2 * stats.t.ppf(0.975, 78) * sem[a.head] for a, _ in apart.pairs]  # Welch
    np.testing.assert_allclose((apart.high - apart.low)[:, 0], widths)


def test_p_values_are_scipys_and_adjusted_over_all_pairs_and_scores() -> None:
    rng = np.random.default_rng(1)
    shift = np.array([0.0, 0.2, 0.9])[None, :, None]
    one, two = rng.normal(0, 1, (1, 3, 30)), rng.normal(0, 1, (1, 3, 30)) + shift

    def of(values: np.ndarray, seed: int) -> HeadTable:
        origin = Provenance(model="a", probe={"kind": "toy"}, seed=seed)
        named = {"x": values, "y": values[..., ::-1] + rng.normal(0, 1, values.shape)}
        return HeadTable(
            [
                hs.HeadScores.from_examples(name, part, kv_heads=1, provenance=origin)
                for name, part in named.items()
            ]
        )

    first, second, other = of(one, 0), of(two, 0), of(two, 1)
    for against, test, facts in (
        (second, stats.ttest_rel, {}),
        (other, stats.ttest_ind, {"equal_var": False}),
    ):
        found = hs.compare(first, against, by="address")
        expected = np.array(
            [
                [
                    test(
                        against[name].per_example[0, a.head],
                        first[name].per_example[0, a.head],
                        **facts,
                    ).pvalue
                    for name in found.scores
                ]
                for a, _ in found.pairs
            ]
        )
        np.testing.assert_allclose(found.p, expected)
        np.testing.assert_allclose(
            found.p_adjusted.ravel(), stats.false_discovery_control(expected, axis=None)
        )
        a, b = (side["x"].per_example[0, 2] for side in (first, against))
        pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
        g = (b.mean() - a.mean()) / pooled * (1 - 3 / (4 * 58 - 1))
        at = [pair[0].head for pair in found.pairs].index(2)
        assert found.effect_size[at, 0] == pytest.approx(g)
    assert (found.to_pandas()["p_adjusted"] >= found.to_pandas()["p"]).all()
    untested = hs.compare(table(0), table(1, "b"), by="address")
    assert np.isnan(untested.p).all()  # scores without examples


def test_runs_without_examples_are_tested_by_their_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    tables = []
    for name, shift in (("a", 0.0), ("b", 0.5)):
        values = rng.normal(shift, 1, (1, 2, 20))
        origin = Provenance(model=name, probe={"kind": "toy"}, seed=0)
        one = hs.HeadScores.from_examples("x", values, kv_heads=1, provenance=origin)
        HeadTable([one]).save(tmp_path / name)
        tables.append((values, HeadTable.load(tmp_path / name)))
    (first, one), (second, two) = tables
    found = hs.compare(one, two, by="address")
    for row, (a, b) in enumerate(found.pairs):
        expected = stats.ttest_ind(second[0, b.head], first[0, a.head], equal_var=False).pvalue
        assert found.p[row, 0] == pytest.approx(expected)
    assert "independent samples" in found.tests
    place = tmp_path / "found.safetensors"
    found.save(place)
    np.testing.assert_array_equal(type(found).load(place).p, found.p)


def test_rounding_is_no_difference() -> None:
    values = np.random.default_rng(2).normal(0, 1, (1, 2, 12))
    origin = Provenance(model="a", probe={"kind": "toy"}, seed=0)
    one, two = (
        HeadTable([hs.HeadScores.from_examples("x", part, kv_heads=1, provenance=origin)])
        for part in (values, values * (1 + 1e-7))
    )
    found = hs.compare(one, two, by="address")
    assert not (found.p < 0.5).any()
    np.testing.assert_array_equal(found.effect_size, 0)


def test_weight_similarity_is_the_cosine_of_whole_matrices() -> None:
    one, two = hs.load(revision="step-005000"), hs.load()
    found = weight_similarity(one, two)
    for layer in (0, 2):
        expected = torch.zeros(4, 4)
        for circuit in (hs.circuits.ov, hs.circuits.qk):
            a, b = (circuit(m) for m in (one, two))
            whole = [(f.left[layer] @ f.right[layer]).flatten(1) for f in (a, b)]
            expected += torch.nn.functional.cosine_similarity(whole[0][:, None], whole[1], dim=-1)
        np.testing.assert_allclose(found[layer], expected / 2, atol=1e-5)
    same = weight_similarity(two, two)
    np.testing.assert_allclose([np.diag(same[i]) for i in range(3)], 1, atol=1e-5)


def test_grouped_heads_are_compared_by_weights() -> None:
    llama = hs.load("tiny-llama")
    found = hs.compare(llama, llama, by="weights", scorers=["induction"])
    assert all(a == b for a, b in found.pairs)
    np.testing.assert_allclose(found.closeness, 1, atol=1e-5)


def test_checkpoints_keep_their_heads() -> None:
    found = hs.compare("tiny-gpt2", hs.load(), by="address", scorers=["induction"])
    np.testing.assert_array_equal(found.difference, 0)
    frame = found.to_pandas()
    assert len(frame) == 12
    assert frame["paired"].all()


@pytest.mark.parametrize(
    ("by", "said"), [("weights", "needs two models"), ("address", "by=.profile")]
)
def test_mistakes_get_a_sentence(by: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        hs.compare(table(0), table(0, shape=(1, 2)), by=by)
