"""Path patching: what one head tells another, or the logits, without the heads in between."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from headscope import edits
from headscope.ablation.engine import Batch
from headscope.ablation.heads import as_scores
from headscope.ablation.patching import aligned_pair
from headscope.ablation.run import Metricish, Study, by_head, present, without_rounding
from headscope.base.options import RunOptions
from headscope.edits import Heads, Variant
from headscope.errors import InputError
from headscope.heads import HeadIndex
from headscope.interventions.donors import head_values
from headscope.models.protocol import HeadModel
from headscope.models.running import own_types
from headscope.models.taps import Tap
from headscope.probes.probe import Probe
from headscope.table import HeadScores

Entry = Literal["query", "key", "value"]


@own_types()
def path_patch(
    model: HeadModel,
    probe: Probe,
    metric: Metricish,
    receivers: Heads | None = None,
    entry: Entry = "query",
    *,
    senders: Heads | None = None,
    batch_size: int | None = None,
    memory: str | int | None = None,
    progress: bool | None = None,
) -> HeadScores:
    """Effect on the metric of a sender's corrupt output, by the paths to some receivers alone.

    Wang et al. 2022 (arXiv 2211.00593), appendix B: the clean run with the sender's output taken
    from the corrupt run, all other heads frozen to their clean outputs and MLPs computed anew,
    gives the receivers' queries (or keys, or values); the clean run with those gives the metric.
    Without receivers the first run's own logits are read: the direct effect. This is not the
    direct-edge patch that freezes MLPs too.

    Args:
        model: the model.
        probe: with a ``corrupt`` pair.
        metric: of :mod:`headscope.metrics`, or ``f(logits, probe) -> [batch]``.
        receivers: heads that listen; None: the logits.
        entry: where they listen. Keys and values belong to the whole key/value head.
        senders: default: all heads below the highest receiver.
        batch_size: examples per recorded pass.
        memory: what a stack of variants may take.
        progress: show a bar.

    Returns:
        Effect per sender; NaN where no path leads from it to a receiver.

    Example:
        >>> names = hs.probes.pairs(model, "ioi", batch=2)
        >>> effect = hs.path_patch(model, names, hs.metrics.logit_difference, receivers="L2H1")
        >>> bool(np.isnan(effect.mean[2]).all())  # no path from heads of the receiver's own layer
        True
    """
    options = RunOptions(batch_size, memory, progress=progress)
    if entry not in ("query", "key", "value"):
        raise InputError(f"entry is 'query', 'key' or 'value'; got {entry!r}.")
    clean, corrupt = aligned_pair(probe)
    listening = () if receivers is None else present(model, receivers)
    top = max((head.layer for head in listening), default=model.shape.n_layers)
    chosen = [head for head in present(model, senders) if head.layer < top]
    if not chosen:
        raise InputError("no path leads from these senders to these receivers.")
    study = Study.of(model, clean, metric, options)
    parts, clean_parts = [], []
    total = float(len(chosen) * len(clean))
    with options.track(total, "path patching") as advance:
        for examples, batch in study.batches():
            donors = head_values(model, corrupt.tokens[examples], corrupt.real[examples])
            kept = batch.source.z or head_values(model, batch.probe.tokens, batch.probe.real)
            first = [_sent(model, sender, donors, kept, top) for sender in chosen]
            if listening:
                values = _received(model, batch, first, listening, entry)
            else:
                values = batch.values(first)
            advance(float(len(chosen) * len(batch.probe)))
            parts.append(values)
            clean_parts.append(batch.clean)
    unedited = torch.cat(clean_parts).numpy()
    effects = without_rounding(torch.cat(parts, 1).numpy() - unedited, unedited)
    name = "logits" if not listening else f"{entry} of {', '.join(map(str, listening))}"
    provenance = study.provenance(receivers=name)
    return as_scores(study, by_head(model, chosen, effects), "path", provenance)


def _sent(
    model: HeadModel,
    sender: HeadIndex,
    donors: dict[int, Tensor],
    kept: dict[int, Tensor],
    top: int,
) -> Variant:
    """The sender's corrupt output, and clean outputs of all heads above it up to the receivers."""
    above = [head for head in model.shape.heads if sender.layer < head.layer < top]
    frozen = (edits.patch(above, kept),) if above else ()
    return (edits.patch([sender], donors), *frozen)


def _received(
    model: HeadModel,
    batch: Batch,
    first: Sequence[Variant],
    listening: Sequence[HeadIndex],
    entry: Entry,
) -> Tensor:
    """The metric with the receivers' inputs of each first run."""
    shape = model.shape
    layers = sorted({head.layer for head in listening})
    heads = [
        head if entry == "query" else HeadIndex(head.layer, shape.kv_head(head.head))
        for head in listening
    ]
    size = max(1, batch.limit // (len(batch.probe) * batch.probe.length))
    done = []
    for start in range(0, len(first), size):
        some = first[start : start + size]
        # Receivers in a layer below another receiver are clean there: heads do not hear heads.
        found = batch.source.values_at(some, [Tap(entry, layer) for layer in layers])
        by_layer = {tap.layer or 0: value for tap, value in found.items()}
        second = [
            (edits.patch(heads, {n: value[i] for n, value in by_layer.items()}, site=entry),)
            for i in range(len(some))
        ]
        done.append(batch.values(second))
    return torch.cat(done)
