"""The report of a scan, as one HTML page that works without a network."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headscope.base.glance import short
from headscope.base.sections import Section
from headscope.plots import heatmap
from headscope.report.sections import laid_out
from headscope.report.shell import filled
from headscope.table import HeadTable, Provenance
from headscope.table.notable import by_interest, find_roles
from headscope.table.scores import HeadScores

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


def _render(*, scores: Sequence[HeadScores], sections: Sequence[Section], **words: Any) -> str:
    """Fill the template; every figure and script goes in once."""
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
    """One row per head that any score has, in layer order."""
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
