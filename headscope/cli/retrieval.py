"""``headscope retrieval`` and ``influence``: retrieval heads, and documents that need them.

``retrieval`` also measures the model without these heads; ``influence`` ranks documents by how much
they help to read them.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.base.configs import parse, read_yaml
from headscope.base.files import FolderClaim, subfolder, whole_file
from headscope.cli.options import Loading, parse_depths, parse_lengths
from headscope.cli.output import (
    ModelCommand,
    asked_of,
    json_rows,
    plain_rows,
    print_either,
    print_written,
    typed,
    without_folders,
)
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, needle
from headscope.probes.needle import fixed_needles, read_haystack
from headscope.report.sections import retrieval_drawings, retrieval_sections
from headscope.retrieval import (
    Corpus,
    MaskingConfig,
    Retrieval,
    masking_curve,
    masking_curves,
    scan_grid,
    score_corpus,
)
from headscope.retrieval.follow import Form
from headscope.scoring import score
from headscope.table import HeadTable, OrderCurve, RecallGrid, versions
from headscope.table.kinds import control_words

if TYPE_CHECKING:
    from rich.table import Table

    from headscope.report.folder import RunFolder


_SHOWN = 12


def shown(found: Retrieval, masked: Mapping[str, OrderCurve]) -> Iterator[Any]:
    """Format the results; empty tables are left out."""
    from rich.text import Text

    heads = _heads(found)
    if heads.row_count:
        yield heads
    yield Text(str(found))
    yield _recall(found.recall_grid())
    for task, curve in masked.items():
        yield _curve(task, curve)
    if not masked and not found.runs.counted.any():
        yield "Without correct answers there is no masking curve."
        yield Text(found.hint())
    beyond = found.by_set.provenance.probe.get("extrapolated_from")
    if beyond is not None:
        yield f"Trained on at most {beyond} tokens: longer texts use untrained positions."


def _heads(found: Retrieval) -> "Table":
    from rich.table import Table

    scores, steps, acts = found.by_set, found.by_step, found.activation
    table = Table("head", title="retrieval heads, by share of the needle copied")
    for name in ("share copied", "by steps", "active in", control_words(scores)):
        table.add_column(name, justify="right")
    for head, value in scores.top(_SHOWN):
        numbers = (value, float(steps[head]), float(acts[head]), float(scores.null[head]))
        table.add_row(str(head), *_shares(numbers))
    return table


def _recall(grid: RecallGrid) -> "Table":
    from rich.table import Table

    table = Table("tokens", title="share of needles found, by depth")
    for depth in grid.depths:
        table.add_column(f"{100 * depth:.0f}%", justify="right")
    for length, row in zip(grid.lengths, grid.share, strict=True):
        table.add_row(f"{int(length)}", *_shares(row))
    return table


def _curve(task: str, curve: OrderCurve) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("masked", title=Text(f"correct answers with heads masked: {task}"))
    for count in curve.counts:
        table.add_column(str(count), justify="right")
    for arm, means in zip(curve.effects.labels[0], curve.mean, strict=True):
        table.add_row(arm, *_shares(means))
    return table


def _shares(values: Iterable[float]) -> list[str]:
    """Format with two digits; empty for missing values."""
    return ["" if one != one else f"{one:.2f}" for one in values]


_FORMS: dict[str, Form] = {"decoded": "decoded", "forced": "forced"}
# Masking curves are taken at lengths up to this.
_MASKED_LENGTH = 4096


@dataclass(frozen=True)
class RetrievalRequest:
    """Arguments of the command.

    Attributes:
        lengths, depths: as typed.
        needles, chat, distractors, haystack, per_cell, seed: see :func:`headscope.probes.needle`.
        form: decoded or forced.
        new_tokens, batch_size: see :func:`headscope.retrieval.follow`.
        masking: a config of tasks; None: held-out needles.
        random: number of random orders of masked heads.
    """

    lengths: str | None
    depths: str
    needles: str | None
    chat: bool | None
    distractors: int
    haystack: Path | None
    per_cell: int | None
    seed: int
    form: str
    new_tokens: int | None
    batch_size: int | None
    masking: Path | None
    random: int

    def checked_form(self) -> Form:
        """Validate the form, decoded or forced.

        Raises:
            InputError: if it is neither, or an option does not go with it.
        """
        if self.form not in _FORMS:
            raise InputError(nearest(self.form, list(_FORMS), kind="form"))
        if self.form == "forced" and self.new_tokens is not None:
            raise InputError("--new-tokens is for --form decoded: forced generates nothing.")
        return _FORMS[self.form]

    def identity(self, config: MaskingConfig | None) -> dict[str, Any]:
        """Identity of a run, as JSON values; files by their names."""
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        del told["batch_size"]  # does not change results
        told["needles"] = None if self.needles is None else Path(self.needles).name
        told["haystack"] = None if self.haystack is None else self.haystack.resolve().name
        told["masking"] = (
            None if config is None else config.model_dump(mode="json", exclude_none=True)
        )
        return told

    def probe(self, model: HeadModel, seed: int, **other: Any) -> Probe:
        """Build the probe of needles."""
        return needle(
            model,
            needles=self.needles,
            chat=self.chat,
            distractors=self.distractors,
            haystack=self.haystack,
            seed=seed,
            **other,
        )


def run(
    loading: Loading, asked: RetrievalRequest, *, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Load the model, find and mask retrieval heads, then write and print the results."""
    lengths = None if asked.lengths is None else parse_lengths(asked.lengths)
    depths = parse_depths(asked.depths)
    form = asked.checked_form()
    if asked.needles is not None:
        fixed_needles(asked.needles)  # report mistakes before a model is loaded
    read_haystack(asked.haystack)
    config = None
    if asked.masking is not None:
        config = parse(MaskingConfig, read_yaml(asked.masking), str(asked.masking))
    command = ModelCommand.begin(
        "retrieval", loading, out, overwrite=overwrite, **asked.identity(config)
    )
    model, folder = command.model, command.folder
    if folder is not None and overwrite:
        folder = folder.ready()
    found, probe = scan_grid(
        model,
        lengths,
        depths,
        asked.needles,
        form=form,
        folder=None if folder is None else subfolder(folder.path, "cells"),
        chat=asked.chat,
        distractors=asked.distractors,
        haystack=asked.haystack,
        per_cell=asked.per_cell,
        seed=asked.seed,
        new_tokens=asked.new_tokens,
        batch_size=asked.batch_size,
    )
    command.took("scan")
    masked = _masked(model, found, asked, config)
    command.took("mask")
    table = HeadTable([found.by_set, found.by_step, found.activation])

    def printed() -> None:
        print_either(
            lambda: _as_json(table, found, masked), lambda: shown(found, masked), as_json=as_json
        )

    if folder is None:
        printed()
        return
    folder = folder.ready()
    settings = command.settings(
        extrapolate=loading.extrapolate,
        **{name: value for name, value in probe.settings.items() if value is not None}
        | {"seed": asked.seed, **_counts(found)},
        heads=[str(head) for head in found.heads()],
    )
    _write(folder, table, found, masked, settings, command.timings)
    curves = ["masking.csv"] if masked else []
    printed()
    print_written(
        folder.path, "table.parquet", "recall.csv", *curves, "responses.jsonl", "pictures/"
    )


def _masked(
    model: HeadModel, found: Retrieval, asked: RetrievalRequest, config: MaskingConfig | None
) -> dict[str, OrderCurve]:
    """Masking curves of the requested tasks, or of needles with another seed."""
    if not found.runs.scored.any():
        return {}
    if config is not None:
        return masking_curves(model, found.by_set, config)
    if asked.random < 0 or not found.runs.counted.any():
        return {}
    held_out = asked.probe(model, asked.seed + 1, lengths=_length(found), depths=4, per_cell=4)
    curve = masking_curve(
        model,
        held_out,
        found.by_set,
        random=asked.random,
        right="all" if held_out.settings["cloze"] else "share",
        seed=asked.seed,
    )
    return {"needle": curve}


def _length(found: Retrieval) -> int:
    """Longest affordable text length that is mostly answered, else the best answered one."""
    grid = found.recall_grid()
    shares = np.nanmean(grid.share, 1)
    good = grid.lengths[(shares >= 0.5) & (grid.lengths <= _MASKED_LENGTH)]
    return int(good.max() if len(good) else grid.lengths[shares.argmax()])


def _counts(found: Retrieval) -> dict[str, Any]:
    """Count texts, texts that scores average over, and answered texts."""
    runs = found.runs
    return {
        "form": runs.form,
        "runs": len(runs.runs),
        "runs_counted": int(runs.scored.sum()),
        "runs_answered": int(runs.counted.sum()),
    }


def _as_json(table: HeadTable, found: Retrieval, masked: dict[str, OrderCurve]) -> dict[str, Any]:
    return {
        "said": str(found),
        "hint": found.hint() or None,
        **_counts(found),
        "heads": [str(head) for head in found.heads()],
        "scores": json_rows(table),
        "recall": json_rows(found.recall_grid()),
        "masking": {name: json_rows(curve) for name, curve in masked.items()},
    }


def _write(
    folder: "RunFolder",
    table: HeadTable,
    found: Retrieval,
    masked: dict[str, OrderCurve],
    settings: dict[str, Any],
    timings: dict[str, float],
) -> None:
    import pandas

    grid = found.recall_grid()
    with whole_file(folder.path / "recall.csv") as file:
        grid.to_pandas().to_csv(file, index=False)
    if masked:
        rows = pandas.concat([one.to_pandas().assign(task=name) for name, one in masked.items()])
        with whole_file(folder.path / "masking.csv") as file:
            rows.to_csv(file, index=False)
    with whole_file(folder.path / "responses.jsonl") as file:
        runs = found.runs
        for run, length, depth in zip(runs.runs, runs.length, runs.depth, strict=True):
            line: dict[str, Any] = {
                "length": int(length),
                "depth": float(depth),
                "recall": run.recall,
            }
            line |= {"answer": run.answer.strip(), "response": run.response}
            file.write(json.dumps(line).encode() + b"\n")
    said = "\n".join(filter(None, [str(found), found.hint()]))
    made = retrieval_drawings(found.by_set, grid, masked)
    folder.write(
        table,
        settings,
        timings,
        command=typed(),
        sections=retrieval_sections(found.by_set, grid, masked, made, said),
        pictures=made,
    )


_DENOMINATORS = ("base", "masked")
_DOCUMENTS_SHOWN = 36  # characters of a document
# Share of all heads that the source masks.
_SHARE = 0.05


def run_influence(
    loading: Loading,
    corpus: Path,
    *,
    heads: str | None,
    out: Path | None,
    overwrite: bool,
    field: str,
    max_tokens: int | None,
    batch_size: int | None,
    denominator: str,
    as_json: bool,
) -> None:
    """Load the model, find the heads, score documents, then write and print them."""
    if denominator not in _DENOMINATORS:
        raise InputError(nearest(denominator, _DENOMINATORS, kind="denominator"))
    given = Corpus(corpus, field)
    given.check()
    known = None if heads is None else _named(heads)
    claim = FolderClaim.create(
        out or Path("runs") / f"influence-{corpus.stem}", "influence", overwrite=overwrite
    )
    started = time.perf_counter()
    model = loading.model()
    chosen = _by_needles(model) if known is None else known
    claim = claim.of(
        asked_of(
            model,
            loading,
            corpus=corpus.name,
            field=field,
            heads=[str(head) for head in chosen],
            max_tokens=max_tokens,
            denominator=denominator,
        )
    )
    if overwrite:
        claim = claim.ready()
    folder = claim.path
    frame = score_corpus(
        model,
        given,
        chosen,
        folder,
        denominator="base" if denominator == "base" else "masked",
        max_tokens=max_tokens,
        batch_size=batch_size,
    )
    facts = {
        "command": typed(),
        "settings": {
            "command": "influence",
            "model": model.name,
            "revision": model.revision,
            "weight_digest": model.digest(),
            "corpus": corpus.name,
            "documents": len(frame),
            "heads": [str(head) for head in chosen],
            "heads_from": "needles" if heads is None else without_folders(heads),
            "denominator": denominator,
            "max_tokens": max_tokens,
        },
        "versions": versions(),
        "timings": {"seconds": time.perf_counter() - started},
    }
    claim.write_facts(facts)
    print_either(
        lambda: plain_rows(frame), lambda: [_shown(frame, given, chosen, model)], as_json=as_json
    )
    print_written(folder, "ranked.parquet", "ranked.jsonl (best first)", page=False)


def _named(heads: str) -> list[HeadIndex]:
    """Heads given by name, or the retrieval heads of a finished run."""
    place = Path(heads)
    if place.is_dir() or place.suffix == ".parquet":
        table = HeadTable.load(place / "table.parquet" if place.is_dir() else place)
        name = next((one for one in ("retrieval_set", "retrieval") if one in table), None)
        if name is None:
            raise InputError(f"{heads} has no retrieval score: give a run of headscope retrieval.")
        scores = table[name]
        limit = scores.threshold or 0.0
        found = [head for head, value in scores.top(scores.mean.size) if value > limit]
        if not found:
            raise InputError(f"{heads} has no head above {limit:g}: name heads with --heads.")
        return found
    return [HeadIndex.parse(one.strip()) for one in heads.split(",") if one.strip()]


def _by_needles(model: HeadModel) -> list[HeadIndex]:
    """The source's share of all heads: those that copy most when needles are answered."""
    scores = score(model, needle(model, depths=4), "retrieval")["retrieval"]
    count = math.ceil(_SHARE * len(model.shape.heads))
    found = [head for head, value in scores.top(count) if value > (scores.threshold or 0.0)]
    if not found:
        raise InputError(
            f"no head of {model.name} copies needles (all scores are at most "
            f"{scores.threshold}): name heads with --heads."
        )
    return found


def _shown(frame: object, corpus: Corpus, heads: list[HeadIndex], model: HeadModel) -> "Table":
    """Format the best and worst documents, one line each."""
    import pandas
    from rich.table import Table
    from rich.text import Text

    assert isinstance(frame, pandas.DataFrame)  # noqa: S101  # pandas is loaded late
    ranked = frame[frame["rank"].notna()]
    shown = pandas.concat([ranked.head(5), ranked.tail(5)]).drop_duplicates("line")
    named = ", ".join(map(str, heads[:8])) + (" ..." if len(heads) > 8 else "")
    table = Table("rank", title=Text(f"loss of {model.name} without {named}"))
    for name in ("influence", "loss", "masked", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("line", justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True)
    with corpus.path.open("rb") as file:
        for row in shown.itertuples():
            file.seek(int(row.offset))
            text = json.loads(file.readline())[corpus.field]
            numbers = (f"{row.influence:.3f}", f"{row.base:.3f}", f"{row.masked:.3f}")
            cells = (str(row.rank), *numbers, str(row.tokens), str(row.line))
            table.add_row(*cells, Text(" ".join(text.split())[:_DOCUMENTS_SHOWN]))
    return table
