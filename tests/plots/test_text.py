import unicodedata
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headscope.plots.figure import label, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("a b ", "a b␣"),
        ("\n\t", "↵⇥"),
        ("\x00", "⟨0000⟩"),
        ("\u200b\u2066", "⟨200B⟩⟨2066⟩"),
        ("日本", "日本"),
        ("  ", "␣␣"),
        ("", ""),
    ],
)
def test_marks(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_labels_hold_nothing_that_acts_or_hides(text: str) -> None:
    made = label(text)
    assert "<" not in made
    assert ">" not in made
    assert "%{" not in made
    assert not any(unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp") for one in made)
    assert len(unescape(made)) <= 60
