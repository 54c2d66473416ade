"""``headscope circuits``: what the weights of every head say."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.base.files import whole_file
from headscope.circuits.survey import Survey, survey
from headscope.circuits.vocabulary import vocabulary_words
from headscope.cli.options import Loading
from headscope.cli.output import asked_of, print_either, print_written, rows_of, run_folder, typed
from headscope.table import save_spectra

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder

_SHOWN = (
    "ov_effective_rank",
    "ov_outliers",
    "copying_eigenvalues_mlp",
    "qk_effective_rank",
    "qk_outliers",
    "matching_eigenvalues_mlp",
)


def run(
    loading: Loading,
    *,
    out: Path | None,
    overwrite: bool,
    tokens: int,
    paths: int,
    seed: int,
    as_json: bool,
) -> None:
    """Load, read the weights, write, print."""
    folder = run_folder(out, "circuits", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    loaded = time.perf_counter()
    if folder is not None:
        folder = folder.of(asked_of(model, loading, tokens=tokens, paths=paths, seed=seed))
    found = survey(model, tokens=tokens, paths=paths, seed=seed)
    timings = {"load_seconds": loaded - started, "read_seconds": time.perf_counter() - loaded}
    if folder is None:
        print_either(lambda: _as_json(found), lambda: _shown(found), as_json=as_json)
        return
    folder = folder.ready()
    settings = {
        "command": "circuits",
        "model": model.name,
        "revision": model.revision,
        "tokens": tokens,
        "seed": seed,
    }
    words = vocabulary_words(model, 3 if len(model.shape.heads) <= 1024 else 1)
    _write(folder, found, words, settings, timings)
    print_either(lambda: _as_json(found), lambda: _shown(found), as_json=as_json)
    print_written(
        folder.path,
        "table.parquet",
        "pairs.parquet",
        "spectra.safetensors",
        "words.json",
        "paths.json",
        "pictures/",
    )


def _as_json(found: Survey) -> dict[str, Any]:
    return {
        "scores": rows_of(found.table),
        "pairs": {
            one.name: [[str(a), str(b), value] for a, b, value in one.top()] for one in found.pairs
        },
        "paths": _chains(found),
        "missing": dict(found.missing),
    }


def _chains(found: Survey) -> dict[str, list[dict[str, Any]]]:
    return {
        kind: [
            {"heads": [*map(str, one.heads)], "modes": one.modes, "strength": one.strength}
            for one in paths
        ]
        for kind, paths in found.paths.items()
    }


def _shown(found: Survey) -> Iterator[Any]:
    """Best heads of every score, then the strongest chains."""
    from rich.text import Text

    yield found.table
    for kind, paths in found.paths.items():
        if paths:
            yield Text(f"\nStrongest paths, {kind} (in units of chance)", style="bold")
        for path in paths[:5]:
            yield Text(f"  {path}")
    for name, reason in found.missing.items():
        yield Text(f"\nNo {name.replace('_', ' ')}: {reason}", style="dim")


def _write(
    folder: "RunFolder",
    found: Survey,
    words: dict[str, Any],
    settings: dict[str, Any],
    timings: dict[str, float],
) -> None:
    import pandas

    from headscope.plots import heatmaps
    from headscope.report.sections import circuit_sections, drawings

    nodes = found.table.get("copying_eigenvalues_mlp")
    made = drawings(found.pairs, found.spectra, found.eigenvalues, nodes)
    chains = {
        kind: [(str(one).rpartition(" (")[0], one.strength) for one in paths]
        for kind, paths in found.paths.items()
    }
    shown = [one for one in _SHOWN if one in found.table]
    made["scores"] = lambda theme: heatmaps(found.table, shown, theme=theme)
    if found.pairs:
        rows = pandas.concat([one.to_pandas() for one in found.pairs])
        with whole_file(folder.path / "pairs.parquet") as file:
            rows.to_parquet(file, index=False)
    if found.spectra:
        save_spectra(found.spectra, folder.path / "spectra.safetensors")
    with whole_file(folder.path / "words.json") as file:
        file.write(json.dumps(words).encode() + b"\n")
    with whole_file(folder.path / "paths.json") as file:
        file.write(json.dumps(_chains(found), indent=2).encode() + b"\n")
    folder.write(
        found.table,
        settings,
        timings,
        command=typed(),
        sections=circuit_sections(chains, made, found.missing),
        pictures=made,
    )
