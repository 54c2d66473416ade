"""Every kind of result can be asked the same things, so that pages and commands know none."""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import headscope as hs
from headscope import plots
from headscope.base.result import Result, Section, Shown, Tabular, reasons
from headscope.base.specs import ScoreSpec
from headscope.metrics import Metric, as_metric
from headscope.scorers import CATALOGUE
from headscope.table import EffectGrid, PairScores


def kinds() -> Iterator[type]:
    """Classes of results of numbers, wherever they are defined."""
    for found in pkgutil.walk_packages(hs.__path__, "headscope."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    waiting = list(Tabular.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        yield kind
    yield from (hs.HeadScores, hs.HeadTable)


ASKED = ("glance", "summary", "sections", "columns", "to_pandas", "save", "load")


@pytest.mark.parametrize("kind", sorted(set(kinds()), key=str), ids=lambda kind: kind.__name__)
def test_a_kind_of_result_has_the_whole_protocol(kind: type) -> None:
    assert issubclass(kind, Shown)
    assert [name for name in ASKED if not callable(getattr(kind, name, None))] == []


def score() -> hs.HeadScores:
    values = np.random.default_rng(0).random((2, 3, 5))
    return hs.HeadScores.from_examples("induction", values, kv_heads=3, unit="attention")


def results() -> dict[str, Result]:
    effects = np.random.default_rng(1).normal(size=(2, 4))
    pairs = np.arange(16.0).reshape(2, 2, 2, 2)
    return {
        "scores": score(),
        "table": hs.HeadTable([score()]),
        "effects": EffectGrid(
            hs.ScoreSpec("zero"), ("group",), (("a", "b"),), effects, np.zeros(4)
        ),
        "pairs": PairScores(hs.ScoreSpec("K"), pairs),
    }


@pytest.mark.parametrize("name", results())
def test_a_result_says_shows_and_keeps_itself(name: str, tmp_path: Path) -> None:
    result = results()[name]
    assert isinstance(result, Result)
    assert {"scores": "induction", "table": "induction", "effects": "zero", "pairs": "K"}[
        name
    ] in result.summary()
    assert all(part.title for part in result.sections())
    assert all(isinstance(part, Section) for part in result.sections())
    assert list(plots.figures(result))
    columns, frame = result.columns(), result.to_pandas()
    assert list(columns) == list(frame)
    assert {len(column) for column in columns.values()} == {len(frame)}
    result.save(tmp_path / "kept")
    again = type(result).load(tmp_path / "kept")
    assert again.to_pandas().equals(frame)


def test_what_holds_a_declaration_says_it_under_the_same_names() -> None:
    spec = ScoreSpec("mine", "nats", (0.0, None), "lower", "here", 0.5, None, "more of it")
    scores = hs.HeadScores.from_summary(spec, np.zeros((1, 1)), kv_heads=1)
    metric = Metric(spec, lambda rows: rows.logits.sum(1))
    for held in (scores, metric):
        assert (held.name, held.unit, held.bounds) == ("mine", "nats", (0.0, None))
        assert (held.direction, held.source, held.threshold) == ("lower", "here", 0.5)
        assert (held.alternative, held.description) == ("greater", "more of it")
    assert as_metric(lambda logits, probe: logits.sum((1, 2))).direction is None
    assert hs.metrics.loss.direction == "lower"
    assert {scorer.direction for scorer in CATALOGUE.values()} <= {"higher", "lower"}


def test_what_is_missing_for_one_reason_stands_in_one_row() -> None:
    reason = "/home/me/bert/model (bert): adds its norm after attention."
    found = reasons({"ov": reason, "Q_composition": reason, "qk": "other words."}, "model")
    assert found == [
        ("ov, Q composition", "adds its norm after attention."),
        ("qk", "other words."),
    ]
    assert reasons({"ov": reason}, "/home/me/bert/model")[0][1] == "adds its norm after attention."
    assert reasons({"ov": "models are many."}, "model") == [("ov", "models are many.")]
    assert reasons({"ov": reason}) == [("ov", reason)]
