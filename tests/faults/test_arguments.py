"""Arguments that mean nothing: one sentence, before any compute, and never a wrong number."""

import json
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

import headscope as hs
from headscope.models.protocol import HeadModel
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


EQUAL = ["the cat sat on the mat and the dog ran to the house"] * 4


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: hs.geometry.layers(model, EQUAL),
        lambda model: hs.geometry.heads(model, EQUAL),
        lambda model: hs.geometry.invariance(model, EQUAL),
        lambda model: hs.geometry.position_layers(model, EQUAL),
        lambda model: hs.geometry.position_heads(model, EQUAL),
        lambda model: hs.geometry.high_frequency_gain(model, EQUAL),
    ],
)
def test_texts_that_are_all_the_same_are_refused(ask: Callable[[HeadModel], object]) -> None:
    with pytest.raises(hs.HeadscopeError, match="texts are all the same"):
        ask(hs.load())


def test_one_text_is_measured_without_an_interval() -> None:
    assert np.isfinite(hs.geometry.layers(hs.load(), EQUAL[:1])["curvature"].mean).all()


def test_programs_that_do_not_fit_are_refused() -> None:
    from headscope.compiled import Head, offset, program, same

    far = Head(0, "position", "position", offset(9), "token", "answer")
    with pytest.raises(hs.HeadscopeError, match="looks back 9 positions"):
        program([far], tokens=4, length=3, outputs=["answer"], name="far")
    with pytest.raises(hs.HeadscopeError, match="distance=-1"):
        offset(-1)
    for name in ("seed", "rotation_seed"):
        with pytest.raises(hs.HeadscopeError, match=f"{name}=-1"):
            program(
                [Head(0, "token", "token", same(), "token", "answer")],
                tokens=4, length=3, outputs=["answer"], name="near", **{name: -1},
            )  # fmt: skip
