"""What every path of running a model must give, checked against plain eager attention."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headscope.models.protocol import HeadModel
from headscope.models.taps import TapView
from tests.models.families import tokens
from tests.watching import watch

Site = Literal["z", "query", "pattern"]


@dataclass
class Everything:
    """Observer that keeps whole patterns, head outputs, values and the last residual stream."""

    wants_final: bool = True
    chunk: int | None = None
    patterns: dict[int, Tensor] = field(default_factory=dict)
    visible: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None

    def on_layer(self, view: TapView) -> None:
        positions = torch.arange(view.n_queries)
        parts = [view.rows(part) for part in positions.split(self.chunk or view.n_queries)]
        width = view.n_queries

        def widened(value: Tensor) -> Tensor:
            return nn.functional.pad(value, (0, width - value.shape[-1]))

        self.patterns[view.layer] = torch.cat([widened(rows.pattern) for rows in parts], 2)
        self.visible[view.layer] = torch.cat([widened(rows.visible) for rows in parts], 1)
        self.z[view.layer] = view.z.clone()
        self.values[view.layer] = view.values().clone()

    def on_final(self, residual: Tensor) -> None:
        self.final = residual.clone()


@dataclass(frozen=True)
class Change:
    """Edit of one site in some layers."""

    site: Site
    layers: frozenset[int]
    change: Callable[[Tensor], Tensor]

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        return self.change(value)


@dataclass(frozen=True)
class Plain:
    """What a model gives on eager attention, without headscope."""

    logits: Tensor
    patterns: tuple[Tensor, ...]
    z: dict[int, Tensor]


@torch.no_grad()
def plain(module: Any, projections: dict[int, nn.Module], real: Tensor | None) -> Plain:
    """Run a model on eager attention.

    Args:
        module: the model, built or set on eager attention.
        projections: output projection of every layer, whose input is z.
        real: positions that are no padding.
    """
    z: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            z[layer] = args[0].clone()

        return hook

    handles = [p.register_forward_pre_hook(keep(layer)) for layer, p in projections.items()]
    inputs: dict[str, Any] = {"use_cache": False, "output_attentions": True}
    if real is not None:
        inputs["attention_mask"] = real.long()
        if takes_positions(module):
            inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
    try:
        output = module(tokens(), **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Plain(output.logits, output.attentions, z)


def takes_positions(module: Any) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def difference(actual: Tensor, expected: Tensor, keep: Tensor | None = None) -> float:
    """Largest difference, relative to the largest expected number (at least 1)."""
    if keep is not None:
        actual, expected = actual[keep], expected[keep]
    gap = (actual.float() - expected.float()).abs().max()
    return float(gap / expected.float().abs().max().clamp_min(1.0))


@torch.no_grad()
def worst(model: HeadModel, reference: Plain, real: Tensor | None) -> dict[str, float]:
    """Largest differences from plain eager attention at real positions."""
    seen = Everything()
    logits = watch(model, tokens(), seen, real=real)
    layers = model.shape.attention_layers
    assert tuple(seen.patterns) == layers
    kept = torch.ones(logits.shape[:2], dtype=torch.bool) if real is None else real
    rows, z = [0.0], [0.0]
    for layer, expected in zip(layers, reference.patterns, strict=True):
        pattern = seen.patterns[layer].transpose(1, 2)
        rows.append(difference(pattern, expected.transpose(1, 2), kept))
        z.append(difference(seen.z[layer].flatten(2), reference.z[layer].flatten(2), kept))
    return {
        "logits": difference(logits, reference.logits, kept),
        "rows": max(rows),
        "z": max(z),
    }


@torch.no_grad()
def chunks_agree(model: HeadModel, real: Tensor | None) -> float:
    """Largest difference between rows asked for at once and in chunks."""
    whole = Everything()
    watch(model, tokens(), whole, real=real)
    gaps = []
    for size in (1, 5):
        parts = Everything(chunk=size)
        watch(model, tokens(), parts, real=real)
        for layer, pattern in whole.patterns.items():
            assert torch.equal(parts.visible[layer], whole.visible[layer])
            gaps.append(difference(parts.patterns[layer], pattern))
    return max(gaps)


@torch.no_grad()
def rows_are_exact(model: HeadModel, real: Tensor | None) -> None:
    """Rows are 0 where nothing is visible, sum to at most 1, and average values to z."""
    seen = Everything()
    watch(model, tokens(), seen, real=real)
    for layer, pattern in seen.patterns.items():
        assert pattern.dtype == torch.float32
        assert not pattern.masked_select(~seen.visible[layer][:, None]).any()
        assert bool((pattern.sum(-1) < 1 + 1e-5).all())
        values = seen.values[layer].float().repeat_interleave(model.shape.group_size, 1)
        z = (pattern @ values).transpose(1, 2)
        kept = torch.ones(z.shape[:2], dtype=torch.bool) if real is None else real
        assert difference(seen.z[layer], z, kept) < 1e-5


@torch.no_grad()
def logits_at_selects(model: HeadModel) -> None:
    """``logits_at`` selects positions, and an empty one still shows every layer."""
    at = torch.tensor([0, 7, 11])
    whole = model.forward(tokens())
    assert difference(model.forward(tokens(), logits_at=at), whole[:, at]) < 1e-5
    for final in (True, False):
        seen = Everything(wants_final=final)
        nothing = watch(model, tokens(), seen, logits_at=at[:0])
        assert nothing.shape == (4, 0, model.shape.d_vocab)
        assert tuple(seen.patterns) == model.shape.attention_layers
        assert (seen.final is not None) is final


@torch.no_grad()
def examples_are_independent(model: HeadModel) -> None:
    """One example gives alone what it gives in a batch."""
    whole, one = Everything(), Everything()
    logits = watch(model, tokens(), whole)
    alone = watch(model, tokens()[2:3], one)
    assert difference(alone, logits[2:3]) < 1e-5
    for layer, pattern in one.patterns.items():
        assert difference(pattern, whole.patterns[layer][2:3]) < 1e-5


@torch.no_grad()
def edits_act(model: HeadModel, sites: tuple[Site, ...] = ("z", "query", "pattern")) -> None:
    """An edit that changes nothing changes nothing; one that does changes the logits."""
    clean = model.forward(tokens())
    layers = frozenset(model.shape.attention_layers)
    for site in sites:
        same = model.forward(tokens(), edits=[Change(site, layers, torch.clone)])
        assert difference(same, clean) < 1e-5, site
        for layer in (min(layers), max(layers)):
            edit = Change(site, frozenset({layer}), lambda value: value * 0.0)
            assert difference(model.forward(tokens(), edits=[edit]), clean) > 1e-3, (site, layer)


@torch.no_grad()
def pattern_edit_is_z_edit(model: HeadModel) -> None:
    """Halving a layer's patterns is halving its head outputs."""
    layers = frozenset({model.shape.attention_layers[-1]})
    by_pattern = model.forward(tokens(), edits=[Change("pattern", layers, lambda p: p / 2)])
    by_z = model.forward(tokens(), edits=[Change("z", layers, lambda z: z / 2)])
    assert difference(by_pattern, by_z) < 1e-5


@torch.no_grad()
def zero_query_is_uniform(model: HeadModel, real: Tensor | None) -> None:
    """A query of zeros attends evenly to all it sees (less what a sink takes)."""
    layers = frozenset(model.shape.attention_layers)
    seen = Everything()
    edit = Change("query", layers, torch.zeros_like)
    watch(model, tokens(), seen, real=real, edits=[edit])
    for layer, pattern in seen.patterns.items():
        shown = seen.visible[layer].float()[:, None]
        even = shown / shown.sum(-1, keepdim=True)
        assert difference(pattern / pattern.sum(-1, keepdim=True), even.expand_as(pattern)) < 1e-6


def state(module: nn.Module) -> dict[str, Any]:
    """What a pass must leave as it was: weights, hooks, attributes, attention implementation."""
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "hooks": [
            (name, len(part._forward_hooks), len(part._forward_pre_hooks), set(part.__dict__))
            for name, part in module.named_modules()
        ],
        "attention": [
            part.config._attn_implementation
            for part in module.modules()
            if hasattr(part, "config") and hasattr(part.config, "_attn_implementation")
        ],
    }


def same_state(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return (
        before["hooks"] == after["hooks"]
        and before["attention"] == after["attention"]
        and before["weights"].keys() == after["weights"].keys()
        and all(torch.equal(before["weights"][k], after["weights"][k]) for k in before["weights"])
    )


class Broken:
    """Observer that fails in the second layer."""

    wants_final = False

    def on_layer(self, view: TapView) -> None:
        if view.layer == 1:
            raise ZeroDivisionError

    def on_final(self, residual: Tensor) -> None: ...
