"""Edits: interventions on heads, as values.

Each function takes heads (``"L5H1"``, ``"5.1"``, ``(5, 1)``, one or several) and gives a frozen
:class:`HeadEdit`, for ``model.forward(..., edits=...)``, for ``model.edited(...)`` and for
:func:`headscope.ablate_heads`. A head's slice is taken before the output projection: after it
there are no heads. Values that an edit needs (means, other runs) are captured beforehand, by
:func:`headscope.ablation.head_means` and :func:`headscope.ablation.head_values`; they are data.

``positions`` limits an edit to marked positions, e.g. ``probe.mark("end")``; ``scope`` to the
first pass over a prompt (``prefill``) or to generation one token at a time (``decode``).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.edits.head_edit import HeadEdit as HeadEdit
from headscope.edits.head_edit import Heads as Heads
from headscope.edits.head_edit import Scope as Scope
from headscope.edits.head_edit import Site as Site
from headscope.edits.head_edit import head_list as head_list
from headscope.edits.stacked import AnyEdit as AnyEdit
from headscope.edits.stacked import Stacked as Stacked
from headscope.edits.stacked import Variant as Variant
from headscope.edits.stacked import cut as cut
from headscope.edits.stacked import first_layer as first_layer
from headscope.edits.stacked import first_position as first_position
from headscope.edits.stacked import stack as stack

Positions = Bool[Tensor, "batch pos"] | None


def zero(heads: Heads, *, positions: Positions = None, scope: Scope = "all") -> HeadEdit:
    """``z`` becomes 0. What a value bias adds goes too; the output bias stays."""
    return HeadEdit.at("zero", heads, positions=positions, scope=scope)


def mean(
    heads: Heads,
    means: Mapping[int, Float[Tensor, "head d_head"]],
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """``z`` becomes the head's mean over a reference probe."""
    return HeadEdit.at("mean", heads, donors=means, positions=positions, scope=scope)


def mean_pos(
    heads: Heads,
    means: Mapping[int, Float[Tensor, "pos head d_head"]],
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """``z`` becomes the head's mean at that position: for prompts of one template."""
    return HeadEdit.at("mean_pos", heads, donors=means, positions=positions, scope=scope)


def resample(
    heads: Heads,
    donors: Mapping[int, Float[Tensor, "batch pos head d_head"]],
    *,
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """``z`` becomes that of another example at the same position."""
    return HeadEdit.at("resample", heads, donors=donors, positions=positions, scope=scope)


def uniform(heads: Heads, *, positions: Positions = None, scope: Scope = "all") -> HeadEdit:
    """The query becomes 0, so that attention is uniform over the visible keys.

    What the retrieval-head literature calls masking (Wu et al. 2024, arXiv 2404.15574). Exact
    where nothing but ``q k`` enters the softmax: with a position bias (ALiBi) the bias remains, and
    with a learned sink (gpt-oss) the row is flat but for the sink's share.
    """
    return HeadEdit.at("uniform", heads, site="query", positions=positions, scope=scope)


def freeze_pattern(
    heads: Heads,
    patterns: Mapping[int, Float[Tensor, "batch head query key"]],
    *,
    positions: Positions = None,
) -> HeadEdit:
    """Attention stays what it was in another run, whatever its queries and keys become."""
    return HeadEdit.at(
        "freeze_pattern", heads, site="pattern", donors=patterns, positions=positions
    )


def patch(
    heads: Heads,
    donors: Mapping[int, Tensor],
    *,
    site: Site = "z",
    positions: Positions = None,
) -> HeadEdit:
    """The value at a site becomes that of a paired run, position by position.

    At ``key`` and ``value`` heads are key/value heads, which several query heads may share.
    """
    return HeadEdit.at("patch", heads, site=site, donors=donors, positions=positions)


def scale(
    heads: Heads,
    factor: float,
    *,
    site: Site = "z",
    positions: Positions = None,
    scope: Scope = "all",
) -> HeadEdit:
    """The value at a site is multiplied."""
    return HeadEdit.at("scale", heads, site=site, factor=factor, positions=positions, scope=scope)


def attend_to_first(
    heads: Heads, real: Bool[Tensor, "batch pos"], *, positions: Positions = None
) -> HeadEdit:
    """All attention goes to each example's first real token, where idle heads rest.

    Args:
        heads: which.
        real: the probe's real positions.
        positions: of the queries; None: all.
    """
    first = real.int().argmax(1)
    row = torch.nn.functional.one_hot(first, real.shape[1]).float()[:, None, None]
    layers = {head.layer for head in head_list(heads)}
    donors = dict.fromkeys(layers, row)
    return HeadEdit.at("attend_to_first", heads, site="pattern", donors=donors, positions=positions)
