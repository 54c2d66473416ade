"""``hs.testing.check_scorer``: whether a scorer is the pure function that it is taken for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from headscope import probes
from headscope.base.stacks import CAUSAL
from headscope.inputs import Rotation
from headscope.matches import Matches
from headscope.models.attention import visible_keys
from headscope.models.loading.load import load
from headscope.outputs import HeadOutputs, Readout
from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorers import Scorer
from headscope.testing.report import CheckReport, agree, ensure, run_checks

_HEADS, _KV_HEADS, _D_HEAD, _D_MODEL = 4, 2, 8, 24
_TOLERANCE = 1e-4


def check_scorer(
    scorer: Scorer, probe: Probe | None = None, *, raises: bool = True, seed: int = 0
) -> CheckReport:
    """Hold a scorer to what the engine and its users rely on.

    It is called on one made-up layer with peaky attention, whose numbers depend on the tokens and
    their distances alone. Checked are, in this order:

    ``declared``: unit, bounds and selected queries make sense. ``shape``: ``[batch head query]``,
    a number per query. ``finite``: NaN where a value is missing, never infinite, and some value
    is there. ``bounds``: kept. ``pure``: inputs are left as they were, no global random state is
    used, the same call gives the same bytes. ``batch size``, ``example order``, ``padding left``,
    ``padding right``, ``chunks``: change no value. ``heads``: a permutation of the heads permutes
    the values.

    Args:
        scorer: from :func:`headscope.row_scorer` and its like.
        probe: what to call it on, at least two examples; default: the kind that it is meant for,
            for the bundled model.
        raises: raise at the first failure; else go on and list it in the report.
        seed: of the layer.

    Raises:
        CheckError: with the check and the difference.

    Example:
        >>> import headscope as hs
        >>> hs.testing.check_scorer(hs.scorers.CATALOGUE["induction"]).failed
        {}
    """
    chosen = _default_probe(scorer.probe) if probe is None else probe
    case = _Case(scorer, chosen.examples(slice(0, 4)), seed)
    return run_checks(scorer.name, case, _CHECKS, raises=raises)


@cache
def _default_probe(kind: str) -> Probe:
    """Small probe of a kind, for the bundled model."""
    model = load()
    if kind == "needle":
        return probes.needle(model, lengths=[60, 75], depths=2)
    if kind == "ioi":
        return probes.pairs(model, "ioi", batch=4)
    if kind == "text":
        return probes.text(model)
    return probes.repeated_tokens(model, length=9, batch=4)


@dataclass(frozen=True, eq=False)
class _Case:
    """A scorer, a probe, and the layer that it is shown."""

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
        """What the scorer says of a layer, on this probe or another."""
        batch = self.probe if probe is None else probe
        return self.scorer(self.seen(batch, query_pos, **changed), batch)

    def seen(
        self, probe: Probe, query_pos: Tensor | None = None, heads: Tensor | None = None
    ) -> AttentionRows | HeadOutputs | Matches:
        """The layer in the form that the scorer reads."""
        at = torch.arange(probe.length) if query_pos is None else query_pos
        layer = _Layer.of(probe, self.drawn)
        layer = layer if heads is None else layer.permuted(heads)
        if self.scorer.kind == "match":
            return layer.matches(at)
        if self.scorer.kind == "output":
            return layer.outputs(at)
        rows = layer.rows(at)
        if self.scorer.view == "no_sink":
            return rows.without_first(probe.first)
        if self.scorer.view == "value_weighted":
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
    readout: Readout

    @classmethod
    def of(cls, probe: Probe, seed: int) -> "_Drawn":
        """Draw them for the vocabulary of a probe."""
        generator = torch.Generator().manual_seed(seed)
        ids = [probe.tokens, probe.targets, *([] if probe.foils is None else [probe.foils])]
        d_vocab = max(int(part.max()) for part in ids) + 1

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        readout = Readout(
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
            readout=readout,
        )


@dataclass(frozen=True, eq=False)
class _Layer:
    """A made-up layer whose queries, keys and values are drawn for each token of the vocabulary.

    Scores get a part that depends on the distance, so that attention is no function of tokens
    alone, and padding shifts nothing.
    """

    probe: Probe
    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head pos d_head"]
    value: Float[Tensor, "batch kv_head pos d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    by_distance: Float[Tensor, "head distance"]
    readout: Readout

    @classmethod
    def of(cls, probe: Probe, drawn: "_Drawn") -> "_Layer":
        """What is drawn, for the tokens of a probe."""
        query, key, value = (
            part[probe.tokens].transpose(1, 2) for part in (drawn.query, drawn.key, drawn.value)
        )
        return cls(probe, query, key, value, drawn.W_O, drawn.by_distance, drawn.readout)

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
        n_keys = int(at.max()) + 1
        real = None if bool(self.probe.real.all()) else self.probe.real
        return visible_keys(at, n_keys, len(self.probe), mask=CAUSAL, real=real)

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
            readout=self.readout,
            make_rows=lambda: rows,
            make_values=lambda: self.value,
            make_matches=lambda: self.matches(at),
        )

    def matches(self, at: Tensor) -> Matches:
        """Queries and keys themselves; without the part that depends on the distance."""
        visible = self._visible(at)
        half = _D_HEAD // 2
        rotation = Rotation(
            first=tuple(range(half)),
            second=tuple(range(half, _D_HEAD)),
            frequency=torch.logspace(0, -3, half),
        )
        return Matches(
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
    ensure(bool(scorer.name.isidentifier()), f"its name {scorer.name!r} is no plain word.")
    ensure(bool(scorer.unit), "it names no unit: say unit='attention', 'nats', 'logits', ...")
    ensure(
        low is None or high is None or low < high, f"its bounds {scorer.bounds} are no interval."
    )
    ensure(
        scorer.description != scorer.name, "its function has no docstring: say what it measures."
    )
    chosen = scorer.queries(case.probe)
    ensure(
        chosen.dtype == torch.bool and chosen.shape == case.probe.tokens.shape,
        "its queries are no Bool[batch pos].",
    )
    ensure(
        bool((chosen & case.probe.real).any()),
        "it selects no query of its own probe: give probe= one that it can be asked of.",
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
    """Let an output compute what it computes once, so that a second look finds the same."""
    if isinstance(seen, HeadOutputs):
        _ = seen.rows, seen.values, seen.matches


def _named(seen: Any) -> list[tuple[str, Tensor]]:
    """Every tensor that an input holds, parts included."""
    found = []
    for name, value in vars(seen).items():
        if isinstance(value, Tensor) and value.dtype != torch.bool:
            found.append((name, value))
        elif isinstance(value, Tensor):
            found.append((name, value.int()))
        elif isinstance(value, AttentionRows | Matches | Readout):
            found += [(f"{name}.{part}", tensor) for part, tensor in _named(value)]
        elif name in ("marks", "facts"):
            found += [(f"{name}[{key!r}]", tensor.float()) for key, tensor in value.items()]
    return [(n, v) for n, v in found if n not in _DERIVED]


# What inputs compute once, when it is first asked for.
_DERIVED = (
    *("total", "entropy", "scores", "first", "last", "position_in_text", "previous_occurrence"),
    *("mean_direction", "rows.total", "rows.entropy", "matches.scores", "readout.mean_direction"),
)


def _tensors(seen: Any) -> list[Tensor]:
    return [tensor.clone() for _, tensor in _named(seen)]


def _same(case: _Case, actual: Tensor, expected: Tensor, chosen: Tensor, what: str) -> None:
    """Equal where both queries count; NaN in the same places."""
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
    """A probe with every tensor of positions changed; the second argument fills new positions."""

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
    )


def _padding(case: _Case, left: int, right: int) -> None:
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
