"""Survey of all weight results: every head at once, one head's card, and spectra."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import Saved
from headscope.base.options import RunOptions
from headscope.base.result import Glance, Shown, reasons, sizes
from headscope.base.specs import portable
from headscope.circuits.composition import (
    Path,
    chains,
    composition,
    random_composition,
    ranked_partners,
)
from headscope.circuits.maps import relation_scores
from headscope.circuits.measures import product_spectra, token_cores
from headscope.circuits.ov_qk import HeadFactors, ov, qk
from headscope.circuits.scores import entry_sizes, score
from headscope.circuits.vocabulary import Dictionary, Embedding, Gram, vocabulary_view
from headscope.errors import InputError, UnsupportedModelError, nearest
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.table import HeadCard, HeadEigenvalues, HeadSpectra, HeadTable, PairScores

_DRAWS = 64
_BETWEEN = {"OV": "token to logit", "QK": "query token to key token"}
_SEEN = {"raw": "raw embedding", "mlp": "first MLP added", "mlp_only": "first MLP alone"}


@checked
@own_types()
def spectra(
    model: HeadModel, circuit: str = "OV", fold_norm: bool = True, *, seed: int = 0
) -> HeadSpectra:
    """Singular values of every head, with the band expected of random factors.

    The band comes from products of two Gaussian factors, each with the shape and the variance of
    the head's own: smallest and largest of 64 draws, rank by rank. The Marchenko-Pastur law does
    not apply, as it holds for one factor and not for a product. QK is at distance 0 under rotary
    positions.

    Args:
        model: any model that has this circuit.
        circuit: ``OV`` or ``QK``.
        fold_norm: fold the norm before attention.
        seed: seed of the draws.

    Raises:
        UnsupportedModelError: if weights alone do not determine the circuit.

    Example:
        >>> found = hs.circuits.spectra(model, "QK")
        >>> found.values.shape == (model.shape.n_layers, model.shape.n_heads, model.shape.d_head)
        True
    """
    factors = _factors(model, circuit, fold_norm)
    width, rank = factors.left.shape[-2:]
    drawn = product_spectra(width, rank, width, _DRAWS, seed)
    largest = drawn[:, 0].mean()
    relative = (drawn / largest).numpy()
    return HeadSpectra(
        circuit,
        _by_layer(model, factors, factors.singular_values()),
        _by_layer(model, factors, entry_sizes(factors).cpu().double() * float(largest)),
        low=relative.min(0),
        high=relative.max(0),
        chance=f"products of Gaussian factors of the same shape and variance, {_DRAWS} draws",
        provenance=of_weights(model, circuit=circuit, fold_norm=fold_norm, draws=_DRAWS, seed=seed),
    )


@checked
@own_types()
def eigenvalues(
    model: HeadModel, circuit: str = "OV", embedding: Embedding = "raw"
) -> HeadEigenvalues:
    """Eigenvalues behind the copying (OV) and matching (QK) scores of every head.

    Nonzero eigenvalues of ``E @ W_V @ W_O @ W_U.T`` (token to logit) or ``E @ W_Q @ W_K.T @ E.T``
    (query token to key token, mean over the vocabulary removed); see :func:`copying_eigenvalues`,
    whose value is their ratio.

    Args:
        model: any model that has this circuit.
        circuit: ``OV`` or ``QK``.
        embedding: token vectors: ``raw``, ``mlp`` or ``mlp_only``.

    Example:
        >>> found = hs.circuits.eigenvalues(model)
        >>> found.values.shape[:2] == (model.shape.n_layers, model.shape.n_heads)
        True
    """
    factors = _factors(model, circuit, True)
    words = Dictionary(model, embedding)
    kind: Gram = "output_input" if circuit == "OV" else "input"
    values = torch.linalg.eigvals(token_cores(factors, words, kind).cpu().double())
    return HeadEigenvalues(
        circuit,
        _by_layer(model, factors, values),
        description=f"{_BETWEEN[circuit]}, {_SEEN[embedding]}",
        provenance=of_weights(model, circuit=circuit, embedding=embedding, fold_norm=True),
    )


def _factors(model: HeadModel, circuit: str, fold_norm: bool) -> HeadFactors:
    if circuit == "OV":
        return ov(model, fold_norm)
    if circuit == "QK":
        return qk(model, fold_norm, 0 if fold_norm else None)
    raise InputError(nearest(str(circuit), ["OV", "QK"], kind="circuit"))


def _by_layer(
    model: HeadModel, factors: HeadFactors, values: Tensor
) -> Shaped[np.ndarray, "layer head *rest"]:
    """Scatter values of attention layers over the model's layer numbers."""
    found = values.detach().cpu().numpy()
    result = np.full((model.shape.n_layers, *found.shape[1:]), np.nan, found.dtype)
    result[list(factors.layers)] = found
    return result


Found = TypeVar("Found")
_MODES = ("Q", "K", "V")
_CIRCUITS = ("OV", "QK")


@dataclass(frozen=True, eq=False, repr=False)
class Survey(Saved, Shown):
    """Weight results of a model: scores, compositions, spectra, eigenvalues, paths.

    Attributes:
        table: every weight score and relation score.
        pairs: Q-, K- and V-composition, as far as the family allows.
        spectra: singular values of OV and QK.
        eigenvalues: eigenvalues of OV and QK, over the vocabulary with the first MLP's output
            added.
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
        """Show the heads that stand out in each part."""
        rows = []
        for name in ("copying_eigenvalues", "copying_top5", "matching_eigenvalues", "ov_norm"):
            if name in self.table:
                best = ", ".join(f"{head} {value:.2f}" for head, value in self.table.top(name, 3))
                rows.append((name, best))
        for pairs in self.pairs:
            found = (f"{one} → {other} {value:.2f}" for one, other, value in pairs.top(3))
            rows.append((pairs.name, ", ".join(found)))
        rows += [(f"paths: {kind}", str(found[0])) for kind, found in self.paths.items() if found]
        facts = [sizes(("layer", "head"), self.table.shape), f"{len(self.table)} weight scores"]
        model = next(iter(self.table.values())).provenance.model
        rows += [(f"no {names}", why) for names, why in reasons(self.missing, model)]
        return Glance(
            "survey of weights",
            [*facts, model],
            ("part", "strongest"),
            rows,
            hint="survey.table.to_pandas_wide(), hs.plots.composition_graph(survey.pairs)",
        )


@checked
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
        model: any model; what its family does not allow is left out and listed in ``missing``.
        tokens: see :func:`headscope.circuits.score`.
        paths: number of chains of each kind.
        seed: seed of random draws.
        progress: show a progress bar. None: only in a terminal or notebook.

    Raises:
        UnsupportedModelError: if nothing can be read from the weights alone.

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
    """Strongest chains: two heads by keys, two by any mode, and three; none without pairs."""
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
    """Whether scoring all heads of a model by weights takes at most about a second."""
    shape = model.shape
    return len(shape.heads) * shape.d_vocab * shape.d_head <= _QUICK


def card_table(model: HeadModel) -> HeadTable:
    """Weight and relation scores of all heads, from which cards take values and ranks.

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


@checked
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
    """Collect the weight results of one head; without a table, no other head is scored.

    Args:
        model: any model.
        head: ``"L5H1"``, ``"5.1"`` or ``(5, 1)``.
        table: weight scores of all heads of this model (:func:`score`), from which the card takes
            the head's values and ranks. None: only this head is scored, with the raw embedding (and
            with ``mlp`` if ``embedding`` is that), and the card has no ranks.
        embedding: token vectors as the head sees them: ``raw``, ``mlp`` or ``mlp_only``.
        directions: number of singular directions.
        tokens: number of tokens at each end of a direction.
        partners: number of heads on each side of a composition.

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
        model=portable(model.name),
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
    """Strongest partners in lower and higher layers, by composition mode."""
    sides: tuple[dict[str, list[tuple[str, float]]], ...] = ({}, {})
    readers: dict[str, HeadFactors] = {}
    try:
        readers["V"] = writer = ov(model)
        readers["Q"] = qk(model)
        readers["K"] = readers["Q"].transposed()
    except UnsupportedModelError as error:
        missing |= {f"{mode}_composition": str(error) for mode in "QKV" if mode not in readers}
    for mode in sorted(readers, key="QKV".index):
        for side, found in zip(sides, ranked_partners(head, writer, readers[mode]), strict=True):
            side[mode] = [(str(one), value) for one, value in found[:count]]
    return sides[0], sides[1]


def _scores(
    model: HeadModel, head: HeadIndex, embedding: Embedding, missing: dict[str, str]
) -> HeadTable:
    """Scores of one head with the raw embedding, and with the first MLP if requested."""
    seen: list[Embedding] = ["raw", "mlp"] if embedding == "mlp" else ["raw"]
    found = score(model, heads=[head], embeddings=seen)
    try:
        return found.join(relation_scores(model, heads=[head]))
    except UnsupportedModelError as error:
        missing["maps"] = str(error)
        return found


def _ranks(table: HeadTable, head: HeadIndex) -> dict[str, int]:
    """Rank of a head by every score that it has."""
    known = {name: one.mean for name, one in table.items() if np.isfinite(one[head])}
    return {name: int((mean > mean[head]).sum()) + 1 for name, mean in known.items()}
