"""What a scorer is: one pure function and what it declares about itself."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from headscope.matches import Matches
from headscope.outputs import HeadOutputs
from headscope.probes.probe import Probe
from headscope.rows import AttentionRows

QuerySelector = Callable[[Probe], Bool[Tensor, "batch pos"]]
Kind = Literal["row", "output", "match"]
View = Literal["plain", "no_sink", "value_weighted"]
Control = Literal["flat", "unrepeated", "needle", "other_example"]
Alternative = Literal["greater", "two-sided"]
RowFunction = Callable[[AttentionRows, Probe], Float[Tensor, "batch head query"]]
OutputFunction = Callable[[HeadOutputs, Probe], Float[Tensor, "batch head query"]]
MatchFunction = Callable[[Matches, Probe], Float[Tensor, "batch head query"]]


@dataclass(frozen=True)
class Scorer:
    """A score for every head: a pure function of one layer and a probe, and what it declares.

    The function returns a value per query; the engine averages over the queries that
    ``queries(probe)`` selects, then over examples. NaN marks a query whose target the head
    could not see; it is counted and left out.

    Attributes:
        name: column name in the table.
        function: ``(rows | outputs | matches, probe) -> [batch head query]``.
        kind: what the function reads.
        unit: of the value, e.g. ``attention`` (probability), ``nats``, ``logits``, ``tokens``.
        bounds: smallest and largest possible value; None where there is none.
        source: paper and definition.
        queries: which queries count.
        probe: kind of probe that it is meant for.
        control: what the null is: ``flat`` (attention spread evenly over the visible keys;
            paired), ``unrepeated`` (the probe's control: same shape, no repetition), ``needle``
            (the probe's control: another needle, or another question), ``other_example`` (the
            function asked of another example of the same length, on this one's rows; paired;
            see :func:`headscope.scorers.relation`), None for no null. Whether
            a probe's control is paired, it says itself (``probe.control.paired``).
        threshold: mean above which a significant head is called by this name; None: never.
        alternative: what the null is tested against: ``greater`` than the control, or
            ``two-sided``: other than it. The decorators take the second where 0 lies inside the
            bounds, so that a head that suppresses is seen.
        view: which form of the rows it reads.
        per_final_scale: the engine divides by the final norm's scale at each query.
        needs: capabilities the model must have: ``linear_write`` where ``z @ W_O`` itself must be
            what a head adds to the residual stream; ``attention_write`` where the norm that follows
            attention in some families may stand between, with its scale of this run held fixed;
            ``causal`` where the score means what it says only if no query sees a later key, and
            ``bidirectional`` where queries must.
    """

    name: str
    function: Callable[[Any, Probe], Float[Tensor, "batch head query"]]
    kind: Kind
    unit: str
    bounds: tuple[float | None, float | None]
    source: str
    queries: QuerySelector
    probe: str
    control: Control | None
    threshold: float | None = None
    alternative: Alternative = "greater"
    view: View = "plain"
    per_final_scale: bool = False
    needs: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """First sentence of the function's docstring."""
        return (inspect.getdoc(self.function) or self.name).split("\n\n")[0].replace("\n", " ")

    def __call__(self, seen: Any, probe: Probe) -> Float[Tensor, "batch head query"]:
        """Score one chunk."""
        return self.function(seen, probe)


def _tested(bounds: tuple[float | None, float | None]) -> Alternative:
    """Two-sided for a score whose sign has a meaning."""
    low, high = bounds
    signed = (low is None or low < 0) and (high is None or high > 0)
    return "two-sided" if signed else "greater"


def every_query(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Every real position but the first of each example, whose row is 1 by construction.

    Example:
        >>> bool(every_query(probe)[:, 0].any())  # never the first token
        False
    """
    return probe.real & (probe.position_in_text > 0)


def row_scorer(
    *,
    unit: str = "attention",
    bounds: tuple[float | None, float | None] = (0.0, 1.0),
    source: str = "user",
    queries: QuerySelector = every_query,
    probe: str = "repeated_tokens",
    control: Control | None = "flat",
    threshold: float | None = None,
    alternative: Alternative | None = None,
    needs: tuple[str, ...] = (),
    name: str | None = None,
) -> Callable[[RowFunction], Scorer]:
    """Make a scorer of a function of attention rows; see :class:`Scorer` for the arguments.

    Example:
        >>> @row_scorer()
        ... def three_back(rows, probe):
        ...     '''Attention to the token three back.'''
        ...     return rows.at((rows.query_pos - 3).expand(len(probe), -1))
        >>> three_back.name
        'three_back'
    """

    def wrap(function: RowFunction) -> Scorer:
        return Scorer(
            name=name or function.__name__,
            function=function,
            kind="row",
            unit=unit,
            bounds=bounds,
            source=source,
            queries=queries,
            probe=probe,
            control=control,
            threshold=threshold,
            alternative=alternative or _tested(bounds),
            needs=needs,
        )

    return wrap


def output_scorer(
    *,
    unit: str,
    bounds: tuple[float | None, float | None] = (None, None),
    source: str = "user",
    queries: QuerySelector = every_query,
    probe: str = "repeated_tokens",
    control: Control | None = "unrepeated",
    threshold: float | None = None,
    alternative: Alternative | None = None,
    per_final_scale: bool = False,
    needs: tuple[str, ...] = ("linear_write", "readout"),
    name: str | None = None,
) -> Callable[[OutputFunction], Scorer]:
    """Make a scorer of a function of head outputs; see :class:`Scorer` for the arguments.

    Example:
        >>> @output_scorer(unit="length", needs=())
        ... def size(outputs, probe):
        ...     '''Length of what the head gives before the projection.'''
        ...     return outputs.z.norm(dim=-1).transpose(1, 2)
        >>> hs.score(model, probe, size)["size"].unit
        'length'
    """

    def wrap(function: OutputFunction) -> Scorer:
        return Scorer(
            name=name or function.__name__,
            function=function,
            kind="output",
            unit=unit,
            bounds=bounds,
            source=source,
            queries=queries,
            probe=probe,
            control=control,
            threshold=threshold,
            alternative=alternative or _tested(bounds),
            per_final_scale=per_final_scale,
            needs=needs,
        )

    return wrap


def match_scorer(
    *,
    unit: str,
    bounds: tuple[float | None, float | None] = (None, None),
    source: str = "user",
    queries: QuerySelector = every_query,
    probe: str = "needle",
    control: Control | None = "needle",
    alternative: Alternative | None = None,
    needs: tuple[str, ...] = (),
    name: str | None = None,
) -> Callable[[MatchFunction], Scorer]:
    """Make a scorer of a function of queries and keys; see :class:`Scorer` for the arguments.

    Example:
        >>> @match_scorer(unit="score", control=None)
        ... def own_match(matches, probe):
        ...     '''Score of each token with itself, before the softmax.'''
        ...     own = matches.query_pos.expand(*matches.scores.shape[:2], -1)
        ...     return matches.scores.gather(-1, own[..., None])[..., 0]
        >>> bool(hs.score(model, probe, own_match)["own_match"].mean.std() > 0)
        True
    """

    def wrap(function: MatchFunction) -> Scorer:
        return Scorer(
            name=name or function.__name__,
            function=function,
            kind="match",
            unit=unit,
            bounds=bounds,
            source=source,
            queries=queries,
            probe=probe,
            control=control,
            alternative=alternative or _tested(bounds),
            needs=("matches", *needs),
        )

    return wrap


def without_sink(scorer: Scorer) -> Scorer:
    """The same scorer on rows renormalised without the first position.

    Example:
        >>> without_sink(hs.scorers.CATALOGUE["entropy"]).name
        'entropy_no_sink'
    """
    return replace(scorer, name=f"{scorer.name}_no_sink", view="no_sink")


def value_weighted(scorer: Scorer) -> Scorer:
    """The same scorer on rows weighted by what each key's value writes (Kobayashi 2020).

    Example:
        >>> value_weighted(hs.scorers.CATALOGUE["induction"]).name
        'induction_value_weighted'
    """
    return replace(
        scorer,
        name=f"{scorer.name}_value_weighted",
        view="value_weighted",
        needs=(*scorer.needs, "attention_write", "ov"),
    )
