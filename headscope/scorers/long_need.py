"""Whether a query needs more than its local tokens: exactly, and guessed from two moments."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headscope.errors import InputError
from headscope.matches import Matches
from headscope.probes.probe import Probe
from headscope.rows import AttentionRows
from headscope.scorer import Scorer, every_query, match_scorer, row_scorer
from headscope.scorers.streaming import check_widths, local_keys, out_of_sight

Moments = Literal["bulk", "local"]
_QADA = "QAdA, Donhauser et al. 2025 (arXiv 2502.09647), {}"
# Beyond this the log-normal mean says nothing; as a share it is 1 long before.
_LARGEST_LOG = 1e4


def asked(probe: Probe) -> Bool[Tensor, "batch pos"]:
    """The question's tokens and the positions that predict the answer."""
    return every_query(probe) & (probe.mark("question") | probe.mark("answering"))


def long_need(
    sink: int = 16, recent: int = 128, threshold: int | float = 0.6, *, name: str | None = None
) -> Scorer:
    """Make the scorer of how often a head needs what is not local; ``long_need`` is 16 and 128.

    The share of queries whose attention on the first ``sink`` and the last ``recent`` tokens is
    below ``threshold`` of all their attention (less a learned sink's); in [0, 1], over the
    question and the answer's predictions. NaN where a query sees nothing else. The source's
    oracle; its threshold is free, 0.6 is ours.

    Weakness: a yes or no per query; a head just above the threshold looks like a local one.

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
        f"Share of queries that need more than {sink} first and {recent} last tokens."
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


def long_need_predicted(
    sink: int = 16,
    recent: int = 128,
    threshold: int | float = 0.6,
    moments: Moments = "bulk",
    *,
    both: bool = False,
    name: str | None = None,
) -> Scorer:
    """Make the scorer of how often two moments of the scores say that a head needs more.

    As :func:`long_need`, with the attention on the ``n`` tokens that are not local guessed as
    ``n exp(mean + variance / 2)`` of a normal distribution of scores, against the exact sum over
    the local ones. The moments are those of the scores with the far keys (``bulk``; the same
    as with the mean and covariance of those keys, which is what a cache would keep), or with the
    last ``recent`` keys, so that nothing far is read at all (``local``). In [0, 1].

    Args:
        sink: first tokens that are always local.
        recent: last tokens that are.
        threshold: share of the attention that local tokens must have.
        moments: where they are taken.
        both: count the queries where guess and truth say yes, for precision and recall.
        name: of the scorer.

    Weakness: heavy-tailed scores blow the variance up, so that local heads are called long.

    Example:
        >>> type(long_need_predicted(sink=1, recent=2)).__name__
        'Scorer'
    """
    check_widths(sink, recent)
    _check_threshold(threshold)
    if moments not in ("bulk", "local"):
        raise InputError(f"moments={moments!r} is unknown: 'bulk' or 'local'.")

    def function(seen: Matches, probe: Probe) -> Float[Tensor, "batch head query"]:
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
        f"Share of queries said to need more than {sink} first and {recent} last tokens by the "
        f"mean and variance of their {'far' if moments == 'bulk' else 'local'} scores."
    )
    return match_scorer(
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
