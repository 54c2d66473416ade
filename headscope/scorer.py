"""Scorers as values: a pure function, and what it declares about itself.

Each scorer carries its default probe and its control as values, so that the engine refers to none
of them by name.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope import probes
from headscope.base.arguments import checked
from headscope.base.specs import Direction, ScoreSpec, Specified
from headscope.base.stacks import grid_of
from headscope.base.statistics import Alternative, Bounds
from headscope.errors import InputError, nearest
from headscope.metrics import AnyMetric, as_metric
from headscope.probes.probe import Probe
from headscope.views import AttentionRows, HeadGradients, HeadOutputs, QueryKeys

QuerySelector = Callable[[Probe], Bool[Tensor, "batch pos"]]
ScorerKind = Literal["row", "output", "qk", "weight", "gradient"]
ScorerReads = Literal[
    "rows", "rows_no_sink", "rows_value_weighted", "outputs", "qk", "weights", "gradients"
]
RowFunction = Callable[[AttentionRows, Probe], Float[Tensor, "batch head query"]]
OutputFunction = Callable[[HeadOutputs, Probe], Float[Tensor, "batch head query"]]
QKFunction = Callable[[QueryKeys, Probe], Float[Tensor, "batch head query"]]
GradientFunction = Callable[[HeadGradients, Probe], Float[Tensor, "batch head query"]]
WeightFunction = Callable[[Any], Float[Tensor, "layer head"]]
Function = TypeVar("Function", bound=Callable[..., Tensor])

_KINDS: Mapping[ScorerReads, ScorerKind] = {
    "rows": "row",
    "rows_no_sink": "row",
    "rows_value_weighted": "row",
    "outputs": "output",
    "qk": "qk",
    "weights": "weight",
    "gradients": "gradient",
}


@dataclass(frozen=True)
class DefaultProbe:
    """Kind of probe that a scorer uses by default, and how to make it.

    Attributes:
        name: name of the kind.
        make: ``(model, seed) -> probe``.
        needs_tokenizer: whether random tokens would not do.
        stand_in: alternative for models without a tokenizer; None: none.
    """

    name: str
    make: Callable[[Any, int], Probe]
    needs_tokenizer: bool = False
    stand_in: "DefaultProbe | None" = None

    def suited(self, model: probes.HasVocabulary) -> "DefaultProbe":
        """This kind, or its stand-in if the model has no tokenizer or reads images."""
        if grid_of(getattr(model, "stacks", {})) is not None:
            return IMAGES
        if self.needs_tokenizer and model.tokenizer is None and self.stand_in is not None:
            return self.stand_in
        return self

    def possible(self, model: probes.HasVocabulary) -> bool:
        """Whether a probe of this kind, or of its stand-in, can be made for a model."""
        return model.tokenizer is not None or not self.suited(model).needs_tokenizer


def _repeated(model: probes.HasVocabulary, seed: int) -> Probe:
    longest = model.shape.n_ctx or 512
    length = min(50, (longest - 1) // 2)
    return probes.repeated_tokens(model, length=length, batch=16, seed=seed)


def _text(model: probes.HasVocabulary, seed: int) -> Probe:
    return probes.text(model, seed=seed)


REPEATED = DefaultProbe("repeated_tokens", _repeated)
TEXT = DefaultProbe("text", _text, needs_tokenizer=True, stand_in=REPEATED)
# For scorers of words, since random tokens contain no delimiters.
WORDS = DefaultProbe("text", _text, needs_tokenizer=True)
NEEDLE = DefaultProbe(
    "needle", lambda model, seed: probes.needle(model, seed=seed), needs_tokenizer=True
)
IOI = DefaultProbe(
    "ioi", lambda model, seed: probes.pairs(model, "ioi", seed=seed), needs_tokenizer=True
)
IMAGES = DefaultProbe(
    "random_images", lambda model, seed: probes.random_images(model, batch=16, seed=seed)
)
_PROBES = {one.name: one for one in (REPEATED, TEXT, NEEDLE, IOI, IMAGES)}


@dataclass(frozen=True)
class Control:
    """Null that a scorer's values are compared with.

    Attributes:
        name: name of the control, kept in the provenance.
        of: ``even_rows``: uniform attention over the visible keys, on the same examples; ``pass``:
            a pass over other examples; ``same_rows``: the function gets other examples' labels with
            this probe's rows.
        examples: function from a probe to the other examples; None if it needs none. Its result
            says whether they are paired with the probe's own (``probe.paired``); those of
            ``same_rows`` always are.
    """

    name: str
    of: Literal["even_rows", "pass", "same_rows"]
    examples: Callable[[Probe], Probe | None] = lambda probe: None


def _own_control(probe: Probe) -> Probe | None:
    return probe.control


def other_examples(probe: Probe) -> Probe:
    """Choose another example of the same length for each; ``alone`` is 1 if there is none.

    The choice is the next example in the order of their tokens, so it does not depend on the order
    of the examples.

    Example:
        >>> len(other_examples(probe)) == len(probe)
        True
    """
    order = sorted(range(len(probe)), key=lambda row: (probe.tokens[row].tolist(), row))
    peers: dict[tuple[int, int], list[int]] = {}
    for row in order:
        peers.setdefault((int(probe.first[row]), int(probe.last[row])), []).append(row)
    chosen = torch.arange(len(probe))
    for rows in peers.values():
        chosen[rows] = torch.tensor([*rows[1:], rows[0]])
    alone = (chosen == torch.arange(len(probe))).float()
    other = probe.examples(chosen)
    return replace(other, facts={**other.facts, "alone": alone})


FLAT = Control("flat", "even_rows")
UNREPEATED = Control("unrepeated", "pass", _own_control)
NEEDLE_CONTROL = Control("needle", "pass", _own_control)
OTHER_EXAMPLE = Control("other_example", "same_rows", other_examples)
_CONTROLS = {one.name: one for one in (FLAT, UNREPEATED, NEEDLE_CONTROL, OTHER_EXAMPLE)}


@dataclass(frozen=True)
class Scorer(Specified):
    """A score for every head: a pure function of what it reads, and what it declares.

    The function returns a value per query; the engine averages over the queries that
    ``queries(probe)`` selects, then over examples. NaN marks a query whose target the head
    could not see; it is counted and left out. A scorer of weights returns a value per head.

    Attributes:
        spec: what the score declares: name, unit, bounds, direction, source, threshold, ...
        function: ``(rows | outputs | QK scores | gradients, probe) -> [batch head query]``, or
            ``(weights) -> [layer head]``.
        reads: what the function reads: ``rows`` of attention, as they are, ``rows_no_sink``
            (renormalised without the first position) or ``rows_value_weighted``; ``outputs`` of
            the heads; ``qk``: scores before the softmax; ``weights`` alone; ``gradients`` of
            ``metric`` by the outputs.
        queries: selects the queries that count.
        probe: kind of probe that it is meant for; None: it needs none.
        control: what the null is; None for no null.
        per_final_scale: the engine divides by the final norm's scale at each query.
        needs: capabilities the model must have: ``linear_write`` where ``z @ W_O`` itself must be
            what a head adds to the residual stream; ``attention_write`` where the norm that follows
            attention in some families may stand between, with its scale of this run held fixed;
            ``ov_circuit``, ``qk_circuit``, ``qk_size`` and ``embedding`` where these are read of
            the weights;
            ``causal`` where the score means what it says only if no query sees a later key, and
            ``bidirectional`` where queries must; ``one_sequence`` where keys and queries must be
            positions of one text, as they are not in cross-attention; ``text`` where the order of
            tokens has a meaning, and ``patches`` where places in an image have.
        metric: metric whose gradients are read.
        bounds_of: bounds that depend on the model, by its weights; None: those of ``spec``.
    """

    spec: ScoreSpec
    function: Callable[..., Tensor]
    reads: ScorerReads
    queries: QuerySelector
    probe: DefaultProbe | None
    control: Control | None
    per_final_scale: bool = False
    needs: tuple[str, ...] = ()
    metric: AnyMetric | None = None
    bounds_of: Callable[[Any], Bounds] | None = None

    @property
    def kind(self) -> ScorerKind:
        """``row``, ``output``, ``qk``, ``weight`` or ``gradient``."""
        return _KINDS[self.reads]

    def default_probe(self, model: probes.HasVocabulary, seed: int = 0) -> Probe:
        """Make a probe of the scorer's default kind.

        Raises:
            InputError: if the scorer needs no probe, or none can be made for this model.
        """
        if self.probe is None:
            raise InputError(f"{self.name} reads weights alone: it takes no probe.")
        return self.probe.suited(model).make(model, seed)

    def renamed(self, name: str) -> "Scorer":
        """Return the same scorer under another name."""
        return replace(self, spec=replace(self.spec, name=name))

    def __call__(self, seen: Any, *probe: Probe) -> Tensor:
        """Score one chunk of queries, or all weights."""
        return self.function(seen, *probe)


class ScorerFacts(TypedDict, total=False):
    """Keyword arguments shared by all decorators: fields of the spec, and the scorer's name."""

    source: str
    direction: Direction | None
    threshold: float | None
    alternative: Alternative | None
    name: str | None


def _made(
    function: Callable[..., Tensor], unit: str, bounds: Bounds, declared: ScorerFacts
) -> ScoreSpec:
    """Build a function's spec, with the first sentence of its docstring as description."""
    name = str(declared.get("name") or getattr(function, "__name__", "score"))
    text = (inspect.getdoc(function) or name).split("\n\n")[0].replace("\n", " ")
    return ScoreSpec(
        name=name,
        unit=unit,
        bounds=bounds,
        direction=declared.get("direction", "higher"),
        source=declared.get("source", "user"),
        threshold=declared.get("threshold"),
        alternative=declared.get("alternative"),
        description=text,
    )


def as_probe(probe: str | DefaultProbe) -> DefaultProbe:
    """Look up a default probe by name, or return it unchanged.

    Raises:
        InputError: for an unknown name.

    Example:
        >>> as_probe("text").needs_tokenizer
        True
    """
    if isinstance(probe, DefaultProbe):
        return probe
    if probe not in _PROBES:
        raise InputError(nearest(str(probe), _PROBES, kind="default probe"))
    return _PROBES[probe]


def as_control(control: str | Control | None) -> Control | None:
    """Look up a control by name, or return it unchanged.

    Raises:
        InputError: for an unknown name.

    Example:
        >>> as_control("flat").of
        'even_rows'
    """
    if control is None or isinstance(control, Control):
        return control
    if control not in _CONTROLS:
        raise InputError(nearest(str(control), _CONTROLS, kind="control"))
    return _CONTROLS[control]


def every_query(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Select every real position except each example's first, whose row is trivially 1.

    For images: every patch; rows of the class token and of registers are left out.

    Args:
        probe: examples with real positions.

    Returns:
        Mask ``[batch pos]``.

    Example:
        >>> bool(every_query(probe)[:, 0].any())  # never the first token
        False
    """
    if probe.grid is not None:
        return probe.real & probe.grid.is_patch(probe.tokens)
    return probe.real & (probe.position_in_text > 0)


@checked
def row_scorer(
    *,
    unit: str = "attention",
    bounds: Bounds = (0.0, 1.0),
    queries: QuerySelector = every_query,
    probe: str | DefaultProbe = REPEATED,
    control: str | Control | None = FLAT,
    needs: tuple[str, ...] = (),
    **declared: Unpack[ScorerFacts],
) -> Callable[[RowFunction], Scorer]:
    """Turn a function of attention rows into a scorer; arguments as in :class:`Scorer`.

    Args:
        unit: unit of the values.
        bounds: smallest and largest possible value; None: unbounded.
        queries: selects the query positions to score.
        probe: default probe.
        control: control that gives the null; None: no null.
        needs: model capabilities that the scorer needs.
        declared: ``name``, ``source``, ``direction``, ``threshold`` and ``alternative``; see
            :class:`Scorer`.

    Returns:
        A decorator for ``f(rows, probe) -> [batch head query]``.

    Example:
        >>> @row_scorer()
        ... def three_back(rows, probe):
        ...     '''Attention to the token three back.'''
        ...     return rows.at((rows.query_pos - 3).expand(len(probe), -1))
        >>> three_back.name
        'three_back'
    """

    def wrap(function: RowFunction) -> Scorer:
        spec = _made(function, unit, bounds, declared)
        return Scorer(
            spec, function, "rows", queries, as_probe(probe), as_control(control), needs=needs
        )

    return wrap


@checked
def output_scorer(
    *,
    unit: str,
    bounds: Bounds = (None, None),
    queries: QuerySelector = every_query,
    probe: str | DefaultProbe = REPEATED,
    control: str | Control | None = UNREPEATED,
    per_final_scale: bool = False,
    needs: tuple[str, ...] = ("linear_write", "unembedding"),
    **declared: Unpack[ScorerFacts],
) -> Callable[[OutputFunction], Scorer]:
    """Turn a function of head outputs into a scorer; arguments as in :class:`Scorer`.

    Args:
        unit: unit of the values.
        bounds: smallest and largest possible value; None: unbounded.
        queries: selects the positions to score.
        probe: default probe.
        control: control that gives the null; None: no null.
        per_final_scale: whether values are divided by the final norm's scale.
        needs: model capabilities that the scorer needs.
        declared: ``name``, ``source``, ``direction``, ``threshold`` and ``alternative``; see
            :class:`Scorer`.

    Returns:
        A decorator for ``f(outputs, probe) -> [batch head query]``.

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
            _made(function, unit, bounds, declared),
            function,
            "outputs",
            queries,
            as_probe(probe),
            as_control(control),
            per_final_scale,
            needs,
        )

    return wrap


@checked
def qk_scorer(
    *,
    unit: str,
    bounds: Bounds = (None, None),
    queries: QuerySelector = every_query,
    probe: str | DefaultProbe = NEEDLE,
    control: str | Control | None = NEEDLE_CONTROL,
    needs: tuple[str, ...] = (),
    **declared: Unpack[ScorerFacts],
) -> Callable[[QKFunction], Scorer]:
    """Turn a function of pre-softmax attention scores into a scorer.

    See :class:`Scorer` for the arguments.

    Args:
        unit: unit of the values.
        bounds: smallest and largest possible value; None: unbounded.
        queries: selects the query positions to score.
        probe: default probe.
        control: control that gives the null; None: no null.
        needs: model capabilities that the scorer needs, besides queries and keys.
        declared: ``name``, ``source``, ``direction``, ``threshold`` and ``alternative``; see
            :class:`Scorer`.

    Returns:
        A decorator for ``f(scores, probe) -> [batch head query]``.

    Example:
        >>> @qk_scorer(unit="score", control=None)
        ... def own_match(seen, probe):
        ...     '''Score of each token with itself, before the softmax.'''
        ...     own = seen.query_pos.expand(*seen.scores.shape[:2], -1)
        ...     return seen.scores.gather(-1, own[..., None])[..., 0]
        >>> bool(hs.score(model, probe, own_match)["own_match"].mean.std() > 0)
        True
    """

    def wrap(function: QKFunction) -> Scorer:
        return Scorer(
            _made(function, unit, bounds, declared),
            function,
            "qk",
            queries,
            as_probe(probe),
            as_control(control),
            needs=("query_keys", *needs),
        )

    return wrap


@checked
def gradient_scorer(
    *,
    metric: AnyMetric | Callable[..., Tensor],
    unit: str | None = None,
    bounds: Bounds = (None, None),
    queries: QuerySelector = every_query,
    probe: str | DefaultProbe = REPEATED,
    needs: tuple[str, ...] = (),
    **declared: Unpack[ScorerFacts],
) -> Callable[[GradientFunction], Scorer]:
    """Turn a function of head outputs and a metric's gradients into a scorer.

    Args:
        metric: the metric to differentiate, example by example; see :mod:`headscope.metrics`.
        unit: unit of the value; default: the metric's.
        bounds: smallest and largest possible value, as in :class:`Scorer`.
        queries: selects the queries that count.
        probe: default kind of probe.
        needs: capabilities the model must have.
        declared: other fields of the spec.

    Example:
        >>> @gradient_scorer(metric=hs.metrics.loss)
        ... def slope(gradients, probe):
        ...     '''Change of the loss, first order, where the head gives twice as much.'''
        ...     return (gradients.z * gradients.gradient).sum(-1).transpose(1, 2)
        >>> hs.score(model, probe, slope)["slope"].unit
        'nats'
    """
    chosen = as_metric(metric)

    def wrap(function: GradientFunction) -> Scorer:
        return Scorer(
            _made(function, chosen.unit if unit is None else unit, bounds, declared),
            function,
            "gradients",
            queries,
            as_probe(probe),
            control=None,
            needs=needs,
            metric=chosen,
        )

    return wrap


@checked
def weight_scorer(
    *,
    unit: str = "",
    bounds: Bounds = (None, None),
    needs: tuple[str, ...] = (),
    bounds_of: Callable[[Any], Bounds] | None = None,
    description: str | None = None,
    **declared: Unpack[ScorerFacts],
) -> Callable[[WeightFunction], Scorer]:
    """Turn a function of weights into a scorer; the model is not run.

    Args:
        unit: unit of the value.
        bounds: smallest and largest possible value; None: unbounded.
        needs: capabilities the model must have.
        bounds_of: function that computes model-dependent bounds from the same argument.
        description: default: the first sentence of the function's docstring.
        declared: other fields of the spec.

    Example:
        >>> @weight_scorer(unit="", bounds=(0.0, None))
        ... def gain(weights):
        ...     '''Frobenius norm of the OV matrix.'''
        ...     return weights.ov.norm()
        >>> hs.score(model, scorers=gain)["gain"].mean.shape == (
        ...     model.shape.n_layers, model.shape.n_heads)
        True
    """

    def wrap(function: WeightFunction) -> Scorer:
        spec = _made(function, unit, bounds, declared)
        return Scorer(
            spec if description is None else replace(spec, description=description),
            function,
            "weights",
            every_query,
            probe=None,
            control=None,
            needs=needs,
            bounds_of=bounds_of,
        )

    return wrap


def without_sink(scorer: Scorer) -> Scorer:
    """Return the same scorer on rows renormalised without the first position.

    Args:
        scorer: scorer of attention rows.

    Returns:
        The scorer, with ``_no_sink`` added to its name.

    Example:
        >>> without_sink(hs.scorers.CATALOGUE["entropy"]).name
        'entropy_no_sink'
    """
    needs = tuple(dict.fromkeys((*scorer.needs, "one_sequence")))  # the first position is fixed
    return replace(scorer.renamed(f"{scorer.name}_no_sink"), reads="rows_no_sink", needs=needs)


def value_weighted(scorer: Scorer) -> Scorer:
    """Return the same scorer on rows weighted by the norm of each key's value (Kobayashi 2020).

    Args:
        scorer: scorer of attention rows.

    Returns:
        The scorer, with ``_value_weighted`` added to its name.

    Example:
        >>> value_weighted(hs.scorers.CATALOGUE["induction"]).name
        'induction_value_weighted'
    """
    return replace(
        scorer.renamed(f"{scorer.name}_value_weighted"),
        reads="rows_value_weighted",
        needs=(*scorer.needs, "attention_write", "ov"),
    )


def all_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Select every real position, the first included, to match tools that keep it."""
    return probe.real


def repeated_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Select positions whose token occurred before.

    On ``[BOS] R R`` these are exactly the positions of the second copy.
    """
    return every_query(probe) & (probe.previous_occurrence >= 0)


def predicting_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Select positions with a target that could be predicted from the context.

    If the probe marks a ``second_copy``, only positions inside it, since the first copy is random.
    """
    if probe.grid is not None:  # the prediction for an image is at its first position
        return probe.real & (probe.targets >= 0)
    asked = every_query(probe) & (probe.targets >= 0)
    return asked & probe.mark("second_copy") if "second_copy" in probe.marks else asked


def contrasting_queries(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Select positions that have both a target and a foil."""
    if probe.foils is None:
        return probe.real & False
    return predicting_queries(probe) & (probe.foils >= 0)


def queries_past(distance: int) -> QuerySelector:
    """Select positions with at least ``distance`` real tokens before them."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        return probe.real & (probe.position_in_text >= max(distance, 1))

    return selector


def queries_before(distance: int) -> QuerySelector:
    """Select positions with at least ``distance`` real tokens after them."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        left = probe.last[:, None] - probe.first[:, None] - probe.position_in_text
        return every_query(probe) & (left >= distance)

    return selector


def queries_with(mark: str) -> QuerySelector:
    """Select every query, and require that the probe has the mark."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        probe.mark(mark)
        return every_query(probe)

    return selector


def queries_at(mark: str) -> QuerySelector:
    """Select the positions of a mark."""

    def selector(probe: Probe) -> Bool[Tensor, "batch pos"]:
        return every_query(probe) & probe.mark(mark)

    return selector
