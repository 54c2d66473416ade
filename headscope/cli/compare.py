"""``headscope compare``, ``emergence``, ``similarity`` and ``syntax``: comparisons of heads.

Match heads between models, score every checkpoint of a training run, and compare heads by their
behaviour on a text or with a treebank.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope import probes, similarity, syntax
from headscope.base.files import paragraphs, read_text, whole_file, whole_page
from headscope.base.result import Result
from headscope.base.statistics import LEVEL
from headscope.cli.options import Loading, listed, scorer_names
from headscope.cli.output import (
    asked_of,
    console,
    json_rows,
    print_either,
    print_written,
    run_folder,
    typed,
)
from headscope.comparing import compare, emergence, way_to_match
from headscope.errors import InputError, nearest
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.plots.figure import visible
from headscope.sweeps.results import read
from headscope.table import Comparison, Emergence, HeadSimilarity, HeadTable, versions
from headscope.table.comparing import joined_curves

if TYPE_CHECKING:
    from rich.table import Table

    from headscope.report.folder import RunFolder


def run(
    first: str,
    second: str,
    *,
    by: str,
    scorers: str | None,
    out: Path | None,
    overwrite: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Read or score both sides and match heads, then write and print the results."""
    way = way_to_match(by)
    names = scorer_names(scorers)
    folder = run_folder(out, "compare", overwrite=overwrite)
    started = time.perf_counter()
    one, two = _read(first), _read(second)
    if folder is not None:
        sides = {"first": _identity(one), "second": _identity(two)}
        folder = folder.of({**sides, "by": by, "scorers": names, "seed": seed})
    found = compare(one, two, by=way, scorers=names, seed=seed)
    seconds = time.perf_counter() - started
    if folder is None:
        print_either(lambda: json_rows(found), lambda: _shown(found), as_json=as_json)
        return
    folder = folder.ready()
    _write(folder, found, {"by": by, "seed": seed, "seconds": round(seconds, 2)})
    print_either(lambda: json_rows(found), lambda: _shown(found), as_json=as_json)
    print_written(folder.path, "comparison.parquet")


def _identity(side: "HeadModel | HeadTable") -> str:
    """Identity of one side: a model's weights, or a table's provenance."""
    if isinstance(side, HeadTable):
        origins = [[name, one.provenance.to_json()] for name, one in side.items()]
        return hashlib.sha256(json.dumps(origins, sort_keys=True).encode()).hexdigest()
    return side.digest()


def _read(name: str) -> "HeadModel | HeadTable":
    """Load a run's table or a model; ``NAME@REVISION`` names a checkpoint."""
    place = Path(name)
    if place.is_file():
        return HeadTable.load(place)
    if (place / "table.parquet").is_file():
        return HeadTable.load(place / "table.parquet")
    source, _, revision = name.partition("@")
    return load(source, revision=revision or None)


def _shown(found: Comparison) -> Iterator[Any]:
    """Format the most unusual pairs, with their differences in the first five scores."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    one, two = found.names
    said = f"* adjusted p below {LEVEL} over all pairs and scores. {found.tests}"
    title = f"first: {one}; second: {two}. Differences are second - first.\n{found.measure}"
    grid = Table(
        *("first", "second"),
        title=Text(title),
        caption=Text(said),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    grid.add_column("closeness", justify="right")
    for name in found.scores[:5]:
        grid.add_column(Text("\n".join(name.split("_"))), justify="right")
    for at, (a, b) in enumerate(found.pairs[:40]):
        cells = [
            f"{value:+.2f}{'*' * bool(p < LEVEL)}\n{low:.2f}..{high:.2f}"
            for value, low, high, p in zip(
                found.difference[at, :5],
                found.low[at, :5],
                found.high[at, :5],
                found.p_adjusted[at, :5],
                strict=True,
            )
        ]
        grid.add_row(str(a), str(b), f"{found.closeness[at]:.2f}", *map(Text, cells))
    yield grid
    yield Text(repr(found))


def _write(folder: "RunFolder", found: Comparison, settings: dict[str, Any]) -> None:
    from headscope.report import sections_page

    with whole_file(folder.path / "comparison.parquet") as file:
        found.to_pandas().to_parquet(file, index=False)
    page = sections_page(
        f"{found.names[0]} and {found.names[1]}",
        "two models",
        "Matched heads of two models, by headscope.",
        found.sections(),
        [(name, str(value)) for name, value in settings.items()],
        typed(),
    )
    whole_page(folder.path / "index.html", page)
    folder.claim.write_facts({"command": typed(), "settings": settings, "versions": versions()})


def run_similarity(
    loading: Loading,
    *,
    other: str | None,
    by: str,
    text: Path | None,
    positions: int | None,
    seed: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compare heads by their behaviour on a text, then write and print the results."""
    if by not in similarity.SPECS:
        raise InputError(nearest(by, similarity.SPECS, kind="measure of similarity"))
    folder = run_folder(out, "similarity", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    second = None if other is None else _second(loading, other)
    asked = {
        "by": by, "text": None if text is None else text.resolve().name, "positions": positions,
        "seed": seed, "other": None if second is None else second.digest(),
    }  # fmt: skip
    if folder is not None:
        folder = folder.of(asked_of(model, loading, **asked))
    sides = [probes.text(one, text) for one in (model, second) if one is not None]
    found = similarity.heads(
        model, sides[0], by, other=second, other_probe=None if second is None else sides[1],
        positions=positions, seed=seed,
    )  # fmt: skip
    if folder is not None:
        folder = folder.ready()
        _write_page(
            folder, found, "similarity", f"Heads of {' and '.join(dict.fromkeys(found.models))}",
            {"by": by, "seed": seed, "seconds": round(time.perf_counter() - started, 2)},
        )  # fmt: skip
    print_either(lambda: json_rows(found), lambda: [found.summary()], as_json=as_json)
    if folder is not None:
        print_written(folder.path, "similarity.safetensors", "similarity.parquet")


def _second(loading: Loading, name: str) -> HeadModel:
    """Load another model with the same options; ``NAME@REVISION`` names a checkpoint."""
    source, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return replace(loading.of(source), revision=revision or None).model()


def _write_page(
    folder: "RunFolder",
    found: HeadSimilarity,
    name: str,
    title: str,
    settings: dict[str, Any],
) -> None:
    """Write the result, its rows, and a page with its figures."""
    from headscope.plots import figures
    from headscope.report import sections_page
    from headscope.report.sections import with_pictures

    found.save(folder.path / f"{name}.safetensors")
    with whole_file(folder.path / f"{name}.parquet") as file:
        found.to_pandas().to_parquet(file, index=False)
    page = sections_page(
        title,
        name,
        "Similar heads, by headscope.",
        with_pictures(found.sections(), figures(found)),
        [(key, str(value)) for key, value in settings.items()],
        typed(),
    )
    whole_page(folder.path / "index.html", page)
    folder.claim.write_facts({"command": typed(), "settings": settings, "versions": versions()})


def run_syntax(
    loading: Loading,
    *,
    treebank: Path,
    most: int | None,
    least: int,
    epochs: int,
    seed: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Find the heads that predict each relation and train the probe, then write and print."""
    from headscope.plots import figures

    sentences = syntax.read_conllu(treebank)
    folder = run_folder(out, "syntax", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    asked = {
        "treebank": treebank.resolve().name, "most": most, "least": least, "epochs": epochs,
        "seed": seed,
    }  # fmt: skip
    if folder is not None:
        folder = folder.of(asked_of(model, loading, **asked))
    bank = syntax.treebank(model, sentences, most=most)
    found = syntax.heads(model, bank, least=least, seed=seed)
    probe = syntax.attention_probe(model, bank, epochs=epochs, seed=seed) if epochs else None
    results: dict[str, Result] = {"syntax": found}
    if probe is not None:
        results["probe"] = probe
    if folder is not None:
        folder = folder.ready()
        for name, result in results.items():
            result.save(folder.path / f"{name}.safetensors")
        folder.write(
            found.table,
            {"command": "syntax", "model": model.name, "revision": model.revision, **asked},
            {"seconds": time.perf_counter() - started},
            command=typed(),
            sections=[part for one in results.values() for part in one.sections()],
            pictures=figures(found.table),
        )
    print_either(
        lambda: {name: json_rows(one) for name, one in results.items()},
        lambda: [one.summary() for one in results.values()],
        as_json=as_json,
    )
    if folder is not None:
        files = [f"{name}.safetensors" for name in results]
        print_written(folder.path, *files, "table.parquet", "pictures/")


def run_emergence(
    loading: Loading,
    *,
    checkpoints: str | None,
    scorers: str | None,
    texts: Path | None,
    out: Path | None,
    overwrite: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Score checkpoints or read a sweep, then write and print the results."""
    names, revisions = scorer_names(scorers), listed(checkpoints)
    passages = None if texts is None else _passages(texts)
    folder = run_folder(out, "emergence", overwrite=overwrite)
    if folder is not None:
        folder = folder.of(
            {
                "model": _source(loading.source),
                "checkpoints": revisions,
                "scorers": names,
                "texts": None if passages is None else _digest("\n\n".join(passages)),
                "dtype": loading.dtype,
                "seed": seed,
            }
        )
    started = time.perf_counter()
    if _is_sweep(loading.source):
        story = of_sweep(Path(str(loading.source)))
    else:
        story = emergence(
            loading.source,
            revisions,
            names,
            texts=passages,
            device=loading.device,
            dtype=loading.dtype,
            seed=seed,
        )
    timings = {"score_seconds": time.perf_counter() - started}
    if folder is None:
        print_either(lambda: json_rows(story), lambda: _shown_emergence(story), as_json=as_json)
        return
    folder = folder.ready()
    with whole_file(folder.path / "emergence.parquet") as file:
        story.to_pandas().to_parquet(file, index=False)
    settings: dict[str, Any] = {
        "command": "emergence",
        "model": story.model,
        "checkpoints": list(story.checkpoints),
        "seed": seed,
    }
    folder.write(
        story.tables[-1],
        settings,
        timings,
        command=typed(),
        results={"emergence": story},
    )
    print_either(lambda: json_rows(story), lambda: _shown_emergence(story), as_json=as_json)
    print_written(folder.path, "emergence.parquet", "table.parquet", "pictures/")


def of_sweep(folder: Path) -> Emergence:
    """Build an :class:`Emergence` from a sweep over checkpoints, with effects of single heads.

    Raises:
        InputError: if the sweep has fewer than two checkpoints of one model.
    """
    results = read(folder)
    labels = [one.label for one in results.plan.models if "@" in one.label]
    names = {label.rpartition("@")[0] for label in labels}
    if len(names) != 1 or len(labels) < 2:
        raise InputError(
            f"the sweep in {folder} has fewer than two checkpoints of one model: "
            f"{', '.join(one.label for one in results.plan.models)}."
        )
    frame = results.rows.to_pandas()
    tables, parts, units = [], [], {}
    for label in labels:
        tables.append(results.table(model=label))
        mine = frame[frame["checkpoint"] == label.rpartition("@")[2]]
        part = {}
        for (metric, probe), rows in mine.groupby(["metric", "probe"], observed=True):
            name = f"{metric} on {probe}"
            part[name] = np.asarray(rows["clean_values"].iloc[0], dtype=np.float64)
            units[name] = str(rows["unit"].iloc[0])
        parts.append(part)
    checkpoints = tuple(label.rpartition("@")[2] for label in labels)
    return Emergence(names.pop(), checkpoints, tuple(tables), joined_curves(parts), units)


def _source(source: str | None) -> str | None:
    """Model name; for a folder a digest, which does not reveal its path."""
    place = Path(source) if source else None
    return _digest(str(place.resolve())) if place and place.exists() else source


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_sweep(source: str | None) -> bool:
    return source is not None and (Path(source) / "manifest.json").is_file()


def _passages(file: Path) -> list[str]:
    """Paragraphs of a UTF-8 file."""
    found = paragraphs(read_text(file))
    if not found:
        raise InputError(f"{file} holds no text.")
    return found


def _shown_emergence(story: Emergence) -> Iterator[Any]:
    """Format a row per checkpoint: each score of the best final head, and the losses."""
    from rich.text import Text

    columns = {}
    for name in story.scores:
        head = story.best(name)
        columns[f"{name}_{head}"] = [float(table[name].mean[head]) for table in story.tables]
    for name in story.losses:
        columns[name] = [float(value) for value in story.mean(name)]
    width = console().width
    for grid in _grids(columns, [visible(one) for one in story.checkpoints], width):
        grid.title = f"{story.model} along training"
        yield grid
    for finding in story.findings():
        yield Text(finding)


def _grids(
    columns: Mapping[str, Sequence[float]], checkpoints: Sequence[str], width: int
) -> "Iterator[Table]":
    """Split into tables that fit the width, with header words stacked."""
    from rich.table import Table
    from rich.text import Text

    steps = steps_of(checkpoints)
    first = max(len("step"), *map(len, steps)) + 4
    waiting = list(columns.items())
    while waiting:
        grid, used = Table(), first
        grid.add_column("step", justify="right", no_wrap=True, vertical="bottom")
        shown: list[Sequence[float]] = []
        while waiting:
            name, values = waiting[0]
            words = re.split(r"[_ ]", name)
            wide = max(*map(len, words), *(len(f"{one:.2f}") for one in values)) + 3
            if shown and used + wide > width:
                break
            grid.add_column(
                Text("\n".join(words)), justify="right", no_wrap=True, vertical="bottom"
            )
            shown.append(values)
            used += wide
            waiting.pop(0)
        for at, step in enumerate(steps):
            grid.add_row(Text(step), *(f"{values[at]:.2f}" for values in shown))
        yield grid


def steps_of(checkpoints: Sequence[str]) -> list[str]:
    """Training steps of checkpoints, if their names are numbers in the same words."""
    found = [re.fullmatch(r"(\D*)0*(\d+)(\D*)", one) for one in checkpoints]
    around = {(one[1], one[3]) for one in found if one}
    if not all(found) or len(around) != 1:
        return list(checkpoints)
    return [one[2] for one in found if one]
