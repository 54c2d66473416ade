"""Syntax heads: CoNLL-U by hand, pieces and words, a wired head that knows every tree, a probe."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import headscope as hs
from headscope.errors import InputError
from headscope.models.bundled import tasks
from headscope.syntax import Sentence, Treebank

UD = """# sent_id = 1
# text = Vámonos al mar.
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\t_\t_\t5\tcase\t_\t_
4\tel\tel\tDET\t_\t_\t5\tdet\t_\t_
5\tmar\tmar\tNOUN\t_\t_\t1\tobl\t_\tSpaceAfter=No
5.1\tnada\t_\t_\t_\t_\t_\t_\t_\t_
6\t.\t.\tPUNCT\t_\t_\t1\tpunct\t_\tSpaceAfter=No

"""
WORDS = ("one", "two", "three", "four", "banana")  # the last in three pieces
TREE = (1, -1, 1, 5, 5, 2)  # one fixed tree of six words
NAMES = ("det", "root", "obj", "det", "amod", "nmod")


def tokenizer() -> Any:
    known = {name: at for at, name in enumerate(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS[:4], "ba", "##na"])}  # fmt: skip
    made = Tokenizer(models.WordPiece(known, **{"unk_token": "[UNK]"}))
    made.normalizer = normalizers.Replace("*", "")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def bert(wired: bool = False) -> Any:
    """An encoder; wired, head 1 goes to each word's head in TREE and head 0 the other way."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=32, num_hidden_layers=1 if wired else 2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=24, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    if wired:
        embed, own = model.bert.embeddings, model.bert.encoder.layer[0].attention.self
        with torch.no_grad():
            embed.word_embeddings.weight.mul_(0.001)
            embed.token_type_embeddings.weight.zero_()
            embed.position_embeddings.weight.zero_()
            embed.position_embeddings.weight[:16, :16] = torch.eye(16)
            for part in (own.query, own.key):
                part.weight.zero_()
                part.bias.zero_()
            own.key.weight[:16, :16] = own.key.weight[16:, :16] = torch.eye(16)
            for word, head in enumerate(TREE):
                if head >= 0:
                    own.query.weight[16 + 1 + head, 1 + word] = 20.0  # to its head
                    own.query.weight[1 + word, 1 + head] = 20.0  # from its head
    return hs.load(model, tokenizer=tokenizer())


def trees(count: int = 30, words: tuple[str, ...] = WORDS[:4]) -> list[Sentence]:
    rng = Random(1)
    return [Sentence.of_words(rng.choices(words, k=6), TREE, NAMES) for _ in range(count)]


def test_conllu_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "es.conllu"
    file.write_text(UD + UD, encoding="utf-8")
    first, second = hs.syntax.read_conllu(file)
    assert first == second
    assert first.text == "Vámonos al mar."
    assert [first.text[a:b] for a, b in first.spans] == [
        "Vámonos", "Vámonos", "al", "al", "mar", "."
    ]  # fmt: skip
    assert first.heads == (-1, 0, 4, 4, 0, 0)
    assert first.relations == ("root", "obj", "case", "det", "obl", "punct")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1\tA\t_\t_\t_\t_\t0\troot\t_", "line 1 of bad.conllu has 9 columns"),
        ("1\tA\t_\t_\t_\t_\tx\troot\t_\t_", "the head 'x'"),
        ("1\tA\t_\t_\t_\t_\t3\tnsubj\t_\t_", "has the head 3, and there are words 1 to 1"),
        ("2\tA\t_\t_\t_\t_\t0\troot\t_\t_", "word 1 was expected"),
        ("# nothing", "holds no sentence"),
    ],
)
def test_what_is_not_conllu_is_refused(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "bad.conllu"
    file.write_text(line + "\n")
    with pytest.raises(InputError, match=said):
        hs.syntax.read_conllu(file)


def test_words_without_pieces_are_refused() -> None:
    with pytest.raises(InputError, match=r"gives the word '\*' of sentence 2"):
        hs.syntax.treebank(
            bert(), [*trees(1), Sentence.of_words(["one", "*"], [-1, 0], ["root", "dep"])]
        )


def test_attention_between_words_sums_keys_and_averages_queries() -> None:
    model = bert()
    bank = hs.syntax.treebank(
        model, [Sentence.of_words(["two", "banana"], [1, -1], ["det", "root"])] * 2
    )
    assert bank.word[0].tolist() == [-1, 0, 1, 1, 1, -1]
    kept: list[torch.Tensor] = []
    model.run(
        bank.probe,
        reads={("z", 1): lambda view: kept.append(hs.syntax.word_rows(view, bank.word, 2))},
    )
    pattern = hs.capture.collect(model, bank.probe)[1].pattern
    by_key = torch.stack([pattern[..., 1], pattern[..., 2:5].sum(-1)], -1)
    slow = torch.stack([by_key[:, :, 1], by_key[:, :, 2:5].mean(2)], 2)
    torch.testing.assert_close(kept[0], slow, atol=1e-6, rtol=0)
    outer = kept[0].sum(-1) + (pattern[..., 0] + pattern[..., 5])[:, :, [1, 2]]
    assert float(outer[:, :, 0].sub(1).abs().max()) < 1e-5


def test_heads_that_know_the_trees_are_always_right() -> None:
    model = bert(wired=True)
    found = hs.syntax.heads(model, hs.syntax.treebank(model, trees()))
    for name in ("det", "amod", "nmod", "obj"):
        one = found[name]
        assert (one.accuracy, one.stable) == (1.0, True)
    assert (str(found["det"].head), found["det"].direction) in (
        ("L0H1", "to_head"), ("L0H0", "from_head"),
    )  # fmt: skip
    table = found.table
    assert table["all"]["L0H1"] == table["all_from_head"]["L0H0"] == 1.0
    assert table["all"]["L0H0"] < 0.7
    # One of two words with det is one place before its head, the other two before: half each.
    assert found["det"].baseline == 0.5
    assert found["nmod"].baseline == 1.0
    assert found["nmod"].offset == -3
    assert found["all"].words == 30 * 5


def test_accuracy_as_in_plain_loops() -> None:
    model = bert()
    rng = Random(3)
    sentences = []
    for _ in range(9):
        n = rng.randint(3, 7)
        heads = [rng.choice([*(at for at in range(n) if at != word), -1]) for word in range(n)]
        names = [rng.choice(["a", "b", "punct"]) for _ in range(n)]
        sentences.append(Sentence.of_words(rng.choices(WORDS, k=n), heads, names))
    bank = hs.syntax.treebank(model, sentences)
    found = hs.syntax.heads(model, bank, least=1, batch_size=4)
    acts = hs.capture.collect(model, bank.probe)
    for direction, name in (("to_head", "a"), ("from_head", "a_from_head")):
        for layer in (0, 1):
            for head in (0, 1):
                slow = [
                    _loops(acts[layer].pattern[number, head], bank, number, direction)
                    for number in range(9)
                ]
                np.testing.assert_allclose(found.table[name].per_example[layer, head], slow)


def _loops(pattern: torch.Tensor, bank: Treebank, number: int, direction: str) -> float:
    sentence, word = bank.sentences[number], bank.word[number].tolist()
    n = len(sentence.heads)
    pieces = [[at for at, one in enumerate(word) if one == w] for w in range(n)]
    mass = [
        [float(np.mean([sum(pattern[q, k] for k in pieces[j]) for q in pieces[i]]))
         for j in range(n)] for i in range(n)
    ]  # fmt: skip
    hits = []
    for i in range(n):
        if sentence.heads[i] < 0 or sentence.relations[i] != "a":
            continue
        scores = [mass[i][j] if direction == "to_head" else mass[j][i] for j in range(n)]
        scores[i] = -1.0
        hits.append(float(np.argmax(scores) == sentence.heads[i]))
    return float(np.mean(hits)) if hits else float("nan")


def test_probe_puts_its_weight_on_the_heads_that_know() -> None:
    model = bert(wired=True)
    rng = Random(2)
    bank = hs.syntax.treebank(model, trees(40))
    found = hs.syntax.attention_probe(model, bank, epochs=20, rate=0.05)
    assert found.uas == 1.0
    assert found.control < 0.8
    assert found.selectivity == pytest.approx(found.uas - found.control)
    weights = found.weights[:, 0]  # [direction head]
    assert weights[0, 1] > 0.5
    assert weights[1, 0] > 0.5
    assert abs(weights[0, 0]) < weights[0, 1]
    vectors = {word: [rng.random() for _ in range(3)] for word in WORDS}
    assert hs.syntax.attention_probe(model, bank, vectors=vectors, epochs=20, rate=0.05).uas == 1.0
    with pytest.raises(InputError, match="of one length"):
        hs.syntax.attention_probe(model, bank, vectors={"one": [1.0], "two": [1.0, 2.0]})


def test_bracket_encoder_has_heads_that_find_the_partner() -> None:
    model, drawn = hs.load("tiny-bert"), tasks.brackets(120, seed=41)
    sentences = [
        Sentence.of_words(
            text.split(),
            partners,
            ["word" if p < 0 else "close" if p < at else "open" for at, p in enumerate(partners)],
        )
        for text, partners in zip(drawn.texts, drawn.partners, strict=True)
    ]
    found = hs.syntax.heads(model, hs.syntax.treebank(model, sentences))
    for relation in ("open", "close"):
        one = found[relation]
        assert one.accuracy > 0.95
        assert one.accuracy > one.baseline + 0.3
        assert one.head.layer == 2
        early = [found.table[f"{relation}{way}"].mean[:2] for way in ("", "_from_head")]
        assert max(values.max() for values in early) < 0.8


def test_too_little_is_refused() -> None:
    model = bert()
    bank = hs.syntax.treebank(model, trees(3))
    with pytest.raises(InputError, match="no relation has 20 words"):
        hs.syntax.heads(model, bank)
    with pytest.raises(InputError, match="at least four sentences"):
        hs.syntax.attention_probe(model, bank)
