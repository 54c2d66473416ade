"""Weights, norms, positions and embedding of a transformers model, measured and proved."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headscope.base.batches import TOKENS, Batch
from headscope.errors import UnsupportedModelError
from headscope.models.attention import AttentionCall, fused
from headscope.models.hf.interface import routed
from headscope.models.hf.layout import arguments, body_of, tiny_batch, tiny_tokens
from headscope.models.hf.measured import TURNS_BY_LENGTH, MeasuredParts, measure_norm
from headscope.models.hf.query_key import (
    SeenLayer,
    Turning,
    find_turning,
    proved_linear,
    proved_values,
    query_key_now,
    short_pass,
)
from headscope.models.hf.weights import Sources, bias, find_sources, not_by_head, read_weights
from headscope.models.loading.proof import gap, rounding
from headscope.models.rotary import POSITIONS
from headscope.models.running import accepted, pass_over
from headscope.views import HeadWeights, Norm, QueryKey, Rotation

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
            f"residual stream has {width}, so its circuits are not maps of the stream"
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
    """A short pass, over a text whose length differs from every other size of its activations."""
    shape = model.shape
    limit = shape.n_ctx or POSITIONS[-1] + 2
    sizes = {shape.n_heads, shape.n_kv_heads, shape.d_head}
    if model.grid is not None:
        at = [position for position in POSITIONS if position < model.grid.length]
        return short_pass(model, tiny_batch(model.module), at)
    length = next(n for n in range(min(limit, POSITIONS[-1] + 2), 0, -1) if n not in sizes)
    at = [position for position in POSITIONS if position < length]
    ids = torch.arange(2 * length) * 7 % max(shape.d_vocab - 1, 1)
    return short_pass(model, Batch({TOKENS: ids.view(2, -1)}, {}), at)


# Tokens of the pass that is run at two lengths, and a length beyond any where none is said.
_FEW, _FAR = 8, 1 << 20


class HFParts(MeasuredParts):
    """Parts of an :class:`headscope.models.hf.model.HFModel`."""

    def __init__(self, model: Any) -> None:
        """Measure nothing yet."""
        super().__init__(model)
        self._measured: tuple[object, dict[int, Reading | str]] | None = None

    def input_norm(self, layer: int) -> Norm:
        """Norm between the residual stream and one layer's attention."""
        width, device = self.model.shape.d_model, self.model.device
        parts = self.model.layout.layers[layer]
        if parts.reads_residual:
            ones = torch.ones(width, dtype=torch.float32, device=device)
            return Norm(ones, torch.zeros_like(ones), False, 0.0, divides=False)
        if parts.input_norm is None:
            raise UnsupportedModelError(
                f"{self.model.name}: what attention of layer {layer} reads is not a plain norm of "
                "the residual stream."
            )
        return measure_norm(parts.input_norm, width, device)

    def block(self, layer: int) -> nn.Module:
        """Module that is one layer, attention and MLP."""
        block: nn.Module = self.model.layout.blocks[layer]
        return block

    def projection(self, layer: int) -> nn.Module:
        """Output projection of one layer's attention."""
        if layer not in self.model.layout.layers:
            raise UnsupportedModelError(f"{self.model.name} has no attention in layer {layer}.")
        projection: nn.Module = self.model.layout.layers[layer].projection
        return projection

    def projection_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Bias of that projection; zeros where it has none."""
        shape = self.model.shape
        found = bias(self.projection(layer), shape.n_heads * shape.d_head)
        return torch.zeros(shape.d_model, device=self.model.device) if found is None else found

    def run(self, batch: Batch) -> None:
        """Run the model's body."""
        inputs = arguments(self.model.module, batch)
        if TOKENS in inputs:  # or some families warn of padding
            inputs["attention_mask"] = torch.ones_like(inputs[TOKENS])
        body_of(self.model.module)(**inputs)

    def tiny(self) -> Batch:
        """Two small examples of what the model reads."""
        return tiny_batch(self.model.module)

    def weights(self, layer: int) -> HeadWeights:
        """Attention weights of one layer, as they are now.

        Raises:
            UnsupportedModelError: if they cannot be told apart by heads, or activations say that
                something else happens.
        """
        reading = self._readings[layer]
        if isinstance(reading, str):
            raise not_by_head(self.model, reading)
        return read_weights(self.model, layer, reading.sources, self.model.shape.d_model)

    def need_values(self, layer: int) -> None:
        """Refuse where the values of a layer are not what its weights give.

        Raises:
            UnsupportedModelError: with the reason.
        """
        reading = self._readings[layer]
        if not isinstance(reading, str) and reading.values is not None:
            raise UnsupportedModelError(
                f"{self.model.name} {reading.values}, so weights do not say what a head writes."
            )

    def query_key(self, layer: int) -> QueryKey:
        """Norms and rotation of one layer, as they are now."""
        if self.turns_by_length:
            raise UnsupportedModelError(f"{self.model.name} {TURNS_BY_LENGTH}.")
        reading = self._readings[layer]
        if isinstance(reading, str):
            raise not_by_head(self.model, reading)
        if isinstance(reading.turning, str):
            raise UnsupportedModelError(
                f"{self.model.name} {reading.turning}, so no one matrix gives its attention "
                "scores: a qk_scorer reads those of a run."
            )
        return query_key_now(self.model, layer, reading.turning)

    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured."""
        return self.query_key(layer).rotation

    @property
    def _readings(self) -> "dict[int, Reading | str]":
        """What was measured and proved of every layer, again where the model got other modules."""
        kind = tuple((n, w.shape, w.dtype) for n, w in self.model.module.named_parameters())
        if self._measured is None or self._measured[0] != kind:
            self._measured = kind, find_readings(self.model)
        return self._measured[1]

    @cached_property
    @torch.no_grad()
    def turns_by_length(self) -> bool:
        """Whether the length of a text changes how positions turn queries and keys, measured.

        The same few tokens at the same positions, followed by one that stands next to them or at
        the end of the context: what comes before must not see the difference.
        """
        shape = self.model.shape
        far = shape.n_ctx or 4 * (shape.trained_ctx or _FAR)
        if "position_ids" not in accepted(self.model.module) or far <= _FEW:
            return False
        ids = tiny_tokens(self.model.module).flatten()[None, :_FEW]
        near = torch.arange(ids.shape[1], device=ids.device)[None]
        last = near.clone()
        last[0, -1] = far - 1
        first, second = self._queries(ids, near), self._queries(ids, last)
        return not all(
            gap(query[:, :, :-1], first[layer][:, :, :-1], rounding(query.dtype, 64)).closed
            for layer, query in second.items()
        )

    def _queries(self, ids: Tensor, position_ids: Tensor) -> dict[int, Tensor]:
        """Queries of every layer as attention uses them, at some positions."""
        parts, seen = self.model.layout.by_attention(), {}

        def attend(module: nn.Module, call: AttentionCall) -> Tensor:
            seen[parts[module].layer] = call.query
            z = fused(call)
            # Where every position sees the last one, nothing may come from it but by its place.
            return z if call.mask.causal else torch.zeros_like(z)

        with routed(self.model.layout.configs, attend):
            self.model.module.base_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=position_ids,
                use_cache=False,
            )
        return seen
