"""``headscope scan`` and ``headscope scorers``: the main job, and what can be scored."""

import json
import time
from contextlib import suppress
from pathlib import Path

from headscope import probes
from headscope.base.options import RunOptions
from headscope.cli.options import Loading, scorer_names
from headscope.cli.output import asked_of, console, print_result, print_written, run_folder, typed
from headscope.errors import HeadscopeError, InputError
from headscope.interactive.view import attention_example
from headscope.models.protocol import HeadModel
from headscope.scorer import FLAT, REPEATED
from headscope.scorers import CATALOGUE, DEFAULT
from headscope.scoring import score
from headscope.table import HeadTable

# Heads that are named in one line.
_MOST = 8


def run(
    loading: Loading,
    options: RunOptions,
    *,
    out: Path | None,
    overwrite: bool,
    scorers: str | None,
    probe_file: Path | None,
    source: Path | None = None,
    target: Path | None = None,
    images: Path | None = None,
    max_tokens_per_chunk: int | None,
    examples: bool,
    as_json: bool,
) -> None:
    """Load, score, write, print."""
    from headscope.base.configs import parse, read_yaml
    from headscope.probes.config import ProbeConfig, build_probe

    given = {"--probe": probe_file, "--source": source, "--images": images}
    if len(named := [option for option, value in given.items() if value is not None]) > 1:
        raise InputError(f"{' and '.join(named)} both name what is run: give one of them.")
    if target is not None and source is None:
        raise InputError("--target comes without --source: give the file of sources too.")
    names = scorer_names(scorers)
    config = None
    if probe_file is not None:
        config = parse(ProbeConfig, read_yaml(probe_file), str(probe_file))
    folder = run_folder(out, "scan", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    loaded = time.perf_counter()
    asked = None if config is None else config.model_dump(mode="json", exclude_none=True)
    if folder is not None:
        folder = folder.of(asked_of(model, loading, scorers=names, probe=asked, seed=options.seed))
    probe = None if config is None else build_probe(config, model)
    if source is not None:
        probe = probes.translation(model, source, target)
    if images is not None:
        probe = probes.images(model, images)
    table = score(
        model,
        probe,
        names,
        batch_size=options.batch_size,
        memory=options.memory,
        max_tokens_per_chunk=max_tokens_per_chunk,
        seed=options.seed,
    )
    several = len(table.stacks) > 1
    placed = [] if probe is not None or several else _on_text(model, table, options)
    scored = time.perf_counter()

    def show() -> None:
        print_result(table, as_json=as_json)
        if placed and not as_json:
            console().print(*placed, sep="\n", soft_wrap=True, highlight=False)

    if folder is None:
        show()
        return
    folder = folder.ready()
    settings = {
        "command": "scan",
        "model": model.name,
        "revision": model.revision,
        "scorers": list(table),
        "probe": asked,
        **({} if source is None else {"source": source.name}),
        **({} if target is None else {"target": target.name}),
        **({} if images is None else {"images": images.name}),
        "seed": options.seed,
        "roles_on_text": placed,
    }
    timings = {"load_seconds": loaded - started, "score_seconds": scored - loaded}
    folder.write(table, settings, timings, command=typed(), examples=examples)
    if several:
        show()
        print_written(folder.path, "table.parquet", "pictures/")
        return
    with suppress(HeadscopeError):  # an example is a help for the eye; the table stands without
        example = attention_example(model, length=_example_length(len(model.shape.heads)))
        example.save(folder.path / "attention.safetensors")
    show()
    print_written(folder.path, "table.parquet", "pictures/")


def _on_text(model: HeadModel, table: HeadTable, options: RunOptions) -> list[str]:
    """Roles of places as natural text has them, beside what the table says of random tokens.

    A line per role that needs no repetition (previous and current token): some heads look back
    one token only where tokens have nothing to say.
    """
    again = [
        scorer
        for scorer in CATALOGUE.values()
        if scorer.name in table
        and (scorer.probe, scorer.control) == (REPEATED, FLAT)
        and scorer.threshold is not None
    ]
    if not again or model.tokenizer is None:
        return []
    text, size = probes.text(model, seed=options.seed), options.batch_size
    there = score(model, text, again, batch_size=size, memory=options.memory)
    lines = []
    for found in there.role_summary():
        random = table[found.score]
        heads = [f"{head} {mean:.2f} ({random[head]:.2f})" for head, mean in found.heads[:_MOST]]
        more = [f"{len(found.heads) - _MOST} more"] if len(found.heads) > _MOST else []
        said = ", ".join([*heads, *more]) or "no head"
        role = found.score.replace("_", " ")
        lines.append(f"{role} on natural text (on random tokens): {said}")
    return lines


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
