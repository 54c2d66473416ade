import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from headscope.errors import InputError
from headscope.table import HeadTable
from tests.table.helpers import model_table

Change = Callable[[dict], object]
NUMBERS = ("mean", "sem", "n", "null", "effect_size", "p_value", "p_adjusted", "missing")
FACTS = ("name", "unit", "bounds", "kv_heads", "threshold", "alternative", "source", "provenance")


@pytest.mark.parametrize("examples", [True, False])
def test_round_trip(tmp_path: Path, examples: bool) -> None:
    table = model_table()
    table.save(tmp_path / "table.parquet", examples=examples)
    again = HeadTable.load(tmp_path / "table.parquet")
    assert list(again) == list(table)
    for name in table:
        for number in NUMBERS:
            ours, theirs = getattr(table[name], number), getattr(again[name], number)
            np.testing.assert_array_equal(ours, theirs)
        for fact in FACTS:
            assert getattr(again[name], fact) == getattr(table[name], fact)
        if examples:
            np.testing.assert_array_equal(again[name].per_example, table[name].per_example)
        else:
            with pytest.raises(InputError, match="not kept"):
                again[name].interval()


def test_the_same_table_is_the_same_bytes_and_nothing_is_left_beside(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "a.parquet"):
        model_table().save(tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.parquet"
    model_table().save(path)
    before = path.read_bytes()

    def torn(rows: pyarrow.Table, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(parquet, "write_table", torn)
    with pytest.raises(OSError, match="disk full"):
        model_table(seed=1).save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["table.parquet"]


def test_other_programs_read_one_row_per_layer_head_score(tmp_path: Path) -> None:
    model_table().save(tmp_path / "table.parquet")
    rows = parquet.read_table(tmp_path / "table.parquet")
    keys = set(zip(*(rows[name].to_pylist() for name in ("layer", "head", "score")), strict=True))
    assert len(keys) == rows.num_rows == 60
    assert {"mean", "sem", "n"} <= set(rows.column_names)


def damaged(path: Path, change: Change) -> None:
    """Save a table and change what its metadata says."""
    model_table().save(path)
    rows = parquet.read_table(path)
    facts = json.loads(rows.schema.metadata[b"headscope"])
    change(facts)
    parquet.write_table(rows.replace_schema_metadata({b"headscope": json.dumps(facts)}), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(format=99),
        lambda facts: facts.update(layers=10**9),
        lambda facts: facts.update(layers=2),
        lambda facts: facts.pop("scores"),
        lambda facts: facts["scores"][0].pop("bounds"),
        lambda facts: facts["scores"][0]["provenance"].update(evil=1),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Change) -> None:
    damaged(tmp_path / "table.parquet", change)
    with pytest.raises(InputError):
        HeadTable.load(tmp_path / "table.parquet")


def test_files_that_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(InputError, match="no file"):
        HeadTable.load(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable parquet"):
        HeadTable.load(path)
    parquet.write_table(pyarrow.table({"a": [1]}), path)
    with pytest.raises(InputError, match="not a table that headscope saved"):
        HeadTable.load(path)
