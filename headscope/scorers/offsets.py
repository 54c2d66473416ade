"""Attention to a key at a fixed distance: previous token, current token, any other."""

from jaxtyping import Float
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorer import Scorer, row_scorer
from headscope.scorers.queries import queries_before, queries_past

# Mean from which a head is named for the distance that it looks back.
_THRESHOLD = 0.4


def _back(rows: AttentionRows, distance: int) -> Float[Tensor, "batch head query"]:
    return rows.at((rows.query_pos - distance).expand(rows.pattern.shape[0], -1))


@row_scorer(
    source="Olsson et al. 2022 (arXiv 2209.11895), previous-token score; ARENA's threshold",
    threshold=_THRESHOLD,
)
def previous_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the token just before.

    ``A[i, i-1]``, a probability in [0, 1], over every query but the first. Spread evenly it is
    ``1/(i+1)``.

    Weakness: some heads do this on random tokens more than on English (GPT-2 small L3H7 .54 and
    .36, L6H8 .48 and .19, L5H6 .42 and .14), so compare both probes. The threshold takes in the
    published heads of GPT-2 small (L4H11 .99, L2H2 .49), and on random tokens four others.
    """
    return _back(rows, 1)


@row_scorer(source="ARENA 2.0, current-token score and threshold", threshold=0.4)
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
    needs=("bidirectional",),
)
def next_token(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Attention to the token just after, where queries see it.

    ``A[i, i+1]``, a probability in [0, 1], over every query but the first and the last. Spread
    evenly it is 1 over the number of tokens.

    Weakness: as ``previous_token``, whose mirror image it is.
    """
    return _back(rows, -1)


def relative_offset(distance: int) -> Scorer:
    """Make the scorer of attention to the token ``distance`` back; its name is ``offset_<n>``.

    ``A[i, i-distance]``, a probability in [0, 1], over the queries that have such a key; NaN
    where the layer's window is too short for it. ``relative_offset(1)`` is ``previous_token``,
    ``relative_offset(-1)`` is ``next_token``.

    Args:
        distance: in tokens; below 0 that many after the query, for models that see them.

    Weakness: on repeated tokens a content head and a positional head look alike at the distance
    of the repetition; vary the length. The null is attention spread evenly, from which every head
    departs a little: the threshold, that of ``previous_token``, says which are worth a name.

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
        needs=() if distance >= 0 else ("bidirectional",),
    )(function)
