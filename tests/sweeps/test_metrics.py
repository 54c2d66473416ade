"""Metrics of one sweep share passes, and give what each gives in a sweep of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headscope.sweeps import make_plan, read, run_sweep
from headscope.sweeps.store import KEYS
from tests.sweeps.support import config, variants_run

IOI = {"kind": "ioi", "batch": 4}
METRICS = ["logit_difference", {"metric": "kl_divergence", "at": "end"}, "loss"]
SETS = [
    {"name": "some", "heads": ["L0H1", "L1H2", "L2H3"]},
    {"name": "curve", "score": "attribution", "arrange": "cumulative", "steps": 3},
    {"name": "drawn", "random": 2, "draws": 3, "arrange": "together"},
]


def test_numbers_are_those_of_a_sweep_per_metric(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"probes": [IOI], "edits": ["mean"]}
    fixed = [SETS[0], SETS[2]]
    run_sweep(config(**wanted, metrics=METRICS, sets=fixed), tmp_path / "all")
    frame = read(tmp_path / "all").to_pandas()
    assert not frame.duplicated(list(KEYS)).any()
    for number, metric in enumerate(METRICS):
        out = tmp_path / str(number)
        run_sweep(config(**wanted, metrics=[metric], sets=fixed), out)
        alone = read(out).to_pandas()
        (name,) = alone["metric"].unique()
        same = frame[frame["metric"] == name]
        assert same["heads"].tolist() == alone["heads"].tolist()
        for column in ("effect", "sem", "clean"):
            np.testing.assert_allclose(same[column], alone[column], atol=1e-6)
        assert same["unit"].tolist() == alone["unit"].tolist()
        own, shared = (read(p).scores("some", metric=name) for p in (out, tmp_path / "all"))
        assert own.provenance.probe == shared.provenance.probe


def test_a_set_is_run_once_for_all_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = variants_run(monkeypatch)
    counts = {}
    for name, metrics in (("one", METRICS[:1]), ("three", METRICS)):
        run.clear()
        run_sweep(config(probes=[IOI], metrics=metrics, sets=SETS[::2]), tmp_path / name)
        counts[name] = sum(run)
    assert counts["one"] == counts["three"] <= 3 + 3 + 2 * 2  # and the proof, twice a study


def test_sets_that_a_metric_ranked_are_its_own() -> None:
    wanted = config(
        probes=[IOI], metrics=["logit_difference", "answer_probability"], sets=SETS, chunk=64
    )
    plan = make_plan(wanted)
    by_metric: dict[str, list[tuple[str, int, Any]]] = {}
    for chunk in plan.chunks:
        for metric in plan.studies[chunk.study].metrics:
            found = by_metric.setdefault(metric.label, [])
            found += [(cell.set, cell.draw, cell.heads) for cell in chunk.cells]
    assert plan.n_cells == sum(map(len, by_metric.values())) == 2 * (3 + 4 + 3)
    for metric, found in by_metric.items():
        alone = make_plan(config(probes=[IOI], metrics=[metric], sets=SETS, chunk=64))
        expected = [(one.set, one.draw, one.heads) for chunk in alone.chunks for one in chunk.cells]
        assert sorted(found) == sorted(expected)
    curves = [{c for c in found if c[0] == "curve"} for found in by_metric.values()]
    assert ("curve", 0, ()) in curves[0] & curves[1]
    shared = [c for c in plan.chunks if len(plan.studies[c.study].metrics) == 2]
    assert {cell.set for chunk in shared for cell in chunk.cells} == {"some", "curve", "drawn"}
    assert len(curves[0] & curves[1]) < 4, "both metrics rank alike: the test shows nothing"
