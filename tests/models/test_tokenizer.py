"""A folder without tokenizer files has no tokenizer; with them it has that one."""

from pathlib import Path

import pytest

import headscope as hs
from headscope.errors import InputError
from tests.models.families import VOCAB, build


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2", "gemma2", "gpt_neox"])
def test_weights_alone_have_no_tokenizer_and_take_probes_of_tokens(
    tmp_path: Path, family: str
) -> None:
    build(family).save_pretrained(tmp_path)
    model = hs.load(tmp_path, device="cpu")
    assert model.tokenizer is None
    probe = hs.probes.repeated_tokens(model, length=5, batch=2)
    assert probe.tokens.shape[1] >= 10
    assert int(probe.tokens.max()) < VOCAB
    assert hs.score(model, probe, ["induction"])["induction"].mean.shape == (3, 4)
    with pytest.raises(InputError, match="tokenizer"):
        hs.probes.text(model, ["some words"])


def test_a_saved_tokenizer_comes_with_its_model(tmp_path: Path) -> None:
    own = hs.load().tokenizer
    build("gpt2").save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    found = hs.load(tmp_path, device="cpu").tokenizer
    assert found.encode("a small text") == own.encode("a small text")
