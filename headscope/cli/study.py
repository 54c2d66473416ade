"""``headscope study`` and ``kinds``: test papers' claims and find kinds of heads."""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope import kinds, studies
from headscope.base.files import subfolder
from headscope.cli.options import Loading, listed
from headscope.cli.output import (
    asked_of,
    check_overwrite,
    console,
    json_rows,
    print_either,
    print_written,
    run_folder,
    typed,
)
from headscope.errors import UnsupportedModelError
from headscope.models.protocol import HeadModel
from headscope.studies import Study, StudyResult
from headscope.table import HeadTable
from headscope.table.kinds import KindTable
from headscope.vision import Clip, clip

if TYPE_CHECKING:
    from headscope.report.folder import RunFolder


def print_list(*, as_json: bool) -> None:
    """Print study names and titles."""
    found = studies.list()
    width = max(map(len, found))
    print_either(
        lambda: [{"study": name, "title": title} for name, title in found.items()],
        lambda: (f"{name:{width}}  {title}" for name, title in found.items()),
        as_json=as_json,
    )


def print_study(name: str) -> None:
    """Print a study's paper, its claims and what is measured."""
    found = studies.show(name)
    print_either(lambda: None, lambda: _described(found), as_json=False)


def run_study(
    loading: Loading,
    name: str,
    *,
    out: Path | None,
    fast: bool,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run one study or all of them, print the verdicts and write the page."""
    check_overwrite(out, overwrite=overwrite)
    asked = [studies.show(one) for one in (studies.list() if name == "all" else [name])]
    model = _loaded(loading, asked)
    left = None if overwrite else out
    with suppress(UnsupportedModelError):
        console(stderr=True).print(f"{studies.cost(model, asked, fast, out=left)}")
    results = studies.run_all(
        model, out, fast, studies=asked, seed=seed, overwrite=overwrite
    ).values()
    print_either(lambda: _rows(results), lambda: _lines(results), as_json=as_json)
    if out is not None:
        print_written(out, "studies/")


def _loaded(loading: Loading, asked: Iterable[Study]) -> HeadModel | Clip:
    """The model, with both its halves where studies are asked of images and texts."""
    if {one.of for one in asked} == {"clip"}:
        return clip(
            loading.source,
            revision=loading.revision,
            device=loading.device,
            dtype=loading.dtype,
        )
    return loading.model()


def _rows(results: Iterable[StudyResult]) -> list[dict[str, Any]]:
    return [row for one in results for row in json_rows(one)]


def _lines(results: Iterable[StudyResult]) -> Iterator[str]:
    for one in results:
        yield one.summary()
        yield from (f"  {answer.claim}: {answer.because}" for answer in one.answers)
        yield ""


def _described(study: Study) -> Iterator[str]:
    yield f"{study.name}: {study.title}"
    yield study.paper
    yield study.about
    for one in study.claims:
        yield f"\n  {one.name}: {one.statement}"
        yield f"    number: {one.value}{f' ({one.unit})' if one.unit else ''}"
        yield f"    control: {one.control}"
        yield f"    holds if the interval of the difference is above {one.least:g}"


def run_kinds(
    loading: Loading,
    *,
    names: str | None,
    confirm: bool,
    seed: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Load the model, survey its kinds, then write and print them."""
    folder = run_folder(out, "kinds", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    asked: dict[str, Any] = {"kinds": names or "all", "confirm": confirm, "seed": seed}
    if folder is not None:
        folder = folder.of(asked_of(model, loading, **asked))
    kept = None if folder is None else subfolder(folder.path, "kinds")
    found = kinds.survey(model, listed(names), confirm=confirm, seed=seed, folder=kept)
    if folder is not None:
        settings = {"command": "kinds", "model": model.name, "revision": model.revision, **asked}
        folder = folder.ready()
        _write(folder, found, settings, time.perf_counter() - started)
    print_either(lambda: _as_json(found), lambda: [found.summary()], as_json=as_json)
    if folder is not None:
        files = ("kinds.safetensors", "findings.parquet", "page.txt", "table.parquet", "pictures/")
        print_written(folder.path, *files)


def _as_json(found: KindTable) -> dict[str, Any]:
    from headscope.cli.output import json_rows

    return {
        "findings": json_rows(found),
        "asked": [kind.name for kind in found.asked],
        "not_asked": dict(found.left_out),
    }


def _write(folder: "RunFolder", found: KindTable, settings: dict[str, Any], seconds: float) -> None:
    from headscope.base.files import whole_file

    found.save(folder.path / "kinds.safetensors")
    with whole_file(folder.path / "findings.parquet") as file:
        found.to_pandas().to_parquet(file, index=False)
    with whole_file(folder.path / "page.txt") as file:
        file.write((found.summary() + "\n").encode())
    folder.write(
        HeadTable(found.scores()),
        settings,
        {"seconds": seconds},
        command=typed(),
        results={"kinds": found},
    )
