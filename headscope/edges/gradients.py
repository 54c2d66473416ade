"""Edge attribution patching: what every edge would change, by one gradient or several."""

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.edges.wiring import Wiring
from headscope.edges.written import EdgeBatch, Written, run_apart
from headscope.errors import InputError
from headscope.models.taps import Tap


def gradient_scores(batch: EdgeBatch, steps: int) -> Float[Tensor, "batch edge"]:
    """First-order effect of every edge on every example.

    The change of what the source writes, times the gradient of the metric by what enters the
    target's slot, summed over positions.

    Args:
        batch: the batch.
        steps: 0 takes the gradient of the clean run; more take the mean gradient of as many runs
            whose embedding goes from the corrupt towards the clean one,
            ``corrupt + k / steps (clean - corrupt)`` for k from 0.
    """
    clean = batch.clean.sources[:, 0]
    if steps == 0:
        return _scores(batch, None)
    total = torch.zeros(len(batch.texts.tokens), len(batch.study.wiring), dtype=torch.float64)
    for step in range(steps):
        total += _scores(batch, clean + (1 - step / steps) * batch.change[:, 0]) / steps
    return total


def _scores(
    batch: EdgeBatch, embed: Float[Tensor, "batch pos d_model"] | None
) -> Float[Tensor, "batch edge"]:
    """Scores by the gradient of one run."""
    with torch.enable_grad():
        run = run_apart(
            batch.study.model, batch.texts, embed=embed, logits_at=batch.measured.at, grad=True
        )
        assert run.logits is not None  # noqa: S101  # they were asked for
        values = batch.measured(run.logits)[0][batch.measured.counted.to(run.logits.device)]
        if not values.requires_grad:
            raise InputError(
                f"{batch.measured.metric.name} has no gradient, so no edge can be estimated by "
                "one: take another metric, or method='exact'."
            )
        return _contracted(batch, run, values.sum())


def _contracted(batch: EdgeBatch, run: Written, total: Tensor) -> Float[Tensor, "batch edge"]:
    """Gradients at every input, multiplied with changes as they come."""
    wiring = batch.study.wiring
    outputs = [
        run.taps[Tap(site, layer)]
        for layer in range(wiring.n_layers)
        for site in ("z", "mlp_out", "resid_post")
    ]
    found = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    parts = []
    for layer in range(wiring.n_layers):
        z, mlp = found[3 * layer : 3 * layer + 2]
        inputs = _head_inputs(run, layer, z, wiring, batch.study.model.shape.group_size)
        parts.append(_times(batch.change[:, : wiring.before(layer)], inputs))
        at_mlp = _mlp_input(run, layer, mlp, wiring)
        parts.append(_times(batch.change[:, : wiring.before_mlp(layer)], at_mlp[:, None]))
    last = found[-1]
    assert last is not None  # noqa: S101  # the logits come from it
    parts.append(_times(batch.change, last[:, None]))
    return torch.cat([part.flatten(1) for part in parts], 1)


def _times(
    change: Float[Tensor, "batch source pos d_model"],
    gradient: Float[Tensor, "batch target pos d_model"],
) -> Float[Tensor, "batch target source"]:
    """Inner products over positions and dimensions; sums in fp64, on the CPU."""
    return (gradient.float().flatten(2) @ change.flatten(2).mT).cpu().double()


def _head_inputs(
    run: Written, layer: int, z_slope: Tensor | None, wiring: Wiring, group: int
) -> Float[Tensor, "batch slot_head pos d_model"]:
    """Gradient at the residual stream that enters every slot of every head of a layer.

    First back through attention, for one query head of every group at a time, so that the slope
    at a shared key or value is told apart by who read it; then through whatever makes queries,
    keys and values of the residual stream, head by head.
    """
    stream = run.taps[Tap("resid_pre", layer)]
    z = run.taps[Tap("z", layer)]
    slope = torch.zeros_like(z) if z_slope is None else z_slope
    entries = [run.taps[Tap(site, layer)] for site in ("query", "key", "value")]
    found: dict[tuple[int, int], Tensor] = {}
    for member in range(group):
        mine = torch.zeros_like(slope)
        mine[:, :, member::group] = slope[:, :, member::group]
        slopes = torch.autograd.grad(z, entries, mine, retain_graph=True)
        for entry, (made, at) in enumerate(zip(entries, slopes, strict=True)):
            for head in range(member, wiring.n_heads, group):
                own = head if entry == 0 else head // group
                found[entry, head] = _pulled_back(stream, made, at, own)
    order = [(entry, head) for entry in range(3) for head in range(wiring.n_heads)]
    return torch.stack([found[place] for place in order], 1)


def _pulled_back(
    stream: Float[Tensor, "batch pos d_model"],
    made: Float[Tensor, "batch head pos d_head"],
    slope: Float[Tensor, "batch head pos d_head"],
    head: int,
) -> Float[Tensor, "batch pos d_model"]:
    """Slope at the residual stream by one head's queries, keys or values."""
    one = torch.zeros_like(slope)
    one[:, head] = slope[:, head]
    (found,) = torch.autograd.grad(made, stream, one, retain_graph=True)
    return found


def _mlp_input(
    run: Written, layer: int, slope: Tensor | None, wiring: Wiring
) -> Float[Tensor, "batch pos d_model"]:
    """Gradient at the residual stream that enters an MLP.

    After attention the stream is its input plus what attention wrote, so a slope at what attention
    wrote, with the MLP's output as the only way on, is the slope at the stream.
    """
    site = "resid_pre" if wiring.parallel[layer] else "attn_out"
    mlp, entry = run.taps[Tap("mlp_out", layer)], run.taps[Tap(site, layer)]
    if slope is None:
        return torch.zeros_like(run.taps[Tap("resid_pre", layer)])
    (found,) = torch.autograd.grad(mlp, entry, slope, retain_graph=True)
    return found
