"""Joined report: runs of one or more models, grouped by model in one HTML file.

The file is self-contained.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from headscope.base.files import read_parquet
from headscope.base.result import Rows, Section, Words
from headscope.errors import HeadscopeError, InputError
from headscope.heads import STACK_LETTERS
from headscope.plots.figure import SEQUENTIAL, STYLES, visible
from headscope.report.page import as_data, filled, packed, packed_example, packed_tokens
from headscope.report.sections import Picture, laid_out, read_sections
from headscope.table import (
    AttentionExample,
    HeadScores,
    HeadSpectra,
    HeadTable,
    Provenance,
    RoleFinding,
    load_spectra,
)
from headscope.table.kinds import by_interest, find_roles

WIDTH = 5


@dataclass(frozen=True, eq=False)
class Side:
    """Composition partners on one side, strongest first; heads are numbered layer by layer.

    Attributes:
        which: number of the partner.
        value: composition score; 0 if there is no partner.
    """

    which: Int[np.ndarray, "head k"]
    value: Float[np.ndarray, "head k"]


@dataclass(frozen=True, eq=False)
class Partners:
    """Composition partners of every head.

    Attributes:
        modes: names of the scores, such as ``K_composition``.
        fed_by: per mode, earlier heads.
        feeds: per mode, later heads.
    """

    modes: tuple[str, ...]
    fed_by: Sequence[Side]
    feeds: Sequence[Side]


def read_partners(file: Path, shape: tuple[int, int]) -> Partners:
    """Read pairs of heads from the file that ``headscope circuits`` writes.

    Args:
        file: ``pairs.parquet``.
        shape: layers and heads of the model.

    Raises:
        InputError: if the file holds something else.
    """
    import pyarrow
    import pyarrow.compute as pc

    names = ["first_layer", "first_head", "second_layer", "second_head", "score", "value"]
    layers, heads = shape
    try:
        rows = read_parquet(file, names)
        modes = sorted(pc.unique(rows["score"].cast("string")).to_pylist())
        fed_by, feeds = [], []
        for mode in modes:
            mine = rows.filter(pc.equal(rows["score"].cast("string"), mode))
            ends = [mine[name].to_numpy() for name in names[:4]]
            values = np.zeros((layers, heads, layers, heads), np.float32)
            values[tuple(ends)] = mine["value"].to_numpy()
            square = np.nan_to_num(values.reshape(layers * heads, layers * heads))
            feeds.append(_strongest(square))
            fed_by.append(_strongest(square.T))
    except (pyarrow.ArrowException, OSError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(file)!r} holds no pairs of these heads: {error!r}.") from None
    return Partners(tuple(modes), fed_by, feeds)


def _strongest(values: Float[np.ndarray, "head other"]) -> Side:
    count = min(WIDTH, values.shape[1])
    some = np.argpartition(-values, count - 1, axis=1)[:, :count]
    of_them = np.take_along_axis(values, some, axis=1)
    order = np.lexsort((some, -of_them), axis=1)
    return Side(
        np.take_along_axis(some, order, axis=1),
        np.take_along_axis(of_them, order, axis=1).astype(np.float64),
    )


RunWords = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
_MAX_JSON = 100_000_000


@dataclass(frozen=True, eq=False)
class RunPart:
    """One run's part of a report; fields that the run did not compute are empty.

    Attributes:
        label: name of its folder or file.
        kind: ``scan``, ``circuits``, ``lens``, ``sweep``, ...
        table: scores of single heads; None if there are only sections.
        effects: whether those scores are effects of editing heads.
        command: command that reproduces it.
        config: config file of the command, if it reads one.
        facts: names and values, such as timings.
        sections: sections to show unchanged.
        partners: strongest compositions of every head.
        spectra: singular values of every head.
        words: circuit -> head -> directions with their tokens.
        says: head -> tokens promoted and suppressed on a prompt.
        attention: attention of every head on one text.
        failed: what could not be computed, and why.
        of: provenance, if there is no table.
    """

    label: str
    kind: str
    table: HeadTable | None
    effects: bool = False
    command: str = ""
    config: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()
    partners: Partners | None = None
    spectra: Sequence[HeadSpectra] = ()
    words: RunWords = field(default_factory=dict)
    says: Mapping[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    attention: AttentionExample | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    of: Provenance | None = None

    @property
    def origin(self) -> Provenance:
        """Provenance of the run."""
        if self.table is not None:
            return next(iter(self.table.values())).provenance
        return self.of or Provenance()


def read_run(place: Path) -> RunPart:
    """Read a run's folder, or a single table.

    Raises:
        InputError: if there is no table, or a file in the folder is damaged.
    """
    if place.is_file():
        return RunPart(place.stem, "table", HeadTable.load(place))
    if not (place / "table.parquet").is_file():
        raise InputError(
            f"{place} holds no finished run: it contains no table.parquet (scan, circuits, lens, "
            "retrieval and sweep write one)."
        )
    table = HeadTable.load(place / "table.parquet")
    facts = _json(place / "run.json", {})
    settings = facts.get("settings") or {}
    kind = str(settings.get("command") or "run")
    return RunPart(
        label=place.resolve().name,
        kind=kind,
        table=table,
        effects=kind in ("ablation", "retrieval-masking"),
        command=str(facts.get("command") or _rebuilt(settings)),
        facts=_told(facts),
        sections=read_sections(file) if (file := place / "sections.json").is_file() else (),
        partners=read_partners(file, table.shape)
        if (file := place / "pairs.parquet").is_file()
        else None,
        spectra=load_spectra(file) if (file := place / "spectra.safetensors").is_file() else (),
        words=_run_words(_json(place / "words.json", {}), place),
        says=_says(place / "heads.parquet"),
        attention=AttentionExample.load(file)
        if (file := place / "attention.safetensors").is_file()
        else None,
    )


def _json(file: Path, otherwise: Any) -> Any:
    """Read a JSON file, or return a default if it does not exist."""
    if not file.is_file():
        return otherwise
    try:
        if file.stat().st_size > _MAX_JSON:
            raise InputError(f"{str(file)!r} is larger than {_MAX_JSON // 10**6} MB.")
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(file)!r} is not readable JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{str(file)!r} should hold a JSON object.")
    return found


def _rebuilt(settings: Mapping[str, Any]) -> str:
    """Rebuild the command from its settings, for runs started from Python code."""
    command = settings.get("command")
    if not command or not settings.get("model"):
        return ""
    words = ["headscope", str(command), str(settings["model"])]
    for name in ("revision", "seed"):
        if settings.get(name) is not None:
            words += [f"--{name}", str(settings[name])]
    return " ".join(words)


def _told(facts: Mapping[str, Any]) -> dict[str, str]:
    """Format versions and timings."""
    told = {}
    for name in ("timings", "versions"):
        values = facts.get(name) or {}
        if isinstance(values, Mapping) and values:
            told[name] = ", ".join(
                f"{key.replace('_', ' ')} {value:.3g}"
                if isinstance(value, float)
                else f"{key} {value}"
                for key, value in values.items()
            )
    return told


def _run_words(found: Mapping[str, Any], place: Path) -> RunWords:
    try:
        return {
            str(circuit): {
                str(head): [
                    {
                        "size": float(one["singular_value"]),
                        "reads": [[str(token) for token in side] for side in one["reads"]],
                        "writes": [[str(token) for token in side] for side in one["writes"]],
                    }
                    for one in directions
                ]
                for head, directions in heads.items()
            }
            for circuit, heads in found.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{str(place / 'words.json')!r} is damaged: {error!r}.") from None


def _says(file: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Tokens that heads promote and suppress on the prompt of a lens run."""
    if not file.is_file():
        return {}
    found: dict[str, tuple[list[str], list[str]]] = {}
    try:
        frame = read_parquet(file, ["layer", "head", "sign", "rank", "text"]).to_pandas()
        for row in frame[frame["rank"] < 6].sort_values("rank").itertuples():
            sides = found.setdefault(f"L{int(row.layer)}H{int(row.head)}", ([], []))
            sides[0 if row.sign == "promoted" else 1].append(str(row.text))
    except (ValueError, TypeError, OSError, HeadscopeError) as error:
        raise InputError(f"{str(file)!r} is damaged: {error}") from None
    return found


_RANKS = 32  # singular values shown of a head


@dataclass(frozen=True, eq=False)
class Subject:
    """One model and all its runs.

    Attributes:
        name: name of the model, with the revision if there is one.
        runs: runs of this model.
        scores: scores of all runs, those with a role first; names are distinct.
        kinds: kind of each score: ``probe``, ``effect`` or ``weights``.
        findings: for each role the heads that have it.
    """

    name: str
    runs: tuple[RunPart, ...]
    scores: tuple[HeadScores, ...]
    kinds: tuple[str, ...]
    findings: tuple[RoleFinding, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers, and of heads in a layer."""
        layers, heads = self.scores[0].mean.shape
        return layers, heads


def subjects(runs: Iterable[RunPart], alpha: float) -> list[Subject]:
    """Group runs by model, in the order in which models appear.

    Raises:
        InputError: if there are no runs, or runs of one model differ in their heads.
    """
    groups: dict[tuple[str, str], list[RunPart]] = {}
    for run in runs:
        origin = run.origin
        # Equal weights are one model, whatever revision was requested.
        key = (origin.model, origin.weight_digest or origin.revision or "")
        groups.setdefault(key, []).append(run)
    if not groups:
        raise InputError("a report needs at least one run.")
    return [_subject(group, alpha) for group in groups.values()]


def _subject(runs: Sequence[RunPart], alpha: float) -> Subject:
    origin = runs[0].origin
    named = (origin.model or "model") + (f"@{origin.revision}" if origin.revision else "")
    if all(run.table is None for run in runs):
        raise InputError(
            f"{', '.join(run.label for run in runs)}: there is no table of heads for {named}: "
            "give a scan of the same model as well."
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


def _kind(run: RunPart, scores: HeadScores) -> str:
    if run.effects:
        return "effect"
    if run.kind in ("circuits", "table") and not scores.provenance.control:
        return (
            "weights" if scores.examples is None and not np.isfinite(scores.sem).any() else "probe"
        )
    return "probe"


def subject_data(subject: Subject) -> dict[str, Any]:
    """Data that the page draws for one model, as JSON values."""
    layers, heads = subject.shape
    present = np.any([one.present for one in subject.scores], axis=0)
    names = [one.name for one in subject.scores]
    return {
        "name": visible(subject.name),
        "layers": layers,
        "heads": heads,
        "letter": STACK_LETTERS[subject.scores[0].stack],
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


# Okabe and Ito 2008, without black: distinguishable to colour-blind readers.
ROLE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
MAX_BYTES = 10_000_000
_PICTURE_BYTES = 2_000_000  # of all pictures together
_COLUMNS = 12
_SCRIPTS = ("data.js", "attention.js", "atlas.js", "card.js", "table.js", "figures.js")
_FACTS = ("revision", "weight_digest", "path", "dtype", "device")


def report_page(
    runs: Sequence[RunPart], *, title: str | None = None, command: str = "", alpha: float = 0.05
) -> str:
    """Build the joined page: overview, grid of heads with cards, table, heatmaps, runs, commands.

    The page carries its own copy of plotly.js and a content security policy that allows only its
    own scripts, by hash, and no network requests.

    Args:
        runs: from :func:`headscope.report.read_run` and similar; runs of one model are joined.
        title: default: the models' names.
        command: command that reproduces the page.
        alpha: false discovery rate of the roles.

    Raises:
        InputError: if the page would be larger than 10 MB: pass fewer runs.
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
    """Table of facts with one column per model; empty rows are left out."""
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


def _origin(run: RunPart, subject: Subject, several: bool) -> dict[str, str]:
    of = f" of {subject.name}" if several else ""
    told = [f"{name}: {value}" for name, value in run.facts.items()]
    return {
        "title": f"{run.label} ({run.kind}{of})",
        "told": "; ".join(told),
        "command": run.command,
        "config": run.config,
    }


def _failed(runs: Sequence[RunPart]) -> list[Section]:
    rows = [(run.label, what, why) for run in runs for what, why in run.failed.items()]
    if not rows:
        return []
    return [Section("Failed", [Rows(("run", "what", "why"), rows, "What could not be computed")])]


def _within(sections: Sequence[Section], budget: int) -> list[Section]:
    """Fit sections' pictures in a byte budget: drop the largest, and note it."""
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
