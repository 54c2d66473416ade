"""Runs of a needle grid on disk: a finished cell of length and depth is a file, whole or absent."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from headscope.base.files import whole_file, writable_folder
from headscope.base.options import RunOptions
from headscope.base.parquet_files import read_part, readable
from headscope.errors import InputError
from headscope.models.protocol import HeadModel
from headscope.probes import Needle, Probe, needle
from headscope.retrieval.follow import RECALL, follow_both, follow_forced
from headscope.retrieval.forms import Retrieval, summarised
from headscope.retrieval.runs import Form, Run, Runs

if TYPE_CHECKING:
    import pyarrow

_FORMAT = 4


class Scanned(NamedTuple):
    """What :func:`scan_grid` found: scores of all cells together, and the probe they are of."""

    retrieval: Retrieval
    probe: Probe


def scan_grid(
    model: HeadModel,
    lengths: Sequence[int] | int | None = None,
    depths: Sequence[int | float] | int = 10,
    needles: str | Path | Sequence[Needle] | None = None,
    *,
    form: Form = "decoded",
    folder: str | Path | None = None,
    new_tokens: int | None = None,
    threshold: int | float = RECALL,
    batch_size: int | None = None,
    progress: bool | None = None,
    **probe: Any,
) -> Scanned:
    """Retrieval scores over a grid of lengths and depths, one cell after the other.

    The same as :func:`headscope.retrieval.decoded` of the whole probe; where no run counts, the
    recall is the result and every score is missing. Teacher-forced, every text is read once with
    its answer appended, all count, and the recall is of what the model would say at each token
    of the answer, given the right ones before. With a folder every finished cell is kept in
    it, and found again by what it holds (model, tokens, settings): after a crash the same call
    goes on where it was.

    Args:
        model: from :func:`headscope.load`.
        lengths: of :func:`headscope.probes.needle`, as ``depths`` and ``needles``.
        depths: shares, or how many.
        needles: a set, a file, or needles.
        form: ``decoded`` as published, or ``forced``, which scores texts that the model does not
            answer, too.
        folder: for finished cells; default: none is kept.
        new_tokens: steps of a run at most; see :func:`headscope.retrieval.follow`.
        threshold: recall above which a run counts.
        batch_size: examples at a time.
        progress: show a progress bar. Default: only in a terminal or notebook, after 2 s.
        probe: other arguments of :func:`headscope.probes.needle`.

    Raises:
        InputError: if an argument makes no sense, or the folder cannot be written.

    Example:
        >>> import headscope as hs
        >>> model = hs.load("tiny-llama")
        >>> found, probe = scan_grid(model, lengths=[64, 96], depths=[0, 1], per_cell=1)
        >>> found.recall_grid().share.shape
        (2, 2)
    """
    options = RunOptions(batch_size, progress=progress)
    if form not in ("decoded", "forced"):
        raise InputError(f"form={form!r} is unknown: 'decoded' or 'forced'.")
    if form == "forced" and new_tokens is not None:
        raise InputError("new_tokens is for form='decoded'; 'forced' generates nothing.")
    whole = needle(model, lengths, depths, needles, **probe)
    store = None if folder is None else writable_folder(Path(folder))
    cells = list(_cells(whole))
    longest = max(cells, key=lambda cell: int(whole.real[cell].sum(1).max()))
    known = "" if store is None else model.digest()
    if (
        form == "decoded" and new_tokens is None and whole.settings.get("cloze")
    ):  # as `follow` would for all of it
        new_tokens = int(whole.mark("answer").sum(1).max())
    order = sorted(range(len(cells)), key=lambda i: cells[i] != longest)
    done: dict[int, tuple[list[Run], list[Run]]] = {}
    tokens = [int(whole.real[cell].sum()) for cell in cells]
    with options.track(sum(tokens), f"{model.name} looks for needles") as advance:
        for i in order:  # the longest first: what does not fit is said at once
            part = whole.examples(cells[i])
            file = (
                None if store is None else store / f"{_name(part, known, form, new_tokens)}.parquet"
            )
            done[i] = _cell(model, part, file, form, new_tokens, options)
            advance(tokens[i])
    limit = float(threshold)
    sizes, places = (whole.facts[name].double().numpy() for name in ("length", "depth"))
    runs, control = (
        Runs(
            tuple(run for i in range(len(cells)) for run in done[i][side]),
            sizes,
            places,
            limit,
            form,
            bool(whole.settings.get("chat")),
        )
        for side in (0, 1)
    )
    return Scanned(summarised(model, whole, runs, control), whole)


def _cells(probe: Probe) -> Iterator[slice]:
    """Examples of each length and depth, which stand together."""
    places = list(zip(probe.facts["length"].tolist(), probe.facts["depth"].tolist(), strict=True))
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[start]:
            yield slice(start, end)
            start = end


def _cell(
    model: HeadModel,
    part: Probe,
    file: Path | None,
    form: Form,
    new_tokens: int | None,
    options: RunOptions,
) -> tuple[list[Run], list[Run]]:
    """Runs of one cell and of its control, from the disk if they are there."""
    if file is not None and file.exists():
        return _read(file)
    size = options.batch_size
    if form == "decoded":
        runs, control = follow_both(
            model, part, new_tokens=new_tokens, batch_size=size, progress=False
        )
    else:
        runs = follow_forced(model, replace(part, control=None), batch_size=size, progress=False)
        control = None
        if part.control is not None:
            control = follow_forced(model, part.control, batch_size=size, progress=False)
    made = (list(runs.runs), [] if control is None else list(control.runs))
    if file is not None:
        from pyarrow import parquet

        with whole_file(file) as target:
            parquet.write_table(_rows(made), target, compression="zstd")
    return made


def _name(part: Probe, model: str, form: Form, new_tokens: int | None) -> str:
    """Digest of everything that the runs of a cell depend on."""
    digest = hashlib.sha256()
    facts = {"format": _FORMAT, "model": model, "form": form, "new_tokens": new_tokens}
    facts |= {name: part.settings.get(name) for name in ("cloze", "chat")}
    facts |= {"answer": part.settings.get("needles")}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for one in (part, part.control):
        if one is None:
            continue
        for row in range(len(one)):  # padding depends on the other cells of the grid
            real = one.real[row]
            pieces = [one.tokens[row], *(one.marks[name][row] for name in sorted(one.marks))]
            for values in pieces:
                digest.update(values[real].numpy().tobytes())
    return digest.hexdigest()[:24]


def _rows(made: tuple[list[Run], list[Run]]) -> "pyarrow.Table":
    import pyarrow

    rows = [
        {
            "control": bool(number),
            "tokens": list(run.tokens),
            "response": run.response,
            "recall": run.recall,
            "answer": run.answer,
            "needle": list(run.needle),
            "copied": np.packbits(run.copied).tobytes(),
            "copied_shape": list(run.copied.shape),
            "reachable": np.packbits(run.reachable).tobytes(),
            "reachable_shape": list(run.reachable.shape),
        }
        for number, runs in enumerate(made)
        for run in runs
    ]
    return pyarrow.Table.from_pylist(rows)


def _read(file: Path) -> tuple[list[Run], list[Run]]:
    made: tuple[list[Run], list[Run]] = ([], [])
    with readable(file):
        for row in read_part(file).to_pylist():
            made[bool(row["control"])].append(_run(row))
    return made


def _run(row: dict[str, Any]) -> Run:
    def bits(name: str) -> np.ndarray:
        shape = [int(size) for size in row[f"{name}_shape"]]
        packed = np.frombuffer(row[name], dtype=np.uint8)
        spare = 8 * packed.size - math.prod(shape)
        if not shape or min(shape) < 0 or not 0 <= spare < 8:
            raise ValueError(f"{packed.size} bytes for {name} of shape {shape}")
        return np.unpackbits(packed, count=math.prod(shape)).astype(bool).reshape(shape)

    return Run(
        tokens=tuple(row["tokens"]),
        response=row["response"],
        recall=row["recall"],
        needle=tuple(row["needle"]),
        copied=bits("copied"),
        reachable=bits("reachable"),
        answer=row["answer"],
    )
