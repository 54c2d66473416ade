"""What was measured of every layer's weights, and proved on the model's own activations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headscope.inputs import Rotation
from headscope.models.hf.query_key import (
    SeenLayer,
    Turning,
    find_turning,
    proved_linear,
    proved_values,
    short_pass,
)
from headscope.models.hf.weights import Sources, find_sources, read_weights
from headscope.models.rotary import POSITIONS
from headscope.models.running import pass_over

if TYPE_CHECKING:
    from headscope.models.hf.model import HFModel


@dataclass(frozen=True, eq=False)
class Reading:
    """What one layer's weights are, and what follows them; no training changes it.

    Attributes:
        sources: which outputs of which modules make queries, keys and values.
        values: why values are not what weights give; None where they are.
        turning: what follows the weights of queries and keys; or why that cannot be told.
    """

    sources: Sources
    values: str | None
    turning: Turning | str


def find_readings(model: "HFModel") -> dict[int, Reading | str]:
    """Measure every layer of a model with a tiny pass and a short one.

    Returns:
        By layer, its reading; or why it has no weights per head.
    """
    with pass_over(model.module):
        sources = find_sources(model)
        if all(isinstance(one, str) for one in sources.values()):
            return {layer: str(one) for layer, one in sources.items()}
        seen = _seen(model)
        found: dict[int, Reading | str] = {}
        known: list[Rotation] = []
        for layer, one in sources.items():
            found[layer] = (
                one if isinstance(one, str) else _read(model, layer, seen[layer], one, known)
            )
        return found


@torch.no_grad()
def _read(
    model: "HFModel", layer: int, seen: SeenLayer, sources: Sources, known: list[Rotation]
) -> Reading | str:
    """Read and prove one layer; rotations that are new are added to those that are known."""
    width = model.shape.d_model
    if seen.read.shape[-1] != width:
        return (
            f"attention of layer {layer} reads {seen.read.shape[-1]} numbers a position and the "
            f"residual stream has {width}, so its circuits are no maps of the stream"
        )
    weights = read_weights(model, layer, sources, width)
    reason = proved_linear(model, layer, seen, sources, weights)
    if reason is not None:
        return reason
    turning = find_turning(model, layer, seen, weights, known)
    if isinstance(turning, Turning) and not any(turning.rotation is one for one in known):
        known.append(turning.rotation)
    return Reading(sources, proved_values(model, layer, seen, weights), turning)


def _seen(model: "HFModel") -> dict[int, SeenLayer]:
    """A short pass, over a text whose length is no other size of its activations."""
    shape = model.shape
    limit = shape.n_ctx or POSITIONS[-1] + 2
    sizes = {shape.n_heads, shape.n_kv_heads, shape.d_head}
    length = next(n for n in range(min(limit, POSITIONS[-1] + 2), 0, -1) if n not in sizes)
    at = [position for position in POSITIONS if position < length]
    ids = torch.arange(2 * length) * 7 % max(shape.d_vocab - 1, 1)
    return short_pass(model, ids.view(2, -1), at)
