"""Texts with pictures: boxes of image tokens by experiment, OCR heads by hand, steering."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

import headscope as hs
from headscope.base.stacks import ImageKeys
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from tests.models.vision import pictures, vision
from tests.models.vision_language import IMAGE, inputs_of, model_of

SQUARE = {"height": 16, "width": 16}


def processor_of(name: str, **settings: Any) -> Any:
    """The family's own image processor, for towers of 16 x 16 pixels, without interpolation."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "llava": (LlavaImageProcessorPil, {"size": {"shortest_edge": 16}, "crop_size": SQUARE}),
        "llava_next": (
            LlavaNextImageProcessorPil,
            {
                "size": {"shortest_edge": 16}, "crop_size": SQUARE,
                "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            },
        ),
        "qwen2_vl": (
            Qwen2VLImageProcessorPil,
            {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 2000},
        ),
        "paligemma": (SiglipImageProcessorPil, {"size": SQUARE}),
        "gemma3": (Gemma3ImageProcessorPil, {"size": SQUARE}),
        "smolvlm": (
            SmolVLMImageProcessorPil,
            {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}},
        ),
    }  # fmt: skip
    kinds["qwen2_5_vl"] = kinds["qwen2_vl"]
    kind, own = kinds[name]
    return kind(**own, resample=0, **settings)


def local(name: str) -> Any:
    """A model whose vision tower does not mix its patches, as its attention writes nothing."""
    module = model_of(name)
    with torch.no_grad():
        for path, one in module.named_modules():
            if "vis" in path and path.endswith(("self_attn.out_proj", "attn.proj")):
                one.weight.zero_()
                one.bias.zero_()
    return hs.load(module, check=False)


def read(name: str, processor: Any, pictures: list[np.ndarray], pieces: int) -> dict[str, Tensor]:
    """What a processor makes of pictures, with a text of so many image tokens around each."""
    nested = [[one] for one in pictures] if name == "smolvlm" else pictures
    found = dict(processor(nested, return_tensors="pt"))
    ids = torch.tensor([[5, *[IMAGE] * pieces, 7, 8]]).repeat(len(pictures), 1)
    found["input_ids"] = ids
    kept = {"input_ids", "pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask"}
    if name.startswith("qwen"):
        found["mm_token_type_ids"] = (ids == IMAGE).long()
        kept.add("mm_token_type_ids")
    if name == "paligemma":
        found["token_type_ids"] = torch.zeros_like(ids)
        kept.add("token_type_ids")
    return {key: value for key, value in found.items() if key in kept}


def entering(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What enters the first block of the language model."""
    seen: list[Tensor] = []
    model.run(
        hs.probes.from_batch(inputs),
        reads={("embed",): lambda view: seen.append(view.value.clone())},
    )
    return seen[0]


# Family, height and width of the picture, tokens that stand for it, and settings of the processor.
CASES: list[tuple[str, tuple[int, int], int, dict[str, Any]]] = [
    ("llava", (40, 80), 16, {}),
    ("llava", (80, 48), 16, {}),
    ("llava", (40, 80), 16, {"do_pad": True}),
    ("paligemma", (40, 80), 16, {}),
    ("gemma3", (48, 96), 4, {}),
    ("qwen2_vl", (48, 80), 28, {}),
    ("qwen2_5_vl", (80, 48), 28, {}),
    ("smolvlm", (64, 96), 4 * 7, {}),
    ("smolvlm", (96, 40), 4 * 7, {}),
    ("llava_next", (64, 64), 16 + 8 * 9, {}),
    ("llava_next", (40, 96), 16 + 4 * 9, {}),
    ("llava_next", (96, 40), 16 + 8 * 5, {}),
    ("llava_next", (48, 64), 16 + 6 * 9, {}),
]


@pytest.mark.parametrize(("name", "size", "pieces", "settings"), CASES, ids=str)
def test_a_change_inside_its_box_changes_an_image_token(
    name: str, size: tuple[int, int], pieces: int, settings: dict[str, Any]
) -> None:
    """Every piece by experiment: through the processor, the tower and the merging of patches."""
    model, processor = local(name), processor_of(name, **settings)
    blank = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    probe = hs.probes.from_batch(read(name, processor, [blank], pieces))
    keys = hs.vision.image_keys(model, probe, sizes=size, processor=processor)
    assert keys.sizes.tolist() == [[list(size)]]
    places = (keys.image[0] >= 0).nonzero()[:, 0].tolist()
    changed, boxes = [blank], []
    for place in places:
        left, top, right, bottom = keys.at(0, place)[1]
        own = blank.copy()
        inside = (
            slice(int(np.ceil(top)), int(bottom) or 1), slice(int(np.ceil(left)), int(right) or 1),
        )  # fmt: skip
        own[inside] = 255 - own[inside]
        changed.append(own)
        boxes.append((inside[1].start, inside[0].start, inside[1].stop, inside[0].stop))
    states = entering(model, read(name, processor, changed, pieces))
    moved = (states[1:] - states[:1]).abs().amax(-1) > 1e-5
    covered = torch.stack([keys.overlap(0, box) > 0 for box in boxes])
    assert bool((moved <= covered).all())  # nothing else moves
    assert bool(moved[range(len(places)), places].all())
    assert bool((moved == covered).float().mean() > 0.98)  # up to pixels that resizing leaves out


def test_boxes_and_keys_are_each_others_inverse() -> None:
    """Two pictures of one text, 16 pieces each, in pictures of 40 x 80 and 8 x 8 pixels."""
    model = hs.load(model_of("llava"), check=False)
    inputs = inputs_of("llava")
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"]], 1)
    pixels = torch.cat([inputs["pixel_values"]] * 2)
    probe = hs.probes.from_batch({"input_ids": ids, "pixel_values": pixels})
    stretched = {"size": SQUARE}
    sizes = [[(40, 80), (8, 8)]] * 2
    keys = hs.vision.image_keys(model, probe, sizes, processor=stretched)
    assert keys.sizes[1].tolist() == [[40, 80], [8, 8]]
    for position in (keys.image[1] >= 0).nonzero()[:, 0].tolist():
        image, box = keys.at(1, position)
        assert keys.keys(1, box, image) == [position]
        assert keys.keys(1, box, image, by="iou", over=0.99) == [position]
    assert keys.at(1, 3) == (0, (0.0, 0.0, 20.0, 10.0))
    assert keys.at(1, 3 + 25 + 5) == (1, (2.0, 2.0, 4.0, 4.0))
    # One piece whole and half of the next.
    assert keys.keys(0, (0, 0, 30, 10)) == [3, 4]
    assert keys.overlap(0, (0, 0, 30, 10))[[3, 4, 5]].tolist() == [1.0, 0.5, 0.0]
    iou = keys.overlap(0, (0, 0, 30, 10), by="iou")[[3, 4]].tolist()
    assert iou == pytest.approx([200 / 300, 100 / 400])
    painted = keys.painted(torch.ones(2, ids.shape[1]), 0, 1, rows=3, columns=5)
    assert painted.shape == (2, 3, 5)
    torch.testing.assert_close(painted.sum((1, 2)), torch.tensor([16.0, 16.0]))
    torch.testing.assert_close(painted, torch.full_like(painted, 16 / 15))


def test_what_does_not_fit_is_told(hand: tuple[Any, hs.Probe, ImageKeys]) -> None:
    model, probe, keys = hand
    for box in ((0, 0, 17, 4), (-1, 0, 4, 4), (4, 0, 4, 4)):
        with pytest.raises(InputError, match=r"is not inside the picture, which is 16 pixels wide"):
            keys.keys(0, box)
    with pytest.raises(InputError, match="not left, top, right and bottom"):
        keys.keys(0, (0, 0, 4))
    with pytest.raises(InputError, match="no picture 1 of text 0"):
        keys.keys(0, (0, 0, 4, 4), 1)
    with pytest.raises(InputError, match="position 0 of text 0 shows no piece"):
        keys.at(0, 0)
    with pytest.raises(InputError, match="there is no position 99"):
        keys.at(0, 99)
    with pytest.raises(InputError, match="1 boxes for 6 texts"):
        keys.evidence([(0, 0, 4, 4)])
    with pytest.raises(InputError, match=r"give processor="):
        hs.vision.image_keys(model, probe, sizes=(40, 80))
    with pytest.raises(InputError, match=r"sizes=.*give two whole numbers from 1 on"):
        hs.vision.image_keys(model, probe, sizes=[1.5, 2])
    with pytest.raises(UnsupportedModelError, match="does not read texts with images"):
        hs.vision.image_keys(hs.load(), probe)
    with pytest.raises(InputError, match="holds no images"):
        hs.vision.image_keys(model, hs.probes.from_tokens(probe.tokens))
    smol = hs.load(model_of("smolvlm"), check=False)
    tiled = hs.probes.from_batch(inputs_of("smolvlm"))
    with pytest.raises(InputError, match="are 3 tiles: give sizes= or tiles= of each picture"):
        hs.vision.image_keys(smol, tiled)
    with pytest.raises(InputError, match=r"are 3 tiles, which tiles=\(3, 1\) do not make"):
        hs.vision.image_keys(smol, tiled, tiles=(3, 1))
    below = hs.vision.image_keys(smol, tiled, tiles=(2, 1))
    assert below.at(0, 7) == (0, (0.0, 16.0, 8.0, 24.0))
    told = hs.vision.image_keys(smol, tiled, (32, 16))
    assert torch.equal(below.boxes[0, 3:15], told.boxes[0, 3:15])
    region = torch.zeros_like(probe.real)
    with pytest.raises(InputError, match="or is empty in a text"):
        hs.vision.ocr_heads(model, probe, region, [[5]] * 6, keys)
    region[:, 3] = True
    with pytest.raises(InputError, match="5 answers for 6 texts"):
        hs.vision.ocr_heads(model, probe, region, [[5]] * 5, keys)
    with pytest.raises(InputError, match="has no tokenizer"):
        hs.vision.ocr_heads(model, probe, region, ["yes"] * 6, keys)
    with pytest.raises(InputError, match="form='free' is unknown"):
        hs.vision.ocr_heads(model, probe, region, [[5]] * 6, keys, form="free")


MARK, WHOLE, LINE = 90, 91, 92


def framed(*cuts: tuple[int, int], words: int = 2) -> Tensor:
    """Pictures in tiles of four tokens, written as the processors of SmolVLM and Idefics 3 do."""
    ids = [5]
    for rows, columns in cuts:
        for row in range(rows):
            for column in range(columns):
                ids += [MARK, 20 + 6 * row + column, *[IMAGE] * 4]
            ids.append(LINE)
        ids += [*[LINE] * (rows > 0), MARK, WHOLE, *[IMAGE] * 4, MARK, *[7] * words]
    return torch.tensor([[*ids, 8]])


def of_tiles(ids: Tensor) -> hs.Probe:
    total = int((ids[0] == IMAGE).sum()) // 4
    return hs.probes.from_batch({"input_ids": ids, "pixel_values": torch.rand(1, total, 3, 16, 16)})


@pytest.mark.parametrize("words", [0, 2])
def test_pictures_cut_into_tiles_are_told_apart(words: int) -> None:
    """Every picture has the boxes that it has alone, where one picture of 5 x 1 tiles would fit."""
    smol = hs.load(model_of("smolvlm"), check=False)
    cuts, sizes = ((2, 1), (0, 0), (1, 2)), ((64, 32), (9, 10), (16, 32))
    probe = of_tiles(framed(*cuts, words=words))
    keys = hs.vision.image_keys(smol, probe, [sizes])
    assert keys.sizes.tolist() == [[list(size) for size in sizes]]
    for number, (cut, size) in enumerate(zip(cuts, sizes, strict=True)):
        alone = of_tiles(framed(cut))
        own = hs.vision.image_keys(smol, alone, size)
        chosen = keys.boxes[0, keys.image[0] == number]
        assert torch.equal(chosen, own.boxes[0, own.image[0] == 0])
        bare = hs.vision.image_keys(smol, alone)  # the words tell rows and columns
        assert bare.sizes.tolist() == [[[16 * max(one, 1) for one in cut]]]
    # Without words between tiles, what is said of every picture decides, and nothing else does.
    adjacent = of_tiles(torch.tensor([[5, *[IMAGE] * 24, 8]]))
    pair = hs.vision.image_keys(smol, adjacent, [[(64, 32), (64, 32)]])
    assert (pair.image[0] == 1).nonzero()[:, 0].tolist() == list(range(13, 25))
    cut = hs.vision.image_keys(smol, adjacent, (64, 32), tiles=(2, 1))
    torch.testing.assert_close(pair.boxes, cut.boxes, equal_nan=True, atol=0, rtol=0)
    with pytest.raises(InputError, match="6 tiles of a text may show 1 or 2 pictures"):
        hs.vision.image_keys(smol, adjacent, (80, 16))
    apart = of_tiles(torch.tensor([[5, *[IMAGE] * 12, 7, *[IMAGE] * 12, 8]]))
    both = hs.vision.image_keys(smol, apart, (80, 16))
    assert both.sizes.tolist() == [[[80, 16]] * 2]


def test_what_contradicts_the_text_of_tiled_pictures_is_told() -> None:
    smol = hs.load(model_of("smolvlm"), check=False)
    probe = of_tiles(framed((2, 1), (2, 1)))
    with pytest.raises(InputError, match=r"picture 0 of text 0 was cut into 2 rows of 1 tiles"):
        hs.vision.image_keys(smol, probe, tiles=(5, 1))
    with pytest.raises(InputError, match=r"which 16 pixels of height and 80 of width are not"):
        hs.vision.image_keys(smol, probe, sizes=(16, 80))
    with pytest.raises(InputError, match=r"for each of 2 pictures in them"):
        hs.vision.image_keys(smol, probe, sizes=[[(64, 32)] * 3])
    with pytest.raises(InputError, match=r"5 tokens stand for pictures whose tiles are 4"):
        hs.vision.image_keys(smol, of_tiles(torch.tensor([[5, *[IMAGE] * 5, 8]])))
    ids = torch.cat([framed((1, 2), (0, 0), words=3), framed((0, 0), (1, 2), words=3)])
    shifted = {"input_ids": ids, "pixel_values": torch.rand(2, 4, 3, 16, 16)}
    keys = hs.vision.image_keys(smol, hs.probes.from_batch(shifted))
    assert keys.sizes.tolist() == [[[16, 32], [16, 16]], [[16, 16], [16, 32]]]
    one = torch.nn.functional.pad(framed((1, 2), words=3), (0, 20), value=7)
    two = torch.nn.functional.pad(framed((0, 0), (0, 0), (0, 0)), (0, 50), value=7)
    uneven = torch.cat([one[:, :28], two[:, :28]])
    probe = hs.probes.from_batch({"input_ids": uneven, "pixel_values": torch.rand(2, 3, 3, 16, 16)})
    with pytest.raises(InputError, match=r"have 1, 3 pictures: give texts with equally many"):
        hs.vision.image_keys(smol, probe)


def test_pictures_are_counted_by_their_pieces() -> None:
    """Texts of one and of three pictures are not two texts of two."""
    llava = hs.load(model_of("llava"), check=False)
    one, three = [*[IMAGE] * 16, *[7] * 32], [IMAGE] * 48
    uneven = {"input_ids": torch.tensor([one, three]), "pixel_values": torch.rand(4, 3, 16, 16)}
    probe = hs.probes.from_batch(uneven)
    for call in (
        lambda: hs.vision.image_keys(llava, probe),
        lambda: llava.run(probe),
        lambda: hs.score(llava, probe, "entropy"),
    ):
        with pytest.raises(InputError, match="text 0 has 16 image tokens and text 1 has 48"):
            call()


BOXES = [(0, 0, 6, 4), (8, 8, 12, 12), (0, 12, 4, 16), (12, 0, 16, 4), (4, 4, 8, 12), (8, 0, 12, 4)]


@pytest.fixture(scope="module")
def hand() -> tuple[Any, hs.Probe, ImageKeys]:
    """Six texts with pictures of 4 x 4 pieces, of 4 x 4 pixels each."""
    model = hs.load(model_of("llava"), check=False)
    probe = hs.probes.from_batch(inputs_of("llava", 6))
    return model, probe, hs.vision.image_keys(model, probe)


def planted(keys: list[list[int]], length: int) -> hs.edits.HeadEdit:
    """L1H2 gives all attention to one key, by text and query; -1 leaves the first token."""
    rows = torch.zeros(len(keys), 1, length, length)
    rows[..., 0] = 1
    for row, own in zip(rows, keys, strict=True):
        for query, key in enumerate(own, length - len(own)):
            if key >= 0:
                row[0, query] = torch.nn.functional.one_hot(torch.tensor(key), length).float()
    return hs.edits.freeze_pattern("L1H2", {1: rows})


@pytest.mark.parametrize("form", ["forced", "decoded"])
def test_hand_made_heads_have_the_scores_that_they_must(
    hand: tuple[Any, hs.Probe, ImageKeys], form: str
) -> None:
    model, probe, keys = hand
    seen = keys.evidence(BOXES)
    assert seen.sum(1).tolist() == [2, 1, 1, 1, 2, 1]
    first = [int(row.int().argmax()) for row in seen]
    texts, said = probe, []
    for _ in range(3):  # what the model itself says, so that both forms are of the same tokens
        said.append(model.run(texts)[:, -1].argmax(-1))
        inputs = {**probe.inputs, "input_ids": torch.cat([probe.tokens, torch.stack(said, 1)], 1)}
        texts = hs.probes.from_batch(inputs)
    answers = torch.stack(said, 1).tolist()
    length = probe.length + 2

    def score(looked: list[list[int]]) -> Any:
        with model.edited([planted(looked, length)]):
            return hs.vision.ocr_heads(model, probe, seen, wanted, keys, form=form)

    if form == "decoded":  # one step: the planted rows are those of a text of one length
        wanted, length = [one[:1] for one in answers], probe.length
        reads = [[key] for key in first]
        with model.edited([planted(reads, length)]):
            inside = model.run(probe)[:, -1].argmax(-1)
        wanted = inside[:, None].tolist()
    else:
        wanted, reads = answers, [[key] * 3 for key in first]
    found = score(reads)
    own = found.score.per_example[1, 2]
    assert own.tolist() == [1.0] * 6
    assert found.frequency[1, 2] == 1.0
    assert found.score.control_per_example[1, 2].tolist() == [0.0] * 6
    assert str(found.heads()[0]) == "L1H2"
    assert found.looked_at(1, "L1H2", keys)[0] == (8.0, 8.0, 12.0, 12.0)
    elsewhere = score([[key - 1 if key > 3 else 15] * len(reads[0]) for key in first])
    own = elsewhere.score.per_example[1, 2]  # some then say something else, and do not count
    np.testing.assert_array_equal(own[~np.isnan(own)], 0.0)
    assert form == "decoded" or not np.isnan(own).any()


def test_different_tokens_count_once(hand: tuple[Any, hs.Probe, ImageKeys]) -> None:
    """Answers of three steps with two different tokens, of which the head reads one, or the same
    one twice."""
    model, probe, keys = hand
    seen = keys.evidence(BOXES)
    first = [int(row.int().argmax()) for row in seen]
    looked = [[key, 0, key] for key in first]
    with model.edited([planted(looked, probe.length + 2)]):
        same = hs.vision.ocr_heads(model, probe, seen, [[5, 6, 5]] * 6, keys)
        other = hs.vision.ocr_heads(model, probe, seen, [[5, 6, 7]] * 6, keys)
        mixed = hs.vision.ocr_heads(model, probe, seen, [[5, 6, 5]] * 6, keys, batch_size=6)
    assert same.score.per_example[1, 2].tolist() == [0.5] * 6
    assert other.score.per_example[1, 2] == pytest.approx([2 / 3] * 6)
    assert mixed.score.mean[1, 2] == 0.5


def test_random_models_read_nothing(hand: tuple[Any, hs.Probe, ImageKeys]) -> None:
    for seed in range(4):
        model = hs.load(model_of("llava", seed + 1), check=False)
        probe = hs.probes.from_batch(inputs_of("llava", 12))
        keys = hs.vision.image_keys(model, probe)
        places = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:12].tolist()
        boxes = [(at % 4 * 4, at // 4 * 4, at % 4 * 4 + 4, at // 4 * 4 + 4) for at in places]
        found = hs.vision.ocr_heads(model, probe, keys.evidence(boxes), [[5, 6]] * 12, keys)
        p = hs.base.statistics.benjamini_hochberg(np.nan_to_num(found.score.p_value, nan=1.0))
        assert p.min() > 0.05
        gaze = hs.vision.image_attention(model, probe, keys).gaze(keys.evidence(boxes))
        assert np.nanmin(gaze.p_value) > 0.05 / 8


def test_attention_on_pictures_is_that_of_the_rows(hand: tuple[Any, hs.Probe, ImageKeys]) -> None:
    model, probe, keys = hand
    rows = hs.capture.collect(model, probe)
    looking = torch.zeros_like(probe.real)
    looking[:, -2:] = True
    looking[0, -3] = True
    found = hs.vision.image_attention(model, probe, keys, looking, batch_size=4)
    pieces = keys.image >= 0
    for layer in range(2):
        whole = rows[layer].pattern * pieces[:, None, None]
        assert found.mass.per_example[layer, :, 0] == pytest.approx(
            whole[0, :, -3:].sum(-1).mean(-1).numpy(), abs=1e-6
        )
        assert found.mass.per_example[layer, :, 3] == pytest.approx(
            whole[3, :, -2:].sum(-1).mean(-1).numpy(), abs=1e-6
        )
        grid = found.of(3, (layer, 1), probe.length - 1, rows=4, columns=4)
        own = rows[layer].pattern[3, 1, -1, pieces[3]].view(4, 4).numpy()
        np.testing.assert_allclose(grid, own, atol=1e-6)
    assert found.queries[0] == tuple(range(probe.length - 3, probe.length))
    last = hs.vision.image_attention(model, probe, keys)
    assert last.queries == ((probe.length - 1,),) * 6
    maps = last.maps(rows=4, columns=4)
    mass = last.mass.per_example[..., 3]
    np.testing.assert_allclose(maps.weights.sum((-2, -1))[3], mass, atol=1e-6)
    hs.plots.head_maps(maps)
    region = keys.evidence(BOXES)
    gaze = last.gaze(region)
    pattern = rows[1].pattern[4, 3, -1]
    share = float((pattern * region[4]).sum() / (pattern * pieces[4]).sum())
    assert gaze.per_example[1, 3, 4] == pytest.approx(share, abs=1e-6)
    with pytest.raises(InputError, match="is not a query"):
        last.of(0, "L0H0", 3)


def test_padding_and_batches_change_no_score() -> None:
    """Texts of two lengths, one padded behind: each as it is alone."""
    model = hs.load(model_of("qwen2_vl"), check=False)
    inputs = inputs_of("qwen2_vl")
    shown = torch.ones_like(inputs["input_ids"])
    shown[1, -2:] = 0
    both = hs.probes.from_batch({**inputs, "attention_mask": shown})
    keys = hs.vision.image_keys(model, both, sizes=(32, 48))
    seen = keys.evidence([(0, 0, 16, 16), (16, 0, 32, 16)])
    every: dict[str, Any] = {"form": "decoded", "recall": -1.0}
    found = hs.vision.ocr_heads(model, both, seen, [[5, 6], [7, 8]], keys, **every)
    alone = {key: inputs[key][1:, :-2] for key in ("input_ids", "mm_token_type_ids")}
    alone["pixel_values"] = inputs["pixel_values"][24:]
    alone["image_grid_thw"] = inputs["image_grid_thw"][1:]
    one = hs.probes.from_batch(alone)
    own = hs.vision.image_keys(model, one, sizes=(32, 48))
    single = hs.vision.ocr_heads(model, one, seen[1:, :-2], [[7, 8]], own, **every)
    assert found.reads[1].tokens == single.reads[0].tokens
    np.testing.assert_array_equal(found.reads[1].looked, single.reads[0].looked)


def test_paligemmas_prefix_does_not_see_the_answer() -> None:
    """What is appended belongs to the suffix: the prompt's rows stay as they are."""
    model = hs.load(model_of("paligemma"), check=False)
    inputs = inputs_of("paligemma")
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    probe = hs.probes.from_batch(inputs)
    from headscope.models.taps import Texts

    grown = model.continued(Texts.of(probe), torch.tensor([[5, 6], [7, 8]]))
    assert grown.inputs["token_type_ids"][:, -2:].tolist() == [[1, 1], [1, 1]]
    torch.testing.assert_close(
        model.run(grown)[:, : probe.length], model.run(probe), atol=1e-4, rtol=1e-4
    )


def test_sinks_give_what_they_have_to_pieces_of_pictures(
    hand: tuple[Any, hs.Probe, ImageKeys],
) -> None:
    model, probe, keys = hand
    rows = torch.tensor([[[[0.5, 0.3, 0.0, 0.2], [0.9, 0.1, 0.0, 0.0]]]])
    sink = torch.tensor([[True, False, False, False]])
    pieces = torch.tensor([[False, False, True, True]])
    edit = hs.edits.redistribute("L0H0", sink, pieces, 0.4)
    expected = [[0.3, 0.3, 0.0, 0.4], [0.9, 0.1, 0.0, 0.0]]  # the second row sees no piece
    np.testing.assert_allclose(edit(0, rows)[0, 0], expected, atol=1e-7)
    assert torch.equal(hs.edits.redistribute("L0H0", sink, pieces, 0)(0, rows), rows)
    shown = hs.probes.from_batch(
        {"input_ids": probe.tokens, **probe.inputs}, marks={"pieces": keys.image >= 0}
    )
    moved = hs.interventions.Redistribute("pieces", share=0.7)
    before = hs.capture.collect(model, shown)[1].pattern
    edit = hs.edits.redistribute("L1H1", probe.position_in_text == 0, keys.image >= 0, 0.7)
    with model.edited([edit]):
        after = hs.capture.collect(model, shown)[1].pattern
    torch.testing.assert_close(after.sum(-1), before.sum(-1))
    torch.testing.assert_close(after[:, 0], before[:, 0])
    torch.testing.assert_close(after[:, 1, 4:, 0], before[:, 1, 4:, 0] * 0.3)
    assert moved.facts == {
        "method": "redistribute", "source": "first", "target": "pieces", "share": 0.7,
    }  # fmt: skip
    assert hs.testing.check_intervention(hs.interventions.Redistribute("second_copy", "rest"))
    assert hs.testing.check_intervention(hs.interventions.Redistribute("second_copy", share=1))
    for share in (-0.1, 1.1, "much"):
        with pytest.raises((InputError, TypeError), match="share"):
            hs.interventions.Redistribute("pieces", share=share)
    with pytest.raises(InputError, match=r"give hs\.interventions\.Redistribute\(target\)"):
        hs.ablate_heads(model, shown, hs.metrics.loss, "redistribute")


def test_steering_heads_that_matter_beats_random_ones() -> None:
    """Induction heads say what they look at, and others do not."""
    bundled = hs.load()
    probe = hs.probes.repeated_tokens(bundled, length=12, batch=4)
    heads = [head for head, _ in hs.score(bundled, probe, "induction")["induction"].top(2)]
    spot, targets = torch.zeros_like(probe.real), torch.full_like(probe.tokens, -1)
    spot[:, 4] = True
    targets[:, -1] = probe.tokens[:, 4]
    probe = replace(probe, targets=targets, next_token=False)
    metric = hs.metrics.answer_log_prob
    found = hs.vision.steer(bundled, probe, metric, heads, spot, share=0.9, draws=9)
    again = hs.vision.steer(bundled, probe, metric, heads, spot, share=0.9, draws=9)
    assert found.effect > 1  # they copy what they look at
    assert found.p_value == pytest.approx(0.1)
    np.testing.assert_array_equal(found.random, again.random)
    direct = hs.ablate_heads(
        bundled, probe, metric, hs.interventions.Redistribute(spot, "rest", 0.9), heads=heads[:1]
    )
    one = hs.vision.steer(bundled, probe, metric, heads[:1], spot, share=0.9, draws=1)
    assert one.effect == pytest.approx(direct.mean[heads[0]], abs=1e-6)
    nothing = hs.vision.steer(bundled, probe, metric, heads, spot, share=0, draws=9)
    assert nothing.effect == 0
    assert nothing.p_value == 1.0
    with pytest.raises(InputError, match="steer fewer"):
        hs.vision.steer(bundled, probe, metric, bundled.shape.heads, spot)


def test_overlap_of_two_sets_of_heads() -> None:
    one = hs.vision.head_overlap(["L0H0", "L0H1", "L1H0"], ["L0H1", "L1H0"], among=8)
    assert [str(head) for head in one.shared] == ["L0H1", "L1H0"]
    assert one.jaccard == pytest.approx(2 / 3)
    assert one.expected == 0.75
    assert one.p_value == pytest.approx(3 / 28)  # two of two among 3 of 8
    none = hs.vision.head_overlap([], ["L0H1"], among=8)
    assert (none.jaccard, none.p_value) == (0.0, 1.0)
    with pytest.raises(InputError, match="more than among=1"):
        hs.vision.head_overlap(["L0H0"], ["L0H1"], among=1)


def test_results_are_shown_drawn_and_come_back_from_files(
    hand: tuple[Any, hs.Probe, ImageKeys], tmp_path: Path
) -> None:
    """Every result of the room: its glance, its numbers, its figures, and itself from a file."""
    model, probe, keys = hand
    vit = hs.load(vision("vit"))
    images = hs.probes.images(vit, pictures(4), labels=[3, 0, 4, 1])
    writes = hs.vision.contributions(vit, images)
    seen = keys.evidence(BOXES)
    results: list[Any] = [
        hs.vision.hops(vit, images),
        hs.vision.class_space(vit, images),
        writes,
        hs.vision.text_span(writes.heads[:, 0, 1], np.eye(writes.whole.shape[1]), 3),
        hs.vision.image_attention(model, probe, keys),
        hs.vision.ocr_heads(model, probe, seen, [[5, 6]] * 6, keys),
        hs.vision.head_overlap(["L0H1", "L1H0"], ["L1H0"], among=8),
        hs.vision.Steering(0.5, np.ones(2), np.array([0.1, 0.2]), 1 / 3, (HeadIndex(0, 1),)),
    ]
    for result in results:
        file = tmp_path / f"{type(result).__name__}.safetensors"
        result.save(file)
        again = type(result).load(file)
        pandas.testing.assert_frame_equal(again.to_pandas(), result.to_pandas())
        assert again.summary() == result.summary() == repr(result)
        assert len(result.summary()) < 1200
        assert "<table" in result._repr_html_()
        assert isinstance(result, hs.base.result.Result)
        assert list(result.columns()) == list(result.to_pandas())
        assert result.sections()[0].title
        for draw in hs.plots.figures(result).values():
            assert draw("light").data
    drawn = [type(one).__name__ for one in results if hs.plots.figures(one)]
    assert drawn == ["HopProfile", "ClassReading", "ImageAttention", "OcrHeads"]
    rest = np.einsum("id,id->i", writes.rest, writes.whole) / (writes.whole**2).sum(1)
    assert float(np.nansum(writes.share) + rest.mean()) == pytest.approx(1.0)
    frame = results[0].to_pandas()
    far = frame.distance * frame.mass / frame.groupby("head").mass.transform("sum")
    by_head = far.groupby(frame["head"]).sum()
    assert by_head["V0H1"] == pytest.approx(float(results[0].range.mean[0, 1]), abs=0.05)
    keys.save(tmp_path / "keys.safetensors")
    assert ImageKeys.load(tmp_path / "keys.safetensors").at(0, 4) == keys.at(0, 4)
    with pytest.raises(InputError, match="holds HeadTexts: read it with"):
        hs.vision.Written.load(tmp_path / "HeadTexts.safetensors")


def test_what_is_no_place_of_a_picture_or_text_is_told(
    hand: tuple[Any, hs.Probe, ImageKeys],
) -> None:
    model, probe, keys = hand
    looks = hs.vision.image_attention(model, probe, keys)
    seen, answers = keys.evidence(BOXES), [[5]] * 6
    vit = hs.load(vision("vit"))
    images = hs.probes.images(vit, pictures(4), labels=[3, 0, 4, 1])
    others = hs.probes.from_batch(inputs_of("llava", 3))
    calls: list[tuple[Any, str]] = [
        (lambda: keys.at(9, 3), r"no position 3 of text 9"),
        (lambda: keys.keys(0, (0, 0, 4, 4), over=-1), r"over=-1: give a share"),
        (lambda: keys.evidence(BOXES, over=2), r"over=2: give a share"),
        (lambda: looks.of(0, "L0H0", rows=0), r"rows=0: give a whole number, 1 at least"),
        (lambda: looks.of(0, "L0H0", image=5), r"no picture 5 of text 0"),
        (lambda: looks.maps(image=-1), r"no picture -1 of text 0"),
        (lambda: looks.of(0, "V0H0"), r"there is no V0H0 in text 0"),
        (lambda: looks.of(9, "L0H0"), r"there is no L0H0 in text 9"),
        (lambda: hs.vision.maps(vit, images, layers=[]), r"names no layer"),
        (lambda: hs.vision.text_span(np.ones((0, 2)), np.eye(2)), r"of 0 images"),
        (lambda: hs.vision.text_span(np.ones((1, 2)), np.eye(2)), r"of 1 images"),
        (
            lambda: hs.vision.identifiability(torch.zeros(2, 3), torch.tensor([1, 7])),
            r"a class is none of 0 to 2",
        ),
        (
            lambda: hs.vision.ocr_heads(model, others, seen[:3], answers[:3], keys),
            r"make them of this probe",
        ),
        (
            lambda: hs.vision.ocr_heads(model, probe, seen, answers, keys, recall=3),
            r"give a share below 1",
        ),
    ]
    for call, said in calls:
        with pytest.raises(InputError, match=said):
            call()
