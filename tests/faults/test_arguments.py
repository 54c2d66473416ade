"""Arguments that mean nothing: one sentence, before any compute, and never a wrong number."""

import json
import re
import subprocess
import sys

import pytest

from tests.faults.misuse import CALLS


@pytest.fixture(scope="module")
def raised() -> dict[str, tuple[str, str]]:
    """Kind of error and sentence of every call."""
    command = [sys.executable, "-m", "tests.faults.misuse"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, tuple[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("what", CALLS)
def test_b14_arguments_that_mean_nothing_are_refused(
    raised: dict[str, tuple[str, str]], what: str
) -> None:
    kind, sentence = raised[what]
    assert kind == "sentence", sentence
    assert re.search(CALLS[what][1], sentence), sentence
