"""All that weights say: of all heads in one go, and of one head as a card."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown, sizes
from headscope.base.saved import Saved
from headscope.circuits.composition import (
    Path,
    chains,
    composition,
    partners_of,
    random_composition,
)
from headscope.circuits.factors import HeadFactors
from headscope.circuits.maps import relation_scores
from headscope.circuits.ov_qk import ov, qk
from headscope.circuits.scores import score
from headscope.circuits.spectra import eigenvalues, spectra
from headscope.circuits.vocabulary import Dictionary, Embedding, vocabulary_view
from headscope.errors import InputError, UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.table import HeadCard, HeadEigenvalues, HeadSpectra, HeadTable, PairScores

Found = TypeVar("Found")
_MODES = ("Q", "K", "V")
_CIRCUITS = ("OV", "QK")


@dataclass(frozen=True, eq=False, repr=False)
class Survey(Saved, Shown):
    """What the weights of a model say.

    Attributes:
        table: every weight score and relation score.
        pairs: Q-, K- and V-composition, as far as the family allows.
        spectra: singular values of OV and QK.
        eigenvalues: of OV and QK, over the vocabulary with the first MLP's part added.
        paths: strongest chains of heads, by kind.
        missing: what the family does not allow, with the reason.
    """

    table: HeadTable
    pairs: tuple[PairScores, ...]
    spectra: tuple[HeadSpectra, ...]
    eigenvalues: tuple[HeadEigenvalues, ...]
    paths: Mapping[str, list[Path]]
    missing: Mapping[str, str]

    def glance(self) -> Glance:
        """The heads that stand out in each part."""
        rows = []
        for name in ("copying_eigenvalues", "copying_top5", "matching_eigenvalues", "ov_norm"):
            if name in self.table:
                best = ", ".join(f"{head} {value:.2f}" for head, value in self.table.top(name, 3))
                rows.append((name, best))
        for pairs in self.pairs:
            found = (f"{one} → {other} {value:.2f}" for one, other, value in pairs.top(3))
            rows.append((pairs.name, ", ".join(found)))
        rows += [(f"paths: {kind}", str(found[0])) for kind, found in self.paths.items() if found]
        rows += [(f"no {name}", why) for name, why in self.missing.items()]
        facts = [sizes(("layer", "head"), self.table.shape), f"{len(self.table)} weight scores"]
        model = next(iter(self.table.values())).provenance.model
        return Glance(
            "survey of weights",
            [*facts, model],
            ("part", "strongest"),
            rows,
            hint="survey.table.to_pandas_wide(), hs.plots.composition_graph(survey.pairs)",
        )


@own_types()
def survey(
    model: HeadModel,
    *,
    tokens: int = 256,
    paths: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> Survey:
    """Read the weights of every head: scores, compositions, spectra, eigenvalues, paths.

    Args:
        model: any model; what its family does not allow is left out and told in ``missing``.
        tokens: see :func:`headscope.circuits.score`.
        paths: chains of each kind.
        seed: of what is drawn.
        progress: show a progress bar. None: only in a terminal or notebook.

    Raises:
        UnsupportedModelError: if the weights say nothing alone.

    Example:
        >>> found = hs.circuits.survey(model, tokens=32, paths=2)
        >>> dict(found.missing)  # this family allows everything
        {}
    """
    missing: dict[str, str] = {}
    options = RunOptions(seed=seed, progress=progress)
    with options.track(9, "reading weights") as advance:

        def tried(name: str, work: Callable[[], Found]) -> list[Found]:
            try:
                return [work()]
            except UnsupportedModelError as error:
                missing[name] = str(error)
            except InputError as error:  # no relation has enough single-token pairs
                if name != "relations":
                    raise
                missing[name] = str(error)
            finally:
                advance()
            return []

        table = score(model, tokens=tokens, seed=seed)
        advance()
        for more in tried("relations", lambda: relation_scores(model)):
            table = table.join(more)
        pairs, singular, complex_values = [], [], []
        for mode in _MODES:
            pairs += tried(f"{mode}_composition", partial(composition, model, mode))
        for circuit in _CIRCUITS:
            singular += tried(f"{circuit}_spectra", partial(spectra, model, circuit, seed=seed))
            complex_values += tried(
                f"{circuit}_eigenvalues", partial(eigenvalues, model, circuit, "mlp")
            )
    return Survey(
        table,
        tuple(pairs),
        tuple(singular),
        tuple(complex_values),
        _paths(model, pairs, paths),
        missing,
    )


def _paths(model: HeadModel, pairs: list[PairScores], count: int) -> dict[str, list[Path]]:
    """Chains of two heads through keys, of two, and of three; none where there are no pairs."""
    if not pairs:
        return {}
    chance = random_composition(model)
    keys = [one for one in pairs if one.name.startswith("K")]
    return {
        "two heads, keys only": chains(keys, chance, count, 2),
        "two heads": chains(pairs, chance, count, 2),
        "three heads": chains(pairs, chance, count, 3),
    }


# Heads x vocabulary x d_head up to which all heads are scored within about a second.
_QUICK = 10_000_000


def scores_quickly(model: HeadModel) -> bool:
    """Whether all heads of a model are scored by their weights within about a second."""
    shape = model.shape
    return len(shape.heads) * shape.d_vocab * shape.d_head <= _QUICK


def card_table(model: HeadModel) -> HeadTable:
    """Scores of all heads that a card takes its values and ranks from: weights and relations.

    Example:
        >>> from headscope.circuits.survey import card_table
        >>> card = hs.circuits.head_card(model, "L2H1", table=card_table(model))
        >>> set(card.ranks) <= set(card.scores)
        True
    """
    found = score(model)
    try:
        return found.join(relation_scores(model))
    except UnsupportedModelError:
        return found


@own_types()
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
