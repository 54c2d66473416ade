"""Arguments and options that several commands share."""

from typing import Annotated

import typer

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
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled weights.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model's own code; needs --revision COMMIT."),
]
