from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from headscope.base.result import short
from headscope.table import HeadScores, HeadTable
from tests.table.helpers import NAN, model_table, scores


def printed(table: HeadTable, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_roles_are_said_even_where_there_are_none() -> None:
    text = printed(model_table())
    assert "induction: L3H1 0.95, L0H3 0.60" in text
    assert "no previous token heads" in text
    assert "of 16 heads of toy (4 layers x 4)" in text


def test_scores_with_a_role_come_first() -> None:
    header = printed(model_table()).splitlines()
    assert header[1].split()[:2] == ["head", "induction"]


@pytest.mark.parametrize("width", [60, 100])
def test_twenty_scores_fit_the_width(width: int) -> None:
    table = HeadTable([scores(f"some_longer_score_{i}") for i in range(20)])
    lines = printed(table, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in printed(table, width)
    assert sum("some_longer_score" in line for line in lines) >= 8


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.text = set(), ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_escapes_names_and_shows_roles() -> None:
    name = "<img src=x onerror=alert(1)>"
    page = HeadTable([scores(name, threshold=0.5, description='"><b>')])._repr_html_()
    tags = Tags()
    tags.feed(page)
    assert tags.seen == {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "ul", "li"}
    assert name in tags.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.934, "0.93"),
        (0.0512, "0.051"),
        (-3.456, "-3.46"),
        (123.4, "123"),
        (1.2e-5, "1e-5"),
        (-4.2e7, "-4e7"),
        (float("nan"), "-"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_a_signed_score_shows_its_largest_effects_of_either_sign() -> None:
    one = scores(means=((0.1, -0.9), (0.5, -0.2)), bounds=(None, None))
    assert [str(head) for head, _ in one.notable(2)] == ["L0H1", "L1H0"]


def test_colour_fraction_stays_in_range() -> None:
    assert scores().fraction(0.25) == 0.25
    assert scores(bounds=(None, None)).fraction(99.0) == 1
    assert scores(means=((0.5, 0.5),), jitter=0, bounds=(None, None)).fraction(0.5) == 0
    assert scores().fraction(float("nan")) == 0


def test_a_score_out_of_reach_says_so() -> None:
    nothing = np.full((2, 2, 3), np.nan)
    unseen = HeadScores.from_examples(
        "far", nothing, kv_heads=scores("near").kv_heads, missing=np.full((2, 2), 5), unit="share"
    )
    table = HeadTable([scores("near"), unseen])
    for shown in (printed(table), table._repr_html_()):
        assert "far has no value: what it looks for was out of reach of every query" in shown
        assert "near has no value" not in shown


def test_a_score_shows_itself_as_a_grid_of_heads() -> None:
    html = scores(means=((0.9, 0.1), (NAN, 0.8)), threshold=0.5)._repr_html_()
    assert html.count("<td") == 4
    assert html.count("font-weight:700") == 2
    assert ">0.90<" in html
    assert ">-<" in html


def test_a_score_of_many_heads_shows_the_best() -> None:
    html = model_table(40, 40)["induction"]._repr_html_()
    assert html.count("<td") == 10
    assert "L39H1" in html


def test_a_hostile_score_is_escaped() -> None:
    html = scores("<script>", description="<img src=x>", unit="<b>")._repr_html_()
    assert "<script" not in html
    assert "<img" not in html
    assert "<b><" not in html
