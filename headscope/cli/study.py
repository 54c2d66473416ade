"""``headscope study``: the claims of a paper, asked of a model."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from headscope import studies
from headscope.cli.options import Loading
from headscope.cli.output import check_overwrite, print_either, print_written, rows_of
from headscope.studies import Study, StudyResult


def print_list(*, as_json: bool) -> None:
    """Names and titles."""
    found = studies.list()
    width = max(map(len, found))
    print_either(
        lambda: [{"study": name, "title": title} for name, title in found.items()],
        lambda: (f"{name:{width}}  {title}" for name, title in found.items()),
        as_json=as_json,
    )


def print_study(name: str) -> None:
    """Paper, claims, and what is measured."""
    found = studies.show(name)
    print_either(lambda: None, lambda: _described(found), as_json=False)


def run(
    loading: Loading,
    name: str,
    *,
    out: Path | None,
    fast: bool,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run one study or all of them, print the verdicts, write the page."""
    check_overwrite(out, overwrite=overwrite)
    asked = [studies.show(one) for one in (studies.list() if name == "all" else [name])]
    model = loading.model()
    results = []
    for number, study in enumerate(asked):
        again = overwrite and number == 0  # the later ones join what the first has begun
        results.append(studies.run(study, model, out, fast, seed=seed, overwrite=again))
    print_either(lambda: _rows(results), lambda: _lines(results), as_json=as_json)
    if out is not None:
        print_written(out, "studies/")


def _rows(results: Iterable[StudyResult]) -> list[dict[str, Any]]:
    return [row for one in results for row in rows_of(one)]


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
        yield f"    holds where the interval of the difference is above {one.least:g}"
