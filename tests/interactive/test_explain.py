"""``hs.explain``: the same numbers as the parts that it is made of."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

import headscope as hs
from headscope.circuits.survey import card_table
from headscope.errors import InputError
from headscope.report.head import head_html
from headscope.table import HeadCard
from tests.models.encoders import CONFIGS, tokenizer, widened
from tests.report.example import HOSTILE


@pytest.fixture(scope="module")
def said() -> Any:
    model = hs.load()
    (best, _), *_ = hs.score(model, scorers=["induction"]).top("induction", 1)
    return hs.explain(str(best), model)


def test_its_numbers_are_those_of_the_parts(said: Any) -> None:
    model, head = said.model, said.head
    card = hs.circuits.head_card(model, head, table=card_table(model))
    assert said.card.to_json() == card.to_json()
    table = hs.score(model)
    for name, scores in table.items():
        np.testing.assert_array_equal(said.scan[name].mean, scores.mean)
    probe = hs.probes.repeated_tokens(model, length=50, batch=8, seed=0)
    effect = hs.ablate_heads(model, probe, metric=hs.metrics.loss, method="mean", heads=[head])
    assert said.effects[0].mean[head] == effect.mean[head]
    assert said.attention.heads == (head,)


def test_it_shows_itself(said: Any, tmp_path: Path) -> None:
    assert repr(said).startswith(f"Explanation(tiny-gpt2 {said.head}: induction ")
    console = Console(width=100, record=True, quiet=True)
    console.print(said)
    assert "induction" in str(said)
    assert str(said.head) in str(said)
    html = said._repr_html_()
    assert "<b>induction</b>" in html
    assert html.count("<iframe") == 1
    assert len(html) < 200_000
    said.save(tmp_path / "head.html")
    assert "Composition partners" in (tmp_path / "head.html").read_text()


def test_e12_each_score_says_what_it_was_measured_on(said: Any) -> None:
    lines = {line.split()[0]: line for line in str(said).splitlines() if line.split()}
    assert lines["induction"].rstrip().endswith("repeated tokens")
    assert lines["first_token"].rstrip().endswith("text")
    assert "measured on" in said.page()


def test_weights_alone_run_nothing() -> None:
    found = hs.explain("1.1", "tiny-llama", weights_only=True)
    assert (found.scan, found.effects, found.attention) == (None, (), None)
    assert "iframe" not in found._repr_html_()
    assert repr(found) == "Explanation(tiny-llama L1H1: no role)"


def test_ranks_are_told_where_they_are_quick_or_asked_for_and_else_the_call_that_has_them(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, model = said.card, said.model
    table = hs.circuits.score(model)
    assert set(table) <= set(card.scores)  # those with the first MLP too
    for name, scores in table.items():
        better = [head for head in model.shape.heads if scores[head] > scores[said.head]]
        assert card.ranks[name] == 1 + len(better)
    assert "No ranks" not in str(said) + said.page()
    monkeypatch.setattr(import_module("headscope.circuits.survey"), "_QUICK", 1000)
    found = hs.explain(said.head, model, weights_only=True)
    assert found.card.ranks == {}
    for shown in (str(found), found.page()):
        assert "ranks=True" in shown
        assert "headscope head --ranks" in shown
    asked = hs.explain(said.head, model, weights_only=True, ranks=True)
    assert asked.card.ranks == card.ranks


def test_hostile_tokens_are_escaped() -> None:
    direction = {"singular_value": 1.0, "reads": [HOSTILE, []], "writes": [[], HOSTILE]}
    card = HeadCard(
        "L0H0", 0, HOSTILE[0], {}, {}, [direction], [], {"Q": []}, {}, {HOSTILE[1]: "x"}
    )
    html = head_html(card, None, [])
    assert "<script" not in html
    assert "<img" not in html
    assert "\u202e" not in html
    assert len(html) < 10_000


@pytest.mark.parametrize(
    ("arguments", "words", "said"),
    [
        (("nonsense",), {}, "not a head"),
        (("L9H9",), {}, "no head L9H9"),
        (("L0H0",), {"text": "x", "weights_only": True}, "leave out weights_only"),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple, words: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        hs.explain(*arguments, **words)


def test_a_model_without_logits_tells_how_far_its_embedding_moves() -> None:
    torch.manual_seed(0)
    module = transformers.BertModel(CONFIGS["bert"]())
    model = hs.load(widened(module), tokenizer=tokenizer())
    (effect,) = hs.explain("L1H2", model).effects
    assert effect.unit == "cosine"
    assert -2 <= effect["L1H2"] < -1e-4
    assert "L1H2" in effect.summary()
