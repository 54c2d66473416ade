"""The folder that a command writes to, and whose run it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.cli.loading import Loading
from headscope.errors import InputError

if TYPE_CHECKING:
    from headscope.models.protocol import HeadModel
    from headscope.report.folder import RunFolder


def run_folder(out: Path | None, kind: str, *, overwrite: bool) -> "RunFolder | None":
    """The folder of a run, claimed before anything is loaded; None where none was asked for.

    Raises:
        InputError: if it cannot be written, or holds another kind of run.
    """
    from headscope.report.folder import RunFolder

    check_overwrite(out, overwrite=overwrite)
    return None if out is None else RunFolder.create(out, kind, overwrite=overwrite)


def check_overwrite(out: Path | None, *, overwrite: bool) -> None:
    """Refuse ``--overwrite`` where nothing is written.

    Raises:
        InputError: if there is no ``--out``.
    """
    if overwrite and out is None:
        raise InputError("--overwrite needs --out: without it nothing is written.")


def asked_of(model: "HeadModel", loading: Loading, **other: Any) -> dict[str, Any]:
    """What tells one run on a model from another: weights, how they are loaded, and settings."""
    return {
        "model": model.name,
        "revision": model.revision,
        "weights": model.digest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "extrapolate": loading.extrapolate,
        **other,
    }
