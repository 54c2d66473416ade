"""Parts of a model that weight-level readings need, measured on tiny passes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.errors import UnsupportedModelError
from headscope.inputs import InputNorm, QueryKey, Rotation
from headscope.models.blocks import AttentionWrite
from headscope.models.hf.blocks import Writers, attention_write, find_writers
from headscope.models.hf.hooks import Hook, after, hooked
from headscope.models.hf.watch import Watch
from headscope.models.loading.agreement import Gap
from headscope.models.offload import parameter
from headscope.models.running import pass_over
from headscope.models.taps import Tap

# Rows of the embedding that pass the first block at a time.
_BATCH = 1024
TURNS_BY_LENGTH = (
    "turns its queries and keys by other angles in longer texts (longrope or dynamic scaling), so "
    "that an offset does not give one product: read queries and keys of the text itself, e.g. with "
    "scorers of matches"
)


class MeasuredParts(ABC):
    """What the two paths have in common; see :class:`headscope.models.protocol.ModelParts`."""

    def __init__(self, model: Any) -> None:
        """Measure nothing yet."""
        self.model = model

    @abstractmethod
    def input_norm(self, layer: int) -> InputNorm:
        """Norm between the residual stream and one layer's attention."""

    @abstractmethod
    def block(self, layer: int) -> nn.Module:
        """Module that is one layer, attention and MLP."""

    @abstractmethod
    def projection(self, layer: int) -> nn.Module:
        """Output projection of one layer's attention."""

    @abstractmethod
    def projection_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """Its bias; zeros where it has none."""

    @abstractmethod
    def run(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Run the model's body."""

    @abstractmethod
    def query_key(self, layer: int) -> QueryKey:
        """What follows a layer's query and key matrices: norms, rotation, multipliers."""

    @abstractmethod
    def need_values(self, layer: int) -> None:
        """Refuse where the values of a layer are not what its weights give."""

    @abstractmethod
    def rotation(self, layer: int) -> Rotation:
        """Rotary positions of one layer, measured once."""

    @property
    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding as it enters the first block, the family's multiplier included."""
        module = self.model.module
        weight = parameter(module.get_input_embeddings(), "weight")
        ids = torch.arange(8, device=weight.device) * 7 % len(weight)
        seen = self.layer_inputs(ids[:, None], [0])[0][:, 0].float()
        given = weight[ids].float()
        if seen.shape == given.shape:
            change, source = seen[1:] - seen[:1], given[1:] - given[:1]
            scale = float((change * source).sum() / source.square().sum())
            left = (change - scale * source).norm() / change.norm()
            if Gap(float(left), 1e-2).closed:
                return weight if Gap(abs(scale - 1), 1e-3).closed else weight * scale
        raise UnsupportedModelError(
            f"{self.model.name} applies a norm or a projection to its embedding, so a token does "
            "not enter the first block as a row of it."
        )

    @torch.no_grad()
    def first_mlp(self, residual: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the first block adds to each row when its attention writes nothing."""
        return torch.cat([self._first_mlp(rows) for rows in residual.split(_BATCH)])

    def _first_mlp(self, rows: Float[Tensor, "row d_model"]) -> Tensor:
        result: list[Tensor] = []
        given = rows[:, None].to(self.model.dtype)
        end = Tap("resid_post", 0)
        self.model.run(
            torch.zeros(len(rows), 1, dtype=torch.long),
            writes={
                Tap("resid_pre", 0): lambda _stream, _span: given,
                Tap("head_sum", 0): lambda write, _span: torch.zeros_like(write),
            },
            reads={end: lambda view: result.append(view.value)},
            until=end,
        )
        added: Tensor = result[0].reshape(rows.shape).float() - rows.float()
        return added

    @torch.no_grad()
    def layer_inputs(
        self, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """Residual stream that enters each of these layers."""
        seen: dict[int, Tensor] = {}
        taps = [Tap("resid_pre", layer) for layer in layers]
        self.model.run(
            tokens,
            reads=dict.fromkeys(taps, lambda view: seen.update({view.layer: view.value.detach()})),
            until=max(taps, key=lambda tap: tap.layer or 0),
        )
        return seen

    def attention_write(self, layer: int) -> AttentionWrite:
        """How head outputs of one layer reach the residual stream, with the weights of now."""
        return attention_write(
            self.block(layer),
            self._writers[layer],
            self.projection_bias(layer),
            self.model.device,
        )

    @cached_property
    @torch.no_grad()
    def _writers(self) -> dict[int, Writers]:
        layers = self.model.shape.attention_layers
        blocks = {layer: (self.block(layer), self.projection(layer)) for layer in layers}
        seen = Watch(copies=True)
        modules = {module for block, _ in blocks.values() for module in block.modules()}
        hooks = [after(module, seen.note) for module in modules]
        ids = torch.arange(10) * 7 % max(self.model.shape.d_vocab - 1, 1)
        self.watch(ids.view(2, 5), hooks)
        try:
            return find_writers(seen, blocks)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.model.name}: {error}") from error

    def writer(self, layer: int, site: Literal["attn_out", "mlp_out"]) -> tuple[nn.Module, float]:
        """Module of a block whose output is attention's or the MLP's write, and its multiplier.

        Raises:
            UnsupportedModelError: if the block adds something else.
        """
        writers = self._writers.get(layer)
        if writers is None:
            raise UnsupportedModelError(
                f"layer {layer} of {self.model.name} has no attention, so what it adds is not "
                "split into attention and MLP: read resid_post."
            )
        block = self.block(layer)
        if site == "attn_out":
            return block.get_submodule(writers.attention), writers.attention_scale
        return block.get_submodule(writers.mlp), writers.mlp_scale

    def watch(self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[Hook]) -> None:
        """Run the model's body with these hooks in place; scopes of edits leave it alone."""
        with pass_over(self.model.module), hooked(hooks):
            self.run(tokens.to(self.model.device))
