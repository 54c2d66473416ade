"""Runs of one or more models as one HTML file that opens offline."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headscope.base.sections import Grid, Section, Words
from headscope.errors import InputError
from headscope.plots.style import SEQUENTIAL, STYLES
from headscope.report.runs import Run
from headscope.report.sections import Picture, laid_out
from headscope.report.shell import as_data, filled
from headscope.report.subjects import Subject, subject_data, subjects

# Okabe and Ito 2008, less black: told apart by colour-blind readers.
ROLE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
MAX_BYTES = 10_000_000
_PICTURE_BYTES = 2_000_000  # of all pictures together
_COLUMNS = 12
_SCRIPTS = ("data.js", "attention.js", "atlas.js", "card.js", "table.js", "figures.js")
_FACTS = ("revision", "weight_digest", "path", "dtype", "device")


def report_page(
    runs: Sequence[Run], *, title: str | None = None, command: str = "", alpha: float = 0.05
) -> str:
    """One page: overview, grid of heads with cards, table, heatmaps, sections of runs, commands.

    The page carries its own copy of plotly.js and a content security policy that lets it run its
    own scripts, by their hashes, and load nothing from anywhere.

    Args:
        runs: of :func:`headscope.report.read_run` and the like; runs of one model are joined.
        title: default: the models' names.
        command: how to make the page again.
        alpha: false discovery rate of the roles.

    Raises:
        InputError: if the page would be larger than 10 MB: give fewer runs.
    """
    found = subjects(runs, alpha)
    several = len(found) > 1
    sections = [
        replace(section, title=f"{run.label}: {section.title}")
        for subject in found
        for run in subject.runs
        for section in run.sections
    ]
    sections = _within(sections, _PICTURE_BYTES) + _failed(runs)
    shown, pictures = laid_out(sections, first=0)
    models = [subject_data(one) for one in found]
    data = {
        "models": models,
        "pictures": pictures,
        "columns": _COLUMNS,
        "roleColours": ROLE_COLOURS,
        "scales": {
            "sequential": SEQUENTIAL,
            "diverging": {name: style.diverging for name, style in STYLES.items()},
        },
        "accent": {name: style.accent for name, style in STYLES.items()},
        "styles": {
            name: {"text": style.text, "missing": style.missing} for name, style in STYLES.items()
        },
    }

    def page(left_out: str) -> str:
        return filled(
            "report.html",
            styles=["page.css", "report.css"],
            scripts=_SCRIPTS,
            data=data,
            title=title or ", ".join(one.name for one in found),
            lead=f"What every attention head does, by headscope.{left_out}",
            subjects=[_overview(one) for one in found],
            facts=_facts(found),
            alpha=alpha,
            sections=shown,
            runs=[_origin(run, subject, several) for subject in found for run in subject.runs],
            command=command or "headscope report " + " ".join(run.label for run in runs),
        )

    made, out = page(""), []
    for part in ("attention", "words"):
        if len(made.encode()) <= MAX_BYTES:
            break
        for model in models:
            model[part] = {} if part == "words" else None
        out.append(part)
        made = page(f" Left out of the cards to stay below 10 MB: {' and '.join(out)}.")
    if len(made.encode()) > MAX_BYTES:
        raise InputError(
            f"the report would have {len(made.encode()) / 1e6:.0f} MB, more than "
            f"{MAX_BYTES // 10**6}: give fewer runs."
        )
    return made


def _overview(subject: Subject) -> dict[str, Any]:
    findings = [{"text": str(one), "heads": one.heads} for one in subject.findings]
    return {"name": subject.name, "findings": findings}


def _facts(found: Sequence[Subject]) -> list[tuple[str, list[str]]]:
    """What the models are, one column each; empty rows are left out."""
    rows: dict[str, list[str]] = {}
    for subject in found:
        first = subject.scores[0]
        layers, heads = subject.shape
        known = first.provenance.to_json()
        told = {name: str(known[name] or "") for name in _FACTS}
        told["heads"] = f"{layers} layers of {heads} ({first.kv_heads} key/value heads)"
        told["scores"] = str(len(subject.scores))
        told["runs"] = "; ".join(f"{run.label} ({run.kind})" for run in subject.runs)
        told["versions"] = ", ".join(f"{k} {v}" for k, v in first.provenance.versions.items())
        for name, value in told.items():
            rows.setdefault(name.replace("_", " "), []).append(value)
    return [(name, values) for name, values in rows.items() if any(values)]


def _origin(run: Run, subject: Subject, several: bool) -> dict[str, str]:
    of = f" of {subject.name}" if several else ""
    told = [f"{name}: {value}" for name, value in run.facts.items()]
    return {
        "title": f"{run.label} ({run.kind}{of})",
        "told": "; ".join(told),
        "command": run.command,
        "config": run.config,
    }


def _failed(runs: Sequence[Run]) -> list[Section]:
    rows = [(run.label, what, why) for run in runs for what, why in run.failed.items()]
    if not rows:
        return []
    return [Section("Failed", [Grid(("run", "what", "why"), rows, "What could not be computed")])]


def _within(sections: Sequence[Section], budget: int) -> list[Section]:
    """Sections whose pictures fit a budget of bytes: the largest are left out, and it is said."""
    sizes = {
        (i, j): len(as_data([block.light, block.dark]))
        for i, section in enumerate(sections)
        for j, block in enumerate(section.blocks)
        if isinstance(block, Picture) and isinstance(block.light, dict)
    }
    total = sum(sizes.values())
    out = set()
    for place, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        if total <= budget:
            break
        out.add(place)
        total -= size
    return [
        replace(
            section,
            blocks=[
                Words(f"{_said(block)}: left out for its size; open the run's own page.", True)
                if (i, j) in out
                else block
                for j, block in enumerate(section.blocks)
            ],
        )
        for i, section in enumerate(sections)
    ]


def _said(block: object) -> str:
    return block.said if isinstance(block, Picture) else ""
