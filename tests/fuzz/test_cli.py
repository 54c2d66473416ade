"""Whatever is typed: exit code 0 with a result, or 2 with a sentence; never a traceback."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headscope.cli import main
from headscope.scorers import CATALOGUE
from tests.fuzz.effort import effort

words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=10)
numbers = st.integers(-2, 9).map(str) | st.sampled_from(["1e3", "nan", "9" * 30, "", "0x3"])
names = st.sampled_from([*CATALOGUE, "inducton", "*", ",", ",,entropy", "entropy,entropy"])
OPTIONS: dict[str, st.SearchStrategy[str]] = {
    "--scorers": names | words | st.lists(names, max_size=3).map(",".join),
    "--probe": words | st.sampled_from(["FOLDER/probe.yaml", "FOLDER/wrong.yaml", "FOLDER"]),
    "--out": st.sampled_from(["FOLDER/out", "FOLDER/probe.yaml/x", "/proc/none/x", ""]),
    "--revision": words | st.sampled_from(["step-003000", "main", "0" * 40]),
    "--dtype": words | st.sampled_from(["float32", "bf16", "float16", "int8"]),
    "--device": words | st.sampled_from(["cpu", "cuda", "cuda:7", "meta", "mps", "xpu"]),
    "--memory": words | st.sampled_from(["1B", "64MB", "2GB", "0", "-1"]),
    "--max-tokens-per-chunk": numbers,
    "--batch-size": numbers,
    "--seed": numbers | st.just(str(2**63)),
}
FLAGS = ("--examples", "--json", "--allow-pickle", "--trust-remote-code", "--help", "--nonsense")
MODELS = ("tiny-gpt2", "tiny-llama", "FOLDER", "FOLDER/broken", "FOLDER/probe.yaml", "no/such")
COMMANDS = ("scan", "show", "scorers", "doctor", "scna", "")
# Commands that work for seconds where all is right: what is given to them is mostly wrong.
READING = ("status", "export", "report", "sweep", "compare", "emergence", "influence")
ABOUT_ONE = ("head", "lens", "circuits", "retrieval")
LIMITED = {
    "circuits": ("--tokens", "--paths", "--seed"),
    "retrieval": ("--lengths", "--depths", "--needles", "--per-cell", "--form", "--random"),
}
WRONG = ("FOLDER", "FOLDER/broken", "FOLDER/probe.yaml", "FOLDER/wrong.yaml", "no/such", "--to")


@st.composite
def calls(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(COMMANDS) | words)
    call = [command]
    if draw(st.integers(0, 3)) == 0:
        command = draw(st.sampled_from(READING + ABOUT_ONE))
        given = st.sampled_from(WRONG) | words
        wrong = draw(st.lists(given, min_size=1, max_size=3))
        for option in LIMITED.get(command, ()):
            if draw(st.booleans()):
                wrong = [option, draw(numbers | words), *wrong]
        return [command, *(["no/such"] if command in ABOUT_ONE else []), *wrong]
    if command in ("scan", "doctor", "show"):
        call += draw(st.lists(st.sampled_from(MODELS) | words, max_size=1))
    if command in ("scan", "doctor"):
        # A short scan unless something else is drawn.
        chosen = draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=3)) | {"--scorers"}
        for option in sorted(chosen if command == "scan" else chosen - {"--scorers"}):
            call += [option, draw(OPTIONS[option])]
    return call + draw(st.lists(st.sampled_from(FLAGS), max_size=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("desk")
    (home / "probe.yaml").write_text("kind: random_tokens\nlength: 6\nbatch: 2\n")
    (home / "wrong.yaml").write_text("kind: 3\n")
    (home / "broken").mkdir()
    (home / "broken" / "config.json").write_text('{"model_type": "gpt2", "n_head": -1}')
    return home


def run(call: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program, started in a folder."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", ["headscope", *call]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


@effort(25)
@given(calls())
@pytest.mark.filterwarnings("ignore")
def test_any_call(folder: Path, call: list[str]) -> None:
    code, out, err = run([word.replace("FOLDER", str(folder)) for word in call], folder)
    assert code in (0, 2), (call, code)
    assert "Traceback" not in out + err
    if code == 0:
        assert out.strip() or call[0] == "", call
    else:
        assert err.strip() or out.strip(), call  # a bare call prints help
        said = [line for line in err.splitlines() if line.startswith("headscope: ")]
        assert len(said) <= 1, err
