"""The obvious slow way: every vector of every (head, key, query) at once, loops over nodes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headscope import capture, probes
from headscope.models.protocol import HeadModel
from headscope.models.taps import Tap, TapView
from headscope.probes.probe import Probe


@dataclass
class Layer:
    """One layer of a probe: its parts, and what the model itself computed."""

    pattern: Tensor  # batch head query key
    parts: Tensor  # batch query head key d_model
    entering: Tensor  # batch pos d_model
    attention: Tensor
    mlp: Tensor

    @property
    def bias(self) -> Tensor:
        """What the model's write has beside the parts."""
        return self.attention - self.parts.sum((2, 3))


def layers_of(model: HeadModel, probe: Probe) -> list[Layer]:
    """Everything, held whole."""
    kept: dict[Tap, Tensor] = {}

    def keep(view: TapView) -> None:
        value = view.value
        kept[view.tap] = value.detach().float().clone()

    numbers = range(model.shape.n_layers)
    sites = ("resid_pre", "value", "attn_out", "mlp_out")
    model.run(probe, reads={Tap(site, n): keep for site in sites for n in numbers})
    patterns = capture.collect(model, probe)
    group = model.shape.n_heads // model.shape.n_kv_heads
    found = []
    for n in numbers:
        pattern = patterns[n].pattern
        values = kept[Tap("value", n)].repeat_interleave(group, 1)
        moved = torch.einsum("bhke,hed->bhkd", values, model.output_weights(n).float())
        parts = torch.einsum("bhqk,bhkd->bqhkd", pattern, moved)
        norm = model.parts.attention_write(n).norm
        if norm is not None:  # held at the scale that it had
            written = parts.sum((2, 3)) + model.parts.attention_write(n).bias
            parts = parts - parts.mean(-1, keepdim=True) if norm.centred else parts
            parts = parts * norm.gain / norm.scale(written)[:, :, None, None, None]
        at = (kept[Tap(site, n)] for site in ("resid_pre", "attn_out", "mlp_out"))
        found.append(Layer(pattern, parts, *at))
    return found


def shares(parts: list[Tensor]) -> list[float]:
    """Shares of parts in their sum."""
    whole = sum(parts)
    near = [float(whole.abs().sum() - (whole - one).abs().sum()) for one in parts]
    total = sum(max(one, 0.0) for one in near)
    return [max(one, 0.0) / total for one in near]


def cut(found: list[float], least: float) -> list[float]:
    """Shares above a threshold, scaled up; the largest in any case."""
    kept = [one if one >= least or one == max(found) else 0.0 for one in found]
    return [one / sum(kept) for one in kept]


def head_flow(
    model: HeadModel, tokens: Tensor, parallel: bool, least: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Flow through every head into the last position, and importance of the input tokens."""
    layers = layers_of(model, probes.from_tokens(tokens[None]))
    length, heads = len(tokens), model.shape.n_heads
    flow = np.zeros((len(layers), heads))
    importance = np.eye(length)[-1]
    for n, layer in reversed(list(enumerate(layers))):
        below = np.zeros(length)
        for query in range(length):
            # By way of the stream or the MLP, all of it comes through the stream after attention.
            parts = [layer.parts[0, query, h, k] for h in range(heads) for k in range(query + 1)]
            fixed = [layer.entering[0, query], layer.bias[0, query]]
            fixed += [layer.mlp[0, query]] if parallel else []
            found = cut(shares([*fixed, *parts]), least)
            below[query] += importance[query] * (found[0] + (found[2] if parallel else 0))
            for place, share in enumerate(found[len(fixed) :]):
                head, key = divmod(place, query + 1)
                below[key] += importance[query] * share
                flow[n, head] += importance[query] * share
        importance = below
    return flow, importance
