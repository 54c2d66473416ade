"""Encoder-decoders against plain transformers: rows, outputs, ablation, padding, refusals."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import headscope as hs
from headscope.base.stacks import MaskRule
from headscope.errors import HeadscopeError, InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from tests.models.seq2seq import (
    CONFIGS,
    HEADS,
    LAYERS,
    STACKS,
    alone,
    both_sides,
    module_of,
    plain,
    projections,
)

FAMILIES = sorted(CONFIGS)
TOLERANCE = 1e-5


@cache
def loaded(name: str) -> Any:
    return hs.load(module_of(name))


def outputs_of(module: Any, inputs: Any) -> dict[str, list[Any]]:
    """Head outputs of every layer of every stack, by plain hooks on what projections read."""
    found: dict[str, list[Any]] = {stack: [] for stack in STACKS}
    handles = []
    for stack in STACKS:
        for _, one in projections(module, stack):

            def keep(_module: Any, args: Any, stack: str = stack) -> None:
                found[stack].append(args[0].unflatten(-1, (HEADS, -1)))

            handles.append(one.register_forward_pre_hook(keep))
    plain(module, inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_outputs_of_every_stack_are_the_models_own(name: str) -> None:
    model, inputs = loaded(name), both_sides(name)
    probe = hs.probes.from_batch(inputs)
    for example in range(2):
        own = alone(inputs, example)
        expected = plain(model.module, own)
        patterns = {
            "encoder": expected.encoder_attentions,
            "decoder": expected.decoder_attentions,
            "cross": expected.cross_attentions,
        }
        z = outputs_of(model.module, own)
        for stack in STACKS:
            acts = hs.capture.collect(model, probe, stack=stack)
            for layer in range(LAYERS):
                pattern = patterns[stack][layer][0]
                queries, keys = pattern.shape[1:]
                seen = acts[layer].pattern[example]
                torch.testing.assert_close(
                    seen[:, :queries, :keys], pattern, atol=TOLERANCE, rtol=0
                )
                assert not bool(seen[:, :queries, keys:].any())  # padding of the source
                size = float(z[stack][layer].abs().max())
                torch.testing.assert_close(
                    acts[layer].z[example, :queries],
                    z[stack][layer][0],
                    atol=TOLERANCE * max(size, 1),
                    rtol=0,
                )


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_attention_of_the_test_models_is_far_from_flat(name: str) -> None:
    probe = hs.probes.from_batch(both_sides(name))
    for stack in STACKS:
        pattern = hs.capture.collect(loaded(name), probe, stack=stack)[0].pattern
        even = 1 / pattern.shape[-1]
        assert float(pattern[:1].amax(-1).median()) > 2.5 * even


@pytest.mark.parametrize("name", FAMILIES)
def test_ablations_in_every_stack_are_those_of_plain_hooks(name: str) -> None:
    model, inputs = loaded(name), both_sides(name)
    targets = torch.full_like(inputs["decoder_input_ids"], -1)
    targets[0, [3, 9]], targets[1, 5] = torch.tensor([7, 9]), 11
    probe = hs.probes.from_batch(inputs, targets=targets)
    for stack in STACKS:
        head = HeadIndex(LAYERS - 1, 2, stack)
        scores = hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads=[str(head)])
        assert scores.stack == stack
        assert int((scores.n > 0).sum()) == 1
        part = projections(model.module, stack)[LAYERS - 1][1]
        effects = []
        for example in range(2):
            own = alone(inputs, example)
            at = (targets[example] >= 0).nonzero().squeeze(1)
            losses = [
                torch.nn.functional.cross_entropy(
                    plain(model.module, own, off).logits[0, at].double(), targets[example, at]
                )
                for off in ({part: 2}, {})
            ]
            effects.append(float(losses[0] - losses[1]))
        assert scores[str(head)] == pytest.approx(sum(effects) / 2, abs=2e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_models_pass_the_shipped_checks(name: str) -> None:
    report = hs.testing.check_model(loaded(name), raises=False)
    assert not report.failed, str(report)
    assert len(report.passed) == 11


def test_the_shipped_checks_can_fail() -> None:
    model = hs.load(module_of("bart"))
    attention = model.module.model.decoder.layers[1].encoder_attn
    own = attention.forward

    def other(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        attention.scaling = (
            0.1 if attention.config._attn_implementation == "headscope_plain" else 0.9
        )
        return own(hidden_states, *args, **kwargs)

    attention.forward = other
    report = hs.testing.check_model(model, raises=False)
    assert "rows" in report.failed


def test_stacks_say_what_is_seen() -> None:
    model = loaded("bart")
    assert list(model.stacks) == list(STACKS)
    stack = model.stacks["cross"]
    assert (stack.mask, stack.queries, stack.keys) == (MaskRule("cross"), "target", "source")
    assert (stack.letter, str(stack.head(1, 3))) == ("X", "X1H3")
    assert [one.mask.kind for one in model.stacks.values()] == [
        "bidirectional",
        "causal",
        "cross",
    ]
    assert [str(head) for head in model.stack("cross").shape.heads[:2]] == ["X0H0", "X0H1"]
    assert "encoder" in str(model)


@pytest.mark.parametrize("name", ["t5", "bart", "m2m_100"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_padding_before_a_text_changes_nothing_or_is_refused(name: str, side: str) -> None:
    model, inputs = loaded(name), both_sides(name)
    ids, mask = ("input_ids", "attention_mask")
    if side == "target":
        ids, mask = "decoder_input_ids", "decoder_attention_mask"
    full = {
        key: torch.ones_like(value) if "mask" in key else value for key, value in inputs.items()
    }
    own = full[ids][1, 3:]
    full[mask][1, :3] = 0
    probe = hs.probes.from_batch(full)
    if name == "bart":
        with pytest.raises(UnsupportedModelError, match=f"reads a {side} otherwise.*pad on the"):
            hs.score(model, probe, "entropy")
        return
    other = "decoder_input_ids" if side == "source" else "input_ids"
    expected = plain(model.module, {ids: own[None], other: full[other][1:]})
    acts = hs.capture.collect(model, probe, stack="cross")
    at = slice(3, None)
    for layer in range(LAYERS):
        seen = acts[layer].pattern[1]
        seen = seen[:, :, at] if side == "source" else seen[:, at]
        torch.testing.assert_close(
            seen, expected.cross_attentions[layer][0], atol=TOLERANCE, rtol=0
        )


def test_a_model_of_several_stacks_is_not_taken_for_one() -> None:
    model, probe = loaded("t5"), hs.probes.from_batch(both_sides("t5"))
    for refused, why in (
        (lambda: hs.ablate_heads(model, probe, hs.metrics.loss), "say which, e.g. stack='cross'"),
        (lambda: hs.ablate_heads(model, probe, hs.metrics.loss, heads="L0H1"), "say which"),
        (
            lambda: hs.ablate_heads(model, probe, hs.metrics.loss, heads=["X0H1", "E0H1"]),
            "one stack",
        ),
        (lambda: hs.capture.collect(model, probe, stack="croos"), "Did you mean|did you mean"),
        (lambda: hs.ablate_heads(model, probe, hs.metrics.loss, heads=["X0H9"]), "no head X0H9"),
        (lambda: hs.circuits.ov(model), "choose one"),
        (lambda: hs.prune(model, ["X0H1"]), "choose one|one stack|not supported"),
        (lambda: hs.circuits.ov(model.stack("cross")), "not supported yet|not read"),
        (lambda: model.stack("cross").weights(0), "not supported yet"),
        (lambda: model.stack("cross").edited(()), "not supported yet"),
        (lambda: hs.lens.logit_lens(model, [5, 6, 7]), "choose one"),
    ):
        with pytest.raises(HeadscopeError, match=why):
            refused()


def test_heads_of_another_stack_are_refused_in_a_model_of_one() -> None:
    model = hs.load("tiny-llama")
    probe = hs.probes.random_tokens(model, 8, 2)
    with pytest.raises(InputError, match="no stack 'cross' here: it has a single one"):
        hs.ablate_heads(model, probe, hs.metrics.loss, heads="X0H1")
    with pytest.raises(InputError, match="single attention stack"):
        model.shape.check(HeadIndex(0, 1, "cross"))


def test_a_folder_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    for name in ("bart", "whisper"):
        module_of(name).save_pretrained(tmp_path / name)
        model = hs.load(str(tmp_path / name), device="cpu")
        assert type(model.module).__name__ == CONFIGS[name][0].__name__
        assert list(model.stacks) == list(STACKS)


def test_a_model_without_a_head_shows_rows_and_says_that_it_has_no_logits() -> None:
    torch.manual_seed(0)
    body = transformers.T5Model(transformers.T5Config(**CONFIGS["t5"][2])).eval()
    model, probe = hs.load(body), hs.probes.from_batch(both_sides("t5"))
    assert hs.score(model, probe, "entropy").stack("cross")["entropy"].mean.shape == (2, 4)
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        hs.ablate_heads(model, probe, hs.metrics.loss, stack="cross")


def test_interventions_reach_the_sequence_that_the_stack_runs_on() -> None:
    model, inputs = loaded("bart"), both_sides("bart")
    targets = inputs["decoder_input_ids"].roll(-1, 1)
    probe = hs.probes.from_batch(inputs, targets=targets)
    acts = hs.capture.collect(model, probe, stack="encoder")
    mean = acts[1].z[:, :, 2][probe.source.real].mean(0)
    found = hs.ablation.head_means(model.stack("encoder"), probe)[1][2]
    torch.testing.assert_close(found, mean, atol=1e-5, rtol=1e-5)
    for method in ("mean", "mean_pos", "uniform", "attend_to_first"):
        scores = hs.ablate_heads(model, probe, hs.metrics.loss, method, heads=["E0H1"])
        assert scores["E0H1"] != 0, method
    end = hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads=["E0H1"], positions="end")
    assert (
        end["E0H1"] != hs.ablate_heads(model, probe, hs.metrics.loss, "zero", heads="E0H1")["E0H1"]
    )


def test_estimates_are_derivatives_in_any_stack() -> None:
    model, inputs = loaded("bart"), both_sides("bart")
    probe = hs.probes.from_batch(inputs, targets=inputs["decoder_input_ids"].roll(-1, 1))
    for stack in STACKS:
        estimate = hs.estimate_heads(model, probe, hs.metrics.loss, baseline="zero", stack=stack)
        head = f"{model.stacks[stack].letter}1H1"
        step = 1e-2
        moved = [
            hs.ablate_heads(
                model, probe, hs.metrics.loss, hs.interventions.Scale(1 + sign * step), heads=head
            )[head]
            for sign in (-1, 1)
        ]
        slope = (moved[0] - moved[1]) / (2 * step)
        assert estimate[head] == pytest.approx(slope, abs=0.02 * abs(slope) + 2e-3)
