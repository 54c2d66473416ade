import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from headscope.report import index_page
from headscope.table import HeadTable, Provenance
from tests.table.helpers import NAN, model_table, scores

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "<!--<script>",
    "\u202egpj.exe\u2028\u2029",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt;",
    "']); alert(1); //",
]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text = [], [], [], ""
        self.inside = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


def parsed(table: HeadTable, **options: object) -> Page:
    page = Page()
    page.feed(index_page(table, **options))
    return page


def hostile_table(name: str) -> HeadTable:
    provenance = Provenance(model=name, probe={name: name}, revision=name)
    facts = {"unit": name, "description": name, "source": name, "provenance": provenance}
    return HeadTable([scores(name, threshold=0.5, **facts)])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    plain = parsed(hostile_table("plain"), title="plain", command="plain")
    page = parsed(hostile_table(name), title=name, command=name)
    assert page.tags == plain.tags
    assert {attribute[:2] for attribute in page.attributes} == {
        attribute[:2] for attribute in plain.attributes
    }
    assert len(page.scripts) == 3
    assert len(json.loads(page.scripts[0])) == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_the_data_can_end_its_script(name: str) -> None:
    data = parsed(hostile_table(name)).scripts[0]
    assert not re.search("[<>&\u2028\u2029]", data)


def test_direction_marks_are_shown() -> None:
    page = index_page(hostile_table("\u202egpj.exe"))
    assert "⟨202E⟩gpj.exe" in page
    assert "\u202e" not in page


def test_nothing_is_fetched() -> None:
    page = parsed(model_table())
    assert not [one for one in page.attributes if one[1] in ("src", "href", "action", "srcset")]
    assert "link" not in page.tags
    shell = index_page(model_table()).replace(page.scripts[1], "")
    assert "http://" not in shell
    assert "https://" not in shell
    assert "url(" not in shell
    assert "@import" not in shell


def test_the_policy_allows_exactly_these_scripts() -> None:
    page = parsed(model_table())
    policy = next(value for tag, name, value in page.attributes if "default-src" in value)
    assert "default-src 'none'" in policy
    hashes = set(re.findall(r"'sha256-([^']+)'", policy))
    digests = [hashlib.sha256(one.encode()).digest() for one in page.scripts[1:]]
    assert hashes == {base64.b64encode(digest).decode() for digest in digests}
    script_src = policy.split("script-src")[1].split(";")[0]
    assert "unsafe" not in script_src


def test_roles_are_headlines_and_none_is_said() -> None:
    text = parsed(model_table()).text
    assert "induction: L3H1 0.95, L0H3 0.60" in text
    assert "no previous token heads" in text


def test_every_head_has_a_row_and_every_score_a_column() -> None:
    page = parsed(model_table())
    assert page.tags.count("tr") == 1 + 16
    assert page.tags.count("td") == 16 * 5
    assert page.tags.count("figure") == 4
    values = [value for tag, name, value in page.attributes if name == "data-value"]
    assert values.count("nan") == 4


def test_figures_carry_the_numbers_of_the_table() -> None:
    table = model_table()
    first = json.loads(parsed(table, names=["induction"]).scripts[0])[0]["data"][0]["z"]
    z = np.frombuffer(base64.b64decode(first["bdata"]), dtype=first["dtype"].replace("f4", "<f4"))
    np.testing.assert_allclose(z.reshape(4, 4), table["induction"].mean, rtol=1e-6)


def test_facts_and_command() -> None:
    page = parsed(model_table(), settings={"batch": 77}, command="headscope scan toy")
    for said in ("batch 77", "toy", "abc", "4 (2 key/value heads)", "headscope scan toy"):
        assert said in page.text


def test_a_layer_without_attention_has_no_row() -> None:
    page = parsed(HeadTable([scores(means=((0.5, 0.5), (NAN, NAN)))]))
    assert page.tags.count("tr") == 3


def test_one_copy_of_plotly_and_the_same_bytes_again() -> None:
    page = index_page(model_table())
    assert page == index_page(model_table())
    assert 4_000_000 < len(page) < 7_000_000
