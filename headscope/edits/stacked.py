"""Several variants of a pass stacked in its batch, each with edits of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from headscope.edits.head_edit import SITES, HeadEdit, HeadSite, Span


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
