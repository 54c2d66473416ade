"""Reading a sweep's file, and checking what can be told of it without any model."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headscope.configs import parse, read_yaml
from headscope.errors import InputError, nearest
from headscope.scorers import CATALOGUE
from headscope.sweeps.config import EDITS, METRICS, OWN_SCORES, HeadSet, SweepConfig


def read_config(path: str | Path) -> SweepConfig:
    """Read a sweep's YAML file.

    Raises:
        InputError: naming the first thing that is wrong, and the nearest word that would be right.

    Example:
        >>> hs.sweeps.read_config("configs/sweeps/ioi-all-heads.yaml").name
        'ioi-all-heads'
    """
    written = read_yaml(path)
    config = parse(SweepConfig, written, str(path))
    try:
        check_config(config)
    except InputError as error:
        word = re.search(r"'([^']*)'", str(error))
        line = word and written.line_of(word[1])
        raise InputError(f"{path}{f', line {line}' if line else ''}: {error}") from error
    return config


def schema() -> dict[str, Any]:
    """JSON schema of the YAML file, for editors.

    Example:
        >>> sorted(hs.sweeps.schema()["required"])
        ['edits', 'metrics', 'models', 'name', 'probes']
    """
    return SweepConfig.model_json_schema()


def check_config(config: SweepConfig) -> None:
    """Check what can be told without any model.

    Raises:
        InputError: if a word is unknown, a name is used twice, or keys exclude each other.
    """
    probes = [probe.label for probe in (*config.probes, *config.references)]
    _distinct(probes, "probe")
    _distinct([one.label for one in config.edits], "edit")
    _distinct([one.label for one in config.metrics], "metric")
    _distinct([one.name for one in config.sets], "set")
    _distinct(map(str, config.seeds), "seed")
    for model in config.models:
        if model.revision is not None and model.checkpoints is not None:
            raise InputError(f"{model.label} has a revision and checkpoints: give one of them.")
        if model.checkpoints == ():
            raise InputError(f"{model.label} has an empty list of checkpoints.")
    states = [(model.label, one) for model in config.models for one in model.revisions()]
    _distinct((f"{label}@{one}" if one else label for label, one in states), "model")
    for edit in config.edits:
        _known(edit.method, EDITS, "edit")
        if edit.reference is not None:
            _known(edit.reference, probes, "probe")
        if (edit.method == "scale") != (edit.factor is not None):
            raise InputError("the edit 'scale', and no other, takes a factor.")
        if edit.method == "scale" and edit.reference is not None:
            raise InputError("the edit 'scale' replaces nothing, so it takes no reference.")
    for metric in config.metrics:
        _known(metric.metric, METRICS, "metric")
    for one in config.sets:
        _check_set(one, [other.name for other in config.sets])


def _check_set(one: HeadSet, names: list[str]) -> None:
    if one.random is not None and one.score is not None:
        raise InputError(f"the set {one.name!r} is either ranked by a score or random, not both.")
    if one.score is None and (one.top is not None or one.table is not None):
        raise InputError(f"the set {one.name!r} has 'top' or 'table': say by which 'score'.")
    if one.random is None and (one.draws > 1 or one.not_in is not None):
        raise InputError(f"the set {one.name!r} draws heads: say how many with 'random'.")
    if one.steps is not None and one.arrange != "cumulative":
        raise InputError(f"the set {one.name!r} has 'steps', which are of cumulative curves only.")
    if one.score is not None and one.table is None:
        _known(one.score, [*CATALOGUE, *OWN_SCORES], "score")
    if one.not_in is not None:
        _known(one.not_in, [name for name in names if name != one.name], "set")


def _known(word: str, options: Iterable[str], kind: str) -> None:
    known = list(options)
    if word not in known:
        raise InputError(nearest(word, known, kind=kind))


def _distinct(names: Iterable[str], kind: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(
                f"there are two {kind}s called {name!r}: each needs a name of its own."
            )
        seen.add(name)
