"""Results as tables, pictures and files of other programs."""

import csv
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope.errors import InputError
from headscope.sweeps import Results, export, read, run_sweep
from tests.sweeps.support import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "done"
    sets = [{"name": "all"}, {"name": "two", "random": 2, "draws": 3, "arrange": "together"}]
    run_sweep(config(edits=["zero", "mean"], metrics=["loss", "accuracy"], sets=sets), out)
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return read(folder)


def test_tables_hold_every_study(results: Results) -> None:
    assert results.complete
    table = results.table()
    assert list(table) == ["zero:loss", "zero:accuracy", "mean:loss", "mean:accuracy"]
    assert list(results.table(metric="loss")) == ["zero:loss", "mean:loss"]
    scores = results.scores(edit="mean", metric="loss")
    np.testing.assert_array_equal(scores.mean, table["mean:loss"].mean)
    assert scores.unit == "nats"
    assert hs.plots.heatmap(scores).data
    drawn = results.effects("two", edit="zero", metric="loss")
    assert drawn.per_example.shape == (3, 1, 3)


def test_what_is_ambiguous_or_unknown_gets_a_sentence(results: Results) -> None:
    for call, expected in (
        (lambda: results.scores(), "say which of zero, mean"),
        (lambda: results.scores(edit="men", metric="loss"), "did you mean 'mean'"),
        (lambda: results.scores(edit="mean", metrc="loss"), "did you mean 'metric'"),
        (lambda: results.scores("two", edit="zero", metric="loss"), "use effects"),
        (lambda: results.effects("tow"), "did you mean 'two'"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert expected in str(error.value)


def test_the_frame_has_intervals(results: Results) -> None:
    frame = results.to_pandas()
    assert len(frame) == 4 * (12 + 3)
    assert (frame["low"] <= frame["effect"] + 1e-12).all()
    assert (frame["effect"] <= frame["high"] + 1e-12).all()
    scores = results.scores(edit="zero", metric="loss")
    low, _ = scores.interval()
    chosen = frame[
        (frame["edit"] == "zero") & (frame["metric"] == "loss") & (frame["set"] == "all")
    ]
    np.testing.assert_allclose(chosen["low"], low.ravel(), atol=1e-12)


def test_csv_has_a_row_per_cell(folder: Path, results: Results, tmp_path: Path) -> None:
    with export(folder, "csv", tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["effect"]) for row in rows] == results.rows["effect"].to_pylist()
    assert {"model", "heads", "low", "high", "p_value"} <= set(rows[0])


def check_tables(run: object, results: Results) -> None:
    ((cells,),) = run("select count(*) from cells")
    ((examples,),) = run("select count(*) from examples")
    assert (cells, examples) == (60, 180)
    joined = run(
        "select cells.effect, avg(examples.effect), avg(examples.clean) from cells "
        "join examples on examples.cell = cells.cell group by cells.cell, cells.effect "
        "order by cells.cell"
    )
    np.testing.assert_allclose([a for a, _, _ in joined], results.rows["effect"].to_pylist())
    np.testing.assert_allclose([a for a, _, _ in joined], [b for _, b, _ in joined], atol=1e-12)


def test_sqlite_has_cells_and_examples(folder: Path, results: Results) -> None:
    file = export(folder, "sqlite")
    assert file == folder / "export.sqlite"
    base = sqlite3.connect(file)
    check_tables(lambda query: base.execute(query).fetchall(), results)
    base.close()


def test_duckdb_has_them_too(folder: Path, results: Results, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    file = export(folder, "duckdb", tmp_path / "x.duckdb")
    base = duckdb.connect(str(file), read_only=True)
    check_tables(lambda query: base.execute(query).fetchall(), results)
    base.close()


def test_export_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'sqlite'"):
        export(folder, "sqlit")
    with pytest.raises(InputError, match="holds no sweep"):
        export(tmp_path, "csv")
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(InputError, match=r"pip install 'headscope\[duckdb\]'"):
        export(folder, "duckdb")
    assert not list(folder.glob(".export*"))
