"""Which head every output of a layer's input projections belongs to, measured by gradients.

Families store queries, keys and values side by side, in turns per head, or apart. Each output of
such a matrix can change the query, key or value of one head only: the derivative of a sum over
heads, each with a sign, by that output carries that head's sign. A few signed sums spell out the
head's number in bits, whatever the layout.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.hooks import hooked, leaving
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import LayerParts, tiny_tokens
from headscope.models.running import pass_over

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel

Site = Literal["query", "key", "value"]
Owner = tuple[Site, int]
SITES: tuple[Site, ...] = ("query", "key", "value")

# How far the ratio of two signed sums may be from a sign. Where heads mix, it is far from both.
_TOLERANCE = 0.02
_HALF_TOLERANCE = 0.3


@dataclass
class _Watched:
    """Outputs of the matrices of each layer, and the call that they led to."""

    outputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    calls: dict[int, AttentionCall] = field(default_factory=dict)


def find_owners(model: "HFModel") -> dict[int, dict[str, list[Owner]]]:
    """Site and head (key/value head for keys and values) of every output, by layer and module.

    Raises:
        UnsupportedModelError: if an output serves several heads, or none.
    """
    with torch.enable_grad():
        watched = _watch(model)
        return {
            layer: _owners(model, layer, outputs, watched.calls[layer])
            for layer, outputs in watched.outputs.items()
        }


def matrices(parts: LayerParts) -> Iterator[tuple[str, nn.Module]]:
    """Matrices of an attention module that work on its input, by name."""
    for name, module in parts.attention.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and module is not parts.projection:
            yield name, module


def _watch(model: "HFModel") -> _Watched:
    watched = _Watched({layer: {} for layer in model.layout.layers})
    by_attention = model.layout.by_attention()

    def keep(layer: int, name: str) -> Callable[..., Tensor]:
        def kept(output: Tensor) -> Tensor:
            # A leaf, so that the derivative stops here.
            watched.outputs[layer][name] = output.detach().requires_grad_()
            return watched.outputs[layer][name].clone()  # some families write over it (clip_qkv)

        return kept

    def attend(module: nn.Module, call: AttentionCall) -> Tensor:
        watched.calls[by_attention[module].layer] = call
        return fused(call).detach()

    with ExitStack() as stack:
        stack.enter_context(pass_over(model.module))
        stack.enter_context(
            hooked(
                leaving(module, keep(layer, name))
                for layer, parts in model.layout.layers.items()
                for name, module in matrices(parts)
            )
        )
        stack.enter_context(routed(model.layout.configs, attend, by_attention))
        model.module.base_model(input_ids=tiny_tokens(model.module), use_cache=False)
    return watched


def _owners(
    model: "HFModel", layer: int, outputs: dict[str, Tensor], call: AttentionCall
) -> dict[str, list[Owner]]:
    found: dict[str, list[Owner]] = {}
    given: tuple[tuple[Site, Tensor], ...] = (
        ("query", call.query),
        ("key", call.key),
        ("value", call.value),
    )
    for name, output in outputs.items():
        owners: list[Owner | None] = [None] * output.shape[-1]
        for site, value in given:
            for at, head in _numbers(model, layer, value, output).items():
                if owners[at] is not None:
                    raise _mixed(model, layer, name)
                owners[at] = (site, head)
        known = [owner for owner in owners if owner is not None]
        if known and len(known) < len(owners):
            raise _mixed(model, layer, name)
        if known:
            found[name] = known
    for site, value in given:
        have = sorted(head for owners in found.values() for s, head in owners if s == site)
        if have != sorted(list(range(value.shape[1])) * value.shape[3]):
            raise _mixed(model, layer, site)
    return found


def _numbers(
    model: "HFModel",
    layer: int,
    value: Float[Tensor, "batch head pos d_head"],
    output: Float[Tensor, "*any out"],
) -> dict[int, int]:
    """Head that each output reaches at one site, for those that reach any."""
    heads = torch.arange(value.shape[1], device=value.device)
    weights = torch.randn(
        value.shape, generator=torch.Generator().manual_seed(layer), dtype=torch.float32
    )
    weighted = (value.float() * weights.to(value.device)).sum((0, 2, 3))

    def derivative(signs: Tensor) -> Tensor:
        total = (weighted * signs).sum()
        (found,) = torch.autograd.grad(total, output, retain_graph=True, allow_unused=True)
        return torch.zeros_like(output) if found is None else found

    if not weighted.requires_grad:
        return {}
    every = derivative(torch.ones_like(weighted)).float().flatten(0, -2)
    reached = every.any(0)
    if not bool(reached.any()):
        return {}
    number = torch.zeros(output.shape[-1], dtype=torch.long, device=value.device)
    exact = model.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE if exact else _HALF_TOLERANCE
    furthest = torch.zeros((), device=value.device)
    for bit in range((value.shape[1] - 1).bit_length()):
        signs = (heads >> bit & 1) * 2.0 - 1.0
        part = derivative(signs).float().flatten(0, -2)
        ratio = (part * every).sum(0) / every.square().sum(0).clamp_min(1e-30)
        away = (part - ratio.sign() * every).norm(dim=0) / every.norm(dim=0).clamp_min(1e-30)
        furthest = torch.maximum(furthest, away.where(reached, 0.0).max())
        number += (ratio > 0).long() << bit
    if not float(furthest) <= tolerance:
        raise _mixed(model, layer, "queries and keys")
    by_output = torch.where(reached, number, -1).tolist()
    return {at: head for at, head in enumerate(by_output) if head >= 0}


def _mixed(model: "HFModel", layer: int, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.name} ({model.module.config.model_type}) cannot be pruned: in layer {layer} what "
        f"makes its {what} does not divide by heads (e.g. a norm over all heads together), so "
        "removing one would change the others. Ablate its heads instead."
    )
