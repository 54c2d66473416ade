"""What a day of research asked of results: fast cards, exact ranks, pictures, files, norms."""

import inspect
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

import headscope as hs
from headscope import circuits
from headscope.ablation.engine import RecordedBatch
from headscope.ablation.run import KeptEffects
from headscope.base.result import Listed
from headscope.circuits.measures import Ranks
from headscope.circuits.vocabulary import Dictionary
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.lens.fitting import divergence_of_lens
from headscope.lens.linear import affordable_tokens, distance, logit_metric
from headscope.lens.logit import HeadWrites
from headscope.lens.reading import logits_of
from headscope.models.hf.model import HFModel
from headscope.models.protocol import HeadModel
from headscope.table import HeadScores, HeadTable, RecallGrid, TokenLosses
from tests.base.test_arguments import public
from tests.circuits.conftest import random_model
from tests.watching import watch

D_VOCAB = 97


def slow_ranks(model: HFModel, words: Dictionary, head: tuple[int, int]) -> Ranks:
    """Places of all tokens in the whole token-to-logit matrix of one head."""
    every = torch.arange(D_VOCAB)
    matrix = words.inputs(every, head[0]) @ circuits.ov(model).explicit(head)
    logits = matrix @ words.outputs(every).T
    sides = []
    for signed in (logits, -logits):
        order = signed.argsort(dim=1, descending=True, stable=True)
        sides.append((order == every[:, None]).int().argmax(1))
    return Ranks(*sides)


@pytest.mark.parametrize("limit", [None, 1, 5])
@pytest.mark.parametrize("first", [2, 512])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_e4_ranks_are_those_of_the_whole_matrix_whatever_the_limit_and_the_blocks(
    family: str, first: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.circuits.measures._FIRST_BLOCK", first)
    model, every = random_model(family), torch.arange(D_VOCAB)
    words = Dictionary(model, "mlp")
    found = circuits.target_ranks(
        circuits.ov(model),
        lambda layer: words.inputs(every, layer),
        words.outputs,
        every,
        words.size,
        limit=limit,
    )
    for head in ((0, 3), (2, 1)):
        for side, whole in zip(found, slow_ranks(model, words, head), strict=True):
            expected = whole if limit is None else whole.clamp_max(limit)
            assert torch.equal(side[head], expected)


def test_e4_undecided_pairs_alone_see_the_rest_of_the_vocabulary() -> None:
    """Work after the first block falls with the pairs that are left: counted in looked-up rows."""
    model, tokens = random_model("llama"), torch.arange(60, 70)
    words, seen = Dictionary(model), []

    def outputs(ids: Tensor) -> Tensor:
        seen.append(len(ids))
        return words.outputs(ids.remainder(D_VOCAB))

    ranks = circuits.target_ranks(
        circuits.ov(model),
        lambda layer: words.inputs(tokens, layer),
        outputs,
        tokens,
        10**6,
        limit=1,
    )
    assert sum(seen) < 10**5
    assert bool((ranks.promoted <= 1).all())


def test_e4_one_pass_serves_every_k(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = circuits.target_ranks

    def counted(*given: Any, **words: Any) -> Ranks:
        calls.append(words["limit"])
        return real(*given, **words)

    model = random_model("llama")
    monkeypatch.setattr("headscope.circuits.measures.target_ranks", counted)
    table = circuits.score(model, tokens=20, k=3, embeddings=["raw"])
    assert calls == [3, 3]  # OV once, QK once
    assert (table["copying_top3"].mean >= table["copying_top1"].mean).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
def test_e4_a_card_scores_one_head_and_has_the_numbers_of_the_whole_table(family: str) -> None:
    model = random_model(family)
    table, relations = circuits.score(model), _relations(model)
    table = table if relations is None else table.join(relations)
    whole = circuits.head_card(model, "L1H2", table=table)
    alone = circuits.head_card(model, "L1H2")
    assert alone.ranks == {}
    assert set(alone.scores) == {name for name in whole.scores if not name.endswith("_mlp")}
    for name, value in alone.scores.items():
        assert value == pytest.approx(whole.scores[name], rel=1e-4, abs=1e-5), name
    assert (alone.ov, alone.qk) == (whole.ov, whole.qk)
    assert set(whole.missing) <= set(alone.missing)


def _relations(model: HFModel) -> HeadTable | None:
    try:
        return circuits.relation_scores(model)
    except UnsupportedModelError:
        return None


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_e4_partners_of_one_head_are_those_of_all_pairs(family: str, mode: str) -> None:
    model = random_model(family)
    pairs = circuits.composition(model, mode).values
    below, above = circuits.partners(model, mode, "L1H2")
    assert {head.layer for head, _ in below} == {0}
    assert {head.layer for head, _ in above} == {2}
    for head, value in below:
        assert value == pytest.approx(pairs[head.layer, head.head, 1, 2], abs=1e-6)
    for head, value in above:
        assert value == pytest.approx(pairs[1, 2, head.layer, head.head], abs=1e-6)
    assert [value for _, value in below] == sorted((value for _, value in below), reverse=True)


def test_e4_a_vocabulary_too_large_to_keep_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama")
    kept = circuits.score(model, tokens=20)
    monkeypatch.setattr("headscope.circuits.vocabulary._KEPT_ENTRIES", 10)
    anew = circuits.score(model, tokens=20)
    for name, scores in kept.items():
        np.testing.assert_allclose(anew[name].mean, scores.mean, atol=1e-5, err_msg=name)


def test_e4_the_memory_of_ranks_does_not_grow_with_the_vocabulary() -> None:
    """Largest block of token vectors that is ever asked for, at 49k and at 262k words."""
    model, tokens = random_model("llama"), torch.arange(10)
    words, most = Dictionary(model), {}
    for size in (49_152, 262_144):
        seen: list[int] = []

        def outputs(ids: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(len(ids))
            return words.outputs(ids.remainder(D_VOCAB))

        circuits.target_ranks(
            circuits.ov(model), lambda layer: words.inputs(tokens, layer), outputs, tokens, size
        )
        assert sum(seen) == size + len(tokens)
        most[size] = max(seen) * model.shape.d_model
    assert max(most.values()) <= 1 << 22


def shown_results() -> dict[str, Any]:
    """Whatever a cell of a notebook may end in, of a small model."""
    model = hs.load()
    prompt = "The cat sat on the mat. The cat"
    names = hs.probes.pairs(model, "ioi", batch=3)
    difference = hs.metrics.logit_difference
    grids = {
        "_".join(axes): hs.patch_activations(model, names, difference, axes)
        for axes in (("layer", "head"), ("layer", "position"), ("layer",))
    }
    losses = np.random.default_rng(0).normal(size=(2, 3, 9))
    weights = hs.circuits.ov(model)
    return {
        **grids,
        "groups": hs.ablate_groups(model, names, difference, {"two": ["L0H0", "L1H1"]}),
        "lens": hs.lens.logit_lens(model, prompt),
        "attribution": hs.lens.attribute(model, prompt, sources=True),
        "words": hs.lens.head_lens(model, prompt),
        "svd": weights.svd(),
        "view": circuits.vocabulary_view(weights, Dictionary(model), 2, 3),
        "survey": circuits.survey(model, tokens=16, paths=2),
        "card": circuits.head_card(model, "L1H2"),
        "probe": names,
        "repeated": hs.probes.repeated_tokens(model, length=8, batch=2),
        "pairs": circuits.composition(model, "K"),
        "components": circuits.component_composition(model, "K", components=2),
        "spectra": circuits.spectra(model),
        "eigenvalues": circuits.eigenvalues(model),
        "mappings": circuits.salient_mappings(model, "L1H2", sources=3, targets=4),
        "losses": TokenLosses(("whole", "without"), losses, "a model"),
        "recall": RecallGrid(
            np.array([8.0, 16.0]), np.array([0.0, 1.0]), np.eye(2), np.full((2, 2), 3), 0.5
        ),
        "scores": hs.score(model, scorers=["induction"])["induction"],
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return shown_results()


def test_e7_every_result_ends_a_cell_in_a_few_lines_and_a_small_page(
    results: dict[str, Any],
) -> None:
    model = hs.load()
    for name, one in {**results, "factors": circuits.ov(model), "model": model}.items():
        text, page = repr(one), one._repr_html_()
        assert text.count("\n") < 10, name
        assert 20 < len(text) < 1500, name
        assert "object at 0x" not in text, name
        assert "tensor(" not in text, name
        assert 60 < len(page) < 60_000, name
        assert "<script" not in page, name
        if name != "scores":
            assert "next: " in text, name


# What public functions return and no cell ends in: parts of a program, sums to go on with.
_PARTS = {
    "Case", "Compiled", "Criterion", "Diffusion", "Edge", "Edited", "Encoded", "Evidence", "Halves",
    "HeadEdit", "ImageKeys", "Interpretation", "Intervention", "Kind", "LogitRows", "Metric",
    "Outcome", "PatchGrid", "Path", "Plan", "Predicate", "Program", "PromptRecording", "Provenance",
    "Results", "Scorer", "Sentence", "Stacked", "Status", "Tap", "TokenRelation", "Treebank",
    "Truth", "WholeMetric", "HeadIndex", "CheckReport",
}  # fmt: skip


def test_e7_whatever_a_public_function_returns_shows_itself() -> None:
    bare = set()
    for name, function in public():
        if name.startswith(("hs.vision.", "hs.diffusion.")):
            continue
        returned = inspect.signature(function).return_annotation
        for kind in (returned, *get_args(returned)):
            own = is_dataclass(kind) and kind.__module__.startswith("headscope")
            if own and kind.__name__ not in _PARTS and not hasattr(kind, "_repr_html_"):
                bare.add((name, kind.__name__))
    assert not bare, "derive these from headscope.base.result.Shown or Listed"


def test_e7_fields_are_listed_with_the_sizes_of_their_arrays() -> None:
    @dataclass(frozen=True, eq=False, repr=False)
    class TwoThings(Listed):
        numbers: np.ndarray[Any, Any]
        states: Tensor
        words: tuple[str, ...]
        nothing: str | None = None

    shown = TwoThings(np.array([[0.25, np.nan, 0.75]]), torch.zeros(2, 5), ("a\nb",) * 6)
    assert repr(shown).splitlines() == [
        "two things",
        "  field    value",
        "  numbers  [1, 3], mean 0.5, 0.25 to 0.75",
        "  states   [2, 5], mean 0, 0 to 0",
        "  words    'a\\\\nb', 'a\\\\nb', 'a\\\\nb', 'a\\\\nb' ... (6)",
    ]
    assert "<td" in shown._repr_html_()


def test_e7_what_was_generated_is_read_and_not_counted() -> None:
    model = hs.load()
    said = hs.retrieval.generate(model, ["One day the", "Every night"], new_tokens=2)
    assert repr(said).startswith("text after 2 prompts\n  prompt  tokens  text")
    assert said.texts[1].strip() in repr(said)
    size = hs.pruning.measure_size(model, torch.tensor([[1, 2, 3]]))
    assert "FLOPs" in repr(size)
    assert "array(" not in repr(said) + repr(size)


def test_d13_tensors_of_a_decomposition_are_shapes_and_not_numbers() -> None:
    svd = circuits.ov(random_model("llama")).svd()
    assert "3 layers x 4 heads" in repr(svd)
    assert "U [3, 4, 32, 8]" in repr(svd)


def test_e7_every_result_is_the_same_after_save_and_load(
    results: dict[str, Any], tmp_path: Path
) -> None:
    for name, one in results.items():
        file = tmp_path / f"{name}.safetensors"
        one.save(file)
        again = type(one).load(file)
        assert repr(again) == repr(one), name
        same(again, one, name)


def same(one: Any, other: Any, where: str) -> None:
    """Equal in every field, at any depth."""
    assert type(one) is type(other) or {type(one), type(other)} <= {dict, MappingProxyType}, where
    if is_dataclass(one):
        for field in fields(one):
            same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, where)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, Mapping):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where}[{key}]")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}[{number}]")
    else:
        assert one == other or (one != one and other != other), where


def test_e7_files_of_another_kind_or_damaged_files_are_a_sentence(
    results: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "pairs.safetensors"
    results["pairs"].save(file)
    with pytest.raises(HeadscopeError, match=r"holds PairScores: read it with PairScores\.load"):
        hs.EffectGrid.load(file)
    with pytest.raises(HeadscopeError, match="there is no file"):
        hs.PairScores.load(tmp_path / "missing")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadscopeError, match="not a saved PairScores, or is damaged"):
        hs.PairScores.load(file)
    file.write_bytes(b"")
    with pytest.raises(HeadscopeError, match="damaged"):
        hs.PairScores.load(file)


def test_e7_hostile_tokens_are_escaped() -> None:
    grid = hs.lens.logit_lens(hs.load(), [5, 9, 5])
    bad = replace(grid, tokens=("<script>alert(1)</script>", "\u202egnp", "a\nb"))
    page, text = bad._repr_html_(), repr(bad)
    assert "<script" not in page
    assert "\u202e" not in page + text
    assert "a\nb" not in text


def test_e5_a_patching_grid_is_a_heatmap_with_its_tokens(results: dict[str, Any]) -> None:
    grid = results["layer_position"]
    figure = hs.plots.heatmap(grid)
    assert figure.data[0].z.shape == grid.mean.shape
    np.testing.assert_allclose(figure.data[0].z, grid.mean, rtol=1e-5)
    assert figure.layout.xaxis.title.text == "position"
    assert list(figure.layout.yaxis.ticktext) == list(grid.labels[0])
    assert hs.plots.heatmap(results["layer"]).data[0].z.shape == (1, len(grid.labels[0]))
    three = hs.patch_activations(
        hs.load(), results["probe"], hs.metrics.logit_difference, ("layer", "head", "position")
    )
    with pytest.raises(HeadscopeError, match="a heatmap has two"):
        hs.plots.heatmap(three)


def test_e5_positions_carry_the_token_that_all_examples_share() -> None:
    model = hs.load()
    assert model.tokenizer is not None
    probe = hs.probes.pairs(model, "ioi", batch=4)
    grid = hs.patch_activations(model, probe, hs.metrics.logit_difference, ("layer", "position"))
    for at, name in enumerate(grid.labels[1]):
        ids = set(probe.tokens[:, at][probe.real[:, at]].tolist())
        number, _, token = name.partition(" ")
        assert number == str(at)
        expected = repr(model.tokenizer.decode(list(ids))) if len(ids) == 1 else ""
        assert token == expected
    assert any(" " in name for name in grid.labels[1])


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "llama"])
def test_e13_the_scorer_equals_the_exact_attribution_with_the_norm_held(family: str) -> None:
    model = made(family)
    tokens = torch.tensor([[3, 9, 5, 9, 5, 7]])
    targets = torch.full_like(tokens, -1)
    targets[0, 4] = 9
    probe = replace(hs.probes.from_tokens(tokens), targets=targets)
    table = hs.score(model, probe, ["direct_logit_attribution", "head_output_norm", "copying"])
    found = table["direct_logit_attribution"]
    split = hs.lens.attribute(model, tokens[0].tolist(), 9, position=4)
    every = [
        hs.lens.attribute(model, tokens[0].tolist(), token, position=4, sources=False).heads
        for token in range(model.shape.d_vocab)
    ]
    expected = split.heads - np.mean(every, axis=0)
    np.testing.assert_allclose(found.mean, expected, atol=2e-5, rtol=1e-4)
    assert ("scale held fixed" in found.provenance.probe.get("write", "")) == (family != "llama")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_e13_output_norms_are_those_of_what_reaches_the_stream(family: str) -> None:
    model = made(family)
    ids = [3, 9, 5, 9]
    found = hs.score(model, hs.probes.from_tokens(torch.tensor([ids])), "head_output_norm")
    lengths = []
    for at in (1, 2, 3):
        writes = HeadWrites(model, at)
        watch(model, torch.tensor([ids]), writes)
        lengths.append(torch.stack([one.norm(dim=-1) for one in writes.vectors.values()]))
    np.testing.assert_allclose(
        found["head_output_norm"].mean, torch.stack(lengths).mean(0).numpy(), rtol=1e-4
    )


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_e13_the_default_scorers_and_circuits_run_with_a_norm_after_attention(family: str) -> None:
    model = made(family)
    names = set(hs.score(model, hs.probes.repeated_tokens(model, length=8, batch=4)))
    assert "direct_logit_attribution" in names
    table = circuits.score(model, tokens=10)
    assert "copying_eigenvalues" in table
    assert "scale held fixed" in table["ov_norm"].provenance.probe["write"]
    pairs = circuits.composition(model, "V")
    layer, width = 2, model.shape.d_model
    assert 0 < pairs.values[0, :, layer].mean() < 4 / np.sqrt(width)


@torch.no_grad()
def test_e13_a_head_that_copies_copies_in_the_run_too() -> None:
    """Ranks by the circuit are ranks by the frozen run: the norm's scale moves no rank."""
    model = made("gemma2")
    words = Dictionary(model)
    head = circuits.ov(model).explicit("L0H1")
    ids = torch.tensor([9])
    x = words.inputs(ids, 0)
    logits = (x @ head @ words.outputs(torch.arange(model.shape.d_vocab)).T)[0]
    writes = HeadWrites(model, 0)
    watch(model, ids[None], writes)
    ran = writes.vectors[0][1] @ words.outputs(torch.arange(model.shape.d_vocab)).T
    assert torch.equal(logits.argsort(), ran.argsort())
    ratio = ran / logits
    assert float(ratio.std() / ratio.mean().abs()) < 1e-3


def made(family: str) -> HeadModel:
    if family != "olmo2":
        return random_model(family)
    torch.manual_seed(0)
    module = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=D_VOCAB,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            initializer_range=0.4,
            pad_token_id=0,
        )
    )
    return hs.load(module.eval())


def test_e21_distance_of_hidden_states_is_the_divergence_to_second_order() -> None:
    torch.manual_seed(0)
    unembedding, last = random_model("llama").unembedding, torch.randn(1, 32)
    metric = logit_metric(unembedding, last).double()
    seen = last + 0.02 * torch.randn(1, 32)
    exact = divergence_of_lens(
        logits_of(unembedding, last).double().log_softmax(1), logits_of(unembedding, seen).double()
    )
    gap = (unembedding.normed(seen) - unembedding.normed(last)).double()
    assert float(exact) > 1e-5
    assert float(((gap @ metric) * gap).sum() / 2) == pytest.approx(float(exact), rel=0.1)
    found = distance(unembedding, metric.float(), seen, last)
    assert float(found) == pytest.approx(float(exact), rel=0.1)


def test_e21_a_lens_that_reads_few_tokens_is_as_good_and_repeats() -> None:
    model = hs.load()
    probe = hs.probes.text(model, length=32)
    whole = hs.lens.tuned_lens(model, probe, steps=24)
    cheap = hs.lens.tuned_lens(model, probe, steps=24, tokens=64)
    assert cheap.settings["tokens"] == 64
    assert "tokens" not in whole.settings
    saved = [float(lens.report.gain.mean()) for lens in (whole, cheap)]
    assert saved[0] > 0
    assert saved[1] > 0.75 * saved[0]
    again = hs.lens.tuned_lens(model, probe, steps=24, tokens=64)
    assert torch.equal(again.weight, cheap.weight)
    with pytest.raises(HeadscopeError, match="tokens=0: give 1 or more"):
        hs.lens.tuned_lens(model, probe, steps=1, tokens=0)


def test_e21_what_a_step_reads_does_not_grow_with_the_vocabulary() -> None:
    reads = [affordable_tokens(30, 576, size) * size for size in (49_152, 131_072, 262_144)]
    assert max(reads) < 1.1 * min(reads)


# Run in another process that dies in the middle of its work, without a chance to clean up.
_KILLED = """
import os, signal, sys
import headscope as hs
from headscope.ablation.run import KeptEffects

keep, files = KeptEffects.keep, []

def killed(self, *given):
    keep(self, *given)
    files.append(given)
    if len(files) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

KeptEffects.keep = killed
model = hs.load("tiny-gpt2")
probe = hs.probes.repeated_tokens(model, length=50, batch=12)
hs.ablate_heads(model, probe, hs.metrics.loss, "resample", seed=3, checkpoint=sys.argv[1])
"""


@pytest.fixture(scope="module")
def tiny() -> HFModel:
    model = hs.load("tiny-gpt2")
    assert isinstance(model, HFModel)
    return model


def test_e17_heads_finished_before_a_kill_are_not_ablated_again(
    tiny: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kept" / "effects"
    died = subprocess.run([sys.executable, "-c", _KILLED, str(file)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in file.parent.iterdir()] == ["effects"]  # nothing torn beside it
    probe = hs.probes.repeated_tokens(tiny, length=50, batch=12)
    expected = hs.ablate_heads(tiny, probe, hs.metrics.loss, "resample", seed=3)
    kept, keep = [], KeptEffects.keep

    def counted(self: KeptEffects, chosen: slice, variants: Any, values: Tensor) -> None:
        kept.append((chosen.start, *variants))
        keep(self, chosen, variants, values)

    monkeypatch.setattr(KeptEffects, "keep", counted)
    options: dict[str, Any] = {"seed": 3, "checkpoint": file}
    found = hs.ablate_heads(tiny, probe, hs.metrics.loss, "resample", **options)
    assert np.array_equal(found.mean, expected.mean)
    assert np.array_equal(found.p_value, expected.p_value)
    heads, batches = len(tiny.shape.heads), len({start for start, *_ in kept})
    assert batches == 2
    assert sum(len(variants) for _, *variants in kept) == 2 * heads - 3
    kept.clear()
    again = hs.ablate_heads(tiny, probe, hs.metrics.loss, "resample", heads="L0H1", **options)
    assert kept == []
    assert again.mean[0, 1] == expected.mean[0, 1]


def test_e17_an_interrupt_keeps_finished_heads_for_other_heads_and_for_screening(
    tiny: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, probe = tmp_path / "effects", hs.probes.repeated_tokens(tiny, length=20, batch=4)
    expected, rows = hs.ablate_heads(tiny, probe, hs.metrics.loss, "zero"), RecordedBatch._reduced
    reduced: list[int] = []

    def interrupted(self: RecordedBatch, parts: Any) -> Tensor:
        reduced.append(len(parts))
        if len(reduced) == 8:  # the clean run, the proof's four, two heads
            raise KeyboardInterrupt
        return rows(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(RecordedBatch, "_reduced", interrupted)
        patch.setattr("headscope.ablation.engine._ROWS", 1)
        with pytest.raises(KeyboardInterrupt):
            hs.ablate_heads(
                tiny, probe, hs.metrics.loss, "zero", batch_size=4, memory=1, checkpoint=file
            )
    with safe_open(file, "np") as kept:
        assert kept.get_tensor("finished").all(1).sum() == 2
    heads = ["L1H0", "L0H1"]
    some = hs.ablate_heads(tiny, probe, hs.metrics.loss, "zero", heads=heads, checkpoint=file)
    screened = hs.screen_heads(
        tiny, probe, hs.metrics.loss, baseline="zero", top=2, sample=1, checkpoint=file
    )
    for result in (some, screened):
        measured = result.n > 0
        np.testing.assert_allclose(result.mean[measured], expected.mean[measured], atol=1e-6)


def test_e17_the_checkpoint_of_another_measurement_is_refused(
    tiny: HFModel, tmp_path: Path
) -> None:
    file, probe = tmp_path / "effects", hs.probes.repeated_tokens(tiny, length=20, batch=4)
    hs.ablate_heads(tiny, probe, hs.metrics.loss, "zero", heads="L0H1", checkpoint=file)
    other = hs.probes.repeated_tokens(tiny, length=20, batch=4, seed=1)
    where = torch.zeros(probe.tokens.shape, dtype=torch.bool)
    where[:, 3] = True
    calls: dict[str, tuple[Any, ...]] = {
        "weights": (hs.load("tiny-llama"), probe, hs.metrics.loss, "zero"),
        "data": (tiny, other, hs.metrics.loss, "zero"),
        "metric": (tiny, probe, hs.metrics.answer_log_prob, "zero"),
        "method": (tiny, probe, hs.metrics.loss, "mean"),
    }
    for named, call in calls.items():
        with pytest.raises(InputError, match=rf"another ablation \(other .*{named}"):
            hs.ablate_heads(*call, checkpoint=file)
    with pytest.raises(InputError, match=r"another ablation \(other positions"):
        hs.ablate_heads(tiny, probe, hs.metrics.loss, "zero", positions=where, checkpoint=file)
    with pytest.raises(InputError, match=r"another ablation \(other method"):
        hs.screen_heads(tiny, probe, hs.metrics.loss, baseline="mean", checkpoint=file)
    own = tmp_path / "own"

    def scaled(factor: float) -> HeadScores:
        return hs.ablate_heads(
            tiny,
            probe,
            hs.metrics.loss,
            lambda heads: hs.edits.scale(heads, factor),
            heads="L0H1",
            checkpoint=own,
        )

    assert np.array_equal(scaled(0.5).n, scaled(0.5).n)
    with pytest.raises(InputError, match=r"of another ablation \(its values of L0H1"):
        scaled(0.3)  # functions of one name are told apart by what they do
    for bad in (b"", b"{}", b"\x08\0\0\0\0\0\0\0{}      "):
        file.write_bytes(bad)
        with pytest.raises(InputError, match="not a checkpoint of an ablation"):
            hs.ablate_heads(tiny, probe, hs.metrics.loss, "zero", checkpoint=file)
    with pytest.raises(InputError, match="not a checkpoint of an ablation"):
        hs.ablate_heads(tiny, probe, hs.metrics.loss, "zero", checkpoint=tmp_path)
