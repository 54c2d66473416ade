import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope import circuits
from headscope.circuits import vocabulary
from headscope.circuits.maps import TokenRelation, of_words
from headscope.errors import InputError
from headscope.models.hf.measured import MeasuredParts
from headscope.models.hf.model import HFModel
from tests.circuits.conftest import HandWired

ModelOf = Callable[[str], HFModel]


def whole(model: HFModel, circuit: str, words: circuits.Dictionary, head: str) -> Tensor:
    """Token x token matrix of one head, the slow way."""
    factors = circuits.ov(model) if circuit == "ov" else circuits.qk(model)
    layer = int(head[1])
    every = torch.arange(words.size)
    far = words.outputs(every) if circuit == "ov" else words.inputs(every, layer)
    return words.inputs(every, layer) @ factors.explicit(head) @ far.T


def test_hand_wired_heads_copy_suppress_and_match(hand_wired: HandWired) -> None:
    words = circuits.Dictionary(hand_wired)
    tokens = torch.arange(6)
    values = circuits.copying_eigenvalues(circuits.ov(hand_wired), words)
    assert values[0, 1] == pytest.approx(-1)
    assert values[1, 0] == pytest.approx(1)
    assert bool(values[1, 1].isnan())
    share = circuits.copying_share(circuits.ov(hand_wired), words, tokens)
    assert share[1].tolist() == [1, 1 / 6]  # a head that writes nothing ties: lowest id wins
    assert share[0, 1] == 0


def test_centring_the_vocabulary_leaves_copying_alone(hand_wired: HandWired) -> None:
    bare = circuits.Dictionary(hand_wired, fold_norm=False)
    values = circuits.copying_eigenvalues(circuits.ov(hand_wired, False), bare)
    assert values[1, 0] == pytest.approx(1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("embedding", ["raw", "mlp", "mlp_only"])
@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_eigenvalues_and_shares_are_those_of_the_whole_matrix(
    family: str, embedding: str, circuit: str, family_model: ModelOf
) -> None:
    model = family_model(family)
    words = circuits.Dictionary(model, embedding)
    factors = circuits.ov(model) if circuit == "ov" else circuits.qk(model)
    if circuit == "ov":
        ratio = circuits.copying_eigenvalues(factors, words)
        share = circuits.copying_share(factors, words, torch.arange(97), 3)
    else:
        ratio = circuits.matching_eigenvalues(factors, words)
        share = circuits.matching_share(factors, words, torch.arange(97), 3)
    for head in ("L0H3", "L2H1"):
        matrix = whole(model, circuit, words, head).numpy()
        order = np.argsort(-matrix, axis=1, kind="stable")
        place = (int(head[1]), int(head[3]))
        expected = np.mean([t in order[t, :3] for t in range(97)])
        assert float(share[place]) == pytest.approx(expected)
        if circuit == "qk":
            every = words.inputs(torch.arange(97), place[0])
            every = every - every.mean(0)
            matrix = (every @ factors.explicit(head) @ every.T).numpy()
        values = np.linalg.eigvals(matrix.astype(np.float64))
        expected = values.real.sum() / np.abs(values).sum()
        assert float(ratio[place]) == pytest.approx(expected, abs=2e-3)


def test_copying_turns_with_the_sign_of_the_output(family_model: ModelOf) -> None:
    from dataclasses import replace

    model = family_model("llama")
    words, factors = circuits.Dictionary(model), circuits.ov(model)
    turned = replace(factors, right=-factors.right)
    torch.testing.assert_close(
        circuits.copying_eigenvalues(turned, words), -circuits.copying_eigenvalues(factors, words)
    )


def test_layer_0_sees_the_raw_embedding(family_model: ModelOf) -> None:
    model = family_model("llama")
    raw, mlp = (circuits.Dictionary(model, kind) for kind in ("raw", "mlp"))
    tokens = torch.arange(5)
    assert torch.equal(raw.inputs(tokens, 0), mlp.inputs(tokens, 0))
    assert not torch.equal(raw.inputs(tokens, 1), mlp.inputs(tokens, 1))


@pytest.mark.parametrize("circuit", ["ov", "qk"])
def test_top_tokens_are_the_largest_products(circuit: str, family_model: ModelOf) -> None:
    model = family_model("gpt2")
    words = circuits.Dictionary(model, "mlp")
    factors = circuits.ov(model) if circuit == "ov" else circuits.qk(model)
    view = circuits.vocabulary_view(factors, words, directions=2, tokens=4)
    svd, every = factors.svd(), torch.arange(97)
    for layer in (0, 2):
        read = words.inputs(every, layer) @ svd.U[layer, 1, :, 0]
        far = words.outputs(every) if circuit == "ov" else words.inputs(every, layer)
        written = far @ svd.Vh[layer, 1, 0]
        for found, expected in ((view.read, read), (view.written, written)):
            order = expected.argsort(descending=True)
            assert found.ids[layer, 1, 0, 0].tolist() == order[:4].tolist()
            assert found.ids[layer, 1, 0, 1].tolist() == order.flip(0)[:4].tolist()
            torch.testing.assert_close(found.values[layer, 1, 0, 0], expected[order[:4]])
    assert len(view.words("L2H1", None)) == 2


def test_blocks_of_the_vocabulary_change_nothing(
    family_model: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("gpt2")
    factors, tokens = circuits.ov(model), torch.arange(20)

    def measure() -> tuple[Tensor, ...]:
        words = circuits.Dictionary(model, "mlp")
        view = circuits.vocabulary_view(factors, words, 2, 5)
        share = circuits.copying_share(factors, words, tokens, 9)
        return view.read.ids, view.written.ids, share, circuits.copying_eigenvalues(factors, words)

    whole_at_once = measure()
    monkeypatch.setattr("headscope.circuits.vocabulary._BLOCK_ENTRIES", 32 * 7)
    monkeypatch.setattr("headscope.circuits.measures._BLOCK_ENTRIES", 4 * 20 * 3)
    for one, other in zip(whole_at_once, measure(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def slow_maps(model: HFModel, relation: TokenRelation, k: int, sign: int) -> np.ndarray:
    weights = [model.weights(layer) for layer in range(3)]
    raw = model.parts.embedding.float()
    values = np.zeros((3, 4))
    for layer in range(3):
        table = raw if layer == 0 else model.parts.first_mlp(raw)
        for head in range(4):
            W = weights[layer].W_V[head // model.shape.group_size] @ weights[layer].W_O[head]
            hits = []
            for s, t in zip(relation.source, relation.target, strict=True):
                logits = sign * (table[s] @ W @ model.unembedding.W_U.T)
                hits.append(int(t) in logits.argsort(descending=True, stable=True)[:k])
            values[layer, head] = np.mean(hits)
    return values


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_maps_equal_a_slow_loop(family: str, family_model: ModelOf) -> None:
    model = family_model(family)
    pairs = TokenRelation("shift", torch.arange(3, 60), torch.arange(4, 61), 57)
    table = circuits.relation_scores(model, {"shift": pairs}, k=25)
    np.testing.assert_allclose(table["maps_shift"].mean, slow_maps(model, pairs, 25, 1))
    suppressed = table["maps_shift_suppressed"].mean
    np.testing.assert_allclose(suppressed, slow_maps(model, pairs, 25, -1))
    assert table["maps_shift"].mean.max() > 0


def test_hand_wired_mappings(hand_wired: HandWired) -> None:
    table = circuits.relation_scores(hand_wired, first_mlp=False)
    assert table["maps_copy"]["L1H0"] == 1
    assert table["maps_copy"]["L0H1"] == 0
    assert table["maps_copy_suppressed"]["L0H1"] == 1
    found = circuits.salient_mappings(hand_wired, "L1H0", 6, 1, first_mlp=False)
    assert found.promoted[:, 0].tolist() == found.source.tolist() == list(range(6))
    torch.testing.assert_close(found.saliency, torch.ones(6))
    found = circuits.salient_mappings(hand_wired, "L0H1", 6, 1)
    assert found.suppressed[:, 0].tolist() == list(range(6))


class WordTokenizer:
    """One id for each listed text; anything else is two tokens."""

    unk_token_id = 0
    bos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def __init__(self, texts: list[str]) -> None:
        self.ids = {text: place + 1 for place, text in enumerate(texts)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self.ids[text]] if text in self.ids else [0, 0]

    def decode(self, ids: list[int]) -> str:
        return {place: text for text, place in self.ids.items()}.get(ids[0], "")

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def test_relations_keep_single_tokens_alone(
    family_model: ModelOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = family_model("llama")
    texts = [f" {n}" for n in range(8)] + ["one", "two", " one", "One", " Two", " two"]
    monkeypatch.setattr(model, "tokenizer", WordTokenizer(texts))
    found = circuits.relations(model)
    assert set(found) == {"copy", "digit_successor"}
    successor = found["digit_successor"]
    assert successor.source.tolist() == list(range(1, 8))
    assert successor.target.tolist() == list(range(2, 9))
    assert torch.equal(found["copy"].source, found["copy"].target)
    few = of_words(model, "few", [("one", "two"), ("one", "absent")])
    assert (few.source.tolist(), few.target.tolist(), few.words) == ([11], [14], 2)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"mine": [[str(n), str(n)] for n in range(6)]}))
    assert list(circuits.relations(model, own)) == ["mine"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}', '{"a": [["x"]]}', '{"a": [[1, 2]]}'])
def test_a_broken_relation_file_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"bad\.json"):
        circuits.read_relations(file)


def test_shipped_lists_are_pairs_without_repetition() -> None:
    path = Path(circuits.__file__).parent / "data" / "relations.json"
    lists = circuits.read_relations(path)
    assert len(lists) >= 8
    for pairs in lists.values():
        assert len(set(pairs)) == len(pairs) >= 6


def test_a_dictionary_measures_the_model_once_for_all_blocks(
    family_model: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("llama")
    asked = {"unembedding": 0, "embedding": 0}

    def counted(kind: type, name: str) -> None:
        own = getattr(kind, name)

        def get(self: object) -> object:
            asked[name] += 1
            return own.fget(self)

        monkeypatch.setattr(kind, name, property(get))

    counted(type(model), "unembedding")
    counted(MeasuredParts, "embedding")
    monkeypatch.setattr(vocabulary, "_BLOCK_ENTRIES", 32 * 10)  # ten blocks
    words = circuits.Dictionary(model)
    blocks = list(words.blocks())
    assert len(blocks) == 10
    gram = words.gram("output_input", 1)
    assert asked == {"unembedding": 1, "embedding": 1}
    whole = circuits.Dictionary(model).outputs(slice(None)).T @ model.parts.embedding
    torch.testing.assert_close(gram, whole.detach(), rtol=1e-4, atol=1e-3)
