"""Per-head attention weights, read from the model's own matrices.

Which outputs of which module make which head's query, key or value is measured once
(:mod:`headscope.models.hf.owners`); weights are read anew each time, so that they are never stale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import UnsupportedModelError
from headscope.models.hf.owners import SITES, Owners, Site, find_readers
from headscope.models.hf.projection import bias, matrix
from headscope.models.hf.removed import kept_in
from headscope.views.outputs import HeadWeights

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel


@dataclass(frozen=True, eq=False)
class Source:
    """Where one layer's queries, keys or values come from.

    Attributes:
        name: of the module that reads attention's input, inside the attention module.
        outputs: its outputs that are each head's numbers, in order; -1 where a head was pruned.
    """

    name: str
    outputs: Int[Tensor, "head d_head"]

    def of_heads(self, values: Float[Tensor, "*any out"]) -> Float[Tensor, "*any head d_head"]:
        """Each head's share of something that has an entry for every output of the module."""
        places = self.outputs.flatten()
        first, count, shape = int(places[0]), len(places), tuple(self.outputs.shape)
        if first >= 0 and torch.equal(places, torch.arange(first, first + count)):
            run: Tensor = values[..., first : first + count].unflatten(-1, shape)
            return run
        chosen = places.to(values.device)
        picked: Tensor = values[..., chosen.clamp_min(0)].masked_fill(chosen < 0, 0.0)
        by_head: Tensor = picked.unflatten(-1, shape)
        return by_head


Sources = dict[Site, Source]


def find_sources(model: "HFModel") -> dict[int, Sources | str]:
    """Sources of every attention layer's queries, keys and values; or why they cannot be told."""
    found: dict[int, Sources | str] = {}
    readers = find_readers(model, model.shape.attention_layers)
    for layer in model.layout.layers:
        owners = readers[layer]
        if isinstance(owners, str):
            found[layer] = owners
            continue
        found[layer] = _sources(model, layer, owners)
    return found


def _sources(model: "HFModel", layer: int, owners: Mapping[str, Owners]) -> Sources | str:
    shape = model.shape
    sources: Sources = {}
    for site in SITES:
        heads = shape.n_heads if site == "query" else shape.n_kv_heads
        making = [name for name, one in owners.items() if any(o and o[0] == site for o in one)]
        if len(making) != 1:
            return f"in layer {layer} several matrices make its {site} together"
        outputs = torch.full((heads, shape.d_head), -1)
        for head in range(heads):
            own = [at for at, owner in enumerate(owners[making[0]]) if owner == (site, head)]
            if own:
                outputs[head] = torch.tensor(own[: shape.d_head])
        sources[site] = Source(making[0], outputs)
    return sources


def read_weights(model: "HFModel", layer: int, sources: Sources, width: int) -> HeadWeights:
    """Attention weights of one layer as they are now.

    Args:
        model: whose they are.
        layer: the model's layer number.
        sources: of this layer.
        width: length of the vectors that attention reads.
    """
    sides = {}
    for site, name in zip(SITES, "QKV", strict=True):
        source = sources[site]
        module = model.layout.layers[layer].attention.get_submodule(source.name)
        read, constant = source.of_heads(matrix(module, width)), bias(module, width)
        sides[f"W_{name}"] = read.permute(1, 0, 2)
        sides[f"b_{name}"] = (
            read.new_zeros(source.outputs.shape) if constant is None else source.of_heads(constant)
        )
    return HeadWeights(**sides, **_output_side(model, layer))


def _output_side(model: "HFModel", layer: int) -> dict[str, Tensor]:
    """``W_O`` and ``b_O``: before a norm after attention, and before a residual multiplier."""
    projection, shape = model.layout.layers[layer].projection, model.shape
    weight = matrix(projection, shape.n_heads * shape.d_head)
    by_head = weight.reshape(-1, shape.d_head, weight.shape[-1])
    kept = kept_in(projection)
    return {
        "W_O": by_head if kept is None else kept.spread(by_head, 0),
        "b_O": model.parts.projection_bias(layer),
    }


def not_by_head(model: "HFModel", reason: str) -> UnsupportedModelError:
    """The error of a layer whose weights cannot be told apart."""
    return UnsupportedModelError(
        f"{model.name} has no weights per head that its activations confirm: {reason}."
    )
