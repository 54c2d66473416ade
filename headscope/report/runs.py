"""What one run left behind, read for a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from headscope.base.parquet_files import read_parquet
from headscope.base.sections import Section
from headscope.errors import HeadscopeError, InputError
from headscope.report.sections import read_sections
from headscope.table import AttentionExample, HeadSpectra, HeadTable, Provenance, load_spectra

WIDTH = 5


@dataclass(frozen=True, eq=False)
class Side:
    """Partners on one side, strongest first; heads are numbered layer by layer.

    Attributes:
        which: number of the partner.
        value: composition score; 0 where there is no partner.
    """

    which: Int[np.ndarray, "head k"]
    value: Float[np.ndarray, "head k"]


@dataclass(frozen=True, eq=False)
class Partners:
    """Partners of every head.

    Attributes:
        modes: names of the scores, such as ``K_composition``.
        fed_by: per mode, earlier heads.
        feeds: per mode, later heads.
    """

    modes: tuple[str, ...]
    fed_by: Sequence[Side]
    feeds: Sequence[Side]


def read_partners(file: Path, shape: tuple[int, int]) -> Partners:
    """Read pairs of heads as ``headscope circuits`` writes them.

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


Words = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
_MAX_JSON = 100_000_000


@dataclass(frozen=True, eq=False)
class Run:
    """One run's part of a report; what it did not compute is empty.

    Attributes:
        label: name of its folder or file.
        kind: ``scan``, ``circuits``, ``lens``, ``sweep``, ...
        table: scores of single heads; None where there is nothing but sections.
        effects: whether those scores are changes made by editing heads.
        command: that makes it again.
        config: of the command, where it reads a file.
        facts: names and values, such as timings.
        sections: to be shown as they are.
        partners: strongest compositions of every head.
        spectra: singular values of every head.
        words: circuit -> head -> directions with their tokens.
        says: head -> tokens promoted and suppressed on a prompt.
        attention: of every head on one text.
        failed: what could not be computed, and why.
        of: where it came from, if there is no table.
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
    words: Words = field(default_factory=dict)
    says: Mapping[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    attention: AttentionExample | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    of: Provenance | None = None

    @property
    def origin(self) -> Provenance:
        """Whose run it is."""
        if self.table is not None:
            return next(iter(self.table.values())).provenance
        return self.of or Provenance()


def read_run(place: Path) -> Run:
    """Read a run's folder, or a table by itself.

    Raises:
        InputError: if there is no table, or a file in the folder is damaged.
    """
    if place.is_file():
        return Run(place.stem, "table", HeadTable.load(place))
    if not (place / "table.parquet").is_file():
        raise InputError(
            f"{place} holds no finished run: there is no table.parquet in it (scan, circuits, "
            "lens, retrieval and sweep write one)."
        )
    table = HeadTable.load(place / "table.parquet")
    facts = _json(place / "run.json", {})
    settings = facts.get("settings") or {}
    kind = str(settings.get("command") or "run")
    return Run(
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
        words=_words(_json(place / "words.json", {}), place),
        says=_says(place / "heads.parquet"),
        attention=AttentionExample.load(file)
        if (file := place / "attention.safetensors").is_file()
        else None,
    )


def _json(file: Path, otherwise: Any) -> Any:
    """JSON of a file, or what stands in for it where there is none."""
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
    """The command by its settings, for runs started from other code."""
    command = settings.get("command")
    if not command or not settings.get("model"):
        return ""
    words = ["headscope", str(command), str(settings["model"])]
    for name in ("revision", "seed"):
        if settings.get(name) is not None:
            words += [f"--{name}", str(settings[name])]
    return " ".join(words)


def _told(facts: Mapping[str, Any]) -> dict[str, str]:
    """Versions and timings in words."""
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


def _words(found: Mapping[str, Any], place: Path) -> Words:
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
