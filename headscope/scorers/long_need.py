"""Scorers of long-range need: tokens that are neither the first ones nor local.

They measure whether a query needs such tokens (exactly, and predicted from two moments), what a
head loses when it sees only the first and the last tokens, and which rotary frequencies carry its
scores with far tokens.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.base.arguments import checked
from headscope.errors import InputError
from headscope.probes.probe import Probe
from headscope.scorer import Scorer, every_query, output_scorer, qk_scorer, row_scorer
from headscope.scorers.retrieval import answering
from headscope.views import AttentionRows, HeadOutputs, QueryKeys, Rotation

# A row that sums to more has no sink; the rest is rounding.
_NO_SINK = 1 - 1e-5


@checked
def streaming_gap(sink: int = 64, recent: int = 256, *, name: str | None = None) -> Scorer:
    """Make a scorer of full against streaming attention; ``streaming_gap`` uses 64 and 256.

    ``|(z_i - s_i) W_O| / (|z_i W_O| + |s_i W_O|)``, where ``s_i`` is the head's output if attention
    is limited to the first ``sink`` and the last ``recent`` tokens, with the softmax taken over
    those: from 0, for a head that needs nothing else, up to 1. Averaged over the positions that
    predict the answer and have tokens out of that range; NaN elsewhere. It is a training-free proxy
    for DuoAttention's gate, which learns per key/value head how much a long-context task needs full
    attention: aggregate with ``headscope.retrieval.by_kv_head``. Its evaluation uses 64 and 256, so
    texts must be longer than 320 tokens; pass smaller widths for shorter ones.

    Weakness: it takes one head at a time and only its own output; the gate is learned for all heads
    together and judged by the last hidden state.

    Args:
        sink: number of first tokens in the cache.
        recent: number of last tokens in the cache.
        name: name of the scorer. Default: with both numbers.

    Returns:
        The scorer.

    Raises:
        InputError: if a width is invalid.

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
        f"Share of the head's write that is lost with only the first {sink} and last {recent} "
        "tokens."
    )
    return output_scorer(
        name=name or f"streaming_gap_{sink}_{recent}",
        unit="share",
        bounds=(0.0, 1.0),
        source="DuoAttention, Xiao et al. 2024 (arXiv 2410.10819), without training",
        queries=answering,
        probe="needle",
        control="needle",
        needs=("attention_write", "values", "query_keys", "causal"),
    )(function)


def _softmax_over(
    keys: Bool[Tensor, "batch query key"], outputs: HeadOutputs
) -> Float[Tensor, "batch head query key"]:
    """Softmax over some keys only; a learned sink keeps its logit."""
    seen, whole = outputs.query_keys, outputs.rows.total
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
    """Mask of the first ``sink`` keys of the text and the last ``recent`` keys of the query."""
    keys = torch.arange(rows.visible.shape[-1], device=rows.visible.device)
    first = probe.position_in_text[:, None, : len(keys)] < sink
    last = keys[None] > rows.query_pos[:, None] - recent
    return first | last[None]


def out_of_sight(
    rows: AttentionRows, kept: Bool[Tensor, "batch query key"]
) -> Bool[Tensor, "batch query"]:
    """Mask of the queries that see keys beyond the local ones."""
    return (rows.visible & ~kept).any(-1)


default_streaming_gap = streaming_gap(name="streaming_gap")


QueryStatistics = Literal["bulk", "local"]
_QADA = "QAdA, Donhauser et al. 2025 (arXiv 2502.09647), {}"
# Beyond this the log-normal mean is meaningless; as a share it reaches 1 long before.
_LARGEST_LOG = 1e4


def asked(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """Mask of the question's tokens and the positions that predict the answer."""
    return every_query(probe) & (probe.mark("question") | probe.mark("answering"))


@checked
def long_need(
    sink: int = 16, recent: int = 128, threshold: int | float = 0.6, *, name: str | None = None
) -> Scorer:
    """Make a scorer of how often a head needs non-local tokens; ``long_need`` uses 16 and 128.

    The share of queries whose attention on the first ``sink`` and the last ``recent`` tokens is
    below ``threshold`` of all their attention (without a learned sink's); in [0, 1], over the
    question and the positions that predict the answer. NaN where a query sees nothing else. It is
    the source's oracle; the source leaves the threshold open, and 0.6 is our choice.

    Weakness: each query counts as yes or no; a head just above the threshold looks like a local
    one.

    Args:
        sink: number of first tokens that count as local.
        recent: number of last tokens that count as local.
        threshold: share of the attention that local tokens must get.
        name: name of the scorer. Default: with both numbers.

    Returns:
        The scorer.

    Raises:
        InputError: if a width or the threshold is invalid.

    Example:
        >>> type(long_need(sink=1, recent=2)).__name__
        'Scorer'
    """
    check_widths(sink, recent)
    _check_threshold(threshold)

    def function(rows: AttentionRows, probe: Probe) -> Float[Tensor, "batch head query"]:
        kept = local_keys(rows, probe, sink, recent)
        near: Tensor = torch.linalg.vecdot(rows.pattern, kept[:, None].to(rows.pattern.dtype))
        far = (near / rows.total.clamp_min(1e-30) < threshold).float()
        return far.masked_fill(~out_of_sight(rows, kept)[:, None], torch.nan)

    function.__doc__ = (
        f"Share of queries that need more than the first {sink} and last {recent} tokens."
    )
    return row_scorer(
        name=name or f"long_need_{sink}_{recent}",
        unit="share",
        source=_QADA.format("oracle criterion"),
        probe="needle",
        queries=asked,
        control="needle",
        needs=("causal",),
    )(function)


@checked
def long_need_predicted(
    sink: int = 16,
    recent: int = 128,
    threshold: int | float = 0.6,
    moments: QueryStatistics = "bulk",
    *,
    both: bool = False,
    name: str | None = None,
) -> Scorer:
    """Make a scorer that predicts ``long_need`` from the mean and variance of attention scores.

    Like :func:`long_need`, but the attention on the ``n`` non-local tokens is predicted as ``n
    exp(mean + variance / 2)``, as for normally distributed scores, against the exact sum over the
    local ones. The moments are those of the scores with the far keys (``bulk``; the same as with
    the mean and covariance of those keys, which is what a cache would keep), or with the last
    ``recent`` keys, so that nothing far is read at all (``local``). In [0, 1].

    Args:
        sink: number of first tokens that always count as local.
        recent: number of last tokens that count as local.
        threshold: share of the attention that local tokens must get.
        moments: ``"bulk"`` or ``"local"``.
        both: count the queries where prediction and truth agree on yes, for precision and recall.
        name: name of the scorer.

    Weakness: heavy-tailed scores inflate the variance, so that local heads are called long-range.

    Returns:
        The scorer.

    Raises:
        InputError: if a width, the threshold or ``moments`` is invalid.

    Example:
        >>> type(long_need_predicted(sink=1, recent=2)).__name__
        'Scorer'
    """
    check_widths(sink, recent)
    _check_threshold(threshold)
    if moments not in ("bulk", "local"):
        raise InputError(f"moments={moments!r} is unknown: 'bulk' or 'local'.")

    def function(seen: QueryKeys, probe: Probe) -> Float[Tensor, "batch head query"]:
        rows = AttentionRows(seen.layer, seen.query_pos, seen.scores, seen.visible)
        kept = local_keys(rows, probe, sink, recent)
        near, bulk = seen.visible & kept, seen.visible & ~kept
        local = _log_sum(seen.scores, near)
        mean, variance = _moments(seen.scores, bulk if moments == "bulk" else _last(rows, recent))
        far = bulk.sum(-1).log()[:, None] + mean + variance / 2
        flagged = _is_long(local, far.clamp(-_LARGEST_LOG, _LARGEST_LOG), threshold)
        if both:
            flagged &= _is_long(local, _log_sum(seen.scores, bulk), threshold)
        return flagged.float().masked_fill(~bulk.any(-1)[:, None], torch.nan)

    function.__doc__ = (
        f"Share of queries predicted to need more than the first {sink} and last {recent} tokens, "
        "from "
        f"the mean and variance of their {'far' if moments == 'bulk' else 'local'} scores."
    )
    return qk_scorer(
        name=name or f"long_need_{sink}_{recent}_{moments}{'_both' if both else ''}",
        unit="share",
        bounds=(0.0, 1.0),
        source=_QADA.format("second-moment criterion"),
        queries=asked,
        needs=("causal",),
    )(function)


def _check_threshold(threshold: int | float) -> None:
    if not 0 < threshold < 1:
        raise InputError(f"threshold={threshold} is a share of the attention between 0 and 1.")


def _last(rows: AttentionRows, recent: int) -> Bool[Tensor, "batch query key"]:
    keys = torch.arange(rows.visible.shape[-1], device=rows.visible.device)
    return rows.visible & (keys[None] > rows.query_pos[:, None] - recent)[None]


def _log_sum(
    scores: Float[Tensor, "batch head query key"], keys: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head query"]:
    return scores.masked_fill(~keys[:, None], -torch.inf).logsumexp(-1)


def _moments(
    scores: Float[Tensor, "batch head query key"], keys: Bool[Tensor, "batch query key"]
) -> tuple[Float[Tensor, "batch head query"], Float[Tensor, "batch head query"]]:
    """Mean and variance of the scores over a set of keys."""
    weights = keys[:, None].to(scores.dtype)
    count = weights.sum(-1).clamp_min(1)
    mean = torch.linalg.vecdot(scores, weights) / count
    away = (scores - mean[..., None]) * weights
    return mean, away.square().sum(-1) / count


def _is_long(
    local: Float[Tensor, "batch head query"],
    far: Float[Tensor, "batch head query"],
    threshold: int | float,
) -> Bool[Tensor, "batch head query"]:
    return local - torch.logaddexp(local, far) < math.log(threshold)


default_long_need = long_need(name="long_need")
default_predicted = long_need_predicted(name="long_need_predicted")
default_predicted_local = long_need_predicted(moments="local", name="long_need_predicted_local")


@qk_scorer(
    unit="correlation",
    bounds=(-1.0, 1.0),
    source="Hong et al. 2024 (arXiv 2410.08703), positional heads, by contribution of dimensions",
    queries=answering,
    needs=("rotary", "causal"),
)
def rotary_slowness(seen: QueryKeys, probe: Probe) -> Float[Tensor, "batch head query"]:
    """Correlation of a rotary plane's slowness with its contribution to far attention scores.

    Plane p adds ``c_p(i, j) = q_a k_a + q_b k_b`` over its two coordinates, after rotation. Its
    share is the mean of ``|c_p|`` over the keys in the farther half of what the query sees,
    over the sum of all planes' means. The score is Pearson's correlation of that share with the
    planes' rank from the fastest to the slowest, in [-1, 1], over the positions that predict the
    answer. Towards 1 a head's far attention rests on slow planes (content), towards -1 on fast
    ones (exact distance). NaN in layers without rotary positions (some of cohere2's or smollm3's).
    ``headscope.retrieval.rotary_contributions`` gives the shares.

    Weakness: large contributions that cancel still count, and unrotated dimensions do not.
    """
    share = plane_shares(seen, far_keys(seen))
    if share.shape[-1] < 2:  # a correlation needs two planes
        return share.new_full(share.shape[:-1], torch.nan)
    order = turning(seen).frequency.abs().argsort(descending=True)
    share = share[..., order.to(share.device)]
    rank = torch.arange(share.shape[-1], device=share.device, dtype=share.dtype)
    rank, share = rank - rank.mean(), share - share.mean(-1, keepdim=True)
    size = (rank.square().sum() * share.square().sum(-1)).sqrt()
    found = (share * rank).sum(-1) / size.where(size > 0, torch.nan)
    return found.clamp(-1, 1)


def turning(seen: QueryKeys) -> Rotation:
    """Rotation of the layer; the engine passes it to scorers that declare ``needs=("rotary",)``."""
    if seen.rotation is None:
        raise InputError("the scorer must declare needs=('rotary',) to receive the rotation.")
    return seen.rotation


def far_keys(seen: QueryKeys) -> Bool[Tensor, "batch query key"]:
    """Mask of the keys in the farther half of what each query sees."""
    keys = torch.arange(seen.visible.shape[-1], device=seen.visible.device)
    first = seen.visible.int().argmax(-1)
    middle = first + (seen.query_pos - first) / 2
    return seen.visible & (keys < middle[..., None])


def plane_shares(
    seen: QueryKeys, keys: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch head query plane"]:
    """Share of each rotary plane in the size of the scores with some keys; NaN without keys."""
    weights = keys[:, None].to(seen.key.dtype)
    sizes = []
    if not turning(seen).first:  # a layer without rotary positions
        return seen.query.new_zeros(*seen.query.shape[:3], 0)
    for plane in zip(turning(seen).first, turning(seen).second, strict=True):
        at = torch.tensor(plane, device=seen.key.device)
        sizes.append(torch.linalg.vecdot(seen.products(at).abs(), weights))
    stacked = torch.stack(sizes, -1)
    total = stacked.sum(-1, keepdim=True)
    return stacked / total.where(total > 0, torch.nan)
