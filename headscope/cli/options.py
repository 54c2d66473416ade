"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer


def path_option(said: str, *names: str) -> Any:
    """An option that takes a path, and no empty one: that is a variable which was never set."""
    return typer.Option(*names, help=said, parser=_path, metavar="<path>")


def _path(text: "str | Path") -> Path:
    if str(text) == "":
        raise typer.BadParameter("the path is empty: give a name, or leave the option out.")
    return Path(text)


Model = Annotated[
    str | None,
    typer.Argument(
        help="Hugging Face name, local folder, or bundled model (default: tiny-gpt2).",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag, commit; or bundled checkpoint.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (default: as stored).")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 (default: a GPU if there is one).")
]
Memory = Annotated[str | None, typer.Option(help="What a chunk of rows may take, e.g. 2GB.")]
Scorers = Annotated[str | None, typer.Option(help="Names, separated by commas.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what another run left in the folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled weights.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model's own code; needs --revision COMMIT."),
]
