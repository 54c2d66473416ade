"""``headscope sweep``, ``status``, ``export`` and ``report``: running sweeps, reading results."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import typer
import yaml

from headscope.base.files import check_page, whole_page
from headscope.cli.output import console, typed
from headscope.errors import InputError, nearest
from headscope.plots import curves, figures_of
from headscope.report import Picture, Rows, RunPart, Section, read_run, report_page
from headscope.report.sections import Block, with_pictures
from headscope.sweeps.cluster import RayExecutor
from headscope.sweeps.config import EDGES, SweepConfig, read_config, schema
from headscope.sweeps.results import Results, export, read
from headscope.sweeps.run import Benches, Executor, Outcome, estimate, inline, make_plan, run_sweep
from headscope.sweeps.store import Store, status
from headscope.table import EffectGrid, HeadTable

_EXECUTORS = ("inline", "ray")


def run_sweep_config(
    file: Path | None,
    *,
    out: Path | None,
    overwrite: bool,
    shard: str,
    executor: str,
    workers: int | None,
    dry_run: bool,
    as_schema: bool,
) -> None:
    """Run, plan, or print the schema."""
    if as_schema:
        print(json.dumps(schema(), indent=2))
        return
    if file is None:
        raise InputError("give a config: headscope sweep configs/sweeps/ioi-all-heads.yaml")
    if executor not in _EXECUTORS:
        raise InputError(nearest(executor, _EXECUTORS, kind="executor"))
    if workers is not None and executor != "ray":
        raise InputError("--workers is for --executor ray; the inline executor is one process.")
    part = parse_shard(shard)
    config = read_config(file)
    if dry_run:
        _print_plan(config)
        return
    folder = out or Path("runs") / config.name
    chosen: Executor = RayExecutor(workers) if executor == "ray" else inline
    again = ["headscope", "sweep", str(file), "--out", str(folder)]
    again += ["--shard", shard] if part[1] > 1 else []
    again += ["--executor", executor] if executor != "inline" else []
    again += ["--workers", str(workers)] if workers is not None else []
    outcome = run_sweep(
        config, folder, shard=part, executor=chosen, overwrite=overwrite, catch_signals=True
    )
    _print_outcome(outcome, folder, shlex.join(again))


def parse_shard(text: str) -> tuple[int, int]:
    """Parse a shard such as ``"2/8"``.

    Raises:
        InputError: if the text has another form.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise InputError(f"--shard {text!r}: write i/N with 1 <= i <= N, such as 2/8.")
    return int(index), int(count)


def _print_plan(config: SweepConfig) -> None:
    """Print what would run, and how long it would take."""
    benches = Benches(config)
    plan = make_plan(config, benches=benches)
    cost = estimate(config, plan, benches)
    minutes, seconds = divmod(cost.seconds, 60)
    told = f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
    lines = [
        f"{config.name}: {cost.cells} cells in {cost.chunks} chunks",
        f"  models   {', '.join(model.label for model in plan.models)}",
        f"  probes   {', '.join(probe.label for probe in config.probes)}",
        f"  edits    {', '.join(edit.label for edit in config.edits) or 'none'}",
        f"  edges    {', '.join(edge.label for edge in config.edges) or 'none'}",
        f"  metrics  {', '.join(metric.label for metric in config.metrics)}",
        f"  sets     {', '.join(f'{one.name} ({one.arrange})' for one in config.sets)}",
        f"  passes   {cost.examples} edited examples, equivalent to {cost.passes:.0f} full passes",
        f"  time     about {told} in one process here (timed: {cost.timed})",
        f"  hours    {cost.seconds / 3600:.2g} of one {cost.device}, loading excluded",
    ]
    for line in lines:
        print(line)


def _print_outcome(outcome: Outcome, folder: Path, again: str) -> None:
    """Print what is done and what is next; exit code 130 if stopped, 1 if a chunk failed."""
    say = console(stderr=True).print
    say(f"{outcome.done} of {outcome.total} chunks done.", highlight=False)
    for chunk, why in list(outcome.failed.items())[:5]:
        say(f"failed {chunk}: {why}", highlight=False, markup=False)
    if outcome.stopped:
        say(f"Stopped. Resume with: {again}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130)
    if outcome.failed:
        said = f"{len(outcome.failed)} chunks failed; try them again with: {again}"
        say(said, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1)
    where = folder / "table.parquet" if outcome.compacted else folder
    say(f"Written to {where}; read it with hs.sweeps.read({str(folder)!r}).", soft_wrap=True)


def print_status(folder: Path, *, as_json: bool) -> None:
    """Print counts, models and reasons for failures."""
    found = status(folder)
    if as_json:
        print(json.dumps(found.to_json()))
        return
    say = console().print
    say(
        f"{found.name}: {found.done} of {found.total} chunks done, {found.pending} pending, "
        f"{len(found.failed)} failed ({found.cells_done} of {found.cells} cells)",
        highlight=False,
    )
    for model, (done, total) in found.models.items():
        say(f"  {model}: {done} of {total}", highlight=False, markup=False)
    for chunk, why in found.failed.items():
        say(f"  failed {chunk}: {why}", highlight=False, markup=False, soft_wrap=True)
    if found.left_seconds is not None:
        say(f"  about {found.left_seconds:.0f} s left at the pace so far", highlight=False)
    if found.compacted:
        say(f"  all in {folder / 'table.parquet'}", highlight=False, soft_wrap=True)


def write_export(folder: Path, *, to: str, out: Path | None) -> None:
    """Write the file and print its path."""
    file = export(folder, to, out)
    console(stderr=True).print(f"Written to {file}.", soft_wrap=True)


def run_report(places: Sequence[Path], *, out: Path, overwrite: bool, title: str | None) -> None:
    """Read the runs, combine them and write the report."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out.name!r} should end in .html.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write {out.name} into.")
    asked = {"kind": "report", "runs": [place.resolve().name for place in places]}
    runs = [one for place in places for one in read_folder(place)]
    command = typed() or shlex.join(["headscope", "report", *(one.name for one in places)])
    page = report_page(runs, title=title, command=command)
    check_page(out, asked, overwrite=overwrite)
    whole_page(out, page, asked)
    console(stderr=True).print(
        f"Written to {out} ({len(page.encode()) / 1e6:.1f} MB, open it in a browser).",
        soft_wrap=True,
    )


def read_folder(place: Path) -> list[RunPart]:
    """Runs in a folder: one, or for a sweep one per model.

    Raises:
        InputError: if the folder holds no run.
    """
    if not place.exists():
        raise InputError(f"there is no run at {place}.")
    if (place / "manifest.json").is_file():
        return sweep_runs(place)
    if place.is_file() and place.suffix == ".parquet" and (curve := _curve(place)):
        return [curve]
    return [read_run(place)]


def _curve(place: Path) -> RunPart | None:
    """Load a pruning or masking curve; None if the file is something else."""
    from headscope.plots import curves
    from headscope.pruning import PruningCurve
    from headscope.report import Picture, Section
    from headscope.table import OrderCurve

    for kind in (PruningCurve, OrderCurve):
        try:
            found = kind.load(place)
        except InputError:
            continue
        light, dark = (
            curves(found.effects, controls=found.controls, theme=theme)
            for theme in ("light", "dark")
        )
        said = f"{found.effects.description} Orders: {', '.join(found.orders)}."
        section = Section("Curves", [Picture(light, dark, said, said)])
        origin = found.effects.provenance
        return RunPart(place.stem, "curve", None, sections=[section], of=origin)
    return None


_STUDY = ("probe", "edit", "seed", "metric")


def sweep_runs(folder: Path) -> list[RunPart]:
    """One run per model of a sweep; unfinished ones are left out.

    Raises:
        InputError: if nothing is finished, or no set contains single heads.
    """
    results, found = read(folder), status(folder)
    config = Store.open(folder).manifest()["config"]
    if results.rows.num_rows == 0:
        raise InputError(f"no cell of the sweep in {folder} is done yet.")
    label = folder.resolve().name
    runs = []
    for number, model in enumerate(dict.fromkeys(results.to_pandas()["model"])):
        runs.append(
            RunPart(
                label=label,
                kind="sweep",
                table=_table(results, model),
                effects=True,
                command=shlex.join(["headscope", "sweep", f"{found.name}.yaml", "--out", label]),
                config=yaml.safe_dump(config, sort_keys=False),
                facts={"chunks": f"{found.done} of {found.total} done"},
                sections=_sections(results, model),
                failed=dict(found.failed) if number == 0 else {},
            )
        )
    return runs


def _studies(results: Results, model: str, name: str) -> Iterator[dict[str, Any]]:
    """Names of every study of a set."""
    frame = results.to_pandas()
    frame = frame[(frame["model"] == model) & (frame["set"] == name)]
    for key, _ in frame.groupby(list(_STUDY), sort=False, observed=True):
        yield {"model": model, **dict(zip(_STUDY, key, strict=True))}


def _table(results: Results, model: str) -> HeadTable:
    """Effects of single heads, or if a sweep has none, of the first heads of its curves."""
    found = {}
    for name, arrange in results.arranged.items():
        if arrange != "each":
            continue
        for study in _studies(results, model, name):
            words = [study["edit"], study["metric"], study["probe"]]
            one = results.scores(name, **study)
            title = ":".join(map(str, words))
            while title in found:
                title += f" {name}"
            found[title] = one.renamed(title)
    for study in _studies(results, model, EDGES):
        title = ":".join(map(str, (study["edit"], study["metric"], study["probe"])))
        found[f"{title}:edges"] = results.edges(**study).heads.renamed(f"{title}:edges")
    if not found:
        found = _blank(results, model)
    return HeadTable(list(found.values()))


def _blank(results: Results, model: str) -> dict[str, Any]:
    """Score without values, which gives a sweep of sets a model and a shape."""
    from headscope.table import HeadScores

    plan = next(one for one in results.plan.models if one.label == model)
    name = next(iter(results.arranged))
    study = next(_studies(results, model, name))
    origin = results.effects(name, **study).provenance
    mean = np.full((plan.layers, plan.heads), np.nan)
    blank = HeadScores.from_summary(
        "single heads",
        mean,
        kv_heads=plan.kv_heads,
        known={"missing": np.ones(mean.shape, int)},
        description="This sweep edits no head alone.",
        provenance=origin,
    )
    return {"single heads": blank}


def _sections(results: Results, model: str) -> list[Section]:
    sections = []
    steps = [name for name, arrange in results.arranged.items() if arrange == "cumulative"]
    drawn: dict[tuple[Any, ...], list[tuple[str, EffectGrid]]] = {}
    for name in steps:
        for study in _studies(results, model, name):
            key = tuple(study.values())
            drawn.setdefault(key, []).append((name, results.effects(name, **study)))
    for key, grids in drawn.items():
        grid, controls = joined_arms(grids)
        light, dark = (curves(grid, controls=controls, theme=one) for one in ("light", "dark"))
        probe, edit, seed, metric = key[1:]
        said = (
            f"{metric} on {probe} as heads are edited ({edit}, seed {seed}), one line per order: "
            f"{', '.join(name for name, _ in grids)}."
        )
        sections.append(Section("Curves", [Picture(light, dark, said, said)]))
    together = [name for name, arrange in results.arranged.items() if arrange == "together"]
    rows = [row for name in together for row in _together(results, model, name)]
    if rows:
        names = ("set", "edit, metric, probe", "heads", "effect", "95% from", "to")
        grid_: list[Block] = [Rows(names, rows, "Mean over draws; effects of whole sets")]
        sections.append(Section("Sets of heads edited together", grid_))
    return [*sections, *_edge_sections(results, model)]


def _edge_sections(results: Results, model: str) -> Iterator[Section]:
    """Scores of edges and circuits as their own results show them, named by their study."""
    sets = dict.fromkeys(results.to_pandas()["set"])
    for name in [name for name in sets if name not in results.arranged]:
        for study in _studies(results, model, name):
            one = results.edges(**study) if name == EDGES else results.circuit_of(name, **study)
            words = ", ".join(str(study[part]) for part in ("edit", "metric", "probe"))
            drawn = figures_of({EDGES if name == EDGES else "circuit": one})
            for section in with_pictures(one.sections(), drawn):
                yield replace(section, title=f"{section.title}: {words}")


def _together(results: Results, model: str, name: str) -> Iterator[tuple[Any, ...]]:
    for study in _studies(results, model, name):
        grid = results.effects(name, **study)
        low, high = grid.interval()
        words = ", ".join(str(study[one]) for one in ("edit", "metric", "probe"))
        for at, count in enumerate(grid.labels[1]):
            ends = (grid.mean[:, at], low[:, at], high[:, at])
            if np.isfinite(ends[0]).any():
                yield (name, words, count, *(float(np.nanmean(one)) for one in ends))


def joined_arms(grids: Sequence[tuple[str, EffectGrid]]) -> tuple[EffectGrid, list[str]]:
    """Join curves of several sets as arms of one grid, with the names of the random arms.

    A set with several draws becomes one arm per draw, each a control.
    """
    first = grids[0][1]
    counts = sorted({int(step) for _, grid in grids for step in grid.labels[1]})
    arms: list[str] = []
    controls: list[str] = []
    values = []
    for name, grid in grids:
        draws = len(grid.labels[0])
        for draw in range(draws):
            arm = name if draws == 1 else f"{name} {draw}"
            row = np.full((len(counts), len(first.unedited)), np.nan)
            for at, step in enumerate(grid.labels[1]):
                row[counts.index(int(step))] = grid.per_example[draw, at]
            arms.append(arm)
            controls += [arm] if draws > 1 else []
            values.append(row)
    made = EffectGrid(
        spec=first.spec,
        axes=("arm", "removed"),
        labels=(tuple(arms), tuple(map(str, counts))),
        per_example=np.stack(values),
        unedited=first.unedited,
        provenance=first.provenance,
        clusters=first.clusters,
    )
    return made, controls
