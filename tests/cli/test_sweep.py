"""The commands of sweeps, as a user meets them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from headscope.cli.app import app
from headscope.sweeps import read, status
from headscope.sweeps.run import Bench
from tests.cli.support import sentence
from tests.sweeps.support import config


def run(*arguments: object, code: int = 0) -> str:
    """What a command said, on stdout and stderr."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "sweep.yaml"
    made.write_text(yaml.safe_dump(config().model_dump(mode="json", exclude_none=True)))
    return made


def test_sweep_status_export(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "1 of 1 chunks done" in run("sweep", file, "--out", out, "--shard", "2/3")
    said = run("status", out)
    assert "test: 1 of 3 chunks done, 2 pending, 0 failed (4 of 12 cells)" in said
    found = json.loads(run("status", out, "--json"))
    assert (found["done"], found["pending"], found["compacted"]) == (1, 2, False)
    assert f"Written to {out / 'table.parquet'}" in run("sweep", file, "--out", out)
    assert "3 of 3 chunks done" in run("status", out)
    assert str(out / "export.csv") in run("export", out)
    assert (out / "export.csv").read_text().count("\n") == 13
    run("export", out, "--to", "sqlite", "--out", tmp_path / "x.db")
    assert (tmp_path / "x.db").exists()
    assert read(out).complete


def test_a_dry_run_counts_and_measures_and_writes_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("sweep", file, "--dry-run")
    assert "test: 12 cells in 3 chunks" in said
    # 3 examples x (3 clean runs + 4 heads in layers 0, 1, 2 of 3: 4 x (1 + 2/3 + 1/3))
    assert "36 edited examples, equivalent to 33 full passes" in said
    assert "timed: one cell of tiny-gpt2" in said
    assert list(tmp_path.iterdir()) == [file]


def test_failures_give_reasons_and_exit_code_1(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(Bench, "measure", failing)
    out = tmp_path / "the [out]"
    said = run("sweep", file, "--out", out, "--shard", "1/2", code=1)
    assert "RuntimeError: no luck" in said
    assert f"try them again with: headscope sweep {file} --out '{out}' --shard 1/2" in said
    said = run("sweep", file, "--out", tmp_path / "out", code=1)
    assert "RuntimeError: no luck" in run("status", tmp_path / "out")
    assert len(status(tmp_path / "out").failed) == 3


def test_the_schema_is_json() -> None:
    assert json.loads(run("sweep", "--schema"))["title"] == "SweepConfig"


def test_mistakes_get_a_sentence(file: Path, tmp_path: Path) -> None:
    cases = {
        ("sweep",): "give a config",
        ("sweep", tmp_path / "none.yaml"): "could not be read",
        ("sweep", file, "--shard", "4/3"): "write i/N with",
        ("sweep", file, "--shard", "0/3"): "write i/N with",
        ("sweep", file, "--shard", "x"): "write i/N with",
        ("sweep", file, "--executor", "rya"): "did you mean 'ray'",
        ("sweep", file, "--workers", "2"): "--workers is for --executor ray",
        ("sweep", file, "--out", file / "x"): "cannot write",
        ("status", tmp_path): "holds no sweep",
        ("export", tmp_path): "holds no sweep",
        ("export", tmp_path, "--to", "xls"): "unknown format",
    }
    for arguments, expected in cases.items():
        assert expected in sentence(*arguments), arguments
