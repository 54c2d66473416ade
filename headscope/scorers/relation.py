"""Attention along a user-defined relation: (query, key) pairs, passed or marked in the probe."""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError
from headscope.probes.probe import Probe, pairs_of_examples
from headscope.scorer import (
    OTHER_EXAMPLE,
    TEXT,
    Control,
    DefaultProbe,
    Scorer,
    every_query,
    queries_at,
    row_scorer,
    without_sink,
)
from headscope.views import AttentionRows

PairsLike = Tensor | Sequence[Sequence[Sequence[int]]]
PairsOf = Callable[[Probe], PairsLike]
_SOURCE = "user-defined relation; evenness as of clustering heads, Cabannes et al. 2024"


class Relation(NamedTuple):
    """Five scorers of one relation; pass them to ``hs.score`` together or singly.

    ``A`` is a row of attention, ``J`` the visible keys that the query is paired with, and ``m`` the
    number of visible keys; each score is a mean over the queries that have a pair.

    Attributes:
        mass: ``sum of A over J``, a probability.
        lift: ``mass * m / |J|``: the mass relative to uniform attention, from 0; 1 by chance.
        hit: 1 if the most attended key (on ties the first) is in J, else 0; ``|J| / m`` by chance.
        auroc: probability that a key in J gets more attention than a visible key outside it, ties
            counting half; 0.5 by chance. NaN if all visible keys are in J.
        evenness: entropy of A within J over ``log |J|``: 1 if all keys in J get the same. NaN for
            fewer than two keys, or no mass.
    """

    mass: Scorer
    lift: Scorer
    hit: Scorer
    auroc: Scorer
    evenness: Scorer

    @property
    def no_sink(self) -> "Relation":
        """The same scorers without the first position; names end in ``_no_sink``."""
        return Relation(*map(without_sink, self))


@checked
def relation(
    name: str,
    pairs: PairsOf | PairsLike | None = None,
    *,
    control: str | Control | None = OTHER_EXAMPLE,
    probe: str | DefaultProbe = TEXT,
    threshold: float | None = None,
    source: str = _SOURCE,
) -> Relation:
    """Make the scorers of a relation: any set of (query, key) pairs per example.

    Args:
        name: name of the relation; the scores are ``name_mass``, ``name_lift``, ``name_hit``,
            ``name_auroc`` and ``name_evenness``.
        pairs: a function of the probe (called with some of its examples at a time), or its result
            for the whole probe: a Boolean ``[batch query key]``, dense or sparse; integers ``[pair
            3]`` of example, query and key; or per example a list of ``(query, key)``. Positions
            count from the start of the row, padding included. Default: the probe's own pairs of
            this name (``probe.pairs[name]``, as ``hs.probes.from_jsonl`` reads them).
        control: ``other_example``: the same rows with the pairs of another example of the same
            length, which exposes heads that attend to fixed positions (examples without a peer are
            left out of the test); ``flat``: uniform attention; None: no null.
        probe: default kind of probe.
        threshold: mass from which a significant head is named after the relation.
        source: source of the definition.

    Raises:
        InputError: when scored, if the pairs do not fit the probe.

    Example:
        >>> def three_back(probe):
        ...     keys = torch.arange(probe.length)
        ...     return (keys[:, None] - keys == 3).expand(len(probe), -1, -1)
        >>> table = hs.score(model, probe, relation("three_back", three_back, control="flat"))
        >>> list(table)[:2]
        ['three_back_mass', 'three_back_lift']
    """
    given = _Given(name, pairs)

    def made(kind: str, unit: str, most: float | None, value: _Value) -> Scorer:
        def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
            return value(rows, given.keys(probe, rows))

        function.__doc__ = f"{_SAID[kind]} of the relation {name!r}."
        return row_scorer(
            name=f"{name}_{kind}",
            unit=unit,
            bounds=(0.0, most),
            source=source,
            queries=given.queries,
            probe=probe,
            control=control,
            threshold=threshold if kind == "mass" else None,
            alternative="two-sided" if kind == "evenness" else "greater",
        )(function)

    return Relation(
        mass=made("mass", "attention", 1.0, AttentionRows.mass),
        lift=made("lift", "ratio", None, _lift),
        hit=made("hit", "share", 1.0, _hit),
        auroc=made("auroc", "share", 1.0, _auroc),
        evenness=made("evenness", "share", 1.0, _evenness),
    )


_Value = Callable[
    [AttentionRows, Bool[Tensor, "batch query key"]], Float[Tensor, "batch head query"]
]
_SAID = {
    "mass": "Attention on the keys",
    "lift": "Attention on the keys over what even attention gives them",
    "hit": "Share of the queries whose most attended key is one of the keys",
    "auroc": "Share of the pairs of a key and another one in which the key gets more attention",
    "evenness": "Evenness of the attention among the keys",
}


class _Given:
    """User-supplied pairs, converted to sets of keys for the rows of a chunk."""

    def __init__(self, name: str, pairs: PairsOf | PairsLike | None) -> None:
        self._name = name
        if pairs is None:
            self._pairs: PairsOf | Int[Tensor, "pair 3"] | None = None
        elif callable(pairs):
            self._pairs = pairs
        else:
            self._pairs = as_triples(name, pairs)
        self._known: WeakKeyDictionary[Probe, Int[Tensor, "pair 3"]] = WeakKeyDictionary()

    def triples(self, probe: Probe) -> Int[Tensor, "pair 3"]:
        """``(example, query, key)`` of every pair of these examples."""
        if probe not in self._known:
            self._known[probe] = self._read(probe)
        return self._known[probe]

    def _read(self, probe: Probe) -> Int[Tensor, "pair 3"]:
        size = (len(probe), probe.length)
        if self._pairs is None:
            found = probe.related(self._name)
        elif callable(self._pairs):
            found = as_triples(self._name, self._pairs(probe), size)
        else:
            number = probe.facts.get("example", torch.arange(len(probe))).long().cpu()
            found = pairs_of_examples(self._pairs.cpu(), number)
        check_triples(self._name, found, size)
        return found.to(probe.tokens.device)

    def queries(self, probe: Probe) -> Bool[Tensor, "batch pos"]:
        """Mask of the queries that have a pair, each example's first position excluded."""
        example, query, _ = self.triples(probe).unbind(1)
        paired = torch.zeros_like(probe.real)
        paired[example, query] = True
        return every_query(probe) & paired

    def keys(self, probe: Probe, rows: AttentionRows) -> Bool[Tensor, "batch query key"]:
        """Mask of the keys paired with each query of a chunk, without a device sync."""
        device = rows.pattern.device
        example, query, key = self.triples(probe).to(device).unbind(1)
        n_queries, n_keys = rows.pattern.shape[2:]
        place = torch.full((probe.length,), n_queries, device=device)
        place[rows.query_pos.to(device)] = torch.arange(n_queries, device=device)
        room = torch.zeros(len(probe), n_queries + 1, n_keys + 1, dtype=torch.bool, device=device)
        room[example, place[query], key.clamp_max(n_keys)] = True  # padding goes to the margin
        keys: Tensor = room[:, :n_queries, :n_keys]
        return keys


def as_triples(
    name: str, pairs: PairsLike, size: tuple[int, int] | None = None
) -> Int[Tensor, "pair 3"]:
    """Convert pairs to sorted, unique ``(example, query, key)`` triples.

    Args:
        name: name of the relation, for messages.
        pairs: in any form that :func:`relation` takes.
        size: numbers of examples and positions that a Boolean tensor must have.

    Raises:
        InputError: if the pairs have another form.
    """
    if not isinstance(pairs, Tensor):
        try:
            rows = [[i, int(q), int(k)] for i, one in enumerate(pairs) for q, k in one]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the pairs of {name!r} are neither tensors nor lists of (query, key): {error}."
            ) from error
        pairs = torch.tensor(rows, dtype=torch.long).reshape(-1, 3)
    if pairs.ndim == 2 and pairs.shape[1] == 3 and pairs.dtype in (torch.int32, torch.int64):
        distinct: Tensor = pairs.long().unique(dim=0)
        return distinct
    if pairs.ndim != 3 or (size is not None and tuple(pairs.shape) != (size[0], size[1], size[1])):
        wanted = "[batch query key]" if size is None else f"{[size[0], size[1], size[1]]}"
        raise InputError(
            f"the pairs of {name!r} have shape {list(pairs.shape)}: a Boolean tensor {wanted} or "
            "whole numbers [pair 3] are needed."
        )
    if pairs.layout != torch.strided:
        whole = pairs.to_sparse_coo().to(torch.int32).coalesce()
        there: Tensor = whole.indices().T[whole.values() != 0]
        return there
    return (pairs != 0).nonzero()


def check_triples(name: str, triples: Int[Tensor, "pair 3"], size: tuple[int, int]) -> None:
    """Raise InputError if a pair lies outside the probe."""
    if not len(triples):
        return
    low, high = int(triples.min()), triples.amax(0).tolist()
    if low < 0 or high[0] >= size[0] or max(high[1:]) >= size[1]:
        raise InputError(
            f"the pairs of {name!r} go up to example {high[0]}, query {high[1]}, key {high[2]}: "
            f"the probe has {size[0]} examples of {size[1]} positions, counted from 0."
        )


def _lift(
    rows: AttentionRows, keys: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head query"]:
    shown = rows.visible.sum(-1)
    paired = (keys & rows.visible).sum(-1)
    return rows.mass(keys) * (shown / paired.clamp_min(1))[:, None]


def _hit(
    rows: AttentionRows, keys: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head query"]:
    reachable = keys & rows.visible
    best = rows.pattern.argmax(-1)
    found = reachable[:, None].expand(-1, best.shape[1], -1, -1).gather(-1, best[..., None])[..., 0]
    hit: Tensor = found.float().masked_fill(~reachable.any(-1)[:, None], torch.nan)
    return hit


def _auroc(
    rows: AttentionRows, keys: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head query"]:
    reachable = (keys & rows.visible)[:, None]
    hidden = (~rows.visible).sum(-1)[:, None]
    paired, shown = reachable.sum(-1), rows.visible.sum(-1)[:, None]
    values = rows.pattern.masked_fill(~rows.visible[:, None], -1.0)
    ordered = values.sort(-1).values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    rank = (below + upto) / 2 - hidden[..., None]  # visible keys below, ties count half
    won = (rank * reachable).sum(-1) - paired**2 / 2  # minus wins among the set's own keys
    others = shown - paired
    share: Tensor = won / (paired * others).clamp_min(1)
    return share.masked_fill((paired * others) == 0, torch.nan)


def _evenness(
    rows: AttentionRows, keys: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head query"]:
    reachable = keys & rows.visible
    paired = reachable.sum(-1)[:, None]
    inside = rows.pattern * reachable[:, None]
    mass = inside.sum(-1)
    entropy = torch.special.entr(inside / mass.clamp_min(1e-30)[..., None]).sum(-1)
    even: Tensor = entropy / paired.clamp_min(2).log()
    return even.clamp(0, 1).masked_fill((paired < 2) | (mass <= 0), torch.nan)


_IOI_THRESHOLD = 0.25


@checked
def between(
    query: str,
    key: str,
    *,
    name: str | None = None,
    probe: str = "ioi",
    source: str = "user",
    threshold: float | None = None,
    needs: tuple[str, ...] = (),
) -> Scorer:
    """Make a scorer of attention from the positions of one mark to those of another.

    ``sum of A[i, j] over the keys marked key``, a probability in [0, 1], over the queries marked
    ``query``; NaN where none of the keys is visible.

    Weakness: where a head looks does not tell what it does there; see ``direct_logit_difference``
    and ablation. The null is uniform attention, from which every head deviates a little: with 32
    prompts of one template even .001 is significant, so set a meaningful ``threshold``. The scorers
    of the IOI circuit require a quarter, about half of what the source's name movers and
    S-inhibition heads give on average.

    Args:
        query: name of the mark on query positions.
        key: name of the mark on key positions.
        name: name of the scorer. Default: ``{query}_to_{key}``.
        probe: default probe.
        source: paper or origin of the scorer.
        threshold: smallest score of a head with this role; None: no role.
        needs: model capabilities that the scorer needs.

    Returns:
        The scorer.

    Example:
        >>> between("end", "io").name
        'end_to_io'
    """

    def queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
        probe.mark(key)  # so that a missing mark is reported before any forward pass
        return queries_at(query)(probe)

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        return rows.column_mass(probe.mark(key))

    function.__doc__ = f"Attention from '{query}' to '{key}'."
    return row_scorer(
        name=name or f"{query}_to_{key}",
        probe=probe,
        queries=queries,
        source=source,
        threshold=threshold,
        needs=needs,
    )(function)


def _ioi(name: str, query: str, key: str, what: str) -> Scorer:
    source = f"Wang et al. 2022 (arXiv 2211.00593), {what}"
    return between(
        query, key, name=f"ioi_{name}", source=source, threshold=_IOI_THRESHOLD, needs=("causal",)
    )


name_mover = _ioi("name_mover", "end", "io", "name movers")
s_inhibition = _ioi("s_inhibition", "end", "s2", "S-inhibition")
ioi_induction = _ioi("induction", "s2", "s1_next", "induction")
ioi_duplicate = _ioi("duplicate_token", "s2", "s1", "duplicate")
ioi_previous = _ioi("previous_token", "s1_next", "s1", "previous")
