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

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.edits.head_edit import HeadEdit as HeadEdit
from headscope.edits.head_edit import Heads as Heads
from headscope.edits.head_edit import HeadSite as HeadSite
from headscope.edits.head_edit import Scope as Scope
from headscope.edits.head_edit import Span as Span
from headscope.edits.head_edit import head_list as head_list
from headscope.edits.sparse import entmax as entmax
from headscope.edits.sparse import top_k as top_k
from headscope.edits.stacked import AnyEdit as AnyEdit
from headscope.edits.stacked import SpanEdit as SpanEdit
from headscope.edits.stacked import Stacked as Stacked
from headscope.edits.stacked import Variant as Variant
from headscope.edits.stacked import among as among
from headscope.edits.stacked import cut as cut
from headscope.edits.stacked import during as during
from headscope.edits.stacked import edited_heads as edited_heads
from headscope.edits.stacked import first_layer as first_layer
from headscope.edits.stacked import first_position as first_position
from headscope.edits.stacked import stack as stack

Positions = Bool[Tensor, "batch pos"] | None


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
