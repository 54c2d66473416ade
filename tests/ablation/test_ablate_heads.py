"""hs.ablate_heads: equal to the naive loop, proven to hit, and invariant to how it is run."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headscope as hs
from headscope import edits
from headscope.ablation import engine
from headscope.interventions import partners_of
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from tests import handwired
from tests.ablation.helpers import model_of, probe_of, whole_pass

difference = hs.metrics.logit_difference


def edit_of(method: str, model: HeadModel, probe: hs.Probe, head: hs.HeadIndex) -> edits.HeadEdit:
    """The edit that a method stands for, made by hand."""
    if method == "mean":
        return edits.mean([head], hs.ablation.head_means(model, probe))
    if method == "mean_pos":
        return edits.mean_pos([head], hs.ablation.head_means(model, probe, per_position=True))
    if method == "resample":
        tokens = probe.tokens[partners_of(len(probe), len(probe), 0, own=True)]
        return edits.resample([head], hs.ablation.head_values(model, tokens))
    if method == "patch":
        return edits.patch([head], hs.ablation.head_values(model, probe.corrupt.tokens))
    if method == "attend_to_first":
        return edits.attend_to_first([head], probe.real)
    return {"zero": edits.zero, "uniform": edits.uniform}[method]([head])


METHODS = ("zero", "mean", "mean_pos", "resample", "patch", "uniform", "attend_to_first")


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", method) for method in METHODS),
        *(("cohere2", method) for method in METHODS[3:]),
        ("bloom", "zero"),
        ("bloom", "uniform"),
    ],
)
def test_equals_the_naive_loop(family: str, method: str) -> None:
    model, probe = model_of(family), probe_of()
    scores = hs.ablate_heads(model, probe, difference, method, batch_size=3)
    clean = whole_pass(model, probe, ())
    for head in model.shape.heads[::5]:
        effect = whole_pass(model, probe, [edit_of(method, model, probe, head)]) - clean
        assert scores.per_example[head] == pytest.approx(effect, abs=2e-5)
    assert scores.n.min() == 4
    assert scores.alternative == "two-sided"


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("positions", [None, "late", "end"])
def test_positions_and_padding(padding: str, positions: str | None) -> None:
    model, probe = model_of("mistral"), probe_of(padding)
    scores = hs.ablate_heads(model, probe, difference, "zero", positions=positions)
    where = None if positions is None else probe.mark(positions)
    clean = whole_pass(model, probe, ())
    for head in model.shape.heads[::3]:
        effect = whole_pass(model, probe, [edits.zero([head], positions=where)]) - clean
        assert scores.per_example[head] == pytest.approx(effect, abs=2e-5)


def test_padding_does_not_change_the_effects() -> None:
    model, probe = model_of("llama"), probe_of("left")
    effects = hs.ablate_heads(model, probe, difference, "zero").per_example
    alone = probe.examples(slice(1, 2))
    cut = replace(
        alone,
        **{
            name: getattr(alone, name)[:, 6:]
            for name in ("tokens", "real", "structure", "targets", "foils")
        },
        marks={},
        corrupt=None,
    )
    bare = hs.ablate_heads(model, cut, difference, "zero").per_example
    assert effects[:, :, 1] == pytest.approx(bare[:, :, 0], abs=2e-5)


@cache
def _expected(metric: str) -> np.ndarray:
    chosen = getattr(hs.metrics, metric)
    return hs.ablate_heads(model_of("gpt2"), probe_of("right"), chosen, "mean").per_example


@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 4),
    stack=st.integers(1, 200),
    rows=st.integers(1, 9),
    metric=st.sampled_from(["logit_difference", "kl_divergence", "loss"]),
)
def test_batch_and_stack_size_change_nothing(
    batch: int, stack: int, rows: int, metric: str
) -> None:
    model, probe = model_of("gpt2"), probe_of("right")
    chosen = getattr(hs.metrics, metric)
    expected = _expected(metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CPU_STACK", stack)
        patch.setattr(engine, "_ROWS", rows)
        found = hs.ablate_heads(model, probe, chosen, "mean", batch_size=batch)
    assert found.per_example == pytest.approx(expected, abs=1e-5)


def test_proofs_are_in_the_result() -> None:
    for family, engine_name in (("llama", "suffix replay"), ("bloom", "whole passes")):
        checks = hs.ablate_heads(model_of(family), probe_of(), difference).provenance.checks
        assert checks["engine"] == engine_name
        assert checks["noop_error"] < 1e-5
        assert checks["own_output_changed"] is True
        assert checks["other_heads_changed"] == 0
        assert checks["heads_off_error"] < 1e-5
        assert checks["heads_without_effect"] == []


def test_all_heads_off_is_attention_removed() -> None:
    model, probe = model_of("gpt2"), probe_of()
    off = model.forward(probe.tokens, edits=[edits.zero(model.shape.heads)])
    handles = []
    for block in model.module.transformer.h:
        bias = block.attn.c_proj.bias
        handles.append(
            block.attn.register_forward_hook(
                lambda _m, _a, out, bias=bias: (bias.expand_as(out[0]), *out[1:])
            )
        )
    removed = model.forward(probe.tokens)
    for handle in handles:
        handle.remove()
    assert torch.allclose(off, removed, atol=1e-5)


def test_an_edit_of_another_head_is_caught() -> None:
    def wrong(heads: edits.Heads) -> edits.HeadEdit:
        return edits.zero([(layer, (head + 1) % 4) for layer, head in edits.head_list(heads)])

    with pytest.raises(hs.HeadscopeError, match="another head"):
        hs.ablate_heads(model_of("llama"), probe_of(), difference, wrong)


def test_no_op_and_own_edits() -> None:
    model, probe = model_of("llama"), probe_of()
    same = hs.ablate_heads(model, probe, difference, lambda heads: edits.scale(heads, 1.0))
    assert np.abs(same.per_example).max() < 1e-5
    half = hs.ablate_heads(model, probe, difference, lambda heads: edits.scale(heads, 0.5))
    clean = whole_pass(model, probe, ())
    effect = whole_pass(model, probe, [edits.scale("L1H2", 0.5)]) - clean
    assert half.per_example[1, 2] == pytest.approx(effect, abs=2e-5)


def test_a_metric_of_your_own() -> None:
    model, probe = model_of("llama"), probe_of()

    def last(logits: torch.Tensor, batch: hs.Probe) -> torch.Tensor:
        return logits[:, -1, 5] - logits[:, -1, 9]

    own = hs.ablate_heads(model, probe, last, "zero", batch_size=3)
    ours = hs.ablate_heads(model, probe, difference, "zero")
    assert own.per_example == pytest.approx(ours.per_example, abs=1e-5)
    assert own.provenance.probe["metric"] == "last"


def test_some_heads_only() -> None:
    scores = hs.ablate_heads(model_of("llama"), probe_of(), difference, heads=["L0H1", "2.3"])
    assert np.argwhere(~np.isnan(scores.mean)).tolist() == [[0, 1], [2, 3]]
    assert np.isnan(scores.p_value[1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "meen"}, "did you mean 'mean'"),
        ({"heads": "L9H0"}, "no head L9H0"),
        ({"positions": "needle"}, "no mark 'needle'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"method": "attribution"}, "hs.estimate_heads"),
        ({"method": "screened"}, "hs.screen_heads"),
        ({"method": "zero", "steps": -3}, "call hs.estimate_heads"),
        ({"method": "zero", "baseline": "no such thing"}, "call hs.estimate_heads"),
        ({"method": "mean", "top": 3}, "call hs.screen_heads"),
        ({"method": "zero", "bach_size": 3}, "no argument 'bach_size'"),
        ({"method": "zero", "reference": probe_of()}, "leave reference out"),
        ({"method": edits.zero, "positions": "end"}, "set it in your edit function"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments: dict, message: str) -> None:
    with pytest.raises(hs.HeadscopeError, match=message):
        hs.ablate_heads(model_of("llama"), probe_of(), difference, **arguments)
    with pytest.raises(hs.HeadscopeError, match="same places"):
        hs.ablate_heads(model_of("llama"), probe_of("left"), difference, "resample")


def test_ablating_the_named_heads_breaks_what_they_are_named_for() -> None:
    wired = handwired.handwired_gpt2()
    model = load(wired.model)
    probe = hs.probes.repeated_tokens(wired, length=8, batch=4)
    second = torch.zeros_like(probe.real)
    second[:, -8:-1] = True
    probe = replace(probe, marks={**probe.marks, "second": second})
    scores = hs.ablate_heads(model, probe, hs.metrics.answer_log_prob.at("second"), "zero")
    needed = {wired.roles["induction"], wired.roles["previous_token"]}
    assert {head for head, _ in scores.bottom(2)} == needed
    others = [scores[head] for head in model.shape.heads if head not in needed]
    assert max(scores[head] for head in needed) < -1
    assert np.abs(others).max() < 0.2
