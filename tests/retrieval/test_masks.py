"""Masked generation and DeCoRe equal the slow obvious way; scopes; prompts; mistakes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.errors import InputError
from headscope.retrieval import Contrast, DeCoReProcessor, Mask, decore, generate
from tests.handwired import handwired_gpt2
from tests.models.families import build

# Grouped and rotary; windowed with soft-caps; windowed with one KV head; learned positions.
FAMILIES = ["llama", "gemma2", "mistral", "gpt2"]
HEADS = ["L0H1", "L1H0", "L1H2", "L2H3"]
STEPS = 5


def prompts(n: int = 9) -> Tensor:
    return torch.randint(3, 61, (3, n), generator=torch.Generator().manual_seed(3))


def slow_masked(model: Any, text: Tensor, first: int, method: str, scope: str) -> Tensor:
    """Next-token logits by one whole pass without a cache, edited where the scope says."""
    at = torch.arange(text.shape[1])
    where = {"decode": at >= first, "prefill": at < first, "all": at >= 0}[scope]
    positions = where[None].expand(text.shape)
    make = hs.edits.uniform if method == "uniform" else hs.edits.zero
    with torch.no_grad():
        logits: Tensor = model.forward(text, edits=(make(HEADS, positions=positions),))
    return logits[:, -1].float()


def slow_greedy(model: Any, method: str, scope: str) -> list[list[int]]:
    text = start = prompts()
    for _ in range(STEPS):
        logits = slow_masked(model, text, start.shape[1] - 1, method, scope)
        text = torch.cat([text, logits.argmax(-1)[:, None]], 1)
    return text[:, start.shape[1] :].tolist()


def unpadded(said: Any) -> list[list[int]]:
    return [list(one) for one in said.tokens]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "scope"),
    [("uniform", "decode"), ("uniform", "prefill"), ("zero", "all"), ("zero", "decode")],
)
def test_masked_generation_equals_whole_passes(family: str, method: Any, scope: Any) -> None:
    model = hs.load(build(family), check=False)
    mask = Mask.of(model, HEADS, method, scope)
    said = generate(model, prompts(), mask=mask, new_tokens=STEPS, progress=False)
    assert unpadded(said) == slow_greedy(model, method, scope)


def test_masks_change_what_is_said_and_scopes_differ() -> None:
    model: Any = hs.load(build("llama"), check=False)
    plain = generate(model, prompts(), new_tokens=STEPS)
    with torch.no_grad():
        own = model.module.generate(
            prompts(), max_new_tokens=STEPS, do_sample=False, eos_token_id=-1
        )
    assert unpadded(plain) == own[:, 9:].tolist()
    said = [
        generate(model, prompts(), mask=Mask.of(model, HEADS, "zero", scope), new_tokens=STEPS)
        for scope in ("decode", "prefill", "all")
    ]
    assert len({one.tokens for one in (plain, *said)}) == 4


def test_the_scope_masks_the_models_own_generate_and_ends() -> None:
    model: Any = hs.load(build("llama"), check=False)
    ids = prompts()
    options: Any = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": -1}
    with torch.no_grad():
        plain = model.module.generate(ids, **options)
        with hs.mask_heads(model, HEADS):
            inside = model.module.generate(ids, **options)
            ours = generate(model, ids, new_tokens=STEPS)
        with hs.mask_heads(model, HEADS, "zero", "all"):
            zeroed = model.module.generate(ids, **options)
        after = model.module.generate(ids, **options)
    assert torch.equal(plain, after)
    # the whole prompt is read at once, so the first new token is still the model's own
    assert torch.equal(inside[:, 9], plain[:, 9])
    assert not torch.equal(inside, plain)
    text = plain[:, :10]
    for _ in range(STEPS - 1):
        logits = slow_masked(model, text, 9, "uniform", "decode")
        text = torch.cat([text, logits.argmax(-1)[:, None]], 1)
    assert torch.equal(inside, text)
    assert unpadded(ours) == slow_greedy(model, "uniform", "decode")
    expected = slow_greedy(model, "zero", "all")
    assert zeroed[:, 9:].tolist() == expected


def test_mean_masks_need_a_reference() -> None:
    model = hs.load("tiny-llama")
    probe = hs.probes.repeated_tokens(model, length=8, batch=2)
    means = hs.ablation.head_means(model, probe)
    with hs.mask_heads(model, "L1H2", "mean", "all", reference=probe):
        inside = model.forward(probe.tokens)
    expected = model.forward(probe.tokens, edits=[hs.edits.mean("L1H2", means)])
    assert torch.equal(inside, expected)
    assert Mask.of(model, "L1H2", "mean").edit.name == "mean"  # of the bundled passages


def test_prompts_of_different_lengths_are_each_as_if_alone() -> None:
    model = hs.load("tiny-llama")
    texts = ["The code of the red door is seven. The code of the red door is", "One day the", "She"]
    mask = Mask.of(model, ["L2H1", "L0H3"], scope="all")
    together = generate(model, texts, mask=mask, new_tokens=4)
    alone = [generate(model, one, mask=mask, new_tokens=4).tokens[0] for one in texts]
    assert list(together.tokens) == alone
    drawn = [
        generate(model, texts, new_tokens=4, temperature=1.5, seed=4, batch_size=n).tokens
        for n in (1, 2, 3)
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != generate(model, texts, new_tokens=4, temperature=1.5, seed=5).tokens


def test_draws_follow_the_models_probabilities() -> None:
    model = hs.load(build("gpt2"), check=False)
    ids = prompts()[:1]
    with torch.no_grad():
        expected = model.forward(ids)[0, -1].float().div(2).softmax(0)
    many = generate(model, ids.expand(3000, -1), new_tokens=1, temperature=2, batch_size=3000)
    said = torch.tensor([one[0] for one in many.tokens if one])
    shares = torch.bincount(said, minlength=61) / 3000
    likely = expected > 0.05
    assert likely.sum() >= 2
    error = (expected * (1 - expected) / 3000).sqrt()
    assert ((shares - expected).abs() < 4 * error + 1e-9)[likely].all()


def slow_decore(model: Any, alpha: Any, steps: int = STEPS) -> tuple[list[list[int]], Tensor]:
    """Two whole passes for every token; formula written out anew with numpy."""
    text = start = prompts()
    weights = []
    for _ in range(steps):
        with torch.no_grad():
            base = model.forward(text)[:, -1].double().numpy()
        masked = slow_masked(model, text, start.shape[1] - 1, "uniform", "decode").double().numpy()
        own, other = (np.exp(x - x.max(1, keepdims=True)) for x in (base, masked))
        own, other = (x / x.sum(1, keepdims=True) for x in (own, other))
        entropy = -(own * np.log(own)).sum(1)
        gain = np.maximum(0, -(other * np.log(other)).sum(1) - entropy)
        weight = {"entropy": entropy, "gain": gain}.get(alpha, np.full(3, alpha))
        scores = (1 + weight[:, None]) * np.log(own) - weight[:, None] * np.log(other)
        weights.append(weight)
        text = torch.cat([text, torch.from_numpy(scores.argmax(1))[:, None]], 1)
    return text[:, start.shape[1] :].tolist(), torch.tensor(np.array(weights).T)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("alpha", ["entropy", "gain", 0.5])
def test_decore_equals_two_whole_passes_a_token(family: str, alpha: Any) -> None:
    model = hs.load(build(family), check=False)
    said = decore(
        model, prompts(), HEADS, alpha, most=None, plausible=0, new_tokens=STEPS, progress=False
    )
    tokens, weights = slow_decore(model, alpha)
    assert unpadded(said) == tokens
    torch.testing.assert_close(
        torch.tensor(said.alphas, dtype=torch.float64), weights, atol=1e-3, rtol=1e-3
    )


def test_no_contrast_leaves_the_base_model() -> None:
    model = hs.load(build("llama"), check=False)
    plain = generate(model, prompts(), new_tokens=STEPS)
    assert decore(model, prompts(), HEADS, 0, new_tokens=STEPS).tokens == plain.tokens
    contrasted = decore(model, prompts(), HEADS, 3, plausible=0, new_tokens=STEPS)
    assert contrasted.tokens != plain.tokens
    base = torch.randn(4, 9)
    for alpha in (0.7, "entropy"):
        mixed = Contrast.published(alpha)(base, base)  # masked equal to base: base for any alpha
        torch.testing.assert_close(mixed.scores, base.log_softmax(1))
    out = base.clone()
    out[:, 2] = -torch.inf
    assert Contrast(2.0)(out, out).scores[:, 2].isneginf().all()
    flat = Contrast("entropy", most=None, share=True)(torch.zeros(1, 9), torch.zeros(1, 9)).alpha
    assert flat is not None
    torch.testing.assert_close(flat, torch.ones(1))
    capped = Contrast("entropy", most=0.5)(torch.zeros(1, 9), base[:1]).alpha
    assert capped is not None
    assert capped.tolist() == [0.5]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_processor_of_transformers_says_the_same(family: str) -> None:
    model: Any = hs.load(build(family), check=False)
    options: Any = {"max_new_tokens": STEPS, "eos_token_id": -1, "pad_token_id": 0}
    processor = DeCoReProcessor(model, HEADS, Contrast(0.5))
    expected = decore(model, prompts(), HEADS, 0.5, new_tokens=STEPS).tokens
    for _ in range(2):  # a second prompt begins anew
        out = model.module.generate(
            prompts(), do_sample=False, logits_processor=[processor], **options
        )
        assert out[:, 9:].tolist() == [list(one) for one in expected]
    torch.manual_seed(0)
    one, two = (
        model.module.generate(prompts(), do_sample=True, logits_processor=[processor], **options)
        for _ in range(2)
    )
    assert not torch.equal(one, two)
    beams = model.module.generate(
        prompts(), do_sample=False, num_beams=2, logits_processor=[processor], **options
    )
    assert beams.shape[0] == 3


def test_padded_prompts_reach_the_processor() -> None:
    model: Any = hs.load(build("llama"), check=False)
    ids, real = prompts(), torch.ones(3, 9, dtype=torch.bool)
    real[1, :4] = False
    processor = DeCoReProcessor(model, HEADS, Contrast(0.5), real)
    out = model.module.generate(
        ids, attention_mask=real.long(), max_new_tokens=3, do_sample=False, eos_token_id=-1,
        pad_token_id=0, logits_processor=[processor],
    )  # fmt: skip
    alone = decore(model, ids[1:2, 4:], HEADS, 0.5, new_tokens=3)
    assert out[1, 9:].tolist() == list(alone.tokens[0])
    with pytest.raises(InputError, match="real has shape"):
        processor(ids[:, :5], torch.zeros(3, 61))


def test_the_hand_wired_head_is_what_recall_rests_on() -> None:
    wired = handwired_gpt2()
    model = hs.load(wired.model, check=False)
    ids = torch.tensor([[0, 3, 4, 7, 12, 9, 5, 6, 7]])
    head = wired.roles["induction"]
    others = [one for one in model.shape.heads if one.layer == head.layer and one != head]
    assert generate(model, ids, new_tokens=2).tokens == ((12, 9),)
    without = generate(model, ids, mask=Mask.of(model, [head]), new_tokens=2)
    assert without.tokens != ((12, 9),)
    assert generate(model, ids, mask=Mask.of(model, others), new_tokens=2).tokens == ((12, 9),)
    assert decore(model, ids, [head], 0.5, new_tokens=2).tokens == ((12, 9),)


def test_bridges_say_the_same_under_a_mask() -> None:
    from headscope.models.bridge.model import bridge_over, wrap_bridge

    direct: Any = hs.load(build("llama"), check=False)
    bridge = wrap_bridge(bridge_over(direct.module))
    for scope in ("decode", "prefill", "all"):
        masks = [Mask.of(one, HEADS, "uniform", scope) for one in (direct, bridge)]
        said = [
            generate(one, prompts(), mask=mask, new_tokens=3).tokens
            for one, mask in zip((direct, bridge), masks, strict=True)
        ]
        assert said[0] == said[1]


def test_mistakes_get_a_sentence() -> None:
    model: Any = hs.load("tiny-llama")
    cases: list[tuple[Any, str]] = [
        (lambda: hs.mask_heads(model, "L9H0"), "L9H0"),
        (lambda: generate(model, []), "prompts= is empty"),
        (lambda: generate(model, torch.tensor([[9999]])), "knows 0 to"),
        (lambda: generate(model, "One", new_tokens=0), "1 or more"),
        (lambda: generate(model, "One", new_tokens=300), "are more than the 256"),
        (lambda: generate(model, "One", temperature=-1), "0 \\(greedy\\) or more"),
        (lambda: decore(model, "One", "L0H0", -1), "must be 0 or more"),
        (lambda: generate(model, "One", batch_size=0), "batch_size=0"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
