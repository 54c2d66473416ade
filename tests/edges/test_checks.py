"""What every circuit is shown with: stability, a rival, controls; and graphs that are resumed."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.edges import Circuit, EdgeGraph, Wiring
from headscope.edges.faithfulness import grown_from, resampled
from headscope.metrics import logit_difference
from headscope.models.protocol import HeadModel
from tests.edges.helpers import fresh, pair


@cache
def model() -> HeadModel:
    return hs.load(fresh("gpt2"))


@cache
def graph() -> EdgeGraph:
    return hs.edges.attribute(model(), pair(), logit_difference)


@cache
def circuit() -> Circuit:
    return hs.edges.circuit(model(), pair(), logit_difference, graph(), 30)


def slowly_grown(scores: EdgeGraph, count: int, *, down: bool) -> list[int]:
    """One edge after another, over all edges each time."""
    inside, chosen = {"logits" if down else "embed"}, []
    for _ in range(count):
        for at in scores.rank().tolist():
            edge = scores.edges[at]
            near, far = (edge.target, edge.source) if down else (edge.source, edge.target)
            if at not in chosen and near in inside:
                chosen.append(at)
                inside.add(far)
                break
    return chosen


@pytest.mark.parametrize("start", ["logits", "embed"])
def test_growing_takes_the_best_edge_that_hangs_on(start: str) -> None:
    found = grown_from(graph().wiring, graph().mean, 40, start)
    assert found.tolist() == slowly_grown(graph(), 40, down=start == "logits")


def test_every_circuit_says_how_it_must_be_read() -> None:
    checks = circuit().checks
    assert checks is not None
    shown = str(circuit())
    for word in ("stability", "rival", "positive control", "null position", "matched heads"):
        assert word in shown, word
    assert checks.verdict == "not known: 4 prompts, and it takes 100"
    assert checks.positive == pytest.approx(circuit().full - circuit().empty, abs=1e-5)
    assert len(checks.matched) == 3
    assert 0 <= checks.rival <= 1


def test_controls_come_with_given_edges_too() -> None:
    found = hs.edges.run_circuit(model(), pair(), logit_difference, circuit().edges)
    assert found.checks is not None
    assert circuit().checks is not None
    np.testing.assert_array_equal(found.checks.matched, circuit().checks.matched)
    assert found.checks.verdict == "not known: no scores per prompt"
    assert np.isnan(found.checks.rival)


def test_nothing_changes_before_the_texts_differ() -> None:
    """The texts are the same for two tokens; in a model that looks ahead there is no such place."""
    assert circuit().checks is not None
    assert circuit().checks.null < 1e-5
    mean = hs.edges.run_circuit(model(), pair(), logit_difference, circuit().edges, ablation="zero")
    assert mean.checks is not None
    assert np.isnan(mean.checks.null)
    differing = pair()
    assert differing.corrupt is not None
    tokens = differing.corrupt.tokens.clone()
    tokens[:, 0] = (differing.tokens[:, 0] + 1) % 50
    other = replace(differing, corrupt=replace(differing.corrupt, tokens=tokens))
    early = hs.edges.run_circuit(model(), other, logit_difference, circuit().edges)
    assert early.checks is not None
    assert np.isnan(early.checks.null)


def test_matched_heads_keep_layers_and_slots() -> None:
    """A circuit of all heads of its layers is itself under any exchange of them."""
    wiring = graph().wiring
    edges = [edge for edge in wiring.edges if edge.source == "embed" or edge.slot == "output"]
    found = hs.edges.run_circuit(model(), pair(), logit_difference, edges)
    assert found.checks is not None
    np.testing.assert_allclose(found.checks.matched, found.faithfulness, atol=1e-5)


def scores_of(columns: np.ndarray) -> EdgeGraph:
    """A graph with given scores of the first edges."""
    wiring = Wiring(2, (False, False))
    values = np.zeros((len(wiring), columns.shape[1]))
    values[: len(columns)] = columns
    return EdgeGraph(wiring, "eap", "patch", values)


def test_prompts_that_agree_are_stable_and_others_are_not() -> None:
    drawn = np.random.default_rng(0)
    same = scores_of(np.tile(np.array([[4.0], [3.0], [2.0]]), 120))
    assert hs.edges.stability(same, 3).jaccard == 1.0
    assert hs.edges.stability(same, 3).verdict == "stable"
    noise = scores_of(drawn.standard_normal((20, 120)))
    found = hs.edges.stability(noise, 3)
    assert found.verdict == "unstable"
    assert "unstable" in str(found)
    assert found.chance < found.jaccard < 0.8


def test_resampling_is_the_mean_over_drawn_examples() -> None:
    """Against a loop that copies the drawn columns, with clusters and missing values."""
    values = np.random.default_rng(1).standard_normal((15, 9))
    values[:, 4] = np.nan
    clusters = (0, 0, 1, 1, 2, 3, 3, 3, 4)
    made = replace(scores_of(values), clusters=clusters)
    found = resampled(made, 4, lambda mean: _best(mean, 4), draws=20, seed=7)
    drawn, overlaps = np.random.default_rng(7), []
    for _ in range(20):
        chosen = drawn.integers(0, 5, 5)
        columns = [at for group in chosen for at, one in enumerate(clusters) if one == group]
        mean = np.nanmean(made.per_example[:, columns].astype(float), 1)
        a, b = _best(np.nan_to_num(made.mean), 4), _best(np.nan_to_num(mean), 4)
        overlaps.append((a & b).sum() / (a | b).sum())
    assert found.jaccard == pytest.approx(np.mean(overlaps))
    assert found.prompts == 5


def _best(mean: np.ndarray, count: int) -> np.ndarray:
    chosen = np.zeros(len(mean), bool)
    chosen[np.argsort(-np.abs(mean), kind="stable")[:count]] = True
    return chosen


def test_finished_batches_are_taken_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": 2, "resume": tmp_path, "progress": False}
    whole = hs.edges.attribute(model(), pair(), logit_difference, **options)
    np.testing.assert_allclose(whole.mean, graph().mean, atol=1e-5)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    kept[1].write_bytes(kept[1].read_bytes()[:50])  # cut off
    done: list[int] = []
    attribution = sys.modules["headscope.edges.attribute"]
    scored = attribution._scores
    monkeypatch.setattr(attribution, "_scores", lambda *given: (done.append(1), scored(*given))[1])
    again = hs.edges.attribute(model(), pair(), logit_difference, **options)
    np.testing.assert_array_equal(again.per_example, whole.per_example)
    assert len(done) == 1
    other = hs.edges.attribute(model(), pair(), logit_difference, "eap_ig", 2, **options)
    assert len(done) == 3
    assert not np.allclose(other.mean, whole.mean)


def test_results_go_to_a_file_and_back(tmp_path: Path) -> None:
    circuit().save(tmp_path / "circuit.safetensors")
    back = Circuit.load(tmp_path / "circuit.safetensors")
    assert back.checks is not None
    assert circuit().checks is not None
    assert back.checks.rows() == circuit().checks.rows()
    assert torch.equal(torch.from_numpy(back.kept), torch.from_numpy(circuit().kept))
