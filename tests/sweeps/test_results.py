"""Results as tables, pictures and files of other programs."""

import csv
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headscope as hs
from headscope.cli.runs import run_report
from headscope.errors import InputError
from headscope.sweeps import Results, export, make_plan, read, run_sweep, status
from headscope.sweeps.plan import Chunk
from headscope.sweeps.run import Benches, OnFinished, Stop, Work, estimate, inline
from tests.sweeps.support import REPEATED, config


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


EDGES: dict[str, Any] = {
    "probes": [{"kind": "ioi", "batch": 3}],
    "metrics": ["logit_difference"],
    "edits": [],
    "edges": [{"method": "eap_ig", "steps": 2, "circuits": [15]}, "eap"],
}


@pytest.fixture(scope="module")
def edge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edges") / "done"
    run_sweep(config(**EDGES), out)
    return out


def test_edges_and_circuits_are_those_of_the_functions(edge_folder: Path, tmp_path: Path) -> None:
    found, model = read(edge_folder), hs.load()
    assert found.complete
    assert status(edge_folder).cells_done == 2 * 262 + 1
    probe, metric = hs.probes.pairs(model, "ioi", batch=3), hs.metrics.logit_difference
    graph = hs.edges.attribute(model, probe, metric, "eap_ig", 2)
    kept = found.edges(edit="eap_ig#2")
    np.testing.assert_array_equal(kept.per_example, graph.per_example)
    assert (kept.wiring, kept.steps, kept.unit) == (graph.wiring, 2, graph.unit)
    assert kept.provenance.weight_digest == model.digest()
    circuit, again = hs.edges.circuit(model, probe, metric, graph, 15), found.circuit(15)
    assert again.edges == circuit.edges
    assert again.faithfulness == pytest.approx(circuit.faithfulness, abs=1e-6)
    assert again.checks is not None
    assert circuit.checks is not None
    assert again.checks.rows() == circuit.checks.rows()
    assert repr(again) == repr(circuit)
    frame = found.to_pandas()
    assert set(frame["set"]) == {"edges", "circuit15"}
    assert frame["heads"].iloc[0] == str(graph.edges[0])
    with pytest.raises(InputError, match="several of edit"):
        found.edges()
    with pytest.raises(InputError, match="no cell of the set 'circuit9'"):
        found.circuit(9)
    html = tmp_path / "page.html"
    run_report([edge_folder], out=html, overwrite=False, title=None)
    text = html.read_text("utf-8")
    assert "Edges: eap_ig#2, logit_difference, ioi" in text
    assert "Circuit: eap_ig#2, logit_difference, ioi" in text


def test_edges_go_on_where_they_stopped(edge_folder: Path, tmp_path: Path) -> None:
    """Chunk by chunk: the table is the same, and scores are taken from their folder."""
    wanted = config(**EDGES)

    def one(work: Work, chunks: Sequence[Chunk], stop: Stop, finished: OnFinished) -> None:
        inline(work, chunks[:1], stop, finished)

    for done in (1, 2, 3):
        assert run_sweep(wanted, tmp_path, executor=one).done == done
        assert len(list((tmp_path / "scored").glob("*.npy"))) == (0, 1, 1, 0)[done]
    whole, parts = (place / "table.parquet" for place in (edge_folder, tmp_path))
    assert whole.read_bytes() == parts.read_bytes()


def test_what_does_not_fit_is_refused_before_a_chunk_runs(tmp_path: Path) -> None:
    cases = {
        "has 262 in all": {"edges": [{"method": "eap", "circuits": [262]}]},
        "its gradient there is 0": {"edges": ["eap"], "metrics": ["kl_divergence"]},
        "no corrupt pair": {"edges": [{"method": "eap", "ablation": "patch"}], "probes": [REPEATED],
                            "metrics": ["loss"]},
    }  # fmt: skip
    for said, changes in cases.items():
        with pytest.raises(InputError, match=said):
            run_sweep(config(**EDGES | changes), tmp_path / said[:3])


def test_the_cost_of_edges_is_told(tmp_path: Path) -> None:
    wanted = config(**EDGES)
    benches = Benches(wanted)
    plan = make_plan(wanted, benches=benches)
    found = estimate(wanted, plan, benches)
    assert (found.cells, found.chunks) == (525, 3)
    # Scores: the pair's runs and three passes a gradient; the circuit: eight runs of three.
    assert found.passes == 3 * ((2 + 3 * 2) + 24 + (2 + 3))
    assert found.seconds > 0
