"""What each rotary frequency adds to a head's scores with far tokens."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headscope.capture import stream
from headscope.errors import UnsupportedModelError
from headscope.heads import ModelShape
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Reads, TapView, at_layers
from headscope.probes.probe import Probe
from headscope.scorers.long_need import far_keys, plane_shares
from headscope.views import Rotation


@dataclass(frozen=True, eq=False)
class RotaryContributions:
    """Shares of the rotary planes in the size of far scores; a head's shares add up to 1.

    Attributes:
        share: mean over the queries that predict an answer and see a farther half, and over
            examples; NaN in layers without attention or without rotary positions, and for heads
            that are not there.
        frequency: radians by which one position turns each plane, by layer; planes run from the
            fastest to the slowest.
    """

    share: Float[np.ndarray, "layer head plane"]
    frequency: Float[np.ndarray, "layer plane"]

    @property
    def wavelength(self) -> Float[np.ndarray, "layer plane"]:
        """Tokens after which each plane has turned once."""
        with np.errstate(divide="ignore"):
            return 2 * np.pi / self.frequency


@own_types()
def rotary_contributions(
    model: HeadModel, probe: Probe, *, batch_size: int | None = None
) -> RotaryContributions:
    """Which frequencies make each head's scores with the farther half of the text.

    Hong et al. 2024 (arXiv 2410.08703); definitions at the scorer ``rotary_slowness``.

    Args:
        model: with rotary positions, whose queries and keys can be seen.
        probe: of kind ``needle``.
        batch_size: examples at a time.

    Raises:
        UnsupportedModelError: if the model has none, or shows none.

    Example:
        >>> model = hs.load("tiny-llama")
        >>> probe = hs.probes.needle(model, lengths=64, depths=1, per_cell=1)
        >>> found = rotary_contributions(model, probe)
        >>> np.allclose(found.share.sum(-1), 1)
        True
    """
    for limit in ("query_keys", "rotary"):
        if limit in model.limits:
            raise UnsupportedModelError(model.limits[limit])
    rotations = {layer: model.parts.rotation(layer) for layer in model.shape.attention_layers}
    probe.mark("answering")  # so that a missing mark is said before any forward pass
    total: dict[int, Tensor] = {}
    count: dict[int, Tensor] = {}
    for _, seen in stream(
        model, probe, lambda batch, _halvings: _Seen(batch, rotations), batch_size=batch_size
    ):
        for layer, values in seen.total.items():
            total[layer] = total.get(layer, torch.zeros_like(values)) + values
            count[layer] = count.get(layer, torch.zeros_like(seen.count[layer])) + seen.count[layer]
    rotations = {layer: rotation for layer, rotation in rotations.items() if rotation.first}
    planes = {len(rotation.first) for rotation in rotations.values()}
    if len(planes) != 1:
        raise UnsupportedModelError(f"{model.name} has layers with different rotary planes.")
    shape = model.shape
    share = np.full((shape.n_layers, shape.n_heads, planes.pop()), np.nan)
    frequency = np.full((shape.n_layers, share.shape[-1]), np.nan)
    for layer, rotation in rotations.items():
        speed = rotation.frequency.abs().cpu()
        order = speed.argsort(descending=True)
        seen_by = count[layer].where(count[layer] > 0, torch.nan)
        share[layer] = (total[layer] / seen_by[:, None])[:, order].numpy()
        frequency[layer] = speed[order].numpy()
    return RotaryContributions(share, frequency)


@dataclass
class _Seen:
    """Sums of the shares over the queries of a batch."""

    batch: Probe
    rotations: dict[int, Rotation]
    total: dict[int, Float[Tensor, "head plane"]] = field(default_factory=dict)
    count: dict[int, Float[Tensor, " head"]] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Every attention layer."""
        return at_layers(shape, self._on_layer)

    def _on_layer(self, view: TapView) -> None:
        """Add one layer's queries."""
        wanted = self.batch.mark("answering")
        positions = wanted.any(0).nonzero().flatten()
        seen = replace(view.query_keys(positions), rotation=self.rotations[view.layer])
        shares = plane_shares(seen, far_keys(seen)).cpu().double()
        chosen = wanted[:, None, positions, None].to(shares.dtype)
        self.total[view.layer] = (shares.nan_to_num(0) * chosen).sum((0, 2))
        known = ~shares.isnan().any(-1) & (chosen[..., 0] > 0)
        self.count[view.layer] = known.sum((0, 2)).cpu().double()
