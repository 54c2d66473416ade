"""``hs.testing.check_intervention``: conformance checks of an intervention or edit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from headscope import metrics, probes
from headscope.ablation import ablate_heads
from headscope.base.arguments import checked
from headscope.edits import SITES, AnyEdit, cut
from headscope.errors import UnsupportedModelError
from headscope.heads import HeadIndex
from headscope.interventions import Intervention, Place, Setting
from headscope.models.loading import load
from headscope.models.protocol import HeadModel
from headscope.models.taps import TapView, at_layers, writes_of
from headscope.probes.probe import Probe
from headscope.testing.report import CheckError, CheckReport, agree, ensure, run_checks

_TOLERANCE = 1e-4
# Axis of the heads, and of the positions, at each site.
_AXES = {"z": (2, 1)}


@checked
def check_intervention(
    intervention: "Intervention | Place | AnyEdit",
    model: HeadModel | None = None,
    *,
    raises: bool = True,
    seed: int = 0,
) -> CheckReport:
    """Check that an intervention satisfies what passes, suffix replay and sweeps rely on.

    The checks, in order, on random values and in a model:

    ``declared``: a known site, and layers that the model has. ``shape``: shape, dtype and device of
    the value stay. ``pure``: the input is left as it was, no global random state is used, the same
    call gives the same bytes. ``finite``: finite values stay finite. ``other heads``: heads that
    were not named stay bit-identical, and NaN in them does not spread to other heads (for functions
    from heads to an edit). ``pattern``: an edited pattern is not negative and its rows sum to at
    most 1. ``batch size``, ``example order``, ``positions``: an example gives the same result
    alone, at another place in the batch, or without its first positions. ``padding``: values at
    padding do not affect others. ``replay``: :func:`headscope.ablate_heads` agrees with full passes
    (for functions from heads to an edit).

    Args:
        intervention: a value such as ``hs.interventions.Zero()`` or a function from heads to an
            edit such as ``hs.edits.zero``, as for ``method`` of :func:`headscope.ablate_heads`; or
            a single edit. Its donors and positions must fit two examples of the bundled model.
        model: model to test in. Default: the bundled model.
        raises: raise at the first failure; if False, continue and list failures in the report.
        seed: seed for values and texts.

    Raises:
        CheckError: at the first failed check, with its name and the difference.

    Example:
        >>> import headscope as hs
        >>> hs.testing.check_intervention(hs.edits.zero).passed[:3]
        ('declared', 'shape', 'pure')
        >>> bool(hs.testing.check_intervention(hs.interventions.Scale(0.5)))
        True
    """
    case = _Case(intervention, load() if model is None else model, seed)
    name = getattr(intervention, "__name__", type(intervention).__name__)
    return run_checks(name, case, _CHECKS, raises=raises)


@dataclass(frozen=True, eq=False)
class _Case:
    """An intervention with the values that it is tested on."""

    intervention: Any
    model: HeadModel
    seed: int

    @cached_property
    def heads(self) -> tuple[HeadIndex, ...]:
        """Heads passed to a function from heads to an edit."""
        layers = self.model.shape.attention_layers
        return (HeadIndex(layers[0], 1), HeadIndex(layers[-1], 0))

    @cached_property
    def edit(self) -> AnyEdit:
        """The edit."""
        given = self.maker
        made: AnyEdit = given if isinstance(given, AnyEdit) else given(self.heads)
        return made

    @cached_property
    def maker(self) -> Any:
        """Function that makes an edit for heads, or the edit itself if one was given."""
        given = self.intervention
        if not isinstance(given, Intervention):
            return given
        setting = Setting(self.model, self.probe, None, len(self.probe))
        return given.prepare(setting)(slice(0, len(self.probe)), None)

    @property
    def makes_edits(self) -> bool:
        """Whether the intervention takes heads."""
        return not isinstance(self.intervention, AnyEdit)

    @cached_property
    def probe(self) -> Probe:
        """Two random texts."""
        return probes.repeated_tokens(self.model, length=6, batch=2, seed=self.seed)

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of heads and positions."""
        return _AXES.get(self.edit.site, (1, 2))

    @cached_property
    def layer(self) -> int:
        """A layer that the edit applies to."""
        return min(self.edit.layers)

    @cached_property
    def value(self) -> Tensor:
        """Values of the site for two examples; causal rows for the pattern."""
        shape, length = self.model.shape, self.probe.length
        shared = self.edit.site in ("key", "value")
        heads = shape.n_kv_heads if shared else shape.n_heads
        generator = torch.Generator().manual_seed(self.seed)
        if self.edit.site == "z":
            return torch.randn(2, length, heads, shape.d_head, generator=generator)
        if self.edit.site == "pattern":
            scores = 3 * torch.randn(2, heads, length, length, generator=generator)
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            return scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.randn(2, heads, length, shape.d_head, generator=generator)

    def __call__(self, value: Tensor | None = None) -> Tensor:
        """The edited value."""
        given = self.value.clone() if value is None else value
        return self.edit(self.layer, given)


def _declared(case: _Case) -> None:
    ensure(case.edit.site in SITES, f"there is no site {case.edit.site!r}: one of {SITES}.")
    known = set(case.model.shape.attention_layers)
    layers = case.edit.layers
    ensure(isinstance(layers, frozenset), "its layers are not a frozenset.")
    ensure(
        bool(layers) and layers <= known, f"it touches layers {sorted(layers)} of {sorted(known)}."
    )


def _shape(case: _Case) -> None:
    edited = case()
    ensure(
        isinstance(edited, Tensor)
        and (edited.shape, edited.dtype, edited.device)
        == (case.value.shape, case.value.dtype, case.value.device),
        f"it makes {tuple(getattr(edited, 'shape', ()))} of {tuple(case.value.shape)}, or changes "
        "dtype or device.",
    )


def _pure(case: _Case) -> None:
    given, state = case.value.clone(), torch.get_rng_state()
    first = case(given).clone()
    ensure(torch.equal(given, case.value), "it modifies the value that it is given.")
    ensure(torch.equal(state, torch.get_rng_state()), "it draws from torch's global random state.")
    ensure(torch.equal(first, case()), "two calls give two results.")


def _finite(case: _Case) -> None:
    ensure(bool(case().isfinite().all()), "it turns finite values into NaN or infinity.")


def _other_heads(case: _Case) -> None:
    if not case.makes_edits:
        raise UnsupportedModelError("a single edit does not name its heads.")
    axis = case.axes[0]
    group = case.value.shape[axis]
    named = {head.head for head in case.heads if head.layer == case.layer}
    others = torch.tensor([head for head in range(group) if head not in named])
    ensure(
        torch.equal(case().index_select(axis, others), case.value.index_select(axis, others)),
        "it changes heads that were not named.",
    )
    spoiled = case.value.clone().index_fill_(axis, others, float("nan"))
    own = torch.tensor(sorted(named))
    ensure(
        not bool(case(spoiled).index_select(axis, own).isnan().any()),
        "NaN of one head spreads to another.",
    )


def _pattern(case: _Case) -> None:
    if case.edit.site != "pattern":
        raise UnsupportedModelError(f"it edits {case.edit.site}, not the pattern.")
    edited = case()
    ensure(
        bool((edited >= 0).all()) and bool((edited.sum(-1) <= 1 + _TOLERANCE).all()),
        "an edited pattern is negative somewhere, or a row sums to more than 1.",
    )


def _batch_size(case: _Case) -> None:
    whole = case()
    for example in range(2):
        one = slice(example, example + 1)
        (alone,) = cut((case.edit,), examples=one)
        actual = alone(case.layer, case.value[one].clone())
        agree(actual, whole[one], 1e-6, "edited values of an example alone")


def _example_order(case: _Case) -> None:
    (turned,) = cut((case.edit,), examples=slice(1, 2))
    ahead = turned(case.layer, case.value[1:].clone())
    (other,) = cut((case.edit,), examples=slice(0, 1))
    both = torch.cat([ahead, other(case.layer, case.value[:1].clone())])
    agree(both, case().flip(0), 1e-6, "edited values in another order")


def _positions(case: _Case) -> None:
    axis, first = case.axes[1], 4
    (later,) = cut((case.edit,), first=first)
    length = case.value.shape[axis] - first
    actual = later(case.layer, case.value.narrow(axis, first, length).clone())
    expected = case().narrow(axis, first, length)
    agree(actual, expected, 1e-6, "edited values from a later position on")


def _padding(case: _Case) -> None:
    axis = case.axes[1]
    spoiled = case.value.clone()
    spoiled.narrow(axis, 0, 2).mul_(-7)
    length = case.value.shape[axis] - 2
    kept = case(spoiled).narrow(axis, 2, length), case().narrow(axis, 2, length)
    agree(*kept, 1e-6, "edited values at positions whose neighbours are padding")


@torch.no_grad()
def _replay(case: _Case) -> None:
    if not case.makes_edits:
        raise UnsupportedModelError("replay applies to functions from heads to an edit.")
    probe, model = case.probe, case.model
    effect = ablate_heads(
        model, probe, metrics.loss, case.intervention, heads=case.heads, progress=False
    )
    clean = _loss(model.forward(probe.tokens), probe)
    for head in case.heads:
        edit = case.maker([head])
        layers: set[int] = set()
        logits = model.run(
            probe, reads=at_layers(model.shape, _seen_in(layers)), writes=writes_of((edit,))
        )
        ensure(layers == set(model.shape.attention_layers), "the edited pass leaves out layers.")
        assert logits is not None  # noqa: S101  # they were asked for
        changed = _loss(logits, probe)
        expected = torch.tensor(float(changed - clean))
        actual = torch.tensor(float(effect.mean[head.layer, head.head]))
        agree(actual, expected, _TOLERANCE, f"effects of {head} by replay and by whole passes")


def _seen_in(layers: set[int]) -> Callable[[TapView], None]:
    """Reader that records which layers it saw."""
    return lambda view: layers.add(view.layer)


def _loss(logits: Tensor, probe: Probe) -> Tensor:
    """Mean over examples of the mean next-token loss."""
    known = probe.targets >= 0
    if not bool(known.any(1).all()):
        raise CheckError("the probe has an example without targets.")
    log_probs = logits.float().log_softmax(-1)
    chosen = -log_probs.gather(-1, probe.targets.clamp_min(0)[..., None])[..., 0]
    return ((chosen * known).sum(1) / known.sum(1)).mean()


_CHECKS: tuple[tuple[str, Callable[[_Case], None]], ...] = (
    ("declared", _declared),
    ("shape", _shape),
    ("pure", _pure),
    ("finite", _finite),
    ("other heads", _other_heads),
    ("pattern", _pattern),
    ("batch size", _batch_size),
    ("example order", _example_order),
    ("positions", _positions),
    ("padding", _padding),
    ("replay", _replay),
)
