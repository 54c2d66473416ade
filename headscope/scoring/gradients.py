"""Sums of the scorers that read gradients: a forward and a backward pass a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.ablation.engine import Batch
from headscope.ablation.gradients import check_slope, total_metric, whole_batches
from headscope.ablation.run import Study
from headscope.base.options import RunOptions
from headscope.base.progress import Advance
from headscope.edits import Site
from headscope.metrics import AnyMetric
from headscope.models.protocol import HeadModel
from headscope.probes.probe import Probe
from headscope.scorer import Scorer
from headscope.scoring.accumulate import RunningSums, Sums
from headscope.views.outputs import HeadGradients


@dataclass(frozen=True, eq=False)
class _Added:
    """Adds a leaf of zeros to every head output, whose gradient is that of the output."""

    leaves: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    seen: dict[int, Float[Tensor, "batch pos head d_head"]] = field(default_factory=dict)
    layers: frozenset[int] = frozenset()
    site: Site = "z"

    def __call__(self, layer: int, value: Tensor) -> Tensor:
        self.seen[layer] = value.detach()
        leaf = torch.zeros_like(value, dtype=torch.float32, requires_grad=True)
        self.leaves[layer] = leaf
        return value + leaf.to(value)


def gradient_sums(
    model: HeadModel,
    probe: Probe,
    metric: AnyMetric,
    scorers: Sequence[Scorer],
    options: RunOptions,
    advance: Advance,
) -> dict[str, Sums]:
    """Sums of every scorer over a probe; missing where the metric reads nothing of an example.

    Args:
        model: that is run.
        probe: what to run.
        metric: whose gradients the scorers read.
        scorers: of gradients.
        options: how it is run.
        advance: counts examples, layer by layer.

    Raises:
        InputError: if the metric has no gradient at the clean run.
    """
    check_slope(model, metric, None, 1)
    study = Study.of(model, probe, metric, options.quiet)
    layers = model.shape.attention_layers
    read = metric.reads(probe).any(1)
    names = [scorer.name for scorer in scorers]
    heads = (model.shape.n_layers, model.shape.n_heads)
    whole = RunningSums(names, *heads, len(probe)).moved()
    for chosen, batch in whole_batches(study):
        part, counted = batch.probe.to("cpu"), read[chosen].cpu()
        sums = RunningSums(names, *heads, len(part))
        for seen in _by_layer(model, batch, layers):
            for scorer in scorers:
                wanted = scorer.queries(part) & part.real & counted[:, None]
                values = scorer(seen, batch.probe.to(seen.z.device))
                sums.add(scorer.name, seen.layer, values, wanted.to(values.device))
            advance(float(len(part)))
        for name, found in sums.moved().items():
            whole[name].total[..., chosen] = found.total
            whole[name].count[..., chosen] = found.count
            whole[name].missing += found.missing
    return whole


def _by_layer(model: HeadModel, batch: Batch, layers: Sequence[int]) -> Iterator[HeadGradients]:
    """Outputs of every layer with their gradients, of one forward and one backward pass."""
    added = _Added(layers=frozenset(layers))
    with torch.enable_grad():
        total = total_metric(model, batch, (added,))
        found = torch.autograd.grad(total, [added.leaves[layer] for layer in layers])
    for layer, gradient in zip(layers, found, strict=True):
        z = added.seen[layer].float()
        yield HeadGradients(layer, torch.arange(z.shape[1], device=z.device), z, gradient)
