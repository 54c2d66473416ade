"""Proof at load that what headscope reads and writes are the model's real heads."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import ModelLoadError, UnsupportedModelError
from headscope.models.protocol import HeadModel, LayerView

# Differences below are relative to the largest logit; half precision keeps about three digits.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_HALF_TOLERANCE = 5e-2


@dataclass
class _Look:
    """Notes what is wrong with the first layer that is wrong."""

    heads: int
    d_head: int
    sinks: bool = False
    fault: str | None = None
    wants_final: bool = False

    def on_layer(self, view: LayerView) -> None:
        """Check rows and outputs of one layer."""
        rows = view.rows(torch.arange(view.n_queries))
        if rows.pattern.shape[1] != self.heads or view.z.shape[2:] != (self.heads, self.d_head):
            self.fault = f"layer {view.layer} has heads of another shape"
        total = rows.pattern.sum(-1)
        if bool((total > 1 + 1e-4).any()) or bool((rows.pattern < 0).any()):
            self.fault = f"attention rows of layer {view.layer} sum to more than 1"
        self.sinks |= bool((total < 1 - 1e-4).any())

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class _Disturb:
    """Replace the output of one head by twice itself plus one."""

    layer: int
    head: int
    site: Literal["z", "query", "pattern"] = "z"
    layers: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the layers."""
        object.__setattr__(self, "layers", frozenset({self.layer}))

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Change this head alone."""
        changed = value.clone()
        changed[:, :, self.head] = 2 * changed[:, :, self.head] + 1
        return changed


@dataclass(frozen=True)
class _Nothing:
    """An edit that changes nothing, in every layer."""

    layers: frozenset[int]
    site: Literal["z", "query", "pattern"] = "z"

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        """Return an equal copy."""
        return value.clone()


@torch.no_grad()
def prove(
    model: HeadModel, tokens: Tensor, plain_logits: Float[Tensor, "batch pos d_vocab"]
) -> None:
    """Run a few tokens and check the hook points.

    Rows sum to 1 (less a learned sink's share) and have the right shape; with our hooks, and
    with an edit that changes nothing, the logits are the model's own; changing one head's output
    in the first or last attention layer changes them.

    Args:
        model: the model as headscope sees it.
        tokens: a small batch of valid ids.
        plain_logits: the model's own logits of these, computed without headscope.

    Raises:
        ModelLoadError: if the weights are broken.
        UnsupportedModelError: if a hook point is not what it should be.
    """
    if not bool(torch.isfinite(plain_logits).all()):
        raise ModelLoadError(
            f"{model.name} gives logits that are not finite: its weights hold NaN or "
            "infinite values."
        )
    look = _Look(model.shape.n_heads, model.shape.d_head)
    layers = model.shape.attention_layers
    scale = float(plain_logits.abs().max()) or 1.0
    tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE) * scale
    seen = model.forward(tokens, observers=(look,))
    kept = model.forward(tokens, edits=(_Nothing(frozenset(layers)),))
    if look.fault:
        raise UnsupportedModelError(f"{model.name}: {look.fault}.")
    for logits in (seen, kept):
        difference = float((logits.float() - plain_logits.float()).abs().max())
        if difference > tolerance:
            raise UnsupportedModelError(
                f"{model.name}: its logits change by {difference:.2g} when its heads are only "
                f"watched (allowed: {tolerance:.2g}), so what is seen is not what the model does."
            )
    first = {head.layer: head for head in reversed(model.shape.heads)}
    for head in {first[layers[0]], first[layers[-1]]}:
        if torch.equal(model.forward(tokens, edits=(_Disturb(*head),)), seen):
            raise UnsupportedModelError(
                f"{model.name}: changing the output of {head} leaves the logits as they are, "
                "so it is not where the model reads that head."
            )
