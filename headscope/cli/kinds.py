"""``headscope kinds``: which heads are of which kind, how sure, and what confirms it."""

import time
from pathlib import Path
from typing import Any

from headscope import kinds
from headscope.base.files import FolderClaim, subfolder
from headscope.cli.options import Loading, listed
from headscope.cli.output import asked_of, check_overwrite, print_either, print_written, typed
from headscope.table import versions
from headscope.table.kinds import KindTable


def run(
    loading: Loading,
    *,
    names: str | None,
    confirm: bool,
    seed: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Load, ask, write, print."""
    check_overwrite(out, overwrite=overwrite)
    claim = None if out is None else FolderClaim.create(out, "kinds", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    asked: dict[str, Any] = {"kinds": names or "all", "confirm": confirm, "seed": seed}
    if claim is not None:
        claim = claim.of(asked_of(model, loading, **asked))
    kept = None if claim is None else subfolder(claim.path, "kinds")
    found = kinds.survey(model, listed(names), confirm=confirm, seed=seed, folder=kept)
    if claim is not None:
        settings = {"command": "kinds", "model": model.name, "revision": model.revision, **asked}
        _write(claim.ready(), found, settings, time.perf_counter() - started)
    print_either(lambda: _as_json(found), lambda: [found.summary()], as_json=as_json)
    if claim is not None:
        print_written(claim.path, "kinds.safetensors", "findings.parquet", "page.txt", page=False)


def _as_json(found: KindTable) -> dict[str, Any]:
    from headscope.cli.output import rows_of

    return {
        "findings": rows_of(found),
        "asked": [kind.name for kind in found.asked],
        "not_asked": dict(found.left_out),
    }


def _write(claim: FolderClaim, found: KindTable, settings: dict[str, Any], seconds: float) -> None:
    from headscope.base.files import whole_file

    found.save(claim.path / "kinds.safetensors")
    with whole_file(claim.path / "findings.parquet") as file:
        found.to_pandas().to_parquet(file, index=False)
    with whole_file(claim.path / "page.txt") as file:
        file.write((found.summary() + "\n").encode())
    claim.write_facts(
        {
            "command": typed(),
            "settings": settings,
            "versions": versions(),
            "timings": {"seconds": seconds},
        }
    )
