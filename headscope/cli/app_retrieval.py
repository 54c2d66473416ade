"""The commands about long context and retrieval heads, with their options."""

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.loading import Loading, with_loading
from headscope.cli.options import Json, Model, Overwrite, path_option

commands = typer.Typer()


@commands.command()
@with_loading
def retrieval(
    loading: Loading,
    model: Model = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens: 1k..32k (doubling) or 128,512 (default: what the model reads)."),
    ] = None,
    depths: Annotated[str, typer.Option(help="How many, or shares: 0,0.5,1.")] = "10",
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
            help="Ask in the tokenizer's chat template (default: if it has one).",
        ),
    ] = None,
    distractors: Annotated[
        int, typer.Option(min=0, help="Other needles of the same kind in every text.")
    ] = 3,
    haystack: Annotated[
        Path | None, path_option("Text file or folder to hide them in (default: bundled).")
    ] = None,
    per_cell: Annotated[int | None, typer.Option(min=1, help="Texts per length and depth.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Also beyond the trained length (rotary models).")
    ] = False,
    masking: Annotated[Path | None, path_option("YAML file with tasks to mask heads in.")] = None,
    random: Annotated[
        int, typer.Option(min=-1, help="Random orders of masked heads; -1: mask nothing.")
    ] = 5,
    form: Annotated[
        str,
        typer.Option(help="decoded (published), or forced: one pass each, the answer appended."),
    ] = "decoded",
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most.")
    ] = None,
    out: Annotated[
        Path | None, path_option("Folder for tables, pictures, page, and finished cells.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of needles and texts.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per pass.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Find the heads of MODEL that fetch from far back, and mask them; resumable with --out."""
    from headscope.cli import retrieval as command

    loading = loading.of(model, extrapolate=extrapolate)
    asked = command.Asked(
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


@commands.command(no_args_is_help=True)
@with_loading
def influence(
    loading: Loading,
    corpus: Annotated[Path, typer.Argument(help="JSONL file, one object with a text a line.")],
    model: Annotated[
        str | None, typer.Option(help="Model that reads it (default: tiny-gpt2).")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="L5H1,L7H3 or a folder of `retrieval` (default: found by needles)."),
    ] = None,
    out: Annotated[Path | None, path_option("Folder (default: runs/influence-FILE).")] = None,
    field: Annotated[str, typer.Option(help="Name of the text in each object.")] = "text",
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens read of a document (default: all that fit).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Documents per pass.")] = None,
    denominator: Annotated[
        str, typer.Option(help="base or masked: what the rise is a share of.")
    ] = "base",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Rank the documents of CORPUS by how much retrieval heads help to read them; resumable."""
    from headscope.cli import influence as command

    command.run(
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
