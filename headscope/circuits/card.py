"""Everything that weights say of one head, as data."""

from typing import Any

from headscope.circuits.composition import composition
from headscope.circuits.dictionary import Dictionary, Embedding
from headscope.circuits.maps import relation_scores
from headscope.circuits.ov import ov
from headscope.circuits.qk import qk
from headscope.circuits.scores import score
from headscope.circuits.vocabulary import vocabulary_view
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.table import HeadCard, HeadTable, PairScores


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
    """Collect what weights say of one head.

    Args:
        model: any model.
        head: ``"L5H1"``, ``"5.1"`` or ``(5, 1)``.
        table: weight scores of this model, if they are there already; else computed.
        embedding: what tokens look like to the head: ``raw``, ``mlp`` or ``mlp_only``.
        directions: singular directions shown.
        tokens: tokens shown at each end of a direction.
        partners: heads shown on each side of a composition.

    Example:
        >>> card = hs.circuits.head_card(model, "L2H1")
        >>> card.head
        'L2H1'
    """
    index = model.shape.check(HeadIndex.parse(head))
    missing: dict[str, str] = {}
    views: dict[str, list[dict[str, Any]]] = {"ov": [], "qk": []}
    words = Dictionary(model, embedding)
    for name, circuit in (("ov", ov), ("qk", qk)):
        try:
            factors = circuit(model, layers=[index.layer])
            view = vocabulary_view(factors, words, directions, tokens)
            views[name] = view.words(index, model.tokenizer)
        except UnsupportedModelError as error:
            missing[name] = str(error)
    pairs = _compositions(model, missing)
    found = _all_scores(model, missing) if table is None else table
    return HeadCard(
        head=str(index),
        kv_head=model.shape.kv_head(index.head),
        model=model.name,
        scores={name: one[index] for name, one in found.items()},
        ranks={name: _rank(found, name, index) for name in found},
        ov=views["ov"],
        qk=views["qk"],
        fed_by={mode: _partners(one, index, partners, below=True) for mode, one in pairs.items()},
        feeds={mode: _partners(one, index, partners, below=False) for mode, one in pairs.items()},
        missing=missing,
    )


def _compositions(model: HeadModel, missing: dict[str, str]) -> dict[str, PairScores]:
    pairs = {}
    for mode in ("Q", "K", "V"):
        try:
            pairs[mode] = composition(model, mode)
        except UnsupportedModelError as error:
            missing[f"{mode}_composition"] = str(error)
    return pairs


def _all_scores(model: HeadModel, missing: dict[str, str]) -> HeadTable:
    found = score(model)
    try:
        return found.join(relation_scores(model))
    except UnsupportedModelError as error:
        missing["maps"] = str(error)
        return found


def _rank(table: HeadTable, name: str, head: HeadIndex) -> int:
    mean = table[name].mean
    return int((mean > mean[head]).sum()) + 1


def _partners(
    pairs: PairScores, head: HeadIndex, count: int, *, below: bool
) -> list[tuple[str, float]]:
    """Strongest partners of one head in the layers below or above it."""
    found = [
        (str(first if below else second), value)
        for first, second, value in pairs.top(pairs.values.size)
        if (second if below else first) == head
    ]
    return found[:count]
