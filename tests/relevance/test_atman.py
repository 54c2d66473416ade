"""AtMan: closed forms, and GPT-2 written out in full."""

import math

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.errors import InputError
from headscope.relevance import suppressed
from tests.models import families
from tests.relevance import slow
from tests.relevance.slow import bundled

TEXT = "When Mary and John went to the store, John gave a drink to"


def rows(*scores: float) -> torch.Tensor:
    return torch.tensor([scores]).softmax(-1)


def test_two_keys_have_a_closed_form() -> None:
    for factor in (0.0, 0.1, 0.5, 1.0):
        new = suppressed(rows(0.0, math.log(3)), torch.tensor([1.0, factor]))
        assert float(new[0, 1]) == pytest.approx(3**factor / (1 + 3**factor), abs=1e-6)


def test_a_factor_of_one_changes_nothing_and_the_smallest_score_has_no_effect() -> None:
    pattern = rows(0.3, -2.0, 1.0)
    assert torch.allclose(suppressed(pattern, torch.ones(3)), pattern)
    assert torch.allclose(suppressed(pattern, torch.tensor([1.0, 0.1, 1.0])), pattern)


def test_the_smallest_score_is_of_the_keys_that_are_seen() -> None:
    seen = torch.tensor([[1.0, 2.0]]).softmax(-1)
    padded = torch.cat([seen, torch.zeros(1, 1)], 1)  # a later key of whatever score
    new = suppressed(padded, torch.tensor([1.0, 0.1, 1.0]))[0]
    # Above the smallest, 1: the score 2 becomes 1 + 0.1.
    assert new.tolist() == pytest.approx([*torch.tensor([1.0, 1.1]).softmax(0).tolist(), 0.0])


def test_all_keys_with_one_factor_are_not_the_identity() -> None:
    new = suppressed(rows(0.0, 1.0), torch.full((2,), 0.1))
    assert new[0].tolist() == pytest.approx(rows(0.0, 0.1)[0].tolist(), abs=1e-6)


def test_erasing_renormalises_and_leaves_a_row_without_keys_empty() -> None:
    new = suppressed(torch.tensor([[0.2, 0.8], [1.0, 0.0]]), torch.tensor([0.0, 1.0]), erase=True)
    assert new.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_a_learned_sink_keeps_its_weight() -> None:
    # Scores 0 and 1 and a sink of score 2, which is not in the rows.
    whole = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    new = suppressed(whole[None, :2], torch.tensor([1.0, 0.5]))[0]
    assert new.tolist() == pytest.approx(torch.tensor([0.0, 0.5, 2.0]).softmax(0)[:2].tolist())


@pytest.mark.parametrize("mode", ["suppress", "erase"])
def test_relevance_is_that_of_gpt2_written_out(mode: str) -> None:
    module = families.build("gpt2")
    tokens = families.tokens(1)[0, :6]
    found = hs.relevance.atman(
        hs.load(module), tokens[:4], tokens[4:].tolist(), factor=0.3, mode=mode, top=2
    )
    losses = torch.nn.functional.cross_entropy

    def loss(change: slow.Change) -> torch.Tensor:
        with torch.no_grad():
            logits = slow.logits(module, tokens[:5], change)
        return losses(logits[3:5], tokens[4:6], reduction="none")

    base = loss(slow.plain)
    assert found.base == pytest.approx(base.numpy(), abs=1e-4)
    for key in range(1 if mode == "erase" else 0, 5):  # without key 0 its own row is empty
        change = slow.erase([key]) if mode == "erase" else slow.suppress([key], 0.3)
        wanted = (loss(change) - base).numpy()
        assert found.per_target[key] == pytest.approx(wanted, abs=2e-4)
    if mode == "suppress":
        assert found.by_head is not None
        measured = np.argwhere(~np.isnan(found.by_head).any(2)).tolist()
        assert len(measured) == 2
        for layer, head in measured:
            for key in range(5):
                wanted = float((loss(slow.suppress([key], 0.3, (layer, head))) - base).sum())
                assert found.by_head[layer, head, key] == pytest.approx(wanted, abs=2e-4)


def test_the_estimate_is_the_slope_of_a_small_suppression() -> None:
    model = hs.load(families.build("llama"))
    tokens = families.tokens(1)[0, :6]
    found = hs.relevance.atman(model, tokens[:5], tokens[5:].tolist(), factor=0.999, top=12)
    assert found.by_head is not None
    assert found.estimate is not None
    assert found.estimate == pytest.approx(found.by_head, abs=1e-4, rel=2e-2)


def test_groups_by_span_similar_keys_and_the_result(tmp_path) -> None:  # noqa: ANN001
    model = bundled()
    single = hs.relevance.atman(model, TEXT, " Mary")
    group = hs.relevance.atman(
        model, TEXT, " Mary", groups={"john": "the second 'John'", "three": [1, 2, 3]}
    )
    assert group.relevance[0] == pytest.approx(single.relevance[10], abs=1e-5)
    assert group.units == ("john", "three")
    same = hs.relevance.atman(model, TEXT, " Mary", similar=0.99)
    both = hs.relevance.atman(model, TEXT, " Mary", groups={"johns": [4, 10]})
    assert same.relevance[4] == pytest.approx(both.relevance[0], abs=1e-3)
    single.save(tmp_path / "found.safetensors")
    again = hs.relevance.TokenRelevance.load(tmp_path / "found.safetensors")
    assert again.relevance.tolist() == single.relevance.tolist()
    assert list(single.to_pandas().columns) == ["target", "unit", "relevance"]
    assert "" in hs.plots.figures(single)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"factor": 2.0}, "from 0 to 1"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"mode": "delete"}, "unknown mode"),
        ({"similar": -1.0}, "cosine"),
        ({"top": 0}, "1 or more"),
        ({"groups": {"him": "Peter"}}, "does not occur"),
        ({"groups": {"him": "John"}}, "2 times"),
        ({"groups": {"him": [99]}}, "position 99"),
        ({"groups": {}}, "at least one group"),
        ({"target": " "}, "empty"),
        ({"heads": "L9H9"}, "no head"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments: dict, said: str) -> None:
    given = {"target": " Mary", **arguments}
    with pytest.raises(InputError, match=said):
        hs.relevance.atman(bundled(), TEXT, **given)
