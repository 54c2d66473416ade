"""Probes of random tokens: repeated sequences, key-value recall, and trees."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError, nearest, whole
from headscope.probes.encoding import (
    HasVocabulary,
    check_length,
    frame,
    from_tokens,
    next_tokens,
    ordinary_tokens,
    reads_onwards,
)
from headscope.probes.probe import Probe


@checked
def repeated_tokens(
    model: HasVocabulary,
    length: int = 50,
    batch: int = 8,
    seed: int = 0,
    copies: int = 2,
    *,
    bos: bool | None = None,
) -> Probe:
    """Make sequences ``[BOS] R R`` of repeated random tokens; ``[CLS] R R [SEP]`` for an encoder.

    R is drawn uniformly from the vocabulary, without repeats if the vocabulary is large enough, so
    each query of the second copy has exactly one earlier occurrence; in a smaller vocabulary tokens
    are drawn with replacement, and ``structure`` (the tokens themselves) shows every occurrence.

    Marks ``first_copy`` and ``second_copy`` (all later copies). Targets are the next tokens; an
    encoder, which sees them, has none. The control is paired: each later copy is a permutation of
    the example's first. Every other token of a copy stays in place, and the rest are permuted
    without fixed points, so that no token follows the one that it followed before. ``structure`` is
    kept at the tokens that moved: a scorer then looks, at the same positions, for a key that holds
    a token of R which has not occurred yet in the later copy, as in the probe. A head that only
    looks back a fixed distance scores the same as before, and so does a head whose attention
    depends on which tokens there are but not on their order. With fewer than three tokens in R
    nothing can be permuted; the later copies of the control are then new tokens.

    Args:
        model: tokens are drawn from its vocabulary; no tokenizer is needed.
        length: tokens in R.
        batch: number of examples.
        seed: the same seed gives the same bytes.
        copies: number of copies of R.
        bos: whether to prepend a BOS; None follows the model's tokenizer.

    Raises:
        InputError: if the text exceeds the model's context, or a number is too small.

    Example:
        >>> probe = hs.probes.repeated_tokens(model, length=5, batch=2)
        >>> probe.tokens.shape == (2, 1 + 5 + 5)  # a BOS in front, since this model uses one
        True
    """
    if copies < 2:
        raise InputError(f"copies={copies}: give 2 or more.")
    draw = _Draw(model, whole(length, "length") * copies, batch, seed, bos)
    part = draw(length)
    tokens = draw.framed(part.repeat(1, copies))
    start, said = len(draw.prefix), length * copies
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    marks = {
        "first_copy": (position >= start) & (position < start + length),
        "second_copy": (position >= start + length) & (position < start + said),
    }
    settings = {
        "length": length,
        "copies": copies,
        "bos": start > 0,
        "replacement": draw.replaces(length),
    }
    probe = draw.probe(tokens, "repeated_tokens", settings)
    later, moved = _unrepeated(draw, part, copies)
    control = draw.probe(
        draw.framed(torch.cat([part, later], 1)), "repeated_tokens_control", settings
    )
    asked = torch.ones_like(tokens, dtype=torch.bool)
    asked[:, start + length : start + said] = moved
    control = replace(control, structure=tokens.where(asked, -1), marks=marks, paired=True)
    return replace(probe, marks=marks, control=control)


def _unrepeated(
    draw: "_Draw", part: Int[Tensor, "batch pos"], copies: int
) -> tuple[Int[Tensor, "batch later"], Bool[Tensor, "batch later"]]:
    """The control's later copies, and a mask of the tokens that were permuted.

    Even places are permuted in half of the examples and odd ones in the others, so that over all
    examples every place counts alike.
    """
    batch, length = part.shape
    if length < 3:
        new = draw(length * (copies - 1))
        return new, torch.ones_like(new, dtype=torch.bool)
    later = part.repeat(1, copies - 1).unflatten(1, (copies - 1, length))
    moved = torch.zeros_like(later, dtype=torch.bool)
    for row in range(batch):
        first = row % 2 if length > 3 else 0  # of three tokens only both ends can be swapped
        for copy in range(copies - 1):
            places = torch.arange(first, length, 2)
            order = places[torch.randperm(len(places), generator=draw.generator)]
            later[row, copy, order] = part[row, order.roll(1)]
            moved[row, copy, order] = True
            # The token after a permuted one must stay in place, which fails at the end of an odd
            # number of places.
            moved[row, copy, -1] &= first == 1
    return later.flatten(1), moved.flatten(1)


@checked
def random_tokens(
    model: HasVocabulary,
    length: int = 100,
    batch: int = 8,
    seed: int = 0,
    *,
    bos: bool | None = None,
) -> Probe:
    """Make sequences of ``length`` random tokens, without repeats if the vocabulary allows.

    With a BOS if the model uses one. The same form as the control of :func:`repeated_tokens`.

    Args:
        model: model whose vocabulary is used.
        length: number of random tokens per example.
        batch: number of examples.
        seed: seed for the tokens.
        bos: prepend a BOS. Default: if the model's tokenizer does.

    Returns:
        A probe ``[batch pos]`` with next-token targets.

    Example:
        >>> hs.probes.random_tokens(model, length=8, batch=3).length
        9
    """
    draw = _Draw(model, length, batch, seed, bos)
    tokens = draw.framed(draw(length))
    settings = {
        "length": length,
        "bos": len(draw.prefix) > 0,
        "replacement": draw.replaces(length),
    }
    return draw.probe(tokens, "random_tokens", settings)


class _Draw:
    """Seeded source of random rows over one model's vocabulary."""

    def __init__(
        self, model: HasVocabulary, length: int, batch: int, seed: int, bos: bool | None
    ) -> None:
        for name, value in (("length", length), ("batch", batch)):
            if whole(value, name) < 1:
                raise InputError(f"{name}={value}: give 1 or more.")
        self.batch, self.seed = batch, seed
        self.prefix, self.suffix = frame(model, bos)
        self.onwards = reads_onwards(model)
        check_length(
            model,
            length + len(self.prefix) + len(self.suffix),
            what="the probe",
            fix="ask for a smaller length",
        )
        self.vocabulary = ordinary_tokens(model)
        self.generator = torch.Generator().manual_seed(seed)

    def replaces(self, length: int) -> bool:
        """Whether ``length`` different tokens are not available."""
        return length > len(self.vocabulary)

    def __call__(self, length: int) -> Int[Tensor, "batch pos"]:
        size = len(self.vocabulary)
        if self.replaces(length):
            index = torch.randint(size, (self.batch, length), generator=self.generator)
        else:
            rows = [torch.randperm(size, generator=self.generator) for _ in range(self.batch)]
            index = torch.stack([row[:length] for row in rows])
        return self.vocabulary[index]

    def framed(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch longer"]:
        """Add the tokens that the model expects around a text: a BOS, or [CLS] and [SEP]."""
        before, after = (
            torch.tensor(ids).expand(self.batch, -1).long() for ids in (self.prefix, self.suffix)
        )
        return torch.cat([before, tokens, after], 1)

    def probe(
        self,
        tokens: Int[Tensor, "batch pos"],
        name: str,
        settings: Mapping[str, str | int | float | bool | None],
    ) -> Probe:
        """Make a probe of these tokens, all real, with themselves as structure and targets."""
        real = torch.ones_like(tokens, dtype=torch.bool)
        return Probe(
            tokens=tokens,
            real=real,
            structure=tokens,
            targets=next_tokens(tokens, real) if self.onwards else torch.full_like(tokens, -1),
            next_token=self.onwards,
            name=name,
            seed=self.seed,
            settings=settings,
        )


@checked
def recall(
    keys: Sequence[int],
    values: Sequence[int],
    *,
    pairs: int = 4,
    batch: int = 8,
    ask: str = "key",
    corrupt: str = "key",
    start: Sequence[int] = (0,),
    end: Sequence[int] = (),
    seed: int = 0,
) -> Probe:
    """Make associative-recall texts ``start k1 v1 ... kn vn end q``; the answer is q's partner.

    Marks ``key`` and ``value`` (of the queried pair), ``others`` (the other pairs) and ``query``,
    the last position, whose target is the answer. In the corrupt pair the queried key (or value) is
    replaced with another that the text does not contain.

    Args:
        keys: token ids to draw keys from; at least ``pairs`` plus one.
        values: the same for values, disjoint from the keys.
        pairs: number of pairs in a text.
        batch: number of texts.
        ask: ``key``: q is a key and the answer its value; ``value``: the other way round.
        corrupt: what to replace: ``key`` or ``value``.
        start: leading tokens, e.g. a BOS.
        end: tokens between the pairs and the query.
        seed: seed of the draw.

    Raises:
        InputError: if there are too few keys or values, or a token is both.

    Source: Arora et al. 2023, "Zoology" (arXiv 2312.04927); with a replaced key as in mechanistic
    evaluations of state-space models.

    Example:
        >>> probe = hs.probes.recall(range(1, 6), range(6, 11), pairs=3, batch=2)
        >>> probe.tokens.shape, int(probe.mark("query").sum())
        (torch.Size([2, 8]), 2)
    """
    keys, values = _ids(keys, "keys"), _ids(values, "values")
    _one_of(ask, "ask")
    _one_of(corrupt, "corrupt")
    least = whole(pairs, "pairs") + 1
    if set(keys) & set(values) or min(len(keys), len(values)) < least or pairs < 1:
        raise InputError(
            f"recall of {pairs} pairs: give {least} keys and {least} values at least (one of each "
            f"to replace with), none of them both; got {len(keys)} and {len(values)}."
        )
    drawn = np.random.default_rng(seed)
    first = len(start)
    length = first + 2 * pairs + len(end) + 1
    tokens, other, targets = (np.full((whole(batch, "batch"), length), -1) for _ in range(3))
    marks = {name: np.zeros(tokens.shape, bool) for name in ("key", "value", "others", "query")}
    for row in range(batch):
        k, v = (drawn.permutation(ids)[:least] for ids in (keys, values))
        chosen = int(drawn.integers(pairs))
        body = np.stack([k[:pairs], v[:pairs]], 1)
        question, answer = body[chosen] if ask == "key" else body[chosen][::-1]
        tokens[row] = [*start, *body.ravel(), *end, question]
        body[chosen, int(corrupt == "value")] = (k if corrupt == "key" else v)[pairs]
        other[row] = [*start, *body.ravel(), *end, question]
        targets[row, -1] = answer
        marks["key"][row, first + 2 * chosen] = True
        marks["value"][row, first + 2 * chosen + 1] = True
        marks["others"][row, first : first + 2 * pairs] = True
        marks["others"][row, first + 2 * chosen : first + 2 * chosen + 2] = False
        marks["query"][row, -1] = True
    settings: dict[str, str | int] = {"pairs": pairs, "ask": ask, "corrupt": corrupt}
    return _probe("recall", tokens, other, targets, marks, settings, seed)


@checked
def tree_recall(
    labels: Sequence[int],
    opening: int,
    closing: int,
    *,
    nodes: int = 6,
    batch: int = 8,
    ask: str = "parent",
    start: Sequence[int] = (0,),
    end: Sequence[int] = (),
    seed: int = 0,
) -> Probe:
    """Make random bracketed trees, ``start ( a ( b ) ( c ( d ) ) ) end q``, asking for q's parent.

    Every node has a unique label; a new node is attached to a random earlier one. Looking up a
    neighbour is not enough: the parent may be far from the child. Marks ``parent`` and ``child``
    (of the queried edge), ``others`` (the other labels) and ``query``, the last position, whose
    target is the answer. In the corrupt pair the answer's label is replaced with another that the
    text does not contain.

    Args:
        labels: token ids to draw labels from; at least ``nodes`` plus one.
        opening: opening bracket, before a label.
        closing: closing bracket, after a label's children.
        nodes: number of nodes in a tree, at least two.
        batch: number of texts.
        ask: ``parent``: q is a child and the answer its parent; ``child``: q is a node with one
            child, which is the answer.
        start: leading tokens, e.g. a BOS.
        end: tokens between the tree and the query.
        seed: seed of the draw.

    Raises:
        InputError: if there are too few labels, or a bracket is one.

    Source: our own, after the associative tree recall used to evaluate state-space models.

    Example:
        >>> probe = hs.probes.tree_recall(range(3, 12), 1, 2, nodes=4, batch=1)
        >>> probe.tokens.shape
        torch.Size([1, 14])
    """
    labels = _ids(labels, "labels")
    if ask not in ("parent", "child"):
        raise InputError(nearest(str(ask), ("parent", "child"), kind="ask"))
    if whole(nodes, "nodes") < 2 or len(labels) <= nodes or {opening, closing} & set(labels):
        raise InputError(
            f"a tree of {nodes} nodes: give {nodes + 1} labels at least (one to replace with) that "
            f"differ from the brackets, and 2 nodes or more; got {len(labels)} labels."
        )
    drawn = np.random.default_rng(seed)
    length = len(start) + 3 * nodes + len(end) + 1
    tokens, other, targets = (np.full((whole(batch, "batch"), length), -1) for _ in range(3))
    marks = {name: np.zeros(tokens.shape, bool) for name in ("parent", "child", "others", "query")}
    for row in range(batch):
        names = drawn.permutation(labels)[: nodes + 1]
        parents, edges = _tree(drawn, nodes, ask)
        parent, child = edges[int(drawn.integers(len(edges)))]
        question, answer = (child, parent) if ask == "parent" else (parent, child)
        body = _written(parents, 0)
        text = np.array([*start, *(_token(part, names, opening, closing) for part in body), *end])
        tokens[row, :-1], tokens[row, -1] = text, names[question]
        places = {part: len(start) + at for at, part in enumerate(body) if part >= 0}
        other[row] = tokens[row]
        other[row, places[answer]] = names[nodes]
        targets[row, -1] = names[answer]
        for mark, at in (("parent", places[parent]), ("child", places[child]), ("query", -1)):
            marks[mark][row, at] = True
        for node, at in places.items():
            marks["others"][row, at] = node not in (parent, child)
    return _probe("tree_recall", tokens, other, targets, marks, {"nodes": nodes, "ask": ask}, seed)


_OPEN, _CLOSE = -2, -3


def _tree(
    drawn: np.random.Generator, nodes: int, ask: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Parent of every node, -1 at the root, and the edges that can be queried, at least one."""
    while True:
        parents = [-1, *(int(drawn.integers(node)) for node in range(1, nodes))]
        edges = [(parents[node], node) for node in range(1, nodes)]
        if ask == "child":
            edges = [(a, b) for a, b in edges if parents.count(a) == 1]
        if edges:
            return parents, edges


def _written(parents: Sequence[int], node: int) -> list[int]:
    """A node and its descendants, as nodes and brackets."""
    below = [child for child, parent in enumerate(parents) if parent == node]
    return [_OPEN, node, *(part for child in below for part in _written(parents, child)), _CLOSE]


def _token(part: int, names: np.ndarray, opening: int, closing: int) -> int:
    return opening if part == _OPEN else closing if part == _CLOSE else int(names[part])


def _ids(given: Sequence[int], name: str) -> list[int]:
    ids = [whole(one, name) for one in given]
    if len(set(ids)) < len(ids) or min(ids, default=-1) < 0:
        raise InputError(f"{name}: give different token ids, from 0 on.")
    return ids


def _one_of(given: str, name: str) -> None:
    if given not in ("key", "value"):
        raise InputError(nearest(str(given), ("key", "value"), kind=name))


def _probe(
    name: str,
    tokens: np.ndarray,
    other: np.ndarray,
    targets: np.ndarray,
    marks: dict[str, np.ndarray],
    settings: dict[str, str | int],
    seed: int,
) -> Probe:
    """The probe with its corrupt pair; both have the marks and the answers of the clean one."""
    made = [
        replace(
            from_tokens(torch.from_numpy(one)),
            targets=torch.from_numpy(targets),
            marks={mark: torch.from_numpy(where) for mark, where in marks.items()},
            name=name,
            seed=seed,
            settings=settings,
        )
        for one in (tokens, other)
    ]
    return replace(made[0], corrupt=made[1])
