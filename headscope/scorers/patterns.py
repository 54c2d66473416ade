"""Textbook attention patterns: fixed offsets, repeated tokens, induction, and image neighbours."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError
from headscope.probes.probe import Probe
from headscope.scorer import (
    IMAGES,
    Scorer,
    all_queries,
    queries_before,
    queries_past,
    queries_with,
    repeated_queries,
    row_scorer,
)
from headscope.views import AttentionRows

# Mean from which a head gets the role of its offset.
_THRESHOLD = 0.4


def _back(rows: AttentionRows, distance: int) -> Float[Tensor, "batch head query"]:
    return rows.at((rows.query_pos - distance).expand(rows.held.shape[0], -1))


@row_scorer(
    source="Olsson et al. 2022 (arXiv 2209.11895), previous-token score; ARENA's threshold",
    threshold=_THRESHOLD,
    needs=("one_sequence", "text"),
)
def previous_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the previous token.

    ``A[i, i-1]``, a probability in [0, 1], over every query but the first. Uniform attention gives
    ``1/(i+1)``.

    Weakness: some heads do this on random tokens more than on English (GPT-2 small L3H7 .54 and
    .36, L6H8 .48 and .19, L5H6 .42 and .14), so compare both probes. The threshold takes in the
    published heads of GPT-2 small (L4H11 .99, L2H2 .49), and on random tokens four others.
    """
    return _back(rows, 1)


@row_scorer(
    source="ARENA 2.0, current-token score and threshold",
    threshold=0.4,
    needs=("one_sequence",),
)
def current_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the query's own token.

    ``A[i, i]``, a probability in [0, 1], over every query but the first, where it is 1 by
    construction.

    Weakness: a head with nothing to do may rest on itself instead of on the first token; look
    at the size of what it writes.
    """
    return _back(rows, 0)


@row_scorer(
    source="Clark et al. 2019 (arXiv 1906.04341), attention to the next token",
    probe="text",
    queries=queries_before(1),
    threshold=_THRESHOLD,
    needs=("bidirectional", "one_sequence", "text"),
)
def next_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the next token, in models without a causal mask.

    ``A[i, i+1]``, a probability in [0, 1], over every query but the first and the last. Uniform
    attention gives 1 over the number of tokens.

    Weakness: as ``previous_token``, whose mirror image it is.
    """
    return _back(rows, -1)


@checked
def relative_offset(distance: int) -> Scorer:
    """Make a scorer of attention to the token ``distance`` back; its name is ``offset_<n>``.

    ``A[i, i-distance]``, a probability in [0, 1], over the queries that have such a key; NaN
    where the layer's window is too short for it. ``relative_offset(1)`` is ``previous_token``,
    ``relative_offset(-1)`` is ``next_token``.

    Args:
        distance: in tokens; negative for tokens after the query, in models that see them.

    Weakness: on repeated tokens a content head and a positional head look alike at the distance of
    the repetition; vary the length. The null is uniform attention, from which every head departs a
    little: the threshold, that of ``previous_token``, says which are worth a name.

    Example:
        >>> list(hs.score(model, probe, relative_offset(3)))
        ['offset_3']
    """

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        return _back(rows, distance)

    way = "back" if distance >= 0 else "ahead"
    function.__doc__ = f"Attention to the token {abs(distance)} {way}."
    return row_scorer(
        name=f"offset_{distance}",
        source="Voita et al. 2019 (arXiv 1905.09418), positional heads, as mass",
        threshold=_THRESHOLD,
        queries=queries_past(distance) if distance >= 0 else queries_before(-distance),
        needs=(() if distance >= 0 else ("bidirectional",)) + ("one_sequence", "text"),
    )(function)


# Up to this many earlier occurrences, look each one up; beyond, a mask of the chunk is cheaper.
_LOOK_UPS = 4


@row_scorer(
    source="Wang et al. 2022 (arXiv 2211.00593), duplicate-token heads",
    queries=repeated_queries,
    control="unrepeated",
    threshold=0.25,
    needs=("one_sequence", "text"),
)
def duplicate_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to earlier occurrences of the query's token.

    ``sum of A[i, j] over j < i with token j = token i``, a probability in [0, 1], over the
    queries that have one. Its null is the same positions in the control without repetition.

    Weakness: a head at the fixed distance of the repetition scores too; the control shows it.
    The threshold takes in the published heads of GPT-2 small, the lowest of which has .26.
    """
    return earlier_mass(rows, probe, 0)


@row_scorer(
    source="Olsson et al. 2022 (arXiv 2209.11895), prefix matching; ARENA's threshold",
    queries=repeated_queries,
    control="unrepeated",
    threshold=0.4,
    needs=("causal",),
)
def induction(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the tokens that followed earlier occurrences of the query's token.

    ``sum of A[i, j] over j <= i with token j-1 = token i``, a probability in [0, 1], over the
    queries whose token occurred before. On ``[BOS] R R`` with N tokens in R that is key
    ``i-N+1`` and exactly the N queries of the second copy; the whole diagonal that many
    notebooks average holds one or two more entries, which are not induction. Its null is the
    same positions in the control without repetition.

    Weakness: it sees where the head looks, not whether it copies; read it beside ``copying``
    or ``direct_logit_attribution``. The threshold lies well above a head that spreads out.
    """
    return earlier_mass(rows, probe, 1)


def earlier_mass(
    rows: AttentionRows, probe: Probe, shift: int
) -> Float[Tensor, "batch head query"]:
    """Attention mass on the keys ``shift`` after earlier occurrences of the query's token.

    NaN where none of them is visible.
    """
    if probe.most_earlier <= _LOOK_UPS:
        return mass_by_look_up(rows, probe, shift)
    return mass_by_mask(rows, probe, shift)


def mass_by_look_up(
    rows: AttentionRows, probe: Probe, shift: int
) -> Float[Tensor, "batch head query"]:
    """Compute the mass with one gather per earlier occurrence, reading a few entries per row."""
    link = probe.previous_occurrence[:, rows.query_pos]
    total = rows.at(torch.where(link >= 0, link + shift, -1))
    for _ in range(probe.most_earlier - 1):
        link = probe.previous_occurrence.gather(1, link.clamp_min(0)).where(link >= 0, -1)
        further = rows.at(torch.where(link >= 0, link + shift, -1))
        both = total.nan_to_num(0) + further.nan_to_num(0)
        total = both.masked_fill(total.isnan() & further.isnan(), torch.nan)
    return total


def mass_by_mask(
    rows: AttentionRows, probe: Probe, shift: int
) -> Float[Tensor, "batch head query"]:
    """Compute the mass with one mask ``[batch query key]`` per chunk."""
    labels = probe.structure.masked_fill(~probe.real, -1)
    wanted = labels[:, rows.query_pos]
    source = torch.full_like(labels, -2)  # label of the token that stands `shift` before each key
    source[:, shift:] = labels[:, : labels.shape[1] - shift]
    key = torch.arange(labels.shape[1], device=labels.device)
    earlier = key[None, :] - shift < rows.query_pos[:, None]
    same = (source[:, None, :] == wanted[:, :, None]) & (wanted >= 0)[:, :, None]
    return rows.mass(same & earlier)


def _diluted(scorer: Scorer, tail: str) -> Scorer:
    """``scorer`` over all queries, counting 0 where it has no target."""

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        values: Tensor = scorer.function(rows, probe)
        return values.nan_to_num(0)

    function.__doc__ = f"Share of all attention on {tail}, as in transformer-lens' detect_head."
    return row_scorer(
        name=f"detect_head_{scorer.name}",
        source="transformer-lens, head_detector.detect_head, error measure 'mul'",
        queries=all_queries,
        control=None,
        needs=("causal",),
    )(function)


detect_head_previous_token = _diluted(previous_token, "the previous token")
detect_head_duplicate_token = _diluted(duplicate_token, "earlier occurrences of the token")
detect_head_induction = _diluted(induction, "the tokens after earlier occurrences")


_NEEDS = ("patches", "bidirectional")


@checked
def hop_mass(hops: int, *, name: str | None = None, threshold: float | None = None) -> Scorer:
    """Make a scorer of attention between patches ``hops`` apart; its name is ``hop_<n>``.

    ``sum of A[i, j] over the patches j with max(|row_i - row_j|, |column_i - column_j|) = hops``, a
    probability in [0, 1], over every patch i that has such a j. Hop 0 is the patch itself, hop 1
    its 8 neighbours (fewer at the edges), which is ``patch_neighbours``.

    Args:
        hops: Chebyshev distance on the grid of patches.
        name: name of the scorer.
        threshold: mean from which a head gets the role of this name.

    Weakness: more patches lie at a larger distance; its null, uniform attention, shows how many.

    Raises:
        InputError: if the distance is negative.

    Example:
        >>> hs.scorers.hop_mass(2).name
        'hop_2'
    """
    if hops < 0:
        raise InputError(f"hops={hops}: give 0 (the patch itself) or more.")

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        apart = _apart(rows, probe).abs().amax(-1)
        patches = _between_patches(rows, probe)
        keys = (apart == hops) & patches
        return rows.mass(keys[None].expand(rows.pattern.shape[0], -1, -1))

    function.__doc__ = f"Attention to patches at a distance of {hops}, in rows or columns."
    return row_scorer(
        name=name or f"hop_{hops}",
        source="Xie et al. 2023 (arXiv 2303.13731), attention by k-hop neighbourhood",
        probe=IMAGES,
        threshold=threshold,
        needs=_NEEDS,
    )(function)


patch_neighbours = hop_mass(1, name="patch_neighbours", threshold=0.5)


@row_scorer(
    source="Darcet et al. 2023 (arXiv 2309.16588), attention to the class token",
    probe=IMAGES,
    queries=queries_with("class"),
    threshold=0.5,
    needs=_NEEDS,
)
def class_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention of patches to the class token.

    ``A[i, class]``, a probability in [0, 1], over every patch. The class token's own row is
    left out.

    Weakness: patches park attention there, as text models do on the first token.
    """
    return rows.column_mass(probe.mark("class"))


@row_scorer(
    source="Darcet et al. 2023 (arXiv 2309.16588), attention to registers",
    probe=IMAGES,
    queries=queries_with("register"),
    threshold=0.5,
    needs=_NEEDS,
)
def registers(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention of patches to the register tokens, all of them together.

    ``sum of A[i, j] over the registers j``, a probability in [0, 1], over every patch.

    Weakness: as ``class_token``; a model without registers keeps such attention in some patches.
    """
    return rows.column_mass(probe.mark("register"))


def mean_reach(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Mean distance between patch centres, weighted by attention between patches.

    Args:
        rows: attention rows.
        probe: a probe of images.
    """
    far = _apart(rows, probe).to(rows.pattern.dtype).norm(dim=-1)
    weight = rows.pattern * _between_patches(rows, probe)
    mean: Tensor = torch.linalg.vecdot(weight, far) / weight.sum(-1)
    return mean


def _apart(rows: AttentionRows, probe: Probe) -> Tensor:
    """Row and column offsets between query and key patches."""
    assert probe.grid is not None  # noqa: S101  # check_fits saw to it
    return probe.grid.offsets(rows.query_pos)[:, : rows.pattern.shape[-1]]


def _between_patches(rows: AttentionRows, probe: Probe) -> Tensor:
    """Mask of the (query, key) pairs in which both are patches."""
    assert probe.grid is not None  # noqa: S101  # check_fits saw to it
    keys = torch.arange(rows.pattern.shape[-1], device=rows.pattern.device)
    return probe.grid.is_patch(rows.query_pos)[:, None] & probe.grid.is_patch(keys)
