"""``headscope scan`` of an encoder-decoder: sources, targets, and a page for every stack."""

from pathlib import Path

import pytest
import tokenizers
import transformers

import headscope as hs
from tests.cli.support import run, sentence
from tests.models.seq2seq import module_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART with a tokenizer of words."""
    place = tmp_path_factory.mktemp("bart")
    module_of("bart").save_pretrained(place)
    words = "<s> <pad> </s> <unk> the cat sat on mat dog ran die katze sass auf matte hund lief"
    ids = {word: at for at, word in enumerate(words.split())}
    _, pad, end, unknown, *_others = ids
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=unknown, pad_token=pad, eos_token=end
    ).save_pretrained(place)
    (place / "source.txt").write_text("the cat sat on the mat\nthe dog ran\n", encoding="utf-8")
    (place / "target.txt").write_text("die katze sass auf\ndie hund lief\n", encoding="utf-8")
    return place


def test_scan_scores_every_stack(folder: Path, tmp_path: Path) -> None:
    source, target, out = folder / "source.txt", folder / "target.txt", tmp_path / "run"
    run("scan", folder, "--source", source, "--target", target, "--out", out)
    table = hs.HeadTable.load(out / "table.parquet")
    assert list(table.stacks) == ["encoder", "decoder", "cross"]
    model = hs.load(str(folder), device="cpu")
    probe = hs.probes.translation(model, source, target)
    assert probe.source.tokens[0].tolist() == [4, 5, 6, 7, 4, 8, 2]
    assert probe.targets[1].tolist() == [11, 16, 17, 2, -1]
    own = hs.score(model, probe, "entropy")
    for name in table.stacks:
        found = table.stack(name)["entropy"].mean
        assert found == pytest.approx(own.stack(name)["entropy"].mean, abs=1e-6)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "cross: 2 layers of 4 heads" in page
    assert "encoder: 2 layers of 4 heads" in page
    assert "entropy" in run("show", out)


def test_what_does_not_fit_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    source, short = folder / "source.txt", tmp_path / "short.txt"
    short.write_text("die katze\n", encoding="utf-8")
    for words, why in (
        (("--target", str(source)), "--target is given without --source"),
        (("--source", str(source), "--target", str(short)), "2 sources and 1 targets"),
        (("--source", str(tmp_path / "none.txt")), "none.txt"),
    ):
        assert why in sentence("scan", folder, *words)
    assert "not an encoder-decoder" in sentence("scan", "tiny-llama", "--source", source)
