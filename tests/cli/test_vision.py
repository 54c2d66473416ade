"""``headscope scan`` of a vision model on a folder of pictures."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

import headscope as hs
from tests.cli.support import run, sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT, and pictures of its two classes."""
    place, drawn = tmp_path_factory.mktemp("vit"), np.random.default_rng(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
        initializer_range=0.4,
    )
    transformers.ViTForImageClassification(config).eval().save_pretrained(place)
    for name in ("cat", "dog"):
        (place / "pictures" / name).mkdir(parents=True)
        for at in range(2):
            pixels = drawn.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "pictures" / name / f"{at}.png")
    return place


def test_scan_scores_pictures(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("scan", folder, "--images", folder / "pictures", "--out", out)
    table = hs.HeadTable.load(out / "table.parquet")
    assert list(table.stacks) == ["vision"]
    model = hs.load(str(folder), device="cpu")
    own = hs.score(model, hs.probes.images(model, folder / "pictures"), "entropy")
    assert table["entropy"].mean == pytest.approx(own["entropy"].mean, abs=1e-6)
    assert table["entropy"].n.max() == 4
    page = (out / "index.html").read_text(encoding="utf-8")
    assert ">V1H2<" in page
    assert "no patch neighbours heads" in run("show", out)


def test_scan_without_pictures_takes_random_ones(folder: Path) -> None:
    assert "no patch neighbours heads" in run("scan", folder)


def test_what_does_not_fit_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    pictures = folder / "pictures"
    assert "reads texts" in sentence("scan", "tiny-llama", "--images", pictures)
    assert "no folder of images" in sentence("scan", folder, "--images", tmp_path / "none")
    assert "both name what is run" in sentence(
        "scan", folder, "--images", pictures, "--source", tmp_path / "a.txt"
    )
