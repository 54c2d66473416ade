"""Sets of token pairs that stand in one relation, made for a model's own vocabulary."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headscope.errors import InputError
from headscope.files import read_text
from headscope.models.protocol import HeadModel
from headscope.probes.vocabulary import ordinary_tokens

WordPairs = list[tuple[str, str]]
# Pairs of a relation that is made from the whole vocabulary.
_MADE_PAIRS = 200
# Fewer pairs than this say nothing of a head.
_MIN_PAIRS = 5


@dataclass(frozen=True, eq=False)
class Relation:
    """Pairs of single tokens (source, target) of one vocabulary.

    Attributes:
        name: of the relation.
        source: token ids that a head attends to.
        target: token ids that it should promote.
        words: how many pairs there were before those of several tokens were left out.
    """

    name: str
    source: Int[Tensor, " pair"]
    target: Int[Tensor, " pair"]
    words: int

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.source)


def relations(model: HeadModel, path: "str | PathLike[str] | None" = None) -> dict[str, Relation]:
    """Relations that this model's vocabulary can express with single tokens.

    Built in: ``copy`` (without a tokenizer the only one), ``case`` (Word and word),
    ``digit_successor``, and word lists: plural, opposite, country_capital, comparative,
    past_tense, month/weekday/number_word successors, pronoun_possessive. Words are looked up
    with a leading space, as in running text, else without. Relations with fewer than five pairs
    left are dropped.

    Args:
        model: whose tokenizer decides.
        path: JSON of your own, ``{"name": [["source", "target"], ...]}``, instead of the lists.

    Raises:
        InputError: if the file holds something else.

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


def of_words(model: HeadModel, name: str, pairs: Iterable[tuple[str, str]]) -> Relation:
    """Relation from pairs of words; those that are not single tokens are left out."""
    listed = list(pairs)
    found = []
    for source, target in listed:
        for prefix in (" ", ""):
            ids = [_single(model, prefix + word) for word in (source, target)]
            if None not in ids:
                found.append(ids)
                break
    columns = torch.tensor(found, dtype=torch.long, device=model.device).reshape(-1, 2)
    return Relation(name, columns[:, 0], columns[:, 1], len(listed))


def read_relations(path: "str | PathLike[str]") -> dict[str, WordPairs]:
    """Read pairs of words from JSON.

    Raises:
        InputError: naming what is wrong with the file.

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
    """Id of a text that is one token, and known; else None."""
    tokenizer: Any = model.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id or ids[0] >= model.shape.d_vocab:
        return None
    return int(ids[0])


def _copy(model: HeadModel) -> Relation:
    ids = ordinary_tokens(model)
    step = max(1, len(ids) // _MADE_PAIRS)
    chosen = ids[::step][:_MADE_PAIRS].to(model.device)
    return Relation("copy", chosen, chosen, len(chosen))


def _case(model: HeadModel) -> Relation:
    """Words of which the vocabulary has both cases: lower -> capital."""
    tokenizer: Any = model.tokenizer
    texts = {int(one): tokenizer.decode([int(one)]) for one in ordinary_tokens(model)}
    words = sorted({text.strip() for text in texts.values() if text.strip().isalpha()})
    pairs = [(word, word.capitalize()) for word in words if len(word) > 1 and word.islower()]
    known = set(words)
    return of_words(model, "case", [pair for pair in pairs if pair[1] in known][:_MADE_PAIRS])
