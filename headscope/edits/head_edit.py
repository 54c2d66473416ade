"""An intervention on heads, as a frozen value: which heads, where, and what they give instead.

Where is told by a span: which positions a pass runs, and which of them are decoding.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool
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
    """

    first: int
    count: int
    prompt: int
    grows: bool = False

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
