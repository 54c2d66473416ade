"""What a head loses when it sees the first and the last tokens only."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import InputError
from headscope.outputs import HeadOutputs
from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorer import Scorer, output_scorer
from headscope.scorers.retrieval import answering

# A row that sums to more has lost nothing to a sink but rounding.
_NO_SINK = 1 - 1e-5


def streaming_gap(sink: int = 64, recent: int = 256, *, name: str | None = None) -> Scorer:
    """Make the scorer of full against streaming attention; ``streaming_gap`` is 64 and 256.

    ``|(z_i - s_i) W_O| / (|z_i W_O| + |s_i W_O|)``, where ``s_i`` is the head's output with
    attention on the first ``sink`` and the last ``recent`` tokens alone, the softmax taken over
    those: 0 for a head to which nothing else matters, up to 1. Over the positions that predict
    the answer and have something out of sight; NaN elsewhere. A proxy without training of
    DuoAttention's gate, which learns per key/value head how much a long-context task needs full
    attention: aggregate with ``headscope.retrieval.by_kv_head``. Its evaluation uses 64 and 256,
    so texts must be longer than 320 tokens; for shorter ones make it with smaller widths.

    Weakness: one head at a time and its own output only; the gate is learned for all together
    and judged by the last hidden state.

    Raises:
        InputError: if a width makes no sense.

    Example:
        >>> type(streaming_gap(sink=1, recent=2)).__name__
        'Scorer'
    """
    check_widths(sink, recent)

    def function(outputs: HeadOutputs, probe: Probe) -> Float[Tensor, "batch head query"]:
        rows = outputs.rows
        kept = local_keys(rows, probe, sink, recent)
        stream = replace(outputs, z=outputs.averaged(_softmax_over(kept & rows.visible, outputs)))
        lost = replace(outputs, z=outputs.z - stream.z).norm()
        gap = lost / (outputs.norm() + stream.norm()).clamp_min(1e-30)
        return gap.masked_fill(~out_of_sight(rows, kept)[:, None], torch.nan)

    function.__doc__ = (
        f"Share of the head's write that is lost when it sees the first {sink} and the last "
        f"{recent} tokens only."
    )
    return output_scorer(
        name=name or f"streaming_gap_{sink}_{recent}",
        unit="share",
        bounds=(0.0, 1.0),
        source="DuoAttention, Xiao et al. 2024 (arXiv 2410.10819), without training",
        queries=answering,
        probe="needle",
        control="needle",
        needs=("attention_write", "values", "matches", "causal"),
    )(function)


def _softmax_over(
    keys: Bool[Tensor, "batch query key"], outputs: HeadOutputs
) -> Float[Tensor, "batch head query key"]:
    """Attention over some keys alone; a learned sink keeps its logit."""
    seen, whole = outputs.matches, outputs.rows.total
    near = seen.scores.masked_fill(~keys[:, None], -torch.inf)
    every = seen.scores.masked_fill(~seen.visible[:, None], -torch.inf).logsumexp(-1)
    sink = every - torch.logit(whole.clamp_max(1))
    sink = sink.masked_fill(whole > _NO_SINK, -torch.inf)
    return near.softmax(-1) * torch.sigmoid(near.logsumexp(-1) - sink)[..., None]


def check_widths(sink: int, recent: int) -> None:
    """Raise InputError unless some tokens are local."""
    if sink < 0 or recent < 1:
        raise InputError(f"sink={sink} and recent={recent}: give 0 or more and 1 or more.")


def local_keys(
    rows: AttentionRows, probe: Probe, sink: int, recent: int
) -> Bool[Tensor, "batch query key"]:
    """Keys among the first ``sink`` of the text or the last ``recent`` of the query."""
    keys = torch.arange(rows.visible.shape[-1], device=rows.visible.device)
    first = probe.position_in_text[:, None, : len(keys)] < sink
    last = keys[None] > rows.query_pos[:, None] - recent
    return first | last[None]


def out_of_sight(
    rows: AttentionRows, kept: Bool[Tensor, "batch query key"]
) -> Bool[Tensor, "batch query"]:
    """Queries that see keys beyond the local ones."""
    return (rows.visible & ~kept).any(-1)


default_streaming_gap = streaming_gap(name="streaming_gap")
