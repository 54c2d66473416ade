"""Circuits: found where the program has them, run as slow versions run them, kept and exchanged."""

import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.compiled import Case
from headscope.compiled.benchmark import make_case
from headscope.edges import Edge, EdgeGraph, Wiring
from headscope.edges.faithfulness import chance, edges_leaving
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from tests.edges.helpers import fresh, last_difference, pair


@cache
def case_of(name: str) -> Case:
    return make_case(name, {"noise_heads": 1}, batch=6)


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(fresh(family))


@cache
def found_in(name: str, ablation: str = "patch", order: str = "later first") -> hs.edges.Circuit:
    case, metric = case_of(name), hs.metrics.kl_divergence
    return hs.edges.acdc(case.made.model, case.probe, metric, 0.05, ablation=ablation, order=order)


INDUCTION = {
    ("embed", "L0H0", "value"), ("L0H0", "L1H0", "key"), ("embed", "L1H0", "query"),
    ("embed", "L1H0", "value"), ("L1H0", "logits", "output"),
}  # fmt: skip


@pytest.mark.parametrize("order", ["later first", "earlier first"])
def test_the_circuit_of_an_induction_pair_is_found_but_for_positions(order: str) -> None:
    # Positions are equal in both texts of a pair, so their edges change nothing when patched.
    found = found_in("induction", order=order)
    assert set(map(tuple, found.edges)) == INDUCTION
    assert found.heads == (HeadIndex(0, 0), HeadIndex(1, 0))
    assert found.faithfulness == pytest.approx(1.0, abs=1e-3)
    assert found.order == order


def test_zero_ablation_sees_positions_too() -> None:
    case, found = case_of("induction"), found_in("induction", "zero")
    assert {(edge.source, edge.target, edge.slot) for edge in case.made.truth.edges} <= set(
        map(tuple, found.edges)
    )


def test_a_noise_head_is_in_no_circuit_and_unused_nodes_are_not_tried() -> None:
    found = found_in("bystanders")
    used = {str(head) for head in case_of("bystanders").made.truth.used}
    assert {str(head) for head in found.heads} == used
    into_noise = [at for at, edge in enumerate(found.wiring.edges) if edge.target == "L1H2"]
    assert np.isnan(found.changes[into_noise]).all()


def slow_acdc(case: Case, threshold: float) -> set[Edge]:
    """The loop of the paper, each circuit run by the public function."""
    model, probe, metric = case.made.model, case.probe, hs.metrics.kl_divergence

    def value(edges: set[Edge]) -> float:
        return hs.edges.run_circuit(model, probe, metric, edges).value

    wiring = found_in("previous").wiring
    kept, now = set(wiring.edges), value(set(wiring.edges))
    for target, slot in sorted(wiring.targets, key=lambda t: _rank(wiring, t), reverse=True):
        edges = [edge for edge in wiring.edges if (edge.target, edge.slot) == (target, slot)]
        if target != "logits" and not any(edge.source == target for edge in kept):
            kept -= set(edges)
            continue
        for edge in reversed(edges):
            after = value(kept - {edge})
            if abs(after - now) < threshold:
                kept, now = kept - {edge}, after
    return kept


def _rank(wiring: Wiring, target: tuple[str, str]) -> tuple[int, int]:
    names = [*wiring.sources, "logits"]
    slots = ["query", "key", "value"]
    return names.index(target[0]), slots.index(target[1]) if target[1] in slots else 0


def test_it_is_the_loop_of_the_paper() -> None:
    assert set(found_in("previous").edges) == slow_acdc(case_of("previous"), 0.05)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_edges_are_the_model_and_none_are_the_corrupt_run(family: str) -> None:
    model, probe = model_of(family), pair()
    every = hs.edges.attribute(model, probe, last_difference).edges
    whole = hs.edges.run_circuit(model, probe, last_difference, every)
    nothing = hs.edges.run_circuit(model, probe, last_difference, [])
    clean = last_difference(model.forward(probe.tokens), probe).mean()
    assert whole.value == pytest.approx(float(clean), abs=1e-5)
    assert whole.faithfulness == pytest.approx(1.0)
    assert nothing.faithfulness == 0.0
    assert nothing.jaccard(nothing) == 1.0
    assert whole.jaccard(nothing) == 0.0


def test_grown_edges_all_lead_to_the_output() -> None:
    graph = hs.edges.attribute(model_of("llama"), pair(), last_difference)
    for count in (1, 7, 40):
        chosen = hs.edges.grown(graph, count)
        assert len(set(chosen)) == count
        inside = {"logits"}
        for edge in chosen:
            assert edge.target in inside
            inside.add(edge.source)
    # The next one is the largest of those that could join.
    able = [edge for edge in graph.edges if edge.target in inside and edge not in chosen]
    largest = max(able, key=lambda edge: abs(graph.scores[edge]))
    assert hs.edges.grown(graph, 41)[-1] == largest


def test_a_complete_circuit_has_no_gap_and_one_with_a_missing_twin_has() -> None:
    case, metric = case_of("redundant induction"), hs.metrics.answer_log_prob
    model, probe = case.made.model, case.probe
    truth = [(edge.source, edge.target, edge.slot) for edge in case.made.truth.edges]
    whole = hs.edges.run_circuit(model, probe, metric, truth)
    assert hs.edges.completeness(model, probe, metric, whole, draws=4).gap.max() < 0.05
    twin = str(sorted(case.made.truth.redundant)[1])
    half = [edge for edge in truth if twin not in edge[:2]]
    lacking = hs.edges.run_circuit(model, probe, metric, half)
    gaps = hs.edges.completeness(model, probe, metric, lacking, draws=0)
    other = sorted(case.made.truth.redundant)[0]
    assert gaps.gap[gaps.subsets.index((other,))] > 0.5
    assert "completeness" in repr(gaps)


def test_heads_that_do_nothing_are_not_minimal() -> None:
    case, metric = case_of("bystanders"), hs.metrics.answer_log_prob
    every = found_in("bystanders").wiring.edges
    whole = hs.edges.run_circuit(case.made.model, case.probe, metric, every)
    found = hs.edges.minimality(case.made.model, case.probe, metric, whole, draws=1)
    for head, most in found.items():
        assert (most > 0.5) == (head in case.made.truth.used), (head, most)


@pytest.mark.parametrize(("count", "total"), [(1, 5), (2, 5), (3, 7)])
def test_chance_overlap_is_that_of_all_pairs_of_sets(count: int, total: int) -> None:
    sets = [set(one) for one in itertools.combinations(range(total), count)]
    overlaps = [len(a & b) / len(a | b) for a in sets for b in sets]
    assert chance(count, total) == pytest.approx(np.mean(overlaps))


def graph_of(values: np.ndarray, clusters: tuple[int, ...] | None = None) -> EdgeGraph:
    wiring = Wiring(1, (False,))
    return EdgeGraph(wiring, "eap", "zero", values[: len(wiring)], clusters=clusters)


def test_edges_that_every_prompt_agrees_on_are_stable_and_noise_is_not() -> None:
    size = len(Wiring(1, (False,)))
    agreed = np.arange(size)[:, None] + np.zeros((size, 120))
    found = hs.edges.stability(graph_of(agreed), 3)
    assert found.jaccard == 1.0
    assert found.verdict == "stable"
    noise = np.random.default_rng(0).normal(size=(size, 120))
    unsure = hs.edges.stability(graph_of(noise), 3)
    assert unsure.verdict == "unstable"
    assert "unstable" in str(unsure)
    few = hs.edges.stability(graph_of(agreed[:, :20]), 3)
    assert few.verdict == "not known: 20 prompts, and it takes 100"
    clusters = tuple(np.repeat(range(12), 10).tolist())
    assert hs.edges.stability(graph_of(noise, clusters), 3).prompts == 12


def test_heads_leave_all_their_edges() -> None:
    wiring = Wiring(2, (False, False))
    out = edges_leaving(wiring, [HeadIndex(0, 1)])
    assert {wiring.edges[at].source for at in np.nonzero(out)[0]} == {"L0H1"}
    assert sum(edge.source == "L0H1" for edge in wiring.edges) == out.sum()


def test_files_of_other_tools_are_read_and_written(tmp_path: Path) -> None:
    graph = hs.edges.attribute(model_of("gpt2"), pair(), last_difference)
    kept, file = graph.chosen(12), tmp_path / "circuit.json"
    hs.edges.write_eap_json(file, graph, kept, d_model=32)
    text = json.loads(file.read_text())
    heads = graph.wiring.n_heads
    assert text["cfg"] == {
        "n_layers": 2, "n_heads": heads, "parallel_attn_mlp": False, "d_model": 32,
    }  # fmt: skip
    assert text["nodes"].keys() >= {"input", "a0.h0", "m1", "logits"}
    assert len(text["edges"]) == len(graph.wiring)
    entry = text["edges"]["a0.h1->a1.h0<k>"]
    assert entry["score"] == pytest.approx(graph.scores["L0H1", "L1H0", "k"])
    again, inside = hs.edges.read_eap_json(file)
    np.testing.assert_array_equal(inside, kept)
    np.testing.assert_allclose(again.mean, graph.mean, rtol=1e-6)
    assert again.wiring == graph.wiring


def test_circuits_are_kept_on_disk(tmp_path: Path) -> None:
    found = found_in("induction")
    found.save(tmp_path / "c.safetensors")
    again = hs.edges.Circuit.load(tmp_path / "c.safetensors")
    assert again.edges == found.edges
    assert again.faithfulness == found.faithfulness
    np.testing.assert_array_equal(again.changes, found.changes)
    assert repr(again) == repr(found)


def test_mistakes_are_said(tmp_path: Path) -> None:
    case, metric = case_of("previous"), hs.metrics.kl_divergence
    model, probe = case.made.model, case.probe
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="threshold="):
            hs.edges.acdc(model, probe, metric, bad)
    with pytest.raises(InputError, match="order"):
        hs.edges.acdc(model, probe, metric, 0.1, order="later")
    with pytest.raises(InputError, match="there is no edge"):
        hs.edges.run_circuit(model, probe, metric, [("L1H0", "L0H0", "key")])
    graph = graph_of(np.zeros((8, 3)))
    with pytest.raises(InputError, match="count=0"):
        hs.edges.grown(graph, 0)
    with pytest.raises(InputError, match="count=900"):
        hs.edges.stability(graph, 900)
    with pytest.raises(InputError, match="single example"):
        hs.edges.stability(graph_of(np.zeros((8, 1))), 2)
    empty = hs.edges.run_circuit(model, probe, metric, [])
    with pytest.raises(InputError, match="no heads"):
        hs.edges.completeness(model, probe, metric, empty)
    other = case_of("induction").made.model
    with pytest.raises(InputError, match="another model"):
        hs.edges.minimality(other, probe, metric, empty)
    with pytest.raises(InputError, match="cannot be read"):
        hs.edges.read_eap_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"cfg": {"n_layers": 1, "n_heads": 1}, "edges": {}}')
    with pytest.raises(InputError, match="not a circuit of EAP-IG"):
        hs.edges.read_eap_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match="kept has shape"):
        hs.edges.write_eap_json(tmp_path / "x.json", graph, np.ones(3, bool))
    mixed = Wiring(1, (False, True))
    uneven = EdgeGraph(mixed, "eap", "zero", np.zeros((len(mixed), 1)))
    with pytest.raises(InputError, match="cannot represent"):
        hs.edges.write_eap_json(tmp_path / "x.json", uneven)
    assert torch.isfinite(torch.tensor(empty.value))
