"""``headscope patch`` as a user meets it."""

import json
from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope.table import EffectGrid
from tests.cli.support import run, sentence


def test_e16_a_run_leaves_numbers_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("patch", "tiny-gpt2", "--site", "mlp_out", "--examples", "3", "--out", str(out))
    rows = json.loads(run(*options, "--json"))
    model = hs.load("tiny-gpt2")
    probe = hs.probes.pairs(model, "ioi", batch=3)
    expected = hs.patch_stream(
        model, probe, hs.metrics.logit_difference, "mlp_out", direction="denoise"
    )
    assert len(rows) == expected.mean.size
    np.testing.assert_allclose([row["mean"] for row in rows], expected.mean.ravel(), atol=1e-5)
    saved = EffectGrid.load(out / "effects.safetensors")
    np.testing.assert_allclose(saved.mean, expected.mean, atol=1e-5)
    assert [one.stem for one in (out / "pictures").iterdir()] == ["effects"]
    assert json.loads((out / "run.json").read_text())["settings"]["site"] == "mlp_out"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--site", "mlp"), "unknown site of the residual stream 'mlp'"),
        (("--direction", "both"), "unknown direction 'both'"),
        (("--task", "ioj"), "ioj"),
        (("--overwrite",), "--overwrite needs --out"),
    ],
)
def test_e16_mistakes_are_one_sentence(options: tuple[str, ...], said: str) -> None:
    assert said in sentence("patch", "tiny-gpt2", *options)
