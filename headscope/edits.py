"""Edits: interventions on heads, as values.

Each function takes heads (``"L5H1"``, ``"5.1"``, ``(5, 1)``, one or several) and gives a frozen
:class:`HeadEdit`, for ``model.forward(..., edits=...)``, for ``model.edited(...)`` and for
:func:`headscope.ablate_heads`. A head's slice is taken before the output projection: after it
there are no heads. Values that an edit needs (means, other runs) are captured beforehand, by
:func:`headscope.ablation.head_means` and :func:`headscope.ablation.head_values`; they are data.

``positions`` limits an edit to marked positions, e.g. ``probe.mark("end")``; ``scope`` to the
prompt (``prefill``) or to what is generated after it (``decode``). Which is which is a fact of the
pass, not of its size: a prompt of one token is a prompt. ``model.forward`` reads prompts; of
transformers' ``generate`` the prompt is what it was given; in your own loop, what extends a
cache is decoding.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex


@dataclass(frozen=True)
class Span:
    """Positions of one pass, as a fact of the pass: never guessed from the shape of a tensor.

    Attributes:
        first: position of the first query, counted among all keys, padding included.
        count: how many positions the pass runs.
        prompt: positions before this one are read as a prompt (``prefill``), those from it on are
            generated (``decode``).
        grows: whether the text may go on after the pass.
        real: of the text up to the last position that runs, False at padding; None where there is
            none.
    """

    first: int
    count: int
    prompt: int
    grows: bool = False
    real: Bool[Tensor, "batch pos"] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def whole(cls, length: int) -> "Span":
        """A text that is read at once: all of it is prompt.

        Example:
            >>> hs.edits.Span.whole(5).prompt
            5
        """
        return cls(0, length, length)

    @property
    def end(self) -> int:
        """Position after the last."""
        return self.first + self.count

    @property
    def is_whole(self) -> bool:
        """Whether the pass reads the whole text at once."""
        return self == Span.whole(self.count)

    def last(self, count: int) -> "Span":
        """The same pass over its last ``count`` positions, which may reach back into its cache.

        Example:
            >>> hs.edits.Span(first=7, count=1, prompt=7).last(8).first
            0
        """
        return replace(self, first=self.end - count, count=count)

    def part(self, first: int, count: int) -> "Span":
        """Some of the pass's own positions, counted from its first.

        Example:
            >>> hs.edits.Span.whole(10).part(4, 2)
            Span(first=4, count=2, prompt=10, grows=False)
        """
        return replace(self, first=self.first + first, count=count)


HeadSite = Literal["z", "query", "key", "value", "pattern"]
Scope = Literal["all", "prefill", "decode"]
Positions = Bool[Tensor, "batch pos"] | None
Heads = str | tuple[int, int] | Iterable[str | tuple[int, int]]

SITES: tuple[HeadSite, ...] = ("query", "key", "value", "pattern", "z")


def head_list(heads: Heads) -> tuple[HeadIndex, ...]:
    """Read one head or several, named ``"L5H1"``, ``"5.1"`` or ``(5, 1)``; doubles go.

    Raises:
        InputError: if one is not a head address.

    Example:
        >>> hs.edits.head_list(["L1H0", "0.2", (2, 1)])
        (L1H0, L0H2, L2H1)
    """
    if not isinstance(heads, Iterable):
        raise InputError(f"heads={heads!r}: name heads as 'L5H1', '5.1' or (5, 1), or give a list.")
    given: list[Any] = [heads] if isinstance(heads, str) else list(heads)
    if len(given) == 2 and all(isinstance(part, int) for part in given):
        given = [tuple(given)]  # one head, (layer, head)
    return tuple(dict.fromkeys(HeadIndex.parse(head) for head in given))


_SCOPES = ("all", "prefill", "decode")


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """At some heads and positions, ``factor * value + donor`` or a change instead of ``value``.

    Everything else is left as it is, bit by bit. Make one with the functions of
    :mod:`headscope.edits`.

    Attributes:
        name: of the kind of edit.
        heads: heads by layer; at the sites ``key`` and ``value`` these are key/value heads.
        site: ``z`` (attention-weighted values ``[batch pos head d_head]``, before the output
            projection), ``query``, ``key``, ``value`` (as attention uses them, ``[batch head pos
            d_head]``) or ``pattern`` (``[batch head query key]``).
        donors: what is added, by layer, in the layout of the site with all heads; leading axes
            may be left out, and axes of length 1 stand for all.
        factor: multiplier of what was there.
        change: ``(value, donor) -> value``, of the edited heads alone and each position by
            itself, instead of ``factor * value + donor``; None: that.
        positions: where; None: everywhere. At ``pattern`` a position is a query.
        scope: ``prefill`` touches the positions of the prompt, ``decode`` those after it, however
            many of them a pass runs; which is which is a fact of the pass (:class:`Span`).
    """

    name: str
    heads: Mapping[int, tuple[int, ...]]
    site: HeadSite = "z"
    donors: Mapping[int, Tensor] | None = None
    factor: float = 0.0
    positions: Bool[Tensor, "batch pos"] | None = None
    scope: Scope = "all"
    change: Callable[[Tensor, Tensor | None], Tensor] | None = None
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the layers; check that every layer has its donor."""
        object.__setattr__(self, "layers", frozenset(self.heads))
        missing = self.layers - self.donors.keys() if self.donors is not None else ()
        if missing:
            raise InputError(f"the {self.name} edit has no values for layer {min(missing)}.")
        if self.site not in SITES:
            raise InputError(nearest(str(self.site), SITES, kind="site of a head's edit"))
        if self.scope not in _SCOPES:
            raise InputError(nearest(str(self.scope), _SCOPES, kind="scope"))

    @classmethod
    def at(
        cls,
        name: str,
        heads: Heads,
        *,
        site: HeadSite = "z",
        donors: Mapping[int, Tensor] | None = None,
        factor: float = 0.0,
        positions: Bool[Tensor, "batch pos"] | None = None,
        scope: Scope = "all",
        change: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    ) -> "HeadEdit":
        """Make an edit of heads in any spelling."""
        by_layer: dict[int, tuple[int, ...]] = {}
        for layer, head in head_list(heads):
            by_layer[layer] = (*by_layer.get(layer, ()), head)
        if not by_layer:
            raise InputError(f"the {name} edit names no heads.")
        return cls(name, by_layer, site, donors, factor, positions, scope, change)

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the edited value of a text read at once; the input is left as it is.

        Within another pass, ask :meth:`during` first.
        """
        head_axis, position_axis = self._axes
        if self.scope != "all":
            here = self.during(Span.whole(value.shape[position_axis]))
            return here(layer, value) if layer in here.layers else value
        index = torch.tensor(self.heads[layer], device=value.device)
        old = value.index_select(head_axis, index)
        new = self._new(layer, old, index)
        if self.positions is not None:
            where = self._fitting(self.positions, value)
            where = where[:, :, None, None] if self.site == "z" else where[:, None, :, None]
            new = torch.where(where, new, old)
        return value.index_copy(head_axis, index, new)

    def during(self, span: Span) -> "HeadEdit":
        """The edit of the positions that a pass runs; without heads where it touches none.

        At the sites ``key`` and ``value`` the positions are those of the keys.

        Args:
            span: positions of the value that will be edited.
        """
        prompt = min(max(span.prompt - span.first, 0), span.count)
        touched = {
            "all": slice(0, span.count),
            "prefill": slice(0, prompt),
            "decode": slice(prompt, span.count),
        }[self.scope]
        where = None
        if self.positions is not None:
            where = self._seen(self.positions, span)
        if touched != slice(0, span.count):
            where = torch.ones(1, span.count, dtype=torch.bool) if where is None else where
            here = torch.zeros_like(where)
            here[:, touched] = where[:, touched]
            where = here
        if where is not None and not bool(where.any()):
            return replace(self, heads={}, donors=None, positions=None, scope="all")
        donors = self.donors
        if donors is not None and not span.is_whole:
            donors = {layer: self._shown(donor, span) for layer, donor in donors.items()}
        return replace(self, donors=donors, positions=where, scope="all")

    def among(self, layer: int, heads: tuple[int, ...]) -> "HeadEdit":
        """The same edit of one layer, for a value that holds some heads alone.

        Args:
            layer: whose value.
            heads: on its head axis, those of the edit among them.
        """
        axis = self._axes[0] - 4
        donors = None
        if self.donors is not None:
            donor = self.donors[layer]
            if donor.ndim >= -axis and donor.shape[axis] > 1:
                donor = donor.index_select(axis, torch.tensor(heads, device=donor.device))
            donors = {layer: donor}
        places = tuple(heads.index(head) for head in self.heads[layer])
        return replace(self, heads={layer: places}, donors=donors)

    @property
    def first_position(self) -> int:
        """First position that is touched in any example; what comes before stays as it was."""
        if self.positions is None or not bool(self.positions.any()):
            return 0
        return int(self.positions.any(0).int().argmax())

    def covers(self, layer: int, n_heads: int) -> bool:
        """Whether nothing of this layer's old value is left."""
        every = len(self.heads.get(layer, ())) == n_heads and self.change is None
        return every and self.positions is None and self.factor == 0 and self.scope == "all"

    def cut(self, examples: slice = slice(None), first: int = 0) -> "HeadEdit":
        """The same edit for a pass over some examples, from one position on."""
        donors = self.donors
        if donors is not None:
            donors = {layer: self._cut(donor, examples, first) for layer, donor in donors.items()}
        positions = None if self.positions is None else self.positions[examples, first:]
        return replace(self, donors=donors, positions=positions)

    @property
    def _axes(self) -> tuple[int, int]:
        """Axis of the heads and axis of the positions."""
        return (2, 1) if self.site == "z" else (1, 2)

    def _new(self, layer: int, old: Tensor, index: Tensor) -> Tensor:
        donor = None if self.donors is None else self._donor(layer, old, index)
        if self.change is not None:
            return self.change(old, donor)
        new = torch.zeros_like(old) if self.factor == 0 else old * self.factor
        return new if donor is None else new + donor

    def _donor(self, layer: int, old: Tensor, index: Tensor) -> Tensor:
        """What the edited heads are given, in the layout of their value."""
        assert self.donors is not None  # noqa: S101  # asked for where there are some
        head_axis, position_axis = self._axes
        donor = self.donors[layer].to(device=old.device, dtype=old.dtype)
        donor = donor.reshape((1,) * (old.ndim - donor.ndim) + donor.shape)
        if donor.shape[head_axis] > 1:
            donor = donor.index_select(head_axis, index)
        if (
            self.site == "pattern" and donor.shape[-1] > 1
        ):  # keys that the other run did not have get nothing
            donor = torch.nn.functional.pad(donor, (0, old.shape[-1] - donor.shape[-1]))
        for axis in (0, position_axis):
            if donor.shape[axis] not in (1, old.shape[axis]):
                raise InputError(
                    f"the {self.name} edit of layer {layer} has values for {donor.shape[axis]} "
                    f"{'examples' if axis == 0 else 'positions'}, not {old.shape[axis]}."
                )
        return donor

    def _fitting(
        self, positions: Bool[Tensor, "batch pos"], value: Tensor
    ) -> Bool[Tensor, "batch pos"]:
        shape = (value.shape[0], value.shape[self._axes[1]])
        if positions.shape[0] not in (1, shape[0]) or positions.shape[1] != shape[1]:
            raise InputError(
                f"the {self.name} edit has positions {tuple(positions.shape)}, but the pass runs "
                f"{shape[0]} examples of {shape[1]} positions."
            )
        return positions.to(value.device)

    def _seen(self, positions: Tensor, span: Span) -> Bool[Tensor, "batch pos"]:
        """Which of a pass's positions are chosen; none beyond those that were given."""
        shown = positions[:, span.first : span.end]
        missing = span.count - shown.shape[1]
        if missing and span.is_whole:
            raise InputError(
                f"the {self.name} edit has positions for {shown.shape[1]} tokens, but the text has "
                f"{span.count}."
            )
        return torch.nn.functional.pad(shown, (0, missing))

    def _shown(self, donor: Tensor, span: Span) -> Tensor:
        """What a donor has for the positions of a pass; all of it where it has too few."""
        axis = self._axes[1] - 4
        if donor.ndim < -axis or donor.shape[axis] == 1 or donor.shape[axis] < span.end:
            return donor
        return donor.narrow(axis, span.first, span.count)

    def _cut(self, donor: Tensor, examples: slice, first: int) -> Tensor:
        position_axis = self._axes[1] - 4
        if donor.ndim == 4 and donor.shape[0] > 1:
            donor = donor[examples]
        if first and donor.ndim >= -position_axis and donor.shape[position_axis] > 1:
            donor = donor.narrow(position_axis, first, donor.shape[position_axis] - first)
        return donor


@runtime_checkable
class AnyEdit(Protocol):
    """What a model calls during a pass; see ``headscope.models.protocol.Edit``."""

    @property
    def site(self) -> HeadSite:
        """What is edited."""

    @property
    def layers(self) -> frozenset[int]:
        """Layers that it touches."""

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the edited value."""


@runtime_checkable
class SpanEdit(AnyEdit, Protocol):
    """An edit that wants to know which positions a pass runs, and which of them are decoding."""

    def during(self, span: Span) -> AnyEdit:
        """The edit of these positions."""


Variant = Sequence[AnyEdit]


@dataclass(frozen=True, eq=False)
class Stacked:
    """Edits of one site for a batch that holds every example once per variant, variants outside."""

    site: HeadSite
    variants: tuple[tuple[AnyEdit, ...], ...]
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the layers."""
        layers = [edit.layers for edits in self.variants for edit in edits]
        object.__setattr__(self, "layers", frozenset().union(*layers))

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Edit every variant's share of the batch with its own edits."""
        return self._joined(layer, value.chunk(len(self.variants)))

    def spread(self, layer: int, value: Tensor) -> Tensor:
        """Edit one value that all variants start from; it is not yet repeated in the batch."""
        return self._joined(layer, (value,) * len(self.variants))

    def covers(self, layer: int, n_heads: int) -> bool:
        """Whether no variant keeps anything of this layer's old value."""
        return all(
            any(isinstance(edit, HeadEdit) and edit.covers(layer, n_heads) for edit in edits)
            for edits in self.variants
        )

    def during(self, span: Span) -> "Stacked":
        """The same variants in a pass over some positions."""
        if span.real is not None:  # variants stand one after another, with the same padding
            span = replace(span, real=span.real[: len(span.real) // len(self.variants)])
        return replace(self, variants=tuple(during(edits, span) for edits in self.variants))

    def among(self, layer: int, heads: tuple[int, ...]) -> "Stacked":
        """The same edits of one layer, for a value that holds some heads alone."""
        return Stacked(
            self.site,
            tuple(
                tuple(among(edit, layer, heads) for edit in edits if layer in edit.layers)
                for edits in self.variants
            ),
        )

    def _joined(self, layer: int, parts: Sequence[Tensor]) -> Tensor:
        done = []
        for part, edits in zip(parts, self.variants, strict=True):
            for edit in edits:
                part = edit(layer, part) if layer in edit.layers else part
            done.append(part)
        return torch.cat(done) if len(done) > 1 else done[0]


def stack(variants: Sequence[Variant]) -> tuple[Stacked, ...]:
    """Edits of a stacked pass, one for every site that some variant touches.

    Example:
        >>> stacked = hs.edits.stack([(hs.edits.zero("L0H0"),), (hs.edits.zero("L1H1"),)])
        >>> [one.site for one in stacked]
        ['z']
    """
    stacks = []
    for site in SITES:
        mine = tuple(tuple(edit for edit in edits if edit.site == site) for edits in variants)
        if any(mine):
            stacks.append(Stacked(site, mine))
    return tuple(stacks)


def cut(variant: Variant, examples: slice = slice(None), first: int = 0) -> tuple[AnyEdit, ...]:
    """Edits of one variant for some examples, from one position on; others pass as they are.

    Example:
        >>> edit = hs.edits.zero("L0H0", positions=probe.mark("second_copy"))
        >>> len(hs.edits.cut((edit,), examples=slice(0, 1)))
        1
    """
    return tuple(
        edit.cut(examples, first) if isinstance(edit, HeadEdit) else edit for edit in variant
    )


def during(variant: Variant, span: Span) -> tuple[AnyEdit, ...]:
    """Edits of one variant in a pass over some positions; those that touch none of them go.

    Example:
        >>> step = hs.edits.Span(first=9, count=1, prompt=9)
        >>> len(hs.edits.during([hs.edits.zero("L0H0", scope="prefill")], step))
        0
    """
    there = [edit.during(span) if isinstance(edit, SpanEdit) else edit for edit in variant]
    return tuple(edit for edit in there if edit.layers)


def edited_heads(variant: Variant, layer: int) -> tuple[int, ...] | None:
    """Heads of a layer that a variant edits, in order; None if an edit does not say.

    Example:
        >>> hs.edits.edited_heads([hs.edits.zero(["L0H2", "L0H1"])], 0)
        (1, 2)
    """
    found: set[int] = set()
    for edit in variant:
        if layer not in edit.layers:
            continue
        if isinstance(edit, Stacked):
            parts = [edited_heads(edits, layer) for edits in edit.variants]
            if None in parts:
                return None
            found.update(head for part in parts if part is not None for head in part)
        elif isinstance(edit, HeadEdit):
            found.update(edit.heads[layer])
        else:
            return None
    return tuple(sorted(found))


def among(edit: AnyEdit, layer: int, heads: tuple[int, ...]) -> AnyEdit:
    """The same edit for a value of one layer that holds some heads alone.

    Example:
        >>> hs.edits.among(hs.edits.zero("L0H5"), 0, (3, 5)).heads
        {0: (1,)}
    """
    return edit.among(layer, heads) if isinstance(edit, HeadEdit | Stacked) else edit


def first_layer(variant: Variant) -> int | None:
    """Lowest layer that a variant touches; None if it touches none.

    Example:
        >>> hs.edits.first_layer([hs.edits.zero("L2H0"), hs.edits.zero("L1H1")])
        1
    """
    return min((layer for edit in variant for layer in edit.layers), default=None)


def first_position(variant: Variant) -> int:
    """First position that a variant touches; 0 where an edit does not say.

    Example:
        >>> edit = hs.edits.zero("L0H0", positions=probe.mark("second_copy"))
        >>> bool(hs.edits.first_position([edit]) == probe.mark("second_copy").int().argmax())
        True
    """
    return min(
        (edit.first_position if isinstance(edit, HeadEdit) else 0 for edit in variant), default=0
    )


# Shares of a row below this are rounding, not a sink.
_SINK = 1e-4
_TINY = 1e-38
_STEPS = 30  # of bisection: a threshold to 1e-9
_SOFTEST = 1.01  # below this, fp32 has no digits left for the power 1 / (alpha - 1)


def entmax(
    heads: Heads,
    alpha: float | Float[Tensor, "layer head"] = 1.5,
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """Attention becomes alpha-entmax of the scores: keys that are far behind get exactly 0.

    ``p_j = max((alpha - 1) s_j - tau, 0) ^ (1 / (alpha - 1))``, with the ``tau`` that makes them
    sum to 1. 1 is the softmax, 2 the sparsemax; with 1.5 keys whose score is 2 or more below the
    best have 0.

    Args:
        heads: which.
        alpha: 1, or 1.01 and more; a number for all, or one for every head, which may ask for a
            gradient.
        positions: of the queries; None: all.
        scope: ``prefill``, ``decode`` or ``all``.

    Raises:
        InputError: for another alpha.

    Source:
        Peters et al. 2019 (arXiv 1905.05702); Correia et al. 2019, "Adaptively Sparse
        Transformers" (arXiv 1909.00015), for an alpha per head and its gradient.

    Example:
        >>> edit = hs.edits.entmax("L0H0", 2.0)
        >>> edit(0, torch.tensor([[[[0.9, 0.1]]]])).tolist()
        [[[[1.0, 0.0]]]]
    """
    chosen = head_list(heads)
    values = _alphas(chosen, alpha)
    low = values.detach().min()
    if not bool(torch.isfinite(values.detach()).all()) or (low < _SOFTEST and low != 1):
        raise InputError(f"alpha={float(low):g}: entmax takes 1 (softmax), or 1.01 and more.")
    if bool((values.detach() == 1).any()) and not bool((values.detach() == 1).all()):
        raise InputError("alpha: heads with softmax (1) need no edit; name the others alone.")
    donors = {}
    for layer in {head.layer for head in chosen}:
        size = 1 + max(head.head for head in chosen if head.layer == layer)
        mine = [at for at, head in enumerate(chosen) if head.layer == layer]
        index = torch.tensor([chosen[at].head for at in mine], device=values.device)
        row = values.new_full((size,), 1.5).index_copy(0, index, values[mine])
        donors[layer] = row[:, None, None]
    return HeadEdit.at(
        "entmax", chosen, site="pattern", donors=donors, change=entmax_rows,
        positions=positions, scope=scope,
    )  # fmt: skip


def top_k(heads: Heads, k: int, *, positions: Positions = None, scope: Scope = "all") -> HeadEdit:
    """Attention goes to each query's k highest-scoring keys alone; the softmax is over these.

    Of equal scores the earlier key is taken.

    Args:
        heads: which.
        k: 1 or more; queries that see fewer keys keep all.
        positions: of the queries; None: all.
        scope: ``prefill``, ``decode`` or ``all``.

    Raises:
        InputError: if k is not a whole number from 1 on.

    Source:
        Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention"
        (arXiv 2106.06899).

    Example:
        >>> edit = hs.edits.top_k("L0H0", 2)
        >>> edit(0, torch.tensor([[[[0.5, 0.25, 0.25]]]])).tolist()
        [[[[0.666..., 0.333..., 0.0]]]]
    """
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r}: the number of keys that a query keeps is 1 or more.")
    return HeadEdit.at(
        "top_k", heads, site="pattern", change=lambda rows, _: top_rows(rows, k),
        positions=positions, scope=scope,
    )  # fmt: skip


def entmax_rows(
    pattern: Float[Tensor, "*any key"], alpha: Tensor | None
) -> Float[Tensor, "*any key"]:
    """Rows of alpha-entmax made of softmax rows; a key with probability 0 keeps 0.

    Args:
        pattern: softmax rows, less what a sink takes.
        alpha: broadcasts to the rows, ``[... 1]``; all 1: the rows as they are.

    Example:
        >>> hs.edits.entmax_rows(torch.tensor([[0.8, 0.15, 0.05]]), torch.tensor([[2.0]])).tolist()
        [[1.0, 0.0, 0.0]]
    """
    if alpha is None or bool((alpha.detach() == 1).all()):
        return pattern
    sink = _sink_of(pattern)
    whole = torch.cat([pattern, sink], -1)
    scores = whole.clamp_min(_TINY).log().masked_fill(whole <= 0, -math.inf)
    made: Tensor = _Entmax.apply(scores, alpha)  # type: ignore[no-untyped-call]  # torch has no types here
    return made[..., :-1]


def top_rows(pattern: Float[Tensor, "*any key"], k: int) -> Float[Tensor, "*any key"]:
    """Softmax rows over the k most probable keys, made of rows over all.

    Example:
        >>> hs.edits.top_rows(torch.tensor([[0.5, 0.3, 0.2]]), 2).round(decimals=3).tolist()
        [[0.625, 0.375, 0.0]]
    """
    if k >= pattern.shape[-1]:
        return pattern
    order = pattern.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros_like(pattern).scatter(-1, order, pattern.gather(-1, order))
    return kept / (kept.sum(-1, keepdim=True) + _sink_of(pattern)).clamp_min(_TINY)


def _sink_of(pattern: Float[Tensor, "*any key"]) -> Float[Tensor, "*any 1"]:
    """Share of a row that a learned sink takes; 0 where there is none."""
    missing = 1 - pattern.sum(-1, keepdim=True)
    return missing.masked_fill(missing < _SINK, 0.0)


def _alphas(heads: tuple[HeadIndex, ...], alpha: float | Tensor) -> Float[Tensor, " one"]:
    if not isinstance(alpha, Tensor):
        return torch.full((len(heads),), float(alpha))
    if alpha.ndim != 2:
        raise InputError(f"alpha has shape {list(alpha.shape)}: give a number, or [layer head].")
    for head in heads:
        if head.layer >= alpha.shape[0] or head.head >= alpha.shape[1]:
            raise InputError(f"alpha of shape {list(alpha.shape)} has no value for {head}.")
    layers, numbers = zip(*heads, strict=True)
    return alpha[list(layers), list(numbers)]


class _Entmax(torch.autograd.Function):
    """Entmax by bisection, with the gradients of scores and alpha in closed form."""

    @staticmethod
    def forward(
        ctx: Any, scores: Float[Tensor, "*any key"], alpha: Tensor
    ) -> Float[Tensor, "*any key"]:
        less = alpha - 1
        z = (scores - scores.amax(-1, keepdim=True)) * less
        low = -torch.ones_like(z[..., :1])
        high = -(float(scores.shape[-1]) ** -less) * torch.ones_like(low)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            over = (z - middle).clamp_min(0).pow(1 / less).sum(-1, keepdim=True) >= 1
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        p = (z - low).clamp_min(0).pow(1 / less)
        p = p / p.sum(-1, keepdim=True)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        (grad,) = grads
        p, alpha = ctx.saved_tensors
        less = alpha - 1
        inside = p > 0
        g = torch.where(inside, p.clamp_min(_TINY).pow(1 - less), 0.0)
        share = g / g.sum(-1, keepdim=True)
        of_scores = g * (grad - (grad * share).sum(-1, keepdim=True))
        if not ctx.needs_input_grad[1]:
            return of_scores, None
        h = torch.special.entr(p)
        slope = (p - share) / less.square() + (h - share * h.sum(-1, keepdim=True)) / less
        return of_scores, (grad * slope).sum_to_size(alpha.shape)


def zero(heads: Heads, *, positions: Positions = None, scope: Scope = "all") -> HeadEdit:
    """``z`` becomes 0. What a value bias adds goes too; the output bias stays.

    Example:
        >>> hs.edits.zero(["L0H1", "L2H3"]).layers == {0, 2}
        True
    """
    return HeadEdit.at("zero", heads, positions=positions, scope=scope)


def mean(
    heads: Heads,
    means: Mapping[int, Float[Tensor, "head d_head"]],
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """``z`` becomes the head's mean over a reference probe.

    Example:
        >>> edit = hs.edits.mean("L1H2", hs.ablation.head_means(model, probe))
        >>> model.forward(probe.tokens, edits=[edit]).shape[2] == model.shape.d_vocab
        True
    """
    return HeadEdit.at("mean", heads, donors=means, positions=positions, scope=scope)


def mean_pos(
    heads: Heads,
    means: Mapping[int, Float[Tensor, "pos head d_head"]],
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """``z`` becomes the head's mean at that position: for prompts of one template.

    A position is a column of the batch, counted from the left with its padding: under left padding
    prompts of several lengths are averaged, and replaced, at different places of their texts.

    Example:
        >>> means = hs.ablation.head_means(model, probe, per_position=True)
        >>> hs.edits.mean_pos("L1H2", means).site
        'z'
    """
    return HeadEdit.at("mean_pos", heads, donors=means, positions=positions, scope=scope)


def resample(
    heads: Heads,
    donors: Mapping[int, Float[Tensor, "batch pos head d_head"]],
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """``z`` becomes that of another example at the same position.

    Example:
        >>> values = hs.ablation.head_values(model, probe.tokens.flip(0))
        >>> hs.edits.resample("L1H2", values).site
        'z'
    """
    return HeadEdit.at("resample", heads, donors=donors, positions=positions, scope=scope)


def uniform(heads: Heads, *, positions: Positions = None, scope: Scope = "all") -> HeadEdit:
    """The query becomes 0, so that attention is uniform over the visible keys.

    What the retrieval-head literature calls masking (Wu et al. 2024, arXiv 2404.15574). Exact
    where nothing but ``q k`` enters the softmax: with a position bias (ALiBi) the bias remains, and
    with a learned sink (gpt-oss) the row is flat but for the sink's share.

    Example:
        >>> with model.edited([hs.edits.uniform("L0H0")]):
        ...     rows = hs.capture.collect(model, probe, layers=[0], heads=[0])[0].pattern
        >>> torch.allclose(rows[0, 0, 3, :4], torch.full((4,), 0.25))
        True
    """
    return HeadEdit.at("uniform", heads, site="query", positions=positions, scope=scope)


def freeze_pattern(
    heads: Heads,
    patterns: Mapping[int, Float[Tensor, "batch head query key"]],
    *,
    positions: Positions = None,
) -> HeadEdit:
    """Attention stays what it was in another run, whatever its queries and keys become.

    Example:
        >>> patterns = hs.ablation.head_values(model, probe.tokens, site="pattern")
        >>> hs.edits.freeze_pattern("L0H0", patterns).site
        'pattern'
    """
    return HeadEdit.at(
        "freeze_pattern", heads, site="pattern", donors=patterns, positions=positions
    )


def patch(
    heads: Heads,
    donors: Mapping[int, Tensor],
    *,
    site: HeadSite = "z",
    positions: Positions = None,
) -> HeadEdit:
    """The value at a site becomes that of a paired run, position by position.

    At ``key`` and ``value`` heads are key/value heads, which several query heads may share.

    Example:
        >>> keys = hs.ablation.head_values(model, probe.control.tokens, site="key")
        >>> hs.edits.patch("L1H0", keys, site="key").site
        'key'
    """
    return HeadEdit.at("patch", heads, site=site, donors=donors, positions=positions)


def scale(
    heads: Heads,
    factor: float,
    *,
    site: HeadSite = "z",
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """The value at a site is multiplied.

    Example:
        >>> hs.edits.scale("L1H0", 0.5, positions=probe.mark("second_copy")).factor
        0.5
    """
    return HeadEdit.at("scale", heads, site=site, factor=factor, positions=positions, scope=scope)


def redistribute(
    heads: Heads,
    source: Bool[Tensor, "batch pos"],
    target: Bool[Tensor, "batch pos"],
    share: int | float = 0.5,
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """A share of the attention on some keys goes to others, in proportion to what those get.

    ``A[i, j] (1 - share)`` at a source, ``A[i, j] (1 + share S / T)`` at a target, with ``S`` and
    ``T`` what all sources and all targets get: rows keep their sum, and 0 changes nothing. A row
    that gives its targets nothing stays as it is. A key that is both counts as a target.

    Args:
        heads: which.
        source: keys that lose attention; what is generated later is none.
        target: keys that gain it.
        share: of the sources' attention, 0 to 1.
        positions: of the queries; None: all.
        scope: ``prefill``, ``decode`` or ``all``.

    Raises:
        InputError: if the share is not between 0 and 1, or the shapes differ.

    Source:
        Sink attention moved to image tokens: Baek et al. 2025 (arXiv 2505.15865), OCR heads.

    Example:
        >>> first, last = torch.tensor([[True, False]]), torch.tensor([[False, True]])
        >>> edit = hs.edits.redistribute("L0H0", first, last, 0.5)
        >>> edit(0, torch.tensor([[[[0.75, 0.25]]]])).tolist()
        [[[[0.375, 0.625]]]]
    """
    if not (isinstance(share, int | float) and 0 <= share <= 1):
        raise InputError(f"share={share!r}: give a number from 0 to 1.")
    if source.shape != target.shape:
        raise InputError(
            f"the sources have shape {tuple(source.shape)}, the targets {tuple(target.shape)}."
        )
    sign = target.float() - (source & ~target).float()
    donors = {head.layer: sign[:, None, None] for head in head_list(heads)}
    return HeadEdit.at(
        "redistribute", heads, site="pattern", donors=donors,
        change=lambda rows, keys: _moved(rows, keys, float(share)),
        positions=positions, scope=scope,
    )  # fmt: skip


def _moved(
    rows: Float[Tensor, "*any key"], sign: Tensor | None, share: float
) -> Float[Tensor, "*any key"]:
    """Rows with a share moved from keys marked -1 to those marked 1."""
    if sign is None:
        return rows
    lost = rows * (sign < 0) * share
    held = rows * (sign > 0)
    total = held.sum(-1, keepdim=True)
    gained = held * (lost.sum(-1, keepdim=True) / total.clamp_min(_TINY))
    return torch.where(total > 0, rows - lost + gained, rows)


def attend_to_first(
    heads: Heads, real: Bool[Tensor, "batch pos"], *, positions: Positions = None
) -> HeadEdit:
    """All attention goes to each example's first real token, where idle heads rest.

    Args:
        heads: which.
        real: the probe's real positions.
        positions: of the queries; None: all.

    Example:
        >>> hs.edits.attend_to_first("L1H0", probe.real).site
        'pattern'
    """
    first = real.int().argmax(1)
    row = torch.nn.functional.one_hot(first, real.shape[1]).float()[:, None, None]
    layers = {head.layer for head in head_list(heads)}
    donors = dict.fromkeys(layers, row)
    return HeadEdit.at("attend_to_first", heads, site="pattern", donors=donors, positions=positions)
