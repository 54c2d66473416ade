"""Commands and their options; each command's work is in its own file."""

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.options import (
    Device,
    Dtype,
    Json,
    Loading,
    Memory,
    Model,
    Overwrite,
    Scorers,
    path_option,
    with_loading,
)

app = typer.Typer(
    name="headscope",
    help="Measure what every attention head of a transformer does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        print(f"headscope {version('headscope')}")
        raise typer.Exit
    return asked


@app.callback()
def _shared(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
@with_loading
def scan(
    loading: Loading,
    model: Model = None,
    out: Annotated[Path | None, path_option("Folder for the table, pictures and page.")] = None,
    scorers: Scorers = None,
    probe: Annotated[Path | None, path_option("YAML file with a probe.")] = None,
    source: Annotated[
        Path | None, path_option("For an encoder-decoder: text file with one source per line.")
    ] = None,
    target: Annotated[
        Path | None, path_option("Their targets, one per line (default: generated).")
    ] = None,
    images: Annotated[
        Path | None,
        path_option("For a vision model: folder of images, or with one folder per class."),
    ] = None,
    memory: Memory = None,
    max_tokens_per_chunk: Annotated[
        int | None, typer.Option(min=1, help="Query rows held in memory at once.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per pass.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the default probes.")] = 0,
    examples: Annotated[
        bool, typer.Option("--examples", help="Store the values per example.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Score every attention head of MODEL; with --out also write the table and pictures."""
    from headscope.base.options import RunOptions
    from headscope.cli.scan import run_scan

    run_scan(
        loading.of(model),
        RunOptions(batch_size, memory, seed),
        out=out,
        overwrite=overwrite,
        scorers=scorers,
        probe_file=probe,
        source=source,
        target=target,
        images=images,
        max_tokens_per_chunk=max_tokens_per_chunk,
        examples=examples,
        as_json=json,
    )


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Folder that scan wrote, or its table.parquet.")],
    json: Json = False,
) -> None:
    """Print the table of a finished run."""
    from headscope.cli.output import print_run

    print_run(run, as_json=json)


@app.command()
def scorers(
    json: Json = False,
) -> None:
    """List every scorer: name, unit, range, meaning and source."""
    from headscope.cli.scan import list_scorers

    list_scorers(as_json=json)


@app.command()
@with_loading
def circuits(
    loading: Loading,
    model: Model = None,
    out: Annotated[
        Path | None, path_option("Folder for the table, pairs, pictures and page.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Number of source tokens for the copying shares.")
    ] = 256,
    paths: Annotated[int, typer.Option(min=1, help="Number of chains of each kind.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed for tokens and random bands.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Read every head of MODEL from its weights: spectra, copying, composition, paths."""
    from headscope.cli.scan import run_circuits

    run_circuits(
        loading.of(model),
        out=out,
        overwrite=overwrite,
        tokens=tokens,
        paths=paths,
        seed=seed,
        as_json=json,
    )


@app.command(no_args_is_help=True)
@with_loading
def head(
    loading: Loading,
    names: Annotated[
        list[str], typer.Argument(metavar="[MODEL] HEAD", help="A head, such as L5H1 or 5.1.")
    ],
    out: Annotated[Path | None, path_option("Folder for the page, HEAD.html.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text for the example attention pattern (default: random tokens)."),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Use only the weights, without running a probe.")
    ] = False,
    ranks: Annotated[
        bool | None,
        typer.Option(
            "--ranks/--no-ranks",
            help="Rank by weight scores among all heads (default: if that is fast).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for probes and random bands.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Show everything about one HEAD: scores, weights, partners, example, ablation."""
    from headscope.cli.scan import run_head, split

    model, address = split(names)
    run_head(
        loading.of(model),
        address,
        out=out,
        overwrite=overwrite,
        text=text,
        weights_only=weights_only,
        ranks=ranks,
        seed=seed,
        as_json=json,
    )


@app.command(no_args_is_help=True)
@with_loading
def lens(
    loading: Loading,
    names: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PROMPT", help="A text, in quotes.")
    ],
    target: Annotated[
        str | None, typer.Option(help="Next token to explain (default: the model's own).")
    ] = None,
    foil: Annotated[str | None, typer.Option(help="Token to compare it with.")] = None,
    position: Annotated[
        int, typer.Option(help="Position whose next token is explained; -1 is the last.")
    ] = -1,
    top: Annotated[int, typer.Option(min=1, help="Number of top tokens to show per layer.")] = 5,
    learned: Annotated[
        Path | None, path_option("Folder of a tuned lens or of linear shortcuts.", "--lens")
    ] = None,
    out: Annotated[Path | None, path_option("Folder for numbers, pictures, page.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Decode every layer of MODEL into tokens, and decompose the next token's logit exactly."""
    from headscope.cli.prompt import run_lens, split

    model, prompt = split(names)
    run_lens(
        loading.of(model),
        prompt,
        target=target,
        foil=foil,
        position=position,
        k=top,
        learned=learned,
        out=out,
        overwrite=overwrite,
        as_json=json,
    )


@app.command(no_args_is_help=True)
@with_loading
def flow(
    loading: Loading,
    names: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PROMPT", help="A text, in quotes.")
    ],
    position: Annotated[int, typer.Option(help="Position to trace; -1 is the last token.")] = -1,
    part_threshold: Annotated[
        float, typer.Option(help="Drop single parts with a smaller share.")
    ] = 0.01,
    edge_threshold: Annotated[
        float, typer.Option(help="Draw edges with at least this share.")
    ] = 0.04,
    memory: Memory = None,
    out: Annotated[Path | None, path_option("Folder for numbers, pictures, page.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Trace a position of PROMPT back to the input tokens, through heads and MLPs."""
    from headscope.cli.prompt import run_flow, split

    model, prompt = split(names)
    run_flow(
        loading.of(model),
        prompt,
        position=position,
        part_threshold=part_threshold,
        edge_threshold=edge_threshold,
        memory=memory,
        out=out,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
@with_loading
def edges(
    loading: Loading,
    model: Model = None,
    probe: Annotated[
        str,
        typer.Option(
            help="Task with pairs (ioi, greater_than, agreement, ...), or a JSONL file of pairs."
        ),
    ] = "ioi",
    method: Annotated[
        str, typer.Option(help="Method to score edges: eap, eap_ig, exact, ...")
    ] = "eap_ig",
    metric: Annotated[
        str, typer.Option(help="logit_difference, answer_log_prob, loss, kl_divergence, ...")
    ] = "logit_difference",
    ablation: Annotated[
        str | None,
        typer.Option(help="What a removed edge carries: patch, mean or zero (default: patch)."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Number of gradients for integrated methods.")
    ] = 5,
    count: Annotated[
        int | None, typer.Option(help="Number of edges in the circuit (default: one in fifty).")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Number of pairs to draw from the task.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the pairs and all random draws.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per pass.")] = None,
    out: Annotated[
        Path | None, path_option("Folder for numbers, pictures, page, and finished batches.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Score the edges between heads of MODEL, and find and check a circuit; resumable with --out.

    Judging stability over prompts needs at least 100 examples.
    """
    from headscope.cli import edges as command

    asked = command.EdgeRequest(
        probe=probe,
        method=method,
        metric=metric,
        ablation=ablation,
        steps=steps,
        count=count,
        examples=examples,
        seed=seed,
        batch_size=batch_size,
    )
    command.run(loading.of(model), asked, out=out, overwrite=overwrite, as_json=json)


@app.command()
@with_loading
def doctor(
    loading: Loading,
    model: Annotated[
        str | None,
        typer.Argument(help="Also examine this model: name, folder, bundled.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Report what is installed, and what headscope can do with MODEL."""
    from headscope.cli import doctor as command

    command.run(loading.of(model), as_json=json)


@app.command()
def sweep(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a sweep.", show_default=False)
    ] = None,
    out: Annotated[Path | None, path_option("Folder (default: runs/NAME).")] = None,
    shard: Annotated[str, typer.Option(help="Run part i of N, as i/N, from 1.")] = "1/1",
    executor: Annotated[str, typer.Option(help="inline or ray.")] = "inline",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers (default: one per GPU or two cores).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, without running it.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the config, for editors.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Run the ablations in CONFIG, or resume them; safe to interrupt or kill."""
    from headscope.cli.runs import run_sweep_config

    run_sweep_config(
        config,
        out=out,
        overwrite=overwrite,
        shard=shard,
        executor=executor,
        workers=workers,
        dry_run=dry_run,
        as_schema=schema,
    )


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    json: Json = False,
) -> None:
    """Report a sweep's progress and its failures with their reasons; works while it runs."""
    from headscope.cli.runs import print_status

    print_status(run, as_json=json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    to: Annotated[str, typer.Option(help="csv, sqlite or duckdb.")] = "csv",
    out: Annotated[Path | None, path_option("File (default: in the folder).")] = None,
) -> None:
    """Export the results of a sweep to CSV, SQLite or DuckDB."""
    from headscope.cli.runs import write_export

    write_export(run, to=to, out=out)


@app.command(no_args_is_help=True)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs and sweeps, or saved tables.")
    ],
    out: Annotated[Path, path_option("HTML file.", "--out", "-o")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title (default: the models).")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Combine runs of one or several models into one self-contained HTML report."""
    from headscope.cli.runs import run_report

    run_report(runs, out=out, overwrite=overwrite, title=title)


@app.command()
@with_loading
def patch(
    loading: Loading,
    model: Model = None,
    site: Annotated[
        str, typer.Option(help="resid_pre, attn_out, mlp_out or resid_post.")
    ] = "resid_pre",
    task: Annotated[
        str,
        typer.Option(help="Task with paired prompts: ioi, greater_than, agreement, docstring, ..."),
    ] = "ioi",
    pairs: Annotated[
        Path | None, path_option("JSONL file of pairs: clean, corrupt, answer, foil.")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Number of pairs to draw from the task.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the pairs.")] = 0,
    direction: Annotated[
        str, typer.Option(help="noise: corrupt values into the clean run; denoise: the reverse.")
    ] = "denoise",
    out: Annotated[Path | None, path_option("Folder for the effects and the picture.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Patch the residual stream, attention or MLPs from a paired run, by layer and position."""
    from headscope.cli.prompt import run_patch

    run_patch(
        loading.of(model),
        site=site,
        task=task,
        pairs=pairs,
        examples=examples,
        seed=seed,
        direction=direction,
        out=out,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
@with_loading
def kinds(
    loading: Loading,
    model: Model = None,
    kinds: Annotated[
        str | None, typer.Option(help="Names of kinds, separated by commas (default: all).")
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm/--no-confirm", help="Also ablate the heads that were found.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed for all probes.")] = 0,
    out: Annotated[Path | None, path_option("Folder for the findings.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Find heads of known kinds in MODEL, with p-values, and confirm them by ablation."""
    from headscope.cli.study import run_kinds

    run_kinds(
        loading.of(model),
        names=kinds,
        confirm=confirm,
        seed=seed,
        out=out,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
def emergence(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model (default: tiny-gpt2), or the folder of a sweep over checkpoints.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Revisions, earliest first (default: all bundled ones).")
    ] = None,
    scorers: Scorers = None,
    texts: Annotated[
        Path | None, path_option("UTF-8 text file for the loss, split at blank lines.")
    ] = None,
    out: Annotated[Path | None, path_option("Folder for numbers, picture, page.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the probes.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Score heads at every training checkpoint, with the losses, to see which emerge when."""
    from headscope.cli.compare import run_emergence

    run_emergence(
        Loading(model, dtype=dtype, device=device),
        checkpoints=checkpoints,
        scorers=scorers,
        texts=texts,
        out=out,
        overwrite=overwrite,
        seed=seed,
        as_json=json,
    )


@app.command(no_args_is_help=True)
def plan(
    shape: Annotated[
        str,
        typer.Argument(
            help="llama-3-8b, gpt2, ...; a model whose config is read; or layers=32,heads=32,..."
        ),
    ],
    study: Annotated[str, typer.Option(help="scan, ablation, lens or decode.")] = "scan",
    examples: Annotated[int, typer.Option(min=1, help="Number of examples.")] = 100,
    length: Annotated[int, typer.Option(min=1, help="Tokens per example.")] = 512,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Query positions of a scan (default: all).")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Number of heads to ablate (default: all).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of tokens to decode.")] = 50,
    device: Annotated[str, typer.Option(help="h100, h200, a100, l4, ..., or here.")] = "h100",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Estimate passes, FLOPs, memory and hours of a study for a model of this SHAPE."""
    from headscope.cli.output import print_result
    from headscope.planning import plan as estimate

    cost = estimate(
        shape,
        study,
        examples=examples,
        length=length,
        queries=queries,
        heads=heads,
        steps=steps,
        device=device,
        dtype=dtype,
    )
    print_result(cost, as_json=json)


@app.command(no_args_is_help=True)
def compare(
    first: Annotated[str, typer.Argument(help="Model, MODEL@REVISION, or folder of a scan.")],
    second: Annotated[
        str, typer.Argument(help="Second model, MODEL@REVISION, or folder of a scan.")
    ],
    by: Annotated[str, typer.Option(help="profile, weights or address.")] = "profile",
    scorers: Scorers = None,
    out: Annotated[Path | None, path_option("Folder for numbers and page.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the probes.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Match the heads of two models or checkpoints, and compare their scores.

    Pairs in which both heads differ most from their model's typical head come first.
    """
    from headscope.cli import compare as command

    command.run(
        first, second, by=by, scorers=scorers, out=out, overwrite=overwrite, seed=seed, as_json=json
    )


@app.command()
@with_loading
def similarity(
    loading: Loading,
    model: Model = None,
    other: Annotated[
        str | None,
        typer.Argument(help="Second model, or MODEL@REVISION (default: MODEL's own heads)."),
    ] = None,
    by: Annotated[str, typer.Option(help="pattern, cka, pwcca, query, key or value.")] = "pattern",
    text: Annotated[Path | None, path_option("UTF-8 text (default: bundled passages).")] = None,
    positions: Annotated[
        int | None, typer.Option(min=2, help="Maximum number of sampled positions.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the sample and the null.")] = 0,
    out: Annotated[Path | None, path_option("Folder for numbers, pictures, page.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Find heads of MODEL, or of MODEL and OTHER, that behave alike on a text."""
    from headscope.cli.compare import run_similarity

    run_similarity(
        loading.of(model),
        other=other,
        by=by,
        text=text,
        positions=positions,
        seed=seed,
        out=out,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
@with_loading
def syntax(
    loading: Loading,
    treebank: Annotated[Path, path_option("Treebank in CoNLL-U.", "--treebank")],
    model: Model = None,
    most: Annotated[
        int | None, typer.Option(min=2, help="Use at most this many sentences.")
    ] = None,
    least: Annotated[int, typer.Option(min=1, help="Minimum number of words for a relation.")] = 20,
    epochs: Annotated[
        int, typer.Option(min=0, help="Training epochs of the attention probe; 0: no probe.")
    ] = 4,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed for the split into halves and the probe.")
    ] = 0,
    out: Annotated[Path | None, path_option("Folder for numbers, pictures, page.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Find the heads of MODEL that predict syntactic heads in a treebank, by relation."""
    from headscope.cli.compare import run_syntax

    run_syntax(
        loading.of(model),
        treebank=treebank,
        most=most,
        least=least,
        epochs=epochs,
        seed=seed,
        out=out,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
@with_loading
def retrieval(
    loading: Loading,
    model: Model = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens: 1k..32k (doubling) or 128,512 (default: up to the model's context)."
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Number of depths, or depths as shares: 0,0.5,1.")
    ] = "10",
    needles: Annotated[
        str | None,
        typer.Option(
            help="numbers (default with a chat template), facts (default without one), several, "
            "hops, prose, or a JSONL file."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the tokenizer's chat template (default: if it has one).",
        ),
    ] = None,
    distractors: Annotated[
        int, typer.Option(min=0, help="Number of other needles of the same kind in every text.")
    ] = 3,
    haystack: Annotated[
        Path | None, path_option("Text file or folder to hide the needles in (default: bundled).")
    ] = None,
    per_cell: Annotated[
        int | None, typer.Option(min=1, help="Number of texts per length and depth.")
    ] = None,
    extrapolate: Annotated[
        bool,
        typer.Option("--extrapolate", help="Also test beyond the trained length (rotary models)."),
    ] = False,
    masking: Annotated[Path | None, path_option("YAML file with tasks to mask heads in.")] = None,
    random: Annotated[
        int, typer.Option(min=-1, help="Number of random head orders for masking; -1: no masking.")
    ] = 5,
    form: Annotated[
        str,
        typer.Option(help="decoded (as published), or forced: one teacher-forced pass per text."),
    ] = "decoded",
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens in an answer.")
    ] = None,
    out: Annotated[
        Path | None, path_option("Folder for tables, pictures, page, and finished cells.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for needles and texts.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per pass.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Find the retrieval heads of MODEL, and mask them; resumable with --out."""
    from headscope.cli import retrieval as command

    loading = loading.of(model, extrapolate=extrapolate)
    asked = command.RetrievalRequest(
        lengths=lengths,
        depths=depths,
        needles=needles,
        chat=chat,
        distractors=distractors,
        haystack=haystack,
        per_cell=per_cell,
        seed=seed,
        form=form,
        new_tokens=new_tokens,
        batch_size=batch_size,
        masking=masking,
        random=random,
    )
    command.run(loading, asked, out=out, overwrite=overwrite, as_json=json)


@app.command(no_args_is_help=True)
@with_loading
def influence(
    loading: Loading,
    corpus: Annotated[Path, typer.Argument(help="JSONL file, one object with a text per line.")],
    model: Annotated[
        str | None, typer.Option(help="Model that reads it (default: tiny-gpt2).")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="L5H1,L7H3, or a folder of `headscope retrieval` (default: found with needles)."
        ),
    ] = None,
    out: Annotated[Path | None, path_option("Folder (default: runs/influence-FILE).")] = None,
    field: Annotated[str, typer.Option(help="Name of the text field in each object.")] = "text",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum number of tokens per document (default: all that fit)."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Documents per pass.")] = None,
    denominator: Annotated[
        str, typer.Option(help="Denominator of the relative rise: base or masked.")
    ] = "base",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Rank the documents in CORPUS by how much retrieval heads help predict them; resumable."""
    from headscope.cli.retrieval import run_influence

    run_influence(
        loading.of(model),
        corpus,
        heads=heads,
        out=out,
        overwrite=overwrite,
        field=field,
        max_tokens=max_tokens,
        batch_size=batch_size,
        denominator=denominator,
        as_json=json,
    )


studies = typer.Typer(help="Test the claims of a paper on a model.", no_args_is_help=True)
app.add_typer(studies, name="study")


@studies.command("list")
def list_studies(json: Json = False) -> None:
    """List the built-in studies with one-line descriptions."""
    from headscope.cli.study import print_list

    print_list(as_json=json)


@studies.command("show", no_args_is_help=True)
def show_study(
    name: Annotated[
        str, typer.Argument(help="Name of a study, or a Python file that defines STUDY.")
    ],
) -> None:
    """Show a study: its paper, its claims, and what is measured for each."""
    from headscope.cli.study import print_study

    print_study(name)


@studies.command("run", no_args_is_help=True)
@with_loading
def run_study(
    loading: Loading,
    name: Annotated[
        str, typer.Argument(help="Name of a study, a Python file that defines STUDY, or: all.")
    ],
    model: Model = None,
    out: Annotated[
        Path | None, path_option("Folder for results and page; studies of one model can share it.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Use fewer and shorter examples.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed for all random draws.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Test a study's claims on a model, with number, control and verdict for each; resumable."""
    from headscope.cli.study import run_study

    run_study(
        loading.of(model), name, out=out, fast=fast, seed=seed, overwrite=overwrite, as_json=json
    )
