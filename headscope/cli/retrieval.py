"""``headscope retrieval``: which heads fetch from far back, and what the model is without them."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headscope.base.configs import parse, read_yaml
from headscope.base.files import subfolder, whole_file
from headscope.cli.options import Loading, parse_depths, parse_lengths
from headscope.cli.output import asked_of, print_either, print_written, rows_of, run_folder, typed
from headscope.errors import InputError, nearest
from headscope.models.protocol import HeadModel
from headscope.probes import Probe, needle
from headscope.probes.needle_sets import fixed_needles, read_haystack
from headscope.report.retrieval import retrieval_drawings, retrieval_sections
from headscope.retrieval import MaskingConfig, Retrieval, masking_curve, masking_curves, scan_grid
from headscope.retrieval.runs import Form
from headscope.table import HeadTable, OrderCurve, RecallGrid
from headscope.table.notable import against

if TYPE_CHECKING:
    from rich.table import Table

    from headscope.report.folder import RunFolder


_SHOWN = 12


def shown(found: Retrieval, masked: Mapping[str, OrderCurve]) -> Iterator[Any]:
    """What is printed of it all; tables that would be empty are left out."""
    from rich.text import Text

    heads = _heads(found)
    if heads.row_count:
        yield heads
    yield Text(str(found))
    yield _recall(found.recall_grid())
    for task, curve in masked.items():
        yield _curve(task, curve)
    if not masked and not found.runs.counted.any():
        yield "Without right answers there is no masking curve."
        yield Text(found.hint())
    beyond = found.by_set.provenance.probe.get("extrapolated_from")
    if beyond is not None:
        yield f"Trained on at most {beyond} tokens: longer texts use positions beyond."


def _heads(found: Retrieval) -> "Table":
    from rich.table import Table

    scores, steps, acts = found.by_set, found.by_step, found.activation
    table = Table("head", title="retrieval heads, by the share of the needle that they copy")
    for name in ("share copied", "by steps", "active in", against(scores)):
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

    table = Table("masked", title=Text(f"right answers with heads masked: {task}"))
    for count in curve.counts:
        table.add_column(str(count), justify="right")
    for arm, means in zip(curve.effects.labels[0], curve.mean, strict=True):
        table.add_row(arm, *_shares(means))
    return table


def _shares(values: Iterable[float]) -> list[str]:
    """Two digits; nothing where there is no value."""
    return ["" if one != one else f"{one:.2f}" for one in values]


_FORMS: dict[str, Form] = {"decoded": "decoded", "forced": "forced"}
# Masking curves are taken at lengths up to this.
_MASKED_LENGTH = 4096


@dataclass(frozen=True)
class Asked:
    """What the command was asked for.

    Attributes:
        lengths, depths: as typed.
        needles, chat, distractors, haystack, per_cell, seed: of
            :func:`headscope.probes.needle`.
        form: decoded or forced.
        new_tokens, batch_size: of :func:`headscope.retrieval.follow`.
        masking: a config of tasks; None: held-out needles.
        random: orders of masked heads.
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
        """The form, which is one of two.

        Raises:
            InputError: if it is none, or an option does not go with it.
        """
        if self.form not in _FORMS:
            raise InputError(nearest(self.form, list(_FORMS), kind="form"))
        if self.form == "forced" and self.new_tokens is not None:
            raise InputError("--new-tokens is for --form decoded: forced generates nothing.")
        return _FORMS[self.form]

    def identity(self, config: MaskingConfig | None) -> dict[str, Any]:
        """What tells one run from another, as JSON values; files by their names."""
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        del told["batch_size"]  # changes no result
        told["needles"] = None if self.needles is None else Path(self.needles).name
        told["haystack"] = None if self.haystack is None else self.haystack.resolve().name
        told["masking"] = (
            None if config is None else config.model_dump(mode="json", exclude_none=True)
        )
        return told

    def probe(self, model: HeadModel, seed: int, **other: Any) -> Probe:
        """Needles of this kind."""
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
    loading: Loading, asked: Asked, *, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Load, scan, mask, write, print."""
    lengths = None if asked.lengths is None else parse_lengths(asked.lengths)
    depths = parse_depths(asked.depths)
    form = asked.checked_form()
    if asked.needles is not None:
        fixed_needles(asked.needles)  # mistakes are told before a model is loaded
    read_haystack(asked.haystack)
    config = None
    if asked.masking is not None:
        config = parse(MaskingConfig, read_yaml(asked.masking), str(asked.masking))
    folder = run_folder(out, "retrieval", overwrite=overwrite)
    started = time.perf_counter()
    model = loading.model()
    loaded = time.perf_counter()
    if folder is not None:
        folder = folder.of(asked_of(model, loading, **asked.identity(config)))
        if overwrite:
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
    scanned = time.perf_counter()
    masked = _masked(model, found, asked, config)
    timings = {
        "load_seconds": loaded - started,
        "scan_seconds": scanned - loaded,
        "mask_seconds": time.perf_counter() - scanned,
    }
    table = HeadTable([found.by_set, found.by_step, found.activation])

    def printed() -> None:
        print_either(
            lambda: _as_json(table, found, masked), lambda: shown(found, masked), as_json=as_json
        )

    if folder is None:
        printed()
        return
    folder = folder.ready()
    settings = {
        "command": "retrieval",
        "model": model.name,
        "revision": model.revision,
        "extrapolate": loading.extrapolate,
        **{name: value for name, value in probe.settings.items() if value is not None},
        "seed": asked.seed,
        **_counts(found),
        "heads": [str(head) for head in found.heads()],
    }
    _write(folder, table, found, masked, settings, timings)
    curves = ["masking.csv"] if masked else []
    printed()
    print_written(
        folder.path, "table.parquet", "recall.csv", *curves, "responses.jsonl", "pictures/"
    )


def _masked(
    model: HeadModel, found: Retrieval, asked: Asked, config: MaskingConfig | None
) -> dict[str, OrderCurve]:
    """Masking curves of the tasks asked for, or of needles with another seed."""
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
    """The longest text that is not too long and mostly answered, else the best answered one."""
    grid = found.recall_grid()
    shares = np.nanmean(grid.share, 1)
    good = grid.lengths[(shares >= 0.5) & (grid.lengths <= _MASKED_LENGTH)]
    return int(good.max() if len(good) else grid.lengths[shares.argmax()])


def _counts(found: Retrieval) -> dict[str, Any]:
    """How many texts there were, how many scores are means over, how many were answered."""
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
        "scores": rows_of(table),
        "recall": rows_of(found.recall_grid()),
        "masking": {name: rows_of(curve) for name, curve in masked.items()},
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
