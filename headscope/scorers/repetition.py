"""Attention to earlier occurrences of the query's token, and to what followed them."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorer import row_scorer
from headscope.scorers.queries import repeated_queries

# Up to this many earlier occurrences each is looked up; beyond, a mask of the chunk is cheaper.
_LOOK_UPS = 4


@row_scorer(
    source="Wang et al. 2022 (arXiv 2211.00593), duplicate-token heads",
    queries=repeated_queries,
    control="unrepeated",
    threshold=0.25,
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
    """Attention to the keys ``shift`` after earlier occurrences, all of them together.

    NaN where none of them is visible.
    """
    if probe.most_earlier <= _LOOK_UPS:
        return mass_by_look_up(rows, probe, shift)
    return mass_by_mask(rows, probe, shift)


def mass_by_look_up(
    rows: AttentionRows, probe: Probe, shift: int
) -> Float[Tensor, "batch head query"]:
    """One gather per earlier occurrence: reads a few entries of each row."""
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
    """All occurrences at once: a mask ``[batch query key]`` of the chunk."""
    labels = probe.structure.masked_fill(~probe.real, -1)
    wanted = labels[:, rows.query_pos]
    source = torch.full_like(labels, -2)  # label of the token that stands `shift` before each key
    source[:, shift:] = labels[:, : labels.shape[1] - shift]
    key = torch.arange(labels.shape[1], device=labels.device)
    earlier = key[None, :] - shift < rows.query_pos[:, None]
    same = (source[:, None, :] == wanted[:, :, None]) & (wanted >= 0)[:, :, None]
    return rows.mass(same & earlier)
