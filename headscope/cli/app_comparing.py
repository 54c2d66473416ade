"""The commands that put models or checkpoints side by side, with their options."""

from pathlib import Path
from typing import Annotated

import typer

from headscope.cli.loading import Loading
from headscope.cli.options import Device, Dtype, Json, Overwrite, Scorers, path_option

commands = typer.Typer()


@commands.command()
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
    texts: Annotated[Path | None, path_option("UTF-8 text for the loss, a paragraph each.")] = None,
    out: Annotated[Path | None, path_option("Folder for numbers, picture, page.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probes.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Score heads at every checkpoint of training, beside the losses: which appear when."""
    from headscope.cli import emergence as command

    command.run(
        Loading(model, dtype=dtype, device=device),
        checkpoints=checkpoints,
        scorers=scorers,
        texts=texts,
        out=out,
        overwrite=overwrite,
        seed=seed,
        as_json=json,
    )


@commands.command(no_args_is_help=True)
def compare(
    first: Annotated[str, typer.Argument(help="Model, MODEL@REVISION, or folder of a scan.")],
    second: Annotated[str, typer.Argument(help="The same.")],
    by: Annotated[str, typer.Option(help="profile, weights or address.")] = "profile",
    scorers: Scorers = None,
    out: Annotated[Path | None, path_option("Folder for numbers and page.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the probes.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Match the heads of two models or checkpoints, and tell how their scores differ.

    Pairs whose heads both stand out from the typical head of their model come first.
    """
    from headscope.cli import compare as command

    command.run(
        first, second, by=by, scorers=scorers, out=out, overwrite=overwrite, seed=seed, as_json=json
    )
