"""Readings of vision models, on models and numbers whose answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

import headscope as hs
from headscope.base.stacks import PatchGrid
from headscope.errors import InputError, UnsupportedModelError
from headscope.table import AttentionMaps
from headscope.vision import HopProfile
from tests.models.vision import CLASSES, HEADS, LAYERS, pictures, plain, vision


@pytest.fixture(scope="module")
def vit() -> Any:
    return hs.load(vision("vit"))


@pytest.fixture(scope="module")
def probe(vit: Any) -> Any:
    return hs.probes.images(vit, pictures(4), labels=[3, 0, 4, 1])


def test_importance_is_that_of_plain_hooks(vit: Any, probe: Any) -> None:
    table = hs.vision.importance(vit, probe, batch_size=3)
    labels = torch.tensor([3, 0, 4, 1])
    clean = plain(vit.module, pictures(4), [])[0].logits.double().softmax(-1)
    at = torch.arange(4)
    for head in ((0, 1), (LAYERS - 1, 2)):
        edited = plain(vit.module, pictures(4), [head])[0].logits.double().softmax(-1)
        drop = (clean - edited)[at, labels].mean()
        right = [(one.argmax(-1) == labels).double().mean() for one in (edited, clean)]
        middle = (clean + edited) / 2
        parts = [(one * (one / middle).log()).sum(-1) / 2 for one in (clean, edited)]
        assert table["probability_drop"].mean[head] == pytest.approx(float(drop), abs=1e-5)
        assert table["accuracy_change"].mean[head] == pytest.approx(float(right[0] - right[1]))
        js = float((parts[0] + parts[1]).mean())
        assert table["output_divergence"].mean[head] == pytest.approx(js, abs=1e-5)
    assert table["probability_drop"].stack == "vision"


def test_a_head_that_writes_nothing_matters_to_nothing(probe: Any) -> None:
    module = vision("vit")
    width = module.config.hidden_size // HEADS
    written = [one for name, one in module.named_parameters() if "o_proj.weight" in name]
    with torch.no_grad():
        for weight in written:
            weight[:, width : 2 * width] = 0
    table = hs.vision.importance(hs.load(module), probe, heads=["V0H1", "V1H1", "V1H0"])
    for name in table:
        np.testing.assert_allclose(table[name].mean[:, 1], 0, atol=1e-6)
    assert np.isnan(table["accuracy_change"].mean[0, 0])


def test_ranks_count_from_one_within_layers_and_over_all() -> None:
    values = np.array([[[3.0], [1.0], [np.nan]], [[2.0], [9.0], [2.0]]])
    scores = hs.HeadScores.from_examples("mine", values, kv_heads=3, unit="share")
    within, overall = hs.vision.ranks(scores)
    assert within.tolist() == [[1, 2, 3], [2, 1, 3]]
    assert overall.tolist() == [[2, 5, 6], [3, 1, 4]]


def test_uniform_attention_has_the_ranges_of_its_grid() -> None:
    module = vision("vit-bare")
    with torch.no_grad():
        for name, one in module.named_parameters():
            if "q_proj" in name:
                one.zero_()
    model = hs.load(module)
    found = hs.vision.hops(model, hs.probes.random_images(model, 2), batch_size=1)
    grid: PatchGrid = model.stacks["vision"].grid
    places = [(r, c) for r in range(grid.rows) for c in range(grid.columns)]
    apart = np.array([[max(abs(a - c), abs(b - d)) for c, d in places] for a, b in places])
    even = 1 / grid.length
    np.testing.assert_allclose(found.strength, even, rtol=1e-4)
    for hop in range(4):
        mass = (apart == hop).sum() / len(places) * even
        np.testing.assert_allclose(found.mass[..., hop], mass, rtol=1e-4)
    np.testing.assert_allclose(found.range.mean, apart.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.class_column, even, rtol=1e-4)
    np.testing.assert_allclose(found.class_row[..., 0], 16 * even, rtol=1e-4)
    np.testing.assert_allclose(found.class_row.sum(-1), 1, rtol=1e-4)
    # From the middle of a 3 x 3 grid, 8 of 9 patches are one hop away.
    assert (PatchGrid(3, 3, 4, 4).offsets(torch.tensor([4])).abs().amax(-1) == 1).sum() == 8


def test_hops_and_maps_are_those_of_whole_patterns(vit: Any, probe: Any) -> None:
    acts = hs.capture.collect(vit, probe)
    found: HopProfile = hs.vision.hops(vit, probe, batch_size=3)
    maps = hs.vision.maps(vit, probe, batch_size=3)
    patches = hs.vision.maps(vit, probe, "patch", layers=[1])
    where = vit.stacks["vision"].grid.places[1:].double()
    apart = (where[:, None] - where[None]).abs().amax(-1)
    for layer in range(LAYERS):
        between = acts[layer].pattern[:, :, 1:, 1:].double()
        reach = (between * apart).sum((-1, -2)) / between.sum((-1, -2))
        np.testing.assert_allclose(found.range.mean[layer], reach.mean(0), rtol=1e-4)
        first = acts[layer].pattern[:, :, 0, 1:].unflatten(-1, (4, 4))
        np.testing.assert_allclose(maps.weights[:, layer], first, atol=1e-6)
    mean = acts[1].pattern[:, :, 1:, 1:].mean(2).unflatten(-1, (4, 4))
    np.testing.assert_allclose(patches.weights[:, 0], mean, atol=1e-6)
    assert str(patches.head(0, 2)) == "V1H2"
    np.testing.assert_array_equal(maps.of(2, "V1H2"), maps.weights[2, 1, 2])


def test_heads_and_the_rest_sum_to_the_models_own_vector(vit: Any) -> None:
    for name in ("clip", "vit", "dinov2"):
        model = vit if name == "vit" else hs.load(vision(name))
        seen = hs.probes.random_images(model, 3)
        if "linear_write" in model.limits:
            with pytest.raises(UnsupportedModelError, match="z @ W_O"):
                hs.vision.contributions(model, seen)
            continue
        try:
            found = hs.vision.contributions(model, seen, batch_size=2)
        except UnsupportedModelError:
            assert name == "dinov2"  # whose classifier reads the mean of patches too
            continue
        output = plain(model.module, seen.inputs["pixel_values"], [])[0]
        own = (output.image_embeds if name == "clip" else output.logits).double()
        own = own / own.norm(dim=1, keepdim=True)
        np.testing.assert_allclose(found.whole, own, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found.whole, axis=1), 1)
    # What a head adds is what its zero ablation takes from the sum, if nothing reads it after.
    head = (LAYERS - 1, 2)
    parts = hs.vision.contributions(vit, seen := hs.probes.random_images(vit, 3), unit=False)
    space = vit.unembedding
    acts = hs.capture.collect(vit, seen)
    write = acts[head[0]].z[:, 0, head[1]] @ vit.output_weights(head[0])[head[1]]
    streams: list[torch.Tensor] = []
    vit.run(seen, reads={("final_resid", None): lambda view: streams.append(view.value.clone())})
    stream = streams[0][:, 0]
    sigma = (stream.var(-1, unbiased=False) + space.epsilon).sqrt()[:, None]
    logits = ((write - write.mean(-1, keepdim=True)) / sigma * space.gain) @ space.W_U.T
    np.testing.assert_allclose(parts.heads[:, head[0], head[1]], logits.detach(), atol=1e-4)


def test_class_space_reads_ranks_of_the_true_class(vit: Any, probe: Any) -> None:
    found = hs.vision.class_space(vit, probe, batch_size=3)
    labels = torch.tensor([3, 0, 4, 1])
    logits = plain(vit.module, pictures(4), [])[0].logits
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found.residual[-1] == pytest.approx(float((1 - rank / CLASSES).mean()))
    parts = hs.vision.contributions(vit, probe, unit=False).heads[:, 1, 2]
    own = parts[np.arange(4), labels][:, None]
    assert found.heads.mean[1, 2] == pytest.approx((1 - (parts > own).sum(1) / CLASSES).mean())
    assert found.heads.null[0, 0] == pytest.approx((CLASSES + 1) / (2 * CLASSES))
    assert found.residual.shape == (LAYERS + 1,)
    for values in (found.change_rate, found.attention_match, found.mlp_match, found.attention):
        assert ((values >= 0) & (values <= 1)).all()
    best = hs.vision.identifiability(torch.tensor([[0.0, 5.0]]), torch.tensor([1]))
    worst = hs.vision.identifiability(torch.tensor([[0.0, 5.0]]), torch.tensor([0]))
    assert (float(best), float(worst)) == (1.0, 0.5)


def test_text_span_recovers_what_a_head_writes() -> None:
    draw = np.random.default_rng(0)
    texts = draw.normal(size=(12, 8))
    one = hs.vision.text_span(np.outer(draw.normal(size=30), texts[7]), texts, 3)
    assert one.texts == (7,)
    assert one.explained[0] == pytest.approx(1)
    np.testing.assert_allclose(
        one.reconstruction, hs.vision.text_span(one.reconstruction, texts, 3).reconstruction
    )
    # Orthogonal texts come in the order of the deviation along them, and rebuild everything.
    across = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    sizes = np.array([0.5, 3.0, 0.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    writes = draw.normal(size=(4000, 8)) * sizes @ across + 5 * across[0]
    found = hs.vision.text_span(writes, across, 8)
    assert found.texts == (1, 3, 4, 0)
    np.testing.assert_allclose(found.deviation, [3, 2, 1, 0.5], rtol=0.1)
    assert (np.diff(found.explained) > 0).all()
    np.testing.assert_allclose(found.reconstruction, writes, atol=1e-8)
    assert found.named([f"text {n}" for n in range(8)])[0][0] == "text 1"
    # Long texts weigh more; no text is chosen twice; constant writes say nothing.
    long = hs.vision.text_span(writes, np.concatenate([across, 10 * across[[4]]]), 9)
    assert (long.texts[0], len(set(long.texts))) == (8, len(long.texts))
    assert hs.vision.text_span(np.ones((5, 8)), texts).texts == ()
    with pytest.raises(InputError, match=r"\[image d\] and \[text d\]"):
        hs.vision.text_span(writes, torch.tensor(texts[:, :3]))
    with pytest.raises(InputError, match="not finite"):
        hs.vision.text_span(writes * np.nan, texts)


def test_a_head_that_carries_a_cue_is_told_from_others() -> None:
    """A linear model in which one head reads the cue and another the shape."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=8, patch_size=4, num_channels=1, num_labels=2, qkv_bias=False,
    )  # fmt: skip
    module = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for name, one in module.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                one.fill_(1.0)
        named = dict(module.named_parameters())
        patches = next(one for name, one in named.items() if "patch_embeddings" in name)
        patches[0, 0, 0, 0], patches[1, 0, 0, 1] = 4.0, 4.0  # shape and cue in two directions
        for name, one in named.items():
            if "v_proj.weight" in name:
                one[0, 0], one[4, 1] = 1.0, 1.0  # head 0 moves the shape, head 1 the cue
            if "o_proj.weight" in name:
                one[2, 0], one[3, 4] = 1.0, 0.5
        head = next(one for name, one in named.items() if name == "classifier.weight")
        head[1, 2:4], head[0, 2:4] = 1.0, -1.0
    draw = torch.Generator().manual_seed(0)
    classes = torch.tensor([0, 1] * 8)
    wrong = torch.tensor([False] * 8 + [True] * 8)
    sign = (2 * classes - 1).float()
    # Patches without shape or cue are empty: the norm before attention would enlarge noise.
    size = 3 + 0.3 * torch.randn(2, 16, generator=draw)
    pixels = torch.zeros(16, 1, 8, 8)
    pixels[:, 0, 0, 0] = size[0] * sign
    pixels[:, 0, 0, 1] = size[1] * sign * torch.where(wrong, -1, 1)
    model = hs.load(module)
    seen = hs.probes.images(model, pixels, labels=classes.tolist())
    scores = hs.vision.cue_heads(model, seen, wrong)
    assert scores.mean[0, 1] > 0.1 > scores.mean[0, 0]  # the shape helps where the cue misleads
    assert scores.p_value[0, 1] < 0.01
    with pytest.raises(InputError, match="two or more of either kind"):
        hs.vision.cue_heads(model, seen, [True] * 16)


def test_pictures_hold_small_images_and_escaped_words(vit: Any, probe: Any, tmp_path: Any) -> None:
    maps = hs.vision.maps(vit, probe)
    grid = hs.plots.head_maps(maps)
    assert list(hs.plots.figures(maps)) == [""]
    assert np.nanmax(grid.data[0].z) == pytest.approx(1)
    image = (np.random.default_rng(0).random((900, 1200, 3)) * 255).astype(np.uint8)
    boxes = np.array([[0.25, 0.0, 0.5, 0.5]])
    laid = hs.plots.image_overlay(
        image, maps.of(0, "V1H2"), title="<script>x</script>", caption="<b onclick=y>", boxes=boxes
    )
    written = laid.to_json()
    assert "<script>" not in written
    assert "<b onclick" not in written
    assert len(laid.layout.images[0].source) < 500_000
    assert laid.layout.shapes[0].x0 == 1
    assert laid.layout.shapes[0].y1 == 2
    maps.save(tmp_path / "maps.json")
    again = AttentionMaps.load(tmp_path / "maps.json")
    np.testing.assert_array_equal(again.weights, maps.weights)
    assert "V" in maps.summary()
    with pytest.raises(InputError, match="not inside the image"):
        hs.plots.image_overlay(image, maps.of(0, "V1H2"), boxes=np.array([[0.5, 0, 1.5, 1]]))
    with pytest.raises(InputError, match="no map of V7H0"):
        maps.of(0, "V7H0")


def test_what_is_not_asked_of_texts_is_told(vit: Any, probe: Any) -> None:
    text = hs.load()
    for call in (hs.vision.importance, hs.vision.hops, hs.vision.maps, hs.vision.contributions):
        with pytest.raises(UnsupportedModelError, match="needs an image model"):
            call(text, probe)
    bare = hs.load(vision("vit-bare"))
    with pytest.raises(UnsupportedModelError, match="no classification head"):
        hs.vision.importance(bare, hs.probes.random_images(bare, 2))
    with pytest.raises(InputError, match="every image needs its class"):
        hs.vision.importance(vit, hs.probes.random_images(vit, 2))
    with pytest.raises(InputError, match="no mark 'needle'"):
        hs.vision.maps(vit, probe, "needle")
    with pytest.raises(UnsupportedModelError, match="more than a norm"):
        hs.vision.contributions(hs.load(vision("siglip")), hs.probes.random_images(vit, 2))
