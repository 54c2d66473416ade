"""docs/families.md counts what it lists, and lists every model type."""

import re
from collections import Counter

import pytest

from tests.models.every_family import is_current, listed
from tools.families import PAGE, Family, examine, page
from tools.tiny_models import GROUPS, kinds, tiny_model


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


OTHERS = [group for group in GROUPS if group != "causal"]


@pytest.mark.skipif(not is_current(), reason="the page is of another transformers")
@pytest.mark.parametrize("group", OTHERS)
def test_every_type_of_another_group_is_listed_and_none_is_wrong(group: str) -> None:
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {GROUPS[group].title}\n")[1]
    part = part.split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", part, re.MULTILINE))
    assert set(rows) == set(kinds(group))
    assert "wrong" not in rows.values()


@pytest.mark.skipif(not is_current(), reason="the page is of another transformers")
@pytest.mark.parametrize(
    ("group", "kind", "verdict"),
    [
        ("masked", "electra", "limited"),
        ("masked", "mpnet", "limited"),
        ("masked", "albert", "limited"),
        ("masked", "deberta-v2", "refused"),
        ("images", "swin", "refused"),
        ("seq2seq", "t5", "supported"),
        ("speech", "whisper", "supported"),
        ("pictures", "llava", "supported"),
        ("pictures", "paligemma", "limited"),
    ],
)
def test_what_the_page_says_of_other_groups_holds(group: str, kind: str, verdict: str) -> None:
    found = examine(kind, group)
    assert found.verdict == verdict, found.reasons
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {GROUPS[group].title}\n")[1]
    assert (f"| `{kind}` | refused |" in part) == (verdict == "refused")
    if group == "pictures":
        assert found.images == "rows, places"
        assert f"| `{kind}` | `{found.name}` | rows, places |" in part
