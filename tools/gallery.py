"""Run every study on a real language model, and write what the documentation shows of it.

    python -m tools.gallery MODEL build/gallery

goes on where it stopped. Writes docs/gallery.md with its pictures, the figures that
``make test-real`` holds, and what each claim costs. ``--page build/gallery`` writes the page of
what is finished by now. Studies that the folder has no result of keep their committed answers, as
long as those are of the same weights and seed.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import headscope as hs
from headscope.errors import HeadscopeError
from headscope.models.protocol import HeadModel
from headscope.plots import figures_of
from headscope.studies import Claim, Evidence, Study, StudyResult, StudySetting

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"
FIGURES = ROOT / "tests" / "real" / "gallery.json"
COSTS = ROOT / "headscope" / "studies" / "costs.json"
_KEPT = ("verdict", "value", "control", "low", "high", "n", "because")
_VERDICTS = ("holds", "does not hold", "cannot be asked")


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
    for study in (one for one in hs.studies.STUDIES.values() if one.of == "model"):
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
    """Write the figures that are held, the page made of them, and its pictures."""
    held = updated(json.loads(FIGURES.read_text("utf-8")), results, notes)
    PICTURES.mkdir(exist_ok=True)
    for name, result in results.items():
        picture = PICTURES / f"{name}.png"
        picture.unlink(missing_ok=True)
        files = [notes / f"{name}.{one.claim}.png" for one in result.answers]
        if drawn := [file for file in files if file.exists()]:
            picture.write_bytes(drawn[0].read_bytes())
            held["pictured"][name] = drawn[0].stem.split(".")[1]
    FIGURES.write_text(json.dumps(held, indent=1) + "\n")
    PAGE.write_text(page(held), encoding="utf-8")


def updated(
    held: Mapping[str, Any], results: Mapping[str, StudyResult], notes: Path
) -> dict[str, Any]:
    """The committed answers with those of new results in their places.

    Answers of other weights or another seed are dropped, and so are those to claims that no study
    makes any more.
    """
    about = next(iter(results.values())).provenance
    same = (held["weights"], held["seed"]) == (about.weight_digest, about.seed)
    old: Mapping[str, Any] = held["answers"] if same else {}
    answers = {}
    for name, study in hs.studies.STUDIES.items():
        new = {one.claim: one for one in results[name].answers} if name in results else {}
        for claim in study.claims:
            key = f"{name}/{claim.name}"
            if claim.name in new:
                answers[key] = {field: _plain(getattr(new[claim.name], field)) for field in _KEPT}
                answers[key]["because"] = _portable(new[claim.name].because, about.model)
                took = _seconds(notes / f"{name}.{claim.name}.seconds")
                answers[key]["seconds"] = took if study.of == "model" else 0.0  # refused at once
            elif key in old:
                answers[key] = old[key]
    pictured = {name: one for name, one in held["pictured"].items() if same and name not in results}
    return {
        "weights": about.weight_digest,
        "seed": about.seed,
        "dtype": about.dtype,
        "versions": dict(sorted(about.versions.items())),
        "pictured": pictured,
        "answers": answers,
    }


def _seconds(note: Path) -> float | None:
    """Processor seconds that a claim took, where they were noted."""
    return round(float(note.read_text("utf-8")), 1) if note.exists() else None


def _portable(because: str, model: str) -> str:
    """A reason without the folder of the model's file, which means nothing elsewhere."""
    return re.sub(rf"\S*/(?={re.escape(Path(model).name)})", "", because)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")  # NaN is not itself
    return value


def page(held: Mapping[str, Any]) -> str:
    """The page of the documentation, from the figures that are held."""
    answers: Mapping[str, Any] = held["answers"]
    studies = [
        study
        for study in hs.studies.STUDIES.values()
        if all(f"{study.name}/{claim.name}" in answers for claim in study.claims)
    ]
    shown = [answers[f"{one.name}/{claim.name}"] for one in studies for claim in one.claims]
    counts = {one: sum(answer["verdict"] == one for answer in shown) for one in _VERDICTS}
    versions = ", ".join(f"{name} {number}" for name, number in held["versions"].items())
    lines = [
        "# Gallery: a real language model",
        "",
        f"{_counted(len(studies))} [studies](studies.md), run on SmolLM2-135M-Instruct (30 layers, "
        "9 query heads and 3 key/value heads each, 4-bit weights, Apache-2.0). Of "
        f"{len(shown)} claims, {counts['holds']} hold, {counts['does not hold']} do not hold, and "
        f"{counts['cannot be asked']} cannot be asked of this model. A claim that does not hold "
        "here may hold in the larger models that most of these papers use, or there may be too "
        "few examples to tell, which the interval shows.",
        "",
        f"`make gallery` reruns everything, and resumes after an interruption. {_cost(shown)} "
        "`make test-real` reruns the quick studies and fails if a number changes; with "
        "`HEADSCOPE_GALLERY=all` it reruns all of them.",
        "",
        f"Weights {held['weights']}, {held['dtype']}, seed {held['seed']}; {versions}.",
        "",
        "## Verdicts",
        "",
        "| study | claim | verdict | value | control | difference, 99 % | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        lines += [_row(study, claim, answers) for claim in study.claims]
    lines += _costs(studies, answers)
    for study in studies:
        lines += _section(study, answers, held["pictured"].get(study.name), held["seed"])
    return "\n".join(lines) + "\n"


def _cost(shown: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the time of the whole gallery."""
    known = [one["seconds"] for one in shown if one["seconds"] is not None]
    missing = len(shown) - len(known)
    but = f" (without {missing} claims whose time was not recorded)" if missing else ""
    return f"It takes {sum(known) / 60:.0f} minutes on one core{but}."


def _costs(studies: Sequence[Study], answers: Mapping[str, Any]) -> list[str]:
    """Table of the processor time of each study, the longest first."""
    took = {
        study.name: [answers[f"{study.name}/{claim.name}"]["seconds"] for claim in study.claims]
        for study in studies
    }
    known = {name: sum(found) for name, found in took.items() if None not in found}
    longest = sorted(known, key=lambda name: -known[name])
    few = [name for name in longest if known[name] < 60]
    rows = [f"| {name} | {known[name] / 60:.1f} |" for name in longest if name not in few]
    rest = sum(known[name] for name in few)
    rows.append(f"| {len(few)} others, less than a minute each | {rest / 60:.1f} |")
    rows.append(f"| **total** | **{sum(known.values()) / 60:.1f}** |")
    return [
        "",
        "## Time",
        "",
        "Minutes on one core. Studies share probes and heads, so a study that reuses those of an "
        "earlier one is cheaper here than on its own.",
        "",
        "| study | minutes |",
        "|---|---|",
        *rows,
    ]


def _counted(found: int) -> str:
    every = len(hs.studies.STUDIES)
    return f"The {every}" if found == every else f"{found} of the {every}"


def _row(study: Study, claim: Claim, answers: Mapping[str, Any]) -> str:
    one = answers[f"{study.name}/{claim.name}"]
    number: Callable[[float | None], str] = lambda value: (  # noqa: E731
        "-" if value is None else f"{value:.3g}"
    )
    cells = ["-"] * 4
    if one["n"]:
        unit = f" {claim.unit}" if claim.unit else ""
        cells = [
            f"{number(one['value'])}{unit}",
            number(one["control"]),
            f"{number(one['low'])} to {number(one['high'])}",
            str(one["n"]),
        ]
    start = f"| [{study.name}](#{name_of(study)}) | {claim.name} | **{one['verdict']}** | "
    return start + " | ".join(cells) + " |"


def name_of(study: Study) -> str:
    """Anchor of a study's section, as the documentation makes it of the heading."""
    title = f"{study.title} ({study.name})".lower()
    kept = "".join(one for one in title if one.isalnum() or one in " -_")
    return kept.replace(" ", "-")


def _section(
    study: Study, answers: Mapping[str, Any], pictured: str | None, seed: int
) -> list[str]:
    lines = ["", f"## {study.title} ({study.name})", "", f"{study.paper}.", ""]
    for claim in study.claims:
        one = answers[f"{study.name}/{claim.name}"]
        why = f" {_escaped(one['because'])}" if one["because"] else ""
        lines.append(f"- **{claim.name}**, {one['verdict']}: {claim.statement}{why}")
    if pictured is not None:
        held = next(claim for claim in study.claims if claim.name == pictured)
        n = answers[f"{study.name}/{held.name}"]["n"]
        lines += [
            "",
            f"![{held.statement}](gallery/{study.name}.png)",
            "",
            f"*{held.name}: {_escaped(held.value)} Control: {_escaped(held.control)} n = {n}, "
            f"seed {seed}; the interval in the table is at 99 %.*",
        ]
    return lines


def _escaped(text: str) -> str:
    end = "" if text.endswith(".") else "."
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*") + end


if __name__ == "__main__":
    if sys.argv[1] == "--page":  # of what is finished
        write(finished(Path(sys.argv[2])), Path(sys.argv[2]) / "notes")
    else:
        main(sys.argv[1], Path(sys.argv[2]))
