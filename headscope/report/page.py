"""Self-contained HTML pages: shared template, the report of a scan, the attention viewer."""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from plotly.offline import get_plotlyjs

from headscope.base.files import whole_page
from headscope.base.result import Section, short
from headscope.heads import HeadIndex
from headscope.plots import heatmap
from headscope.plots.figure import visible
from headscope.report.sections import Picture, laid_out
from headscope.table import AttentionExample, HeadTable, Provenance
from headscope.table.kinds import by_interest, find_roles
from headscope.table.scores import HeadScores

if TYPE_CHECKING:
    from jinja2 import Environment


# Characters that could end a script element, or a line of script inside a string.
_UNSAFE = {ord(one): f"\\u{ord(one):04x}" for one in "<>&\u2028\u2029"}
_TEMPLATES = ("frame.html", "page.html", "sections.html", "report.html", "view.html")


def filled(
    template: str,
    *,
    styles: Iterable[str],
    scripts: Iterable[str],
    data: object,
    plotly: bool = True,
    **words: object,
) -> str:
    """Fill a page template with styles, one copy of plotly.js, scripts and their data.

    Args:
        template: name of its file in this package.
        styles: names of style sheets, joined in this order.
        scripts: names of scripts, which run after plotly.js in this order.
        data: JSON values, in their own script element.
        plotly: whether the scripts need it.
        words: further template variables.
    """
    texts = [*([plotly_js()] if plotly else []), *map(resource, scripts)]
    return (
        _environment()
        .get_template(template)
        .render(
            style="".join(map(resource, styles)),
            scripts=texts,
            data=as_data(data),
            policy=policy(texts),
            **words,
        )
    )


def as_data(value: object) -> str:
    """Serialise JSON so that no string in it can end its script element."""
    made = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return made.translate(_UNSAFE)


def policy(scripts: Iterable[str]) -> str:
    """Content security policy: scripts by hash, inline styles, and images made in the page."""
    hashes = " ".join(
        f"'sha256-{b64encode(sha256(one.encode()).digest()).decode()}'" for one in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@cache
def plotly_js() -> str:
    """Source of plotly.js, with newlines normalised, as browsers do before hashing a script."""
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def resource(name: str) -> str:
    """Read a text file of this package."""
    return (files("headscope.report") / name).read_text(encoding="utf-8")


def _environment() -> "Environment":
    from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound

    class Own(BaseLoader):
        def get_source(self, environment: Environment, template: str) -> tuple[str, None, None]:
            if template not in _TEMPLATES:
                raise TemplateNotFound(template)
            return resource(template), None, None

    made = Environment(
        loader=Own(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["visible"] = visible
    return made


_LONGEST = 120  # characters shown of a token
NumberFormat = Literal["f4", "f2", "u2", "u1"]


def packed(
    values: np.ndarray, kind: NumberFormat, *, needed: bool = False
) -> dict[str, str] | None:
    """Encode an array as little-endian bytes; None for floats that are all missing.

    Args:
        values: array of any shape, stored row by row.
        kind: ``f4`` for what is sorted and compared, ``f2`` (3 digits) for what is only displayed;
            values that would lose more are kept as ``f4``.
        needed: encode even if all values are missing.
    """
    if kind[0] == "f" and not needed and not np.isfinite(values).any():
        return None
    if kind == "f2" and not _fits_half(values):
        kind = "f4"
    flat = np.ascontiguousarray(values).astype(f"<{kind}")
    return {"kind": kind, "data": b64encode(flat.tobytes()).decode()}


def _fits_half(values: np.ndarray) -> bool:
    """Whether half precision keeps every value to 0.2%, or to a millionth of the largest."""
    known = np.abs(values[np.isfinite(values)])
    most = float(known.max(initial=0.0))
    if most > 6e4:
        return False
    lost = np.abs(known.astype(np.float16).astype(np.float64) - known)
    return bool((lost <= 2e-3 * known + 1e-6 * most).all())


def packed_tokens(tokens: Iterable[str]) -> list[str]:
    """Tokens as visible, truncated text."""
    return [visible(one[:_LONGEST]) + ("…" if len(one) > _LONGEST else "") for one in tokens]


def packed_example(example: AttentionExample) -> dict[str, Any]:
    """Encode tokens and patterns; for a causal mask only the lower triangle."""
    rows, columns = np.tril_indices(len(example.tokens))
    triangle = not np.triu(example.pattern, 1).any()
    return {
        "tokens": packed_tokens(example.tokens),
        "triangle": triangle,
        "pattern": packed(example.pattern[:, rows, columns] if triangle else example.pattern, "u1"),
        "words": visible(example.words),
    }


Row = dict[str, object]


def index_page(
    table: HeadTable,
    settings: Mapping[str, Any] | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    command: str | None = None,
    alpha: float = 0.05,
    sections: Sequence[Section] = (),
) -> str:
    """Build the report of a scan: roles, facts, every head with every score, and heatmaps.

    The page carries its own copy of plotly.js and a content security policy that allows only its
    own scripts, by hash, and no network requests.

    Args:
        table: scores of one model.
        settings: requested settings, shown as facts of the run.
        names: scores to show, in this order; default: all, those with a role first.
        title: title of the page; default: the model's name.
        command: command that reproduces it, shown unchanged.
        alpha: false discovery rate of the roles.
        sections: shown before the table of all heads.
    """
    scores = by_interest(table.values()) if names is None else [table[name] for name in names]
    provenance = next(iter(table.values())).provenance
    roles = find_roles(scores, alpha)
    return _render(
        title=title or provenance.model or "attention heads",
        subject="attention heads",
        lead="What every attention head does, by headscope.",
        scores=scores,
        roles=None if sections and not roles else roles,
        facts=_facts(table, provenance, settings or {}),
        rows=_rows(table, scores, alpha),
        sections=sections,
        command=command,
        alpha=alpha,
    )


def stacks_page(
    table: HeadTable,
    settings: Mapping[str, Any] | None = None,
    *,
    sections: Sequence[Section] = (),
    command: str | None = None,
) -> str:
    """Build the page of a model with several attention stacks: a section and grids for each.

    Args:
        table: scores of several stacks.
        settings: requested settings, shown as facts of the run.
        sections: shown before those of the stacks.
        command: command that reproduces it, shown unchanged.
    """
    provenance = next(iter(table.values())).provenance
    facts = [
        fact
        for fact in _facts(next(iter(table.stacks.values())), provenance, settings or {})
        if fact[0] not in ("layers", "heads in a layer")
    ]
    found = list(sections)
    for name, one in table.stacks.items():
        layers, heads = one.shape
        blocks = [block for part in one.sections() for block in part.blocks]
        grids = [
            Picture(
                heatmap(scores, theme="light"),
                heatmap(scores, theme="dark"),
                said=f"{label} of every head of the {name}",
            )
            for label, scores in one.items()
        ]
        title = f"{name}: {layers} layers of {heads} heads"
        found.append(Section(title, [*blocks, *grids]))
    return sections_page(
        provenance.model or "attention heads",
        "attention heads",
        "What every attention head of every stack does, by headscope.",
        found,
        facts,
        command,
    )


def sections_page(
    title: str,
    subject: str,
    lead: str,
    sections: Sequence[Section],
    facts: Sequence[tuple[str, str]] = (),
    command: str | None = None,
) -> str:
    """Build a page from sections alone, as self-contained as :func:`index_page`.

    Args:
        title: title of the page.
        subject: kind of page, in the browser's title.
        lead: one sentence below the title.
        sections: in this order.
        facts: provenance.
        command: command that reproduces it, shown unchanged.
    """
    return _render(
        title=title,
        subject=subject,
        lead=lead,
        scores=[],
        roles=None,
        facts=list(facts),
        rows=[],
        sections=sections,
        command=command,
        alpha=0.05,
    )


def _render(*, scores: Sequence[HeadScores], sections: Sequence[Section], **words: Any) -> str:
    """Render the template; every figure and script is included once."""
    shown, pictures = laid_out(sections, first=len(scores))
    return filled(
        "page.html",
        styles=["page.css"],
        scripts=["page.js"],
        data=[*(json.loads(heatmap(one).to_json()) for one in scores), *pictures],
        scores=scores,
        sections=shown,
        **words,
    )


def _rows(table: HeadTable, scores: Sequence[HeadScores], alpha: float) -> list[Row]:
    """One row per head that has any score, in layer order."""
    shown = np.any([one.present for one in scores], axis=0)
    group = table.shape[1] // scores[0].kv_heads
    marks = [one.significant(alpha) for one in scores]
    rows: list[Row] = []
    for layer, head in zip(*(axis.tolist() for axis in np.nonzero(shown)), strict=True):
        cells = [
            {
                "value": float(one.mean[layer, head]),
                "text": short(float(one.mean[layer, head])),
                "strength": round(100 * one.fraction(float(one.mean[layer, head]))),
                "marked": bool(mark[layer, head]),
            }
            for one, mark in zip(scores, marks, strict=True)
        ]
        name = str(HeadIndex(layer, head, scores[0].stack))
        place = {"name": name, "order": layer * 100_000 + head, "kv_head": head // group}
        rows.append({**place, "cells": cells})
    return rows


def _facts(
    table: HeadTable, provenance: Provenance, settings: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Model and provenance as (name, value) pairs; unknown values are left out."""
    layers, heads = table.shape
    kv_heads = next(iter(table.values())).kv_heads
    facts: dict[str, object] = {
        "layers": layers,
        "heads in a layer": f"{heads} ({kv_heads} key/value heads)",
        **provenance.to_json(),
    }
    facts["probes"] = "; ".join(sorted({_words(one.provenance.probe) for one in table.values()}))
    del facts["probe"], facts["control"]
    facts["settings"] = dict(settings)
    return [
        (name.replace("_", " "), _words(value))
        for name, value in facts.items()
        if value not in (None, "", {})
    ]


def _words(value: object) -> str:
    """Format a fact; mappings become ``key value`` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items())
    return str(value)


_HEIGHT = 560
# Shown instead of the frame by front ends that remove it.
_BLOCKED = (
    "The attention viewer runs scripts, which this notebook may not: trust the notebook and run "
    'the cell again, or write the viewer to a file with .save("view.html").'
)


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention of some heads on one text, displayed as a viewer in notebooks.

    Attributes:
        example: attention to show.
        height: height of the frame in a notebook, in pixels.
    """

    example: AttentionExample
    height: int = _HEIGHT

    def page(self) -> str:
        """Build the viewer as a self-contained HTML page."""
        example = self.example
        heads = [str(head) for head in example.heads]
        return filled(
            "view.html",
            styles=["page.css", "report.css"],
            scripts=["attention.js", "view.js"],
            data={"heads": heads, **packed_example(example)},
            plotly=False,
            title=f"Attention of {example.provenance.model or 'the model'}",
            words=example.words,
            several=len(heads) > 1,
        )

    def save(self, path: "str | PathLike[str]") -> None:
        """Write the page atomically.

        Raises:
            InputError: if the name does not end in ``.html``.
        """
        whole_page(Path(path), self.page())

    def _repr_html_(self) -> str:
        """Embed the page in an isolated frame."""
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{escape(self.page())}" '
            f'title="Attention of {len(self.example.heads)} heads" '
            f'style="width:100%;height:{self.height}px;border:0">{escape(_BLOCKED)}</iframe>'
        )

    def __repr__(self) -> str:
        """Describe heads and length."""
        heads = ", ".join(map(str, self.example.heads[:6]))
        more = ", ..." if len(self.example.heads) > 6 else ""
        return f"AttentionView({heads}{more} on {len(self.example.tokens)} tokens)"
