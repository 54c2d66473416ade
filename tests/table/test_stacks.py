"""Tables of one attention stack and of several."""

from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope.errors import InputError
from headscope.table import HeadScores, HeadTable


def score(name: str, heads: int, stack: str = "") -> HeadScores:
    values = np.arange(2.0 * heads).reshape(2, heads)
    return HeadScores.from_summary(name, values, kv_heads=heads).of_stack(stack)


def test_a_table_of_one_stack_is_that_stack() -> None:
    table = HeadTable([score("entropy", 3), score("induction", 3)])
    assert list(table.stacks) == [""]
    assert table.stack("") is table
    with pytest.raises(InputError, match="no stack 'cross': it has ''"):
        table.stack("cross")


def test_a_table_of_several_stacks_groups_them() -> None:
    stacks = {"encoder": 3, "decoder": 4, "cross": 4}
    table = HeadTable([score("entropy", heads, stack) for stack, heads in stacks.items()])
    assert list(table.stacks) == list(stacks)
    assert table.stack("cross")["entropy"].mean.shape == (2, 4)
    assert list(table) == ["encoder:entropy", "decoder:entropy", "cross:entropy"]
    assert table["encoder:entropy"].mean.shape == (2, 3)
    best = table.stack("cross").top("entropy", 1)[0][0]
    assert str(best) == "X1H3"
    assert table.stack("cross")["entropy"][best] == 7.0
    assert set(table.to_pandas()["label"]) >= {"E0H0", "D1H3", "X1H3"}
    assert "encoder, decoder, cross" in repr(table)
    with pytest.raises(InputError, match="choose one"):
        _ = table.shape
    with pytest.raises(InputError, match="no head X0H1"):
        _ = table.stack("encoder")["entropy"]["X0H1"]


def test_a_stack_is_kept_in_files(tmp_path: Path) -> None:
    table = HeadTable([score("entropy", 4, "encoder"), score("entropy", 3, "cross")])
    table.save(tmp_path / "all.parquet")
    both = hs.HeadTable.load(tmp_path / "all.parquet")
    assert list(both.stacks) == ["encoder", "cross"]
    for name in both:
        np.testing.assert_array_equal(both[name].mean, table[name].mean)
    table.stack("cross").save(tmp_path / "cross.parquet")
    again = hs.HeadTable.load(tmp_path / "cross.parquet")
    assert list(again.stacks) == ["cross"]
    assert str(again.top("entropy", 1)[0][0]) == "X1H2"


def test_scores_of_one_stack_must_be_of_one_size() -> None:
    with pytest.raises(InputError, match="not of one model"):
        HeadTable([score("a", 3, "cross"), score("b", 4, "cross")])
    with pytest.raises(InputError, match="stack"):
        score("a", 3, "croos")
