"""The command line as a user meets it: results, or one sentence and exit code 2."""

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import headscope as hs
from headscope.cli.app import app
from headscope.errors import HeadscopeError, InputError
from headscope.table import HeadTable
from tests.cli.support import run, sentence
from tests.models.families import fresh


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return folder, run("scan", "--out", str(folder), "--examples")


def test_scan_prints_the_table_and_leaves_a_run(scanned: tuple[Path, str]) -> None:
    folder, printed = scanned
    assert "tiny-gpt2" in printed
    assert "Roles" in printed
    table = HeadTable.load(folder / "table.parquet")
    assert table["induction"].top(1)[0][1] > 0.7
    assert table["induction"].per_example.shape[2] == 16
    facts = json.loads((folder / "run.json").read_text())
    assert facts["settings"]["model"] == "tiny-gpt2"
    assert facts["versions"]["torch"]
    page = (folder / "index.html").read_text()
    assert "default-src 'none'" in html.unescape(page)
    assert {"induction.png", "roles.png"} <= {p.name for p in (folder / "pictures").iterdir()}


def test_e14_roles_of_places_are_told_on_natural_text_too(scanned: tuple[Path, str]) -> None:
    folder, printed = scanned
    model = hs.load()
    there, random = (
        hs.score(model, probe, "previous_token")["previous_token"]
        for probe in (hs.probes.text(model), hs.probes.repeated_tokens(model, 50, batch=16))
    )
    best = there.top(1)[0][0]
    line = "previous token on natural text (on random tokens): "
    said = f"{line}{best} {there[best]:.2f} ({random[best]:.2f})"
    assert said in printed
    told = json.loads((folder / "run.json").read_text())["settings"]["roles_on_text"]
    assert any(one.startswith(said) for one in told)
    assert "current token on natural text (on random tokens): no head" in printed


def test_show_prints_the_same_table(scanned: tuple[Path, str]) -> None:
    folder, printed = scanned
    shown = run("show", str(folder))
    assert shown.splitlines()[:8] == printed.splitlines()[:8]
    rows = json.loads(run("show", str(folder), "--json"))
    assert {row["score"] for row in rows} >= {"induction", "previous_token"}


def test_json_goes_to_stdout_alone() -> None:
    rows = json.loads(run("scan", "--scorers", "entropy,induction", "--json"))
    assert {row["score"] for row in rows} == {"entropy", "induction"}


def test_small_chunks_change_nothing() -> None:
    wanted = ("scan", "--scorers", "induction", "--json")
    whole, cut = (
        json.loads(run(*wanted, *more)) for more in ((), ("--max-tokens-per-chunk", "100"))
    )
    assert [row["mean"] for row in cut] == pytest.approx([row["mean"] for row in whole], rel=1e-5)


def test_scorers_are_listed() -> None:
    listed = json.loads(run("scorers", "--json"))
    assert {"name", "unit", "range", "source", "description"} <= set(listed[0])
    assert "induction" in run("scorers")


def test_a_probe_file_is_used(tmp_path: Path) -> None:
    file = tmp_path / "probe.yaml"
    file.write_text("kind: repeated_tokens\nlength: 7\nbatch: 3\nseed: 5\n")
    out = tmp_path / "run"
    run("scan", "--probe", str(file), "--scorers", "induction", "--out", str(out))
    probe = HeadTable.load(out / "table.parquet")["induction"].provenance.probe
    assert (probe["length"], probe["examples"]) == (7, 3)


@pytest.mark.parametrize(
    "call", [("scan", "--out"), ("report", ".", "-o"), ("lens", "x", "--lens")]
)
def test_an_empty_path_is_no_path(call: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*call, ""])
    assert result.exit_code == 2
    assert "the path is empty" in result.output


def broken_model(folder: Path) -> Path:
    module = fresh("llama")
    with torch.no_grad():
        module.model.norm.weight[0] = torch.nan
    module.save_pretrained(folder)
    return folder


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "wrong.yaml").write_text("kind: repeated_tokens\nlenght: 5\n")
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['touch evil']")
    (tmp_path / "long.yaml").write_text("kind: repeated_tokens\nlength: 5000\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.yaml").write_text(f"kind: text\nfile: {tmp_path / 'empty.txt'}\n")
    cases = {
        ("scan", "--scorers", "inducton"): "did you mean 'induction'",
        ("scan", "no-such-model"): "no model 'no-such-model'",
        ("scan", "--out", str(tmp_path / "file" / "x")): "cannot write",
        ("scan", "--probe", str(tmp_path / "missing.yaml")): "could not be read",
        ("scan", "--probe", str(tmp_path / "empty.yaml")): "should hold keys",
        ("scan", "--probe", str(tmp_path / "wrong.yaml")): "did you mean 'length'",
        ("scan", "--probe", str(tmp_path / "evil.yaml")): "not readable YAML",
        ("scan", "--probe", str(tmp_path / "long.yaml")): "10001 tokens long",
        ("scan", "--probe", str(tmp_path / "text.yaml")): "empty",
        ("scan", "--memory", "potato"): "not an amount of memory",
        ("scan", "--device", "cuda:99"): "no GPU",
        ("scan", "--device", "toaster"): "unknown device",
        ("scan", "--dtype", "int1"): "unknown dtype",
        ("scan", str(broken_model(tmp_path / "nan"))): "NaN",
        ("show", str(tmp_path)): "no finished run",
    }
    for arguments, expected in cases.items():
        assert expected in sentence(*arguments), arguments
    assert not Path("evil").exists()


def test_the_program_exits_with_2_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headscope", "scan", "--scorers", "inducton"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("headscope: unknown scorer 'inducton'")
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_errors_are_one_family() -> None:
    assert issubclass(InputError, HeadscopeError)
