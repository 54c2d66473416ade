"""Which queries of a probe count: one function per choice, shared by scorers."""

from jaxtyping import Bool
from torch import Tensor

from headscope.probes.probe import Probe
from headscope.scorer import QuerySelector, every_query


def all_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Every real position, the first included: only to agree with tools that do not drop it."""
    return probe.real


def repeated_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Positions whose token occurred before.

    On ``[BOS] R R`` these are exactly the positions of the second copy.
    """
    return every_query(probe) & (probe.previous_occurrence >= 0)


def predicting_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Positions that a prediction is asked of, and that could know the answer.

    Those with a target; where the probe marks a ``second_copy``, only those in it, since the
    first copy is random.
    """
    if probe.grid is not None:  # the answer of an image stands at its first position
        return probe.real & (probe.targets >= 0)
    asked = every_query(probe) & (probe.targets >= 0)
    return asked & probe.mark("second_copy") if "second_copy" in probe.marks else asked


def contrasting_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Positions that have both a target and a foil."""
    if probe.foils is None:
        return probe.real & False
    return predicting_queries(probe) & (probe.foils >= 0)


def queries_past(distance: int) -> QuerySelector:
    """Positions with at least ``distance`` real tokens before them."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        return probe.real & (probe.position_in_text >= max(distance, 1))

    return selector


def queries_before(distance: int) -> QuerySelector:
    """Every query with at least ``distance`` real tokens after it."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        left = probe.last[:, None] - probe.first[:, None] - probe.position_in_text
        return every_query(probe) & (left >= distance)

    return selector


def queries_with(mark: str) -> QuerySelector:
    """Every query, of a probe that must have the mark: asking says so before any forward."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        probe.mark(mark)
        return every_query(probe)

    return selector


def queries_at(mark: str) -> QuerySelector:
    """The positions of a mark."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        return every_query(probe) & probe.mark(mark)

    return selector
