"""docs/families.md counts what it lists, and lists every model type."""

import re
from collections import Counter

import pytest

from tests.models.every_family import is_current, listed
from tools.families import PAGE, Family, page
from tools.tiny_models import kinds, tiny_model


def test_counts_are_those_of_the_rows() -> None:
    counts = Counter(listed().values())
    assert set(counts) == {"supported", "limited", "refused", "not built"}
    text = PAGE.read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"\b(\d+)\b", text.split("`fused`")[0])]
    good = counts["supported"] + counts["limited"]
    assert good >= 90
    rest = [counts[verdict] for verdict in ("supported", "limited", "refused", "not built")]
    assert numbers[-6:] == [good, len(listed()), *rest]


@pytest.mark.skipif(not is_current(), reason="the page is of another transformers")
def test_every_model_type_is_listed() -> None:
    assert set(listed()) == set(kinds())


def test_a_page_of_what_was_found() -> None:
    families = [
        Family("a", "A", "supported", "fused", {}),
        Family("b", "B", "limited", "fused", {"write": "no", "OV circuit": "no", "pruning": "x"}),
        Family("c", "C", "refused", "", {"": "it is | too new"}),
    ]
    text = page(families)
    assert "**2 of 3 model types run**: 1 without a limit, 1 with some questions refused." in text
    assert "| `b` | `B` | fused | write, OV circuit (1); pruning (2) |" in text
    assert "it is \\| too new" in text


def test_tiny_models_are_tiny_and_peaky() -> None:
    model = tiny_model("gemma2")
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert model.config.sliding_window < 64
    assert all(p.std() > 0.1 for p in model.parameters() if p.ndim == 2)
