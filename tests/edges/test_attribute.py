"""Edge scores against a model written out, limits in which they must agree, and known programs."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import headscope as hs
from headscope.edges import Edge, EdgeGraph, Wiring
from headscope.edges.attribute import HeadReads, SlotGradient, gradient_scores
from headscope.edges.faithfulness import circuit_value
from headscope.edges.written import EdgeMeasurement
from headscope.errors import InputError, UnsupportedModelError
from headscope.metrics import logit_difference
from headscope.models.protocol import HeadModel
from headscope.models.taps import Tap
from headscope.probes import Probe
from tests.edges.helpers import fresh, last_difference, pair, swapped
from tests.edges.plain import Plain
from tests.models import families

# Grouped heads, parallel blocks, multipliers, experts.
FAMILIES = ["gpt2", "llama", "gpt_neox", "granite", "mixtral"]


@cache
def model_of(family: str) -> HeadModel:
    return hs.load(fresh(family))


def linear_net() -> GPT2LMHeadModel:
    """A GPT-2 whose norms are multiples of one constant, patterns flat, and MLPs linear."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=families.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32,
        layer_norm_epsilon=1e10, activation_function="linear", initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                weight.fill_(1e5)
            if "c_attn.weight" in name:
                weight[:, :64] = 0.0
    return module


@pytest.mark.parametrize(
    ("layers", "heads", "edges"), [(12, 12, 32_491), (2, 1, 23), (1, 2, 13), (2, 4, 110)]
)
def test_edges_are_counted(layers: int, heads: int, edges: int) -> None:
    wiring = Wiring(heads, (False,) * layers)
    by_hand = 3 * heads * sum(1 + n * (heads + 1) for n in range(layers))
    by_hand += sum(1 + n * (heads + 1) + heads for n in range(layers)) + 1 + layers * (heads + 1)
    assert len(wiring) == len(wiring.edges) == len(set(wiring.edges)) == by_hand
    assert len(wiring) == edges


def test_who_reads_whom() -> None:
    wiring = Wiring(1, (False, False))
    assert {e.source for e in wiring.edges if e.target == "L1H0"} == {"embed", "L0H0", "MLP0"}
    assert ("L1H0", "MLP1", "mlp") in wiring.edges
    assert ("L1H0", "MLP1", "mlp") not in Wiring(1, (False, True)).edges
    assert {e.source for e in wiring.edges if e.slot == "output"} == set(wiring.sources)


@pytest.mark.parametrize(("family", "padding"), [("gpt2", "none"), ("llama", "right")])
@pytest.mark.parametrize("ablation", ["patch", "zero", "mean"])
def test_exact_is_the_model_written_out(family: str, padding: str, ablation: str) -> None:
    model, probe = model_of(family), pair(padding)
    plain = Plain(model.module, probe.tokens, probe.real)
    clean, written = plain.run((), {})
    corrupt = _corrupt(plain, probe, written, ablation)
    graph = hs.edges.attribute(model, probe, logit_difference, "exact", ablation=ablation)
    before = last_difference(clean, probe)
    chosen = np.random.default_rng(0).choice(len(graph.edges), 12, replace=False)
    for at in chosen.tolist():
        after = last_difference(plain.run([graph.edges[at]], corrupt)[0], probe)
        np.testing.assert_allclose(graph.per_example[at], after - before, atol=2e-5)
    assert np.abs(graph.per_example[chosen]).max() > 0.1


@pytest.mark.parametrize(("family", "padding"), [("gpt2", "right"), ("llama", "none")])
def test_a_circuit_is_the_model_written_out(family: str, padding: str) -> None:
    model, probe = model_of(family), pair(padding)
    plain = Plain(model.module, probe.tokens, probe.real)
    corrupt = _corrupt(plain, probe, {}, "patch")
    study = EdgeMeasurement.of(model, probe, logit_difference, "patch")
    batch = next(study.batches())
    for seed, share in enumerate((0.3, 0.7, 0.95)):
        kept = np.random.default_rng(seed).random(len(study.wiring)) < share
        out = [edge for edge, keep in zip(study.wiring.edges, kept, strict=True) if not keep]
        expected = last_difference(plain.run(out, corrupt)[0], probe)
        found = circuit_value(batch, study.wiring.kept(kept))
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


def _corrupt(plain: Plain, probe: Probe, clean: dict, ablation: str) -> dict:
    if ablation == "zero":
        return {name: torch.zeros_like(value) for name, value in clean.items()}
    if ablation == "mean":
        return {name: value[probe.real].mean(0).expand_as(value) for name, value in clean.items()}
    assert probe.corrupt is not None
    return Plain(plain.module, probe.corrupt.tokens, probe.real).run((), {})[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_edge_out_by_circuit_and_by_exact(family: str) -> None:
    model, probe = model_of(family), pair()
    graph = hs.edges.attribute(model, probe, logit_difference, "exact")
    study = EdgeMeasurement.of(model, probe, logit_difference)
    batch = next(study.batches())
    for at in np.random.default_rng(1).choice(len(graph.edges), 6, replace=False).tolist():
        kept = np.ones(len(graph.edges), bool)
        kept[at] = False
        change = circuit_value(batch, study.wiring.kept(kept)) - batch.clean_value()
        np.testing.assert_allclose(graph.per_example[at], change, atol=3e-5)


@pytest.mark.parametrize(
    ("family", "step"), [("gpt2", 5e-5), ("llama", 1e-5), ("gpt_neox", 5e-5), ("granite", 1e-5)]
)
def test_a_small_corruption_is_estimated_exactly(family: str, step: float) -> None:
    """As the corrupt text comes near the clean one, the gradient is the effect."""
    module, probe = fresh(family), pair()
    assert probe.corrupt is not None
    probe = replace(probe, corrupt=replace(probe.corrupt, tokens=probe.tokens % 29 + 31))
    table = module.get_input_embeddings().weight
    with torch.no_grad():  # tokens of the upper half are almost their partners of the lower half
        near = table[:60] + step * torch.randn(60, 32, generator=torch.Generator().manual_seed(4))
        lower = probe.tokens % 29
        table[31:60] = near[:29]
        for weight in module.parameters():  # attention that is less peaky than elsewhere
            if weight.ndim > 1 and weight is not table:
                weight *= 0.4
    if module.get_output_embeddings().weight is table:
        module.get_output_embeddings().weight = torch.nn.Parameter(table.detach().clone())
    probe = replace(probe, tokens=lower, structure=lower)
    model = hs.load(module.double())
    exact, estimate, integrated = (
        hs.edges.attribute(model, probe, logit_difference, method)
        for method in ("exact", "eap", "eap_ig")
    )
    size = np.abs(exact.mean).max()
    assert size > step / 3
    np.testing.assert_allclose(estimate.mean, exact.mean, atol=0.04 * size)
    np.testing.assert_allclose(integrated.mean, exact.mean, atol=0.04 * size)
    assert np.corrcoef(estimate.mean, exact.mean)[0, 1] > 0.999


@pytest.mark.parametrize("family", [*FAMILIES, "gptj"])
def test_edges_that_leave_a_node_sum_to_its_attribution(family: str) -> None:
    model, probe = model_of(family), pair()
    assert probe.corrupt is not None
    graph = hs.edges.attribute(model, probe, logit_difference)
    sites = [Tap("embed"), Tap("resid_post", 1)]
    sites += [Tap(site, n) for n in range(2) for site in ("z", "mlp_out")]
    here, there = {}, {}
    with torch.enable_grad():
        logits = model.run(
            probe, reads={t: lambda v: here.update({v.tap: v.value}) for t in sites}, grad=True
        )
        total = last_difference(logits, probe).sum()
        slopes = dict(
            zip(sites, torch.autograd.grad(total, [here[tap] for tap in sites]), strict=True)
        )
    model.run(
        probe.corrupt, reads={t: lambda v: there.update({v.tap: v.value.clone()}) for t in sites}
    )
    share = {tap: ((there[tap] - here[tap]) * slopes[tap]).detach().float() for tap in sites}
    leaving = np.nansum(graph.matrix, 0)
    heads = np.stack([share[Tap("z", n)].sum((1, 3)).mean(0) for n in range(2)])
    size = float(np.abs(heads).max())
    np.testing.assert_allclose(graph.head_scores, heads, atol=1e-5 * size)
    assert leaving[0] == pytest.approx(float(share[Tap("embed")].sum() / 4), abs=2e-5 * size)
    mlps = [float(share[Tap("mlp_out", n)].sum() / 4) for n in range(2)]
    at = [graph.wiring.heads_of(n).stop for n in range(2)]
    np.testing.assert_allclose(leaving[at], mlps, atol=2e-5 * size)
    into_output = np.nansum(graph.matrix[-1])
    assert into_output == pytest.approx(float(share[sites[1]].sum() / 4), abs=2e-5 * size)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "mistral"])
def test_weights_give_what_the_backward_pass_gives(
    family: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every head of every slot, where a product stands for the model's own backward pass."""
    model, probe = model_of(family), pair(padding)
    study = EdgeMeasurement.of(model, probe, logit_difference)
    (batch,) = study.batches()
    fast = gradient_scores(batch, "eap", 1)
    by_weights = {site for (site, _), agrees in study.by_weights.items() if agrees}
    assert by_weights == {"query", "key", "value"}
    assert all(study.by_weights.values())
    monkeypatch.setattr(SlotGradient, "through_weights", lambda *_: None)
    slow = gradient_scores(batch, "eap", 1)
    torch.testing.assert_close(fast, slow, atol=2e-5 * float(slow.abs().max()), rtol=0)


def test_weights_that_do_not_agree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = model_of("llama"), pair()
    study = EdgeMeasurement.of(model, probe, logit_difference)
    (batch,) = study.batches()
    right = gradient_scores(batch, "eap", 1)
    other = EdgeMeasurement.of(model, probe, logit_difference)
    (again,) = other.batches()
    own = HeadReads.at_stream
    monkeypatch.setattr(HeadReads, "at_stream", lambda *given: 1.01 * own(*given))
    found = gradient_scores(again, "eap", 1)
    assert not any(other.by_weights.values())
    torch.testing.assert_close(found, right, atol=2e-5 * float(right.abs().max()), rtol=0)


def test_on_a_linear_net_estimates_are_exact_and_swapping_flips() -> None:
    model, probe = hs.load(linear_net()), pair()
    graphs = [
        hs.edges.attribute(model, probe, logit_difference, method)
        for method in ("exact", "eap", "eap_ig")
    ]
    size = np.abs(graphs[0].mean).max()
    assert size > 0.01
    for graph in graphs[1:]:
        np.testing.assert_allclose(graph.per_example, graphs[0].per_example, atol=1e-4 * size)
    back = hs.edges.attribute(model, swapped(probe), logit_difference)
    np.testing.assert_allclose(back.per_example, -graphs[1].per_example, atol=1e-4 * size)


def test_first_step_of_integration_is_the_corrupt_run() -> None:
    model, probe = model_of("llama"), pair()
    once = hs.edges.attribute(model, probe, logit_difference, "eap_ig", 1)
    back = hs.edges.attribute(model, swapped(probe), logit_difference)
    np.testing.assert_allclose(once.mean, -back.mean, atol=1e-5 * np.abs(back.mean).max())


@pytest.mark.parametrize("method", ["eap", "eap_ig", "exact"])
def test_nothing_corrupted_is_no_effect(method: str) -> None:
    probe = pair()
    same = replace(probe, corrupt=replace(probe, corrupt=None))
    graph = hs.edges.attribute(model_of("gpt2"), same, logit_difference, method)
    assert np.abs(graph.mean).max() < 1e-5


@pytest.mark.parametrize("method", ["eap", "exact"])
@pytest.mark.parametrize("ablation", ["patch", "mean"])
def test_batches_and_padding_change_nothing(method: str, ablation: str) -> None:
    model, probe = model_of("llama"), pair("both")
    whole = hs.edges.attribute(model, probe, logit_difference, method, ablation=ablation)
    parts = hs.edges.attribute(
        model, probe, logit_difference, method, ablation=ablation, batch_size=3
    )
    size = np.abs(whole.mean).max()
    np.testing.assert_allclose(whole.per_example, parts.per_example, atol=1e-4 * size)
    if ablation == "patch":
        cut = slice(0, 9)  # the third text ends after eight tokens
        assert probe.corrupt is not None
        alone = probe.examples(slice(2, 3))
        other = replace(_first(probe.corrupt.examples(slice(2, 3)), cut), corrupt=None)
        short = replace(_first(alone, cut), corrupt=other)
        found = hs.edges.attribute(model, short, logit_difference, method)
        np.testing.assert_allclose(found.mean, whole.per_example[:, 2], atol=1e-4 * size)


def _first(probe: Probe, cut: slice) -> Probe:
    names = ("tokens", "real", "structure", "targets")
    parts = {name: getattr(probe, name)[:, cut] for name in names}
    foils = None if probe.foils is None else probe.foils[:, cut]
    return replace(probe, **parts, foils=foils, corrupt=None)


PROGRAMS = [
    ("induction", {"rotation_seed": 1}),
    ("induction", {"family": "llama", "kv_group": 2, "rotation_seed": 1}),
    ("recall", {"family": "llama", "kv_group": 2, "rotation_seed": 2}),
    ("pointer", {"rotation_seed": 1}),
    ("trigram", {"rotation_seed": 3}),
    ("successor", {}),
    ("duplicate", {"rotation_seed": 1}),
    ("redundant induction", {"rotation_seed": 2}),
]


def test_true_edges_of_compiled_programs_come_first() -> None:
    found: dict[str, list[float]] = {"exact": [], "eap_ig": [], "eap": []}
    for name, build in PROGRAMS:
        made = hs.compiled.from_library(name, noise_heads=1, **build)
        probe = made.probe(batch=4)
        answers = made.interpret(probe.tokens.numpy()).output.argmax(-1)
        probe = replace(probe, targets=torch.from_numpy(answers))
        for method, areas in found.items():
            graph = hs.edges.attribute(made.model, probe, hs.metrics.answer_log_prob, method)
            assert graph.ablation == "mean"
            areas.append(graph.auroc(made.truth.edges))
    assert np.median(found["exact"]) >= 0.95
    assert min(found["exact"]) >= 0.95
    assert np.median(found["eap_ig"]) >= 0.90
    assert np.median(found["eap"]) < np.median(found["eap_ig"])  # patterns are saturated


def test_auroc_counts_ties_against_the_truth() -> None:
    wiring = Wiring(1, (False,))
    edges = wiring.edges
    values = np.array([3.0, 1.0, -2.0, 1.0, 0.0, 0.0, 0.0, 0.0])[: len(edges)]
    graph = EdgeGraph(wiring, "eap", "zero", values[:, None])
    # True: -2 beats all but 3; 1 beats the zeros, ties with the other 1.
    others = len(edges) - 2
    expected = ((others - 1) + (others - 2)) / (2 * others)
    assert graph.auroc([edges[2], edges[1]]) == pytest.approx(expected)
    flat = EdgeGraph(wiring, "eap", "zero", np.zeros((len(edges), 1)))
    assert flat.auroc([edges[0]]) == 0.0
    for truth in ([], edges):
        with pytest.raises(InputError, match="edges that are not"):
            graph.auroc(truth)


def test_scores_are_found_by_name() -> None:
    graph = hs.edges.attribute(model_of("gpt2"), pair(), logit_difference)
    scores = graph.scores
    assert len(scores) == len(graph.edges) == 110
    assert scores["L0H1", "L1H2", "k"] == scores[Edge("L0H1", "L1H2", "key")]
    assert scores[graph.edges[7]] == graph.mean[7]
    assert graph.top(1)[0] == max(scores.items(), key=lambda one: abs(one[1]))
    np.testing.assert_array_equal(np.asarray(scores), graph.mean)
    np.testing.assert_allclose(graph.heads.mean, graph.head_scores, rtol=1e-6)
    with pytest.raises(InputError, match=r"no edge L1H2 -> L0H1\.key"):
        _ = scores["L1H2", "L0H1", "k"]
    with pytest.raises(InputError, match="unknown slot 'kay'"):
        _ = scores["L0H1", "L1H2", "kay"]


def test_a_graph_is_kept_whole(tmp_path: Path) -> None:
    probe = replace(pair(), clusters=torch.tensor([0, 0, 1, 2]))
    graph = hs.edges.attribute(model_of("llama"), probe, logit_difference, "eap_ig", 2)
    graph.save(tmp_path / "graph.parquet")
    again = EdgeGraph.load(tmp_path / "graph.parquet")
    np.testing.assert_array_equal(again.per_example, graph.per_example)
    assert (again.wiring, again.steps, again.clusters) == (graph.wiring, 2, (0, 0, 1, 2))
    assert again.provenance == graph.provenance
    assert len(again.to_json(5)["edges"]) == 5
    drawn = again.to_networkx()
    assert (drawn.number_of_nodes(), drawn.number_of_edges()) == (12, 110)
    edge, score = again.top(1)[0]
    assert drawn.edges[edge]["score"] == score
    assert again.to_networkx(3).number_of_edges() == 3
    dot = again.to_dot(2).splitlines()
    assert dot[2].startswith(f'  "{edge.source}" -> "{edge.target}" [label="{edge.slot}"')
    assert len(dot) == 5
    assert "110 edges" in repr(again)
    assert len(again.to_pandas()) == 110
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="parquet"):
        EdgeGraph.load(tmp_path / "no.parquet")
    again.to_pandas().to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="not a saved edge graph"):
        EdgeGraph.load(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"corrupt": None}, {"ablation": "patch"}, "no corrupt pair"),
        ({}, {"ablation": "median"}, "unknown ablation 'median'"),
        ({}, {"method": "eap-ig"}, "unknown method 'eap-ig'; did you mean 'eap_ig'"),
        ({}, {"method": "eap_ig", "steps": 0}, "1 or more"),
        ({}, {"batch_size": 0}, "give 1 or more"),
        ({}, {"memory": "1KB"}, "scores of 110 edges on 4 texts take 0.00176 MB"),
        ({}, {"memory": "8KB"}, "the writes of 11 nodes on one text of [0-9]+ tokens take"),
        ({}, {"metric": hs.metrics.kl_divergence}, "its gradient there is 0"),
        ({}, {"metric": hs.metrics.accuracy}, "has no gradient"),
        ({"foils": None}, {}, "this probe has no foils"),
        ({}, {"metric": logit_difference.at("end")}, "no mark 'end'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change: dict, options: dict, message: str) -> None:
    options = {"metric": logit_difference} | options
    with pytest.raises(InputError, match=message):
        hs.edges.attribute(model_of("gpt2"), replace(pair(), **change), **options)


def test_memory_cuts_batches_and_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe = model_of("llama"), pair("right")
    whole = hs.edges.attribute(model, probe, logit_difference)
    sizes: list[int] = []
    batch = EdgeMeasurement.batch

    def seen(self: EdgeMeasurement, start: int, grad: bool = False) -> object:
        sizes.append(self.size)
        return batch(self, start, grad)

    monkeypatch.setattr(EdgeMeasurement, "batch", seen)
    text = 2 * 4 * 11 * probe.length * 32
    cut = hs.edges.attribute(model, probe, logit_difference, memory=2 * text + 5)
    assert sizes == [2, 2]
    np.testing.assert_allclose(cut.per_example, whole.per_example, atol=1e-5)


def test_a_metric_that_reads_nothing_is_refused() -> None:
    """No targets at all, and none at the mark that is asked for."""
    probe = pair()
    start = torch.zeros_like(probe.real)
    start[:, 0] = True
    given = (
        (replace(probe, targets=torch.full_like(probe.targets, -1)), logit_difference),
        (replace(probe, marks={"start": start}), logit_difference.at("start")),
    )
    for texts, metric in given:
        with pytest.raises(InputError, match="has nothing to read: no position"):
            hs.edges.attribute(model_of("gpt2"), texts, metric)


def test_pairs_must_be_aligned() -> None:
    probe = pair()
    for other in (pair("right").corrupt, _first(probe, slice(0, 8))):
        with pytest.raises(InputError, match="other lengths or padding"):
            hs.edges.attribute(model_of("gpt2"), replace(probe, corrupt=other), logit_difference)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "falcon"])
def test_families_without_edges_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^edges of .*; use hs\.ablate_heads"):
        hs.edges.attribute(model_of(family), pair(), logit_difference)
