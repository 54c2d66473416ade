"""Values that edits need from other runs: means over a probe, and outputs of single examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headscope import capture
from headscope.edits import Site
from headscope.heads import ModelShape
from headscope.models.protocol import HeadModel
from headscope.models.taps import Reads, Tap, TapView, Texts, at_layers
from headscope.probes.probe import Probe


@dataclass
class _Sums:
    """Sums of head outputs over real positions, per layer."""

    real: Bool[Tensor, "batch pos"]
    per_position: bool
    sums: dict[int, Tensor] = field(default_factory=dict)

    def reads(self, shape: ModelShape) -> Reads:
        """Every layer's outputs."""
        return at_layers(shape, self._add)

    def _add(self, view: TapView) -> None:
        self.sums[view.layer] = summed(view.z, self.real, self.per_position)


def summed(z: Tensor, real: Tensor, per_position: bool) -> Tensor:
    """Sum of ``z [batch pos head d_head]`` over real positions, or over examples at each."""
    weights = real.to(z.device)[:, :, None, None]
    return (z.float() * weights).sum(0 if per_position else (0, 1))


def averaged(
    sums: Mapping[int, Tensor], real: Tensor, per_position: bool
) -> dict[int, Float[Tensor, "*pos head d_head"]]:
    """Sums divided by how many real positions they hold; 0 where there is none."""
    counts = real.sum(0)[:, None, None] if per_position else real.sum()
    return {layer: s / counts.to(s.device).clamp_min(1) for layer, s in sums.items()}


def head_means(
    model: HeadModel, probe: Probe, *, per_position: bool = False, batch_size: int | None = None
) -> dict[int, Float[Tensor, "*pos head d_head"]]:
    """Mean output of every head over a probe's real positions, before the output projection.

    Args:
        model: the model.
        probe: the reference.
        per_position: average over examples only, at each position of the batch.
        batch_size: examples per pass.

    Returns:
        By layer ``[head d_head]``, or ``[pos head d_head]``.

    Example:
        >>> means = hs.ablation.head_means(model, probe)
        >>> means[0].shape == (model.shape.n_heads, model.shape.d_head)
        True
    """
    total: dict[int, Tensor] = {}
    for _, part in capture.stream(
        model, probe, lambda batch, _: _Sums(batch.real, per_position), batch_size=batch_size
    ):
        for layer, s in part.sums.items():
            total[layer] = total[layer] + s if layer in total else s
    return averaged(total, probe.real, per_position)


@torch.no_grad()
def head_values(
    model: HeadModel,
    tokens: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"] | None = None,
    *,
    site: Site = "z",
    layers: Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """What all heads of some layers have at a site, for :func:`headscope.edits.patch`.

    Args:
        model: the model.
        tokens: one batch; all of it is kept.
        real: False at padding.
        site: see :class:`headscope.edits.HeadEdit`.
        layers: which; default: all with attention.

    Returns:
        By layer, in the layout of the site.

    Example:
        >>> z = hs.ablation.head_values(model, probe.tokens, layers=[1])[1]
        >>> z.shape == (*probe.tokens.shape, model.shape.n_heads, model.shape.d_head)
        True
    """
    chosen = model.shape.attention_layers if layers is None else layers
    found: dict[int, Tensor] = {}

    def keep(view: TapView) -> None:
        found[view.layer] = view.value.clone() if site == "z" else view.value

    reads = {Tap(site, layer): keep for layer in chosen}
    model.run(Texts(tokens, real), reads=reads, logits_at=torch.empty(0, dtype=torch.long))
    return found
