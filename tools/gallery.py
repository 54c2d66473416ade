"""Run every study on a real language model, and write what the documentation shows of it.

    python -m tools.gallery MODEL build/gallery

goes on where it stopped. Writes docs/gallery.md with its pictures, the figures that
``make test-real`` holds, and what each claim costs. ``--page build/gallery`` writes the page of
what is finished by now.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import headscope as hs
from headscope.errors import HeadscopeError
from headscope.models.protocol import HeadModel
from headscope.plots import figures_of
from headscope.studies import Answer, Claim, Evidence, Study, StudyResult, StudySetting

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"
FIGURES = ROOT / "tests" / "real" / "gallery.json"
COSTS = ROOT / "headscope" / "studies" / "costs.json"
_KEPT = ("verdict", "value", "control", "low", "high", "n")


def main(source: str, out: Path) -> None:
    """Run, and write everything."""
    model = hs.load(source)
    notes = out / "notes"
    notes.mkdir(parents=True, exist_ok=True)
    studies = [watched(study, notes) for study in hs.studies.STUDIES.values()]
    print(hs.studies.cost(model, list(hs.studies.STUDIES), out=out), flush=True)
    one = forward_seconds(model)
    hs.studies.run_all(model, out, studies=studies)
    write(finished(out), notes)
    fast = short_form(model_of_costs()) if "--costs" in sys.argv else {}
    write_costs(notes, one, fast)


def finished(out: Path) -> dict[str, StudyResult]:
    """Results of all studies in a folder that are finished, in the order in which they ship."""
    files = {name: out / "studies" / name / "result.safetensors" for name in hs.studies.STUDIES}
    return {name: StudyResult.load(file) for name, file in files.items() if file.exists()}


def watched(study: Study, notes: Path) -> Study:
    """The study, whose claims note what they cost and draw their first figure."""
    return replace(study, claims=tuple(_watched(study, claim, notes) for claim in study.claims))


def _watched(study: Study, claim: Claim, notes: Path) -> Claim:
    name = f"{study.name}.{claim.name}"

    def ask(model: HeadModel, setting: StudySetting) -> Evidence:
        started = time.process_time()
        try:
            found = claim.ask(model, setting)
        finally:
            seconds = time.process_time() - started
            (notes / f"{name}.seconds").write_text(f"{seconds:.3f}\n")
            print(f"{seconds:7.1f} s  {name}", flush=True)
        _draw(found, notes / f"{name}.png")
        return found

    return replace(claim, ask=ask)


def _draw(found: Evidence, file: Path) -> None:
    for drawing in figures_of(found.results).values():
        try:
            hs.plots.save(drawing("light"), file, scale=1.0)
        except HeadscopeError as error:
            print(f"{file.stem}: {error}", flush=True)
            continue
        return


def forward_seconds(model: HeadModel) -> float:
    """Processor time of a pass of 64 tokens, the least of five."""
    probe = hs.probes.random_tokens(model, length=min(64, (model.shape.n_ctx or 64) - 2), batch=1)
    found = []
    for _ in range(5):
        started = time.process_time()
        model.run(probe.tokens)
        found.append(time.process_time() - started)
    return min(found)


def short_form(model: HeadModel) -> dict[str, float]:
    """What the claims of the short form cost on a model, in passes of 64 tokens."""
    one, setting, costs = forward_seconds(model), StudySetting(fast=True), {}
    for study in hs.studies.STUDIES.values():
        for claim in study.claims:
            started = time.process_time()
            with contextlib.suppress(HeadscopeError):
                claim.ask(model, setting)
            costs[f"{study.name}/{claim.name}"] = round((time.process_time() - started) / one, 1)
    return costs


def model_of_costs() -> HeadModel:
    """The bundled model, by which the short form is measured."""
    return hs.load("tiny-llama")


def write_costs(notes: Path, one: float, fast: Mapping[str, float]) -> None:
    """Write what every claim costs; what was not measured keeps its number."""
    known: dict[str, dict[str, float]] = json.loads(COSTS.read_text("utf-8"))
    for study in hs.studies.STUDIES.values():
        for claim in study.claims:
            file = notes / f"{study.name}.{claim.name}.seconds"
            if file.exists():
                passes = round(float(file.read_text()) / one, 1)
                known["whole"][f"{study.name}/{claim.name}"] = passes
    known["fast"] |= fast
    COSTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def write(results: Mapping[str, StudyResult], notes: Path) -> None:
    """Write the page, its pictures, and the figures that are held."""
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()
    pictures = {}
    for name, result in results.items():
        for answer in result.answers:
            drawn = notes / f"{name}.{answer.claim}.png"
            if drawn.exists() and name not in pictures:
                pictures[name] = answer.claim
                (PICTURES / f"{name}.png").write_bytes(drawn.read_bytes())
    PAGE.write_text(page(results, pictures), encoding="utf-8")
    answers = {
        f"{name}/{one.claim}": {field: _plain(getattr(one, field)) for field in _KEPT}
        for name, result in results.items()
        for one in result.answers
    }
    about = next(iter(results.values())).provenance
    held = {"weights": about.weight_digest, "seed": about.seed, "answers": answers}
    FIGURES.write_text(json.dumps(held, indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")  # NaN is not itself
    return value


def page(results: Mapping[str, StudyResult], pictures: Mapping[str, str]) -> str:
    """The page of the documentation."""
    every = [answer for result in results.values() for answer in result.answers]
    counts = {
        verdict: sum(one.verdict == verdict for one in every)
        for verdict in ("holds", "does not hold", "cannot be asked")
    }
    about = next(iter(results.values())).provenance
    versions = ", ".join(f"{name} {number}" for name, number in sorted(about.versions.items()))
    lines = [
        "# Gallery: a real language model",
        "",
        f"{_counted(len(results))} [studies](studies.md), asked of SmolLM2-135M-Instruct: 30 "
        "layers of 9 heads that share 3 keys, Apache-2.0, from its package of weights in four "
        f"bits. Of {len(every)} claims {counts['holds']} hold, "
        f"{counts['does not hold']} do not, and "
        f"{counts['cannot be asked']} cannot be asked of it. A claim that does not hold here may "
        "hold in larger models, on which most of these papers stand; or the number of examples "
        "is too small to tell, which the interval shows.",
        "",
        "`make gallery` runs it again on two cores and goes on where it stopped; "
        "`make test-real` asks the quick studies again and fails if a number moves; with "
        "`HEADSCOPE_GALLERY=all` it asks all of them.",
        "",
        f"Weights {about.weight_digest}, {about.dtype}, seed {about.seed}; {versions}.",
        "",
        "## Verdicts",
        "",
        "| study | claim | verdict | value | control | difference, 99 % | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        lines += [_row(name, answer) for answer in result.answers]
    for name, result in results.items():
        lines += _section(name, result, pictures.get(name))
    return "\n".join(lines) + "\n"


def _counted(found: int) -> str:
    every = len(hs.studies.STUDIES)
    return f"The {every}" if found == every else f"{found} of the {every}"


def _row(name: str, one: Answer) -> str:
    number: Callable[[float], str] = lambda value: f"{value:.3g}"  # noqa: E731
    cells = ["-"] * 4
    if one.n:
        unit = f" {one.unit}" if one.unit else ""
        cells = [
            f"{number(one.value)}{unit}",
            number(one.control),
            f"{number(one.low)} to {number(one.high)}",
            str(one.n),
        ]
    anchor = name_of(name)
    return f"| [{name}](#{anchor}) | {one.claim} | **{one.verdict}** | " + " | ".join(cells) + " |"


def name_of(study: str) -> str:
    """Anchor of a study's section, as the documentation makes it of the heading."""
    title = f"{hs.studies.STUDIES[study].title} ({study})".lower()
    kept = "".join(one for one in title if one.isalnum() or one in " -_")
    return kept.replace(" ", "-")


def _section(name: str, result: StudyResult, claim: str | None) -> list[str]:
    lines = ["", f"## {result.title} ({name})", "", f"{result.paper}.", ""]
    for one in result.answers:
        # A model that is a file is named by its path: that of this machine is nobody's business.
        model = re.escape(Path(result.provenance.model).name)
        because = re.sub(rf"\S*/(?={model})", "", one.because)
        why = f" {_escaped(because)}" if because else ""
        lines.append(f"- **{one.claim}**, {one.verdict}: {one.statement}{why}")
    if claim is not None:
        held = next(one for one in result.answers if one.claim == claim)
        lines += ["", f"![{held.statement}](gallery/{name}.png)"]
    return lines


def _escaped(text: str) -> str:
    end = "" if text.endswith(".") else "."
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*") + end


if __name__ == "__main__":
    if sys.argv[1] == "--page":  # of what is finished
        write(finished(Path(sys.argv[2])), Path(sys.argv[2]) / "notes")
    else:
        main(sys.argv[1], Path(sys.argv[2]))
