"""``headscope scan``, ``scorers``, ``circuits`` and ``head``: scores of heads."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import probes
from headscope.base.files import check_page, whole_file, whole_page, writable_folder
from headscope.base.options import RunOptions
from headscope.base.result import reasons
from headscope.circuits.survey import Survey, survey
from headscope.circuits.vocabulary import vocabulary_words
from headscope.cli.options import Loading, scorer_names
from headscope.cli.output import (
    ModelCommand,
    asked_of,
    check_overwrite,
    console,
    json_rows,
    print_either,
    print_result,
    print_written,
    typed,
)
from headscope.errors import HeadscopeError, InputError
from headscope.heads import HeadIndex
from headscope.interactive import Explanation, attention_example, explain
from headscope.models.protocol import HeadModel
from headscope.scorer import FLAT, REPEATED
from headscope.scorers import CATALOGUE, DEFAULT
from headscope.scoring import score
from headscope.table import HeadScores, HeadTable, save_spectra

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder


# Maximum number of heads in one line.
_MOST = 8


def run_scan(
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
    """Load the model, score its heads, then write and print the table."""
    from headscope.base.configs import parse, read_yaml
    from headscope.probes.config import ProbeConfig, build_probe

    given = {"--probe": probe_file, "--source": source, "--images": images}
    if len(named := [option for option, value in given.items() if value is not None]) > 1:
        raise InputError(f"{' and '.join(named)} both name what is run: give only one of them.")
    if target is not None and source is None:
        raise InputError("--target is given without --source: give the file of sources too.")
    names = scorer_names(scorers)
    config = None
    if probe_file is not None:
        config = parse(ProbeConfig, read_yaml(probe_file), str(probe_file))
    asked = None if config is None else config.model_dump(mode="json", exclude_none=True)
    command = ModelCommand.begin(
        "scan",
        loading,
        out,
        overwrite=overwrite,
        scorers=names,
        probe=asked,
        seed=options.seed,
    )
    model, folder = command.model, command.folder
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
    command.took("score")

    def show() -> None:
        print_result(table, as_json=as_json)
        if placed and not as_json:
            console().print(*placed, sep="\n", soft_wrap=True, highlight=False)

    if folder is None:
        show()
        return
    folder = folder.ready()
    settings = command.settings(
        scorers=list(table),
        probe=asked,
        **({} if source is None else {"source": source.name}),
        **({} if target is None else {"target": target.name}),
        **({} if images is None else {"images": images.name}),
        seed=options.seed,
        roles_on_text=placed,
    )
    folder.write(table, settings, command.timings, command=typed(), examples=examples)
    if several:
        show()
        print_written(folder.path, "table.parquet", "pictures/")
        return
    with suppress(HeadscopeError):  # the example is optional
        example = attention_example(model, length=_example_length(len(model.shape.heads)))
        example.save(folder.path / "attention.safetensors")
    show()
    print_written(folder.path, "table.parquet", "pictures/")


def _on_text(model: HeadModel, table: HeadTable, options: RunOptions) -> list[str]:
    """Compare positional roles on natural text with those found on random tokens.

    One line per role that needs no repetition (previous and current token): some heads attend one
    token back only on random tokens, which carry no meaning.
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
    """Length of the stored example: a megabyte of patterns, or 20 tokens."""
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
    console().print("* not in a default scan; select it with --scorers.")


_SHOWN = (
    "ov_effective_rank",
    "ov_outliers",
    "copying_eigenvalues_mlp",
    "qk_effective_rank",
    "qk_outliers",
    "matching_eigenvalues_mlp",
)


def run_circuits(
    loading: Loading,
    *,
    out: Path | None,
    overwrite: bool,
    tokens: int,
    paths: int,
    seed: int,
    as_json: bool,
) -> None:
    """Load the model, analyse its weights, then write and print the results."""
    command = ModelCommand.begin(
        "circuits", loading, out, overwrite=overwrite, tokens=tokens, paths=paths, seed=seed
    )
    model, folder = command.model, command.folder
    found = survey(model, tokens=tokens, paths=paths, seed=seed)
    command.took("read")
    if folder is not None:
        words = vocabulary_words(model, 3 if len(model.shape.heads) <= 1024 else 1)
        settings = command.settings(tokens=tokens, seed=seed)
        _write(folder.ready(), found, words, settings, command.timings)
    print_either(lambda: _survey_as_json(found), lambda: _shown(found), as_json=as_json)
    if folder is not None:
        tables = ("table.parquet", "pairs.parquet", "spectra.safetensors")
        print_written(folder.path, *tables, "words.json", "paths.json", "pictures/")


def _survey_as_json(found: Survey) -> dict[str, Any]:
    return {
        "scores": json_rows(found.table),
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
    """Format the best heads of every score, then the strongest chains."""
    from rich.text import Text

    yield found.table
    for kind, paths in found.paths.items():
        if paths:
            yield Text(f"\nStrongest paths, {kind} (in units of chance)", style="bold")
        for path in paths[:5]:
            yield Text(f"  {path}")
    model = next(iter(found.table.values())).provenance.model
    for names, reason in reasons(found.missing, model):
        yield Text(f"\nNo {names}: {reason}", style="dim")


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


def split(names: Sequence[str]) -> tuple[str | None, str]:
    """Split ``[MODEL] HEAD`` and validate the head before anything is loaded."""
    if len(names) > 2:
        raise InputError(f"give a model and one head, not {len(names)} names.")
    *model, head = names
    return (model[0] if model else None), str(HeadIndex.parse(head))


def run_head(
    loading: Loading,
    address: str,
    *,
    out: Path | None,
    overwrite: bool,
    text: str | None,
    weights_only: bool,
    ranks: bool | None,
    seed: int,
    as_json: bool,
) -> None:
    """Load the model, analyse one head, then write and print the results."""
    if weights_only and text is not None:
        raise InputError("--text needs a run of the model: leave out --weights-only.")
    if text is not None and not text.strip():
        raise InputError("--text is empty: give a sentence.")
    check_overwrite(out, overwrite=overwrite)
    file = None if out is None else writable_folder(out) / f"{address}.html"
    model = loading.model()
    what = {"text": text, "weights_only": weights_only, "seed": seed}
    asked = asked_of(model, loading, head=address, ranks=ranks, **what)
    if file is not None:
        check_page(file, asked, overwrite=overwrite)
    found = explain(address, model, text=text, weights_only=weights_only, ranks=ranks, seed=seed)
    if file is not None:
        whole_page(file, found.page(), asked)
    print_either(lambda: _as_json(found), lambda: [found], as_json=as_json)
    if file is not None:
        console(stderr=True).print(f"Written to {file} (open it in a browser).", soft_wrap=True)


def _as_json(found: Explanation) -> dict[str, Any]:
    card, head = found.card, found.head

    def plain(value: float) -> float | None:
        return value if value == value else None

    def values(scores: Sequence[HeadScores]) -> dict[str, Any]:
        return {
            one.name: {"mean": plain(one[head]), "sem": plain(float(one.sem[head]))}
            for one in scores
        }

    facts = card.to_json()
    facts["scores"] = {name: plain(value) for name, value in card.scores.items()}
    probes = {} if found.scan is None else values(list(found.scan.values()))
    return facts | {"probes": probes, "effects": values(found.effects)}
