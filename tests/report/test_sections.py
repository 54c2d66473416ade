"""Pages of sections: everything in them is text, and each picture is there in both themes."""

import json

import numpy as np
import pytest

from headscope import plots
from headscope.report import Facts, Picture, Rows, Section, Words, index_page, sections_page
from headscope.report.head import HeadEvidence, HeadExample, head_page
from headscope.table import HeadCard, HeadEigenvalues, HeadSpectra
from tests.report.test_page import HOSTILE, Page
from tests.table.helpers import model_table, scores


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


def sections_of(name: str) -> list[Section]:
    light, dark = (plots.heatmap(scores(name), theme=theme) for theme in ("light", "dark"))
    return [
        Section(
            name,
            [
                Words(name),
                Facts([(name, name)]),
                Rows((name, "n"), [(name, 0.5), ((name, name), 3)], caption=name),
                Picture(light, dark, name, name),
            ],
        )
    ]


def card_of(name: str) -> HeadCard:
    view = {"singular_value": 2.0, "reads": [[name], [name]], "writes": [[name], [name]]}
    return HeadCard(
        head="L1H1",
        kv_head=0,
        model=name,
        scores={"ov_norm": 3.0, "gone": float("nan")},
        ranks={"ov_norm": 1, "gone": 2},
        ov=[view],
        qk=[view],
        fed_by={"K": [("L0H1", 0.4)], "Q": []},
        feeds={"K": []},
        missing={name: name},
    )


def evidence_of(name: str) -> HeadEvidence:
    spectra = HeadSpectra("OV", np.ones((2, 2, 3)), np.ones((2, 2)), np.ones(3), np.ones(3))
    values = HeadEigenvalues("OV", np.ones((2, 2, 3), complex))
    example = HeadExample(np.eye(2), [name, name], name)
    return HeadEvidence([spectra], [values], model_table(2, 2), example, [scores(name)])


@pytest.mark.parametrize("name", HOSTILE[::3])
def test_hostile_texts_stay_text(name: str) -> None:
    for make in (
        lambda word: sections_page(word, word, word, sections_of(word), [(word, word)], word),
        lambda word: index_page(model_table(), sections=sections_of(word)),
        lambda word: head_page(card_of(word), evidence_of(word), [(word, word)]),
    ):
        plain, page = parsed(make("plain")), parsed(make(name))
        assert page.tags == plain.tags
        assert len(page.scripts) == 3


def test_pictures_follow_the_heatmaps_and_come_in_both_themes() -> None:
    page = parsed(index_page(model_table(), sections=sections_of("x")))
    figures = json.loads(page.scripts[0])
    places = [value for _, name, value in page.attributes if name == "data-figure"]
    assert places == [str(len(model_table()))]
    one = figures[int(places[0])]
    assert one["light"]["layout"]["paper_bgcolor"] != one["dark"]["layout"]["paper_bgcolor"]
    assert "data" in figures[0]


def test_a_page_without_a_table_has_none() -> None:
    page = parsed(sections_page("a", "b", "c", sections_of("x")))
    assert not [value for _, name, value in page.attributes if (name, value) == ("id", "table")]


def test_a_heads_page_says_what_is_known_and_no_more() -> None:
    page = parsed(head_page(card_of("toy"), evidence_of("toy")))
    for said in ("On probes", "Ablation", "Attention", "ov_norm", "L0H1 0.400", "queries by keys"):
        assert said in page.text or any(said in value for *_, value in page.attributes)
    assert "gone" not in page.text
    bare = parsed(head_page(card_of("toy"), HeadEvidence()))
    assert "On probes" not in bare.text
    assert "Ablation" not in bare.text


def test_ranks_count_heads_above() -> None:
    page = parsed(head_page(card_of("toy"), evidence_of("toy")))
    table = model_table(2, 2)["induction"]
    rank = 1 + int((table.mean > table.mean[1, 1]).sum())
    assert f"{rank} of 4" in page.text
