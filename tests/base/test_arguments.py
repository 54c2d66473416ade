"""Arguments of public functions are checked against their annotations, all in one way."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import pytest
import torch

import headscope as hs
from headscope.base.arguments import checked
from headscope.base.result import Shown
from headscope.compiled.compiled import BuildOptions
from headscope.models.protocol import HeadModel
from headscope.probes import Probe
from headscope.table import HeadScores

# Their methods run in every pass.
MODELS = (hs.training.HFModel,)


def public() -> Iterator[tuple[str, FunctionType]]:
    """Every function that users reach as ``hs.name`` or ``hs.room.name``, with its name."""
    for name in [name for name in dir(hs) if not name.startswith("_")]:
        found = getattr(hs, name)
        if inspect.isfunction(found):
            yield f"hs.{name}", found
        elif inspect.ismodule(found) and found.__name__.startswith("headscope."):
            inside = getattr(found, "__all__", dir(found))
            for part in [part for part in inside if not part.startswith("_")]:
                value = getattr(found, part)
                if inspect.isfunction(value) and value.__module__.startswith(found.__name__):
                    yield f"hs.{name}.{part}", value


def methods() -> Iterator[tuple[str, FunctionType]]:
    """Every public method with arguments of the results that users reach, with its name."""
    for name in [name for name in dir(hs) if not name.startswith("_")]:
        found = getattr(hs, name)
        inside = getattr(found, "__all__", dir(found)) if inspect.ismodule(found) else []
        for kind in [found, *(getattr(found, part) for part in inside)]:
            if inspect.isclass(kind) and issubclass(kind, Shown) and kind not in MODELS:
                for part in [part for part in dir(kind) if not part.startswith("_")]:
                    value = inspect.getattr_static(kind, part)
                    value = getattr(value, "__func__", value)
                    ours = inspect.isfunction(value) and value.__module__.startswith("headscope")
                    if ours and len(inspect.signature(value).parameters) > 1:
                        yield f"{kind.__name__}.{part}", value


def test_every_public_method_of_results_checks_its_arguments() -> None:
    known = dict(methods())
    assert {"HeadScores.top", "HeadTable.save", "EdgeGraph.load", "Probe.mark"} <= set(known)
    assert not [name for name, method in known.items() if not _is_checked(method)]


def _is_checked(method: Callable[..., object]) -> bool:
    """Whether one of the functions around a method is the one that checks."""
    while method.__code__.co_name != "refusing":
        if not hasattr(method, "__wrapped__"):
            return False
        method = method.__wrapped__
    return True


def test_every_public_function_checks_its_arguments() -> None:
    elsewhere = ("headscope.base", "headscope.errors")
    bare = [
        name
        for name, function in public()
        if function.__module__.startswith("headscope")
        and not function.__module__.startswith(elsewhere)
        and "checked" not in _decorators(function)
    ]
    assert not bare, "decorate these with headscope.base.arguments.checked"


def _decorators(function: FunctionType) -> str:
    source = inspect.getsource(inspect.unwrap(function))
    return source[: source.index("def ")]


@checked
def example(
    model: HeadModel | None = None,
    probe: Probe | None = None,
    count: int = 1,
    rate: float | None = None,
    flag: bool = False,
    name: str = "",
    side: Literal["left", "right"] = "left",
    layers: Sequence[int] | None = None,
    names: str | Sequence[str] = (),
    path: str | Path | None = None,
    scores: HeadScores | None = None,
    tensor: torch.Tensor | None = None,
    options: BuildOptions | None = None,
    made: "Callable[[int], int] | None" = None,
    batch_size: int | None = None,
    seed: int = 0,
    **more: object,
) -> str:
    """Take one argument of each kind."""
    return name


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt2"}, "'gpt2' is not a loaded model: give what hs.load returns."),
    ({"model": torch.nn.Linear(2, 2)}, "a Linear is not a loaded model: give what hs.load"),
    ({"probe": "the cat"}, "a str is not a probe: make one with hs.probes"),
    ({"count": "x"}, "count='x': give a whole number."),
    ({"count": 1.5}, "count=1.5: give a whole number."),
    ({"count": True}, "count=True: give a whole number."),
    ({"count": None}, "count=None: give a whole number."),
    ({"rate": "fast"}, "rate='fast': give a number."),
    ({"rate": float("nan")}, "rate=nan: give a number."),
    ({"flag": "yes"}, "flag='yes': give True or False."),
    ({"name": 3}, "name=3: give a text."),
    ({"side": "rihgt"}, "unknown side 'rihgt'; did you mean 'right'? known: left, right."),
    ({"layers": 1}, "layers=1: give a list, as layers=[0, 1]."),
    ({"layers": "01"}, "layers='01': give a list, as layers=[0, 1]."),
    ({"layers": [0, 1.5]}, "layers=[0, 1.5]: 1.5 is not a whole number."),
    ({"names": [3]}, "names=[3]: 3 is not a text."),
    ({"names": 3}, "names=3: give a text or a list of texts."),
    ({"path": 3}, "path=3: give a text, a Path or None."),
    ({"scores": {"a": 1}}, "scores={'a': 1}: give a HeadScores."),
    ({"scores": np.zeros((2, 2))}, "scores is a ndarray: give a HeadScores."),
    ({"tensor": "abc"}, "tensor='abc': give a tensor."),
    ({"tensor": ["L0H1"]}, "tensor=['L0H1']: give a tensor."),
    ({"options": 3}, "options=3: give a mapping, as options={'name': ...}."),
    ({"batch_size": 0}, "batch_size=0: give 1 or more."),
    ({"seed": -1}, "seed=-1 is not a seed: give a whole number from 0 on."),
]
# Types are checked at run time in the tests: these calls are made in a process without.
CALLS: dict[str, Callable[[], object]] = {
    "geometry": lambda: hs.geometry.layers("gpt2", ["a"]),
    "skip": lambda: hs.geometry.layers(hs.load(), ["a b"], skip="x"),
    "views": lambda: hs.geometry.invariance(hs.load(), ["a b"], views="x"),
    "lens": lambda: hs.lens.tuned_lens(hs.load(), steps="x"),
    "k": lambda: hs.lens.logit_lens(hs.load(), "a b", k="x"),
    "against": lambda: hs.lens.head_attribution(hs.load(), _probe(), "foli"),
    "threshold": lambda: hs.flow.routes(hs.load(), "a b", part_threshold="x"),
    "at": lambda: hs.similarity.heads(hs.load(), _probe(), seed=-1),
    "edges": lambda: hs.edges.circuit(hs.load(), _probe(), hs.metrics.loss, "graph", 3),
    "positions": lambda: hs.ablate_heads(hs.load(), _probe(), hs.metrics.loss, positions=[1]),
    "at as a list": lambda: hs.flow.max_flow(hs.load(), _probe(), at=[1]),
    "fractions as tokens": lambda: hs.lens.logit_lens(hs.load(), [1.5, 2.0]),
    "checkpoint": lambda: hs.lens.tuned_lens(hs.load(), checkpoint=3),
    "k of a result": lambda: _scores().top("x"),
    "level of a result": lambda: _scores().interval("x"),
    "score of a table": lambda: hs.HeadTable([_scores()]).top(3),
    "path of a table": lambda: hs.HeadTable([_scores()]).save(3),
    "path of a result": lambda: _scores().save(3),
    "load of a result": lambda: HeadScores.load(3),
    "graph": lambda: hs.edges.attribute(hs.load(), _pairs(), hs.metrics.loss, "eap").top("x"),
    "mark of a probe": lambda: _probe().mark(3),
    "acdc": lambda: hs.edges.acdc(hs.load(), "x", hs.metrics.loss, 0.1),
}


def _scores() -> HeadScores:
    return HeadScores.from_examples("a", np.zeros((1, 2, 3)), kv_heads=2)


def _pairs() -> Probe:
    return hs.probes.pairs(hs.load(), "ioi", batch=2)


def _probe() -> Probe:
    return hs.probes.repeated_tokens(hs.load(), length=4, batch=2)


def test_arguments_of_the_right_kinds_go_through() -> None:
    assert example(count=np.int64(2), rate=1, layers=(0, 1), name="x", names="a", other=3) == "x"
    assert example(None, None, 2, np.float32(0.5), np.bool_(True), "y", layers=range(2)) == "y"
    assert (
        example(path=Path("a"), tensor=torch.zeros(2), made=abs, model=hs.load(), options={}) == ""
    )


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What every wrong call raised."""
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[str(given) for given, _ in WRONG])
def test_arguments_of_a_wrong_kind_are_refused(said: list[str], number: int) -> None:
    assert said[number].startswith("InputError: " + WRONG[number][1])


@pytest.mark.parametrize("number", range(len(CALLS)), ids=CALLS)
def test_every_room_refuses_them(said: list[str], number: int) -> None:
    assert said[len(WRONG) + number].startswith("InputError: ")


def _raised(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    wrong = [lambda given=given: example(**given) for given, _ in WRONG]
    sys.stdout.write(json.dumps([_raised(call) for call in (*wrong, *CALLS.values())]))
