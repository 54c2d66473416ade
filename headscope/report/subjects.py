"""Runs put together by the model that they are of, as the data that the page's scripts draw."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headscope.errors import InputError
from headscope.plots.text import visible
from headscope.report.packed import packed, packed_example, packed_tokens
from headscope.report.runs import Run
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
