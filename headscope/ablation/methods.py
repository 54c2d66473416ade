"""Methods of ablation: what a head's output becomes, for every head of a model alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope import edits
from headscope.ablation.donors import averaged, head_means, head_values, summed
from headscope.ablation.sources import Source
from headscope.edits import AnyEdit, Heads
from headscope.errors import InputError, nearest
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe

Place = Callable[[Heads], AnyEdit]
EditMaker = Callable[[Heads], edits.HeadEdit]


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method may look at.

    Attributes:
        reference: where replacement values come from.
        own: whether that is the ablated probe itself.
        positions: where to edit; None: everywhere.
    """

    model: HeadModel
    probe: Probe
    reference: Probe
    own: bool
    positions: Bool[Tensor, "batch pos"] | None
    seed: int
    batch_size: int

    def where(self, chosen: slice) -> Bool[Tensor, "batch pos"] | None:
        """Positions to edit in one batch."""
        return None if self.positions is None else self.positions[chosen]


# What was once a method, and the function that it has become.
_MOVED = {
    "attribution": "hs.estimate_heads(model, probe, metric, baseline=..., steps=...)",
    "screened": "hs.screen_heads(model, probe, metric, top=..., sample=...)",
}


def check_method(method: str, reference: Probe | None, kind: str = "method") -> None:
    """Refuse a method that is unknown, and a reference that nothing would read.

    Raises:
        InputError: with what to take instead.
    """
    if method in _MOVED:
        raise InputError(
            f"{kind}={method!r} is an estimate, not an ablation: call {_MOVED[method]}."
        )
    if method not in METHODS:
        raise InputError(nearest(str(method), list(METHODS), kind=kind))
    if reference is not None and method in ("zero", "uniform", "attend_to_first"):
        raise InputError(
            f"{kind}={method!r} takes no values from elsewhere: leave reference out, or take "
            "mean, mean_pos, resample or patch."
        )


class Method:
    """Makes edits, batch by batch; what needs the whole reference is computed once."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._make, self._setting = METHODS[name], setting
        self._means: dict[int, Tensor] | None = None
        setting_checks = {"mean_pos": _same_length, "resample": _aligned, "patch": _aligned}
        setting_checks.get(name, lambda _: None)(setting)

    def place(self, chosen: slice, source: Source) -> Place:
        """How to edit any heads of one batch.

        Args:
            chosen: examples of the batch.
            source: its recorded clean run.
        """
        return self._make(self, self._setting, chosen, source)

    def means(self, source: Source, *, per_position: bool) -> Mapping[int, Tensor]:
        """Means over the reference; of the recorded run itself where that is the same."""
        s = self._setting
        if self._means is None and s.own and source.z is not None and s.batch_size >= len(s.probe):
            sums = {layer: summed(z, s.probe.real, per_position) for layer, z in source.z.items()}
            self._means = averaged(sums, s.probe.real, per_position)
        if self._means is None:
            self._means = head_means(
                s.model, s.reference, per_position=per_position, batch_size=s.batch_size
            )
        return self._means


def _zero(_method: Method, s: Setting, chosen: slice, _source: Source) -> Place:
    return lambda heads: edits.zero(heads, positions=s.where(chosen))


def _mean(method: Method, s: Setting, chosen: slice, source: Source) -> Place:
    means = method.means(source, per_position=False)
    return lambda heads: edits.mean(heads, means, positions=s.where(chosen))


def _mean_pos(method: Method, s: Setting, chosen: slice, source: Source) -> Place:
    means = method.means(source, per_position=True)
    return lambda heads: edits.mean_pos(heads, means, positions=s.where(chosen))


def _resample(_method: Method, s: Setting, chosen: slice, _source: Source) -> Place:
    partners = partners_of(len(s.probe), len(s.reference), s.seed, s.own)[chosen]
    donors = head_values(s.model, s.reference.tokens[partners], s.reference.real[partners])
    return lambda heads: edits.resample(heads, donors, positions=s.where(chosen))


def _patch(_method: Method, s: Setting, chosen: slice, _source: Source) -> Place:
    donors = head_values(s.model, s.reference.tokens[chosen], s.reference.real[chosen])
    return lambda heads: edits.patch(heads, donors, positions=s.where(chosen))


def _uniform(_method: Method, s: Setting, chosen: slice, _source: Source) -> Place:
    return lambda heads: edits.uniform(heads, positions=s.where(chosen))


def _attend_to_first(_method: Method, s: Setting, chosen: slice, _source: Source) -> Place:
    real = s.probe.real[chosen]
    return lambda heads: edits.attend_to_first(heads, real, positions=s.where(chosen))


METHODS: dict[str, Callable[[Method, Setting, slice, Source], Place]] = {
    "zero": _zero,
    "mean": _mean,
    "mean_pos": _mean_pos,
    "resample": _resample,
    "patch": _patch,
    "uniform": _uniform,
    "attend_to_first": _attend_to_first,
}


def partners_of(n: int, n_reference: int, seed: int, own: bool) -> Int[Tensor, " example"]:
    """Another example for each: within one probe never itself, by a random cycle."""
    generator = torch.Generator().manual_seed(seed)
    if not own:
        return torch.randint(n_reference, (n,), generator=generator)
    order = torch.randperm(n, generator=generator)
    partners = torch.empty_like(order)
    partners[order] = order.roll(1)
    return partners


def _same_length(s: Setting) -> None:
    if s.reference.length != s.probe.length:
        raise InputError(
            f"mean_pos replaces position by position, but the reference has "
            f"{s.reference.length} positions and the probe {s.probe.length}."
        )


def _aligned(s: Setting) -> None:
    _same_length(s)
    both = torch.cat([s.probe.real, s.reference.real])
    if not bool((both == both[:1]).all()):
        raise InputError(
            "resample and patch take another example's output at the same position: all examples "
            "must have their padding in the same places."
        )
    if s.own and len(s.probe) < 2:
        raise InputError("resample needs another example: give two or more, or a reference.")
