"""``headscope sweep``, ``status`` and ``export``: run a study from a config, and what it gave."""

import json
import shlex
from pathlib import Path

import typer

from headscope.cli.output import console
from headscope.errors import InputError, nearest
from headscope.sweeps.bench import Benches
from headscope.sweeps.cluster import RayExecutor
from headscope.sweeps.config import SweepConfig, read_config, schema
from headscope.sweeps.planner import estimate, make_plan
from headscope.sweeps.results import export
from headscope.sweeps.run import Executor, Outcome, inline, run_sweep
from headscope.sweeps.store import status

_EXECUTORS = ("inline", "ray")


def run(
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
    """``"2/8"`` as numbers.

    Raises:
        InputError: if it is not a shard.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise InputError(f"{text!r} is not a shard: write the second of eight as 2/8, from 1/8 on.")
    return int(index), int(count)


def _print_plan(config: SweepConfig) -> None:
    """What would run, and how long it would take."""
    benches = Benches(config)
    plan = make_plan(config, benches=benches)
    cost = estimate(config, plan, benches)
    minutes, seconds = divmod(cost.seconds, 60)
    told = f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"
    lines = [
        f"{config.name}: {cost.cells} cells in {cost.chunks} chunks",
        f"  models   {', '.join(model.label for model in plan.models)}",
        f"  probes   {', '.join(probe.label for probe in config.probes)}",
        f"  edits    {', '.join(edit.label for edit in config.edits)}",
        f"  metrics  {', '.join(metric.label for metric in config.metrics)}",
        f"  sets     {', '.join(f'{one.name} ({one.arrange})' for one in config.sets)}",
        f"  passes   {cost.examples} edited examples, the work of {cost.passes:.0f} whole passes",
        f"  time     about {told} in one process here (timed: {cost.timed})",
    ]
    for line in lines:
        print(line)


def _print_outcome(outcome: Outcome, folder: Path, again: str) -> None:
    """What was done and what is next; exit code 130 if it was stopped, 1 if a chunk failed."""
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
    """Print counts, models and reasons."""
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
    """Write the file and say where it is."""
    file = export(folder, to, out)
    console(stderr=True).print(f"Written to {file}.", soft_wrap=True)
