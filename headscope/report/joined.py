"""Runs of one model or more, put together by model, as one HTML file that opens offline."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headscope.base.sections import Grid, Section, Words
from headscope.errors import InputError
from headscope.plots.style import SEQUENTIAL, STYLES
from headscope.plots.text import visible
from headscope.report.runs import Run
from headscope.report.sections import Picture, laid_out
from headscope.report.shell import as_data, filled, packed, packed_example, packed_tokens
from headscope.table import AttentionExample, HeadScores, HeadSpectra, RoleFinding
from headscope.table.notable import by_interest, find_roles
from headscope.table.table import HeadTable

_RANKS = 32  # singular values shown of a head


@dataclass(frozen=True, eq=False)
class Subject:
    """One model and all its runs.

    Attributes:
        name: of the model, with the revision where there is one.
        runs: of this model.
        scores: of all runs, those with a role first; names are distinct.
        kinds: of each score: ``probe``, ``effect`` or ``weights``.
        findings: for each role the heads that have it.
    """

    name: str
    runs: tuple[Run, ...]
    scores: tuple[HeadScores, ...]
    kinds: tuple[str, ...]
    findings: tuple[RoleFinding, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and heads in a layer."""
        layers, heads = self.scores[0].mean.shape
        return layers, heads


def subjects(runs: Iterable[Run], alpha: float) -> list[Subject]:
    """Group runs by model, in the order in which models appear.

    Raises:
        InputError: if there are none, or runs of one name differ in their heads.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        origin = run.origin
        # Equal weights are one model, whatever revision was asked for.
        key = (origin.model, origin.weight_digest or origin.revision or "")
        groups.setdefault(key, []).append(run)
    if not groups:
        raise InputError("a report needs at least one run.")
    return [_subject(group, alpha) for group in groups.values()]


def _subject(runs: Sequence[Run], alpha: float) -> Subject:
    origin = runs[0].origin
    named = (origin.model or "model") + (f"@{origin.revision}" if origin.revision else "")
    if all(run.table is None for run in runs):
        raise InputError(
            f"{', '.join(run.label for run in runs)}: of {named} there is no table of heads; give "
            "a scan of the same model as well."
        )
    found: dict[str, tuple[HeadScores, str]] = {}
    for run in runs:
        for one in (run.table or {}).values():
            distinct = one.name if one.name not in found else f"{one.name} ({run.label})"
            while distinct in found:
                distinct += "'"
            found[distinct] = (one.renamed(distinct), _kind(run, one))
    table = HeadTable([one for one, _ in found.values()])
    ordered = by_interest(table.values())
    return Subject(
        named,
        tuple(runs),
        tuple(ordered),
        tuple(found[one.name][1] for one in ordered),
        tuple(find_roles(ordered, alpha)),
    )


def _kind(run: Run, scores: HeadScores) -> str:
    if run.effects:
        return "effect"
    if run.kind in ("circuits", "table") and not scores.provenance.control:
        return (
            "weights" if scores.examples is None and not np.isfinite(scores.sem).any() else "probe"
        )
    return "probe"


def subject_data(subject: Subject) -> dict[str, Any]:
    """All that the page draws of one model, as JSON values."""
    layers, heads = subject.shape
    present = np.any([one.present for one in subject.scores], axis=0)
    names = [one.name for one in subject.scores]
    return {
        "name": visible(subject.name),
        "layers": layers,
        "heads": heads,
        "kvHeads": subject.scores[0].kv_heads,
        "present": packed(present, "u1"),
        "scores": [
            _score(one, kind) for one, kind in zip(subject.scores, subject.kinds, strict=True)
        ],
        "roles": [
            {
                "name": visible(finding.score.replace("_", " ")),
                "score": names.index(finding.score),
                "heads": [head.layer * heads + head.head for head, _ in finding.heads],
            }
            for finding in subject.findings
            if finding.heads
        ],
        "partners": _partners(subject),
        "spectra": [_spectrum(one) for run in subject.runs for one in run.spectra],
        "words": _words(subject),
        "says": {
            head: [packed_tokens(side) for side in sides]
            for run in subject.runs
            for head, sides in run.says.items()
        },
        "attention": next(
            (_attention(run.attention, heads) for run in subject.runs if run.attention), None
        ),
    }


def _score(scores: HeadScores, kind: str) -> dict[str, Any]:
    low = high = None
    if scores.examples is not None and scores.examples.shape[-1] > 1:
        low, high = (packed(end, "f2") for end in scores.interval())
    return {
        "name": visible(scores.name),
        "kind": kind,
        "unit": visible(scores.unit),
        "description": visible(scores.description),
        "signed": scores.signed,
        "bounds": list(scores.bounds),
        "mean": packed(scores.mean, "f4", needed=True),
        "sem": packed(scores.sem, "f2"),
        "null": packed(scores.null, "f2"),
        "p": packed(scores.p_adjusted, "f2"),
        "low": low,
        "high": high,
    }


def _partners(subject: Subject) -> dict[str, Any] | None:
    found = next((run.partners for run in subject.runs if run.partners is not None), None)
    if found is None or not found.modes:
        return None

    def side(one: Any) -> dict[str, Any]:
        return {"which": packed(one.which, "u2"), "value": packed(one.value, "f2")}

    modes = [
        {"name": visible(name.partition("_")[0]), "fedBy": side(before), "feeds": side(after)}
        for name, before, after in zip(found.modes, found.fed_by, found.feeds, strict=True)
    ]
    return {"width": int(found.feeds[0].which.shape[1]), "modes": modes}


def _spectrum(one: HeadSpectra) -> dict[str, Any]:
    return {
        "name": visible(one.name),
        "values": packed(one.relative[..., :_RANKS], "f2"),
        "low": packed(one.low[:_RANKS], "f4"),
        "high": packed(one.high[:_RANKS], "f4"),
    }


def _words(subject: Subject) -> dict[str, Any]:
    """Head -> circuit -> directions."""
    found: dict[str, dict[str, Any]] = {}
    for run in subject.runs:
        for circuit, of_heads in run.words.items():
            for head, directions in of_heads.items():
                found.setdefault(head, {})[visible(circuit)] = [
                    {
                        "size": one["size"] if np.isfinite(one["size"]) else None,
                        "reads": [packed_tokens(side) for side in one["reads"]],
                        "writes": [packed_tokens(side) for side in one["writes"]],
                    }
                    for one in directions
                ]
    return found


def _attention(one: AttentionExample, heads: int) -> dict[str, Any]:
    numbers = [head.layer * heads + head.head for head in one.heads]
    return {"heads": numbers, **packed_example(one)}


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
