"""``headscope scan`` and ``headscope scorers``: the main job, and what can be scored."""

import json
import time
from contextlib import suppress
from pathlib import Path

from headscope.cli.options import Loading, scorer_names
from headscope.cli.output import asked_of, console, print_table, run_folder, typed
from headscope.errors import HeadscopeError
from headscope.interactive.view import attention_example
from headscope.scorers import CATALOGUE, DEFAULT
from headscope.scoring import score


def run(
    loading: Loading,
    *,
    out: Path | None,
    overwrite: bool,
    scorers: str | None,
    probe_file: Path | None,
    memory: str | None,
    max_tokens_per_chunk: int | None,
    batch_size: int | None,
    seed: int,
    examples: bool,
    as_json: bool,
) -> None:
    """Load, score, write, print."""
    from headscope.configs import parse, read_yaml
    from headscope.memory import parse_memory
    from headscope.probes.config import ProbeConfig, build_probe

    names = scorer_names(scorers)
    budget = parse_memory(memory)
    config = None
    if probe_file is not None:
        config = parse(ProbeConfig, read_yaml(probe_file), str(probe_file))
    folder = run_folder(out, "scan", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    loaded = time.perf_counter()
    asked = None if config is None else config.model_dump(mode="json", exclude_none=True)
    if folder is not None:
        folder = folder.of(asked_of(model, loading, scorers=names, probe=asked, seed=seed))
    probe = None if config is None else build_probe(config, model)
    table = score(
        model,
        probe,
        names,
        batch_size=batch_size,
        memory=budget,
        max_tokens_per_chunk=max_tokens_per_chunk,
        seed=seed,
    )
    scored = time.perf_counter()
    if folder is None:
        print_table(table, as_json=as_json)
        return
    folder = folder.ready()
    settings = {
        "command": "scan",
        "model": model.name,
        "revision": model.revision,
        "scorers": list(table),
        "probe": asked,
        "seed": seed,
    }
    timings = {"load_seconds": loaded - started, "score_seconds": scored - loaded}
    folder.write(table, settings, timings, command=typed(), examples=examples)
    with suppress(HeadscopeError):  # an example is a help for the eye; the table stands without
        example = attention_example(model, length=_example_length(len(model.shape.heads)))
        example.save(folder.path / "attention.safetensors")
    print_table(table, as_json=as_json)
    console(stderr=True).print(
        f"Written to {folder.path}: index.html (open it in a browser), table.parquet, pictures/.",
        soft_wrap=True,
    )


def _example_length(heads: int) -> int:
    """Tokens of the kept example: a megabyte of patterns, or 20 tokens."""
    return int(max(20, min(48, (1_000_000 / heads) ** 0.5)))


def list_scorers(*, as_json: bool) -> None:
    """Print the catalogue."""
    rows = [
        {
            "name": name,
            "kind": scorer.kind,
            "unit": scorer.unit,
            "range": list(scorer.bounds),
            "default": name in DEFAULT,
            "description": scorer.description,
            "source": scorer.source,
        }
        for name, scorer in CATALOGUE.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    from rich.table import Table

    grid = Table("name", "reads", "unit", "range", "what it measures", "source", show_lines=False)
    for name, scorer in CATALOGUE.items():
        low, high = ("-" if bound is None else f"{bound:g}" for bound in scorer.bounds)
        mark = "" if name in DEFAULT else " *"
        span = f"{low}..{high}"
        said = (scorer.description, scorer.source)
        grid.add_row(name + mark, scorer.kind, scorer.unit, span, *said)
    console().print(grid)
    console().print("* not in a plain scan; ask for it by name.")
