"""MAPS: the token relations that a head's weights implement.

A relation is a set of token pairs, built for a model's vocabulary.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.base.files import Saved, read_text
from headscope.base.options import Advance, track
from headscope.base.result import Glance, Shown, number
from headscope.circuits.measures import Ranks, target_ranks
from headscope.circuits.ov_qk import HeadFactors, ov
from headscope.circuits.vocabulary import Dictionary
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.origin import of_weights
from headscope.probes.encoding import ordinary_tokens
from headscope.table import HeadScores, HeadTable

WordPairs = list[tuple[str, str]]
# Maximum number of pairs in a relation made from the whole vocabulary.
_MADE_PAIRS = 200
# Minimum number of pairs for a meaningful score.
_MIN_PAIRS = 5


@dataclass(frozen=True, eq=False)
class TokenRelation:
    """Pairs of single tokens (source, target) of one vocabulary.

    Attributes:
        name: name of the relation.
        source: token ids that a head attends to.
        target: token ids that it should promote.
        words: number of pairs before those with multi-token words were dropped.
    """

    name: str
    source: Int[Tensor, " pair"]
    target: Int[Tensor, " pair"]
    words: int

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.source)


@checked
def relations(
    model: HeadModel, path: "str | PathLike[str] | None" = None
) -> dict[str, TokenRelation]:
    """Build the relations that a model's vocabulary can express with single tokens.

    Built in: ``copy`` (without a tokenizer the only one), ``case`` (Word and word),
    ``digit_successor``, and word lists: plural, opposite, country_capital, comparative,
    past_tense, month/weekday/number_word successors, pronoun_possessive. Words are looked up
    with a leading space, as in running text, else without. Relations with fewer than five pairs
    left are dropped.

    Args:
        model: its tokenizer decides.
        path: a JSON file, ``{"name": [["source", "target"], ...]}``, that replaces the built-in
            lists.

    Raises:
        InputError: if the file has another form.

    Example:
        >>> "copy" in hs.circuits.relations(model)
        True
    """
    lists = _word_lists() if path is None else read_relations(path)
    found = {} if path is not None else {"copy": _copy(model)}
    if model.tokenizer is not None:
        if path is None:
            found["case"] = _case(model)
            lists = {"digit_successor": [(str(n), str(n + 1)) for n in range(200)], **lists}
        found |= {name: of_words(model, name, pairs) for name, pairs in lists.items()}
    elif path is not None:
        raise InputError(f"{model.name} has no tokenizer to look the words of {path} up in.")
    return {name: one for name, one in found.items() if len(one) >= _MIN_PAIRS}


def of_words(model: HeadModel, name: str, pairs: Iterable[tuple[str, str]]) -> TokenRelation:
    """Relation from pairs of words, without those that are not single tokens."""
    listed = list(pairs)
    found = []
    for source, target in listed:
        for prefix in (" ", ""):
            ids = [_single(model, prefix + word) for word in (source, target)]
            if None not in ids:
                found.append(ids)
                break
    columns = torch.tensor(found, dtype=torch.long, device=model.device).reshape(-1, 2)
    return TokenRelation(name, columns[:, 0], columns[:, 1], len(listed))


@checked
def read_relations(path: "str | PathLike[str]") -> dict[str, WordPairs]:
    """Read pairs of words from JSON.

    Args:
        path: JSON file ``{"name": [["source", "target"], ...], ...}``.

    Returns:
        Pairs of words by name of the relation.

    Raises:
        InputError: with what is wrong in the file.

    Example:
        >>> with open("capitals.json", "w") as file:
        ...     _ = file.write('{"capital": [["France", "Paris"], ["Italy", "Rome"]]}')
        >>> hs.circuits.read_relations("capitals.json")
        {'capital': [('France', 'Paris'), ('Italy', 'Rome')]}
    """
    try:
        given = json.loads(read_text(Path(path)))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(given, Mapping) or not given:
        raise InputError(f'{path} must hold {{"name": [["source", "target"], ...]}}.')
    return {str(name): _pairs(name, pairs, path) for name, pairs in given.items()}


def _pairs(name: str, pairs: Any, path: "str | PathLike[str]") -> WordPairs:
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair)
        for pair in pairs
    )
    if not good:
        raise InputError(f"{name!r} in {path} is not a list of [source, target] pairs of words.")
    return [(source, target) for source, target in pairs]


@cache
def _word_lists() -> dict[str, WordPairs]:
    text = files("headscope.circuits").joinpath("data/relations.json").read_text(encoding="utf-8")
    return {name: [tuple(pair) for pair in pairs] for name, pairs in json.loads(text).items()}


def _single(model: HeadModel, text: str) -> int | None:
    """Id of a text that is a single known token; otherwise None."""
    tokenizer: Any = model.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id or ids[0] >= model.shape.d_vocab:
        return None
    return int(ids[0])


def _copy(model: HeadModel) -> TokenRelation:
    ids = ordinary_tokens(model)
    step = max(1, len(ids) // _MADE_PAIRS)
    chosen = ids[::step][:_MADE_PAIRS].to(model.device)
    return TokenRelation("copy", chosen, chosen, len(chosen))


def _case(model: HeadModel) -> TokenRelation:
    """Words that the vocabulary has in both cases: lower -> capital."""
    tokenizer: Any = model.tokenizer
    texts = {int(one): tokenizer.decode([int(one)]) for one in ordinary_tokens(model)}
    words = sorted({text.strip() for text in texts.values() if text.strip().isalpha()})
    pairs = [(word, word.capitalize()) for word in words if len(word) > 1 and word.islower()]
    known = set(words)
    return of_words(model, "case", [pair for pair in pairs if pair[1] in known][:_MADE_PAIRS])


@checked
@own_types()
def relation_scores(
    model: HeadModel,
    pairs: Mapping[str, TokenRelation] | None = None,
    k: int = 10,
    *,
    first_mlp: bool = True,
    fold_norm: bool = False,
    heads: "Sequence[str | tuple[int, int]] | None" = None,
    progress: bool | None = None,
) -> HeadTable:
    """Relation scores of every head: share of pairs whose target is in the source's top k.

    ``phi = mean(target in top_k((E[source] @ W_V @ W_O @ W_U.T)))``; scores are named ``maps_R``
    and, with the k smallest logits, ``maps_R_suppressed``. Range [0, 1]; chance is k / vocabulary.
    ``copy`` uses a tenth of k, rounded up, as in the paper: 1 for 10, 3 for 25. Biases are left
    out.

    Args:
        model: any model whose heads write linearly.
        pairs: relations; None: those of :func:`relations`.
        k: largest rank that counts; the paper uses 10, and 25 for large vocabularies.
        first_mlp: give heads above layer 0 the output of the first MLP on the embedding, alone, as
            the paper does; False: the raw embedding.
        fold_norm: fold the gains of the norms and centre; the paper does not.
        heads: only these; the others get no value. None: all.
        progress: show a progress bar; None: in a terminal or notebook.

    Returns:
        A table with two scores per relation, ``maps_R`` and ``maps_R_suppressed``.

    Raises:
        InputError: if there are no relations.

    Source: Elhelo and Geva 2024, "Inferring Functionality of Attention Heads from their Parameters"
    (MAPS). On ties the lowest token id wins.

    Example:
        >>> table = hs.circuits.relation_scores(model)
        >>> "copy" in list(table)[0]
        True
    """
    chosen = relations(model) if pairs is None else pairs
    if not chosen:
        raise InputError("there are no relations to score: none has enough pairs of single tokens.")
    words = Dictionary(model, "mlp_only" if first_mlp else "raw", fold_norm)
    asked = None if heads is None else [model.shape.check(HeadIndex.parse(one)) for one in heads]
    source = torch.cat([one.source for one in chosen.values()])
    target = torch.cat([one.target for one in chosen.values()])

    def ranks_of(factors: HeadFactors, advance: Advance | None = None) -> Ranks:
        def vectors(layer: int) -> Tensor:
            return words.inputs(source, layer)

        return target_ranks(
            factors, vectors, words.outputs, target, words.size, limit=k, advance=advance
        )

    size = (model.shape.n_layers, model.shape.n_heads)
    ranks = {side: np.full((*size, len(target)), np.nan) for side in Ranks._fields}
    if asked is None:
        factors = ov(model, fold_norm)
        with track(1, "scoring relations", show=progress) as advance:
            found = ranks_of(factors, advance)
        for side in Ranks._fields:
            ranks[side][list(factors.layers)] = getattr(found, side).cpu().numpy()
    for head in asked or ():
        found = ranks_of(ov(model, fold_norm, layers=[head.layer]).only(head))
        for side in Ranks._fields:
            ranks[side][head] = getattr(found, side)[0, 0].cpu().numpy()
    facts = of_weights(model, circuit="MAPS", k=k, first_mlp=first_mlp, fold_norm=fold_norm)
    scores, at = [], 0
    for name, one in chosen.items():
        limit = -(-k // 10) if name == "copy" else k
        for suffix, side in (("", "promoted"), ("_suppressed", "suppressed")):
            part = ranks[side][..., at : at + len(one)]
            scored = np.isfinite(part[..., 0])
            share = np.where(scored, (part < limit).mean(-1), np.nan)
            scores.append(
                HeadScores.from_summary(
                    f"maps_{name}{suffix}",
                    share,
                    kv_heads=model.shape.n_kv_heads,
                    n=scored * len(one),
                    unit="share of pairs",
                    bounds=(0.0, 1.0),
                    description=f"{'demotes' if suffix else 'promotes'} the {name} of a token",
                    source=f"MAPS, Elhelo and Geva 2024, k={limit}",
                    provenance=facts,
                )
            )
        at += len(one)
    return HeadTable(scores)


@dataclass(frozen=True, eq=False, repr=False)
class Mappings(Saved, Shown):
    """What one head maps its most salient tokens to.

    Attributes:
        head: address of the head.
        source: tokens, most salient first.
        saliency: norm of the output over norm of the input.
        promoted: tokens with the largest logits, for each source.
        suppressed: tokens with the smallest.
    """

    head: HeadIndex
    source: Int[Tensor, " source"]
    saliency: Float[Tensor, " source"]
    promoted: Int[Tensor, "source target"]
    suppressed: Int[Tensor, "source target"]

    def glance(self) -> Glance:
        """Show the most salient tokens and what they map to, as ids."""
        rows = [
            (str(source), number(size), " ".join(map(str, ids[:5])))
            for source, size, ids in zip(
                self.source.tolist(), self.saliency.tolist(), self.promoted.tolist(), strict=True
            )
        ]
        return Glance(
            f"mappings of {self.head}",
            [f"{len(rows)} source tokens"],
            ("source id", "saliency", "promoted ids"),
            rows[:10],
            hint="model.tokenizer.decode(mappings.promoted[0])",
        )


@checked
@own_types()
def salient_mappings(
    model: HeadModel,
    head: "str | tuple[int, int]",
    sources: int = 20,
    targets: int = 10,
    *,
    first_mlp: bool = True,
    fold_norm: bool = False,
) -> Mappings:
    """Strongest mappings of one head: tokens by ``|e @ W_OV| / |e|``, and their outputs.

    The first MLP is applied as in :func:`relation_scores`, only above layer 0 (the paper's saliency
    figures applied it in layer 0 too).

    Source: Elhelo and Geva 2024, section 3.

    Args:
        model: model whose heads write linearly.
        head: head to read, e.g. ``"L5H1"``.
        sources: number of source tokens to return.
        targets: number of output tokens per source.
        first_mlp: use embeddings after the first MLP for heads above layer 0.
        fold_norm: fold in the gains of norms and centre.

    Returns:
        Source tokens with their saliency, and the most promoted and most suppressed tokens of each.

    Example:
        >>> found = hs.circuits.salient_mappings(model, "L2H1", sources=3, targets=2)
        >>> type(found).__name__
        'Mappings'
    """
    index = model.shape.check(HeadIndex.parse(head))
    factors = ov(model, fold_norm, layers=[index.layer])
    left = factors.left[0, model.shape.kv_head(index.head)]
    right = factors.right[0, index.head]
    words = Dictionary(model, "mlp_only" if first_mlp else "raw", fold_norm)
    gram, parts = right @ right.T, []
    for block in words.blocks():
        x = words.inputs(block, index.layer)
        inner = x @ left
        written = ((inner @ gram) * inner).sum(-1).clamp_min(0).sqrt()
        parts.append(written / x.norm(dim=-1).clamp_min(1e-12))
    saliency = torch.cat(parts)
    order = saliency.argsort(descending=True, stable=True)[:sources]
    writes = words.inputs(order, index.layer) @ left @ right
    logits = torch.cat([writes @ words.outputs(block).T for block in words.blocks()], 1)
    most = logits.argsort(dim=1, descending=True, stable=True)[:, :targets]
    least = logits.argsort(dim=1, stable=True)[:, :targets]
    return Mappings(index, order, saliency[order], most, least)
