import builtins

import numpy as np
import pytest

from headscope.errors import InputError
from headscope.table import HeadScores, HeadTable, Provenance
from tests.table.helpers import NAN, model_table, scores


def test_it_is_a_mapping() -> None:
    table = model_table()
    assert list(table) == ["entropy", "induction", "previous_token", "effect"]
    assert "induction" in table
    assert "x" not in table
    assert table.get("x") is None
    with pytest.raises(InputError, match=r"^unknown score 'inducton'; did you mean 'induction'\?"):
        table["inducton"]


@pytest.mark.parametrize(
    "pair",
    [
        [],
        [scores("a"), scores("a")],
        [scores("a"), scores("b", means=((1.0, 2.0),))],
        [scores("a"), scores("b", kv_heads=2)],
        [
            scores("a", provenance=Provenance(weight_digest="1")),
            scores("b", provenance=Provenance(weight_digest="2")),
        ],
    ],
)
def test_what_cannot_be_one_table(pair: list[HeadScores]) -> None:
    with pytest.raises(InputError):
        HeadTable(pair)


def test_filter() -> None:
    table = HeadTable([scores()])
    assert table.filter("induction", minimum=0.2) == [(0, 0), (1, 1), (1, 0)]
    assert table.filter("induction", maximum=0.5) == [(1, 0), (0, 1)]
    assert table.filter("induction", minimum=0.5, heads=["L1H1", "0.1"]) == [(1, 1)]


def test_join_and_its_clash() -> None:
    both = HeadTable([scores("a")]).join(HeadTable([scores("b")]))
    assert list(both) == ["a", "b"]
    with pytest.raises(InputError, match="two scores are called 'a'"):
        both.join(HeadTable([scores("a")]))


def test_rank_correlation_and_overlap() -> None:
    table = HeadTable([scores("a"), scores("b", means=((0.1, 0.9), (0.8, 0.2)))])
    frame = table.rank_correlation()
    assert frame.loc["a", "a"] == 1
    assert frame.loc["a", "b"] == pytest.approx(-1)
    other = HeadTable([scores("a", means=((0.9, 0.8), (0.1, 0.2)))])
    assert table.overlap(other, "a", 2) == pytest.approx(1 / 3)


def test_roles_are_strongest_first_and_need_a_threshold() -> None:
    table = HeadTable(
        [
            scores("a", threshold=0.5),
            scores("b", threshold=0.5, means=((0.95, 0.1), (0.1, 0.1))),
            scores("c"),
        ]
    )
    assert table.roles() == {
        (0, 0): [("b", pytest.approx(0.95)), ("a", pytest.approx(0.9))],
        (1, 1): [("a", pytest.approx(0.8))],
    }


def test_summary_says_none_and_not_tested_in_words() -> None:
    table = HeadTable(
        [
            scores("induction", threshold=0.5),
            scores("previous_token", threshold=0.95),
            scores("duplicate_token", threshold=0.5, control_per_example=None),
        ]
    )
    said = [str(finding) for finding in table.role_summary()]
    assert said[0] == "induction: L0H0 0.90, L1H1 0.80"
    assert said[1] == "no previous token heads"
    assert said[2].startswith("duplicate token: not tested")


def test_tidy_and_wide_frames() -> None:
    table = model_table()
    tidy = table.to_pandas()
    assert len(tidy) == 3 * 16 + 12
    row = tidy.query("score == 'induction' and label == 'L3H1'").iloc[0]
    assert (row["layer"], row["head"], row["kv_head"]) == (3, 1, 0)
    assert row["mean"] == pytest.approx(0.95)
    assert row.p_adjusted < 0.05
    wide = table.to_pandas_wide()
    assert wide.loc["L3H1", "induction"] == pytest.approx(0.95)
    assert np.isnan(wide.loc["L1H0", "effect"])
    assert wide.loc["L0H2", "kv_head"] == 1


def test_a_layer_without_attention_has_no_row() -> None:
    wide = HeadTable([scores(means=((0.5, 0.5), (NAN, NAN)))]).to_pandas_wide()
    assert list(wide.index) == ["L0H0", "L0H1"]


def test_polars_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_polars(name: str, *args: object, **kwargs: object) -> object:
        if name == "polars":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_polars)
    with pytest.raises(InputError, match=r"headscope\[polars\]"):
        model_table().to_polars()


def test_polars_holds_the_same_rows() -> None:
    pytest.importorskip("polars")
    table = model_table()
    assert table.to_polars()["mean"].to_list() == table.to_pandas()["mean"].to_list()
