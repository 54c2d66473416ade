"""Edits: interventions on heads, as values.

Each function takes heads (``"L5H1"``, ``"5.1"``, ``(5, 1)``, one or several) and returns a frozen
:class:`HeadEdit`, for ``model.forward(..., edits=...)``, for ``model.edited(...)`` and for
:func:`headscope.ablate_heads`. A head's slice is taken before the output projection; after it heads
are mixed. Values that an edit needs (means, other runs) are plain data, computed beforehand by
:func:`headscope.ablation.head_means` and :func:`headscope.ablation.head_values`.

``positions`` limits an edit to marked positions, e.g. ``probe.mark("end")``; ``scope`` limits it to
the prompt (``prefill``) or to what is generated after it (``decode``). The phase is a property of
the pass, not of its size: a prompt of one token is a prompt. ``model.forward`` reads prompts; in
transformers' ``generate`` the prompt is its input; in a hand-written loop, any pass that extends a
cache is decoding.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError, nearest
from headscope.heads import HeadIndex


@dataclass(frozen=True)
class Span:
    """Positions that one pass runs, stated explicitly and never inferred from tensor shapes.

    Attributes:
        first: position of the first query, counted among all keys, padding included.
        count: number of positions that the pass runs.
        prompt: positions before this one are prompt (``prefill``), those from it on are generated
            (``decode``).
        grows: whether the text may continue after the pass.
        real: mask of the text up to the last position that runs, False at padding; None: no
            padding.
    """

    first: int
    count: int
    prompt: int
    grows: bool = False
    real: Bool[Tensor, "batch pos"] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def whole(cls, length: int) -> "Span":
        """Span of a whole text read at once, all of it prompt.

        Example:
            >>> hs.edits.Span.whole(5).prompt
            5
        """
        return cls(0, length, length)

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.first + self.count

    @property
    def is_whole(self) -> bool:
        """Whether the pass reads the whole text at once."""
        return self == Span.whole(self.count)

    def last(self, count: int) -> "Span":
        """The same pass reduced to its last ``count`` positions, which may reach into the cache.

        Example:
            >>> hs.edits.Span(first=7, count=1, prompt=7).last(8).first
            0
        """
        return replace(self, first=self.end - count, count=count)

    def part(self, first: int, count: int) -> "Span":
        """Some of the pass's positions, counted from its first.

        Example:
            >>> hs.edits.Span.whole(10).part(4, 2)
            Span(first=4, count=2, prompt=10, grows=False)
        """
        return replace(self, first=self.first + first, count=count)


HeadSite = Literal["z", "query", "key", "value", "pattern"]
Scope = Literal["all", "prefill", "decode"]
PositionMask = Bool[Tensor, "batch pos"] | None
Heads = str | tuple[int, int] | Iterable[str | tuple[int, int]]

SITES: tuple[HeadSite, ...] = ("query", "key", "value", "pattern", "z")


@checked
def head_list(heads: Heads) -> tuple[HeadIndex, ...]:
    """Parse one head or several, ``"L5H1"``, ``"5.1"`` or ``(5, 1)``; duplicates are dropped.

    Args:
        heads: one head address or several.

    Returns:
        Head addresses, without duplicates.

    Raises:
        InputError: if an entry is not a head address.

    Example:
        >>> hs.edits.head_list(["L1H0", "0.2", (2, 1)])
        (L1H0, L0H2, L2H1)
    """
    if not isinstance(heads, Iterable):
        raise InputError(
            f"heads={heads!r}: write heads as 'L5H1', '5.1' or (5, 1), or give a list of these."
        )
    given: list[Any] = [heads] if isinstance(heads, str) else list(heads)
    if len(given) == 2 and all(isinstance(part, int) for part in given):
        given = [tuple(given)]  # one head, (layer, head)
    return tuple(dict.fromkeys(HeadIndex.parse(head) for head in given))


_SCOPES = ("all", "prefill", "decode")


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """Replace values of some heads and positions by ``factor * value + donor``, or by ``change``.

    Everything else is left bit-identical. Create edits with the functions of
    :mod:`headscope.edits`.

    Attributes:
        name: kind of edit.
        heads: heads by layer; at the sites ``key`` and ``value`` these are key/value heads.
        site: ``z`` (attention-weighted values ``[batch pos head d_head]``, before the output
            projection), ``query``, ``key``, ``value`` (as attention uses them, ``[batch head pos
            d_head]``) or ``pattern`` (``[batch head query key]``).
        donors: values to add, by layer, in the layout of the site with all heads; leading axes may
            be left out, and axes of length 1 are broadcast.
        factor: multiplier of the old value.
        change: ``(value, donor) -> value``, applied to the edited heads only and position by
            position, instead of ``factor * value + donor``; None: not used.
        positions: mask of positions; None: everywhere. At ``pattern`` a position is a query.
        scope: ``prefill`` edits positions of the prompt, ``decode`` those after it, however many a
            pass runs; see :class:`Span`.
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
        """Derive the layers and check that every layer has its donor."""
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
        """Create an edit from heads in any spelling."""
        by_layer: dict[int, tuple[int, ...]] = {}
        for layer, head in head_list(heads):
            by_layer[layer] = (*by_layer.get(layer, ()), head)
        if not by_layer:
            raise InputError(f"the {name} edit names no heads.")
        return cls(name, by_layer, site, donors, factor, positions, scope, change)

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the edited value of a text read at once; the input is unchanged.

        For other passes call :meth:`during` first.
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
        """Restrict the edit to the positions of a pass; without heads if it touches none of them.

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
        """Restrict the edit to one layer, for a value that holds only some heads.

        Args:
            layer: layer of the value.
            heads: heads on its head axis; they include the edited ones.
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
        """First position that is edited in any example."""
        if self.positions is None or not bool(self.positions.any()):
            return 0
        return int(self.positions.any(0).int().argmax())

    def covers(self, layer: int, n_heads: int) -> bool:
        """Whether the edit replaces this layer's value completely."""
        every = len(self.heads.get(layer, ())) == n_heads and self.change is None
        return every and self.positions is None and self.factor == 0 and self.scope == "all"

    def cut(self, examples: slice = slice(None), first: int = 0) -> "HeadEdit":
        """The same edit for some examples, from one position on."""
        donors = self.donors
        if donors is not None:
            donors = {layer: self._cut(donor, examples, first) for layer, donor in donors.items()}
        positions = None if self.positions is None else self.positions[examples, first:]
        return replace(self, donors=donors, positions=positions)

    @property
    def _axes(self) -> tuple[int, int]:
        """Indices of the head axis and the position axis."""
        return (2, 1) if self.site == "z" else (1, 2)

    def _new(self, layer: int, old: Tensor, index: Tensor) -> Tensor:
        donor = None if self.donors is None else self._donor(layer, old, index)
        if self.change is not None:
            return self.change(old, donor)
        new = torch.zeros_like(old) if self.factor == 0 else old * self.factor
        return new if donor is None else new + donor

    def _donor(self, layer: int, old: Tensor, index: Tensor) -> Tensor:
        """Donor values of the edited heads, in the layout of their value."""
        assert self.donors is not None  # noqa: S101  # asked for where there are some
        head_axis, position_axis = self._axes
        donor = self.donors[layer].to(device=old.device, dtype=old.dtype)
        donor = donor.reshape((1,) * (old.ndim - donor.ndim) + donor.shape)
        if donor.shape[head_axis] > 1:
            donor = donor.index_select(head_axis, index)
        if (
            self.site == "pattern" and donor.shape[-1] > 1
        ):  # keys that the other run did not have get 0
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
        """Mask of a pass's positions that are edited; none beyond the given ones."""
        shown = positions[:, span.first : span.end]
        missing = span.count - shown.shape[1]
        if missing and span.is_whole:
            raise InputError(
                f"the {self.name} edit has positions for {shown.shape[1]} tokens, but the text has "
                f"{span.count}."
            )
        return torch.nn.functional.pad(shown, (0, missing))

    def _shown(self, donor: Tensor, span: Span) -> Tensor:
        """Donor values for the positions of a pass, or the whole donor if it has too few."""
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
    """Interface of an edit during a pass; see ``headscope.models.protocol.Edit``."""

    @property
    def site(self) -> HeadSite:
        """Site that is edited."""

    @property
    def layers(self) -> frozenset[int]:
        """Layers that it edits."""

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return the edited value."""


@runtime_checkable
class SpanEdit(AnyEdit, Protocol):
    """Interface of edits that depend on a pass's positions and on the phase."""

    def during(self, span: Span) -> AnyEdit:
        """Restrict the edit to these positions."""


Variant = Sequence[AnyEdit]


@dataclass(frozen=True, eq=False)
class Stacked:
    """Edits of one site for a stacked batch: variants outside, examples inside."""

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
        """Edit a single value from which all variants start, repeating it per variant."""
        return self._joined(layer, (value,) * len(self.variants))

    def covers(self, layer: int, n_heads: int) -> bool:
        """Whether every variant replaces this layer's value completely."""
        return all(
            any(isinstance(edit, HeadEdit) and edit.covers(layer, n_heads) for edit in edits)
            for edits in self.variants
        )

    def during(self, span: Span) -> "Stacked":
        """Restrict all variants to the positions of a pass."""
        if span.real is not None:  # variants stand one after another, with the same padding
            span = replace(span, real=span.real[: len(span.real) // len(self.variants)])
        return replace(self, variants=tuple(during(edits, span) for edits in self.variants))

    def among(self, layer: int, heads: tuple[int, ...]) -> "Stacked":
        """Restrict the edits to one layer, for a value that holds only some heads."""
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


@checked
def stack(variants: Sequence[Variant]) -> tuple[Stacked, ...]:
    """Combine the variants' edits for a stacked pass, one per edited site.

    Args:
        variants: edits of each variant.

    Returns:
        One stacked edit per edited site.

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


@checked
def cut(variant: Variant, examples: slice = slice(None), first: int = 0) -> tuple[AnyEdit, ...]:
    """Cut a variant's edits to some examples, from one position on; others are passed through.

    Args:
        variant: edits to cut.
        examples: examples to keep.
        first: first position to keep.

    Returns:
        The edits for these examples and positions.

    Example:
        >>> edit = hs.edits.zero("L0H0", positions=probe.mark("second_copy"))
        >>> len(hs.edits.cut((edit,), examples=slice(0, 1)))
        1
    """
    return tuple(
        edit.cut(examples, first) if isinstance(edit, HeadEdit) else edit for edit in variant
    )


@checked
def during(variant: Variant, span: Span) -> tuple[AnyEdit, ...]:
    """Restrict a variant's edits to the positions of a pass; drop those that touch none.

    Args:
        variant: edits to restrict.
        span: positions of the pass.

    Returns:
        The edits that apply to the pass.

    Example:
        >>> step = hs.edits.Span(first=9, count=1, prompt=9)
        >>> len(hs.edits.during([hs.edits.zero("L0H0", scope="prefill")], step))
        0
    """
    there = [edit.during(span) if isinstance(edit, SpanEdit) else edit for edit in variant]
    return tuple(edit for edit in there if edit.layers)


@checked
def edited_heads(variant: Variant, layer: int) -> tuple[int, ...] | None:
    """Heads of a layer that a variant edits, in order; None if an edit does not tell.

    Args:
        variant: edits to inspect.
        layer: layer number.

    Returns:
        Head numbers, or None.

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


@checked
def among(edit: AnyEdit, layer: int, heads: tuple[int, ...]) -> AnyEdit:
    """Restrict an edit to one layer's value that holds only some heads.

    Args:
        edit: edit to restrict.
        layer: layer of the value.
        heads: head numbers on the value's head axis.

    Returns:
        The restricted edit.

    Example:
        >>> hs.edits.among(hs.edits.zero("L0H5"), 0, (3, 5)).heads
        {0: (1,)}
    """
    return edit.among(layer, heads) if isinstance(edit, HeadEdit | Stacked) else edit


@checked
def first_layer(variant: Variant) -> int | None:
    """Lowest layer that a variant edits; None if it edits none.

    Args:
        variant: edits to inspect.

    Returns:
        Layer number, or None.

    Example:
        >>> hs.edits.first_layer([hs.edits.zero("L2H0"), hs.edits.zero("L1H1")])
        1
    """
    return min((layer for edit in variant for layer in edit.layers), default=None)


@checked
def first_position(variant: Variant) -> int:
    """First position that a variant edits; 0 if an edit does not tell.

    Args:
        variant: edits to inspect.

    Returns:
        Position, from 0.

    Example:
        >>> edit = hs.edits.zero("L0H0", positions=probe.mark("second_copy"))
        >>> bool(hs.edits.first_position([edit]) == probe.mark("second_copy").int().argmax())
        True
    """
    return min(
        (edit.first_position if isinstance(edit, HeadEdit) else 0 for edit in variant), default=0
    )


# Shares of a row below this are rounding and not a sink.
_SINK = 1e-4
_TINY = 1e-38
_STEPS = 30  # of bisection: a threshold to 1e-9
_SOFTEST = 1.01  # below this, fp32 has no digits left for the power 1 / (alpha - 1)


@checked
def entmax(
    heads: Heads,
    alpha: float | Float[Tensor, "layer head"] = 1.5,
    *,
    positions: PositionMask = None,
    scope: Scope = "all",
) -> HeadEdit:
    """Replace softmax with alpha-entmax, which gives low-scoring keys exactly 0.

    ``p_j = max((alpha - 1) s_j - tau, 0) ^ (1 / (alpha - 1))``, with the ``tau`` that makes them
    sum to 1. Alpha 1 is the softmax, 2 the sparsemax; with 1.5 keys whose score is at least 2 below
    the best get 0.

    Args:
        heads: heads to use.
        alpha: 1, or at least 1.01; a number for all, or one for every head, which may require a
            gradient.
        positions: query positions; None: all.
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
        raise InputError(f"alpha={float(low):g}: give 1 (softmax), or 1.01 and more.")
    if bool((values.detach() == 1).any()) and not bool((values.detach() == 1).all()):
        raise InputError("alpha: leave out heads with alpha 1 (softmax), which need no edit.")
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


@checked
def top_k(
    heads: Heads, k: int, *, positions: PositionMask = None, scope: Scope = "all"
) -> HeadEdit:
    """Keep each query's k highest-scoring keys and take the softmax over these.

    On ties the earlier key is kept.

    Args:
        heads: heads to use.
        k: at least 1; queries that see fewer keys keep all.
        positions: query positions; None: all.
        scope: ``prefill``, ``decode`` or ``all``.

    Raises:
        InputError: if k is not a positive integer.

    Source:
        Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention"
        (arXiv 2106.06899).

    Example:
        >>> edit = hs.edits.top_k("L0H0", 2)
        >>> edit(0, torch.tensor([[[[0.5, 0.25, 0.25]]]])).tolist()
        [[[[0.666..., 0.333..., 0.0]]]]
    """
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r}: give a whole number from 1 on, the keys that a query keeps.")
    return HeadEdit.at(
        "top_k", heads, site="pattern", change=lambda rows, _: top_rows(rows, k),
        positions=positions, scope=scope,
    )  # fmt: skip


@checked
def entmax_rows(
    pattern: Float[Tensor, "*any key"], alpha: Tensor | None
) -> Float[Tensor, "*any key"]:
    """Convert softmax rows to alpha-entmax rows; a key with probability 0 keeps 0.

    Args:
        pattern: softmax rows, without a sink's share.
        alpha: broadcasts to the rows, ``[... 1]``; if all are 1, the rows are unchanged.

    Example:
        >>> hs.edits.entmax_rows(torch.tensor([[0.8, 0.15, 0.05]]), torch.tensor([[2.0]])).tolist()
        [[1.0, 0.0, 0.0]]
    """
    if alpha is None or bool((alpha.detach() == 1).all()):
        return pattern
    sink = _sink_of(pattern)
    whole = torch.cat([pattern, sink], -1)
    scores = whole.clamp_min(_TINY).log().masked_fill(whole <= 0, -math.inf)
    exact: Callable[[Tensor, Tensor], Tensor] = _Entmax.apply  # torch declares no types for it
    return exact(scores, alpha)[..., :-1]


@checked
def top_rows(pattern: Float[Tensor, "*any key"], k: int) -> Float[Tensor, "*any key"]:
    """Restrict softmax rows to their k most probable keys and renormalise.

    Args:
        pattern: attention rows; they may sum to less than 1, with the rest on a learned sink.
        k: number of keys to keep.

    Returns:
        Rows with at most k nonzero keys.

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
    """Share of a row that a learned sink takes; 0 without a sink."""
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


@checked
def zero(heads: Heads, *, positions: PositionMask = None, scope: Scope = "all") -> HeadEdit:
    """Set ``z`` to 0, including the contribution of a value bias; the output bias stays.

    Args:
        heads: heads to edit.
        positions: mask ``[batch pos]`` of the positions to edit. Default: all.
        scope: ``all``, ``prefill`` or ``decode``.

    Returns:
        The edit.

    Example:
        >>> hs.edits.zero(["L0H1", "L2H3"]).layers == {0, 2}
        True
    """
    return HeadEdit.at("zero", heads, positions=positions, scope=scope)


@checked
def mean(
    heads: Heads,
    means: Mapping[int, Float[Tensor, "head d_head"]],
    *,
    positions: PositionMask = None,
    scope: Scope = "all",
) -> HeadEdit:
    """Replace ``z`` with the head's mean over a reference probe.

    Args:
        heads: heads to edit.
        means: mean outputs by layer, ``[head d_head]``.
        positions: mask ``[batch pos]`` of the positions to edit. Default: all.
        scope: ``all``, ``prefill`` or ``decode``.

    Returns:
        The edit.

    Example:
        >>> edit = hs.edits.mean("L1H2", hs.ablation.head_means(model, probe))
        >>> model.forward(probe.tokens, edits=[edit]).shape[2] == model.shape.d_vocab
        True
    """
    return HeadEdit.at("mean", heads, donors=means, positions=positions, scope=scope)


@checked
def mean_pos(
    heads: Heads,
    means: Mapping[int, Float[Tensor, "pos head d_head"]],
    *,
    positions: PositionMask = None,
    scope: Scope = "all",
) -> HeadEdit:
    """Replace ``z`` with the head's mean at that position, for prompts of one template.

    A position is a column of the batch, padding included: under left padding, prompts of different
    lengths are averaged and replaced at different places in their texts.

    Args:
        heads: heads to edit.
        means: mean outputs by layer and position, ``[pos head d_head]``.
        positions: mask ``[batch pos]`` of the positions to edit. Default: all.
        scope: ``all``, ``prefill`` or ``decode``.

    Returns:
        The edit.

    Example:
        >>> means = hs.ablation.head_means(model, probe, per_position=True)
        >>> hs.edits.mean_pos("L1H2", means).site
        'z'
    """
    return HeadEdit.at("mean_pos", heads, donors=means, positions=positions, scope=scope)


@checked
def resample(
    heads: Heads,
    donors: Mapping[int, Float[Tensor, "batch pos head d_head"]],
    *,
    positions: PositionMask = None,
    scope: Scope = "all",
) -> HeadEdit:
    """Replace ``z`` with that of another example at the same position.

    Args:
        heads: heads to edit.
        donors: outputs of other examples by layer, ``[batch pos head d_head]``.
        positions: mask ``[batch pos]`` of the positions to edit. Default: all.
        scope: ``all``, ``prefill`` or ``decode``.

    Returns:
        The edit.

    Example:
        >>> values = hs.ablation.head_values(model, probe.tokens.flip(0))
        >>> hs.edits.resample("L1H2", values).site
        'z'
    """
    return HeadEdit.at("resample", heads, donors=donors, positions=positions, scope=scope)


@checked
def uniform(heads: Heads, *, positions: PositionMask = None, scope: Scope = "all") -> HeadEdit:
    """Zero the query, so that attention is uniform over the visible keys.

    The retrieval-head literature calls this masking (Wu et al. 2024, arXiv 2404.15574). Exact if
    only ``q k`` enters the softmax: a position bias (ALiBi) remains, and with a learned sink
    (gpt-oss) the row is flat except for the sink's share.

    Args:
        heads: heads to edit.
        positions: mask ``[batch pos]`` of the query positions to edit. Default: all.
        scope: ``all``, ``prefill`` or ``decode``.

    Returns:
        The edit.

    Example:
        >>> with model.edited([hs.edits.uniform("L0H0")]):
        ...     rows = hs.capture.collect(model, probe, layers=[0], heads=[0])[0].pattern
        >>> torch.allclose(rows[0, 0, 3, :4], torch.full((4,), 0.25))
        True
    """
    return HeadEdit.at("uniform", heads, site="query", positions=positions, scope=scope)


@checked
def freeze_pattern(
    heads: Heads,
    patterns: Mapping[int, Float[Tensor, "batch head query key"]],
    *,
    positions: PositionMask = None,
) -> HeadEdit:
    """Freeze attention to its pattern in another run, whatever its queries and keys are.

    Args:
        heads: heads to edit.
        patterns: attention patterns by layer, ``[batch head query key]``.
        positions: mask ``[batch pos]`` of the query positions to edit. Default: all.

    Returns:
        The edit.

    Example:
        >>> patterns = hs.ablation.head_values(model, probe.tokens, site="pattern")
        >>> hs.edits.freeze_pattern("L0H0", patterns).site
        'pattern'
    """
    return HeadEdit.at(
        "freeze_pattern", heads, site="pattern", donors=patterns, positions=positions
    )


@checked
def patch(
    heads: Heads,
    donors: Mapping[int, Tensor],
    *,
    site: HeadSite = "z",
    positions: PositionMask = None,
) -> HeadEdit:
    """Replace the value at a site with that of a paired run, position by position.

    At ``key`` and ``value`` the heads are key/value heads, which several query heads may share.

    Args:
        heads: heads to edit.
        donors: values of the paired run at the site, by layer.
        site: site to edit: ``z``, ``query``, ``key``, ``value`` or ``pattern``.
        positions: mask ``[batch pos]`` of the positions to edit. Default: all.

    Returns:
        The edit.

    Example:
        >>> keys = hs.ablation.head_values(model, probe.control.tokens, site="key")
        >>> hs.edits.patch("L1H0", keys, site="key").site
        'key'
    """
    return HeadEdit.at("patch", heads, site=site, donors=donors, positions=positions)


@checked
def scale(
    heads: Heads,
    factor: float,
    *,
    site: HeadSite = "z",
    positions: PositionMask = None,
    scope: Scope = "all",
) -> HeadEdit:
    """Multiply the value at a site by a factor.

    Args:
        heads: heads to edit.
        factor: multiplier.
        site: site to edit: ``z``, ``query``, ``key`` or ``value``.
        positions: mask ``[batch pos]`` of the positions to edit. Default: all.
        scope: ``all``, ``prefill`` or ``decode``.

    Returns:
        The edit.

    Example:
        >>> hs.edits.scale("L1H0", 0.5, positions=probe.mark("second_copy")).factor
        0.5
    """
    return HeadEdit.at("scale", heads, site=site, factor=factor, positions=positions, scope=scope)


@checked
def redistribute(
    heads: Heads,
    source: Bool[Tensor, "batch pos"],
    target: Bool[Tensor, "batch pos"],
    share: int | float = 0.5,
    *,
    positions: PositionMask = None,
    scope: Scope = "all",
) -> HeadEdit:
    """A share of the attention on some keys goes to others, in proportion to what those get.

    ``A[i, j] (1 - share)`` at a source, ``A[i, j] (1 + share S / T)`` at a target, with ``S`` and
    ``T`` what all sources and all targets get: rows keep their sum, and 0 changes nothing. A row
    that gives its targets nothing stays as it is. A key that is both counts as a target.

    Args:
        heads: heads to use.
        source: keys that lose attention; what is generated later is none.
        target: keys that gain it.
        share: share of the sources' attention, 0 to 1.
        positions: positions of the queries; None: all.
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


@checked
def scale_keys(
    heads: Heads,
    keys: Bool[Tensor, "batch key"],
    factor: float | Float[Tensor, "layer head"],
    *,
    positions: PositionMask = None,
) -> HeadEdit:
    """Attention to some keys is multiplied after the softmax; rows are not made to sum to 1 again.

    Args:
        heads: heads to use.
        keys: keys to use, e.g. the tokens of a concept in the text that cross-attention reads.
        factor: 1 changes nothing, 0 takes these keys out, less turns what they add around; a
            number for all, or one for every head.
        positions: positions of the queries; None: all.

    Example:
        >>> edit = hs.edits.scale_keys("L0H0", torch.tensor([[True, False]]), -2.0)
        >>> edit(0, torch.tensor([[[[0.5, 0.5]]]])).tolist()
        [[[[-1.0, 0.5]]]]
    """
    chosen = head_list(heads)
    every = torch.as_tensor(factor, dtype=torch.float32)
    donors = {}
    for layer in {head.layer for head in chosen}:
        # What is added to a factor of 1, so that keys beyond those that were given stay.
        change = (every[layer][:, None] if every.ndim else every.view(1, 1)) - 1
        donors[layer] = (change * keys[:, None].float().to(every.device))[:, :, None]
    return HeadEdit.at(
        "scale_keys", chosen, site="pattern", donors=donors, change=_with_scaled_keys,
        positions=positions,
    )  # fmt: skip


def _with_scaled_keys(pattern: Tensor, change: Tensor | None) -> Tensor:
    return pattern if change is None else pattern * (1 + change)


@checked
def attend_to_first(
    heads: Heads, real: Bool[Tensor, "batch pos"], *, positions: PositionMask = None
) -> HeadEdit:
    """Put all attention on each example's first real token, where idle heads rest.

    Args:
        heads: heads to use.
        real: the probe's real positions.
        positions: query positions; None: all.

    Example:
        >>> hs.edits.attend_to_first("L1H0", probe.real).site
        'pattern'
    """
    first = real.int().argmax(1)
    row = torch.nn.functional.one_hot(first, real.shape[1]).float()[:, None, None]
    layers = {head.layer for head in head_list(heads)}
    donors = dict.fromkeys(layers, row)
    return HeadEdit.at("attend_to_first", heads, site="pattern", donors=donors, positions=positions)
