"""``hs.testing.check_scorer``: check that a scorer is a pure function of its input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from headscope import probes
from headscope.base.arguments import checked
from headscope.base.stacks import CAUSAL, MaskRule, PatchGrid
from headscope.circuits.scores import Weights
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.models.attention import visible_keys
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe, of_images
from headscope.scorer import IMAGES, IOI, NEEDLE, REPEATED, DefaultProbe
from headscope.scorers import Scorer
from headscope.testing.report import CheckError, CheckReport, agree, ensure, run_checks
from headscope.views import (
    AttentionRows,
    HeadGradients,
    HeadOutputs,
    QueryKeys,
    Rotation,
    Unembedding,
)

_HEADS, _KV_HEADS, _D_HEAD, _D_MODEL = 4, 2, 8, 24
_TOLERANCE = 1e-4


@checked
def check_scorer(
    scorer: Scorer, probe: Probe | None = None, *, raises: bool = True, seed: int = 0
) -> CheckReport:
    """Check that a scorer satisfies what the engine and its users rely on.

    The scorer is called on a synthetic layer with peaky attention that depends only on the tokens
    and their distances. The checks, in order:

    ``declared``: unit, bounds and selected queries make sense. ``shape``: ``[batch head query]``,
    a number per query. ``finite``: NaN where a value is missing, never infinite, and some value
    is there. ``bounds``: kept. ``pure``: inputs are left as they were, no global random state is
    used, the same call gives the same bytes. ``batch size``, ``example order``, ``padding left``,
    ``padding right``, ``chunks``: change no value. ``heads``: a permutation of the heads permutes
    the values. A scorer of weights is called on those of the bundled model: ``declared``,
    ``shape`` (``[layer head]``), ``finite``, ``bounds``, ``pure``, and ``one head``: a head has
    the same value when the others are not read.

    Args:
        scorer: scorer from :func:`headscope.row_scorer` or a similar decorator.
        probe: probe to call the scorer on, with at least two examples. Default: the scorer's
            default probe for the bundled model. Not used by weight scorers.
        raises: raise at the first failure; if False, continue and list failures in the report.
        seed: seed for the synthetic layer.

    Raises:
        CheckError: at the first failed check, with its name and the difference.

    Example:
        >>> import headscope as hs
        >>> hs.testing.check_scorer(hs.scorers.CATALOGUE["induction"]).failed
        {}
    """
    if scorer.reads == "weights":
        return run_checks(scorer.name, scorer, _WEIGHT_CHECKS, raises=raises)
    chosen = _default_probe(scorer.probe) if probe is None else probe
    case = _Case(scorer, chosen.examples(slice(0, 4)), seed)
    return run_checks(scorer.name, case, _CHECKS, raises=raises)


@cache
def _default_probe(kind: DefaultProbe | None) -> Probe:
    """Small probe of a kind, for the bundled model."""
    model = load()
    if kind is None:
        raise CheckError("it has no default probe: pass probe=.")
    small: Mapping[DefaultProbe, Callable[[], Probe]] = {
        NEEDLE: lambda: probes.needle(model, lengths=[60, 75], depths=2),
        IOI: lambda: probes.pairs(model, "ioi", batch=4),
        REPEATED: lambda: probes.repeated_tokens(model, length=9, batch=4),
    }
    if kind == IMAGES:
        grid = PatchGrid(3, 4, 2, 2, specials=("class", "register 1"))
        return of_images(torch.zeros(4, *grid.size), grid)
    return small[kind]() if kind in small else kind.make(model, 0)


@dataclass(frozen=True, eq=False)
class _Case:
    """A scorer, a probe and a synthetic layer."""

    scorer: Scorer
    probe: Probe
    seed: int

    @cached_property
    def drawn(self) -> "_Drawn":
        """Random numbers of the layer."""
        return _Drawn.of(self.probe, self.seed)

    def values(
        self, probe: Probe | None = None, query_pos: Tensor | None = None, **changed: Any
    ) -> Float[Tensor, "batch head query"]:
        """Values of the scorer on a layer, for this probe or another."""
        batch = self.probe if probe is None else probe
        return self.scorer(self.seen(batch, query_pos, **changed), batch)

    def seen(
        self, probe: Probe, query_pos: Tensor | None = None, heads: Tensor | None = None
    ) -> AttentionRows | HeadOutputs | QueryKeys | HeadGradients:
        """The layer in the form that the scorer reads."""
        at = torch.arange(probe.length) if query_pos is None else query_pos
        bidirectional = "bidirectional" in self.scorer.needs
        layer = _Layer.of(probe, self.drawn, MaskRule("bidirectional") if bidirectional else CAUSAL)
        layer = layer if heads is None else layer.permuted(heads)
        if self.scorer.reads == "qk":
            return layer.query_keys(at)
        if self.scorer.reads == "outputs":
            return layer.outputs(at)
        if self.scorer.reads == "gradients":
            return layer.gradients(at)
        rows = layer.rows(at)
        if self.scorer.reads == "rows_no_sink":
            return rows.without_first(probe.first)
        if self.scorer.reads == "rows_value_weighted":
            return rows.weighted(layer.value_norms[..., : rows.pattern.shape[-1]])
        return rows


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Random numbers of a layer: a query, key and value for every token of the vocabulary."""

    query: Float[Tensor, "d_vocab head d_head"]
    key: Float[Tensor, "d_vocab kv_head d_head"]
    value: Float[Tensor, "d_vocab kv_head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    by_distance: Float[Tensor, "head distance"]
    unembedding: Unembedding

    @classmethod
    def of(cls, probe: Probe, seed: int) -> "_Drawn":
        """Draw them for the vocabulary of a probe."""
        generator = torch.Generator().manual_seed(seed)
        ids = [probe.tokens, probe.targets, *([] if probe.foils is None else [probe.foils])]
        d_vocab = max(int(part.max()) for part in ids) + 1

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        unembedding = Unembedding(
            W_U=drawn(d_vocab, _D_MODEL),
            b_U=None,
            gain=drawn(_D_MODEL),
            bias=drawn(_D_MODEL),
            centred=False,
            epsilon=1e-5,
        )
        return cls(
            query=drawn(d_vocab, _HEADS, _D_HEAD),
            key=drawn(d_vocab, _KV_HEADS, _D_HEAD),
            value=drawn(d_vocab, _KV_HEADS, _D_HEAD),
            W_O=drawn(_HEADS, _D_HEAD, _D_MODEL),
            by_distance=3 * drawn(_HEADS, 512),
            unembedding=unembedding,
        )


@dataclass(frozen=True, eq=False)
class _Layer:
    """A synthetic layer whose queries, keys and values are drawn per token of the vocabulary.

    Attention scores also depend on distance, so attention is not a function of tokens alone and is
    unaffected by padding.
    """

    probe: Probe
    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head pos d_head"]
    value: Float[Tensor, "batch kv_head pos d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    by_distance: Float[Tensor, "head distance"]
    unembedding: Unembedding
    mask: MaskRule = CAUSAL

    @classmethod
    def of(cls, probe: Probe, drawn: "_Drawn", mask: MaskRule) -> "_Layer":
        """Look up the drawn vectors for the tokens of a probe."""
        query, key, value = (
            part[probe.tokens].transpose(1, 2) for part in (drawn.query, drawn.key, drawn.value)
        )
        return cls(probe, query, key, value, drawn.W_O, drawn.by_distance, drawn.unembedding, mask)

    def permuted(self, heads: Tensor) -> "_Layer":
        """The same layer with its query heads in another order (key/value heads repeated)."""
        key, value = (self._repeated(part)[:, heads] for part in (self.key, self.value))
        return replace(
            self,
            query=self.query[:, heads],
            key=key,
            value=value,
            W_O=self.W_O[heads],
            by_distance=self.by_distance[heads],
        )

    def _repeated(self, part: Tensor) -> Tensor:
        return part.repeat_interleave(_HEADS // part.shape[1], dim=1)

    def _visible(self, at: Tensor) -> Tensor:
        n_keys = int(at.max()) + 1 if self.mask is CAUSAL else self.probe.length
        real = None if bool(self.probe.real.all()) else self.probe.real
        return visible_keys(at, slice(0, n_keys), len(self.probe), mask=self.mask, real=real)

    def rows(self, at: Tensor) -> AttentionRows:
        """Peaky softmax rows."""
        visible = self._visible(at)
        keys = visible.shape[-1]
        scores = einsum(
            self.query[:, :, at],
            self._repeated(self.key)[:, :, :keys],
            "batch head query d, batch head key d -> batch head query key",
        )
        distance = (at[:, None] - torch.arange(keys)).clamp_min(0) % self.by_distance.shape[1]
        scores = scores + self.by_distance[:, distance]
        pattern = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
        return AttentionRows(0, at, pattern, visible)

    def outputs(self, at: Tensor) -> HeadOutputs:
        """Values averaged by these rows."""
        rows = self.rows(at)
        value = self._repeated(self.value)[:, :, : rows.pattern.shape[-1]]
        z = einsum(rows.pattern, value, "batch head q k, batch head k d -> batch q head d")
        return HeadOutputs(
            layer=0,
            query_pos=at,
            z=z,
            W_O=self.W_O,
            unembedding=self.unembedding,
            make_rows=lambda: rows,
            make_values=lambda: self.value,
            make_query_keys=lambda: self.query_keys(at),
        )

    def gradients(self, at: Tensor) -> HeadGradients:
        """Outputs with a synthetic gradient that depends on token and head."""
        return HeadGradients(0, at, self.outputs(at).z, self.query[:, :, at].transpose(1, 2))

    def query_keys(self, at: Tensor) -> QueryKeys:
        """Queries and keys, without the distance-dependent part of the scores."""
        visible = self._visible(at)
        half = _D_HEAD // 2
        rotation = Rotation(
            first=tuple(range(half)),
            second=tuple(range(half, _D_HEAD)),
            frequency=torch.logspace(0, -3, half),
        )
        return QueryKeys(
            layer=0,
            query_pos=at,
            query=self.query[:, :, at],
            key=self.key[:, :, : visible.shape[-1]],
            scaling=1.0,
            soft_cap=None,
            visible=visible,
            rotation=rotation,
        )

    @property
    def value_norms(self) -> Float[Tensor, "batch head key"]:
        """``|v_j W_O|``."""
        written = einsum(
            self._repeated(self.value), self.W_O, "batch head k d, head d m -> batch head k m"
        )
        norms: Tensor = written.norm(dim=-1)
        return norms


def _chosen(case: _Case, probe: Probe | None = None) -> Tensor:
    """Queries that count, ``[batch 1 pos]``."""
    batch = case.probe if probe is None else probe
    return (case.scorer.queries(batch) & batch.real)[:, None]


def _declared(case: _Case) -> None:
    scorer, low, high = case.scorer, *case.scorer.bounds
    ensure(bool(scorer.name.isidentifier()), f"its name {scorer.name!r} is not a plain word.")
    ensure(bool(scorer.unit), "it has no unit: give unit='attention', 'nats', 'logits', ...")
    ensure(
        low is None or high is None or low < high,
        f"its bounds {scorer.bounds} are not an interval.",
    )
    ensure(
        scorer.description != scorer.name,
        "its function has no docstring: describe what it measures.",
    )
    chosen = scorer.queries(case.probe)
    ensure(
        chosen.dtype == torch.bool and chosen.shape == case.probe.tokens.shape,
        "its queries are not Bool[batch pos].",
    )
    ensure(
        bool((chosen & case.probe.real).any()),
        "it selects no query of its default probe: pass a suitable probe=.",
    )


def _shape(case: _Case) -> None:
    values = case.values()
    expected = (len(case.probe), _HEADS, case.probe.length)
    ensure(
        isinstance(values, Tensor) and values.shape == expected and values.is_floating_point(),
        f"it gives {tuple(getattr(values, 'shape', ()))} instead of floats [batch head query] = "
        f"{expected}.",
    )


def _finite(case: _Case) -> None:
    values = case.values().masked_fill(~_chosen(case), 0.0)
    ensure(not bool(values.isinf().any()), "some value is infinite: give NaN where none exists.")
    known = ~case.values().isnan() & _chosen(case)
    ensure(bool(known.any()), "every value is missing on its own probe.")


def _bounds(case: _Case) -> None:
    low, high = case.scorer.bounds
    values = case.values()[_chosen(case).expand(-1, _HEADS, -1)]
    values = values[~values.isnan()]
    ensure(
        (low is None or bool((values >= low - _TOLERANCE).all()))
        and (high is None or bool((values <= high + _TOLERANCE).all())),
        f"it gives {float(values.min()):.4g} to {float(values.max()):.4g}, outside its bounds "
        f"{case.scorer.bounds}.",
    )


def _pure(case: _Case) -> None:
    seen = case.seen(case.probe)
    _materialised(seen)
    before, state = _tensors(seen) + _tensors(case.probe), torch.get_rng_state()
    first = case.scorer(seen, case.probe).clone()
    for was, (name, now) in zip(before, _named(seen) + _named(case.probe), strict=True):
        ensure(torch.equal(was.nan_to_num(7), now.nan_to_num(7)), f"it writes to its input {name}.")
    ensure(torch.equal(state, torch.get_rng_state()), "it draws from torch's global random state.")
    second = case.scorer(seen, case.probe)
    ensure(torch.equal(first.nan_to_num(7), second.nan_to_num(7)), "two calls give two results.")


def _materialised(seen: Any) -> None:
    """Trigger an output's cached computations, so that a second look finds the same tensors."""
    if isinstance(seen, HeadOutputs):
        _ = seen.rows, seen.values, seen.query_keys


def _named(seen: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in an input, including nested ones."""
    found = []
    for name, value in vars(seen).items():
        if isinstance(value, Tensor) and value.dtype != torch.bool:
            found.append((name, value))
        elif isinstance(value, Tensor):
            found.append((name, value.int()))
        elif isinstance(value, AttentionRows | QueryKeys | Unembedding):
            found += [(f"{name}.{part}", tensor) for part, tensor in _named(value)]
        elif name in ("marks", "facts"):
            found += [(f"{name}[{key!r}]", tensor.float()) for key, tensor in value.items()]
    return [(n, v) for n, v in found if n not in _DERIVED]


# Cached properties of inputs, computed on first access.
_DERIVED = (
    *("total", "entropy", "scores", "first", "last", "position_in_text", "previous_occurrence"),
    *(
        "mean_direction",
        "key_pos",
        "rows.key_pos",
        "rows.total",
        "rows.entropy",
        "matches.scores",
        "unembedding.mean_direction",
    ),
)


def _tensors(seen: Any) -> list[Tensor]:
    return [tensor.clone() for _, tensor in _named(seen)]


def _same(case: _Case, actual: Tensor, expected: Tensor, chosen: Tensor, what: str) -> None:
    """Check that values agree where queries count, with NaN in the same places."""
    keep = chosen.expand_as(expected)
    ensure(
        torch.equal(actual.isnan() & keep, expected.isnan() & keep),
        f"values are missing in other places {what}.",
    )
    known = keep & ~expected.isnan()
    agree(actual[known], expected[known], _TOLERANCE, f"values {what}")


def _batch_size(case: _Case) -> None:
    whole, chosen = case.values(), _chosen(case)
    for place in range(len(case.probe)):
        one = slice(place, place + 1)
        alone = case.values(case.probe.examples(one))
        _same(case, alone, whole[one], chosen[one], "when an example is alone in its batch")


def _example_order(case: _Case) -> None:
    order = torch.arange(len(case.probe)).flip(0)
    turned = case.values(_reordered(case.probe, order))
    _same(case, turned, case.values()[order], _chosen(case)[order], "in another order")


def _reordered(probe: Probe, order: Tensor) -> Probe:
    return _mapped(probe, lambda tensor, _fill: tensor[order], lambda fact: fact[order])


def _padded(probe: Probe, left: int, right: int) -> Probe:
    return _mapped(
        probe, lambda tensor, fill: pad(tensor, (left, right), value=fill), lambda fact: fact
    )


def _mapped(
    probe: Probe, change: Callable[[Tensor, Any], Tensor], fact: Callable[[Tensor], Tensor]
) -> Probe:
    """Probe with every per-position tensor transformed; the second argument fills new positions."""

    def other(part: Probe | None) -> Probe | None:
        return None if part is None else _mapped(part, change, fact)

    return replace(
        probe,
        tokens=change(probe.tokens, 0),
        real=change(probe.real, False),
        structure=change(probe.structure, -1),
        targets=change(probe.targets, -1),
        foils=None if probe.foils is None else change(probe.foils, -1),
        marks={name: change(mark, False) for name, mark in probe.marks.items()},
        facts={name: fact(number) for name, number in probe.facts.items()},
        control=other(probe.control),
        corrupt=other(probe.corrupt),
        inputs={name: fact(value) for name, value in probe.inputs.items()},
    )


def _padding(case: _Case, left: int, right: int) -> None:
    if case.probe.grid is not None:
        raise UnsupportedModelError("images have no padding.")
    wide = _padded(case.probe, left, right)
    place = slice(left, left + case.probe.length)
    actual, chosen = case.values(wide)[:, :, place], _chosen(case)
    ensure(
        torch.equal(_chosen(case, wide)[:, :, place], chosen),
        "padding changes which queries count.",
    )
    _same(case, actual, case.values(), chosen, "under padding")


def _chunks(case: _Case) -> None:
    whole, chosen = case.values(), _chosen(case)
    for part in torch.arange(case.probe.length).split(7):
        some = case.values(query_pos=part)
        _same(case, some, whole[:, :, part], chosen[:, :, part], "when queries come in chunks")


def _heads(case: _Case) -> None:
    order = torch.tensor([2, 0, 3, 1])
    turned = case.values(heads=order)
    _same(case, turned, case.values()[:, order], _chosen(case), "when heads change places")


@cache
def _bundled() -> HeadModel:
    return load()


def _weights() -> Weights:
    return Weights.of(_bundled(), tokens=16)


def _of_weights(scorer: Scorer) -> Tensor:
    values: Tensor = scorer(_weights())
    return values


def _weights_declared(scorer: Scorer) -> None:
    ensure(scorer.name.isidentifier(), f"its name {scorer.name!r} is not a plain word.")
    ensure(
        scorer.description not in ("", scorer.name),
        "its function has no docstring: describe what it measures.",
    )


def _weights_shape(scorer: Scorer) -> None:
    shape = _bundled().shape
    expected, values = (len(shape.attention_layers), shape.n_heads), _of_weights(scorer)
    given = tuple(getattr(values, "shape", ()))
    ensure(given == expected, f"it gives {given} instead of [layer head] = {expected}.")


def _weights_finite(scorer: Scorer) -> None:
    values = _of_weights(scorer)
    ensure(not bool(values.isinf().any()), "some value is infinite: give NaN where none exists.")
    ensure(not bool(values.isnan().all()), "every value is missing on the bundled model.")


def _weights_bounds(scorer: Scorer) -> None:
    low, high = scorer.bounds if scorer.bounds_of is None else scorer.bounds_of(_weights())
    values = _of_weights(scorer).float()
    values = values[~values.isnan()]
    ensure(
        (low is None or bool((values >= low - _TOLERANCE).all()))
        and (high is None or bool((values <= high + _TOLERANCE).all())),
        f"it gives {float(values.min()):.4g} to {float(values.max()):.4g}, outside its bounds "
        f"{(low, high)}.",
    )


def _weights_pure(scorer: Scorer) -> None:
    model = _bundled()
    layer = model.shape.attention_layers[0]
    before = [part.clone() for part in (model.weights(layer).W_V, model.weights(layer).W_O)]
    first = _of_weights(scorer)
    state = torch.get_rng_state()
    second = _of_weights(scorer)
    ensure(torch.equal(state, torch.get_rng_state()), "it draws from torch's global random state.")
    ensure(torch.equal(first.nan_to_num(7), second.nan_to_num(7)), "two calls give two results.")
    after = (model.weights(layer).W_V, model.weights(layer).W_O)
    same = all(torch.equal(was, now) for was, now in zip(before, after, strict=True))
    ensure(same, "it writes to the weights.")


def _weights_one_head(scorer: Scorer) -> None:
    whole = _of_weights(scorer).float()
    layer, head = len(whole) - 1, whole.shape[1] - 1
    number = _bundled().shape.attention_layers[layer]
    alone: Tensor = scorer(_weights().only(HeadIndex(number, head)))
    agree(alone.reshape(()).float(), whole[layer, head], _TOLERANCE, "values of a head alone")


_WEIGHT_CHECKS: tuple[tuple[str, Callable[[Scorer], None]], ...] = (
    ("declared", _weights_declared),
    ("shape", _weights_shape),
    ("finite", _weights_finite),
    ("bounds", _weights_bounds),
    ("pure", _weights_pure),
    ("one head", _weights_one_head),
)
_CHECKS: tuple[tuple[str, Callable[[_Case], None]], ...] = (
    ("declared", _declared),
    ("shape", _shape),
    ("finite", _finite),
    ("bounds", _bounds),
    ("pure", _pure),
    ("batch size", _batch_size),
    ("example order", _example_order),
    ("padding left", lambda case: _padding(case, 5, 0)),
    ("padding right", lambda case: _padding(case, 0, 5)),
    ("chunks", _chunks),
    ("heads", _heads),
)
