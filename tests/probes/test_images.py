"""Pictures become what the model's own image processor makes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import headscope as hs
from headscope.errors import InputError

NORMAL = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
STRETCHED = {"do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2, **NORMAL}
CUT_OUT = {
    "do_resize": True,
    "size": {"shortest_edge": 18},
    "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "resample": 3,
    **NORMAL,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of each of two classes, of different sizes."""
    root, drawn = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for at in range(2):
            pixels = drawn.integers(0, 255, (20 + 7 * at, 31, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{at}.png")
    return root


def saved(folder: Path, processor: dict[str, Any] | None) -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    transformers.ViTForImageClassification(config).eval().save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return hs.load(str(folder))


@pytest.mark.parametrize(
    ("name", "processor"), [("ViTImageProcessor", STRETCHED), ("CLIPImageProcessor", CUT_OUT)]
)
def test_pixels_are_those_of_the_image_processor(
    name: str, processor: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    model = saved(tmp_path, {**processor, "image_processor_type": name})
    probe = hs.probes.images(model, pictures)
    files = sorted(pictures.rglob("*.png"))
    own = getattr(transformers, name)(**processor)
    expected = own([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(probe.batch.inputs["pixel_values"], expected, atol=1e-6, rtol=0)
    assert probe.targets[:, 0].tolist() == [0, 0, 1, 1]
    assert "image processor" in str(probe.settings["normalised"])


def test_without_a_processor_values_go_from_minus_one_to_one(
    pictures: Path, tmp_path: Path
) -> None:
    model = saved(tmp_path, None)
    white = np.full((16, 16, 3), 255, dtype=np.uint8)
    probe = hs.probes.images(model, [white, np.zeros_like(white)], labels=["dog", 0])
    assert probe.batch.inputs["pixel_values"].amin((1, 2, 3)).tolist() == [1, -1]
    assert probe.targets[:, 0].tolist() == [1, 0]
    assert probe.settings["normalised"] == "to [-1, 1]"


def test_what_is_no_picture_is_said(pictures: Path, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        hs.probes.images(model, tmp_path / "empty")
    (tmp_path / "empty" / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="not a picture"):
        hs.probes.images(model, tmp_path / "empty")
    with pytest.raises(InputError, match="has no class 'bird'"):
        hs.probes.images(model, pictures, labels=["cat", "cat", "bird", "dog"])
    with pytest.raises(InputError, match="whole numbers from 0 to 255"):
        hs.probes.images(model, [np.zeros((16, 16, 3))])
    with pytest.raises(InputError, match="is not inside the image"):
        hs.probes.images(model, pictures, marks={"cue": (3, 3, 5, 5)})
