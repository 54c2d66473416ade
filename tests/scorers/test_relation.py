"""Relations: by hand, against the built-in scorers, and with the pairs of another example."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import headscope as hs
from headscope.errors import InputError
from headscope.probes.prompts import find_span
from headscope.scorers import relation
from headscope.views import AttentionRows
from tests.models.families import build
from tests.probes.support import reader


def previous(probe: hs.Probe) -> torch.Tensor:
    at = torch.arange(probe.length)
    return (at[:, None] - at == 1).expand(len(probe), -1, -1)


def earlier(probe: hs.Probe, shift: int) -> torch.Tensor:
    """Pairs of equal tokens by two loops; ``shift`` 1 is what followed the earlier one."""
    found = torch.zeros(len(probe), probe.length, probe.length, dtype=torch.bool)
    for row, tokens in enumerate(probe.structure.tolist()):
        for query in range(probe.length):
            for key in range(query):
                if tokens[key] == tokens[query] and tokens[key] >= 0:
                    found[row, query, key + shift] = True
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return hs.load(build("llama"), check=False)


@pytest.fixture(scope="module")
def probe(model: Any) -> hs.Probe:
    return hs.probes.repeated_tokens(model, length=9, batch=5, seed=3)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("previous_token", previous),
        ("duplicate_token", lambda probe: earlier(probe, 0)),
        ("induction", lambda probe: earlier(probe, 1)),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_built_in_scores_are_instances(family: str, name: str, pairs: Any) -> None:
    model = hs.load(build(family), check=False)
    probe = hs.probes.repeated_tokens(model, length=9, batch=5, seed=3)
    real = probe.real.clone()
    real[1, :2] = False  # padding on the left
    probe = replace(probe, real=real, structure=probe.structure.where(real, -1), control=None)

    def within(one: hs.Probe) -> torch.Tensor:
        shown = one.real[:, :, None] & one.real[:, None, :]
        return pairs(one) & shown

    made = relation("own", within)
    table = hs.score(model, probe, [name, f"{name}_no_sink", made, made.no_sink.mass])
    for ours, theirs in (("own_mass", name), ("own_mass_no_sink", f"{name}_no_sink")):
        np.testing.assert_allclose(table[ours].mean, table[theirs].mean, atol=1e-7)
        np.testing.assert_allclose(table[ours].per_example, table[theirs].per_example, atol=1e-7)
    small = hs.score(model, probe, made, batch_size=2)
    for one in made:
        np.testing.assert_allclose(small[one.name].mean, table[one.name].mean, atol=1e-6)
        np.testing.assert_allclose(small[one.name].null, table[one.name].null, atol=1e-6)


def test_every_form_of_pairs_gives_the_same(model: Any, probe: hs.Probe) -> None:
    dense = earlier(probe, 1)
    triples = dense.nonzero()
    lists = [[(int(q), int(k)) for e, q, k in triples.tolist() if e == row] for row in range(5)]
    forms: list[Any] = [
        lambda one: earlier(one, 1),
        lambda one: earlier(one, 1).to_sparse(),
        lambda one: earlier(one, 1).nonzero(),
        dense,
        dense.to_sparse(),
        triples,
        lists,
    ]
    tables = [hs.score(model, probe, relation("r", one), batch_size=2) for one in forms]
    held = replace(probe, pairs={"r": triples})
    tables.append(hs.score(model, held, relation("r"), batch_size=2))
    for table in tables[1:]:
        for name in table:
            np.testing.assert_array_equal(table[name].mean, tables[0][name].mean)
            np.testing.assert_array_equal(table[name].null, tables[0][name].null)


def rows_of(pattern: torch.Tensor, visible: torch.Tensor | None = None) -> AttentionRows:
    """One example and one query, which is the last position."""
    shown = torch.ones(pattern.shape[-1], dtype=torch.bool) if visible is None else visible
    size = pattern.shape[-1]
    return AttentionRows(
        0, torch.tensor([size - 1]), pattern.view(1, -1, 1, size), shown[None, None]
    )


def values(pattern: torch.Tensor, keys: list[int], visible: Any = None) -> dict[str, Any]:
    size = pattern.shape[-1]
    rows = rows_of(pattern, visible)
    one = hs.probes.from_tokens([[5] * size])
    made = relation("r", [[(size - 1, key) for key in keys]])
    return {scorer.name[2:]: scorer(rows, one)[0, :, 0].tolist() for scorer in made}


def test_by_hand() -> None:
    """Weight 0.6 on two of five keys, the rest spread evenly: mass 0.6, lift 0.6 * 5 / 2."""
    found = values(torch.tensor([[0.45, 0.4 / 3, 0.15, 0.4 / 3, 0.4 / 3]]), [0, 2])
    assert found["mass"] == pytest.approx([0.6])
    assert found["lift"] == pytest.approx([1.5])
    assert found["hit"] == [1]
    assert found["auroc"] == [1]
    share = 0.75
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert found["evenness"] == pytest.approx([entropy / np.log(2)])
    even = values(torch.full((1, 5), 0.2), [1, 2])
    assert even["lift"] == pytest.approx([1])
    assert even["auroc"] == [0.5]
    assert even["evenness"] == pytest.approx([1])
    assert even["hit"] == [0]  # of equals the first
    hidden = torch.tensor([False, True, True, True, True])
    windowed = values(torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4]]), [0, 3], hidden)
    assert windowed["mass"] == pytest.approx([0.3])
    assert windowed["lift"] == pytest.approx([1.2])
    assert windowed["auroc"] == pytest.approx([2 / 3])
    assert np.isnan(windowed["evenness"][0])
    lost = values(torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4]]), [0], hidden)
    assert all(np.isnan(one[0]) for one in lost.values())


def test_auroc_is_that_of_mann_and_whitney() -> None:
    torch.manual_seed(0)
    pattern = torch.randint(0, 5, (6, 12)).float()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    keys = [0, 3, 4, 9]
    others = [key for key in range(12) if key not in keys]
    expected = [
        stats.mannwhitneyu(row[keys], row[others]).statistic / (len(keys) * len(others))
        for row in pattern.numpy()
    ]
    assert values(pattern, keys)["auroc"] == pytest.approx(expected)


def test_moving_keys_and_pairs_together_changes_nothing() -> None:
    torch.manual_seed(1)
    pattern = torch.rand(3, 8).softmax(-1)
    order = torch.randperm(8)
    keys = [1, 5, 6]
    moved = values(pattern[:, order], [int((order == key).nonzero()) for key in keys])
    for name, found in values(pattern, keys).items():
        assert moved[name] == pytest.approx(found), name


def test_the_null_is_the_relation_of_another_example(model: Any) -> None:
    probe = hs.probes.from_tokens(torch.randint(1, 40, (4, 10)))
    pairs = [[(9, 1)], [(9, 4)], [(9, 6)], [(9, 2), (5, 0)]]
    made = relation("r", pairs)
    scores = hs.score(model, probe, made.mass)["r_mass"]
    acts = hs.capture.collect(model, probe, layers=[0])
    rows = acts[0].pattern
    ranked = sorted(range(4), key=lambda row: probe.tokens[row].tolist())
    other = {row: ranked[(at + 1) % 4] for at, row in enumerate(ranked)}
    for example in range(4):
        for head in range(rows.shape[1]):
            own = np.mean([float(rows[example, head, q, k]) for q, k in pairs[example]])
            null = np.mean([float(rows[example, head, q, k]) for q, k in pairs[other[example]]])
            assert scores.per_example[0, head, example] == pytest.approx(own, abs=1e-6)
            control = scores.control_per_example
            assert control is not None
            assert control[0, head, example] == pytest.approx(null, abs=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = relation("r", [pairs[i] for i in order.tolist()])
    again = hs.score(model, hs.probes.from_tokens(probe.tokens[order]), shuffled.mass)["r_mass"]
    np.testing.assert_allclose(again.null, scores.null, atol=1e-6)
    assert scores.provenance.control == "other_example"
    assert "example" not in probe.facts


def test_examples_without_a_peer_have_no_null(model: Any) -> None:
    tokens = torch.randint(1, 40, (3, 10))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[2, 7:] = False
    probe = hs.probes.from_tokens(tokens, real)
    scores = hs.score(model, probe, relation("r", [[(6, 1)], [(6, 2)], [(6, 3)]]).mass)["r_mass"]
    assert scores.control_per_example is not None
    assert np.isnan(scores.control_per_example[0, 0]).tolist() == [False, False, True]
    assert (scores.n == 3).all()


def test_queries_without_a_pair_are_skipped_never_zero(model: Any, probe: hs.Probe) -> None:
    scores = hs.score(model, probe, relation("r", [[(4, 2)], [], [], [], [(9, 3)]]).mass)["r_mass"]
    assert (scores.n == 2).all()
    assert np.isnan(scores.per_example[:, :, 1:4]).all()
    flat = hs.score(model, probe, relation("r", [[(4, 2)]] * 5, control="flat").mass)["r_mass"]
    np.testing.assert_allclose(flat.null, 1 / 5)


def test_mistakes_get_a_sentence(model: Any, probe: hs.Probe) -> None:
    for pairs, message in (
        (lambda one: torch.zeros(len(one), 3, 3, dtype=torch.bool), "have shape"),
        ([[(4, 99)]], "the probe has"),
        (torch.tensor([[0, -1, 2]]), "the probe has"),
        ([[(1, 2, 3)]], "neither tensors nor lists"),
        (None, "no pairs 'r'"),
    ):
        with pytest.raises(InputError, match=message):
            hs.score(model, probe, relation("r", pairs))
    with pytest.raises(InputError, match="two scorers are named"):
        hs.score(model, probe, [relation("r", previous), relation("r", previous)])
    with pytest.raises(InputError, match="key 99: the probe has 5 examples"):
        replace(probe, pairs={"r": torch.tensor([[0, 0, 99]])})
    both = replace(
        probe, pairs={"r": torch.tensor([[0, 4, 1]]), "s": torch.tensor([[0, 4, 1]] * 3)}
    )
    assert len(both.examples(slice(0, 2)).related("s")) == 3
    with pytest.raises(InputError, match="it has: r, s"):
        both.related("t")


TEXT = "When Mary and John met, Mary gave John a ring"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("When", (0, 4)),
        ("the second 'Mary'", (24, 28)),
        ('second "Mary"', (24, 28)),
        ("the last 'John'", (34, 38)),
        ("the 1st 'John'", (14, 18)),
        ("gave John", (29, 38)),
        ("a", (39, 40)),  # the word, not the letter
    ],
)
def test_parts_are_found(said: str, expected: tuple[int, int]) -> None:
    assert find_span(TEXT, said) == expected
    assert TEXT[slice(*expected)] in said


def test_parts_that_are_not_there_are_named() -> None:
    for said, message in (
        ("Mary", "occurs 2 times .*the second 'Mary'"),
        ("Anna", "does not occur"),
        ("the third 'Mary'", "no \"the third 'Mary'\""),
        ("the 0th 'Mary'", "counted from the first"),
        (" ", "is empty"),
    ):
        with pytest.raises(InputError, match=message):
            find_span(TEXT, said)


def test_pairs_and_parts_come_from_a_file(tmp_path: Path) -> None:
    model = reader()
    file = tmp_path / "mine.jsonl"
    line: dict[str, Any] = {
        "text": TEXT,
        "marks": {"subject": "the second 'Mary'", "first": [5, 9]},
        "pairs": {"back": [["subject", "first"], ["end", "the last 'John'"]]},
    }
    file.write_text(json.dumps(line) + "\n" + json.dumps({"text": "Mary met John"}))
    probe = hs.probes.from_jsonl(model, file)
    decode = model.tokenizer.decode
    assert decode(probe.tokens[0][probe.mark("subject")[0]]).strip() == "Mary"
    assert not probe.mark("subject")[1].any()
    there = probe.related("back").tolist()
    said = [(decode(probe.tokens[e][q]), decode(probe.tokens[e][k])) for e, q, k in there]
    assert [one.strip() for one in said[0]] == ["Mary", "Mary"]
    assert said[-1][1].strip().endswith("n") or "John" in said[-1][1]
    wanted = int(probe.mark("subject")[0].sum() * probe.mark("first")[0].sum())
    assert len(said) >= wanted + 1
    part = probe.examples(slice(1, 2))
    assert len(part.related("back")) == 0
    assert probe.examples(torch.tensor([1, 0])).related("back")[:, 0].tolist() == [1] * len(said)
    for change, message in (
        ({"pairs": {"back": [["subject"]]}}, r"list of \[query, key\]"),
        ({"pairs": [1]}, "its pairs are not"),
        ({"pairs": {"back": [["Anna", "first"]]}}, "does not occur"),
        ({"marks": {"subject": "Mary"}, "pairs": {}}, "occurs 2 times"),
    ):
        file.write_text(json.dumps(line | change))
        with pytest.raises(InputError, match=message):
            hs.probes.from_jsonl(model, file)
