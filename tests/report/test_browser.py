"""The report in a real headless Chromium: what a reader does, and what hostile data cannot do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headscope.report import report_page
from headscope.table import HeadTable
from tests.report.browser import browser, opened
from tests.report.example import HOSTILE, hostile_run, run_of


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = run_of(12, 12)
    second = run_of(3, 4)
    renamed = HeadTable([one for one in second.table.values() if one.name != "effect"])
    runs = {"one": [run], "two": [run, type(run)("other", "scan", _called(renamed, "other"))]}
    runs |= {"big": [run_of(64, 64)], "hostile": [hostile_run(None)]}
    made = {}
    for name, several in runs.items():
        made[name] = folder / f"{name}.html"
        made[name].write_text(report_page(several), encoding="utf-8")
    return made


def _called(table: HeadTable, name: str) -> HeadTable:
    from dataclasses import replace

    from headscope.table import Provenance

    return HeadTable([replace(one, provenance=Provenance(model=name)) for one in table.values()])


def head_of(page: Any) -> str:
    return page.locator("#card").get_attribute("data-head")


def drawn_heatmap(page: Any) -> None:
    page.locator("#heatmaps .plot").first.scroll_into_view_if_needed()
    page.locator("#heatmaps .js-plotly-plot").first.wait_for(timeout=10_000)


def first_cells(page: Any) -> list[str]:
    return page.locator("#heads-table tbody th").all_inner_texts()


def test_it_opens_without_errors_and_asks_for_nothing(chromium: Any, files: dict) -> None:
    for name in ("one", "two"):
        with opened(chromium, files[name]) as found:
            drawn_heatmap(found.page)
            assert found.errors == []
            assert found.requests == [files[name].as_uri()]


def test_a_click_opens_that_head(chromium: Any, files: dict) -> None:
    with opened(chromium, files["one"]) as found:
        page = found.page
        for head in (0, 29, 143):
            page.locator(f'.cell[data-head="{head}"]').click()
            assert head_of(page) == f"L{head // 12}H{head % 12}"
            assert page.locator("#card h3").inner_text().startswith(head_of(page))
            assert page.locator('.cell[aria-selected="true"]').count() == 1
        for part in ("Attention", "On probes", "reads and writes", "partners", "Spectrum"):
            assert page.locator("#card h4", has_text=part).count() == 1
        row = page.locator("#card tr", has_text="induction").first.inner_text()
        assert "144" in row  # its rank among all heads
        assert found.errors == []


def test_numbers_on_the_card_are_those_of_the_table(chromium: Any, files: dict) -> None:
    table = run_of(12, 12).table
    with opened(chromium, files["one"], at="#0-L11H1") as found:
        assert head_of(found.page) == "L11H1"
        cells = found.page.locator("#card tr", has_text="induction").first.locator("td")
        score = table["induction"]
        low, high = score.interval()
        assert cells.nth(0).inner_text() == f"{score[11, 1]:.2f}"
        ends = [float(one) for one in cells.nth(1).inner_text().split(" to ")]
        assert ends == pytest.approx([low[11, 1], high[11, 1]], abs=0.006)
        assert float(cells.nth(2).inner_text()) == pytest.approx(score.null[11, 1], abs=0.001)


def test_the_keyboard_alone_is_enough(chromium: Any, files: dict) -> None:
    with opened(chromium, files["one"]) as found:
        page = found.page
        page.locator('.cell[tabindex="0"]').focus()
        page.keyboard.press("Home")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        before = page.evaluate("Number(document.activeElement.dataset.head)")
        page.keyboard.press("Enter")
        assert head_of(page) == f"L{before // 12}H{before % 12}"
        assert before % 12 == 2
        assert page.evaluate("document.activeElement.closest('#card') !== null")
        page.keyboard.press("Escape")
        assert page.locator("#card").is_hidden()
        assert page.evaluate("Number(document.activeElement.dataset.head)") == before


def test_sorting_follows_the_numbers(chromium: Any, files: dict) -> None:
    table = run_of(12, 12).table
    with opened(chromium, files["one"]) as found:
        page = found.page
        head = page.locator("#heads-table thead button", has_text="induction")
        head.focus()
        page.keyboard.press("Enter")
        assert first_cells(page)[:5] == [str(one) for one, _ in table.top("induction", 5)]
        page.keyboard.press("Enter")  # the focus stays on the column
        assert first_cells(page)[0] == str(table["induction"].bottom(1)[0][0])
        assert page.locator('th[aria-sort="ascending"]').inner_text().startswith("induction")
        page.locator("details summary").first.click()
        page.locator("#columns label", has_text="entropy").click()
        if page.locator("#heads-table thead button", has_text="entropy").count() == 0:
            page.locator("#columns label", has_text="entropy").click()
        page.locator("#heads-table thead button", has_text="entropy").click()
        assert first_cells(page)[0] == str(table.top("entropy", 1)[0][0])


def test_filters_keep_what_they_say(chromium: Any, files: dict) -> None:
    table = run_of(12, 12).table
    with opened(chromium, files["one"]) as found:
        page, box = found.page, found.page.locator("#filter")
        roles = table.roles()
        for text, wanted in (
            ("L1", [f"L1H{i}" for i in range(12)]),
            ("l10h3", ["L10H3"]),
            ("induction", [str(h) for h, mine in roles.items() if "induction" in dict(mine)]),
            ("score 3 > 1", sorted(map(str, table.filter("score_3", minimum=1.0)))),
            ("nothing such", []),
        ):
            box.fill(text)
            assert sorted(first_cells(page)) == sorted(wanted), text
            assert page.locator("#count").inner_text() == f"{len(wanted)} heads"
        box.fill("")
        page.locator("#heads-table tbody button", has_text="L0H7").click()
        assert head_of(page) == "L0H7"


def test_hovering_a_token_tells_where_it_looks(chromium: Any, files: dict) -> None:
    example = run_of(12, 12).attention
    with opened(chromium, files["one"], at="#0-L2H5") as found:
        page = found.page
        words = page.locator("#card .word")
        words.nth(13).hover()
        best = int(example.pattern[29, 13].argmax())
        said = page.locator("#card .attention ~ [role=status]").inner_text()
        assert said.startswith(
            f"13 t13: {example.pattern[29, 13, best] / 255:.2f} to {best} t{best}"
        )
        page.locator("#card .tokens").focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#card .attention ~ [role=status]").inner_text().startswith("12 t12")
        drawn = page.evaluate(
            "[...document.querySelector('#card canvas').getContext('2d')"
            ".getImageData(0, 0, 20, 20).data].filter((_, i) => i % 4 === 3)"
        )
        assert drawn == example.pattern[29].ravel().tolist()


def test_e14_the_first_token_can_be_hidden_and_the_rest_is_divided_by_its_sum(
    chromium: Any, files: dict
) -> None:
    pattern = run_of(12, 12).attention.pattern.astype(float)
    with opened(chromium, files["one"], at="#0-L2H5") as found:
        page = found.page
        status = page.locator("#card .attention ~ [role=status]")
        page.locator("#card .tokens").focus()
        before = status.inner_text()
        page.keyboard.press("Tab")  # "who looks at it"
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        box = page.get_by_role("checkbox", name="hide first token")
        assert box.is_checked()
        shown = np.array(
            page.evaluate(
                "[...document.querySelector('#card canvas').getContext('2d')"
                ".getImageData(0, 0, 20, 20).data].filter((_, i) => i % 4 === 3)"
            )
        ).reshape(20, 20)
        rest = pattern[29, :, 1:].sum(1, keepdims=True)
        assert (rest[1:] > 0).all()
        expected = 255 * pattern[29, :, 1:] / np.maximum(rest, 1)
        assert (shown[:, 0] == 0).all()
        np.testing.assert_allclose(shown[:, 1:], expected, atol=0.51)
        assert f"({pattern[29, 19, 0] / 255:.2f} to the first, hidden)" in status.inner_text()
        page.locator('.cell[data-head="30"]').click()  # the choice stays
        assert head_of(page) == "L2H6"
        assert box.is_checked()
        page.locator('.cell[data-head="29"]').click()
        assert head_of(page) == "L2H5"
        box.uncheck()
        assert status.inner_text() == before


def test_colours_follow_the_choice(chromium: Any, files: dict) -> None:
    with opened(chromium, files["one"]) as found:
        page = found.page
        cell = page.locator(f'.cell[data-head="{11 * 12 + 1}"]')
        as_role = cell.evaluate("one => getComputedStyle(one).backgroundColor")
        assert cell.inner_text() == "I"
        page.locator("#colour-by").select_option("entropy")
        assert cell.evaluate("one => getComputedStyle(one).backgroundColor") != as_role
        assert "nats" in page.locator("#legend").inner_text()


def test_two_models_stand_side_by_side(chromium: Any, files: dict) -> None:
    with opened(chromium, files["two"]) as found:
        page = found.page
        assert page.locator(".atlas").count() == 2
        page.locator("#atlas-1 .cell[data-head]").nth(5).click()
        assert head_of(page) == "L1H1"
        assert page.locator("#card").get_attribute("data-model") == "1"
        page.locator("#filter").fill("other")
        assert page.locator("#count").inner_text() == "12 heads"
        assert found.errors == []


def test_hostile_texts_stay_text(chromium: Any, files: dict) -> None:
    with opened(chromium, files["hostile"], at="#0-L1H1") as found:
        page = found.page
        drawn_heatmap(page)
        assert head_of(page) == "L1H1"
        page.locator("#card .word").nth(3).hover()
        page.evaluate("document.querySelectorAll('.plot').forEach((one) => one.scrollIntoView())")
        page.wait_for_timeout(200)
        assert page.evaluate("window.hit") is None
        assert page.locator("img, #card svg[onload]").count() == 0
        assert page.evaluate("document.scripts.length") == 8
        assert HOSTILE[1] in page.locator("#card .tokens").inner_text()
        assert "\u202e" not in page.evaluate("document.body.innerText")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 1300
        assert found.errors == []
        assert len(found.requests) == 1


def test_many_heads_are_drawn_and_chosen_in_time(chromium: Any, files: dict) -> None:
    with opened(chromium, files["big"]) as found:
        page = found.page
        assert page.locator(".cell[data-head]").count() == 4096
        page.locator('.cell[data-head="4095"]').click()
        assert head_of(page) == "L63H63"
        sort = (
            "(() => { const t = performance.now(); document.querySelectorAll("
            "'#heads-table thead button')[2].click(); return performance.now() - t; })()"
        )
        assert page.evaluate(sort) < 2000
        assert page.locator("#heads-table tbody tr").count() == 200
        page.locator("#more").click()
        assert page.locator("#heads-table tbody tr").count() == 400
        assert found.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_does_not_scroll_sideways(chromium: Any, files: dict, dark: bool) -> None:
    with opened(chromium, files["one"], width=390, height=844, dark=dark, at="#0-L3H3") as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
        paper = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")


def test_everything_to_press_has_a_name(chromium: Any, files: dict) -> None:
    with opened(chromium, files["one"], at="#0-L3H3") as found:
        bare = found.page.evaluate(
            "[...document.querySelectorAll('button, input, select, [role=img], canvas')].filter("
            "(one) => !(one.textContent.trim() || one.ariaLabel || one.getAttribute('aria-label')"
            " || one.labels?.length || one.closest('.modebar') || one.closest('.js-plotly-plot')))"
            ".map((one) => one.outerHTML.slice(0, 80))"
        )
        assert bare == []
