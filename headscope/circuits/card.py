"""Everything that weights say of one head, as data."""

from typing import Any

import numpy as np

from headscope.circuits.composition import partners_of
from headscope.circuits.dictionary import Dictionary, Embedding
from headscope.circuits.factors import HeadFactors
from headscope.circuits.maps import relation_scores
from headscope.circuits.ov import ov
from headscope.circuits.qk import qk
from headscope.circuits.scores import score
from headscope.circuits.vocabulary import vocabulary_view
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.table import HeadCard, HeadTable

# Heads x vocabulary x d_head up to which all heads are scored within about a second.
_QUICK = 10_000_000


def scores_quickly(model: HeadModel) -> bool:
    """Whether all heads of a model are scored by their weights within about a second."""
    shape = model.shape
    return len(shape.heads) * shape.d_vocab * shape.d_head <= _QUICK


def card_table(model: HeadModel) -> HeadTable:
    """Scores of all heads that a card takes its values and ranks from: weights and relations.

    Example:
        >>> from headscope.circuits.card import card_table
        >>> card = hs.circuits.head_card(model, "L2H1", table=card_table(model))
        >>> set(card.ranks) <= set(card.scores)
        True
    """
    found = score(model)
    try:
        return found.join(relation_scores(model))
    except UnsupportedModelError:
        return found


def head_card(
    model: HeadModel,
    head: "str | tuple[int, int]",
    *,
    table: HeadTable | None = None,
    embedding: Embedding = "raw",
    directions: int = 5,
    tokens: int = 10,
    partners: int = 5,
) -> HeadCard:
    """Collect what weights say of one head; without a table, no other head is scored.

    Args:
        model: any model.
        head: ``"L5H1"``, ``"5.1"`` or ``(5, 1)``.
        table: weight scores of all heads of this model (:func:`score`), from which the card
            takes the head's values and its rank by each. None: this head alone is scored, with
            the raw embedding (and with ``mlp`` where ``embedding`` asks for it), and the card has
            no ranks.
        embedding: what tokens look like to the head: ``raw``, ``mlp`` or ``mlp_only``.
        directions: singular directions shown.
        tokens: tokens shown at each end of a direction.
        partners: heads shown on each side of a composition.

    Example:
        >>> card = hs.circuits.head_card(model, "L2H1")
        >>> card.head
        'L2H1'
        >>> ranked = hs.circuits.head_card(model, "L2H1", table=hs.circuits.score(model))
        >>> 1 <= ranked.ranks["ov_norm"] <= model.shape.n_layers * model.shape.n_heads
        True
    """
    index = model.shape.check(HeadIndex.parse(head))
    missing: dict[str, str] = {}
    views: dict[str, list[dict[str, Any]]] = {"ov": [], "qk": []}
    words = Dictionary(model, embedding)
    for name, circuit in (("ov", ov), ("qk", qk)):
        try:
            factors = circuit(model, layers=[index.layer]).only(index)
            view = vocabulary_view(factors, words, directions, tokens)
            views[name] = view.words(HeadIndex(index.layer, 0), model.tokenizer)
        except UnsupportedModelError as error:
            missing[name] = str(error)
    below, above = _partners(model, index, partners, missing)
    found = _scores(model, index, embedding, missing) if table is None else table
    return HeadCard(
        head=str(index),
        kv_head=model.shape.kv_head(index.head),
        model=model.name,
        scores={name: one[index] for name, one in found.items()},
        ranks={} if table is None else _ranks(table, index),
        ov=views["ov"],
        qk=views["qk"],
        fed_by=below,
        feeds=above,
        missing=missing,
    )


def _partners(
    model: HeadModel, head: HeadIndex, count: int, missing: dict[str, str]
) -> tuple[dict[str, list[tuple[str, float]]], dict[str, list[tuple[str, float]]]]:
    """Strongest partners below and above, by what the later head does with what it reads."""
    sides: tuple[dict[str, list[tuple[str, float]]], ...] = ({}, {})
    readers: dict[str, HeadFactors] = {}
    try:
        readers["V"] = writer = ov(model)
        readers["Q"] = qk(model)
        readers["K"] = readers["Q"].transposed()
    except UnsupportedModelError as error:
        missing |= {f"{mode}_composition": str(error) for mode in "QKV" if mode not in readers}
    for mode in sorted(readers, key="QKV".index):
        for side, found in zip(sides, partners_of(head, writer, readers[mode]), strict=True):
            side[mode] = [(str(one), value) for one, value in found[:count]]
    return sides[0], sides[1]


def _scores(
    model: HeadModel, head: HeadIndex, embedding: Embedding, missing: dict[str, str]
) -> HeadTable:
    """Scores of one head with the raw embedding, and with the first MLP where that is asked for."""
    seen: list[Embedding] = ["raw", "mlp"] if embedding == "mlp" else ["raw"]
    found = score(model, heads=[head], embeddings=seen)
    try:
        return found.join(relation_scores(model, heads=[head]))
    except UnsupportedModelError as error:
        missing["maps"] = str(error)
        return found


def _ranks(table: HeadTable, head: HeadIndex) -> dict[str, int]:
    """Place of a head by every score that it has."""
    known = {name: one.mean for name, one in table.items() if np.isfinite(one[head])}
    return {name: int((mean > mean[head]).sum()) + 1 for name, mean in known.items()}
