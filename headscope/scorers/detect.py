"""Scores equal to transformer-lens' ``detect_head(..., error_measure="mul")``.

Kept for agreement with published numbers. They average over all queries, also those that have
no target and the first one, and count what cannot be seen as 0; so 1 is out of reach (about
half on a text said twice). ``previous_token``, ``duplicate_token`` and ``induction`` do not.
They have no null: a control asks the queries that have a target, and these average over all.
"""

from jaxtyping import Float
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorer import Scorer, row_scorer
from headscope.scorers.offsets import previous_token
from headscope.scorers.queries import all_queries
from headscope.scorers.repetition import duplicate_token, induction


def _diluted(scorer: Scorer, tail: str) -> Scorer:
    """``scorer`` over all queries, 0 where it has no target."""

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        values: Tensor = scorer.function(rows, probe)
        return values.nan_to_num(0)

    function.__doc__ = (
        f"Share of all attention that lies on {tail}, as transformer-lens' detect_head has it."
    )
    return row_scorer(
        name=f"detect_head_{scorer.name}",
        source="transformer-lens, head_detector.detect_head, error measure 'mul'",
        queries=all_queries,
        control=None,
        needs=("causal",),
    )(function)


detect_head_previous_token = _diluted(previous_token, "the token before")
detect_head_duplicate_token = _diluted(duplicate_token, "earlier equal tokens")
detect_head_induction = _diluted(induction, "the followers of earlier equal tokens")
