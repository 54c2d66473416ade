"""Every Python block and every command in the documentation and the README runs."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headscope.cli.app import app
from headscope.scorers import CATALOGUE
from tests.docs.pages import ROOT, blocks, commands

README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "howto").glob("*.md"))]
# What the README says of gpt2, said of the bundled model, which has three layers.
STANDS_FOR = {"gpt2": "tiny-gpt2", "L5H1": "L2H1"}
# Commands whose default is for results, not for a look: they run here on fewer examples, kinds or
# scores, unless the page says which.
FEWER = {
    "edges": {"--examples": "12"},
    "kinds": {"--kinds": "previous_token,induction,copying"},
    "emergence": {"--scorers": "induction"},
}
WITH_CODE = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if commands(page, "bash")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the repository's configs, to work in."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(words: list[str]) -> None:
    asked = [*words]
    for option, value in FEWER.get(words[0], {}).items():
        asked += [] if option in words else [option, value]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0, (asked, result.output)


def run_python(page: Path, bodies: list[str]) -> None:
    scope: dict[str, object] = {}
    for number, body in enumerate(bodies, 1):
        exec(compile(body, f"{name(page)}, block {number}", "exec"), scope)  # noqa: S102


def test_there_are_pages() -> None:
    assert len(WITH_CODE) > 4
    assert WITH_COMMANDS


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
@pytest.mark.filterwarnings("ignore:.*_check_is_size:FutureWarning")
def test_python_blocks_run(page: Path, desk: Path) -> None:
    run_python(page, blocks(page, "python"))


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_commands_run(page: Path, desk: Path) -> None:
    for words in commands(page, "bash"):
        run_command(words[1:])


def test_readme_blocks_run(desk: Path) -> None:
    # gpt2 stands for any model there; here it is the bundled one (below, too).
    run_python(README, [body.replace('"gpt2"', "None") for body in blocks(README, "python")])
    assert (desk / "gpt2.parquet").exists()


def test_readme_commands_run(desk: Path) -> None:
    found = commands(README, "")
    shutil.copy(ROOT / "Makefile", desk)
    targets = (desk / "Makefile").read_text(encoding="utf-8")
    assert {words[0] for words in found} == {"headscope", "make"}
    for words in found:
        if words[0] == "make":
            assert f"\n{words[1]}:" in targets, words
            continue
        run_command([STANDS_FOR.get(word, word) for word in words[1:]])


def test_readme_table_is_checkable() -> None:
    text = README.read_text(encoding="utf-8")
    table = text.split("## Beside other tools")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 5
    assert {len(row) for row in rows} == {len(rows[0])}
    for row in rows[1:]:
        assert list((ROOT / row[-1].strip(" `")).glob("test_*.py")), row
    assert len(CATALOGUE) > 90
