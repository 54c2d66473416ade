"""Exact edge patching: take out one edge at a time, and run everything that follows again."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from headscope.edges.passes import measured_with, values_with
from headscope.edges.written import ENTRIES, EdgeBatch
from headscope.models.taps import Tap

Advance = Callable[[float], None]


@torch.no_grad()
def exact_scores(batch: EdgeBatch, advance: Advance) -> Float[Tensor, "batch edge"]:
    """Change of the metric when one edge carries what its source writes once corrupted.

    Args:
        batch: the batch.
        advance: is told how many edges are done.
    """
    clean = batch.clean_value()
    parts: list[Tensor] = []
    for layer in range(batch.study.wiring.n_layers):
        parts += _into_heads(batch, layer, advance)
        parts.append(_into_mlp(batch, layer, advance))
    parts.append(_into_output(batch, advance))
    return (torch.cat(parts) - clean).mT.cpu().double()


def _into_heads(batch: EdgeBatch, layer: int, advance: Advance) -> Iterator[Tensor]:
    """Metric of runs with one edge into a head taken out, ``[source batch]`` per slot and head."""
    wiring = batch.study.wiring
    taps = tuple(Tap(site, layer) for site in ENTRIES)
    z_tap = Tap("z", layer)
    clean = {tap: batch.clean.taps[tap] for tap in (*taps, z_tap)}
    stream = batch.clean.taps[Tap("resid_pre", layer)]
    change = batch.change[:, : wiring.before(layer)].transpose(0, 1)
    moved = values_with(batch, {Tap("resid_pre", layer): stream + change}, taps)
    for entry in taps:
        # A head's output depends on its own inputs alone: all heads are patched in one run.
        given = {
            tap: moved[tap] if tap == entry else clean[tap].expand_as(moved[tap]) for tap in taps
        }
        z = values_with(batch, given, (z_tap,))[z_tap]
        for head in range(wiring.n_heads):
            patched = clean[z_tap].repeat(len(z), 1, 1, 1, 1)
            patched[..., head, :] = z[..., head, :]
            yield _measured(batch, z_tap, patched, advance)


def _into_mlp(batch: EdgeBatch, layer: int, advance: Advance) -> Float[Tensor, "source batch"]:
    wiring, out = batch.study.wiring, Tap("mlp_out", layer)
    entry = Tap("resid_pre" if wiring.parallel[layer] else "attn_out", layer)
    change = batch.change[:, : wiring.before_mlp(layer)].transpose(0, 1)
    moved = values_with(batch, {entry: batch.clean.taps[entry] + change}, (out,))[out]
    return _measured(batch, out, moved, advance)


def _into_output(batch: EdgeBatch, advance: Advance) -> Float[Tensor, "source batch"]:
    last = Tap("resid_post", batch.study.wiring.n_layers - 1)
    patched = batch.clean.taps[last] + batch.change.transpose(0, 1)
    return _measured(batch, last, patched, advance)


def _measured(
    batch: EdgeBatch, tap: Tap, values: Tensor, advance: Advance
) -> Float[Tensor, "run batch"]:
    found = measured_with(batch, {tap: values})
    advance(float(len(values)))
    return found
