"""The report of a scan, as one HTML page that works without a network."""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.offline import get_plotlyjs

from headscope.plots import heatmap
from headscope.plots.text import visible
from headscope.report.sections import Section, laid_out
from headscope.table import HeadTable, Provenance
from headscope.table.excerpt import by_interest, fraction, written
from headscope.table.roles import find_roles
from headscope.table.scores import HeadScores

if TYPE_CHECKING:
    from jinja2 import Environment

Row = dict[str, object]

# What may end a script element or a line of script inside a string.
_UNSAFE = {ord(one): f"\\u{ord(one):04x}" for one in "<>&\u2028\u2029"}


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
    """One page: roles, facts, every head with every score, and a heatmap per score.

    The page carries its own copy of plotly.js and a content security policy that lets it run its
    own scripts, by their hashes, and load nothing from anywhere.

    Args:
        table: scores of one model.
        settings: what was asked for, shown as facts of the run.
        names: scores to show, in this order; default: all, those with a role first.
        title: of the page; default: the model's name.
        command: how to make it again, shown as it is.
        alpha: false discovery rate of the roles.
        sections: shown before the table of all heads.
    """
    scores = by_interest(table) if names is None else [table[name] for name in names]
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


def sections_page(
    title: str,
    subject: str,
    lead: str,
    sections: Sequence[Section],
    facts: Sequence[tuple[str, str]] = (),
    command: str | None = None,
) -> str:
    """A page of sections alone, with the same promises as :func:`index_page`.

    Args:
        title: of the page.
        subject: what kind of page it is, in the browser's title.
        lead: one sentence below the title.
        sections: in this order.
        facts: where it came from.
        command: how to make it again, shown as it is.
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


def _render(*, scores: Sequence[HeadScores], sections: Sequence[Section], **words: object) -> str:
    """Fill the template; every figure and script goes in once."""
    scripts = {"plotly": _plotly(), "own": _resource("page.js")}
    shown, pictures = laid_out(sections, first=len(scores))
    figures = _data([*(json.loads(heatmap(one).to_json()) for one in scores), *pictures])
    return (
        _environment()
        .get_template("page.html")
        .render(
            scores=scores,
            sections=shown,
            style=_resource("page.css"),
            scripts=scripts,
            figures=figures,
            policy=_policy(scripts.values()),
            **words,
        )
    )


def _rows(table: HeadTable, scores: Sequence[HeadScores], alpha: float) -> list[Row]:
    """One row per head that any score has, in layer order."""
    shown = np.any([one.present for one in scores], axis=0)
    group = table.shape[1] // scores[0].kv_heads
    marks = [one.significant(alpha) for one in scores]
    rows: list[Row] = []
    for layer, head in zip(*(axis.tolist() for axis in np.nonzero(shown)), strict=True):
        cells = [
            {
                "value": float(one.mean[layer, head]),
                "text": written(float(one.mean[layer, head])),
                "strength": round(100 * fraction(one, float(one.mean[layer, head]))),
                "marked": bool(mark[layer, head]),
            }
            for one, mark in zip(scores, marks, strict=True)
        ]
        rows.append({"layer": layer, "head": head, "kv_head": head // group, "cells": cells})
    return rows


def _facts(
    table: HeadTable, provenance: Provenance, settings: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Model and provenance as pairs of words; what is unknown is left out."""
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
    """A fact as text: mappings become ``key value`` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items())
    return str(value)


def _data(value: object) -> str:
    """JSON that stays inside its script element, whatever the strings in it say."""
    return json.dumps(value, allow_nan=False).translate(_UNSAFE)


def _policy(scripts: Iterable[str]) -> str:
    """Content security policy: our scripts by hash, our styles, pictures made in the page."""
    hashes = " ".join(
        f"'sha256-{b64encode(sha256(one.encode()).digest()).decode()}'" for one in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@cache
def _plotly() -> str:
    """plotly.js; browsers hash a script after turning line ends into newlines."""
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def _resource(name: str) -> str:
    return (files("headscope.report") / name).read_text(encoding="utf-8")


def _environment() -> "Environment":
    from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound

    class Own(BaseLoader):
        def get_source(self, environment: Environment, template: str) -> tuple[str, None, None]:
            if template != "page.html":
                raise TemplateNotFound(template)
            return _resource(template), None, None

    made = Environment(
        loader=Own(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["visible"] = visible
    return made
