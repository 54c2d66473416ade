"""Curves of circuits: their ends, their areas by hand, their controls, and what is refused."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.edges import EdgeGraph, Faithfulness, Wiring
from headscope.edges.faithfulness import SIZES
from headscope.errors import InputError
from headscope.metrics import answer_log_prob, logit_difference
from headscope.models.protocol import HeadModel
from headscope.probes import Probe
from tests.edges.helpers import fresh, last_difference, pair
from tests.edges.plain import Plain


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(fresh(family))


def curve(value: np.ndarray, control: np.ndarray | None = None) -> Faithfulness:
    """A curve over MIB's sizes of a model whose metric is 3 whole and 1 with nothing."""
    sizes = np.array(SIZES)
    random = np.zeros((1, 10)) if control is None else control
    counts = (sizes * 1000).astype(int)
    return Faithfulness(sizes, counts, 1 + 2 * value, 1 + 2 * random, full=3.0, empty=1.0)


def test_areas_are_those_of_the_benchmark() -> None:
    whole = curve(np.ones(10))
    assert (whole.cpr, whole.cmd) == (pytest.approx(0.999), 0.0)
    assert whole.log_area == pytest.approx(1.0)
    late = curve(np.array([0.0] * 9 + [1.0]))  # nothing until the last edges: as random ones do
    assert late.cpr == pytest.approx(0.25)
    assert late.cmd == pytest.approx(0.499 + 0.25)
    assert late.log_area == pytest.approx(0.5 * np.log10(2) / 3)
    over = curve(np.array([0.0] * 8 + [3.0, 1.0]))
    assert over.value_area == pytest.approx(0.999 + 2 * over.cpr)
    assert over.cpr == pytest.approx(0.3 * 3 / 2 + 0.5 * 2)
    assert over.cpr_capped == pytest.approx(0.3 / 2 + 0.5)
    assert over.cmd == pytest.approx(0.199 + 0.3 * 1.5 + 0.5)


def test_random_areas_are_means_over_draws() -> None:
    found = curve(np.ones(10), np.stack([np.ones(10), np.zeros(10)]))
    assert found.random_cpr == pytest.approx(0.999 / 2)
    assert found.random_cmd == pytest.approx(0.999 / 2)
    assert found.random_log_area == pytest.approx(0.5)


def test_no_faithfulness_where_taking_all_out_changes_nothing() -> None:
    flat = replace(curve(np.ones(10)), empty=3.0)
    assert np.isnan(flat.faithfulness).all()
    assert np.isnan(flat.cpr)


@pytest.mark.parametrize(("family", "ablation"), [("gpt2", "patch"), ("llama", "mean")])
def test_ends_are_the_whole_model_and_the_corrupt_one(family: str, ablation: str) -> None:
    model, probe = model_of(family), pair("right")
    graph = hs.edges.attribute(model, probe, logit_difference, ablation=ablation)
    found = hs.edges.faithfulness(
        model, probe, logit_difference, graph, [0.001, 0.5, 1.0], controls=2
    )
    assert found.counts.tolist() == [0, 55, 110]
    assert (found.faithfulness[0], found.faithfulness[-1]) == (0.0, 1.0)
    assert (found.random[:, 0] == 0).all()
    assert (found.random[:, -1] == 1).all()
    plain = last_difference(model.run(probe), probe).mean()
    assert found.full == pytest.approx(float(plain), abs=1e-5)
    if ablation == "patch":
        assert probe.corrupt is not None
        other = last_difference(model.run(probe.corrupt), probe).mean()
        assert found.empty == pytest.approx(float(other), abs=1e-5)


def test_the_curve_is_the_model_written_out() -> None:
    model, probe = model_of("llama"), pair()
    assert probe.corrupt is not None
    graph = hs.edges.attribute(model, probe, logit_difference)
    found = hs.edges.faithfulness(
        model, probe, logit_difference, graph, sizes=[0.2, 0.8], controls=1
    )
    plain = Plain(model.module, probe.tokens)
    corrupt = Plain(model.module, probe.corrupt.tokens).run((), {})[1]
    for count, value in zip((22, 88), found.value, strict=True):
        kept = {edge for edge, _ in graph.top(count)}
        out = [edge for edge in graph.edges if edge not in kept]
        expected = float(last_difference(plain.run(out, corrupt)[0], probe).mean())
        assert value == pytest.approx(expected, abs=3e-5)


def test_batches_change_nothing_and_seeds_draw_other_edges() -> None:
    model, probe = model_of("gpt2"), pair()
    graph = hs.edges.attribute(model, probe, logit_difference)
    one, two, other = (
        hs.edges.faithfulness(model, probe, logit_difference, graph, [0.5, 1.0], **options)
        for options in ({"seed": 1}, {"seed": 1, "batch_size": 3}, {"seed": 2})
    )
    np.testing.assert_allclose(one.value, two.value, atol=1e-5)
    np.testing.assert_allclose(one.control, two.control, atol=1e-5)
    assert np.abs(one.control[:, 0] - other.control[:, 0]).max() > 1e-4


def test_true_edges_of_a_program_are_faithful_and_random_ones_are_not() -> None:
    made = hs.compiled.induction(rotation_seed=1, noise_heads=1)
    probe = made.probe(batch=8)
    answers = torch.from_numpy(made.interpret(probe.tokens.numpy()).output.argmax(-1))
    probe = replace(probe, targets=answers)
    graph = hs.edges.attribute(made.model, probe, answer_log_prob, "exact")
    # The seven edges of the program, and that by which keys of an empty selection read the start.
    assert {tuple(edge) for edge, _ in graph.top(8)} > {
        (edge.source, edge.target, edge.slot) for edge in made.truth.edges
    }
    found = hs.edges.faithfulness(made.model, probe, answer_log_prob, graph, [0.18, 0.3, 1.0])
    assert found.counts[0] == 8
    assert found.faithfulness[0] == pytest.approx(1.0, abs=1e-3)
    assert found.random[:, 0].max() < 0.6
    assert found.cpr > found.random_cpr + 0.2
    assert found.cmd < found.random_cmd - 0.2


def test_a_curve_is_kept_whole(tmp_path: Path) -> None:
    found = curve(np.linspace(0, 1, 10))
    found.save(tmp_path / "curve.safetensors")
    again = Faithfulness.load(tmp_path / "curve.safetensors")
    assert again.cpr == found.cpr
    assert list(again.to_pandas().columns) == ["size", "edges", "value", "faithfulness", "random"]
    assert "CPR" in repr(again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [0.0, 1.0]}, "above 0 and up to 1"),
        ({"sizes": [0.5, 10.0]}, "above 0 and up to 1"),
        ({"sizes": [0.5]}, "two shares"),
        ({"sizes": [0.5, 0.1]}, "must be increasing"),
        ({"sizes": [0.5, float("nan")]}, "nan is not a number"),
        ({"controls": 0}, "1 or more"),
        ({"ablation": "none"}, "unknown ablation"),
        ({"batch_size": 0}, "give 1 or more"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(options: dict, message: str) -> None:
    model, probe = model_of("gpt2"), pair()
    with pytest.raises(InputError, match=message):
        hs.edges.faithfulness(model, probe, logit_difference, _graph(model), **options)


def test_graphs_of_others_are_refused() -> None:
    model, probe = model_of("gpt2"), pair()
    graph = hs.edges.attribute(model, probe, logit_difference)
    with pytest.raises(InputError, match="this graph is of another model"):
        hs.edges.faithfulness(model_of("llama"), probe, logit_difference, graph)
    larger = EdgeGraph(Wiring(4, (False,) * 3), "eap", "patch", np.zeros((262, 1)))
    with pytest.raises(InputError, match="this graph is of another model"):
        hs.edges.faithfulness(model, probe, logit_difference, larger)
    kind: Probe = replace(probe, name="ioi")
    with pytest.raises(InputError, match="made on a probe of kind 'tokens', and this one is 'ioi'"):
        hs.edges.faithfulness(model, kind, logit_difference, graph)


def _graph(model: HeadModel) -> EdgeGraph:
    wiring = Wiring(model.shape.n_heads, (False,) * model.shape.n_layers)
    return EdgeGraph(wiring, "eap", "patch", np.ones((len(wiring), 2)))
