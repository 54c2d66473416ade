"""Vision-language models against plain transformers: rows, ablation, padding, and what is said."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.errors import InputError
from tests.models.vision import vision
from tests.models.vision_language import BUILDS, HEADS, IMAGE, LAYERS, inputs_of, model_of

FAMILIES = sorted(BUILDS)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return {name: hs.load(model_of(name)) for name in FAMILIES}


@torch.no_grad()
def plain(module: Any, inputs: dict[str, Tensor]) -> Any:
    """What the model itself says with eager attention."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        return module(**inputs, use_cache=False, output_attentions=True)
    finally:
        module.set_attn_implementation(before)


@contextmanager
def without(module: Any, layer: int, head: int) -> Iterator[None]:
    """Scope in which a head's output is 0, by a plain hook."""
    inside = module.model
    text = inside.language_model if hasattr(inside, "language_model") else inside.text_model
    projection = text.layers[layer].self_attn.o_proj

    def zero(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., 8 * head : 8 * head + 8] = 0
        return (z,)

    handle = projection.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_ablations_are_the_models_own(loaded: dict[str, Any], name: str) -> None:
    model, inputs = loaded[name], inputs_of(name)
    probe = hs.probes.from_batch(inputs)
    own = plain(model.module, inputs)
    acts = hs.capture.collect(model, probe, batch_size=1)
    for layer in range(LAYERS):
        torch.testing.assert_close(acts[layer].pattern, own.attentions[layer], atol=1e-5, rtol=0)
        assert float(own.attentions[layer].amax(-1).median()) > 0.2  # far from flat
    logits = model.run(probe)
    size = float(own.logits.abs().max())
    torch.testing.assert_close(logits, own.logits, atol=3e-5 * size, rtol=0)
    at = torch.arange(probe.length)[None] == probe.length - 1
    asked = hs.probes.from_batch(inputs, targets=torch.full_like(probe.tokens, 7).where(at, -1))
    scores = hs.ablate_heads(model, asked, hs.metrics.answer_log_prob, "zero", batch_size=1)
    clean = own.logits[:, -1].double().log_softmax(-1)[:, 7]
    for layer in range(LAYERS):
        for head in (0, HEADS - 1):
            with without(model.module, layer, head):
                edited = plain(model.module, inputs).logits[:, -1].double().log_softmax(-1)[:, 7]
            effect = float((edited - clean).mean())
            assert scores.mean[layer, head] == pytest.approx(effect, abs=3e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma", "gemma3"])
def test_padding_behind_a_text_with_images_changes_nothing(
    loaded: dict[str, Any], name: str
) -> None:
    model, inputs = loaded[name], inputs_of(name)
    longer = {
        key: value for key, value in inputs.items() if value.shape != inputs["input_ids"].shape
    }
    for key, value in inputs.items():
        if key not in longer:
            more = torch.full((2, 3), 1 if name == "paligemma" else 0)
            longer[key] = torch.cat([value, more], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    longer["attention_mask"][:, -3:] = 0
    length = inputs["input_ids"].shape[1]
    first = model.run(hs.probes.from_batch(inputs))
    second = model.run(hs.probes.from_batch(longer))[:, :length]
    torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_several_images_in_a_text(loaded: dict[str, Any], name: str) -> None:
    model, inputs = loaded[name], inputs_of(name)
    pair = torch.cat([inputs["input_ids"][:1], inputs["input_ids"][1:]], 1)
    both = {**inputs, "input_ids": pair}
    if name == "qwen2_vl":
        both["mm_token_type_ids"] = (pair == IMAGE).long()
    probe = hs.probes.from_batch(both)
    own = plain(model.module, both).logits
    torch.testing.assert_close(model.run(probe), own, atol=1e-4, rtol=1e-4)
    many = {key: torch.cat([value, value]) for key, value in both.items()}
    doubled = model.run(hs.probes.from_batch(many))
    torch.testing.assert_close(doubled[1:], own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "smolvlm", "gemma3"]
)
def test_models_pass_the_shipped_checks(loaded: dict[str, Any], name: str) -> None:
    report = hs.testing.check_model(loaded[name], raises=False)
    assert not report.failed, str(report)


@pytest.mark.parametrize(("name", "leaks"), [("paligemma", 42), ("gemma3", 6), ("llava", 0)])
def test_next_tokens_that_a_prefix_shows_are_not_asked_for(
    loaded: dict[str, Any], name: str, leaks: int
) -> None:
    """Of 25 tokens, 22 are paligemma's prefix; gemma3's four tokens of an image see each other."""
    model, inputs = loaded[name], inputs_of(name)
    probe = hs.probes.from_batch(inputs)
    if not leaks:
        hs.capture.check_fits(model, probe, answers=True)
        return
    with pytest.raises(InputError, match=f"sees {leaks} of them.*give targets="):
        hs.ablate_heads(model, probe, hs.metrics.answer_log_prob)
    targets = torch.full_like(probe.tokens, -1)
    targets[:, -4:-1] = probe.tokens[:, -3:]  # the suffix, which nobody sees before
    asked = hs.probes.from_batch(inputs, targets=targets)
    hs.capture.check_fits(model, asked, answers=True)


def test_scores_and_stacks_see_texts_with_images(loaded: dict[str, Any]) -> None:
    model = loaded["smolvlm"]
    probe = hs.probes.from_batch(inputs_of("smolvlm"))
    whole = hs.score(model, probe, "entropy")["entropy"]
    one = hs.score(model, probe, "entropy", batch_size=1)["entropy"]
    torch.testing.assert_close(torch.tensor(one.mean), torch.tensor(whole.mean))
    changed = dict(inputs_of("smolvlm"))
    changed["pixel_values"] = changed["pixel_values"].flip(-1)
    other = hs.score(model, hs.probes.from_batch(changed), "entropy")["entropy"]
    assert abs(other.mean - whole.mean).max() > 1e-3  # it is the image that is read


def test_what_does_not_fit_is_told_before_it_runs(loaded: dict[str, Any]) -> None:
    llava, inputs = loaded["llava"], inputs_of("llava")
    probe = hs.probes.from_batch(inputs)
    with pytest.raises(InputError, match="reads texts alone"):
        hs.load().run(probe)
    with pytest.raises(InputError, match=r"holds a text, and .* reads images"):
        hs.score(hs.load(vision("vit-bare")), probe, "entropy")
    plain_text = {**inputs, "input_ids": inputs["input_ids"].clamp_max(IMAGE - 1)}
    with pytest.raises(InputError, match="no token 98 that stands for them"):
        llava.run(hs.probes.from_batch(plain_text))
    with pytest.raises(InputError, match="has 3 images for 2 texts"):
        hs.probes.from_batch({**inputs, "pixel_values": torch.zeros(3, 3, 16, 16)})
    unknown = {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    with pytest.raises(InputError, match="without 'mm_token_type_ids'"):
        llava.run(hs.probes.from_batch(unknown))
    grid = torch.tensor([[1, 4, 4]] * 2)
    with pytest.raises(InputError, match="has 48 patches, and 'image_grid_thw' speaks of 32"):
        hs.probes.from_batch({**inputs_of("qwen2_vl"), "image_grid_thw": grid})
    with pytest.raises(InputError, match="not finite"):
        hs.probes.from_batch({**inputs, "pixel_values": inputs["pixel_values"] / 0})
    with pytest.raises(InputError, match=r"cannot put .* into"):
        llava.run(hs.probes.from_batch({**inputs, "input_ids": inputs["input_ids"][:, 1:7]}))


def test_paligemma_is_asked_for_what_decides_its_mask(loaded: dict[str, Any]) -> None:
    """Without segments eager attention and sdpa differ; with them all is as the model's own."""
    model, inputs = loaded["paligemma"], inputs_of("paligemma")
    bare = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with pytest.raises(InputError, match=r"without 'token_type_ids' from left to right"):
        model.run(hs.probes.from_batch(bare))
    text = hs.probes.from_tokens(inputs["input_ids"].clamp_max(90))
    for call in (
        lambda: hs.score(model, text, "entropy"),
        lambda: hs.ablate_heads(model, text, hs.metrics.loss),
        lambda: hs.score(model),
        lambda: model.run(text),
        lambda: model.run(text.tokens, reads={("resid_post", 0): print}, until=("resid_post", 0)),
        lambda: model.forward(text.tokens, edits=[hs.edits.zero("L0H1")]),
    ):
        with pytest.raises(InputError, match="give every text an image"):
            call()
    prompt = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    own = plain(model.module, prompt)
    probe = hs.probes.from_batch(prompt)
    acts = hs.capture.collect(model, probe, batch_size=1)
    torch.testing.assert_close(acts[1].pattern, own.attentions[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.run(probe), own.logits, atol=1e-4, rtol=1e-4)
