"""What every attribution proves of itself: our reading of the last stream is the model's own."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.errors import UnsupportedModelError
from headscope.lens.splitting import Split
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.table.lens import Tolerance, check_sum

# Largest gap between the parts and the whole: a number, and a share of the largest part. Half
# precision rounds the residual stream itself, block by block, to 8 or 11 bits.
_TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-4, 1e-5)}
_HALF_TOLERANCE = (5e-2, 5e-2)


def tolerance(model: HeadModel) -> Tolerance:
    """Largest gap between the parts and the whole."""
    return _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)


def check_readout(
    model: HeadModel,
    residual: Float[Tensor, "row d_model"],
    logits: Float[Tensor, "row d_vocab"],
) -> None:
    """Raise HeadscopeError where our reading of the residual stream is not the model's own."""
    read = model.readout.logits(residual).cpu().double().numpy()
    own = logits.cpu().double().numpy()
    largest = np.abs(own).max(1, keepdims=True).repeat(own.shape[1], 1).ravel()
    allowed = (tolerance(model)[0],) * 2  # kernels differ more than sums do
    check_sum(read.ravel(), own.ravel(), largest, allowed, f"logits of {model.name}")


def check_first(model: HeadModel, probe: Probe) -> None:
    """The same on one position of a probe."""
    one = probe.examples(slice(0, 1))
    last = one.last
    place = torch.zeros(1, dtype=torch.long, device=model.device)
    split = Split(
        model,
        place,
        last.to(model.device),
        torch.zeros(1, model.shape.d_model, dtype=torch.float32).to(model.device),
    )
    logits = model.forward(one.tokens, real=one.real, observers=[_Final(split)], logits_at=last)
    check_readout(model, split.residual, logits[:, 0].float())


@dataclass
class _Final:
    """Shows a split nothing but the last residual stream."""

    split: Split
    wants_final: bool = True

    def on_layer(self, view: object) -> None:
        """Nothing to see."""

    def on_final(self, residual: Float[Tensor, "batch pos d_model"]) -> None:
        self.split.residual = residual[self.split.example, self.split.position].float()


def need_readout(model: HeadModel) -> None:
    """Raise UnsupportedModelError where the model has no plain final norm."""
    if "readout" in model.limits:
        raise UnsupportedModelError(model.limits["readout"])


def over_layers(model: HeadModel, parts: dict[int, Tensor]) -> Float[np.ndarray, "layer row"]:
    """Parts of the layers that have them, over all layers; NaN elsewhere."""
    result = np.full((model.shape.n_layers, len(next(iter(parts.values())))), np.nan)
    for layer, values in parts.items():
        result[layer] = values.cpu().double().numpy()
    return result


def over_heads(model: HeadModel, parts: dict[int, Tensor]) -> Float[np.ndarray, "layer head *rest"]:
    """Parts of heads over all layers; NaN where there is no attention or the head was removed.

    Args:
        model: whose heads they are.
        parts: by layer, ``[row head ...]``; rows come last in the result.
    """
    rows, _, *rest = next(iter(parts.values())).shape
    shape = (model.shape.n_layers, model.shape.n_heads, *rest, rows)
    result = np.full(shape, np.nan)
    for layer, values in parts.items():
        result[layer] = values.movedim(0, -1).cpu().double().numpy()
    for head in model.shape.removed:
        result[head] = np.nan
    return result
