"""Attention from one marked place to another: the roles of a known circuit."""

from jaxtyping import Bool, Float
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorers.base import Scorer, row_scorer
from headscope.scorers.queries import queries_at


def between(
    query: str, key: str, *, name: str | None = None, probe: str = "ioi", source: str = "user"
) -> Scorer:
    """Make the scorer of attention from the positions of one mark to those of another.

    ``sum of A[i, j] over the keys marked key``, a probability in [0, 1], over the queries
    marked ``query``; NaN where none of the keys can be seen.

    Weakness: where a head looks says nothing of what it does there; see
    ``direct_logit_difference`` and ablation.

    Example:
        >>> between("end", "io").name
        'end_to_io'
    """

    def queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
        probe.mark(key)  # so that a missing mark is said before any forward pass
        return queries_at(query)(probe)

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        return rows.column_mass(probe.mark(key))

    function.__doc__ = f"Attention from '{query}' to '{key}'."
    return row_scorer(
        name=name or f"{query}_to_{key}", probe=probe, queries=queries, source=source
    )(function)


_IOI = "Wang et al. 2022 (arXiv 2211.00593), {}"
name_mover = between("end", "io", name="ioi_name_mover", source=_IOI.format("name movers"))
s_inhibition = between("end", "s2", name="ioi_s_inhibition", source=_IOI.format("S-inhibition"))
ioi_induction = between("s2", "s1_next", name="ioi_induction", source=_IOI.format("induction"))
ioi_duplicate = between("s2", "s1", name="ioi_duplicate_token", source=_IOI.format("duplicate"))
ioi_previous = between("s1_next", "s1", name="ioi_previous_token", source=_IOI.format("previous"))
