"""The page of one head."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from headscope.base.sections import Grid, Section, Words
from headscope.heads import HeadIndex
from headscope.plots import attention_pattern, eigenvalues, spectra
from headscope.report.circuits import missing_words
from headscope.report.page import sections_page
from headscope.report.sections import Block, Picture
from headscope.table import HeadCard, HeadEigenvalues, HeadScores, HeadSpectra, HeadTable
from headscope.table.weights import NO_RANKS

_NAMES = {"Q": "queries", "K": "keys", "V": "values"}


@dataclass(frozen=True, eq=False)
class Example:
    """One head's attention on one text.

    Attributes:
        pattern: probabilities.
        tokens: text of every position.
        words: what the text is.
    """

    pattern: Float[np.ndarray, "query key"]
    tokens: Sequence[str]
    words: str


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of a head beside its card; whatever was not computed is left out.

    Attributes:
        spectra: singular values of all heads.
        eigenvalues: of all heads.
        scan: scores of all heads on probes.
        example: attention on a text.
        effects: what ablating this head changes; other heads may be missing.
    """

    spectra: Sequence[HeadSpectra] = ()
    eigenvalues: Sequence[HeadEigenvalues] = ()
    scan: HeadTable | None = None
    example: Example | None = None
    effects: Sequence[HeadScores] = ()


def head_page(card: HeadCard, evidence: Evidence, facts: Sequence[tuple[str, str]] = ()) -> str:
    """One page on one head that opens offline; see :func:`headscope.report.sections_page`."""
    head = HeadIndex.parse(card.head)
    sections = [
        *_behaviour(card, evidence, head),
        *_directions(card),
        *_spectra(evidence, head),
        *_partners(card),
        _weights(card),
    ]
    if card.missing:
        sections.append(Section("Not in this family", [missing_words(card.missing)]))
    return sections_page(
        f"{card.model} {card.head}",
        "one head",
        f"One attention head (key/value head {card.kv_head}), by headscope.",
        sections,
        facts,
    )


def _behaviour(card: HeadCard, evidence: Evidence, head: HeadIndex) -> list[Section]:
    sections = []
    if evidence.scan is not None:
        table = evidence.scan
        known = [one for one in table.values() if np.isfinite(one.mean[head])]
        rows = [
            (
                one.name,
                float(one.mean[head]),
                float(one.sem[head]),
                one.unit,
                _rank(one, head),
                _role(one, head),
                one.description,
            )
            for one in known
        ]
        columns = ("score", "mean", "standard error", "unit", "rank", "role", "high means")
        sections.append(Section("On probes", [Grid(columns, rows, "Scores of this head")]))
    if evidence.effects:
        rows_ = [
            (one.name, float(one.mean[head]), float(one.sem[head]), one.unit, one.description)
            for one in evidence.effects
        ]
        names = ("effect", "mean", "standard error", "unit", "meaning")
        grid = Grid(names, rows_, "What changes when this head is taken out")
        sections.append(Section("Ablation", [grid]))
    if evidence.example is not None:
        one = evidence.example
        drawn = partial(attention_pattern, one.pattern, one.tokens, title=f"{card.model} {head}")
        light, dark = drawn(), drawn(theme="dark")
        said = f"Attention of {head}: queries by keys"
        sections.append(Section("Attention", [Picture(light, dark, said, one.words)]))
    return sections


def _rank(scores: HeadScores, head: HeadIndex) -> str:
    known = scores.mean[np.isfinite(scores.mean)]
    return f"{int((known > scores.mean[head]).sum()) + 1} of {known.size}"


def _role(scores: HeadScores, head: HeadIndex) -> str:
    return "yes" if scores.threshold is not None and scores.significant()[head] else ""


def _directions(card: HeadCard) -> list[Section]:
    sections = []
    for title, views, reads, writes, words in (
        (
            "What it reads and writes (OV)",
            card.ov,
            "reads",
            "writes",
            "Largest singular directions of the OV circuit. A token on the left, attended to, "
            "raises the logits of the tokens on the right; signs belong together, line by line.",
        ),
        (
            "What it looks for (QK)",
            card.qk,
            "query tokens",
            "key tokens",
            "Largest singular directions of the QK circuit: queries on the left attend to keys on "
            "the right.",
        ),
    ):
        rows: list[tuple[Any, ...]] = []
        for number, view in enumerate(views):
            for sign, mark in enumerate("+-"):
                both = (tuple(view["reads"][sign]), tuple(view["writes"][sign]))
                rows.append((f"{number} {mark}", float(view["singular_value"]), *both))
        if rows:
            grid = Grid(("direction", "singular value", reads, writes), rows)
            sections.append(Section(title, [Words(words, quiet=True), grid]))
    return sections


def _spectra(evidence: Evidence, head: HeadIndex) -> list[Section]:
    blocks: list[Block] = []
    for one in evidence.spectra:
        light, dark = spectra(one, [head]), spectra(one, [head], theme="dark")
        blocks.append(Picture(light, dark, f"{one.name} singular values of {head}, others in grey"))
    for values in evidence.eigenvalues:
        light, dark = eigenvalues(values, [head]), eigenvalues(values, [head], theme="dark")
        blocks.append(Picture(light, dark, f"{values.name} eigenvalues of {head}"))
    return [Section("Spectrum and copying", blocks)] if blocks else []


def _partners(card: HeadCard) -> list[Section]:
    blocks: list[Block] = []
    for title, partners in (("fed by", card.fed_by), ("feeds", card.feeds)):
        rows = [
            (f"{_NAMES.get(mode, mode)}", ", ".join(f"{one} {value:.3f}" for one, value in found))
            for mode, found in partners.items()
            if found
        ]
        if rows:
            blocks.append(Grid(("through", "heads, strongest first"), rows, title))
    return [Section("Composition partners", blocks)] if blocks else []


def _weights(card: HeadCard) -> Section:
    rows = [
        (name, value, card.ranks.get(name, ""))
        for name, value in card.scores.items()
        if np.isfinite(value)
    ]
    told = "1 is the largest" if card.ranks else NO_RANKS
    return Section("Weight scores", [Grid(("score", "value", "rank"), rows, told)])
