"""Vision models against plain transformers: rows, outputs, ablation, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import headscope as hs
from headscope.base.stacks import MaskRule, PatchGrid
from headscope.errors import InputError, UnsupportedModelError
from tests.models.encoders import widened
from tests.models.vision import (
    BUILDS,
    CLASSES,
    HEADS,
    LAYERS,
    SIDE,
    SPECIALS,
    clip,
    clip_text,
    eager_rows,
    pictures,
    plain,
    vision,
)

FAMILIES = sorted(BUILDS)
WITH_CLASSES = ("beit", "beit-shared", "deit", "dinov2", "vit")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return {name: hs.load(vision(name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_outputs_are_the_models_own(loaded: dict[str, Any], name: str) -> None:
    model, pixels = loaded[name], pictures()
    acts = hs.capture.collect(model, hs.probes.from_batch({"pixel_values": pixels}), batch_size=2)
    patterns, (_, outputs) = eager_rows(model.module, pixels), plain(model.module, pixels)
    for layer in range(LAYERS):
        torch.testing.assert_close(acts[layer].pattern, patterns[layer], atol=TOLERANCE, rtol=0)
        size = float(outputs[layer].abs().max())
        torch.testing.assert_close(acts[layer].z, outputs[layer], atol=TOLERANCE * size, rtol=0)
        assert float(patterns[layer].amax(-1).median()) > 0.2  # far from flat


@pytest.mark.parametrize("name", FAMILIES)
def test_stacks_and_positions_have_names(loaded: dict[str, Any], name: str) -> None:
    model = loaded[name]
    assert set(model.stacks) == {"vision"}
    stack = model.stacks["vision"]
    assert (stack.queries, stack.keys, stack.mask) == (
        "patches", "patches", MaskRule("bidirectional"),
    )  # fmt: skip
    assert str(stack.head(1, 2)) == "V1H2"
    assert model.shape.heads[-1] == stack.head(LAYERS - 1, HEADS - 1)
    assert stack.grid.labels == (
        *SPECIALS[name],
        *(f"r{r} c{c}" for r in range(4) for c in range(4)),
    )
    assert "V" in str(hs.score(model, scorers="entropy")["entropy"].top(1)[0][0])


@pytest.mark.parametrize("name", WITH_CLASSES)
@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablations_are_those_of_plain_hooks(loaded: dict[str, Any], name: str, method: str) -> None:
    model, pixels = loaded[name], pictures()
    labels = torch.tensor([3, 0, 4])
    probe = hs.probes.from_batch({"pixel_values": pixels}, labels=labels)
    if method == "mean":  # the engine against whole passes with the same edit
        scores = hs.ablate_heads(model, probe, hs.metrics.js_divergence)
        assert (scores.mean >= 0).all()
        assert (scores.mean > 1e-6).all()
        assert scores.bounds == (None, None)
        return
    scores = hs.ablate_heads(model, probe, hs.metrics.answer_log_prob, method)
    assert scores.stack == "vision"
    for head in model.shape.heads:
        logs = [
            plain(model.module, pixels, off)[0].logits.double().log_softmax(-1)
            for off in ([head], [])
        ]
        effect = (logs[0] - logs[1])[torch.arange(3), labels].mean()
        assert scores.mean[head] == pytest.approx(float(effect), abs=2e-5)


def test_a_head_is_named_with_or_without_its_stack(loaded: dict[str, Any]) -> None:
    probe = hs.probes.random_images(loaded["vit"], 2)
    for name in ("V1H2", "L1H2", (1, 2)):
        scores = hs.ablate_heads(loaded["vit"], probe, hs.metrics.kl_divergence, heads=[name])
        assert scores.n[1, 2] == 2
        assert scores.n.sum() == 2
    with pytest.raises(InputError, match="has no stack 'cross'"):
        hs.ablate_heads(loaded["vit"], probe, hs.metrics.kl_divergence, heads="X1H2")


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip", "beit", "beit-shared"])
def test_models_pass_the_shipped_checks(loaded: dict[str, Any], name: str) -> None:
    report = hs.testing.check_model(loaded[name], raises=False)
    assert not report.failed, str(report)
    limited = {"attribution", "padding left", "padding right"}
    if name not in ("vit", "deit", "beit-shared"):
        limited |= {"unembedding"}
    if "beit" in name:  # its bias has a table column for every head
        limited |= {"pruning"}
    if name not in WITH_CLASSES:
        limited |= {"zero ablation"}
    assert set(report.limited) <= limited


@pytest.mark.parametrize("name", ["beit", "dinov2", "dinov2-registers"])
def test_layer_scale_is_part_of_what_a_head_writes(loaded: dict[str, Any], name: str) -> None:
    """The first block's stream behind attention, with and without a head, by plain hooks."""
    model, pixels = loaded[name], pictures()
    module = model.module
    named = ("0.layernorm_after", "0.norm2")
    (norm,) = (part for path, part in module.named_modules() if path.endswith(named))
    entered: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach()))
    _, outputs = plain(module, pixels)
    plain(module, pixels, [(0, 2)])
    handle.remove()
    written = outputs[0][:, :, 2] @ model.output_weights(0)[2].detach()
    size = float(written.abs().max())
    torch.testing.assert_close(entered[0] - entered[1], written, atol=TOLERANCE * size, rtol=1e-4)
    assert "linear_write" not in model.limits
    write = model.parts.attention_write(0)
    assert write.norm is None
    whole = torch.einsum("bphd,hdm->bpm", outputs[0], model.output_weights(0)) + write.bias
    streams: list[Tensor] = []
    model.run(
        hs.probes.from_batch({"pixel_values": pixels}),
        reads={hs.Tap("resid_pre", 0): lambda view: streams.append(view.value)},
    )
    torch.testing.assert_close(streams[0] + whole, entered[0], atol=1e-4, rtol=1e-4)


def test_a_bias_of_places_is_part_of_the_rows_of_beit(loaded: dict[str, Any]) -> None:
    for name, shared in (("beit", False), ("beit-shared", True)):
        model, pixels = loaded[name], pictures(1)
        body = model.module.beit
        biases = body.shared_position_bias if shared else body.layers[0].relative_position_bias
        table, probe = (
            biases.relative_position_bias_table,
            hs.probes.from_batch({"pixel_values": pixels}),
        )
        own = table.detach().clone()
        before = hs.capture.collect(model, probe, layers=[0])[0].pattern
        with torch.no_grad():
            table[-3] += 2.0  # the class token looking at patches
        after = hs.capture.collect(model, probe, layers=[0])[0].pattern
        with torch.no_grad():
            table.copy_(own)
        raised = torch.cat([before[:, :, :1, :1], before[:, :, :1, 1:] * np.exp(2.0)], -1)
        expected = raised / raised.sum(-1, keepdim=True)
        torch.testing.assert_close(after[:, :, :1], expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(after[:, :, 1:], before[:, :, 1:], atol=TOLERANCE, rtol=0)


def test_metrics_of_embeddings_need_no_head(loaded: dict[str, Any]) -> None:
    pixels = pictures()
    for name, vector in (("clip", "image_embeds"), ("siglip", "pooler_output"), ("vit", None)):
        model = loaded[name]
        probe = hs.probes.from_batch({"pixel_values": pixels}, model=model)
        body = model.module if vector else model.module.base_model

        def pooled(off: Any, body: Any = body, vector: str | None = vector) -> Tensor:
            output = plain(body, pixels, off)[0]
            found: Tensor = output.last_hidden_state[:, 0] if vector is None else output[vector]
            return found.double()

        cosines = hs.ablate_heads(model, probe, hs.metrics.embedding_cosine, "zero")
        lengths = hs.ablate_heads(model, probe, hs.metrics.embedding_distance, "zero")
        for head in ((0, 1), (LAYERS - 1, 3)):
            clean, edited = pooled([]), pooled([head])
            cosine = torch.nn.functional.cosine_similarity(clean, edited).mean()
            assert cosines.mean[head] == pytest.approx(float(cosine) - 1, abs=2e-5)
            distance = float((clean - edited).norm(dim=1).mean())
            assert lengths.mean[head] == pytest.approx(distance, abs=2e-4 * max(1, distance))
        assert "embedding_cosine" in cosines.description


def test_similarity_is_to_the_clean_partner(loaded: dict[str, Any]) -> None:
    model, pixels = loaded["clip"], pictures(4)
    whole = hs.probes.from_batch({"pixel_values": pixels}, model=model)
    probe = hs.probes.paired(whole.examples(slice(0, 2)), whole.examples(slice(2, 4)))
    scores = hs.ablate_heads(model, probe, hs.metrics.similarity, "zero", batch_size=1)
    clean = plain(model.module, pixels)[0].image_embeds.double()
    for head in ((0, 0), (1, 2)):
        edited = plain(model.module, pixels, [head])[0].image_embeds.double()
        cosine = torch.nn.functional.cosine_similarity
        expected = cosine(edited[:2], clean[2:]) - cosine(clean[:2], clean[2:])
        assert scores.mean[head] == pytest.approx(float(expected.mean()), abs=2e-5)
    with pytest.raises(InputError, match=r"probe has none: make one with hs\.probes\.paired"):
        hs.ablate_heads(model, whole, hs.metrics.similarity)
    with pytest.raises(InputError, match="read different things"):
        hs.ablation.run.Measurement.of(
            model, whole, hs.metrics.embedding_cosine, others=[hs.metrics.loss]
        )


def test_embeddings_of_texts_are_pooled_over_real_tokens() -> None:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.4,
    )  # fmt: skip
    model = hs.load(transformers.BertModel(config).eval())
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    probe = hs.probes.from_tokens(tokens, tokens > 0)
    scores = hs.ablate_heads(model, probe, hs.metrics.embedding_distance, "zero")
    assert scores.mean.min() > 1e-4
    by_first = hs.ablate_heads(model, probe, hs.metrics.embedding_distance.pooled("first"), "zero")
    embedded = hs.capture.embeddings(model, probe)
    with torch.no_grad():
        states = model.module(tokens, attention_mask=(tokens > 0).long()).last_hidden_state
    expected = torch.stack([states[0].mean(0), states[1, :2].mean(0)])
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=0)
    first = hs.capture.embeddings(model, probe, "first")
    torch.testing.assert_close(first, states[:, 0], atol=1e-5, rtol=0)
    assert not np.allclose(by_first.mean, scores.mean)
    with pytest.raises(InputError, match="unknown pooling"):
        hs.metrics.embedding_cosine.pooled("max")


def test_the_text_half_of_clip_reads_texts() -> None:
    model = hs.load(clip_text())
    assert model.stacks[""].mask.causal
    tokens = torch.tensor([[0, 7, 9, 1], [0, 12, 13, 1]])
    probe = hs.probes.from_tokens(tokens)
    with torch.no_grad():
        own = model.module(input_ids=tokens).text_embeds
    torch.testing.assert_close(hs.capture.embeddings(model, probe), own, atol=1e-5, rtol=0)
    assert hs.ablate_heads(model, probe, hs.metrics.embedding_cosine).mean.max() <= 0


def siglip() -> Any:
    """Both halves of siglip."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 48,
    }  # fmt: skip
    config = transformers.SiglipConfig(
        vision_config={**sizes, "image_size": SIDE, "patch_size": 4},
        text_config={**sizes, "vocab_size": 60, "max_position_embeddings": 8},
    )
    return transformers.SiglipModel(config)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_both_halves_of_clip_are_loaded_together(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    both = widened(clip() if kind == "clip" else siglip())
    both.save_pretrained(tmp_path)
    for source in (both, tmp_path):
        with pytest.raises(UnsupportedModelError, match=r"two models side by side.*vision\.clip"):
            hs.load(source)
    tokens, pixels = torch.tensor([[0, 7, 9, 1], [0, 12, 13, 1], [0, 5, 5, 1]]), pictures(4)
    with torch.no_grad():
        own = both(input_ids=tokens, pixel_values=pixels)
    for source in (both, tmp_path):
        model = hs.vision.clip(source)
        texts = model.embed(hs.probes.from_tokens(tokens))
        torch.testing.assert_close(texts, own.text_embeds, atol=1e-5, rtol=0)
        classifier = model.classifier(["a", "b", "c"], texts)
        probe = hs.probes.images(classifier, pixels, labels=["b", "a", "c", "b"])
        logits = classifier.run(probe)[:, 0]
        torch.testing.assert_close(logits, own.logits_per_image, atol=1e-4, rtol=1e-5)
    whole = hs.vision.clip(both)
    assert next(whole.text.module.parameters()) is next(both.text_model.parameters())
    scores = hs.ablate_heads(classifier, probe, hs.metrics.answer_log_prob, "zero")
    half = model.vision.module
    for head in ((0, 1), (LAYERS - 1, 3)):
        output, _ = plain(half, pixels, [head])
        image = output.image_embeds if kind == "clip" else output.pooler_output
        cosine = torch.nn.functional.normalize(image, dim=-1) @ texts.T
        edited = (model.scale * cosine + model.bias).double().log_softmax(-1)
        clean = own.logits_per_image.double().log_softmax(-1)
        at = torch.arange(4), torch.tensor([1, 0, 2, 1])
        effect = float((edited[at] - clean[at]).mean())
        assert scores.mean[head] == pytest.approx(effect, abs=1e-4)
    found = hs.vision.importance(classifier, probe)
    assert found["probability_drop"].mean.shape == (LAYERS, HEADS)
    cues = hs.vision.cue_heads(classifier, probe, [True, True, False, False])
    assert np.isfinite(cues.mean).all()
    moved = hs.ablate_heads(classifier, probe, hs.metrics.embedding_cosine, "zero")
    same = hs.probes.images(model.vision, pixels)
    direct = hs.ablate_heads(model.vision, same, hs.metrics.embedding_cosine, "zero")
    np.testing.assert_allclose(moved.mean, direct.mean, atol=1e-6)
    with pytest.raises(InputError, match="2 different names for 3 texts"):
        model.classifier(["a", "b", "b"], texts)
    with pytest.raises(InputError, match="have 5 numbers each"):
        model.classifier(["a"], torch.ones(1, 5))
    with pytest.raises(InputError, match="has no tokenizer"):
        model.embed(["a cat"])
    with pytest.raises(UnsupportedModelError, match="not a model of images beside one of texts"):
        hs.vision.clip(hs.load().module)


def test_a_rank_one_head_of_clip_is_named_by_its_text() -> None:
    """Writes along one text of the pool, as the whole of clip embeds it."""
    torch.manual_seed(5)
    model = hs.vision.clip(widened(clip()))
    tokens = torch.randint(3, 60, (20, 4), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 1
    pool = model.embed(hs.probes.from_tokens(tokens))
    probe = hs.probes.images(model.vision, pictures(6))
    parts = hs.vision.contributions(model.vision, probe)
    assert parts.heads.shape[-1] == pool.shape[1]
    writes = np.outer(parts.heads[:, 0, 0, 0], pool[7].numpy())
    span = hs.vision.text_span(writes, pool, 3)
    assert span.texts[0] == 7
    assert span.explained[0] == pytest.approx(1.0)
    np.testing.assert_allclose(span.reconstruction, writes, atol=1e-6)


def test_windows_of_patches_are_refused() -> None:
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    with pytest.raises(UnsupportedModelError, match="within windows of patches"):
        hs.load(transformers.SwinModel(config).eval())


def test_images_and_texts_keep_to_their_models(loaded: dict[str, Any]) -> None:
    vit, text = loaded["vit"], hs.load()
    seen = hs.probes.from_batch({"pixel_values": pictures()})
    said = hs.probes.random_tokens(text, length=5)
    for call in (hs.score, hs.capture.collect):
        with pytest.raises(InputError, match=r"holds images, and .* reads texts"):
            call(text, seen)
        with pytest.raises(InputError, match=r"holds a text, and .* reads images"):
            call(vit, said)
    with pytest.raises(InputError, match="reads texts"):
        hs.ablate_heads(text, seen, hs.metrics.kl_divergence)
    with pytest.raises(UnsupportedModelError, match="images are for a vision model"):
        hs.probes.images(text, pictures())
    for pixels, words in (
        (torch.zeros(2, 3, 8, 8), "8 x 8"),
        (torch.zeros(2, 1, SIDE, SIDE), "1 channels"),
    ):
        with pytest.raises(InputError, match=words):
            hs.score(vit, hs.probes.from_batch({"pixel_values": pixels}))
        with pytest.raises(InputError, match=words):
            vit.run(hs.probes.from_batch({"pixel_values": pixels}))
    with pytest.raises(InputError, match="cut into patches for another model"):
        hs.score(loaded["deit"], hs.probes.images(vit, pictures()))
    with pytest.raises(InputError, match=f"label 7, but .* has classes 0 to {CLASSES - 1}"):
        hs.ablate_heads(vit, hs.probes.images(vit, pictures(1), [7]), hs.metrics.loss)
    for scorer in ("previous_token", "induction", "local_window", "delimiter"):
        with pytest.raises(UnsupportedModelError, match="reads images"):
            hs.score(vit, scorers=scorer)
    with pytest.raises(UnsupportedModelError, match="reads texts"):
        hs.score(text, scorers="patch_neighbours")
    with pytest.raises(UnsupportedModelError, match="has no classification head"):
        hs.ablate_heads(loaded["vit-bare"], seen, hs.metrics.kl_divergence)


def test_a_plain_scan_scores_what_makes_sense(loaded: dict[str, Any]) -> None:
    common = {"current_token", "first_token", "attention_distance", "entropy", "patch_neighbours"}
    for name, more in (
        ("vit", {"class_token", "direct_logit_attribution"}),
        ("dinov2-registers", {"class_token", "registers"}),
        ("siglip", set()),
    ):
        table = hs.score(loaded[name])
        assert set(table) == common | more
        assert table["attention_distance"].unit == "patches"
        assert table["entropy"].provenance.probe["kind"] == "random_images"


def test_scores_are_what_whole_patterns_give(loaded: dict[str, Any]) -> None:
    model = loaded["dinov2-registers"]
    probe, grid = hs.probes.random_images(model, 3), model.stacks["vision"].grid
    wanted = ["patch_neighbours", "class_token", "registers", "attention_distance", "entropy"]
    table = hs.score(model, probe, wanted, max_tokens_per_chunk=7)
    acts = hs.capture.collect(model, probe)
    place = [(at // 4, at % 4) for at in range(16)]
    for layer in range(LAYERS):
        pattern = acts[layer].pattern.double()[:, :, grid.first :]
        own = pattern[..., grid.first :]
        near = torch.tensor(
            [[max(abs(a - c), abs(b - d)) == 1 for c, d in place] for a, b in place]
        )
        far = torch.tensor(
            [[((a - c) ** 2 + (b - d) ** 2) ** 0.5 for c, d in place] for a, b in place]
        )
        expected = {
            "patch_neighbours": (own * near).sum(-1),
            "class_token": pattern[..., 0],
            "registers": pattern[..., 1:3].sum(-1),
            "attention_distance": (own * far).sum(-1) / own.sum(-1),
            "entropy": -torch.special.xlogy(pattern, pattern).sum(-1),
        }
        for name, values in expected.items():
            found = torch.tensor(table[name].mean[layer])
            torch.testing.assert_close(found, values.mean((0, 2)), atol=1e-6, rtol=1e-5)


def test_what_needs_no_code_of_its_own_carries_over(loaded: dict[str, Any], tmp_path: Path) -> None:
    model = loaded["vit"]
    probe = hs.probes.images(model, pictures(4), [0, 1, 2, 3])
    pair = hs.probes.paired(probe, hs.probes.images(model, pictures(4, seed=1)))
    grid = hs.patch_activations(model, pair, hs.metrics.loss, ("layer", "position"))
    assert grid.labels[1] == model.stacks["vision"].grid.labels
    importance = hs.pruning.gradient_importance(model, probe, hs.metrics.loss)
    assert str(importance.top(1)[0][0]).startswith("V")
    estimate = hs.estimate_heads(model, probe, hs.metrics.loss, baseline="zero", steps=8)
    assert estimate.mean.shape == (LAYERS, HEADS)
    smaller = hs.prune(model, ["V0H1", "V1H0"])
    with torch.no_grad():
        logits = smaller(pixel_values=probe.inputs["pixel_values"]).logits
    expected, _ = plain(model.module, probe.inputs["pixel_values"], [(0, 1), (1, 0)])
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    table = hs.score(model, probe, ["entropy", "class_token"])
    table.save(tmp_path / "table.parquet")
    again = hs.HeadTable.load(tmp_path / "table.parquet")
    assert again["entropy"].stack == "vision"
    assert again["entropy"].unit == "nats"
    hs.plots.heatmap(again["entropy"])
    probe.save(tmp_path / "probe")
    kept = type(probe).load(tmp_path / "probe")
    assert kept.grid == probe.grid
    assert torch.equal(torch.as_tensor(kept.inputs["pixel_values"]), probe.inputs["pixel_values"])


def test_a_folder_opens_with_the_head_that_it_was_saved_with(
    tmp_path: Path, loaded: dict[str, Any]
) -> None:
    for name, kind in (("vit", "ViTForImageClassification"), ("siglip", "SiglipVisionModel")):
        loaded[name].module.save_pretrained(tmp_path / name)
        again = hs.load(tmp_path / name)
        assert type(again.module).__name__ == kind
        assert again.image_processor is None


def test_the_grid_is_measured(loaded: dict[str, Any]) -> None:
    """A model whose patches run column by column is not taken for one that runs row by row."""
    module = vision("vit-bare")
    cut = module.embeddings.patch_embeddings
    turned = cut.register_forward_pre_hook(lambda _cut, args: (args[0].transpose(2, 3),))
    with pytest.raises(UnsupportedModelError, match="row by row"):
        hs.load(module)
    turned.remove()
    assert loaded["vit-bare"].stacks["vision"].grid == PatchGrid(4, 4, 4, 4, 3, ("class",))
