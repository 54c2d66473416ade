"""Attention from one marked place to another: the roles of a known circuit."""

from jaxtyping import Bool, Float
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.scorer import Scorer, row_scorer
from headscope.scorers.queries import queries_at
from headscope.views.rows import AttentionRows

_IOI_THRESHOLD = 0.25


def between(
    query: str,
    key: str,
    *,
    name: str | None = None,
    probe: str = "ioi",
    source: str = "user",
    threshold: float | None = None,
    needs: tuple[str, ...] = (),
) -> Scorer:
    """Make the scorer of attention from the positions of one mark to those of another.

    ``sum of A[i, j] over the keys marked key``, a probability in [0, 1], over the queries
    marked ``query``; NaN where none of the keys can be seen.

    Weakness: where a head looks says nothing of what it does there; see
    ``direct_logit_difference`` and ablation. The null is attention spread evenly, from which
    every head departs a little, whatever it does: with 32 prompts of one template even .001 is
    found, so ask for a mean worth a name (``threshold``). Those of the IOI circuit ask for a
    quarter, about half of what the source's name movers and S-inhibition heads give on average.

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
        name=name or f"{query}_to_{key}",
        probe=probe,
        queries=queries,
        source=source,
        threshold=threshold,
        needs=needs,
    )(function)


def _ioi(name: str, query: str, key: str, what: str) -> Scorer:
    source = f"Wang et al. 2022 (arXiv 2211.00593), {what}"
    return between(
        query, key, name=f"ioi_{name}", source=source, threshold=_IOI_THRESHOLD, needs=("causal",)
    )


name_mover = _ioi("name_mover", "end", "io", "name movers")
s_inhibition = _ioi("s_inhibition", "end", "s2", "S-inhibition")
ioi_induction = _ioi("induction", "s2", "s1_next", "induction")
ioi_duplicate = _ioi("duplicate_token", "s2", "s1", "duplicate")
ioi_previous = _ioi("previous_token", "s1_next", "s1", "previous")
